"""Newton's method for probes whose only free numbers are an offset and a factor of a fixed score of each pair.

The loss (mean binary cross-entropy over all counted pairs of the split) is convex in these two numbers, so there is one
optimum and it is reached in a handful of passes, with no learning rate, no epochs and no order of batches to choose.

Shapes: V variants, L layers, B images, P counted places of a matrix of pairs.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_PASSES = 50
TOLERANCE = 1e-9  # nats a further step would gain; sums over pairs of a batch are float32 and know no more
KEPT_BYTES = 1 << 28  # fixed scores of a split up to this size are kept between passes, larger ones computed anew


class PairBatch(NamedTuple):
    """Some images: fixed scores float32 [L, B, P]; counted and, of these, same (0 or 1), both float32 [V, B, P].

    beside: float32 [B, P], added to every logit as it is.
    """

    scores: Tensor
    counted: Tensor
    same: Tensor
    beside: Tensor | None = None


class Solution(NamedTuple):
    """The optimum of every variant and layer.

    offset, factor, loss: float64 [V, L]; loss in nats. passes: over the split.
    converged: bool [V, L], no step would gain as much as TOLERANCE.
    """

    offset: Tensor
    factor: Tensor
    loss: Tensor
    passes: int
    converged: Tensor


class _Point(NamedTuple):
    """Offset and factor [V, L, 2] of standardised scores with loss [V, L], gradient [V, L, 2], Hessian [V, L, 2, 2]."""

    theta: Tensor
    loss: Tensor
    gradient: Tensor
    hessian: Tensor

    def step(self, damping: Tensor) -> Tensor:
        """The Newton step [V, L, 2] of the Hessian plus `damping` [V, L] times the largest it can be, diag(1/4, 1/4)."""
        more = torch.eye(2, device=damping.device) * (0.25 * damping + 1e-12)[..., None, None]
        return torch.linalg.solve(self.hessian + more, self.gradient)

    def where(self, better: Tensor, other: "_Point") -> "_Point":
        """The other point for fits [V, L] where that is better."""
        spread = lambda field: better.view(*better.shape, *[1] * (field.ndim - 2))
        return _Point(*(torch.where(spread(old), new, old) for old, new in zip(self, other, strict=True)))


def solve(batches: Callable[[], Iterator[PairBatch]]) -> Solution:
    """Minimise the mean loss over all counted pairs by damped Newton steps, from offset and factor 0.

    A step that does not lower the loss is not taken and the damping rises tenfold; a step that is taken lowers it.

    Args:
        batches: makes a fresh pass over the split.
    """
    kept = _Kept(batches)
    mean, std, n_variants = _scale(kept)
    point = _measure(kept, torch.zeros(n_variants, len(mean), 2, dtype=torch.float64, device=mean.device), mean, std)
    damping, passes = torch.zeros_like(point.loss), 2
    while True:
        gain = 0.5 * (point.gradient * point.step(torch.zeros_like(damping))).sum(-1)
        converged = gain < TOLERANCE
        if passes == MAX_PASSES or bool(converged.all()):
            break
        step = torch.where(converged[..., None], 0.0, point.step(damping))
        tried = _measure(kept, point.theta - step, mean, std)
        better = ~converged & (tried.loss < point.loss + 1e-7)  # the noise of float32 sums
        damping = torch.where(better, damping / 10, (10 * damping).clamp_min(1e-3))
        damping = torch.where(damping < 1e-6, 0.0, damping)
        point, passes = point.where(better, tried), passes + 1
    factor = point.theta[..., 1] / std
    return Solution(point.theta[..., 0] - factor * mean, factor, point.loss, passes, converged)


class _Kept:
    """The batches of a split, kept in memory after the first pass if they are small enough."""

    def __init__(self, batches: Callable[[], Iterator[PairBatch]]) -> None:
        self.batches, self.list = batches, None

    def __iter__(self) -> Iterator[PairBatch]:
        if self.list is not None:
            yield from self.list
            return
        kept, room = [], KEPT_BYTES
        for batch in self.batches():
            room -= sum(part.numel() * part.element_size() for part in batch if part is not None)
            kept = [*kept, batch] if room >= 0 else []
            yield batch
        self.list = kept if room >= 0 else None


def _scale(batches: _Kept) -> tuple[Tensor, Tensor, int]:
    """Mean and deviation of the fixed scores of every layer, float64 [L], and the number of variants.

    Standardised scores make offset and factor nearly independent, whatever the unit of a score.
    """
    n, total, square = 0, 0.0, 0.0
    for batch in batches:
        scores = batch.scores.double().flatten(1)
        n, total, square = n + scores.shape[1], total + scores.sum(1), square + scores.square().sum(1)
    std = (square / n - (total / n).square()).clamp_min(0).sqrt()
    return total / n, torch.where(std > 0, std, 1.0), len(batch.counted)


def _measure(batches: _Kept, theta: Tensor, mean: Tensor, std: Tensor) -> _Point:
    """Loss, gradient and Hessian of the mean over all counted pairs."""
    sums = theta.new_zeros(*theta.shape[:2], 7)  # pairs, loss, gradient (2), Hessian (3): float64 over batches
    for batch in batches:
        for layer in range(theta.shape[1]):
            s = (batch.scores[layer].flatten() - mean[layer].float()) / std[layer].float()
            powers = torch.stack([torch.ones_like(s), s, s * s])  # [3, B P]
            for v in range(len(theta)):
                counted, same = batch.counted[v].flatten(), batch.same[v].flatten()
                offset, factor = theta[v, layer].float()
                z = torch.add(offset, factor * s)
                if batch.beside is not None:
                    z += batch.beside.flatten()
                loss = F.softplus(z) @ counted - z @ same
                p = z.sigmoid_()
                weighted = p * counted
                gradient, hessian = powers[:2] @ (weighted - same), powers @ (weighted - weighted * p)
                sums[v, layer] += torch.cat([counted.sum()[None], loss[None], gradient, hessian])
    means = sums[..., 1:] / sums[..., :1].clamp_min(1)
    return _Point(theta, means[..., 0], means[..., 1:3], means[..., [3, 4, 4, 5]].unflatten(-1, (2, 2)))
