"""Pixels of windows, ready for the backbone, and one map of the image from one value per patch and window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from patches.geometry import Geometry


def cut_windows(
    image: Tensor,
    geometry: Geometry,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    antialias: bool,
) -> Tensor:
    """Windows of an image as the backbone takes them: scaled, normalised, cut, then padded with zeros (the mean colour).

    Scaling works in 8 bits, as the image libraries do with which backbones are trained.

    Args:
        image: [3, H, W] uint8.
        mean, std: of the three channels, for values in 0..1.
        interpolation: "bilinear" or "bicubic", taken where the protocol names none.
        antialias: whether shrinking averages over all pixels it covers.

    Returns:
        float32 [n_windows, 3, h * patch, w * patch].

    Raises:
        UserError: unknown interpolation.
    """
    pixels = scaled_image(image, geometry, interpolation=interpolation, antialias=antialias)
    low, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    pixels = (pixels.float() / 255 - low) / scale  # [3, H', W']
    return F.pad(cut(pixels, geometry.image_starts or geometry.starts, geometry.window), geometry.pad)


def scaled_image(image: Tensor, geometry: Geometry, *, interpolation: str, antialias: bool) -> Tensor:
    """The pixels [3, H', W'] uint8 windows are cut from; arguments as for `cut_windows`."""
    mode = geometry.interpolation or interpolation
    if mode not in ("bilinear", "bicubic"):
        raise UserError(f"unknown interpolation '{mode}'; valid: bilinear, bicubic; set protocol.geometry.interpolation")
    scaled = geometry.image_scaled or geometry.scaled
    if tuple(image.shape[-2:]) == scaled:
        return image
    return F.interpolate(image[None], size=scaled, mode=mode, antialias=antialias, align_corners=False)[0]


def cut(x: Tensor, starts: Sequence[tuple[int, int]], window: tuple[int, int]) -> Tensor:
    """Windows [n_windows, ..., height, width] of x [..., H', W']."""
    return torch.stack([x[..., y : y + window[0], left : left + window[1]] for y, left in starts])


def merge_scores(maps: Tensor, valid: Tensor, geometry: Geometry, image_hw: Sequence[int]) -> Tensor:
    """One map of the image from one value per patch and window.

    Each window is scaled up bilinearly, freed of its padding and put in its place; overlaps are averaged, and the result
    is scaled to the image (bilinear, antialias). The caller states which windows count; a window of zeros does. Areas that
    no valid window sees are 0; the few pixels beyond the last of uniform crops repeat its edge.

    Args:
        maps: float [n_windows, h, w]; valid: bool [n_windows].
        image_hw: (H, W) of the image.

    Returns:
        float32 [H, W].
    """
    height, width = geometry.window
    fine = _pixels_of(maps, geometry, smooth=True)
    seen = [max(places) + n for places, n in zip(zip(*geometry.starts, strict=True), geometry.window, strict=True)]
    total, count = torch.zeros(2, *seen)
    for number in valid.nonzero()[:, 0].tolist():
        y, x = geometry.starts[number]
        total[y : y + height, x : x + width] += fine[number]
        count[y : y + height, x : x + width] += 1
    merged = (total / count.clamp_min(1))[None, None]
    rest = [n - m for n, m in zip(geometry.scaled, seen, strict=True)]
    merged = F.pad(merged, (0, rest[1], 0, rest[0]), mode="replicate")
    size = [int(n) for n in image_hw]
    return F.interpolate(merged, size=size, mode="bilinear", antialias=True, align_corners=False)[0, 0]


def join_scores(maps: Tensor, valid: Tensor, geometry: Geometry, image_hw: Sequence[int], *, smooth: bool = True) -> Tensor:
    """One map of the image without seams from one value per patch and window (ours; `merge_scores` is as published).

    Where windows overlap, a window counts less towards its border: by min(i + 1, n - i) along each axis. Windows whose
    patches lie on one lattice are joined patch by patch before anything is scaled up, so that windows that only touch meet
    smoothly too; other windows are scaled up first and joined pixel by pixel.

    Args:
        maps: float [n_windows, h, w]; valid: bool [n_windows], which windows count.
        image_hw: (H, W) of the image.
        smooth: between the middles of the patches bilinear; otherwise every patch has one value.

    Returns:
        float32 [H, W]; NaN where no valid window looks.
    """
    patch, size = geometry.patch, [int(n) for n in image_hw]
    lattice = not any(geometry.pad) and not any(place % patch for start in geometry.starts for place in start)
    if lattice:  # values of whole patches
        starts = [tuple(place // patch for place in start) for start in geometry.starts]
        scaled, window, values = [n // patch for n in geometry.scaled], geometry.grid, maps.float()
    else:  # of pixels
        starts, scaled, window = geometry.starts, geometry.scaled, geometry.window
        values = _pixels_of(maps, geometry, smooth)
    across = [torch.minimum(torch.arange(n) + 1, n - torch.arange(n)).float() for n in window]
    hat = across[0][:, None] * across[1]
    total, weight = torch.zeros(2, *scaled)
    for number in valid.nonzero()[:, 0].tolist():
        place = tuple(slice(first, first + n) for first, n in zip(starts[number], window, strict=True))
        total[place] += hat * values[number]
        weight[place] += hat
    joined = (total / weight.clamp_min(1e-9))[None, None]
    if not smooth:
        joined = F.interpolate(joined, size=size, mode="nearest-exact")[0, 0]
    else:
        joined = F.interpolate(joined, size=size, mode="bilinear", antialias=not lattice, align_corners=False)[0, 0]
    seen = F.interpolate((weight > 0).float()[None, None], size=size, mode="nearest-exact")[0, 0] > 0
    return torch.where(seen, joined, torch.nan)


def _pixels_of(maps: Tensor, geometry: Geometry, smooth: bool) -> Tensor:
    """Values [n_windows, h, w] of patches as pixels of the windows, freed of their padding."""
    (height, width), (left, _, top, _) = geometry.window, geometry.pad
    size = [n * geometry.patch for n in geometry.grid]
    kind = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest"}
    fine = F.interpolate(maps[:, None].float(), size=size, **kind)[:, 0]
    return fine[:, top : top + height, left : left + width]
