"""From a configuration to a frozen backbone: the table of sources, facts without weights, names of layers.

A new source is a subclass of `Backbone` and one line in `SOURCES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backbones.contract import Backbone, BackboneFacts, Layer, Options
from backbones.module import ModuleBackbone
from backbones.pixels import Pixels
from backbones.timm_vit import TimmViT
from errors import UserError

SOURCES: dict[str, type[Backbone]] = {"timm": TimmViT, "module": ModuleBackbone, "pixels": Pixels}


def backbone_facts(model_cfg: Mapping[str, Any], remembered: Path | None = None) -> BackboneFacts:
    """What `load_backbone` would give, without its weights.

    Args:
        model_cfg: the `model` section.
        remembered: a folder where facts of architectures are kept, so that timm is asked once; None asks it.

    Raises:
        UserError: unknown model, a size it refuses, no pretrained weights, a weight file that is missing or altered.
    """
    source, options = _read(model_cfg)
    return source.describe(options, remembered)


def load_backbone(model_cfg: Mapping[str, Any], device: torch.device | str, say: Callable[[str], None] = print) -> Backbone:
    """The frozen backbone on a device; `say` hears what was left out of or resampled in a weight file.

    Raises:
        UserError: as `backbone_facts`; weights that do not fit or cannot be downloaded; dtype or attention the device
            does not have.
    """
    source, options = _read(model_cfg)
    return source.load(options, torch.device(device), say)


def _read(model_cfg: Mapping[str, Any]) -> tuple[type[Backbone], Options]:
    """The class behind `model.source` and the options it reads."""
    options = Options.read(model_cfg)
    if options.source not in SOURCES:
        raise UserError(f"model.source={options.source} is unknown, expected one of {', '.join(SOURCES)}")
    return SOURCES[options.source], options


def layers_of(spec: Any, facts: BackboneFacts) -> list[Layer]:
    """As `resolve_layers`; a module of the user's own has no `embed`: its layers are what it returns.

    Raises:
        UserError: no such layer.
    """
    if facts.source != "module":
        return resolve_layers(spec, facts.depth)
    layers = resolve_layers(spec, facts.depth)
    if spec == "all":
        return layers[1:]
    if "embed" in layers:
        raise UserError(f"model.layers: {facts.name} has no layer embed, only what it returns: 0…{facts.depth - 1}")
    return layers


def resolve_layers(spec: Any, depth: int) -> list[Layer]:
    """Layer names as canonical layers, "embed" first, then rising block numbers, each once.

    Args:
        spec: "all" (embed and every block), one layer or a list; negative numbers count from the last block.
        depth: blocks of the model.

    Raises:
        UserError: no such layer.
    """
    names = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    blocks: set[int] = set()  # -1 stands for embed
    for layer in names:
        if layer == "all":
            blocks |= set(range(-1, depth))
        elif layer == "embed":
            blocks.add(-1)
        elif isinstance(layer, int) and not isinstance(layer, bool) and -depth <= layer < depth:
            blocks.add(layer % depth)
        else:
            numbers = f", {-depth}…{depth - 1}" if depth else ""
            raise UserError(f"model.layers: there is no layer {layer!r}, expected all, embed{numbers} or a list of these")
    if not blocks:
        raise UserError("model.layers is empty, name at least one layer or all")
    return ["embed" if layer < 0 else layer for layer in sorted(blocks)]
