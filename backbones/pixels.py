"""The control backbone: the normalised pixels of each patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.contract import Backbone, BackboneFacts, Layer, Options
from backbones.module import ModuleBackbone
from backbones.timm_vit import TimmViT
from errors import UserError


class Pixels(Backbone):
    """Control: the normalised pixels of each patch [3 p p], cut as the named model would see them; only "embed"."""

    @classmethod
    def describe(cls, options: Options, remembered: Path | None = None) -> BackboneFacts:
        """Sizes and preprocessing of the named model, nothing else of it: all models that share them share a cache."""
        if options.norm:
            raise UserError("model.norm=true and pixels have no norm, set model.norm=false")
        if ":" in options.name:  # a module of the user's own (`module.py`), no name of timm has a colon
            seen = ModuleBackbone.describe(options, remembered)
        else:
            seen = TimmViT.describe(dataclasses.replace(options, pretrained=False), remembered)
        changes = {"depth": 0, "dim": 3 * seen.patch_size**2, "heads": 0, "num_prefix_tokens": 0, "kwargs": "{}"}
        changes |= {"has_class_token": False, "final_norm": "none", "weights": "none", "dynamic_size": True}
        return dataclasses.replace(seen, name="pixels", source="pixels", **changes)

    @classmethod
    def load(cls, options: Options, device: torch.device, say: Callable[[str], None]) -> Pixels:
        """Nothing to load."""
        return cls(cls.describe(options)).eval()

    def read(self, images: Tensor, layers: Sequence[Layer], grid: tuple[int, int]) -> list[Tensor]:
        """Pixels by channel, row, column of each patch."""
        size = self.facts.patch_size
        return [F.unfold(images, size, stride=size).mT for _ in layers]
