"""Where windows and patches lie in an image.

The rules come from the `geometry` block of a protocol (`cfgs/protocol/*.yaml`); no rule here depends on the name of
a protocol. Published rules: "Does Object Binding Naturally Emerge in Large Pretrained Vision Transformers?" (arXiv
2510.24709) and its two public programs of 2025 and 2026.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from errors import UserError


class DroppedImage(Exception):
    """The protocol leaves this image out. Callers count it; `reason` is the same text for all images of one kind."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Geometry(NamedTuple):
    """How one image is scaled, cut into windows and divided into patches; lengths in pixels of the scaled image.

    scaled: (H', W') size the image and its labels are scaled to.
    starts: (y, x) of the first pixel of each window, row by row; all pairs of some rows and some columns.
    window: (height, width) of a window before padding.
    pad: (left, right, top, bottom) zeros around every window, in the order of `torch.nn.functional.pad`.
    grid: (h, w) patches of a window; patch: side of a patch.
    image_scaled, image_starts: the same for the pixels, where a published program rounds them in another way than the
        labels; None: as the labels.
    interpolation: how the protocol scales pixels; None: as the backbone was trained.
    """

    scaled: tuple[int, int]
    starts: tuple[tuple[int, int], ...]
    window: tuple[int, int]
    pad: tuple[int, int, int, int]
    grid: tuple[int, int]
    patch: int
    image_scaled: tuple[int, int] | None = None
    image_starts: tuple[tuple[int, int], ...] | None = None
    interpolation: str | None = None


def plan_geometry(
    image_hw: Sequence[int], *, geometry: Mapping[str, Any], patch_size: int, image_size: Sequence[int]
) -> Geometry:
    """Scaled size, windows and patches of an image of (H, W) pixels.

    Args:
        geometry: `kind`, a name of GEOMETRIES, the options of that kind, and `interpolation` of the pixels.
        patch_size: side of a patch of the backbone in pixels.
        image_size: (height, width) the backbone was built for.

    Raises:
        DroppedImage: the protocol leaves out images of this shape.
        UserError: unknown kind or option; image smaller than a patch; sizes that do not fit each other.
    """
    options = {name: value for name, value in geometry.items() if name not in ("interpolation", "antialias")}
    plan = call_kind(GEOMETRIES, "protocol.geometry", options, tuple(map(int, image_hw)), patch_size, tuple(image_size))
    return plan._replace(interpolation=geometry["interpolation"])


def _cover(image_hw: tuple[int, int], patch: int, image_size: tuple[int, int]) -> Geometry:
    """Windows of the backbone's own size that cover the whole image, as few as possible, evenly spread.

    The image is scaled to just cover one window (its short side, if windows are square). Our choice: the other side is
    rounded to whole patches, which bends the aspect by less than half a patch and puts the patches of all windows on one
    lattice; an area then belongs to exactly one patch of the window that owns it.
    """
    (height, width), (h, w) = image_hw, _patches_of(image_hw, patch, image_size)
    if h * width >= w * height:  # the height decides the scale
        rows, columns = h, max(w, round(width * h / height))
    else:
        rows, columns = max(h, round(height * w / width)), w
    starts = itertools.product(_spread(rows, h), _spread(columns, w))
    starts = tuple((y * patch, x * patch) for y, x in starts)
    return Geometry((rows * patch, columns * patch), starts, (h * patch, w * patch), (0, 0, 0, 0), (h, w), patch)


def _stretch(image_hw: tuple[int, int], patch: int, image_size: tuple[int, int]) -> Geometry:
    """One window that holds the entire image, its aspect bent to that of the backbone's input.

    For questions about images as one piece, as published for binding information; for square images it equals `cover`.
    """
    h, w = _patches_of(image_hw, patch, image_size)
    return Geometry((h * patch, w * patch), ((0, 0),), (h * patch, w * patch), (0, 0, 0, 0), (h, w), patch)


def _patches_of(image_hw: tuple[int, int], patch: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of a window of the backbone's own size, for an image it can see."""
    if min(image_hw) < patch:
        raise UserError(
            f"image of {image_hw[0]}×{image_hw[1]} pixels is smaller than a patch of {patch}×{patch}; use larger images "
            "or a backbone with smaller patches"
        )
    if any(n % patch for n in image_size):
        raise UserError(f"model.image_size={list(image_size)} is no multiple of the patch size {patch}; choose one that is")
    return image_size[0] // patch, image_size[1] // patch


def _spread(n: int, size: int) -> list[int]:
    """Starts of the fewest intervals of length `size` that cover 0..n, evenly spread."""
    count = -(-n // size)
    return [round(i * (n - size) / max(count - 1, 1)) for i in range(count)]


def _two_windows(
    image_hw: tuple[int, int], patch: int, image_size: tuple[int, int], *, window: int, stride: int, drop: bool
) -> Geometry:
    """Two square windows at the two ends of the longer axis, short side = `window`, centred padding to whole patches.

    As published in 2025: images that a sliding window of this stride does not see exactly twice are dropped (`drop`).
    Labels are scaled with Python's rounding (half to even), pixels with int(x + 0.5): halves differ by one pixel.
    """
    height, width = image_hw
    if height < width:
        scaled = (window, round(window / height * width))
    else:
        scaled = (round(window / width * height), window)
    scale = window / min(image_hw)
    pixels = (int(height * scale + 0.5), int(width * scale + 0.5))
    counts = [max(n - window + stride - 1, 0) // stride + 1 for n in pixels]
    n_seen = counts[0] * counts[1]
    if drop and n_seen != 2:
        raise DroppedImage(f"{n_seen} sliding {'window' if n_seen == 1 else 'windows'}, the protocol takes two")

    def ends(size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        return ((0, 0), (0, size[1] - window)) if height < width else ((0, 0), (size[0] - window, 0))

    extra = -window % patch
    before, after = extra // 2, extra - extra // 2
    side = (window + extra) // patch
    return Geometry(
        scaled,
        ends(scaled),
        (window, window),
        (before, after, before, after),
        (side, side),
        patch,
        image_scaled=pixels,
        image_starts=ends(pixels),
    )


def _uniform_crops(
    image_hw: tuple[int, int],
    patch: int,
    image_size: tuple[int, int],
    *,
    short_side: int | None,
    crop: int | None,
) -> Geometry:
    """Square crops at uniform steps, row by row, as published in 2026; up to (crops - 2) pixels stay uncovered.

    Args:
        short_side: null = 37 patches, which is what the published program took for each of its models.
        crop: null = the size the backbone was built for, likewise.
    """
    short_side = 37 * patch if short_side is None else short_side
    if crop is None and image_size[0] != image_size[1]:
        raise UserError(
            f"protocol.geometry.kind=uniform_crops needs a square model.image_size, got {list(image_size)}; set one"
        )
    crop = image_size[0] if crop is None else crop
    if crop % patch or not 0 < crop <= short_side:
        raise UserError(
            f"protocol.geometry.crop={crop} has to be a multiple of the patch size {patch} and at most short_side="
            f"{short_side}; set protocol.geometry.crop and protocol.geometry.short_side accordingly"
        )
    height, width = image_hw
    if height < width:
        scaled = (short_side, round(width * (short_side / height)))
    else:
        scaled = (round(height * (short_side / width)), short_side)

    def axis(n: int) -> list[int]:
        if n <= crop:
            return [0]
        if n <= 2 * crop:
            return [0, n - crop]
        count = math.ceil((n - crop) / crop - 1e-6) + 1
        return [i * ((n - crop) // (count - 1)) for i in range(count)]

    starts = tuple(itertools.product(axis(scaled[0]), axis(scaled[1])))
    return Geometry(scaled, starts, (crop, crop), (0, 0, 0, 0), (crop // patch, crop // patch), patch)


GEOMETRIES: dict[str, Callable[..., Geometry]] = {
    "cover": _cover,
    "stretch": _stretch,
    "two_windows": _two_windows,
    "uniform_crops": _uniform_crops,
}


def call_kind(table: Mapping[str, Callable], key: str, options: Mapping[str, Any], *args: Any) -> Any:
    """Call the entry of a table that `options["kind"]` names with the other options; unknown options are named in the error."""
    options = dict(options)
    kind = options.pop("kind", None)
    if kind not in table:
        raise UserError(f"unknown {key}.kind={kind}; valid: {', '.join(table)}")
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(table[kind]).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    }
    unknown = [name for name in options if name not in known]
    lacking = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in options]
    if unknown or lacking:
        raise UserError(
            f"{key}.kind={kind} takes {', '.join(known) or 'no options'}; got {', '.join(options) or 'none'}; "
            + (f"leave out {', '.join(unknown)}" if unknown else f"set {', '.join(f'{key}.{n}' for n in lacking)}")
        )
    return table[kind](*args, **options)
