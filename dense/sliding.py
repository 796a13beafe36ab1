"""Linear segmentation scored in windows that overlap, as mmsegmentation does it for DINOv2: logits are averaged.

An image is scaled until it covers the window, keeping its shape. Windows lie `stride` pixels apart, the last one at the
edge. The logits of a window are scaled up to its pixels; where windows overlap their mean counts. Stored tokens hold one
window per image, so these windows go through the backbone when they are scored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torchvision.transforms import functional

from activation import build_dataset
from backbones.load import load_backbone, resolve_layers
from dense.contract import LabelMaps, resize_map, score_size
from dense.heads import Heads, Normalization
from errors import UserError
from machine import choose_device
from metrics.segmentation import ImageConfusions


class Windows(NamedTuple):
    """The windows of one image: tokens [L, n, h, w, D], corners [n, 2] top and left, side of one, size of the scaled image."""

    tokens: Tensor
    corners: list[tuple[int, int]]
    window: tuple[int, int]
    size: tuple[int, int]


def corners(size: Sequence[int], window: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]]:
    """Top and left of every window of an image that is at least as large; the last ones are moved back to the edge."""
    axes = []
    for length, side, step in zip(size, window, stride, strict=True):
        count = math.ceil(max(length - side, 0) / step) + 1
        axes.append([min(i * step, length - side) for i in range(count)])
    return list(itertools.product(*axes))


def average_windows(logits: Tensor, at: Sequence[tuple[int, int]], window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mean logits of every pixel [C, H, W] of windows [n, h, w, C], each scaled up bilinearly to its pixels."""
    total = torch.zeros(logits.shape[-1], *size)
    count = torch.zeros(size)
    for each, (top, left) in zip(logits, at, strict=True):
        here = slice(top, top + window[0]), slice(left, left + window[1])
        total[:, *here] += F.interpolate(each.movedim(-1, 0)[None], size=window, mode="bilinear", align_corners=False)[0]
        count[here] += 1
    return total / count


@torch.no_grad()
def score_windows(
    heads: Heads, norm: Normalization, look: Callable[[int], Windows], maps: LabelMaps, sizes: Sequence[int | str]
) -> dict[tuple[int, int, int | str], ImageConfusions]:
    """What `linear_seg.score_pixels` gives, by (layer row, seed row, size), of windows that overlap."""
    heads.eval()
    norm.eval()
    found: dict[tuple[int, int, int | str], ImageConfusions] = {}
    for image in range(maps.n_images):
        seen, full = look(image), maps.read(image)
        logits = heads(norm(seen.tokens))  # [L, n, h, w, S, C]
        for i, s in itertools.product(range(len(logits)), range(heads.n_seeds)):
            mean = average_windows(logits[i, ..., s, :], seen.corners, seen.window, seen.size)
            for size in sizes:
                to = score_size(size, seen.size, 1, full.shape)
                called = F.interpolate(mean[None], size=to, mode="bilinear", align_corners=False).argmax(1)
                each = found.setdefault((i, s, size), ImageConfusions(maps.n_images, maps.n_classes))
                each.add(torch.tensor([image]), resize_map(full, to)[None], called)
    return found


def check_slide(slide: Any, evaluation: str) -> None:
    """Refuse a stride that is no number, leaves gaps or stands still.

    Raises:
        UserError: naming the range.
    """
    number = isinstance(slide, int | float) and not isinstance(slide, bool)
    if slide is not None and not (number and 0 < slide <= 1):
        raise UserError(f"{evaluation}.slide={slide}: expected the stride as a share of the window above 0, at most 1, or null")


def sliding_windows(
    cfg: DictConfig, split: str, numbers: Tensor, slide: float, say: Callable[[str], None]
) -> Callable[[int], Windows]:
    """A function image -> its windows, of the size the backbone of `cfg` sees.

    Args:
        numbers: item of the data set behind every image of the split; slide: stride as a share of the window.
    """
    device, dataset = choose_device(cfg.device), build_dataset(cfg, split)
    backbone = load_backbone(cfg.model, device, say)
    facts = backbone.facts
    layers, window = resolve_layers(cfg.model.layers, facts.depth), tuple(facts.image_size)
    stride = [max(1, round(side * slide)) for side in window]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (facts.mean, facts.std))

    def parts(pixels: Tensor, at: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Tokens [L, b, h, w, D] of some windows after the other."""
        for first in range(0, len(at), cfg.cache.batch_windows):
            few = at[first : first + cfg.cache.batch_windows]
            cut = torch.stack([pixels[:, top : top + window[0], left : left + window[1]] for top, left in few])
            tokens = backbone(cut.to(device), layers)
            yield torch.stack([each.patch.float().cpu().unflatten(1, each.grid) for each in tokens])

    def look(image: int) -> Windows:
        pixels = functional.convert_image_dtype(dataset[int(numbers[image])].image)
        scale = max(side / length for side, length in zip(window, pixels.shape[1:], strict=True))
        size = tuple(max(side, round(length * scale)) for side, length in zip(window, pixels.shape[1:], strict=True))
        pixels = (functional.resize(pixels, list(size), antialias=True) - mean) / std
        at = corners(size, window, stride)
        return Windows(torch.cat(list(parts(pixels, at)), 1), at, window, size)

    return look
