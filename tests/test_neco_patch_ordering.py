"""Alignment, references, masks and the loss: reference values and laws."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from neco.crops import crop_boxes
from neco.networks import Sorter
from neco.patch_ordering import (
    Ordering,
    Pairs,
    align,
    align_pairs,
    mask_pairs,
    ordering_loss,
    references_of_batch,
)
from neco.sorting import relaxed_sort

GOLDEN = Path(__file__).parent / "golden/neco"
LOSS = json.loads((GOLDEN / "neco_loss.json").read_text())


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Leaves and maps of the reference case: (leaves of student globals and locals, student maps, teacher maps)."""

    def maps(rows: Tensor, crops: int, size: int) -> list[Tensor]:
        side = size // LOSS["patch"]
        return list(rows.view(crops, LOSS["batch"], side, side, LOSS["dim"]).permute(0, 1, 4, 2, 3))

    (n_global, n_local), (big, small) = LOSS["nmb_crops"], LOSS["size_crops"]
    leaves = [torch.tensor(LOSS[key], dtype=dtype, requires_grad=True) for key in ("student_global", "student_local")]
    teacher = maps(torch.tensor(LOSS["teacher_global"], dtype=dtype), n_global, big)
    return leaves, maps(leaves[0], n_global, big) + maps(leaves[1], n_local, small), teacher


def boxes(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (n_global, n_local), (big, small) = LOSS["nmb_crops"], LOSS["size_crops"]
    absolute = torch.tensor(LOSS["absolute_boxes_xyxy"], dtype=dtype)
    return crop_boxes(absolute, [big] * n_global + [small] * n_local, n_global)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", LOSS["cases"], ids=lambda c: f"{c['network']}-{c['similarity']}-{c['student_steepness']}")
def test_reference_loss_and_gradients(case: dict, dtype: torch.dtype) -> None:
    leaves, student, teacher = inputs(dtype)
    sorters = [Sorter(case["network"], case[f"{who}_steepness"]) for who in ("student", "teacher")]
    options = Ordering(case["K"], *sorters, case["similarity"])
    pairs = align_pairs(student, teacher, *boxes(dtype), LOSS["patch"], options)
    references = torch.stack([references_of_batch(targets, None, None) for targets in pairs.targets])
    loss, by_pair = ordering_loss(pairs, references, options)
    tolerance = 1e-5 if dtype == torch.float64 else 1e-3
    assert loss.item() == pytest.approx(case["loss"], abs=tolerance)
    assert by_pair.tolist() == pytest.approx(case["pair_losses_in_order"], abs=tolerance)
    loss.backward()
    found = [leaf.grad.square().sum().item() for leaf in leaves]
    wanted = [case["grad_student_global_sqsum"], case["grad_student_local_sqsum"]]
    assert found == pytest.approx(wanted, rel=1e-3 if dtype == torch.float64 else 2e-2)
    first = torch.tensor(case["grad_student_global_first_row"], dtype=dtype)
    torch.testing.assert_close(leaves[0].grad[0], first, rtol=1e-3, atol=1e-7)


def test_reference_weights_and_masked_loss() -> None:
    sub = LOSS["sub"]
    keys = ("student_aligned", "teacher_aligned", "references")
    cells = {key: torch.tensor(sub[key], dtype=torch.float64).flatten(2).mT for key in keys}
    options = Ordering(2, Sorter("bitonic", sub["student_steepness"]), Sorter("bitonic", sub["teacher_steepness"]))
    pairs = Pairs([(0, 1)], cells["teacher_aligned"][None], cells["student_aligned"][None])
    references = cells["references"][None]
    loss, _ = ordering_loss(pairs, references, options)
    assert loss.item() == pytest.approx(sub["loss_all"], abs=1e-8)
    unit = [torch.nn.functional.normalize(x, dim=-1) for x in (cells["student_aligned"], cells["references"])]
    weights = relaxed_sort(unit[0] @ unit[1].mT, options.student)[1]  # [B, cell, reference i, rank j]
    expected = torch.tensor(sub["P"], dtype=torch.float64).flatten(3).permute(0, 3, 2, 1)
    torch.testing.assert_close(weights, expected, atol=1e-8, rtol=0)
    mask = torch.tensor(sub["mask_for_crop_1"], dtype=torch.float64).flatten(1).bool()[None]
    assert ordering_loss(pairs, references, options, mask)[0].item() == pytest.approx(sub["loss_masked"], abs=1e-8)
    nothing, _ = ordering_loss(pairs, references, options, torch.zeros_like(mask))
    assert nothing.item() == 0


def test_roi_align_reference_grids() -> None:
    roi = json.loads((GOLDEN / "crops.json").read_text())["roi"]
    maps = torch.tensor(roi["feature_map"], dtype=torch.float64)
    places = torch.tensor(roi["boxes_in_feature_units"], dtype=torch.float64).view(1, -1, 4)
    for key, expected in roi["output"].items():
        found = align(maps, 14 * places, 14, int(key[1:]))[0, :, :, 0]
        torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64).flatten(), atol=1e-6, rtol=0)


def test_same_maps_cost_the_entropy_and_the_teacher_gets_no_gradient() -> None:
    maps = [torch.randn(2, 5, 8, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    whole = torch.tensor([[[0.0, 0.0, 112.0, 112.0]]]).expand(2, 2, 2, 4).contiguous().double()
    options = Ordering(3, Sorter(), Sorter())
    pairs = align_pairs([maps[0], maps[0]], [maps[1], maps[1]], whole, whole, 14, options)
    twin = pairs._replace(cells=pairs.targets)
    references = torch.stack([references_of_batch(t, None, torch.Generator().manual_seed(1)) for t in pairs.targets])
    similarity = torch.nn.functional.normalize(pairs.targets, dim=-1) @ torch.nn.functional.normalize(references, dim=-1).mT
    weights = relaxed_sort(similarity, Sorter())[1]
    torch.testing.assert_close(ordering_loss(twin, references, options)[0], -(weights * weights.log()).sum((-1, -2)).mean() / 9)
    ordering_loss(pairs, references, options)[0].backward()
    assert maps[1].grad is None and maps[0].grad.abs().sum() > 0


def test_half_precision_maps_lose_little() -> None:
    _, student, teacher = inputs(torch.float32)
    options = Ordering(3)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        pairs = align_pairs([m.to(dtype) for m in student], [m.to(dtype) for m in teacher], *boxes(torch.float32), 14, options)
        references = torch.stack([references_of_batch(targets, None, None) for targets in pairs.targets])
        losses.append(ordering_loss(pairs, references, options)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_one_batch_can_be_learnt() -> None:
    leaves, _, _ = inputs(torch.float32)
    optimizer, options, seen = torch.optim.Adam(leaves, 0.02), Ordering(3, Sorter(steepness=20.0), Sorter(steepness=20.0)), []
    _, _, teacher = inputs(torch.float32)
    for _ in range(30):
        maps = [leaves[0].view(2, 2, 4, 4, 4).permute(0, 1, 4, 2, 3), leaves[1].view(1, 2, 2, 2, 4).permute(0, 1, 4, 2, 3)]
        pairs = align_pairs([*maps[0], *maps[1]], teacher, *boxes(torch.float32), 14, options)
        references = torch.stack([references_of_batch(targets, None, None) for targets in pairs.targets])
        loss, _ = ordering_loss(pairs, references, options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    least, _ = ordering_loss(pairs._replace(cells=pairs.targets), references, options)  # the entropy of the target
    assert seen[-1] - least < 0.6 * (seen[0] - least)


def test_euclidean_similarity_orders_like_cosine_on_the_sphere() -> None:
    torch.manual_seed(0)
    cells = torch.nn.functional.normalize(torch.randn(1, 2, 9, 4, dtype=torch.float64), dim=-1)
    pairs = Pairs([(0, 1)], cells, cells.flip(2).requires_grad_())
    hard = Ordering(3, Sorter(steepness=1e-3), Sorter(steepness=1e12))
    losses = [ordering_loss(pairs, cells, hard._replace(similarity=name))[0] for name in ("cosine", "euclidean")]
    # At vanishing steepness every student order is uniform: log of the number of references, whichever way distances run.
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2)
    losses[1].backward()


def test_references_are_a_draw_without_return_over_the_whole_batch() -> None:
    patches = torch.arange(24.0).view(4, 6, 1)
    drawn = references_of_batch(patches, None, torch.Generator().manual_seed(0))
    assert sorted(drawn.flatten().tolist()) == list(range(24)) and drawn.flatten().tolist() != list(range(24))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = mask[3, 4] = True
    masked = references_of_batch(patches, mask, torch.Generator().manual_seed(0))
    assert sorted(masked.flatten().tolist()) == [8.0] * 12 + [22.0] * 12


def test_a_cell_counts_only_if_it_lies_inside_the_mask() -> None:
    crop = torch.tensor([[[[0.0, 0.0, 140.0, 140.0], [28.0, 28.0, 84.0, 84.0]]]])
    inside = mask_pairs([torch.ones(1, 10, 10, dtype=torch.bool)], crop, [(0, 1)], 14, 3)
    assert inside.shape == (1, 1, 9) and inside.all()
    partly = mask_pairs([torch.arange(10).ge(4).expand(1, 10, 10)], crop, [(0, 1)], 14, 2)
    assert partly.view(2, 2).tolist() == [[False, True], [False, True]]
