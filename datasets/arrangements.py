"""Entropy of handing out the attributes seen in an image among the objects seen in it.

Photographs have no known prior of Y, so for Visual Genome H(Y|F) is replaced by this entropy, pairs of category and
attribute weighed by how often they occur. Two versions, both always computed:

    vg_assignment   the published number: arrangements along the ordered list of objects. Two cars, red and blue,
                    count as one bit although both arrangements are the same object code. Too high, and conditioned on
                    how many of each there are, which F does not say: neither an upper nor a lower bound of H(Y|F).
    vg_merged       arrangements with the same object code counted as one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

BUDGET = 2_000_000  # additions of the dynamic programme per image beyond which a bound replaces the entropy
MERGE_LIMIT = 20_000  # steps of listing object codes per image beyond which the entropy of the tables stands for theirs


class ArrangementEntropy(NamedTuple):
    """Entropies of one image in bits, and whether each is exact or an upper bound."""

    assignment: float
    merged: float
    assignment_exact: bool
    merged_exact: bool


def arrangement_entropy(
    pairs: Sequence[tuple[int, int]], log_p: np.ndarray, *, budget: int = BUDGET, merge_limit: int = MERGE_LIMIT
) -> ArrangementEntropy:
    """Entropy of handing out the attributes of an image's (category, attribute) instances among its categories.

    An arrangement gives every instance one attribute so that each attribute is used as often as it was seen; its weight
    is the product of exp(log_p [N_1, N_2]) over the instances. All that matters of it is its table k: how often category
    c got attribute a. Tables with the observed margins have weight prod p^k / k!, so one pass over the cells (c, a), with
    the attributes handed out so far as its state, gives the entropy of tables and of arrangements together.

    The pass is iterative and its size, known before, is bounded by `budget`; beyond it both numbers are upper bounds
    (all arrangements equally likely). Object codes are tables with the numbers forgotten. Both have the same entropy
    unless two categories and two attributes occur three times or more: a second table with the same margins and the same
    non-zero cells differs along a cycle, where each row and column holds a cell of at least 2 beside one of at least 1.
    Then the rows of the frequent categories are listed, in at most `merge_limit` steps; beyond it the entropy of tables
    is reported, again an upper bound.
    """
    n, rows, columns = len(pairs), Counter(c for c, _ in pairs), Counter(a for _, a in pairs)
    if len(rows) < 1 or len(columns) < 2:
        return ArrangementEntropy(0.0, 0.0, True, True)
    categories, attributes = sorted(rows), sorted(columns)
    need, supply = np.array([rows[c] for c in categories]), np.array([columns[a] for a in attributes])
    p = _balance(log_p[np.ix_(categories, attributes)], need, supply)  # [C, A], natural log
    orders = sum(math.lgamma(k + 1) for k in need)
    # Which side is the state does not matter to the weight of a table: take the cheaper one.
    sides = sorted([(need, supply, p), (supply, need, p.T)], key=lambda side: _cost(*side[:2]))
    if _cost(*sides[0][:2]) > budget:
        most = math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in supply)
        fewer = min(most, math.lgamma(n + 1) - orders)
        return ArrangementEntropy(most / math.log(2), fewer / math.log(2), False, False)
    log_z, mean_p, mean_k = (float(x[tuple(sides[0][1])]) for x in _tables(*sides[0]))
    table = max(0.0, log_z - mean_p + mean_k) / math.log(2)
    assignment = max(0.0, log_z + orders - mean_p) / math.log(2)
    if (need >= 3).sum() < 2 or (supply >= 3).sum() < 2:
        return ArrangementEntropy(assignment, table, True, True)
    merged = _merged(*min(sides, key=lambda side: _listed(*side[:2])), limit=merge_limit)
    return ArrangementEntropy(assignment, table if merged is None else merged, True, merged is not None)


def _balance(log_p: np.ndarray, need: np.ndarray, supply: np.ndarray) -> np.ndarray:
    """Scale rows and columns so that they sum to about their margins (Sinkhorn).

    Factors of rows and columns are the same in every table of these margins, so no entropy changes; but the tables
    that count then have weights around one, whatever tiny probabilities the image forces.
    """
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    for _ in range(20):
        p = p * (supply / p.sum(0))
        p = p * (need / p.sum(1))[:, None]
    return np.log(np.maximum(p, 1e-280))


def _cost(need: np.ndarray, supply: np.ndarray) -> int:
    """Additions of `_tables`: cells x values of a cell x states; beyond reason where NumPy lacks the axes."""
    cells = int((np.minimum(need[:, None], supply) + 1).sum())
    return cells * math.prod(int(k) + 1 for k in supply) if len(supply) <= 30 else 2**62


def _tables(need: np.ndarray, supply: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the tables with row sums `need`, for every possible column sums u at once.

    Returns arrays of shape (supply + 1): log sum of prod exp(k p) / k!, and the means of sum k p and of sum log k!, in
    natural logs; -inf and 0 where sum(u) is not sum(need). State of the pass: what each column has handed out so far.
    """
    shape = tuple(int(k) + 1 for k in supply)
    total = np.indices(shape).sum(0)
    # Weight of the tables begun, and its products with sum k p and with sum log k!.
    state = np.zeros((3, *shape))
    state[(0, *(0,) * len(shape))] = 1.0
    done, log_scale = 0, 0.0
    for c, quota in enumerate(need):
        done += int(quota)
        for j, most in enumerate(supply):
            fresh = state.copy()
            for k in range(1, min(int(quota), int(most)) + 1):
                at = (slice(None),) * (j + 1)  # the leading axis and the columns before j
                part = state[(*at, slice(None, -k))] * math.exp(k * p[c, j] - math.lgamma(k + 1))
                part[1] += k * p[c, j] * part[0]
                part[2] += math.lgamma(k + 1) * part[0]
                fresh[(*at, slice(k, None))] += part
            state = fresh
        state *= total == done
        scale = state[0].max()
        state, log_scale = state / scale, log_scale + math.log(scale)
    weight = state[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_p, mean_k = np.where(weight > 0, state[1:] / weight, 0.0)
        return np.log(weight) + log_scale, mean_p, mean_k


def _listed(need: np.ndarray, supply: np.ndarray) -> int:
    """How many ways there are to fill the rows that occur three times or more, column sums aside."""
    return math.prod(math.comb(int(k) + len(supply) - 1, int(k)) for k in need if k >= 3)


def _merged(need: np.ndarray, supply: np.ndarray, p: np.ndarray, *, limit: int) -> float | None:
    """Entropy in bits over the sets of non-zero cells; None beyond `limit` steps.

    The cells of a row that occurs once or twice tell its numbers, and with them what the other rows share. So: list the
    cells of the rows that occur three times or more together with what they leave, then add the entropy of the light rows.
    """
    heavy = need >= 3
    log_z, mean_p, mean_k = _tables(need[~heavy], supply, p[~heavy])
    states: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {(tuple(map(int, supply)), ()): 1.0}
    steps = 0
    for c in np.flatnonzero(heavy):
        fresh: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for (left, cells), weight in states.items():
            for row in _rows(int(need[c]), left):
                steps += 1
                if steps > limit:
                    return None
                mask = sum(1 << j for j, k in enumerate(row) if k)
                key = (tuple(a - b for a, b in zip(left, row, strict=True)), (*cells, mask))
                factor = math.exp(sum(k * p[c, j] - math.lgamma(k + 1) for j, k in enumerate(row) if k))
                fresh[key] = fresh.get(key, 0.0) + weight * factor
        states = fresh
    left = tuple(np.array([key[0] for key in states]).T)
    weight = np.array(list(states.values())) * np.exp(log_z[left])
    share = weight / weight.sum()
    rest = np.where(share > 0, log_z[left] - mean_p[left] + mean_k[left], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_share = np.where(share > 0, -share * np.log(share), 0.0)
    return max(0.0, float((of_share + share * rest).sum())) / math.log(2)


def _rows(quota: int, left: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to take `quota` from what is left of the columns."""
    if len(left) == 1:
        if quota <= left[0]:
            yield (quota,)
        return
    for k in range(max(0, quota - sum(left[1:])), min(quota, left[0]) + 1):
        for rest in _rows(quota - k, left[1:]):
            yield (k, *rest)
