"""Grids, label maps and what labels alone give."""

import pytest
import torch

from dense.contract import (
    Grids,
    LabelMaps,
    mean_over_seeds,
    patch_vote,
    resize_map,
    score_size,
    seed_list,
    segmentation_result,
    soft_labels,
)
from dense.references import ceiling, majority
from errors import UserError
from metrics.segmentation import ImageConfusions


def test_grids_of_several_shapes_are_read_in_batches_of_one_shape():
    shapes = torch.tensor([[2, 3], [2, 3], [2, 3], [3, 3], [2, 3]])
    read = lambda images: torch.zeros(2, len(images), *shapes[images[0]], 4) + images.view(1, -1, 1, 1, 1)
    grids = Grids(read, shapes, layers=["embed", 5], dim=4, patch=8)
    assert [images.tolist() for images in grids.batch_images(2)] == [[0, 1], [2], [3], [4]]
    assert grids.n_tokens == 33 and grids.n_images == 5
    seen = [(images.tolist(), tuple(x.shape)) for images, x in grids.subset(torch.tensor([4, 0, 3])).at(5).batches(8)]
    assert seen == [([0, 1], (1, 2, 2, 3, 4)), ([2], (1, 1, 3, 3, 4))]
    _, x = next(grids.subset(torch.tensor([4, 0])).batches(8))
    assert x[0, :, 0, 0, 0].tolist() == [4, 0]


def test_soft_labels_vote_and_void():
    maps = torch.tensor([[[0, 0, 1, 2], [0, 9, 1, 2], [9, 9, 2, 2], [9, 9, 1, 2]]])
    shares = soft_labels(maps, (2, 2), 3)
    assert shares[0].tolist() == [[[0.75, 0, 0], [0, 0.5, 0.5]], [[0, 0, 0], [0, 0.25, 0.75]]]
    assert patch_vote(shares)[0].tolist() == [[0, 1], [-1, 2]]  # a tie goes to the smallest id
    with pytest.raises(ValueError, match="does not divide"):
        soft_labels(maps, (3, 3), 3)


def test_nearest_resizing_equals_torch():
    maps = torch.randint(0, 9, (7, 11))
    for size in ((100, 100), (3, 4), (7, 11)):
        expected = torch.nn.functional.interpolate(maps[None, None].float(), size=size, mode="nearest")[0, 0].long()
        assert torch.equal(resize_map(maps, size), expected)


def test_score_sizes():
    assert score_size(100, (4, 5), 8, (30, 40)) == (100, 100)
    assert score_size("input", (4, 5), 8, (30, 40)) == (32, 40)
    assert score_size("full", (4, 5), 8, (30, 40)) == (30, 40)
    with pytest.raises(UserError, match="score size"):
        score_size("native", (4, 5), 8, (30, 40))


def blobs(n_images=4, side=24, seed=0):
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 3, (n_images, side // 6, side // 6), generator=rng)
    maps = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)
    return maps.roll((2, 1), (1, 2)), 3


@pytest.mark.parametrize("rule", ["vote", "shares"])
def test_the_ceiling_is_1_at_patches_of_a_pixel_and_falls_with_their_size(rule):
    maps, n = blobs()
    scores = []
    for patch in (1, 2, 4, 8):
        grid = 24 // patch
        grids = Grids.from_tensor(torch.zeros(1, 4, grid, grid, 1), patch=patch)
        found = {r.setting["rule"]: r for r in ceiling({"test": grids}, {"test": LabelMaps.from_tensor(maps, n)})}
        scores.append(float(found[rule].metrics["miou"].value))
    assert scores[0] == 1.0 and scores == sorted(scores, reverse=True) and scores[-1] < 0.9


def test_the_majority_class_comes_from_the_training_maps():
    train, test = torch.full((2, 4, 4), 1), torch.tensor([[[0, 1], [1, 255]]])
    train[0, 0] = 255
    grids = Grids.from_tensor(torch.zeros(1, 1, 2, 2, 1), patch=1)
    maps = {"train": LabelMaps.from_tensor(train, 2), "test": LabelMaps.from_tensor(test, 2)}
    (result,) = majority({"test": grids}, maps)
    assert float(result.metrics["accuracy"].value) == pytest.approx(2 / 3)
    assert float(result.metrics["miou"].value) == pytest.approx((0 + 2 / 3) / 2)


def test_means_over_seeds_keep_other_settings_apart():
    results = []
    for seed in (0, 1):
        for k in (2, 3):
            found = ImageConfusions(1, 2)
            found.add(torch.tensor([0]), torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 1, seed]]))
            results.append(segmentation_result({"k": k, "seed": seed}, found))
    mean = mean_over_seeds(results)
    assert [r.setting for r in mean] == [{"k": 2, "seed": "mean"}, {"k": 3, "seed": "mean"}]
    values = [float(r.metrics["miou"].value) for r in results]
    assert float(mean[0].metrics["miou"].value) == pytest.approx((values[0] + values[2]) / 2)
    assert int(mean[0].confusion.sum()) == 8


def test_seeds_are_a_number_or_different_ones():
    assert seed_list(2, "x.seeds") == [0, 1] and seed_list([4, 7], "x.seeds") == [4, 7]
    for wrong in (0, [], [1, 1]):
        with pytest.raises(UserError, match="x.seeds"):
            seed_list(wrong, "x.seeds")
