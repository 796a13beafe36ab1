"""Patches of an image: what each one is called (labels) and which ones are kept (selection).

    label_patches    label maps of a scene -> identity and class of every patch
    patch_labels     one label map -> one label per patch, with its purity
    owned_patches    of overlapping windows, whose patch stands for an area
    select_patches   the patches of an image that are kept, from labels alone

The rules come from the `labels` and `selection` blocks of a protocol (`cfgs/protocol/*.yaml`), where the patches lie
from its `geometry` (`windows.py`, whose names are offered here as well). Published rules: arXiv 2510.24709 and its two
public programs of 2025 and 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from patches.geometry import Geometry
from patches.windows import cut

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
            class, where a data set has finer classes than it is asked for.
        labels: as for `patch_labels`; `class_from`: "class" (pixels are mapped to classes before the vote: clean,
            published 2026) or "raw_class" (the winner is mapped: published 2025). They differ where several raw classes
            without a class share a patch. Data sets without raw classes give the same either way.

    Raises:
        UserError: unknown rule.
    """
    if labels["class_from"] not in ("class", "raw_class"):
        raise UserError(f"unknown protocol.labels.class_from={labels['class_from']}; valid: class, raw_class")
    found = {}
    if "identity" in maps:
        found["identity"] = patch_labels(maps["identity"], geometry, labels=labels)
    if labels["class_from"] == "raw_class" and "raw_class" in maps:
        found["class"] = patch_labels(maps["raw_class"], geometry, labels=labels, class_map=maps["class_of_raw"])
    elif "class" in maps:
        found["class"] = patch_labels(maps["class"], geometry, labels=labels)
    return found


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
    found = VOTES[labels["vote"]](label_map, geometry, [int(i) for i in labels["ignore"]])
    if class_map is None:
        return found
    names = torch.as_tensor(class_map, dtype=torch.int32)
    low, high = int(found.label.min()), int(found.label.max())
    if low < 0 or high >= len(names):
        raise UserError(f"label {low if low < 0 else high} is outside the class map of {len(names)} entries; complete it")
    return found._replace(label=torch.where(found.valid, names[found.label.long()], 0))


def _vote_area(label_map: Tensor, geometry: Geometry, ignore: Sequence[int]) -> PatchLabels:
    """Majority by exact area in the original label map.

    A patch of the scaled image is a rectangle of the original one, whose edges cut through pixels. All lengths are
    counted in 1/H' (1/W') of an original pixel, where pixel and patch edges are both integers: areas and ties are exact.
    """
    ids, names = _compact(label_map.numpy())
    (height, width), (rows, columns), p = ids.shape, geometry.scaled, geometry.patch
    in_window = [p * np.arange(n) - pad for n, pad in zip(geometry.grid, (geometry.pad[2], geometry.pad[0]), strict=True)]
    tops, lefts = (
        np.unique(np.add.outer(np.unique(starts), steps))  # of all patches, scaled pixels
        for starts, steps in zip(zip(*geometry.starts, strict=True), in_window, strict=True)
    )
    winner, area = (np.zeros((len(tops), len(lefts)), dtype) for dtype in (np.int64, np.float64))
    whole, ignored = np.zeros_like(area), np.isin(names, ignore)
    for phase in np.unique(lefts % p):  # patches of equal phase do not overlap; in a cover there is only one phase
        at = np.flatnonzero(lefts % p == phase)
        pixel, patch, length = _segments(lefts[at] * width, p * width, width, columns)
        offset = patch * len(names)
        for i, top in enumerate(tops):
            edges = np.array([max(top, 0), min(top + p, rows)]) * height
            first, last = edges[0] // rows, -(-edges[1] // rows)
            steps = np.arange(first, last + 1) * rows
            weight = np.diff(np.clip(steps, *edges)).astype(float)  # of the rows of pixels; integers below 2^53
            count = np.bincount(
                (ids[first:last][:, pixel] + offset).ravel(),
                weights=np.outer(weight, length).ravel(),
                minlength=len(at) * len(names),
            ).reshape(len(at), len(names))
            whole[i, at] = count.sum(1)
            count[:, ignored] = 0
            winner[i, at] = count.argmax(1)  # the first of equals: ids ascend
            area[i, at] = count.max(1)
    label, share = np.where(area > 0, names[winner], 0), area / whole

    def windows(x: np.ndarray) -> Tensor:
        at = [
            np.ix_(np.searchsorted(tops, y + in_window[0]), np.searchsorted(lefts, left + in_window[1]))
            for y, left in geometry.starts
        ]
        return torch.from_numpy(np.stack([x[rectangle] for rectangle in at]))

    return PatchLabels(windows(label).int(), windows(share).float(), windows(area > 0))


def _compact(label_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids 0..K-1 [H, W] and the K labels they stand for, ascending; K counts gaps unless they are many."""
    low, high = int(label_map.min()), int(label_map.max())
    if high - low < DENSE_IDS:
        return label_map - label_map.dtype.type(low) if low else label_map, np.arange(low, high + 1)
    names, ids = np.unique(label_map, return_inverse=True)
    return ids.reshape(label_map.shape), names


def _segments(starts: np.ndarray, size: int, n: int, unit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut an axis of n pixels of `unit` at all pixel and patch edges: pixel, patch and length of every piece.

    starts: ascending starts of patches of length `size` that do not overlap. Pieces in no patch are left out.
    """
    edges = np.clip(np.concatenate([starts, starts + size]), 0, n * unit)
    cuts = np.unique(np.concatenate([np.arange(n + 1) * unit, edges]))
    left, length = cuts[:-1], np.diff(cuts)
    patch = np.searchsorted(starts, left, side="right") - 1
    inside = (patch >= 0) & (left < starts[patch] + size)
    return left[inside] // unit, patch[inside], length[inside]


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
