"""Estimates with the influence of every image, and bootstrap intervals over images."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A score in [0, 1] of F fits and how every image bears on it.

    Attributes:
        value: float64 [F], exact; nan where the score is undefined (no positive or no negative pair).
        influence: float64 [F, M], derivative of the score by the image's weight; every row sums to 0.
    """

    value: Tensor
    influence: Tensor


def ratio_estimate(part: Tensor, total: Tensor) -> Estimate:
    """Estimate of sum(part) / sum(total) over images, e.g. of right answers and answers.

    Args:
        part: [F, M].
        total: [M] or [F, M].
    """
    part, total = part.double(), total.double().expand_as(part)
    summed = total.sum(-1)
    value = part.sum(-1) / summed  # nan where there is nothing to count
    return Estimate(value, torch.nan_to_num((part - value[:, None] * total) / summed[:, None], nan=0.0))


def mean_estimate(scores: Tensor) -> Estimate:
    """Estimate of the mean over images of a score per image, [F, M]."""
    return ratio_estimate(scores, torch.ones(scores.shape[-1]))


def mean_over_seeds(estimate: Estimate, n_seeds: int) -> Estimate:
    """Fits [S * L] (seed first) to [L]: the mean over seeds, inside every resample."""
    return Estimate(*(x.unflatten(0, (n_seeds, -1)).mean(0) for x in estimate))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """Of a minus b on the same images (paired: both see every resample). Fits broadcast."""
    return Estimate(a.value - b.value, a.influence - b.influence)


def resample(n_images: int, n_boot: int = 1000, seed: int = 0) -> Tensor:
    """How often each image is drawn in each bootstrap sample, float64 [n_boot, M], rows sum to M."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.multinomial(n_images, np.full(n_images, 1 / n_images), n_boot).astype(np.float64))


def interval(
    estimate: Estimate, counts: Tensor, level: float = 0.95, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """Percentile bootstrap interval over images.

    Args:
        estimate: of F fits.
        counts: of `resample`; give compared fits the same.
        bounds: where the score can lie; (-1, 1) for a difference.

    Returns:
        low and high, float64 [F]; nan where the value is.
    """
    draws = estimate.value[:, None] + estimate.influence @ counts.T  # [F, n_boot]
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(draws, ends, dim=1).clamp(*bounds)
    return low, high


def interval_over_seeds(
    estimate: Estimate, n_seeds: int, counts: Tensor, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """As `interval`, of the mean over seeds of fits [S * L], every draw resampling images and seeds: two tensors [L]."""
    weight = resample(n_seeds, len(counts), 1)[:, :, None] / n_seeds  # [n_boot, S, 1]
    draws = (estimate.value[:, None] + estimate.influence @ counts.T).T.unflatten(1, (n_seeds, -1))  # [n_boot, S, L]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile((draws * weight).sum(1), ends, dim=0).clamp(*bounds)
    return low, high
