"""Scores of a segmentation with the influence of every image, against brute force."""

import pytest
import torch

from errors import UserError
from metrics.bootstrap import interval, resample
from metrics.segmentation import (
    ImageConfusions,
    class_metrics,
    confusion_matrix,
    hungarian_matching,
    iou,
    iou_estimate,
    many_to_one_matching,
    merge_predictions,
    miou,
)


def random_maps(n_images=12, n_classes=4, n_predictions=4, seed=0):
    rng = torch.Generator().manual_seed(seed)
    target = torch.randint(0, n_classes, (n_images, 6, 5), generator=rng)
    guess = torch.randint(0, n_predictions, target.shape, generator=rng)
    agree = torch.rand(target.shape, generator=rng) < torch.rand(n_images, 1, 1, generator=rng)
    prediction = torch.where(agree, target, guess)
    target[:, 0, :2] = 255
    return target, prediction


def collect(target, prediction, *, n_classes=4, n_predictions=None, weights=None):
    found = ImageConfusions(len(target), n_classes, n_predictions)
    for first in range(0, len(target), 5):
        images = torch.arange(first, min(first + 5, len(target)))
        found.add(images, target[images], prediction[images])
    return found


def reference(target, prediction, weights, n_classes=4):
    """The scores from one weighted confusion matrix, by their definitions."""
    matrices = [confusion_matrix(t, p, n_classes).double() for t, p in zip(target, prediction, strict=True)]
    c = sum(w * m for w, m in zip(weights, matrices, strict=True))
    hit, true, called = c.diagonal(), c.sum(1), c.sum(0)
    there, seen = true > 0, (true + called) > 0
    return {
        "miou": (hit / (true + called - hit))[seen].mean(),
        "accuracy": hit.sum() / true.sum(),
        "balanced_accuracy": (hit / true)[there].mean(),
        "macro_f1": (2 * hit / (true + called))[seen].mean(),
    }


def test_values_and_influences_equal_brute_force():
    target, prediction = random_maps()
    found = class_metrics(collect(target, prediction).class_counts())
    one = torch.ones(len(target), dtype=torch.float64)
    for name, expected in reference(target, prediction, one).items():
        assert float(found[name].value) == pytest.approx(float(expected), abs=1e-12)
        for image in range(len(target)):
            step = torch.zeros_like(one)
            step[image] = 1e-6
            up, down = (float(reference(target, prediction, one + sign * step)[name]) for sign in (1, -1))
            assert float(found[name].influence[0, image]) == pytest.approx((up - down) / 2e-6, abs=1e-7)


def test_the_interval_equals_that_of_scoring_every_resample_again():
    target, prediction = random_maps(n_images=60)
    estimate = class_metrics(collect(target, prediction).class_counts())["miou"]
    counts = resample(60, 400)
    low, high = interval(estimate, counts)
    draws = torch.stack([reference(target, prediction, row)["miou"] for row in counts])
    expected = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert float(low) == pytest.approx(float(expected[0]), abs=0.006)
    assert float(high) == pytest.approx(float(expected[1]), abs=0.006)


def test_absent_classes_are_skipped_or_count_nothing():
    target, prediction = torch.tensor([[[0, 0, 1, 255]]]), torch.tensor([[[0, 1, 1, 2]]])
    counts = collect(target, prediction, n_classes=3).class_counts()
    total = confusion_matrix(target, prediction, 3)
    for absent in ("skip", "zero"):
        assert float(class_metrics(counts, absent)["miou"].value) == pytest.approx(miou(total, absent))
    assert iou_estimate(counts).value[:2].tolist() == pytest.approx(iou(total).diagonal()[:2].tolist())
    assert bool(iou_estimate(counts).value[2].isnan())
    with pytest.raises(UserError, match="skip, zero"):
        class_metrics(counts, "drop")


def test_nothing_seen_is_undefined():
    found = class_metrics(ImageConfusions(3, 2).class_counts())
    assert all(bool(each.value.isnan()) and not each.influence.any() for each in found.values())


@pytest.mark.parametrize("matching", ["hungarian", "iou", "precision"])
def test_renamed_clusters_equal_the_merged_matrix(matching):
    target, prediction = random_maps(n_predictions=9)
    found = collect(target, prediction, n_predictions=9)
    total = confusion_matrix(target, prediction, 4, 9)
    assert torch.equal(found.total(), total)
    assigned = hungarian_matching(total) if matching == "hungarian" else many_to_one_matching(total, matching)
    merged = merge_predictions(total, assigned)
    renamed = found.rename(assigned)
    assert torch.equal(renamed.total(), merged)
    assert float(class_metrics(renamed.class_counts())["miou"].value) == pytest.approx(miou(merged))
    with pytest.raises(ValueError, match="rename"):
        found.class_counts()


def test_an_image_in_parts_is_the_image():
    target, prediction = random_maps()
    parts = ImageConfusions(len(target), 4)
    for rows in (slice(0, 2), slice(2, 6)):
        parts.add(torch.arange(len(target)), target[:, rows], prediction[:, rows])
    a, b = parts.class_counts(), collect(target, prediction).class_counts()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
