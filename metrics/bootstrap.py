"""Estimates with the influence of every image, and bootstrap intervals over images."""

from collections.abc import Sequence
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


def pooled_estimate(parts: Sequence[Estimate], images: Sequence[Tensor], n_images: int) -> Estimate:
    """Of disjoint parts of M images to all of them: the mean weighted by images, of the parts where a score is defined.

    Args:
        parts: of F fits each.
        images: which of the M images each part holds, in its order.
    """
    value = torch.stack([part.value for part in parts])  # [parts, F]
    weight = torch.tensor([len(at) for at in images], dtype=torch.float64)[:, None] * ~value.isnan()
    weight = weight / weight.sum(0)  # nan where no part has a score
    influence = torch.zeros(value.shape[1], n_images, dtype=torch.float64)
    for part, at, share in zip(parts, images, weight.nan_to_num(), strict=True):
        influence[:, at] = share[:, None] * part.influence
    return Estimate((weight * value.nan_to_num()).sum(0), influence)


def resample(n_images: int, n_boot: int = 1000, seed: int = 0) -> Tensor:
    """How often each image is drawn in each bootstrap sample, float64 [n_boot, M], rows sum to M."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.multinomial(n_images, np.full(n_images, 1 / n_images), n_boot).astype(np.float64))


def draws_of(estimate: Estimate, counts: Tensor) -> Tensor:
    """The score of F fits in every resample (first order in the weights of the images), [F, n_boot]."""
    return estimate.value[:, None] + estimate.influence @ counts.T


def draws_over_seeds(estimate: Estimate, n_seeds: int, counts: Tensor) -> Tensor:
    """The mean over seeds of fits [S * L], every draw resampling images and seeds: [L, n_boot]."""
    weight = resample(n_seeds, len(counts), 1)[:, :, None] / n_seeds  # [n_boot, S, 1]
    draws = draws_of(estimate, counts).T.unflatten(1, (n_seeds, -1))  # [n_boot, S, L]
    return (draws * weight).sum(1).T


def percentiles(draws: Tensor, bounds: tuple[float, float] = (0.0, 1.0), level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Ends of the percentile interval of draws [F, n_boot]: low and high, float64 [F]; nan where a draw is."""
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(draws, ends, dim=1).clamp(*bounds)
    return low, high


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
    return percentiles(draws_of(estimate, counts), bounds, level)


def interval_over_seeds(
    estimate: Estimate, n_seeds: int, counts: Tensor, bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[Tensor, Tensor]:
    """As `interval`, of the mean over seeds of fits [S * L], every draw resampling images and seeds: two tensors [L]."""
    return percentiles(draws_over_seeds(estimate, n_seeds, counts), bounds)


def p_value(draws: Tensor) -> Tensor:
    """Two-sided p-value of "this difference is 0", from its paired bootstrap draws [F, n_boot]: float64 [F].

    p = min(1, 2 (1 + min(k, l)) / (n_boot + 1)), k draws being at most 0 and l at least 0 (Davison and Hinkley, *Bootstrap
    Methods*, 1997, chapter 4, doubled for two sides): up to the 1, the level at which the percentile interval reaches 0. It
    cannot fall below 2 / (n_boot + 1). nan where a draw is.
    """
    side = torch.minimum((draws <= 0).sum(1), (draws >= 0).sum(1)).double()
    p = (2 * (1 + side) / (draws.shape[1] + 1)).clamp(max=1.0)
    return torch.where(draws.isnan().any(1), torch.nan, p)


def holm(p: Tensor) -> Tensor:
    """p-values [F] corrected for asking F questions (Holm, Scand. J. Statist. 6, 1979); undefined ones are no question."""
    corrected, known = p.clone(), (~p.isnan()).nonzero().flatten()
    order = known[p[known].argsort()]
    left = torch.arange(len(order), 0, -1, dtype=torch.float64)
    corrected[order] = (p[order] * left).clamp(max=1.0).cummax(0).values if len(order) else p[order]
    return corrected
