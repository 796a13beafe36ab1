"""A step of NeCo: schedules and averaging in order, clipping that clips, controls, states, several processes."""

import copy
import dataclasses
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from torch import Tensor

from backbones.contract import BackboneFacts
from errors import UserError
from neco.crops import CropBatch, CropOptions, collate, sample_crops
from neco.patch_ordering import World
from neco.recipe import Recipe
from neco.training import Training, drop_registers

CROPS = CropOptions(sizes=(32, 16), numbers=(2, 1))
RECIPE = Recipe(
    crops=CROPS, epochs=1, batch_images=4, dtype="float32", grid=3, queue_length=128, head_hidden=16, head_out=8,
    lr_backbone=1e-3, lr_head=1e-2, momentum=(0.9, 1.0), drop_path=0.0,
)  # fmt: skip
FACTS = BackboneFacts(
    name="toy", source="timm", patch_size=8, depth=3, dim=16, heads=2, num_prefix_tokens=1, has_class_token=True,
    image_size=(32, 32), dynamic_size=True, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic", final_norm="norm",
    weights="random:0",
)  # fmt: skip


def vit(**options: Any) -> torch.nn.Module:
    torch.manual_seed(5)
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0, **options}
    return timm.create_model("vit_tiny_patch16_224", **kwargs, dynamic_img_size=True).requires_grad_(False)


def training(total: int = 6, world: World | None = None, **changes: Any) -> Training:
    recipe = dataclasses.replace(RECIPE, **changes).check(FACTS, 1)
    return Training(vit(), FACTS, recipe, total=total, device=torch.device("cpu"), world=world, seed=3)


def batch(step: int, images: slice = slice(0, 4)) -> CropBatch:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=generator)
    samples = [sample_crops(image, CROPS, (step, i)) for i, image in enumerate(pixels)]
    return collate(samples[images], CROPS, 8, FACTS.mean, FACTS.std)


def weights(network: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_student_learns_and_the_teacher_follows_its_weights_before_the_step() -> None:
    one = training()
    student, teacher = copy.deepcopy(one.student), copy.deepcopy(one.teacher)
    assert not torch.equal(weights(student.projection_head), weights(teacher.projection_head))  # heads start apart
    torch.testing.assert_close(weights(student.vit), weights(teacher.vit))
    step = one.step([batch(0)])
    torch.testing.assert_close(weights(one.teacher), 0.9 * weights(teacher) + 0.1 * weights(student))
    assert step[3:] == pytest.approx((1e-3, 1e-2, 0.04, 0.9))
    assert not torch.equal(weights(one.student), weights(student))
    assert all(p.grad is None for p in one.teacher.parameters()) and one.done == 1
    last = [one.step([batch(i)]) for i in range(1, 6)][-1]
    assert last.momentum > 0.99 and last.lr_backbone < 1e-4 and last.weight_decay > 0.4


def test_heads_may_start_alike() -> None:
    one = training(same_heads=True)
    torch.testing.assert_close(weights(one.student), weights(one.teacher))


def test_one_batch_is_learnt() -> None:
    one = training(total=1000, drop_path=0.1)
    losses = [one.step([batch(0)]).loss for _ in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_clipping_clips_and_tells_the_norm_before() -> None:
    free, clipped = training(clip=None), training(clip=1e-4)
    norms = [one.step([batch(0)]).gradient_norm for one in (free, clipped)]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 1e-3
    seen: list[float] = []
    clipped.optimizer.step = lambda: seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in clipped.learning])))
    clipped.step([batch(1)])
    assert seen[0] == pytest.approx(1e-4, rel=1e-3)


def test_parts_of_a_batch_add_up_to_their_mean() -> None:
    halves = [batch(0, slice(0, 2)), batch(0, slice(2, 4))]
    together = training(accumulate=2, reference_from="batch")
    apart = [training(reference_from="batch", batch_images=2) for _ in halves]
    losses = []
    for index, (one, half) in enumerate(zip(apart, halves, strict=True)):
        generator = torch.Generator().manual_seed((3 * 1_000_003) * 1009 + index)
        loss, _ = one._loss(half, generator)
        loss.backward()
        losses.append(loss.item())
    wanted = [(a.grad + b.grad) / 2 for a, b in zip(*(one.learning for one in apart), strict=True) if a.grad is not None]
    seen: list[Tensor] = []
    together.optimizer.step = lambda: seen.extend(p.grad.clone() for p in together.learning)
    assert together.step(halves).loss == pytest.approx(sum(losses) / 2)
    learnt = [g for g, p in zip(seen, apart[0].learning, strict=True) if p.grad is not None]
    torch.testing.assert_close(learnt, wanted)


@pytest.fixture(scope="module")
def usual() -> tuple[float, Tensor]:
    """Loss of the first step and the student after it, without any change."""
    one = training(drop_path=0.1)
    return one.step([batch(0)]).loss, weights(one.student)


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "odd_even"},
        {"student_steepness": 10.0},
        {"teacher_steepness": 10.0},
        *({"swap": swap} for swap in ("logistic", "logistic_phi", "gaussian", "reciprocal", "optimal")),
        {"similarity": "euclidean"},
        {"assign": (0,)},
        {"grid": 2},
        {"use_teacher": False},
        {"reference_by": "student"},
        {"reference_from": "batch"},
        {"reference_by": "student", "reference_from": "batch"},
        {"shuffle_references": True},
        {"loss_mask": "fg"},
        {"loss_mask": "bg", "reference_from": "batch"},
        {"loss_mask": "fg", "mask_threshold": 0.3},
        {"trainable_blocks": (-1,)},
        {"head_layers": 1},
        {"same_heads": True},
        {"drop_path": 0.5},
        {"weight_decay": (0.5, 0.5)},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_option_changes_what_is_learnt(usual: tuple[float, Tensor], changes: dict) -> None:
    one = training(**{"drop_path": 0.1, **changes})
    before = weights(one.student)
    loss, after = one.step([batch(0)]).loss, weights(one.student)
    assert loss > 0 and torch.isfinite(after).all() and not torch.equal(after, before)
    assert loss != usual[0] or not torch.equal(after, usual[1])
    if "trainable_blocks" in changes:
        assert loss == usual[0]
        torch.testing.assert_close(weights(one.student.vit.blocks[0]), weights(vit().blocks[0]), rtol=0, atol=0)


def test_crops_no_patch_divides_are_aligned_as_published_or_correctly() -> None:
    losses = {}
    for rounding in ("published", "corrected"):  # 20 px and patches of 8: boxes reach to 2.5 or to 2 patches
        options = dataclasses.replace(CROPS, sizes=(32, 20), rounding=rounding).check(8)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8, generator=generator)
        samples = [sample_crops(image, options, (0, i)) for i, image in enumerate(pixels)]
        crops = collate(samples, options, 8, FACTS.mean, FACTS.std)
        assert crops.crops[2].shape[-1] == 16 and crops.overlaps.in_all[:, 2].amax() > (16 if rounding == "published" else 15)
        losses[rounding] = training(crops=options).step([crops]).loss
    assert losses["published"] != losses["corrected"]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="compiling for a CPU needs a C++ compiler")
def test_compiled_networks_learn_the_same() -> None:
    options = dataclasses.replace(CROPS, numbers=(2, 0))  # one size of crops, so each network is compiled once
    facts, plain = dataclasses.replace(FACTS, depth=1), batch(0)
    seen = CropBatch(plain.crops[:2], type(plain.overlaps)(plain.overlaps.in_global[:, :, :2], plain.overlaps.in_all[:, :2]))
    ends = []
    for compiled in (False, True):
        recipe = dataclasses.replace(RECIPE, crops=options).check(facts, 1)
        one = Training(vit(depth=1), facts, recipe, total=6, device=torch.device("cpu"), seed=3, compiled=compiled)
        ends.append(([one.step([seen]).loss for _ in range(2)], {key: x.clone() for key, x in one.tensors().items()}))
    (losses, expected), (compiled_losses, found) = ends
    assert compiled_losses == pytest.approx(losses, rel=1e-5)
    assert found.keys() == expected.keys()  # a state of one goes on in the other
    for key in ("student.vit.norm.weight", "student.vit.blocks.0.attn.qkv.weight", "teacher.vit.blocks.0.mlp.fc1.weight"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


def test_shuffled_references_change_the_teachers_order_only() -> None:
    plain, shuffled = training(), training(shuffle_references=True)
    assert plain.step([batch(0)]).loss != shuffled.step([batch(0)]).loss


def test_bfloat16_products_lose_little() -> None:
    exact, rough = (training(dtype=dtype).step([batch(0)]).loss for dtype in ("float32", "bfloat16"))
    assert rough == pytest.approx(exact, rel=1e-2)


def test_checkpointed_activations_change_nothing() -> None:
    kept, again = training(drop_path=0.2), training(drop_path=0.2, checkpoint_activations=True)
    for step in range(2):
        assert kept.step([batch(step)]).loss == pytest.approx(again.step([batch(step)]).loss, rel=1e-5)
    torch.testing.assert_close(weights(kept.student), weights(again.student))


def test_a_step_depends_on_the_saved_tensors_and_its_number_only() -> None:
    through, first = training(drop_path=0.3), training(drop_path=0.3)
    for step in range(4):
        through.step([batch(step)])
    for step in range(2):
        first.step([batch(step)])
    saved = {key: value.clone() for key, value in first.tensors().items()}
    torch.manual_seed(99)
    second = training(drop_path=0.3)
    second.load(saved, 2)
    for step in range(2, 4):
        second.step([batch(step)])
    ends = [one.tensors() for one in (through, second)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert {"student.vit.cls_token", "teacher.projection_head.0.weight", "queue.filled"} <= ends[0].keys()


def test_a_loss_that_is_not_finite_ends_in_a_sentence() -> None:
    one = training()
    broken = batch(0)
    broken.crops[0][0, 0, 0, 0] = torch.nan
    before = weights(one.student)
    with pytest.raises(UserError, match="loss of step 0 is not finite .*lower neco.lr_backbone"):
        one.step([broken])
    assert torch.equal(weights(one.student), before) and one.done == 0


def test_registers_are_dropped_and_the_rest_stays() -> None:
    with_registers = vit(reg_tokens=2, no_embed_class=True).eval()
    torch.nn.init.normal_(with_registers.cls_token)
    torch.nn.init.normal_(with_registers.reg_token)
    images = torch.randn(1, 3, 32, 32)
    embedded = with_registers._pos_embed(with_registers.patch_embed(images))
    dropped = drop_registers(copy.deepcopy(with_registers))
    found = dropped._pos_embed(dropped.patch_embed(images))
    torch.testing.assert_close(found, torch.cat([embedded[:, :1], embedded[:, 3:]], dim=1))
    twin = vit()
    assert {key: value.shape for key, value in dropped.state_dict().items()} == {
        key: value.shape for key, value in twin.state_dict().items()
    }
    twin.load_state_dict(dropped.state_dict())
    torch.testing.assert_close(twin.eval().forward_features(images), dropped.forward_features(images))
    with pytest.raises(UserError, match="no register tokens"):
        drop_registers(vit())


def _half(rank: int, folder: str, changes: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    one = training(world=World(rank, 2), **changes)
    losses = [one.step([batch(step, slice(2 * rank, 2 * rank + 2))]).loss for step in range(3)]
    if rank == 0:
        torch.save({"losses": losses, **one.tensors()}, f"{folder}/joint.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("changes", [{}, {"reference_from": "batch", "loss_mask": "fg", "clip": 0.5}], ids=["queue", "batch"])
def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path, changes: dict) -> None:
    context = multiprocessing.get_context("spawn" if not hasattr(os, "fork") else "fork")
    processes = [context.Process(target=_half, args=(rank, str(tmp_path), changes)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = torch.load(tmp_path / "joint.pt", weights_only=True)
    one = training(**changes)
    losses = [one.step([batch(step)]).loss for step in range(3)]
    assert found.pop("losses") == pytest.approx(losses, rel=1e-5)
    for key, value in one.tensors().items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"queue_length": 35}, "queue_length=35 is smaller than a batch .*at least 36"),
        ({"expects": (384, 14)}, "recipe is for a ViT of width 384 and patches of 14 px, toy has width 16"),
        ({"batch_images": 5, "accumulate": 2}, "cannot be cut into 1 processes x 2 parts"),
        ({"network": "quick"}, "network=quick is unknown"),
        ({"student_steepness": 0.0}, "steepness: got 0.0"),
        ({"similarity": "dot"}, "unknown neco.similarity=dot; valid: cosine, euclidean"),
        ({"assign": (2,)}, "numbers of global crops"),
        ({"clip": 0.0}, "neco.clip"),
        ({"momentum": (0.9,)}, "where it starts and where it ends"),
        ({"registers": "drop"}, None),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(changes: dict, sentence: str | None) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    if sentence is None:
        recipe.check(FACTS, 1)
        return
    with pytest.raises(UserError, match=sentence):
        recipe.check(FACTS, 1)
