"""Objects out of pairs: group the patches of an image by the probe's probabilities, and score the groups.

spectral      normalised cut on the probabilities, number of groups at the largest gap of the eigenvalues
correlation   correlation clustering on the logits: join greedily, then move single patches, until nothing gains
k-means, normalised cut on the tokens' cosines: what the same tokens give without the probe
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import comb
from torch import Tensor

MOST_OBJECTS = 12


def normalised_cut(affinity: Tensor, n_groups: int | None = None, most: int = MOST_OBJECTS, seed: int = 0) -> Tensor:
    """Groups [N] of a symmetric affinity [N, N] of at least 0 by k-means on the eigenvectors of D^-1/2 A D^-1/2.

    Args:
        n_groups: None: at the largest gap between neighbouring eigenvalues, of 2 to `most` groups.
    """
    degree = affinity.double().sum(1).clamp_min(1e-12).rsqrt()
    values, vectors = torch.linalg.eigh(degree[:, None] * affinity.double() * degree)
    values, vectors = values.flip(0), vectors.flip(1)
    if n_groups is None:
        gaps = values[1:most] - values[2 : most + 1]
        n_groups = int(gaps.argmax()) + 2
    rows = vectors[:, :n_groups]
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
            groups = torch.cdist(x, centres).argmin(1)
            moved = torch.stack([x[groups == g].mean(0) if bool((groups == g).any()) else c for g, c in enumerate(centres)])
            if torch.equal(moved, centres):
                break
            centres = moved
        cost = float(torch.cdist(x, centres).amin(1).square().sum())
        if cost < best[0]:
            best = (cost, torch.cdist(x, centres).argmin(1))
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


def adjusted_rand_index(true: np.ndarray, found: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985) of two labelings [n]; 1 where both are one group or all singletons."""
    _, a = np.unique(true, return_inverse=True)
    _, b = np.unique(found, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1), np.int64)
    np.add.at(table, (a, b), 1)
    pairs = comb(table, 2).sum()
    rows, columns, total = comb(table.sum(1), 2).sum(), comb(table.sum(0), 2).sum(), comb(len(a), 2)
    expected = rows * columns / total if total else 0.0
    highest = (rows + columns) / 2
    return 1.0 if highest == expected else float((pairs - expected) / (highest - expected))


def foreground_ari(true: np.ndarray, found: np.ndarray) -> float | None:
    """Adjusted Rand index over pixels or patches that lie on an object (true above 0); None without any."""
    inside = true > 0
    return adjusted_rand_index(true[inside], found[inside]) if inside.any() else None


def mean_best_overlap(true: np.ndarray, found: np.ndarray) -> float | None:
    """Mean over true objects (above 0) of the highest IoU with any group, groups chosen anew for each; None without any."""
    return _overlaps(true, found, lambda iou: iou.max(1).mean())


def mean_matched_iou(true: np.ndarray, found: np.ndarray) -> float | None:
    """Mean over true objects of the IoU with the group it is matched to, every group once (Hungarian)."""
    return _overlaps(true, found, lambda iou: iou[linear_sum_assignment(-iou)].sum() / len(iou))


def _overlaps(true: np.ndarray, found: np.ndarray, reduce) -> float | None:
    ids, groups = np.unique(true[true > 0]), np.unique(found)
    if not len(ids):
        return None
    a, b = true.ravel()[None] == ids[:, None], found.ravel()[None] == groups[:, None]
    both = (a[:, None] & b[None]).sum(-1)
    return float(reduce(both / (a[:, None] | b[None]).sum(-1)))
