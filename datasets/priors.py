"""Priors of the object code Y, and the exact entropies that follow from them.

H(Y|F) needs a prior of Y. Every prior here weighs an object code by its size alone, P(Y) ~ weight[|Y|], so H(Y|F=f)
depends only on how many values f names in each group; counts are exact (Python integers) and a table over those few
numbers serves any number of scenes. Priors are named, and the name travels with every result:

    uniform<=M         all object codes of at most M objects equally likely (the published prior of four data sets)
    fixed_k            all object codes of exactly k objects
    balanced           exactly k objects given F, F uniform over a list (BalancedColorShape)
    independent_draws  k independent uniform objects, duplicates collapse (CLEVR's own generator)
    empirical          sizes as often as in the training split, codes of one size equally likely

(`vg_assignment` and `vg_merged` of Visual Genome are not of this kind, see `datasets/arrangements.py`.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache, cached_property
from typing import Any

import numpy as np

from errors import UserError


@cache
def count_by_size(a: tuple[int, ...], most: int | None = None) -> tuple[int, ...]:
    """N_k(a) for k = 0 .. prod(a), or `most`: the k-subsets of an a_1 x ... x a_G grid that touch every value of every group.

    Inclusion and exclusion over the values left out, in exact integers. No group with values at all: one empty
    subset; some groups without values but not all: none; negative sizes: none.
    """
    if any(size < 0 for size in a) or not a:
        return (0,)
    if not all(a):
        return (0,) if any(a) else (1,)
    last = math.prod(a) if most is None else min(most, math.prod(a))
    factors: dict[int, int] = {}  # by the number of cells that are left
    for left_out in itertools.product(*(range(size + 1) for size in a)):
        cells = math.prod(size - i for size, i in zip(a, left_out, strict=True))
        factor = (-1) ** sum(left_out) * math.prod(math.comb(size, i) for size, i in zip(a, left_out, strict=True))
        factors[cells] = factors.get(cells, 0) + factor
    return tuple(sum(factor * math.comb(cells, k) for cells, factor in factors.items()) for k in range(last + 1))


def count_subsets(a: Sequence[int], k: int) -> int:
    """N_k(a) as one exact integer; 0 whatever cannot be."""
    table = count_by_size(tuple(int(size) for size in a))
    return table[k] if 0 <= k < len(table) else 0


def entropy_given_size(sizes: tuple[int, int], k: int) -> float:
    """H(Y | F, |Y| = k) in bits on a grid of two groups, Y uniform over the k-subsets."""
    if len(sizes) != 2:
        raise UserError(f"entropy at a fixed number of objects: got {len(sizes)} feature groups, expected two")
    cells = math.prod(sizes)
    if not 0 <= k <= cells:
        raise UserError(f"number of objects: got {k}, expected 0 to {cells} on a {sizes[0]} x {sizes[1]} grid")
    return fixed_size(sizes, k).population()["E_H_Y_given_F"]


class Prior:
    """A prior P(Y) ~ weight[|Y|] over the object codes of a grid; weights are exact (int or Fraction).

    name: as recorded with every result; `sizes` [G] group sizes; `weight` one number per size 0 .. K.
    """

    def __init__(self, name: str, sizes: Sequence[int], weight: Mapping[int, int | Fraction]) -> None:
        self.name, self.sizes = name, tuple(sizes)
        self.weight = {k: w for k, w in sorted(weight.items()) if w > 0}
        self._most = max(self.weight, default=0)
        self._entropy: dict[tuple[int, ...], float] = {}

    def number(self, a: Sequence[int]) -> int:
        """|Omega(F)|: object codes possible under the prior whose F has a_g values in group g."""
        table = count_by_size(tuple(a), self._most)
        return sum(table[k] for k in self.weight if k < len(table))

    def mass(self, a: Sequence[int]) -> int | Fraction:
        """Unnormalised probability of one such F, exact."""
        table = count_by_size(tuple(a), self._most)
        return sum(table[k] * w for k, w in self.weight.items() if k < len(table))

    def entropy_of_counts(self, a: Sequence[int]) -> float:
        """H(Y | F = f) in bits for an f with a_g values in group g; 0 for an F the prior excludes."""
        a = tuple(int(size) for size in a)
        if a not in self._entropy:
            mass = self.mass(a)
            self._entropy[a] = _log2(mass) - self._mean_log_weight(a, mass) if mass else 0.0
        return self._entropy[a]

    def entropy(self, counts: np.ndarray) -> np.ndarray:
        """H(Y|F) in bits of many scenes, from the counts of their feature codes: [M, G] to float64 [M]."""
        counts = np.asarray(counts, np.int64)
        radix = np.cumprod([1, *(size + 1 for size in self.sizes[:-1])])
        distinct, first, where = np.unique(counts @ radix, return_index=True, return_inverse=True)
        del distinct
        return np.array([self.entropy_of_counts(counts[i]) for i in first], np.float64)[where.reshape(-1)]

    def population(self, support: np.ndarray | None = None) -> dict[str, Any]:
        """Exact entropies of the prior, or of the prior restricted to the feature codes of a split.

        support: feature codes [n_F, n], or None for all. Returns H_Y, H_F and E_H_Y_given_F in bits, num_Y and num_F
        (integers), largest_F_mass, and acceptance: the probability of the support under the unrestricted prior.
        """
        if support is None:
            grid = itertools.product(*(range(size + 1) for size in self.sizes))
            times = {a: math.prod(math.comb(n, i) for n, i in zip(self.sizes, a, strict=True)) for a in grid}
        else:
            bounds = np.cumsum(self.sizes)[:-1]
            counts = np.stack([part.sum(1) for part in np.split(np.asarray(support, np.int64), bounds, 1)], 1)
            rows, number = np.unique(counts, axis=0, return_counts=True)
            times = {tuple(map(int, a)): int(n) for a, n in zip(rows, number, strict=True)}
        mass = {a: self.mass(a) for a in times}
        total = sum(times[a] * mass[a] for a in times)
        if not total:
            raise UserError(f"prior {self.name}: no feature code of this split can occur, change split_mode")
        share = {a: float(Fraction(mass[a]) / Fraction(total)) for a in times if mass[a]}
        return {
            "H_Y": _log2(total) - math.fsum(times[a] * p * self._mean_log_weight(a, mass[a]) for a, p in share.items()),
            "H_F": -math.fsum(times[a] * p * math.log2(p) for a, p in share.items()),
            "E_H_Y_given_F": math.fsum(times[a] * p * self.entropy_of_counts(a) for a, p in share.items()),
            "num_Y": sum(times[a] * self.number(a) for a in share),
            "num_F": sum(times[a] for a in share),
            "largest_F_mass": max(share.values()),
            "acceptance": float(Fraction(total) / Fraction(self._everything)),
        }

    @cached_property
    def _everything(self) -> int | Fraction:
        cells = math.prod(self.sizes)
        return sum(math.comb(cells, k) * w for k, w in self.weight.items())

    def _mean_log_weight(self, a: Sequence[int], mass: int | Fraction) -> float:
        """Mean of log2 weight[|Y|] over the object codes of one F."""
        table = count_by_size(tuple(a), self._most)
        weighed = [(k, w) for k, w in self.weight.items() if k < len(table) and w != 1]
        return math.fsum(float(table[k] * Fraction(w) / mass) * _log2(w) for k, w in weighed)


def uniform_up_to(sizes: Sequence[int], most: int | None = None) -> Prior:
    """All object codes of at most `most` objects (None: any number) equally likely."""
    cells = math.prod(sizes)
    most = cells if most is None else min(int(most), cells)
    return Prior(f"uniform<={most}", sizes, dict.fromkeys(range(most + 1), 1))


def fixed_size(sizes: Sequence[int], k: int) -> Prior:
    """All object codes of exactly k objects equally likely."""
    return Prior(f"fixed_{k}", sizes, {int(k): 1})


def balanced(sizes: Sequence[int], k: int) -> Prior:
    """Exactly k objects given F; restricted to feature codes of one shape all of them are equally likely."""
    return Prior(f"balanced_{k}", sizes, {int(k): 1})


def independent_draws(sizes: Sequence[int], k: int) -> Prior:
    """The prior of the set of k independent, uniform objects: weight m! S(k, m), the surjections of k draws on m."""
    weight = {
        m: sum((-1) ** i * math.comb(m, i) * (m - i) ** k for i in range(m + 1)) for m in range(1, min(k, math.prod(sizes)) + 1)
    }
    return Prior(f"independent_draws_{k}", sizes, weight)


def empirical_sizes(sizes: Sequence[int], object_code: np.ndarray) -> Prior:
    """Sizes as often as in the given object codes [M, K] (the training split), codes of one size equally likely."""
    cells = math.prod(sizes)
    seen, times = np.unique(np.asarray(object_code).sum(1, dtype=np.int64), return_counts=True)
    weight = {int(m): Fraction(int(n), math.comb(cells, int(m))) for m, n in zip(seen, times, strict=True)}
    return Prior("empirical", sizes, weight)


def _log2(x: int | Fraction) -> float:
    """log2 of an exact positive number of any size."""
    return math.log2(x) if isinstance(x, int) else math.log2(x.numerator) - math.log2(x.denominator)
