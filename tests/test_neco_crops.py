"""Crops: reference boxes, overlaps that name the same pixels, published ranges, repeatable samples, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import UserError
from neco.crops import CropOptions, collate, crop_boxes, draw_crops, recolour, sample_crops

CASES = json.loads((Path(__file__).parent / "golden/neco/crops.json").read_text())
SMALL = CropOptions(sizes=(32, 16), numbers=(2, 3))


def test_reference_boxes() -> None:
    cases = [case for value in CASES.values() for case in (value if isinstance(value, list) else [])]
    assert cases
    for case in cases:
        sizes = [size for size, number in zip(case["size_crops"], case["nmb_crops"], strict=True) for _ in range(number)]
        found = crop_boxes(torch.tensor([case["absolute_boxes_xyxy"]], dtype=torch.float32), sizes, case["nmb_crops"][0])
        for boxes, key in zip(found, ("boxes_gc", "boxes_all"), strict=True):
            torch.testing.assert_close(boxes[0], torch.tensor(case[key]), atol=1e-3, rtol=0)


def test_overlaps_name_the_same_pixels() -> None:
    """Cut from a picture whose values are coordinates, the two views of an overlap have the same corners."""
    rng = np.random.default_rng(3)
    boxes = torch.from_numpy(np.stack([draw_crops(120, 200, SMALL, rng) for _ in range(5)]))
    sizes = [SMALL.size_of(i) for i in range(5)]
    overlaps = crop_boxes(boxes, sizes, 2)
    for b in range(5):
        for i in range(2):
            for v in range(5):
                corners = []
                for crop, size, box in ((i, sizes[i], overlaps.in_global[b, i, v]), (v, sizes[v], overlaps.in_all[b, v, i])):
                    origin, extent = boxes[b, crop, :2], boxes[b, crop, 2:] - boxes[b, crop, :2]
                    corners.append(torch.cat([origin, origin]) + box / size * torch.cat([extent, extent]))
                    assert (box[:2] >= 0).all() and (box[2:] <= size + 1e-9).all() and (box[2:] > box[:2]).all()
                torch.testing.assert_close(corners[0], corners[1])


def test_crops_keep_published_ranges() -> None:
    options, rng = CropOptions(), np.random.default_rng(0)
    boxes = np.stack([draw_crops(300, 400, options, rng) for _ in range(200)])
    w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    share, aspect = w * h / 120_000, w / h
    assert (boxes[..., :2] >= 0).all() and (boxes[..., 2] <= 400).all() and (boxes[..., 3] <= 300).all()
    assert 0.24 < share[:, :2].min() and share[:, :2].max() <= 1 and 0.049 < share[:, 2:].min() and share[:, 2:].max() < 0.26
    assert 0.73 < aspect.min() and aspect.max() < 1.36
    for first in range(2):
        for other in range(first + 1, 6):
            low = np.maximum(boxes[:, first, :2], boxes[:, other, :2])
            high = np.minimum(boxes[:, first, 2:], boxes[:, other, 2:])
            assert (np.clip(high - low, 0, None).prod(-1) > 1200 * (2 if other == 1 else 1)).all()


def test_sample_is_decided_by_its_seed() -> None:
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    first, second, other = (sample_crops(image, SMALL, seed) for seed in ((0, 1, 2), (0, 1, 2), (0, 1, 3)))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)) and torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])
    assert [list(crop.shape) for crop in first[0]] == [[3, 32, 32]] * 2 + [[3, 16, 16]] * 3
    assert all(crop.min() >= 0 and crop.max() <= 1 for crop in first[0])


def test_without_colour_crops_are_resized_pixels() -> None:
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    plain = CropOptions(sizes=(40, 40), numbers=(2, 0), smallest=(1.0, 1.0), ratio=(1.0, 1.0), jitter=0.0, blur=0.0)
    crops, boxes = sample_crops(image, plain, (0,))
    assert boxes.tolist() == [[0, 0, 40, 40]] * 2
    assert torch.allclose(crops[0], image / 255)
    grey = [recolour(image / 255, CropOptions(), np.random.default_rng(seed)) for seed in range(60)]
    assert 4 < sum(bool(torch.allclose(x[0], x[1]) and torch.allclose(x[1], x[2])) for x in grey) < 25


def test_batch_is_normalised_and_what_no_patch_fills_is_cut_off() -> None:
    options = CropOptions(sizes=(32, 20), numbers=(1, 1), rounding="published").check(16)
    samples = [sample_crops(torch.full((3, 50, 50), 255, dtype=torch.uint8), options, (0, i)) for i in range(2)]
    batch = collate(samples, options, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert [list(crop.shape) for crop in batch.crops] == [[2, 3, 32, 32], [2, 3, 16, 16]]
    assert batch.overlaps.in_all.shape == (2, 2, 1, 4) and 16 < batch.overlaps.in_all[:, 1, :, 2:].max() <= 20
    assert CropOptions(sizes=(224, 98), rounding="corrected").check(16).sizes == (224, 96)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (CropOptions(sizes=(224, 8)), "smaller than a patch"),
        (CropOptions(sizes=(224, 98)), "do not divide crops of 98 px; take 96"),
        (CropOptions(sizes=(224, 96), rounding="up"), "rounding=up is unknown"),
        (CropOptions(sizes=(224, 96), numbers=(1, 0)), "two in all"),
        (CropOptions(sizes=(224, 96), smallest=(0.5, 0.3)), "group 1"),
        (CropOptions(sizes=(224, 96), min_intersection=0.7), "min_intersection"),
        (CropOptions(sizes=(224, 96), ratio=(1,)), "two numbers"),
    ],
)
def test_what_cannot_be_cropped_is_refused(options: CropOptions, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        options.check(16)


def test_crops_that_can_never_overlap_end_in_a_sentence() -> None:
    options = CropOptions(sizes=(32, 16), smallest=(0.05, 0.05), largest=(0.06, 0.06), min_intersection=0.3)
    with pytest.raises(UserError, match="share 30% of its area"):
        draw_crops(100, 100, options, np.random.default_rng(0))
