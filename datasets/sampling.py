"""Random numbers that depend on (seed, split, image) alone, and the draws of object codes made from them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from errors import UserError

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
    """The `draw` of `sample_until` for the prior uniform<=most: a size, then a uniform subset."""
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
