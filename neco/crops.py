"""Where the crops of an image lie, what they look like, and where they overlap.

An image gives G global and some local crops that overlap every global one; they are never mirrored, because the boxes of the
overlaps could not say so. Everything random about an image comes from its own generator, so a sample is the same whoever
decodes it, and a stopped run goes on with the same crops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from errors import UserError

ROUNDS, CANDIDATES, TRIES = 50, 16, 10  # of drawing a crop; TRIES as in torchvision's RandomResizedCrop
ROUNDINGS = ("error", "published", "corrected")
COLOUR, GREY, BLUR = 0.8, 0.2, 0.5  # probabilities of colour jitter, of grey, of blur
JITTER = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue, at strength 1


@dataclasses.dataclass(frozen=True)
class CropOptions:
    """How images are cropped: two groups, global crops first.

    sizes: pixels of the side of a global and of a local crop; numbers: how many of each.
    smallest, largest: range of the share of the image's area, per group; ratio: range of width / height.
    min_intersection: share of the image's area that crops must have in common with every global one (global: twice).
    jitter, blur: strength of the colour changes (0: neither jitter nor grey) and of the blur (0: none).
    rounding: what to do when the patch size does not divide a size: refuse (error); take the grid that fits and leave boxes
        in pixels of the whole crop, so that they reach beyond the grid (published: 98 px and patches of 16); or take the
        next smaller multiple (corrected).
    """

    sizes: tuple[int, int] = (224, 98)
    numbers: tuple[int, int] = (2, 4)
    smallest: tuple[float, float] = (0.25, 0.05)
    largest: tuple[float, float] = (1.0, 0.25)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    min_intersection: float = 0.01
    jitter: float = 1.0
    blur: float = 1.0
    rounding: str = "error"

    def check(self, patch_size: int) -> CropOptions:
        """These options with sizes that fit the patches.

        Raises:
            UserError: a crop smaller than a patch, a patch size that does not divide, a range that is none.
        """
        for name in ("sizes", "numbers", "smallest", "largest", "ratio"):
            if len(getattr(self, name)) != 2:
                raise UserError(f"neco.crops.{name}: got {list(getattr(self, name))}, expected two numbers")
        if self.rounding not in ROUNDINGS:
            raise UserError(f"neco.crops.rounding={self.rounding} is unknown, expected one of {', '.join(ROUNDINGS)}")
        if self.numbers[0] < 1 or self.numbers[1] < 0 or sum(self.numbers) < 2:
            raise UserError(f"neco.crops.numbers: got {list(self.numbers)}, expected at least one global crop and two in all")
        for group, (low, high) in enumerate(zip(self.smallest, self.largest, strict=True)):
            if not 0 < low <= high <= 1:
                raise UserError(
                    f"neco.crops.smallest, largest: got {low}, {high} for group {group}, expected 0 < smallest <= largest <= 1"
                )
        if not 0 <= self.min_intersection < 0.5:
            raise UserError(f"neco.crops.min_intersection: got {self.min_intersection}, expected a share from 0 to 0.5")
        for size in self.sizes:
            if size < patch_size:
                raise UserError(
                    f"neco.crops.sizes: a crop of {size} px is smaller than a patch of {patch_size} px, take larger crops"
                )
            if size % patch_size and self.rounding == "error":
                fits = max(1, round(size / patch_size)) * patch_size
                raise UserError(
                    f"neco.crops.sizes: patches of {patch_size} px do not divide crops of {size} px; take {fits}, or "
                    "neco.crops.rounding=corrected (next smaller multiple) or published (boxes reach beyond the grid)"
                )
        if self.rounding == "corrected":
            return dataclasses.replace(self, sizes=tuple(size - size % patch_size for size in self.sizes))
        return self

    @property
    def total(self) -> int:
        """Crops of an image."""
        return sum(self.numbers)

    def size_of(self, crop: int) -> int:
        """Side of a crop in pixels; globals come first."""
        return self.sizes[0] if crop < self.numbers[0] else self.sizes[1]


class Overlaps(NamedTuple):
    """Common regions of crops, x1, y1, x2, y2 in pixels of a resized crop.

    in_global: [B, G, V, 4], of global crop i and crop v, in i; in_all: [B, V, G, 4], the same in v.
    """

    in_global: Tensor
    in_all: Tensor


def crop_boxes(absolute: Tensor, sizes: Sequence[int], n_global: int) -> Overlaps:
    """Where crops overlap the global ones.

    Args:
        absolute: [B, V, 4], x1, y1, x2, y2 of the crops in pixels of the image, globals first.
        sizes: [V], side of each crop after resizing; n_global: G.
    """
    first, other = absolute[:, :n_global, None], absolute[:, None]  # [B, G, 1, 4], [B, 1, V, 4]
    corner = torch.maximum(first[..., :2], other[..., :2])  # [B, G, V, 2]
    common = torch.cat([corner, torch.maximum(torch.minimum(first[..., 2:], other[..., 2:]), corner)], dim=-1)  # [B, G, V, 4]
    side = torch.as_tensor(sizes, dtype=common.dtype, device=common.device)

    def inside(boxes: Tensor, size: Tensor) -> Tensor:
        origin, extent = boxes[..., :2], boxes[..., 2:] - boxes[..., :2]
        return (common - torch.cat([origin, origin], -1)) / torch.cat([extent, extent], -1) * size

    in_global = inside(first, side[:n_global].view(1, -1, 1, 1))
    in_all = inside(other, side.view(1, 1, -1, 1)).transpose(1, 2)
    return Overlaps(in_global, in_all)


def draw_crops(height: int, width: int, options: CropOptions, rng: np.random.Generator) -> np.ndarray:
    """Boxes [V, 4] of an image's crops, x1, y1, x2, y2 in its pixels.

    A crop is drawn as torchvision's RandomResizedCrop does, again and again until it shares enough area with every global
    one before it; many candidates at once, and the first that fits is taken.

    Raises:
        UserError: no crop fits (the published loop would never end).
    """
    least = math.floor(height * width * options.min_intersection)
    boxes = np.zeros((0, 4))
    for crop in range(options.total):
        group = 0 if crop < options.numbers[0] else 1
        for _ in range(ROUNDS):
            drawn = _candidates(height, width, (options.smallest[group], options.largest[group]), options.ratio, rng)
            known = boxes[: options.numbers[0], None]  # [g, 1, 4]
            low, high = np.maximum(known[..., :2], drawn[:, :2]), np.minimum(known[..., 2:], drawn[:, 2:])
            shared = np.clip(high - low, 0, None).prod(-1)  # [g, candidates]
            fits = (shared > least * (2 if group == 0 else 1)).all(0)
            if fits.any():
                boxes = np.concatenate([boxes, drawn[fits.argmax()][None]])
                break
        else:
            raise UserError(
                f"no crops of an image of {width} x {height} px share {options.min_intersection:.0%} of its area, lower "
                "neco.crops.min_intersection or raise neco.crops.smallest"
            )
    return boxes


def _candidates(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Boxes [CANDIDATES, 4] as torchvision draws them: the first of ten that fits into the image, else a central one."""
    area = height * width * rng.uniform(*scale, (CANDIDATES, TRIES))
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), (CANDIDATES, TRIES)))
    w, h = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = fits.argmax(1)[:, None]
    w, h = np.take_along_axis(w, first, 1)[:, 0], np.take_along_axis(h, first, 1)[:, 0]
    central = ~fits.any(1)
    if width / height < ratio[0]:
        whole_w, whole_h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        whole_w, whole_h = round(height * ratio[1]), height
    else:
        whole_w, whole_h = width, height
    w, h = np.where(central, whole_w, w), np.where(central, whole_h, h)
    x = np.floor(rng.uniform(size=CANDIDATES) * (width - w + 1))
    y = np.floor(rng.uniform(size=CANDIDATES) * (height - h + 1))
    x, y = np.where(central, (width - w) // 2, x), np.where(central, (height - h) // 2, y)
    return np.stack([x, y, x + w, y + h], axis=1)


def cut_crops(image: Tensor, boxes: np.ndarray, options: CropOptions, rng: np.random.Generator) -> list[Tensor]:
    """The crops of an image, [3, size, size] float32 in 0 … 1 each, resized (bilinear, antialiased) and recoloured."""
    crops = []
    for index, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        size = options.size_of(index)
        crop = pixels.resize(image[:, y1:y2, x1:x2], [size, size], antialias=True)
        crops.append(recolour(pixels.to_dtype(crop, torch.float32, scale=True), options, rng))
    return crops


def recolour(image: Tensor, options: CropOptions, rng: np.random.Generator) -> Tensor:
    """Random colour jitter in random order, grey, Gaussian blur of an image [3, H, W] in 0 … 1.

    The published blur is Pillow's (boxes that approximate a Gaussian of that radius); here it is a Gaussian.
    """
    chances, order = rng.uniform(size=3), rng.permutation(4)
    strengths, radius = rng.uniform(-1, 1, size=4), rng.uniform(0.1, 2.0)
    if options.jitter and chances[0] < COLOUR:
        adjust = (pixels.adjust_brightness, pixels.adjust_contrast, pixels.adjust_saturation, pixels.adjust_hue)
        for which in order:
            change = options.jitter * JITTER[which] * strengths[which]
            image = adjust[which](image, float(np.clip(change, -0.5, 0.5)) if which == 3 else max(0.0, 1 + float(change)))
    if options.jitter and chances[1] < GREY:
        image = pixels.rgb_to_grayscale(image, num_output_channels=3)
    if options.blur and chances[2] < BLUR:
        sigma = float(radius) * options.blur
        kernel = min(2 * math.ceil(3 * sigma) + 1, 2 * min(image.shape[-2:]) - 1)
        image = pixels.gaussian_blur(image, [kernel, kernel], [sigma, sigma])
    return image


class CropBatch(NamedTuple):
    """Images as the networks see them.

    crops: V tensors [B, 3, size, size], normalised, globals first; overlaps: their common regions.
    """

    crops: list[Tensor]
    overlaps: Overlaps


def sample_crops(image: Tensor, options: CropOptions, seed: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """The crops and boxes [V, 4] of an image [3, H, W] uint8, decided by a seed such as (seed, epoch, image)."""
    rng = np.random.default_rng(list(seed))
    boxes = draw_crops(*image.shape[-2:], options, rng)
    return cut_crops(image, boxes, options, rng), torch.from_numpy(boxes)


def collate(
    samples: Sequence[tuple[list[Tensor], Tensor]],
    options: CropOptions,
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> CropBatch:
    """A batch of samples, normalised; what a patch does not fill at the right and bottom is cut off (rounding=published)."""
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    crops = []
    for index in range(options.total):
        size = options.size_of(index)
        seen = size - size % patch_size
        crops.append((torch.stack([sample[0][index][:, :seen, :seen] for sample in samples]) - shift) / scale)
    absolute = torch.stack([sample[1] for sample in samples]).float()
    return CropBatch(crops, crop_boxes(absolute, [options.size_of(i) for i in range(options.total)], options.numbers[0]))
