"""Segmentation from one global confusion matrix: IoU, matching of predictions to classes."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


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
