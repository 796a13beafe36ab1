"""An anchor patch: at a pixel, or the purest patch of the largest object."""

from collections.abc import Sequence

import torch
from torch import Tensor

from errors import UserError
from patches.geometry import Geometry
from patches.labels import PatchLabels
from patches.selection import owned_patches


def anchor_at(pixel: Sequence[int], geometry: Geometry, image_hw: Sequence[int]) -> tuple[int, int, int]:
    """The patch (window, row, column) that stands for a pixel [y, x] of the image.

    Raises:
        UserError: the pixel lies outside the image, or in a strip that no window sees.
    """
    if len(pixel) != 2 or not all(0 <= int(p) < n for p, n in zip(pixel, image_hw, strict=True)):
        raise UserError(f"vis.pixel={list(pixel)} lies outside the image, expected [y, x] within {list(image_hw)}")
    place = [(int(p) + 0.5) * s / n for p, s, n in zip(pixel, geometry.scaled, image_hw, strict=True)]
    owned, candidates = owned_patches(geometry), []
    for window, start in enumerate(geometry.starts):
        inside = [p - s for p, s in zip(place, start, strict=True)]
        if all(0 <= p < n for p, n in zip(inside, geometry.window, strict=True)):
            before = geometry.pad[2], geometry.pad[0]
            row, column = (int((p + b) // geometry.patch) for p, b in zip(inside, before, strict=True))
            off_centre = sum((p - n / 2) ** 2 for p, n in zip(inside, geometry.window, strict=True))
            candidates.append((not bool(owned[window, row, column]), off_centre, (window, row, column)))
    if not candidates:
        raise UserError(f"vis.pixel={list(pixel)} lies where this protocol has no window; choose another pixel")
    return min(candidates)[2]  # an owned patch first, then the one nearest to the middle of its window


def default_anchor(identity: Tensor, labels: PatchLabels, geometry: Geometry) -> tuple[int, int, int]:
    """The purest patch of the largest object, the most central one among equals.

    Args:
        identity: [H, W]; labels: identities of its patches.

    Raises:
        UserError: no patch of the image belongs to an object.
    """
    usable = labels.valid & owned_patches(geometry)
    ids, sizes = identity[identity > 0].unique(return_counts=True)
    for number in ids[sizes.argsort(descending=True, stable=True)].tolist():
        patches = (usable & (labels.label == number)).nonzero()  # [n, 3]
        if len(patches):
            starts = torch.tensor(geometry.starts)[patches[:, 0]]
            place = (starts + patches[:, 1:] * geometry.patch).double()
            purity = labels.purity[tuple(patches.T)].double()
            best = (purity * 1e6 - (place - place.mean(0)).norm(dim=1)).argmax()
            return tuple(patches[best].tolist())
    raise UserError("no patch of this image belongs to an object; choose another vis.image, or an anchor with vis.pixel=[y,x]")


def patch_box(anchor: Sequence[int], geometry: Geometry, image_hw: Sequence[int]) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) of a patch in pixels of the image, cut where padding begins."""
    window, *cell = anchor
    low, high = [], []
    for axis, before in ((0, geometry.pad[2]), (1, geometry.pad[0])):
        start, scale = geometry.starts[window][axis], image_hw[axis] / geometry.scaled[axis]
        first = cell[axis] * geometry.patch - before
        low.append((start + max(first, 0)) * scale)
        high.append((start + min(first + geometry.patch, geometry.window[axis])) * scale)
    return (*low, *high)
