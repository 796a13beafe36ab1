"""Relaxed sorting networks: which wires are compared in which layer, and how likely a comparison leaves two values as they are.

A sorting network is a fixed list of compare-exchanges. Relaxed (Petersen et al., arXiv 2105.04019 and 2203.09630), a
compare-exchange of the values a and b keeps them with probability p = f(s (b - a)) and swaps them otherwise:

    low = p a + (1 - p) b        high = (1 - p) a + p b

Large steepness s gives the hard sort.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError

Swap = Callable[[Tensor, float], Tensor]
PHI = (0.25, 1e-10)  # of logistic_phi: exponent lambda and the epsilon beside the distance


# ---------------------------------------------------------------------------------------------------- swap functions


def _cauchy(distance: Tensor, steepness: float) -> Tensor:
    """1/2 + atan(v) / pi, written as an angle: for large negative v the sum would cancel."""
    return (torch.atan2(torch.ones_like(distance), -steepness * distance) / math.pi).log()


def _logistic_phi(distance: Tensor, steepness: float) -> Tensor:
    """Logistic with the distance divided by its own power (arXiv 2105.04019, activation replacement trick)."""
    return F.logsigmoid(steepness * distance / (distance.abs() + PHI[1]) ** PHI[0])


def _gaussian(distance: Tensor, steepness: float) -> Tensor:
    """Normal distribution function; its tail by erfcx, because the gradient of log_ndtr is 0 / 0 there."""
    v = steepness * distance
    tail, middle = v.clamp_max(-3), v.clamp_min(-3)
    by_tail = (torch.special.erfcx(-tail / math.sqrt(2)) / 2).log() - tail.square() / 2
    return torch.where(v < -3, by_tail, torch.special.ndtr(middle).log())


def _reciprocal(distance: Tensor, steepness: float) -> Tensor:
    """(v / (2 + |v|) + 1) / 2, without the difference of nearly equal numbers."""
    v = steepness * distance
    return torch.where(v < 0, -torch.log(2 + v.abs()), torch.log1p(v.abs()) - torch.log(2 + v.abs()))


def _optimal(distance: Tensor, steepness: float) -> Tensor:
    """Line v + 1/2 up to |v| = 1/4, hyperbolic tails beyond (arXiv 2203.09630)."""
    v = steepness * distance
    tail = 1 / (16 * v.abs().clamp_min(0.25))
    middle = (v.clamp(-0.25, 0.25) + 0.5).log()
    return torch.where(v.abs() <= 0.25, middle, torch.where(v < 0, tail.log(), torch.log1p(-tail)))


# log f(distance, steepness): the probability that a compare-exchange leaves two values as they are. f(-d) = 1 - f(d).
SWAPS: dict[str, Swap] = {
    "cauchy": _cauchy,
    "logistic": lambda distance, steepness: F.logsigmoid(steepness * distance),
    "logistic_phi": _logistic_phi,
    "gaussian": _gaussian,
    "reciprocal": _reciprocal,
    "optimal": _optimal,
}


# ---------------------------------------------------------------------------------------------------- networks

Comparators = tuple[tuple[int, int], ...]  # of one layer: (wire that gets the smaller value, wire that gets the larger)


def _odd_even(n: int) -> list[Comparators]:
    return [tuple((k, k + 1) for k in range(layer % 2, n - 1, 2)) for layer in range(n)]


def _bitonic(n: int) -> list[Comparators]:
    """The network of the next power of two; comparators that touch one of its first, missing wires are left out."""
    steps = (n - 1).bit_length()
    offset, layers = 2**steps - n, []
    for block in range(steps):
        for stride in (2**k for k in range(block, -1, -1)):
            pairs = [(i, i + stride) for i in range(offset, n + offset) if not i & stride]
            ordered = [pair if not (pair[0] >> (block + 1)) & 1 else pair[::-1] for pair in pairs]
            layers.append(tuple((low - offset, high - offset) for low, high in ordered))
    return layers


NETWORKS: dict[str, Callable[[int], list[Comparators]]] = {"bitonic": _bitonic, "odd_even": _odd_even}


def comparators(network: str, n: int) -> list[Comparators]:
    """The layers of a sorting network over n wires, each a list of (wire of the smaller value, wire of the larger).

    Raises:
        UserError: no such network.
    """
    if network not in NETWORKS:
        raise UserError(f"neco.network={network} is unknown, expected one of {', '.join(NETWORKS)}")
    return NETWORKS[network](n)


class Step(NamedTuple):
    """One layer: take the wires in this order (smaller outputs, larger outputs, the rest), compare the first 2 `pairs`."""

    gather: Tensor
    scatter: Tensor  # the inverse of gather
    pairs: int


@functools.lru_cache(maxsize=64)
def plan(network: str, n: int, device: torch.device) -> tuple[list[Step], Tensor]:
    """The steps, and the gather that brings the wires back into order at the end."""
    steps, order = [], list(range(n))
    for layer in comparators(network, n):
        lows, highs = [low for low, _ in layer], [high for _, high in layer]
        wires = lows + highs + sorted(set(range(n)) - set(lows) - set(highs))
        gather = torch.tensor([order.index(wire) for wire in wires], device=device)
        steps.append(Step(gather, gather.argsort(), len(layer)))
        order = wires
    return steps, torch.tensor([order.index(wire) for wire in range(n)], device=device)


# ---------------------------------------------------------------------------------------------------- the values


class Sorter(NamedTuple):
    """What is sorted how.

    network: of `NETWORKS`; steepness: above 0, the larger the harder; swap: of `SWAPS`.
    rows: rows whose weights are computed at once (bounds the working memory); None: what suits the device.
    """

    network: str = "bitonic"
    steepness: float = 100.0
    swap: str = "cauchy"
    rows: int | None = None

    def check(self) -> Sorter:
        """This, if it can be computed.

        Raises:
            UserError: an unknown network or swap function, a steepness that is no positive number.
        """
        comparators(self.network, 1)
        if self.swap not in SWAPS:
            raise UserError(f"neco.swap={self.swap} is unknown, expected one of {', '.join(SWAPS)}")
        if not 0 < self.steepness < math.inf:
            raise UserError(f"neco steepness: got {self.steepness}, expected a number above 0, such as 100")
        return self


def log_keeps(x: Tensor, sorter: Sorter) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Sorted values [n, R] of x [n, R], and per layer (log p, log(1 - p)), each [pairs, R]. Plain autograd."""
    steps, restore = plan(sorter.network, len(x), x.device)
    swap, keeps = SWAPS[sorter.swap], []
    for step in steps:
        low, high, rest = x.index_select(0, step.gather).split([step.pairs, step.pairs, len(x) - 2 * step.pairs])
        keep, change = swap(high - low, sorter.steepness), swap(low - high, sorter.steepness)
        keeps.append((keep, change))
        p, q = keep.exp(), change.exp()
        x = torch.cat([p * low + q * high, q * low + p * high, rest])
    return x.index_select(0, restore), keeps
