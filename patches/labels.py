"""The labels of patches, by a vote of their pixels.

    label_patches    label maps of a scene -> identity and class of every patch
    patch_labels     one label map -> one label per patch, with its purity and whether it is valid

The rules come from the section `labels` of a protocol (`cfgs/protocol/*.yaml`), the places of the patches from its
`geometry`. Published rules: arXiv 2510.24709 and its two public programs of 2025 and 2026.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from patches.geometry import Geometry
from patches.windows import cut

COUNTED = 2**16  # pixels, and counts, at a time: they stay in a processor's cache (measured)
DENSE_IDS = 4096  # label maps whose ids span at most this many values are counted without renaming the ids


class PatchLabels(NamedTuple):
    """One label per patch.

    label: [n_windows, h, w] int32, 0 where not valid.
    purity: [n_windows, h, w] float32, share of the patch that carries its label; ignored pixels do not.
    valid: [n_windows, h, w] bool, whether anything in the patch was not ignored.
    """

    label: Tensor
    purity: Tensor
    valid: Tensor


def label_patches(maps: Mapping[str, Tensor], geometry: Geometry, *, labels: Mapping[str, Any]) -> dict[str, PatchLabels]:
    """Identity and class of every patch of a scene, as far as it has label maps for them.

    Args:
        maps: integer "identity" and "class" [H, W]; "raw_class" [H, W] with "class_of_raw" [n], the class of every raw
            class, where a data set has finer classes than its own list.
        labels: as for `patch_labels`; `class_from`: "class" (pixels are mapped to classes before the vote: clean,
            published 2026) or "raw_class" (the winner is mapped: published 2025). They differ where several raw classes
            without a class share a patch. Data sets without raw classes give the same either way.

    Raises:
        UserError: unknown rule.
    """
    if labels["class_from"] not in ("class", "raw_class"):
        raise UserError(f"unknown protocol.labels.class_from={labels['class_from']}; valid: class, raw_class")
    of_maps = {}
    if "identity" in maps:
        of_maps["identity"] = patch_labels(maps["identity"], geometry, labels=labels)
    if labels["class_from"] == "raw_class" and "raw_class" in maps:
        of_maps["class"] = patch_labels(maps["raw_class"], geometry, labels=labels, class_map=maps["class_of_raw"])
    elif "class" in maps:
        of_maps["class"] = patch_labels(maps["class"], geometry, labels=labels)
    return of_maps


def patch_labels(
    label_map: Tensor, geometry: Geometry, *, labels: Mapping[str, Any], class_map: Sequence[int] | Tensor | None = None
) -> PatchLabels:
    """The label of every patch: the most frequent one of its pixels, the smallest of equally frequent ones.

    Args:
        label_map: integer [H, W] at the size of the image.
        labels: `vote`: "area" (exact areas in the original map), "bilinear_round" (ids scaled as if they were grey
            values, with antialias, then rounded; published 2025, invents ids at borders) or "nearest" (published 2026);
            `ignore`: ids that take no part in the vote.
        class_map: [n] integers; renames the winners after the vote (published 2025: raw class -> 0..150).

    Raises:
        UserError: unknown rule, or a winner that `class_map` does not know.
    """
    if labels["vote"] not in VOTES:
        raise UserError(f"unknown protocol.labels.vote={labels['vote']}; valid: {', '.join(VOTES)}")
    winner = VOTES[labels["vote"]](label_map, geometry, [int(i) for i in labels["ignore"]])
    if class_map is None:
        return winner
    names = torch.as_tensor(class_map, dtype=torch.int32)
    low, high = int(winner.label.min()), int(winner.label.max())
    if low < 0 or high >= len(names):
        raise UserError(f"label {low if low < 0 else high} is outside the class map of {len(names)} entries; complete it")
    return winner._replace(label=torch.where(winner.valid, names[winner.label.long()], 0))


def _vote_area(label_map: Tensor, geometry: Geometry, ignore: Sequence[int]) -> PatchLabels:
    """Majority by exact area in the original label map.

    A patch of the scaled image is a rectangle of the original one, whose edges cut through pixels. Heights are counted in
    1/H' of a pixel and widths in 1/W', where pixels and patches both have integer edges: areas and ties are exact.
    """
    ids, names = _compact(label_map.numpy())  # [H, W], [K]
    (height, width), (scaled_height, scaled_width), side = ids.shape, geometry.scaled, geometry.patch
    tops, lefts = _edges(geometry)
    winner = np.zeros((len(tops), len(lefts)), np.int64)
    votes, area = np.zeros(winner.shape), np.zeros(winner.shape)
    is_ignored = np.isin(names, ignore)  # [K]
    row_size = max(width * -(-side * height // scaled_height), len(lefts) * len(names))  # of pixels, of counts
    bands = _bands(tops, side, max(1, COUNTED // row_size))
    for rows, columns in itertools.product(bands, _bands(lefts, side)):  # patches of a band do not overlap
        down = _cut_axis(tuple(tops[rows] * height), side * height, height, scaled_height)
        across = _cut_axis(tuple(lefts[columns] * width), side * width, width, scaled_width)
        pixels = ids[down.pixel[:, None], across.pixel].astype(np.int64)
        pixels += (down.patch[:, None] * len(columns) + across.patch) * len(names)  # one range of ids per patch
        shape = len(rows), len(columns), len(names)
        lengths = np.outer(down.length, across.length).ravel()  # integers below 2^53
        count = np.bincount(pixels.ravel(), weights=lengths, minlength=math.prod(shape)).reshape(shape)
        at = np.ix_(rows, columns)
        area[at] = count.sum(2)
        count[:, :, is_ignored] = 0
        winner[at] = count.argmax(2)  # the first of equals: names ascend
        votes[at] = count.max(2)
    label = np.where(votes > 0, names[winner], 0)
    at = _lattice_index(tops, lefts, geometry)  # [n_windows, h, 1], [n_windows, 1, w]
    label, purity, valid = (torch.from_numpy(x[at]) for x in (label, votes / area, votes > 0))  # [n_windows, h, w]
    return PatchLabels(label.int(), purity.float(), valid)


def _compact(label_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids 0..K-1 [H, W] and the K labels they stand for, ascending; K counts gaps unless they are many."""
    low, high = int(label_map.min()), int(label_map.max())
    if high - low < DENSE_IDS:
        return label_map - label_map.dtype.type(low) if low else label_map, np.arange(low, high + 1)
    names, ids = np.unique(label_map, return_inverse=True)
    return ids.reshape(label_map.shape), names


def _offsets(geometry: Geometry) -> list[np.ndarray]:
    """Top edges [h] and left edges [w] of the patches of a window, in scaled pixels from its start."""
    before = geometry.pad[2], geometry.pad[0]
    return [geometry.patch * np.arange(n) - pad for n, pad in zip(geometry.grid, before, strict=True)]


def _edges(geometry: Geometry) -> list[np.ndarray]:
    """All different top edges and all different left edges of patches, ascending, in scaled pixels.

    The windows stand on a lattice of rows and columns, so every pair of a top and a left edge is a patch of some window.
    """
    starts = zip(*geometry.starts, strict=True)
    return [np.unique(np.add.outer(of_axis, offsets)) for of_axis, offsets in zip(starts, _offsets(geometry), strict=True)]


def _bands(starts: np.ndarray, side: int, most: int | None = None) -> list[np.ndarray]:
    """Which of the ascending starts of patches of a side are counted together: those of equal phase, at most so many."""
    bands = [np.flatnonzero(starts % side == phase) for phase in np.unique(starts % side)]
    return bands if most is None else [part for band in bands for part in np.split(band, range(most, len(band), most))]


def _lattice_index(tops: np.ndarray, lefts: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Indices that read an array [tops, lefts] as [n_windows, h, w]: those of its rows [n_windows, h, 1], its columns."""
    ys, xs = np.array(geometry.starts).T
    rows, columns = _offsets(geometry)
    rows, columns = np.searchsorted(tops, np.add.outer(ys, rows)), np.searchsorted(lefts, np.add.outer(xs, columns))
    return rows[:, :, None], columns[:, None, :]


class _Pieces(NamedTuple):
    """Pieces of an axis, cut at every edge of a pixel or a patch: the pixel [n] and patch [n] each lies in, its length [n]."""

    pixel: np.ndarray
    patch: np.ndarray
    length: np.ndarray


@functools.lru_cache(maxsize=256)
def _cut_axis(starts: tuple[int, ...], size: int, n_pixels: int, unit: int) -> _Pieces:
    """Cut an axis of `n_pixels` pixels of length `unit`; pieces in no patch are left out. Images of one size share it.

    Args:
        starts: ascending starts of patches of length `size` that do not overlap.
    """
    begins = np.array(starts)
    edges = np.clip(np.concatenate([begins, begins + size]), 0, n_pixels * unit)
    first, last = edges[0] // unit, -(-edges[-1] // unit)  # pixels that any patch can touch
    cuts = np.unique(np.concatenate([np.arange(first, last + 1) * unit, edges]))
    left, length = cuts[:-1], np.diff(cuts)
    patch = np.searchsorted(begins, left, side="right") - 1
    inside = (patch >= 0) & (left < begins[patch] + size)
    return _Pieces(left[inside] // unit, patch[inside], length[inside])


def _vote_bilinear_round(label_map: Tensor, geometry: Geometry, ignore: Sequence[int]) -> PatchLabels:
    """Majority of ids that were scaled like grey values (float32, antialias) and rounded."""
    grey = label_map[None, None].float()
    grey = F.interpolate(grey, size=geometry.scaled, mode="bilinear", antialias=True, align_corners=False)
    return _vote_pixels(grey[0, 0].round().long(), geometry, ignore)


def _vote_nearest(label_map: Tensor, geometry: Geometry, ignore: Sequence[int]) -> PatchLabels:
    """Majority of ids scaled by the pixel at floor(i · H / H'), in float32 as the library does it."""
    at = [
        F.interpolate(torch.arange(n).float()[None, None], size=m, mode="nearest")[0, 0].long()
        for n, m in zip(label_map.shape, geometry.scaled, strict=True)
    ]
    return _vote_pixels(label_map.long()[at[0]][:, at[1]], geometry, ignore)


def _vote_pixels(scaled: Tensor, geometry: Geometry, ignore: Sequence[int]) -> PatchLabels:
    """Majority of the pixels of a scaled label map [H', W'] int64; the padding counts as background, as published."""
    (h, w), p = geometry.grid, geometry.patch
    blocks = F.pad(cut(scaled, geometry.starts, geometry.window), geometry.pad)  # [n_windows, h p, w p]
    blocks = blocks.unflatten(2, (w, p)).unflatten(1, (h, p)).transpose(2, 3).flatten(-2)  # [n_windows, h, w, p p]
    values = blocks.sort(-1).values
    index = torch.arange(p * p)
    new = F.pad(values[..., 1:] != values[..., :-1], (1, 0), value=True)
    length = index - torch.where(new, index, 0).cummax(-1).values + 1  # of the run of equal values so far
    for ignored in ignore:
        length[values == ignored] = 0
    count, at = length.max(-1, keepdim=True).values, length.argmax(-1, keepdim=True)  # the first: the smallest value
    valid = count[..., 0] > 0
    label = torch.where(valid, values.gather(-1, at)[..., 0], 0)
    return PatchLabels(label.int(), count[..., 0] / (p * p), valid)


VOTES: dict[str, Callable[[Tensor, Geometry, Sequence[int]], PatchLabels]] = {
    "area": _vote_area,
    "bilinear_round": _vote_bilinear_round,
    "nearest": _vote_nearest,
}
