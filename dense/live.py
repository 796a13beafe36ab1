"""Training images drawn anew at every pass: cut out, flipped, coloured, and sent through the backbone there and then.

For protocols with augmentations; stored tokens cannot have them. The draw of an image depends on (seed, epoch, image)
alone, so a restart and another batch size see the same pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, functional

from activation import build_dataset
from backbones.load import layers_of, load_backbone
from dense.contract import LabelMaps, resize_map
from errors import UserError
from machine import choose_device


class Augment(NamedTuple):
    """What is drawn.

    scale: smallest and largest share of the image's area that is cut out (what does not fit is drawn again, as torchvision
    does); ratio: of width to height; flip: probability of a mirror image; jitter: range of brightness, contrast,
    saturation and hue, each applied with probability 0.5.
    """

    scale: Sequence[float] = (1.0, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    jitter: float = 0.0

    @classmethod
    def read(cls, block: Mapping[str, Any], name: str) -> Augment:
        """The augmentation of a configuration block.

        Raises:
            UserError: an option that does not exist, or shares out of range.
        """
        unknown = [key for key in block if key not in cls._fields]
        if unknown:
            raise UserError(f"unknown option {name}.augment.{unknown[0]}; valid: {', '.join(cls._fields)}")
        drawn = cls(**block)
        for key in ("scale", "ratio"):
            pair = getattr(drawn, key)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise UserError(f"{name}.augment.{key}={list(pair)}: expected the smallest and the largest, both above 0")
        return drawn


def draw(image: Tensor, label_map: Tensor, augment: Augment, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A cut of an image [3, H, W] uint8 and of its label map [H, W], both at `size`: float32 in 0 … 1, and integer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pixels = functional.convert_image_dtype(image)
        for change in (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation):
            if augment.jitter and float(torch.rand(())) < 0.5:
                pixels = change(pixels, 1 + augment.jitter * float(2 * torch.rand(()) - 1))
        if augment.jitter and float(torch.rand(())) < 0.5:
            pixels = functional.adjust_hue(pixels, augment.jitter * float(2 * torch.rand(()) - 1))
        top, left, height, width = RandomResizedCrop.get_params(pixels, list(augment.scale), list(augment.ratio))
        mirrored = float(torch.rand(())) < augment.flip
    cut = pixels[:, top : top + height, left : left + width]
    pixels = functional.resize(cut, list(size), antialias=True)
    label_map = resize_map(label_map[top : top + height, left : left + width], size)
    return (pixels.flip(-1), label_map.flip(-1)) if mirrored else (pixels, label_map)


def live_stream(
    cfg: DictConfig, split: str, numbers: Tensor, maps: LabelMaps, augment: Augment, *, batch_size: int, say: Callable
) -> Callable[[Tensor, int], Iterator[tuple[Tensor, Tensor]]]:
    """A function (images [n] in order, epoch) -> batches of tokens [L, B, h, w, D] and label maps [B, h p, w p].

    Args:
        cfg: of the subject, whose input size is that of its backbone.
        numbers: item of the data set behind every image of the split; maps: its label maps.
    """
    device, dataset = choose_device(cfg.device), build_dataset(cfg, split)
    backbone = load_backbone(cfg.model, device, say)
    facts = backbone.facts
    layers = layers_of(cfg.model.layers, facts)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (facts.mean, facts.std))

    def stream(images: Tensor, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in images.split(batch_size):
            pairs = []
            for image in part.tolist():
                name = f"{cfg.seed}|{epoch}|{image}".encode()
                seed = int.from_bytes(hashlib.blake2b(name, digest_size=6).digest(), "big")
                pairs.append(draw(dataset[int(numbers[image])].image, maps.read(image), augment, facts.image_size, seed))
            pixels = (torch.stack([pixels for pixels, _ in pairs]) - mean) / std
            tokens = backbone(pixels.to(device), layers)
            h, w = tokens[0].grid
            x = torch.stack([each.patch.float().cpu().unflatten(1, (h, w)) for each in tokens])
            yield x, torch.stack([label_map for _, label_map in pairs])

    return stream
