"""Logistic regression on patch labels with L-BFGS: a second linear head, without learning rate, epochs or seeds.

Protocol of CAPI (arXiv 2502.08769): majority labels, standardised tokens, L2 penalty chosen among 8 values of C on a
tenth of the training images, then a refit on all of them; the patch classes are scaled up by the nearest patch.
The loss is sum of cross-entropies + |W|² / (2 C), offsets not penalised (the convention of scikit-learn and cuML), divided
by the number of patches. Published with cuML; here the minimiser is scipy's L-BFGS-B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from dense.contract import (
    Grids,
    LabelMaps,
    Result,
    check_choices,
    patch_vote,
    predict_pixels,
    resize_map,
    score_size,
    segmentation_result,
    soft_labels,
)
from dense.linear_seg import split_images
from errors import UserError
from metrics.segmentation import ABSENT, ImageConfusions, class_metrics

CHOICES = {"upsample": ("bilinear", "nearest"), "absent": ABSENT}
BATCH = 16
ROWS = 65536  # patches of one product


class Patches(NamedTuple):
    """Labelled patches of some images: tokens [n, D] float32, labels [n] int64."""

    tokens: Tensor
    labels: Tensor


class LogisticHead(NamedTuple):
    """weight [D, C] and offset [C] of raw tokens; converged: whether the minimiser said so."""

    weight: Tensor
    offset: Tensor
    converged: bool


def gather_patches(grids: Grids, maps: LabelMaps, per_image: int | None, ignore: Sequence[int], seed: int) -> Patches:
    """Patches with a majority label outside `ignore`, at most `per_image` of each image, by a seeded draw.

    Raises:
        UserError: there is none.
    """
    generator, tokens, labels = torch.Generator().manual_seed(seed), [], []
    for images, x in grids.batches(BATCH):
        seen = maps.at(images, [side * grids.patch for side in x.shape[2:4]])
        named = patch_vote(soft_labels(seen, x.shape[2:4], maps.n_classes)).flatten(1)
        usable = (named >= 0) & ~torch.isin(named, torch.tensor(list(ignore), dtype=torch.int64))
        for row, target, keep in zip(x[0].flatten(1, 2), named, usable, strict=True):
            kept = keep.nonzero().flatten()
            if per_image is not None:
                kept = kept[torch.randperm(len(kept), generator=generator)[:per_image]]
            tokens.append(row[kept])
            labels.append(target[kept])
    found = Patches(torch.cat(tokens), torch.cat(labels))
    if not len(found.labels):
        raise UserError("no training patch carries a label; look at mode=check_data")
    return found


def fit_logistic(
    patches: Patches, n_classes: int, c: float, *, memory: int = 5, iterations: int = 1000, tolerance: float = 1e-12
) -> LogisticHead:
    """The minimum of the penalised mean cross-entropy, from zero.

    Args:
        c: inverse strength of the penalty. memory: corrections L-BFGS keeps. tolerance: of the gradient and of the
            relative fall of the loss (products are float32, sums float64: far smaller ones are not reached).
    """
    mean, std = patches.tokens.mean(0), patches.tokens.std(0, correction=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)  # a constant channel gives 0
    n, dim = patches.tokens.shape
    tokens = (patches.tokens - mean) / std

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(flat).view(dim + 1, n_classes)
        weight, offset = parameters[:-1].float(), parameters[-1].float()
        total, slope = 0.0, torch.zeros_like(parameters)
        for start in range(0, n, ROWS):
            x = tokens[start : start + ROWS]
            y = patches.labels[start : start + ROWS]
            log_p = F.log_softmax(torch.addmm(offset, x, weight), 1)  # [rows, C]
            total -= float(log_p.gather(1, y[:, None]).double().sum())
            error = log_p.exp_()
            error[torch.arange(len(y)), y] -= 1
            slope[:-1] += (x.T @ error).double()
            slope[-1] += error.double().sum(0)
        total, slope = total / n, slope / n
        slope[:-1] += parameters[:-1] / (c * n)
        return total + float(parameters[:-1].square().sum()) / (2 * c * n), slope.flatten().numpy()

    options = {"maxcor": memory, "maxiter": iterations, "maxfun": 2 * iterations, "gtol": tolerance, "ftol": tolerance}
    found = minimize(loss, np.zeros((dim + 1) * n_classes), jac=True, method="L-BFGS-B", options=options)
    parameters = torch.from_numpy(found.x).view(dim + 1, n_classes)
    weight = parameters[:-1] / std[:, None].double()
    offset = parameters[-1] - (mean.double() @ weight)
    return LogisticHead(weight.float(), offset.float(), bool(found.nit < iterations))


def logistic_seg(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    cs: Sequence[float] = (1e-4, 1e-2, 1.0),
    held_out: float = 0.1,
    per_image: int | None = None,
    ignore: Sequence[int] = (),
    iterations: int = 100,
    upsample: str = "bilinear",
    score_sizes: Sequence[int | str] = ("full",),
    absent: str = "skip",
    seed: int = 0,
) -> list[Result]:
    """Fit logistic regression on patch labels of every layer, score it on pixels.

    Args:
        cs: inverse penalties tried (CAPI: 8 of them, 1e-6 … 1e5); the one of highest patch mIoU on the held-out part is
            refitted on all training images.
        per_image: patches taken of a training image; None: all (they are held in memory as float32).
        ignore: classes that are neither fitted nor scored (CAPI leaves out class 0 of ADE20K).
        upsample: bilinear (of logits) or nearest (of patch classes, as published).

    Returns:
        a result per layer and score size.

    Raises:
        UserError: an unknown option value, nothing to fit or choose on.
    """
    check_choices("logistic_seg", CHOICES, locals())
    train, maps, n_classes = features["train"], labels["train"], labels["test"].n_classes
    fitted_on, kept_apart = split_images(train.n_images, held_out, seed)
    results = []
    for layer in train.layers:
        grids = train.at(layer)
        part, rest = (
            gather_patches(grids.subset(rows), maps.subset(rows), per_image, ignore, seed) for rows in (fitted_on, kept_apart)
        )
        scores = {}
        for c in cs:
            head = fit_logistic(part, n_classes, c, iterations=iterations)
            called = (rest.tokens @ head.weight + head.offset).argmax(1)
            each = ImageConfusions(1, n_classes)
            each.add(torch.tensor([0]), rest.labels[None], called[None])
            scores[c] = float(class_metrics(each.class_counts(), absent)["miou"].value)
        best = max(scores, key=scores.get)
        everything = gather_patches(grids, maps, per_image, ignore, seed)
        head = fit_logistic(everything, n_classes, best, iterations=iterations)
        notes = {"C": best, "selected_on": "train_part", "selection_score": scores[best], "converged": head.converged}
        scored = score_logistic(head, features["test"].at(layer), labels["test"], score_sizes, ignore, upsample)
        for size, found in scored.items():
            results.append(segmentation_result({"layer": layer, "size": size}, found, absent=absent, notes=notes))
    return results


def score_logistic(
    head: LogisticHead, grids: Grids, maps: LabelMaps, sizes: Sequence[int | str], ignore: Sequence[int], upsample: str
) -> dict[int | str, ImageConfusions]:
    """Classes against predictions of every image, at every size."""
    found = {size: ImageConfusions(grids.n_images, maps.n_classes) for size in sizes}
    left_out = torch.tensor(list(ignore), dtype=torch.int64)
    for images, x in grids.batches(BATCH):
        logits = x[0] @ head.weight + head.offset  # [B, h, w, C]
        for image, each in zip(images.tolist(), logits, strict=True):
            full = maps.read(image)
            for size in sizes:
                size_here = score_size(size, each.shape[:2], grids.patch, full.shape)
                target = resize_map(full, size_here)
                target = target.masked_fill(torch.isin(target, left_out), -1)[None]
                if upsample == "bilinear":
                    called = predict_pixels(each[None], size_here)
                else:
                    called = resize_map(each.argmax(-1), size_here)[None]
                found[size].add(torch.tensor([image]), target, called)
    return found
