"""Which patches of an image are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from patches.geometry import Geometry, call_kind
from patches.labels import PatchLabels

PRIMARY = ("identity", "class")  # labels that patches can be selected by, the preferred one first


def primary_label(names: Collection[str], by: str | None) -> str:
    """The label that patches are selected by: `by` (`protocol.selection.by`), or the first of PRIMARY that the data have.

    Args:
        names: labels of the data, at least one of PRIMARY.

    Raises:
        UserError: `by` is no label patches are selected by, or the data lack it.
    """
    if by is None:
        return next(name for name in PRIMARY if name in names)
    if by not in PRIMARY:
        raise UserError(f"unknown protocol.selection.by={by}; valid: {', '.join(PRIMARY)}, null (the first the data have)")
    if by not in names:
        raise UserError(
            f"protocol.selection.by={by} and the images have no {by} maps, only {', '.join(sorted(names))}; set "
            "protocol.selection.by=null"
        )
    return by


def owned_patches(geometry: Geometry) -> Tensor:
    """Which patches stand for their area, bool [n_windows, h, w]: those of the window whose centre is nearest.

    Nearest along each axis by itself, the first of equally near ones. Windows of a cover share one lattice, so their
    owned patches tile the image; elsewhere two neighbours may overlap or part by less than a patch.
    """
    starts = list(zip(*geometry.starts, strict=True))  # ys, xs
    owned = []
    for axis, before in ((0, geometry.pad[2]), (1, geometry.pad[0])):
        places, window = sorted(set(starts[axis])), geometry.window[axis]
        centres = torch.tensor(places) * 2 + window  # doubled, to stay integers
        patch = (torch.arange(geometry.grid[axis]) * geometry.patch - before) * 2 + geometry.patch
        patch = torch.tensor(places)[:, None] * 2 + patch  # [n_places, grid]
        nearest = (patch[..., None] - centres).abs().argmin(-1)
        mine = nearest == torch.arange(len(places))[:, None]
        owned.append(mine[[places.index(start) for start in starts[axis]]])  # [n_windows, grid]
    both = owned[0][:, :, None] & owned[1][:, None, :]
    twins = [start in geometry.starts[:i] for i, start in enumerate(geometry.starts)]  # a square image in two windows
    both[torch.tensor(twins)] = False
    return both


def select_patches(
    labels: PatchLabels, geometry: Geometry, *, selection: Mapping[str, Any], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The kept patches of an image, drawn from its labels alone.

    Args:
        labels: primary labels of its patches (`primary_label`).
        selection: `patches`, how many (T), or "all" owned ones in raster order; `kind`, a name of SELECTIONS, and its
            options; `by`, `per_visit` and `seed` are for the callers.
        generator: on the CPU; the same state gives the same patches.

    Returns:
        position int64 [T, 3] (window, row, column); drawn bool [T], false where there was nothing left to draw (the
        position then repeats another one). Whether a drawn patch is valid depends on the label (`PatchLabels.valid`).

    Raises:
        UserError: unknown kind or option, or a value out of range.
    """
    n_kept = selection["patches"]
    if n_kept == "all":
        position = owned_patches(geometry).nonzero()
        return position, torch.ones(len(position), dtype=torch.bool)
    if not isinstance(n_kept, int) or isinstance(n_kept, bool) or n_kept < 1:
        raise UserError(f"protocol.selection.patches={n_kept} is no number of patches, expected 1 or more, or all")
    options = {name: value for name, value in selection.items() if name not in ("by", "patches", "per_visit", "seed")}
    flat, drawn = call_kind(SELECTIONS, "protocol.selection", options, labels, geometry, n_kept, generator)
    return torch.stack(torch.unravel_index(flat, labels.label.shape), dim=1), drawn


def _unique(
    labels: PatchLabels,
    geometry: Geometry,
    n_kept: int,
    generator: torch.Generator,
    *,
    background_share: float = 1.0,
    min_purity: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Owned, valid patches without repetition.

    Args:
        background_share: most of the T patches that may carry label 0, unless the objects do not fill the rest.
        min_purity: patches of lower purity are not taken.
    """
    for name, value in (("background_share", background_share), ("min_purity", min_purity)):
        if not 0 <= value <= 1:
            raise UserError(f"protocol.selection.{name}={value} is no share, expected a number from 0 to 1; set one")
    usable = owned_patches(geometry) & labels.valid & (labels.purity >= min_purity)
    usable = usable.flatten().nonzero()[:, 0]
    if not len(usable):
        return torch.zeros(n_kept, dtype=torch.long), torch.zeros(n_kept, dtype=torch.bool)
    usable = usable[torch.randperm(len(usable), generator=generator)]
    background = labels.label.flatten()[usable] == 0
    surplus = background & (background.cumsum(0) > int(background_share * n_kept))
    usable = torch.cat([usable[~surplus], usable[surplus]])  # what exceeds the share is taken last
    turn = torch.arange(n_kept)
    return usable[turn % len(usable)], turn < len(usable)


def _replacement_per_window(
    labels: PatchLabels, geometry: Geometry, n_kept: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An equal part from each window with replacement, one draw per window, as published in 2025."""
    drawn = []
    n_windows, n_patches = len(geometry.starts), geometry.grid[0] * geometry.grid[1]
    for number, part in enumerate(_parts(n_kept, n_windows)):
        drawn.append(torch.randint(0, n_patches, (part,), generator=generator) + number * n_patches)
    return torch.cat(drawn), torch.ones(n_kept, dtype=torch.bool)


def _without_replacement_per_crop(
    labels: PatchLabels, geometry: Geometry, n_kept: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An equal part from each crop without replacement, with it where a crop has too few, as published in 2026."""
    drawn = []
    n_windows, n_patches = len(geometry.starts), geometry.grid[0] * geometry.grid[1]
    for number, part in enumerate(_parts(n_kept, n_windows)):
        if part <= n_patches:
            index = torch.randperm(n_patches, generator=generator)[:part]
        else:
            index = torch.randint(0, n_patches, (part,), generator=generator)
        drawn.append(index + number * n_patches)
    return torch.cat(drawn), torch.ones(n_kept, dtype=torch.bool)


def _parts(n: int, count: int) -> list[int]:
    """Split n into `count` equal parts; the last takes the remainder."""
    return [n // count] * (count - 1) + [n - n // count * (count - 1)]


SELECTIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "unique": _unique,
    "replacement_per_window": _replacement_per_window,
    "without_replacement_per_crop": _without_replacement_per_crop,
}
