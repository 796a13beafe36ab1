"""Objects out of pairs: ways to group the patches of an image, and scores of groups against true objects.

spectral      normalised cut on the probe's probabilities
correlation   correlation clustering on its logits: join greedily, then move single patches, until nothing gains
k-means, normalised cut on the tokens' cosines: what the same tokens give without the probe
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import comb
from torch import Tensor

MOST_OBJECTS = 16


# ------------------------------------------------------------------------------------------------------------ grouping


class Spectrum(NamedTuple):
    """Eigenvalues [N], largest first, and eigenvectors [N, N] of D^-1/2 A D^-1/2 of an affinity A."""

    values: Tensor
    vectors: Tensor


def spectrum(affinity: Tensor) -> Spectrum:
    """The spectrum of a symmetric affinity [N, N] of at least 0."""
    degree = affinity.double().sum(1).clamp_min(1e-12).rsqrt()
    values, vectors = torch.linalg.eigh(degree[:, None] * affinity.double() * degree)
    return Spectrum(values.flip(0), vectors.flip(1))


def count_by_gap(of: Spectrum, most: int = MOST_OBJECTS) -> int:
    """Number of groups, 2 to `most`, at the largest gap between neighbouring eigenvalues."""
    gaps = -of.values[1 : most + 1].diff()  # an image may have fewer patches than `most`
    return int(gaps.argmax()) + 2


def count_above(of: Spectrum, threshold: float, most: int = MOST_OBJECTS) -> int:
    """Number of groups, 1 to `most`: of eigenvalues above a threshold."""
    return int((of.values > threshold).sum().clamp(1, most))


def normalised_cut(of: Spectrum, n_groups: int, seed: int = 0) -> Tensor:
    """Groups [N] by k-means on the first eigenvectors, each patch's row divided by its norm (Ng, Jordan and Weiss 2002)."""
    rows = of.vectors[:, :n_groups]
    return k_means(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12), n_groups, seed)


def k_means(x: Tensor, n_groups: int, seed: int = 0, restarts: int = 4, steps: int = 50) -> Tensor:
    """Groups [N] of points [N, D]: k-means++ starts, the best of some restarts."""
    generator, best = torch.Generator().manual_seed(seed), (float("inf"), torch.zeros(len(x), dtype=torch.long))
    for _ in range(restarts):
        centres = x[torch.randint(len(x), (1,), generator=generator)]
        while len(centres) < n_groups:
            distance = torch.cdist(x, centres).amin(1).square()
            weights = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
            centres = torch.cat([centres, x[torch.multinomial(weights, 1, generator=generator)]])
        for _ in range(steps):
            members = torch.nn.functional.one_hot(torch.cdist(x, centres).argmin(1), n_groups).to(x)  # [N, k]
            sizes = members.sum(0)[:, None]
            moved = torch.where(sizes > 0, members.mT @ x / sizes.clamp_min(1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        distance, groups = torch.cdist(x, centres).min(1)
        if float(distance.square().sum()) < best[0]:
            best = (float(distance.square().sum()), groups)
    return best[1]


def correlation_clustering(gain: Tensor) -> Tensor:
    """Groups [N] that make the sum of gain [N, N] over pairs in one group large; the number of groups comes out of it.

    Groups are joined greedily while a join gains, then single patches move while a move gains: a local optimum.
    """
    gain = ((gain + gain.mT) / 2).double().clone().fill_diagonal_(0)
    n = len(gain)
    groups, between = torch.arange(n), gain.clone().fill_diagonal_(-torch.inf)
    for _ in range(n - 1):
        best = int(between.argmax())
        a, b = divmod(best, n)
        if float(between[a, b]) <= 0:
            break
        joined = between[a] + between[b]
        between[a], between[:, a] = joined, joined
        between[a, a] = -torch.inf
        between[b], between[:, b] = -torch.inf, -torch.inf
        groups[groups == b] = a
    for _ in range(10):
        changed = False
        for i in range(n):
            total = torch.zeros(n, dtype=torch.float64).index_add_(0, groups, gain[i])
            target = int(total.argmax())
            if float(total[target]) > float(total[groups[i]]) + 1e-12:
                groups[i], changed = target, True
        if not changed:
            break
    return groups.unique(return_inverse=True)[1]


# ------------------------------------------------------------------------------------------------------------- scoring


def _overlap_counts(true: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many places every true label and every group share, [labels, groups], and the labels in order."""
    labels, a = np.unique(true, return_inverse=True)
    names, b = np.unique(groups, return_inverse=True)
    counts = np.bincount(a.ravel() * len(names) + b.ravel(), minlength=len(labels) * len(names))
    return counts.reshape(len(labels), len(names)), labels


def adjusted_rand_index(true: np.ndarray, groups: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985) of two labelings [n]; 1 where both are one group or all singletons."""
    counts, _ = _overlap_counts(true, groups)
    pairs = comb(counts, 2).sum()
    rows, columns, total = comb(counts.sum(1), 2).sum(), comb(counts.sum(0), 2).sum(), comb(true.size, 2)
    expected = rows * columns / total if total else 0.0
    highest = (rows + columns) / 2
    return 1.0 if highest == expected else float((pairs - expected) / (highest - expected))


def foreground_ari(true: np.ndarray, groups: np.ndarray) -> float | None:
    """Adjusted Rand index over pixels or patches that lie on an object (true above 0); None without any."""
    inside = true > 0
    return adjusted_rand_index(true[inside], groups[inside]) if inside.any() else None


def mean_best_overlap(true: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean over true objects (above 0) of the highest IoU with any group, groups chosen anew for each; None without any."""
    iou = _ious(true, groups)
    return float(iou.max(1).mean()) if len(iou) else None


def mean_matched_iou(true: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean over true objects of the IoU with the group it is matched to, every group once (Hungarian)."""
    iou = _ious(true, groups)
    return float(iou[linear_sum_assignment(-iou)].sum() / len(iou)) if len(iou) else None


def _ious(true: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """IoU [objects, groups] of every true object (above 0) with every group."""
    counts, labels = _overlap_counts(true, groups)
    ious = counts / np.maximum(counts.sum(1, keepdims=True) + counts.sum(0) - counts, 1)
    return ious[labels > 0]
