"""Segmentation: confusion matrices, IoU, matching of predictions to classes, scores with the influence of every image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from errors import UserError
from metrics.bootstrap import Estimate, ratio_estimate

ABSENT = ("skip", "zero")  # what a class that does not occur is in a mean over classes


def confusion_matrix(target: Tensor, prediction: Tensor, n_classes: int, n_predictions: int | None = None) -> Tensor:
    """Counts [n_classes, n_predictions], rows true, columns predicted, over all elements whose target is a class.

    Targets outside 0 … n_classes - 1 (255 or -1: ignored) are left out. Sum over batches for one global matrix.

    Raises:
        ValueError: a prediction outside 0 … n_predictions - 1 (it would be lost silently).
    """
    n_predictions = n_classes if n_predictions is None else n_predictions
    keep = (target >= 0) & (target < n_classes)
    t, p = target[keep].long(), prediction[keep].long()
    if len(p) and (int(p.min()) < 0 or int(p.max()) >= n_predictions):
        raise ValueError(f"predictions lie in {int(p.min())} … {int(p.max())}, expected 0 … {n_predictions - 1}")
    return torch.bincount(t * n_predictions + p, minlength=n_classes * n_predictions).view(n_classes, n_predictions)


def iou(confusion: Tensor) -> Tensor:
    """Intersection over union of every class with every prediction, float64 like the matrix; 0 / 0 is 0."""
    c = confusion.double()
    union = c.sum(1, keepdim=True) + c.sum(0, keepdim=True) - c
    return c / union.clamp_min(1)


def miou(confusion: Tensor, absent: str = "skip") -> float:
    """Mean IoU of one global square confusion matrix.

    Args:
        absent: a class in neither targets nor predictions is left out of the mean ("skip") or counts 0 ("zero", as
            published for NeCo and Hummingbird).
    """
    scores = iou(confusion).diagonal()
    present = (confusion.sum(0) + confusion.sum(1)) > 0
    return float(scores[present].mean() if absent == "skip" else scores.mean())


def hungarian_matching(confusion: Tensor) -> Tensor:
    """One prediction per class so that the summed IoU is largest; class of every prediction [n_predictions], else 0."""
    rows, columns = linear_sum_assignment(-iou(confusion).numpy())
    assigned = torch.zeros(confusion.shape[1], dtype=torch.int64)
    assigned[torch.from_numpy(columns)] = torch.from_numpy(rows)
    return assigned


def many_to_one_matching(confusion: Tensor, by: str = "iou") -> Tensor:
    """Class of every prediction [n_predictions]: that of highest IoU (by="iou") or precision (by="precision").

    Ties go to the lowest class, an unused prediction to class 0.
    """
    score = iou(confusion) if by == "iou" else confusion.double() / confusion.sum(0).clamp_min(1)
    return torch.from_numpy(score.numpy().argmax(0))


def merge_predictions(confusion: Tensor, assigned: Tensor) -> Tensor:
    """The confusion matrix [n_classes, n_classes] after every prediction was renamed to its class."""
    merged = torch.zeros(confusion.shape[0], confusion.shape[0], dtype=confusion.dtype)
    return merged.index_add_(1, assigned, confusion)


class ClassCounts(NamedTuple):
    """Pixels (or patches) of every image and class, int64 [M, C]."""

    hit: Tensor  # of the class and called so
    true: Tensor  # of the class
    called: Tensor  # called so


class ImageConfusions:
    """The confusion matrices of M images, kept sparse: an image shows few of the classes.

    Everything a segmentation is scored by is in it: the global matrix, which decides how clusters are matched to
    classes, and what every image adds to each class, which gives intervals over images.

    Args:
        n_images: M. n_classes: C. n_predictions: K, by default C.
    """

    def __init__(self, n_images: int, n_classes: int, n_predictions: int | None = None) -> None:
        self.n_images, self.n_classes = n_images, n_classes
        self.n_predictions = n_classes if n_predictions is None else n_predictions
        self._entries: list[Tensor] = []  # each [n, 4]: image, class, prediction, count

    def add(self, images: Tensor, target: Tensor, prediction: Tensor) -> None:
        """Take in a batch of B images.

        Args:
            images: [B] which of the M images; an image may come in several parts.
            target, prediction: integer [B, ...]; targets outside 0 … C - 1 are ignored.

        Raises:
            ValueError: a prediction outside 0 … K - 1.
        """
        for image, t, p in zip(images.tolist(), target, prediction, strict=True):
            counts = confusion_matrix(t, p, self.n_classes, self.n_predictions)
            true, called = counts.nonzero(as_tuple=True)
            rows = [torch.full_like(true, image), true, called, counts[true, called]]
            self._entries.append(torch.stack(rows, 1).cpu())

    def entries(self) -> Tensor:
        """Image, class, prediction and count of everything that was seen, int64 [n, 4]."""
        return torch.cat(self._entries) if self._entries else torch.zeros(0, 4, dtype=torch.int64)

    def total(self) -> Tensor:
        """The global confusion matrix, int64 [C, K]."""
        _, true, called, count = self.entries().unbind(1)
        flat = torch.zeros(self.n_classes * self.n_predictions, dtype=torch.int64)
        return flat.index_add_(0, true * self.n_predictions + called, count).view(self.n_classes, -1)

    def rename(self, assigned: Tensor) -> ImageConfusions:
        """The same after every prediction was renamed to a class, `assigned` [K] (of a matching)."""
        image, true, called, count = self.entries().unbind(1)
        renamed = ImageConfusions(self.n_images, self.n_classes)
        renamed._entries = [torch.stack([image, true, assigned[called], count], 1)]
        return renamed

    def class_counts(self) -> ClassCounts:
        """What every image adds to every class; predictions are classes (K = C)."""
        if self.n_predictions != self.n_classes:
            raise ValueError(f"{self.n_predictions} predictions are no {self.n_classes} classes; rename them first")
        image, true, called, count = self.entries().unbind(1)

        def sums(of: Tensor, weight: Tensor) -> Tensor:
            flat = torch.zeros(self.n_images * self.n_classes, dtype=torch.int64)
            return flat.index_add_(0, image * self.n_classes + of, weight).view(self.n_images, -1)

        return ClassCounts(sums(true, torch.where(true == called, count, 0)), sums(true, count), sums(called, count))


def iou_estimate(counts: ClassCounts) -> Estimate:
    """IoU of every class with the influence of every image: F = C fits; nan for a class that is nowhere.

    IoU = h / u with h = hits and u = true + called - hits, both sums over images; an image of hits h_m and union u_m
    moves it by (h_m - IoU u_m) / u.
    """
    return ratio_estimate(counts.hit.T, (counts.true + counts.called - counts.hit).T)


def class_metrics(counts: ClassCounts, absent: str = "skip") -> dict[str, Estimate]:
    """Scores of a segmentation with the influence of every image, one fit each.

    miou: mean IoU of the classes. accuracy: share of pixels that are right. balanced_accuracy: mean recall of the
    classes that are there. macro_f1: mean F1 of the classes that are there or were called.

    Args:
        absent: a class in neither targets nor predictions is left out of miou ("skip") or counts 0 there ("zero", as
            published for NeCo and Hummingbird).
    """
    if absent not in ABSENT:
        raise UserError(f"unknown rule absent={absent} for classes that do not occur; valid: {', '.join(ABSENT)}")
    hit, true, called = (x.T for x in counts)  # [C, M]
    return {
        "miou": _mean_of(iou_estimate(counts), zero=absent == "zero"),
        "accuracy": ratio_estimate(hit.sum(0, keepdim=True), true.sum(0)),
        "balanced_accuracy": _mean_of(ratio_estimate(hit, true)),
        "macro_f1": _mean_of(ratio_estimate(2 * hit, true + called)),
    }


def _mean_of(classes: Estimate, zero: bool = False) -> Estimate:
    """Mean over classes [C] -> [1]; an undefined class is left out, or counts 0."""
    defined = ~classes.value.isnan()
    n = len(defined) if zero else int(defined.sum())
    value = classes.value[defined].sum()[None] / n if n else torch.full((1,), torch.nan, dtype=torch.float64)
    return Estimate(value, classes.influence[defined].sum(0, keepdim=True) / max(n, 1))
