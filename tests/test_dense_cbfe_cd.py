"""Foreground from attention, cluster precisions and neighbourhoods against the published program's numbers."""

import json
from pathlib import Path

import pytest
import torch

from dense.cbfe_cd import cbfe_cd, cluster_precisions, communities, cooccurrence, directions, search_threshold
from dense.contract import Grids, LabelMaps
from dense.foreground import attention_foreground, attention_maps, drop_small, jaccard, mass_mask
from errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden/neco/attention_cbfe.json").read_text())
ATTENTION = torch.tensor(GOLDEN["attention"], dtype=torch.float64)[:, 0]  # [2, 6, 6]


@pytest.mark.parametrize("mass", ["0.5", "0.6", "0.65"])
def test_foreground_masks_equal_the_published_ones(mass):
    assert attention_foreground(ATTENTION, float(mass)).int().tolist() == [m[0] for m in GOLDEN["masks"][mass]]


def test_overlaps_equal_the_published_ones():
    masks = attention_foreground(ATTENTION, float(GOLDEN["eval_jac"]["pred_mask_threshold"]))
    truth = torch.tensor(GOLDEN["eval_jac"]["gt"])[:, 0]
    for name, void in (("with_boundary", "object"), ("without_boundary", "background")):
        found = [jaccard(mask, target, 21, void=void) for mask, target in zip(masks, truth, strict=True)]
        assert sum(found) / 2 == pytest.approx(GOLDEN["eval_jac"][name], abs=1e-6)


def test_precisions_threshold_and_neighbours_equal_the_published_ones():
    case = GOLDEN["cbfe"]
    clusters = list(torch.tensor(case["clusters"])[:, 0])
    masks = list(attention_foreground(ATTENTION, 0.6))
    precision = cluster_precisions(clusters, masks, case["k"])
    assert precision.tolist() == pytest.approx(case["cluster_precision"], abs=1e-6)
    truth = list(torch.tensor(GOLDEN["eval_jac"]["gt"])[:, 0])
    threshold, tried = search_threshold(precision, clusters, truth, 21)
    assert tried[0] == pytest.approx(case["threshold_search"][0], abs=1e-6) and len(tried) == 1
    assert threshold == pytest.approx(0.4) or threshold == pytest.approx(0.35)  # .375 lies between two
    found = cooccurrence(clusters, case["k"], published_angles=True)
    torch.testing.assert_close(found, torch.tensor(GOLDEN["cooccurrence"]["matrix"], dtype=torch.float64), atol=1e-6, rtol=0)
    assert not torch.allclose(found, cooccurrence(clusters, case["k"]), atol=1e-6)


def test_eight_directions_are_complete():
    assert set(directions(False)[:8]) == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)}


def test_attention_map_scores_equal_the_published_ones():
    case = GOLDEN["attn_maps"]
    heads = torch.tensor(case["heads"], dtype=torch.float64).view(2, 3, 6, 6)
    maps = (torch.tensor(case["gt_maps_0_1"], dtype=torch.float64)[:, 0] * 255).round().long()
    grids = Grids.from_tensor(torch.zeros(1, 2, 6, 6, 1), patch=case["patch"])
    grids.attention = lambda images: heads[images]
    merged, best = attention_maps(
        {"test": grids}, {"test": LabelMaps.from_tensor(maps, 21)}, mass=case["threshold"], published=True
    )
    assert merged.metrics["jaccard"].value.item() * 2 == pytest.approx(case["sum_over_images"]["merged"][0], abs=1e-6)
    assert best.metrics["jaccard"].value.item() * 2 == pytest.approx(case["sum_over_images"]["best_head"], abs=1e-6)


def test_mass_mask_holds_the_mass_with_the_fewest_patches():
    attention = torch.rand(5, 4, 4)
    mask = mass_mask(attention, 0.6)
    share = (attention * mask).sum((1, 2)) / attention.sum((1, 2))
    smallest = torch.where(mask, attention, torch.inf).amin((1, 2)) / attention.sum((1, 2))
    assert bool((share >= 0.6 - 1e-6).all()) and bool((share - smallest < 0.6).all())


def test_small_components_go_and_diagonals_connect():
    mask = torch.zeros(1, 5, 5, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 2, 2] = True
    mask[0, 4, 0] = mask[0, 4, 1] = True
    assert drop_small(mask)[0].nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_communities_of_a_clear_graph():
    weights = torch.zeros(6, 6, dtype=torch.float64)
    for block in ((0, 2, 4), (1, 3)):
        for i in block:
            for j in block:
                if i != j:
                    weights[i, j] = 0.4
    weights[5, 0] = 0.9  # one direction only: no link
    named = communities(weights, 0.05, 1.0, 0)
    assert len({int(named[i]) for i in (0, 2, 4)}) == 1 and int(named[1]) == int(named[3])
    assert len(set(named.tolist())) == 3 and int(named[0]) == 0


def scene(n_images=8, grid=8, seed=0):
    """Background, and a square of class 1 or 2 whose tokens and attention stand out."""
    rng = torch.Generator().manual_seed(seed)
    named = torch.zeros(n_images, grid, grid, dtype=torch.int64)
    for i in range(n_images):
        y, x = torch.randint(0, grid - 4, (2,), generator=rng).tolist()
        named[i, y : y + 5, x : x + 5] = 1 + i % 2
    tokens = torch.eye(3, 6)[named] * 3 + 0.1 * torch.randn(n_images, grid, grid, 6, generator=rng)
    attention = 0.02 * torch.rand(n_images, 2, grid, grid, generator=rng) + (named > 0)[:, None]
    grids = Grids.from_tensor(tokens[None], patch=2)
    grids.attention = lambda images: attention[images]
    return grids, LabelMaps.from_tensor(named.repeat_interleave(2, 1).repeat_interleave(2, 2), 3)


def test_planted_objects_are_segmented_without_labels():
    train, test = scene(), scene(seed=1)
    features, labels = {"train": train[0], "test": test[0]}, {"train": train[1], "test": test[1]}
    options = {
        "pca": 4,
        "foreground_clusters": 12,
        "community_clusters": 6,
        "seeds": 2,
        "size": 16,
        "iterations": 10,
        "restarts": 5,
    }
    results = cbfe_cd(features, labels, **options)
    steps = [r.setting["step"] for r in results]
    assert steps == ["foreground", "cbfe", "cbfe", "cd", "cd"]
    assert float(results[0].metrics["jaccard"].value) > 0.5
    assert float(results[1].metrics["miou"].value) > 0.4
    again = cbfe_cd(features, labels, **options)
    assert all(torch.equal(a.confusion, b.confusion) for a, b in zip(results[1:], again[1:], strict=True))
    features["test"].attention = None
    with pytest.raises(UserError, match="class token"):
        cbfe_cd(features, labels, **options)
