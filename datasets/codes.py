"""Object code Y, feature code F and the exact entropies between them.

A scene holds objects; an object is a conjunction of one value from each of G feature groups. The object code
Y in {0,1}^K says which conjunctions are present (K = product of the group sizes; how often is not represented), the
feature code F in {0,1}^n which values occur at all (n = sum of the sizes). F is a function of Y, so
H(Y) = H(F) + H(Y|F), and H(Y|F), in bits, is what there is to know beyond the features: the denominator of the
binding ratio ("Formalizing the Binding Problem", arXiv 2606.03976).

H(Y|F) needs a law of Y. Every law here weighs an object code by its size alone, P(Y) ~ weight[|Y|], so H(Y|F=f) depends
only on how many values f names in each group; counts are exact (Python integers) and a table over those few numbers
serves any number of scenes. Laws are named, and the name travels with every result:

    uniform<=M         all object codes of at most M objects equally likely (the published law of four data sets)
    fixed_k            all object codes of exactly k objects
    balanced           exactly k objects given F, F uniform over a list (BalancedColorShape)
    independent_draws  k independent uniform objects, duplicates collapse (CLEVR's own generator)
    empirical          sizes as often as in the training split, codes of one size equally likely

(`vg_assignment` and `vg_merged` of Visual Genome are not of this kind and live with that data set.)
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError

SPLITS = ("train", "val", "test")
SPLIT_MODES = ("independent", "f_disjoint_hash", "f_ranked_three_way")


# ---------------------------------------------------------------------------------------------------------- groups


class Groups:
    """Ordered feature groups with ordered values, and the algebra of the two codes.

    Features are numbered group after group; conjunctions run row-major, the last group fastest.
    """

    def __init__(self, names: Sequence[Sequence[str]]) -> None:
        self.names = [list(group) for group in names]
        self.sizes = tuple(len(group) for group in self.names)
        for group in self.names:
            if not group or len(set(group)) != len(group):
                raise UserError(f"feature group: got {group}, expected at least one value and none twice")
        self.n_features = sum(self.sizes)
        self.n_objects = math.prod(self.sizes)

    @cached_property
    def values(self) -> np.ndarray:
        """Value of every conjunction in every group, [K, G] int."""
        return np.stack(np.unravel_index(np.arange(self.n_objects), self.sizes), 1)

    def feature_code(self, object_code: np.ndarray) -> np.ndarray:
        """F of Y: [..., K] to [..., n] uint8."""
        present = np.asarray(object_code, bool).reshape(*np.shape(object_code)[:-1], *self.sizes)
        axes = range(-len(self.sizes), 0)
        parts = [present.any(tuple(other for other in axes if other != axis)) for axis in axes]
        return np.concatenate(parts, -1).astype(np.uint8)

    def counts(self, feature_code: np.ndarray) -> np.ndarray:
        """Number of values present in each group, [..., n] to [..., G] int64."""
        bounds = np.cumsum(self.sizes)[:-1]
        return np.stack([part.sum(-1, dtype=np.int64) for part in np.split(np.asarray(feature_code), bounds, -1)], -1)

    def object_code(self, objects: Sequence[Sequence[int]]) -> np.ndarray:
        """Y of a list of objects given by their value in each group, [K] uint8; duplicates collapse."""
        code = np.zeros(self.n_objects, np.uint8)
        for values in objects:
            code[np.ravel_multi_index(tuple(values), self.sizes)] = 1
        return code

    def decode_objects(self, object_code: np.ndarray) -> list[tuple[str, ...]]:
        """Names of the conjunctions present in one Y, in index order."""
        return [
            tuple(group[value] for group, value in zip(self.names, self.values[k], strict=True))
            for k in np.flatnonzero(np.asarray(object_code))
        ]

    def decode_features(self, feature_code: np.ndarray) -> list[list[str]]:
        """Names of the values present in one F, group by group."""
        flat = [name for group in self.names for name in group]
        bounds = np.cumsum(self.sizes)[:-1]
        return [[flat[i] for i in part if feature_code[i]] for part in np.split(np.arange(self.n_features), bounds)]

    def candidates(self) -> np.ndarray:
        """All feature codes some object code can have, groups all empty or none, [n_F, n] uint8 in counting order."""
        if self.n_features > 20:
            raise UserError(f"feature codes: {self.n_features} features are too many to list all codes, expected <= 20")
        parts = [[bits for bits in itertools.product((0, 1), repeat=size) if any(bits)] for size in self.sizes]
        rows = [sum(row, ()) for row in itertools.product(*parts)]
        return np.array([(0,) * self.n_features, *rows], np.uint8)


# -------------------------------------------------------------------------------------------------------- counting


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


# ---------------------------------------------------------------------------------------------------------- priors


class Prior:
    """A law P(Y) ~ weight[|Y|] over the object codes of a grid; weights are exact (int or Fraction).

    name: as recorded with every result; `sizes` [G] group sizes; `weight` one number per size 0 .. K.
    """

    def __init__(self, name: str, sizes: Sequence[int], weight: Mapping[int, int | Fraction]) -> None:
        self.name, self.sizes = name, tuple(sizes)
        self.weight = {k: w for k, w in sorted(weight.items()) if w > 0}
        self._most = max(self.weight, default=0)
        self._entropy: dict[tuple[int, ...], float] = {}

    def number(self, a: Sequence[int]) -> int:
        """|Omega(F)|: object codes possible under the law whose F has a_g values in group g."""
        table = count_by_size(tuple(a), self._most)
        return sum(table[k] for k in self.weight if k < len(table))

    def mass(self, a: Sequence[int]) -> int | Fraction:
        """Unnormalised probability of one such F, exact."""
        table = count_by_size(tuple(a), self._most)
        return sum(table[k] * w for k, w in self.weight.items() if k < len(table))

    def entropy_of_counts(self, a: Sequence[int]) -> float:
        """H(Y | F = f) in bits for an f with a_g values in group g; 0 for an F the law excludes."""
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
        """Exact entropies of the law, or of the law restricted to the feature codes of a split.

        support: feature codes [n_F, n], or None for all. Returns H_Y, H_F and E_H_Y_given_F in bits, num_Y and num_F
        (integers), largest_F_mass, and acceptance: the probability of the support under the unrestricted law.
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
    """The law of the set of k independent, uniform objects: weight m! S(k, m), the surjections of k draws on m."""
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


# ---------------------------------------------------------------------------------------------------------- splits


def split_name(split: str) -> str:
    """The split in lower case without surrounding space."""
    name = str(split).strip().lower()
    if name not in SPLITS:
        raise UserError(f"dataset split: got {split!r}, expected one of {', '.join(SPLITS)}")
    return name


def bit_strings(codes: np.ndarray) -> list[str]:
    """Feature codes [M, n] as strings of 0 and 1, first group first."""
    return [row.tobytes().decode() for row in np.asarray(codes, np.uint8) + np.uint8(ord("0"))]


def digest(salt: str, bits: str) -> str:
    """Lower-case hexadecimal SHA-1 of "salt|bits": the published key of a feature code."""
    return hashlib.sha1(f"{salt}|{bits}".encode()).hexdigest()


def parse_buckets(buckets: int | str | Sequence[int] | None, knob: str) -> list[int]:
    """Hash buckets from a list or a comma-separated string, sorted and each once."""
    parts = buckets.split(",") if isinstance(buckets, str) else [buckets] if isinstance(buckets, int) else buckets or []
    try:
        return sorted({int(part) for part in parts if str(part).strip()})
    except (TypeError, ValueError):
        raise UserError(f"dataset.{knob}: got {buckets!r}, expected whole numbers such as [0,1] or '0,1'") from None


def split_codes(
    candidates: np.ndarray,
    split: str,
    *,
    mode: str = "independent",
    salt: str = "",
    exclude_all_ones: bool = False,
    hash_mod: int = 10,
    test_buckets: int | str | Sequence[int] = (0,),
    val_buckets: int | str | Sequence[int] | None = None,
    train_count: int | None = None,
    val_count: int | None = None,
    test_count: int | None = None,
) -> np.ndarray:
    """The feature codes of one split, byte for byte by the published rules: [n, F] to [m, F] uint8.

    independent: all of them. f_disjoint_hash: by int(SHA-1, 16) mod `hash_mod`; without `val_buckets` validation has
    the codes of training. f_ranked_three_way: in the order of (SHA-1, bits), the first `train_count`, the next
    `val_count`, the rest; a missing val or test count is a sixth of all, a missing train count what remains. Order of
    the result: as ranked, otherwise as given.

    Raises:
        UserError: unknown mode; buckets out of range, empty or shared by test and val (published code lets these
            overlap, so that test codes are validated on); counts that are negative or do not sum to the total.
    """
    split = split_name(split)
    candidates = np.asarray(candidates, np.uint8)
    if exclude_all_ones:
        candidates = candidates[~candidates.all(1)]
    if mode not in SPLIT_MODES:
        raise UserError(f"dataset.split_mode: got {mode!r}, expected one of {', '.join(SPLIT_MODES)}")
    if mode == "independent":
        return candidates
    keys = bit_strings(candidates)
    if mode == "f_disjoint_hash":
        test = parse_buckets(test_buckets, "f_split_test_buckets")
        val = parse_buckets(val_buckets, "f_split_val_buckets")
        if int(hash_mod) < 2:
            raise UserError(f"dataset.f_split_hash_mod: got {hash_mod}, expected at least 2")
        if not test:
            raise UserError("dataset.f_split_test_buckets: got none, expected at least one bucket")
        for bucket in (*test, *val):
            if not 0 <= bucket < hash_mod:
                raise UserError(f"dataset.f_split_*_buckets: got bucket {bucket}, expected 0 to {hash_mod - 1}")
        if shared := sorted(set(test) & set(val)):
            raise UserError(
                f"dataset.f_split_val_buckets: {shared} are also in f_split_test_buckets, give each bucket to one split"
            )
        bucket = np.array([int(digest(salt, key), 16) % int(hash_mod) for key in keys])
        if split == "test":
            return candidates[np.isin(bucket, test)]
        if split == "val" and val:
            return candidates[np.isin(bucket, val)]
        return candidates[~np.isin(bucket, [*test, *val])]
    order = sorted(range(len(keys)), key=lambda i: (digest(salt, keys[i]), keys[i]))
    total = len(order)
    val_count = total // 6 if val_count is None else int(val_count)
    test_count = total // 6 if test_count is None else int(test_count)
    train_count = total - val_count - test_count if train_count is None else int(train_count)
    if min(train_count, val_count, test_count) < 0 or train_count + val_count + test_count != total:
        raise UserError(
            f"dataset.f_split_train_count, f_split_val_count, f_split_test_count: got {train_count} + {val_count} + "
            f"{test_count} = {train_count + val_count + test_count}, expected counts of at least 0 that sum to the "
            f"{total} feature codes"
        )
    start = {"train": 0, "val": train_count, "test": train_count + val_count}[split]
    return candidates[order[start : start + {"train": train_count, "val": val_count, "test": test_count}[split]]]


def pack(codes: np.ndarray) -> np.ndarray:
    """Rows of 0 and 1 as one comparable value each, [M, n] to [M] (bytes)."""
    packed = np.ascontiguousarray(np.packbits(np.asarray(codes, np.uint8), axis=1))
    return packed.view(np.dtype((np.void, packed.shape[1]))).reshape(-1)


def split_report(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a reader must know before comparing the scores of splits.

    splits: per split the labels of its samples: "object_code" [M, K], "feature_code" [M, n], "H_Y_given_F" [M] or
    [M, 1] in bits. Returns, JSON-able: "splits" with n, distinct_F, distinct_Y, largest_F_mass (share of the samples
    with the most frequent feature code), E_H_Y_given_F and the plug-in H_F (at most log2 n, so low where codes are
    rare) in bits; "overlap" per pair of splits with the share of the second split's samples whose F, and whose Y, occur
    in the first; "warnings", a list of sentences.
    """
    facts, packed = {}, {}
    for name, labels in splits.items():
        codes = {key: pack(np.asarray(labels[key])) for key in ("object_code", "feature_code")}
        packed[name] = codes
        n = len(codes["feature_code"])
        if not n:
            raise UserError(f"split {name}: no samples, expected at least one")
        _, times = np.unique(codes["feature_code"], return_counts=True)
        share = times / n
        facts[name] = {
            "n": n,
            "distinct_F": len(times),
            "distinct_Y": len(np.unique(codes["object_code"])),
            "largest_F_mass": float(share.max()),
            "E_H_Y_given_F": float(np.asarray(labels["H_Y_given_F"], np.float64).mean()),
            "H_F": float(-(share * np.log2(share)).sum() + 0.0),
        }
    overlap = {
        f"{second} in {first}": {
            "F": float(np.isin(packed[second]["feature_code"], packed[first]["feature_code"]).mean()),
            "Y": float(np.isin(packed[second]["object_code"], packed[first]["object_code"]).mean()),
        }
        for first, second in itertools.combinations(facts, 2)
    }
    return {"splits": facts, "overlap": overlap, "warnings": _comparability(facts, overlap)}


def _comparability(facts: Mapping[str, Mapping], overlap: Mapping[str, Mapping]) -> list[str]:
    """Sentences on what makes splits incomparable; thresholds are our choice: 2 % of H, half of the mass."""
    found = []
    for first, second in itertools.combinations(facts, 2):
        one, two = facts[first]["E_H_Y_given_F"], facts[second]["E_H_Y_given_F"]
        if abs(one - two) > 0.02 * max(one, two):
            found.append(
                f"{first} and {second}: mean H(Y|F) differs ({one:.2f} and {two:.2f} bits), "
                "their binding ratios are not comparable"
            )
    for name, fact in facts.items():
        if fact["largest_F_mass"] > 0.5 and fact["distinct_F"] > 1:
            found.append(f"{name}: one feature code holds {fact['largest_F_mass']:.0%} of the samples")
    shares = {pair: values["F"] for pair, values in overlap.items() if pair.endswith(" in train")}
    if len(shares) > 1 and max(shares.values()) - min(shares.values()) > 0.5:
        text = ", ".join(f"{pair} {share:.0%}" for pair, share in shares.items())
        found.append(f"feature codes seen in training: {text}; the one tests recall, the other generalisation")
    return found


# -------------------------------------------------------------------------------------------------------- sampling

_STEP, _MIX = np.uint64(0x9E3779B97F4A7C15), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def stream(*parts: object) -> int:
    """A 64-bit number from any parts (seed, split, purpose ...): unrelated for any two lists of parts."""
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "little")


def random_words(key: int, index: np.ndarray | Sequence[int], start: int, n: int) -> np.ndarray:
    """Random 64-bit words `start` .. `start + n` of the streams of many images, [M, n] uint64.

    Counter-based (splitmix64, Steele et al. 2014): word j of image i is a function of (key, i, j) alone, so images are
    sampled in any order, any number at once, with the same result.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(key) + _STEP * (np.asarray(index, np.uint64) + np.uint64(1)))
        return _mix(state[:, None] + _STEP * np.arange(start + 1, start + n + 1, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def unit(words: np.ndarray) -> np.ndarray:
    """Words as float64 in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def size_weights(cells: int, most: int) -> list[int]:
    """C(cells, m) for m = 0 .. most: how often each size occurs when all codes of at most `most` are equally likely."""
    return [math.comb(cells, m) for m in range(min(most, cells) + 1)]


def smallest(words: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Uniform subset of given size per row: mark the `size` smallest of its words, [M, K] and [M] to bool [M, K]."""
    ranked = np.sort(words, axis=1)
    limit = np.take_along_axis(ranked, np.maximum(size - 1, 0)[:, None], 1)
    return (words <= limit) & (size > 0)[:, None]


Draw = Callable[[np.ndarray, int], np.ndarray]


def sample_until(n: int, draw: Draw, admits: Callable[[np.ndarray], np.ndarray], most: int, why: str) -> tuple[np.ndarray, int]:
    """Draw for n images and redraw the refused ones until all are admitted.

    draw(indices [m], round) gives codes [m, K]; admits(codes) bool [m]; `most` bounds the draws of all images together.
    Returns codes [n, K] uint8 and the number of draws.

    Raises:
        UserError: the bound is reached; `why` says what to change.
    """
    codes, pending, drawn = None, np.arange(n), 0
    for attempt in itertools.count():
        if drawn + len(pending) > most:
            raise UserError(f"sampling: {n - len(pending)} of {n} scenes found in {drawn} draws, giving up at {most}; {why}")
        drawn += len(pending)
        fresh = draw(pending, attempt)
        codes = np.zeros((n, fresh.shape[1]), np.uint8) if codes is None else codes
        fine = admits(fresh)
        codes[pending[fine]] = fresh[fine]
        pending = pending[~fine]
        if not len(pending):
            return codes, drawn
    raise AssertionError("unreachable")


def draw_uniform(key: int, cells: int, most: int) -> Draw:
    """The `draw` of `sample_until` for the law uniform<=most: a size, then a uniform subset."""
    weights = size_weights(cells, most)
    total = sum(weights)
    edges = np.array([cumulated / total for cumulated in itertools.accumulate(weights)])

    def draw(indices: np.ndarray, attempt: int) -> np.ndarray:
        words = random_words(key, indices, attempt * (cells + 1), cells + 1)
        size = np.searchsorted(edges, unit(words[:, 0]), side="right")
        return smallest(words[:, 1:], size).astype(np.uint8)

    return draw


def draw_published(generator: torch.Generator, cells: int, most: int) -> np.ndarray:
    """One object code [K] in the order of random calls of the published program: a size, then a permutation."""
    weights = torch.tensor(size_weights(cells, most), dtype=torch.float64)
    size = int(torch.multinomial(weights, 1, generator=generator))
    code = np.zeros(cells, np.uint8)
    code[torch.randperm(cells, generator=generator)[:size].numpy()] = 1
    return code


# ------------------------------------------------------------------------------------------------- data set base


class CodeScenes:
    """What every data set of codes shares: labels, constants and facts. Subclasses load or draw the codes and images.

    Attributes set by `set_codes`: groups; object_code [M, K] and feature_code [M, n] uint8; entropy [M] float32 bits.
    """

    split: str
    on_error: str
    groups: Groups
    prior_name: str

    def set_codes(self, groups: Groups, object_code: np.ndarray, prior_name: str, entropy: np.ndarray | Prior) -> None:
        """Store the codes of the split; `entropy` is H(Y|F) in bits per scene, or the law to compute it from."""
        self.groups, self.prior_name = groups, prior_name
        self.object_code = np.asarray(object_code, np.uint8)
        self.feature_code = groups.feature_code(self.object_code)
        if isinstance(entropy, Prior):
            entropy = entropy.entropy(groups.counts(self.feature_code))
        self.entropy = np.asarray(entropy, np.float32)
        self.classes = groups.names  # names of the values, a list per group

    def __len__(self) -> int:
        return len(self.object_code)

    def position(self, index: int) -> int:
        """The index, counted from the end if negative."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return index % len(self)

    def labels(self, index: int) -> dict[str, Tensor]:
        """The labels of one scene: "object_code" [K] and "feature_code" [n] uint8, "H_Y_given_F" [1] float32 bits."""
        return {
            "object_code": torch.from_numpy(self.object_code[index].copy()),
            "feature_code": torch.from_numpy(self.feature_code[index].copy()),
            "H_Y_given_F": torch.from_numpy(self.entropy[index : index + 1].copy()),
        }

    def details(self, index: int) -> dict[str, Any]:
        """JSON-able extras of one scene for an export."""
        return {"num_objects": int(self.object_code[index].sum())}

    def info(self) -> dict[str, float]:
        """Constants in bits: "H_Y_given_F", the mean over the scenes of the split."""
        return {"H_Y_given_F": float(self.entropy.mean(dtype=np.float32))}

    def report(self) -> dict[str, Any]:
        """Facts on the split: its row of `split_report`, the law of Y, group sizes."""
        labels = {"object_code": self.object_code, "feature_code": self.feature_code, "H_Y_given_F": self.entropy}
        facts = split_report({self.split: labels})["splits"][self.split]
        return {"prior": self.prior_name, "group_sizes": list(self.groups.sizes), **facts}


def data_folder(value: str | os.PathLike | None, variables: Sequence[str], default: str) -> Path:
    """Where files lie: the knob, else the first of the environment variables that is set, else `default`.

    A default is taken below BINDING_PROJECT_ROOT, else below the working directory.
    """
    given = value or next((os.environ[name] for name in variables if os.environ.get(name)), None)
    return Path(given) if given else Path(os.environ.get("BINDING_PROJECT_ROOT") or ".") / default


def check_whole(knob: str, value: object, least: int, most: int | None = None) -> int:
    """The value as a whole number of the range."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    if not whole or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"dataset.{knob}: got {value!r}, expected a whole number {span}")
    return int(value)
