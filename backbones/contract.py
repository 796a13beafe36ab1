"""The contract of a backbone: what it states of itself and the tokens it gives.

A layer is the 0-based block whose output is read (timm's convention), before any final norm unless `model.norm`;
`embed` is the input of block 0, after position embedding and, where there is one, the norm before the blocks (CLIP).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from files import plain
from machine import DTYPES

Layer = int | str


class Tokens(NamedTuple):
    """One layer of one forward pass, in the compute dtype.

    prefix: [B, P, D] class token first, then registers; P may be 0.
    patch: [B, N, D] in raster order, N = h * w.
    grid: (h, w).
    """

    prefix: Tensor
    patch: Tensor
    grid: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class BackboneFacts:
    """What is known of a backbone without its weights.

    name, source: as in the configuration; kwargs: the extra architecture arguments as JSON.
    patch_size: pixels; depth: blocks; dim: width D; heads: of one attention block (0: none).
    num_prefix_tokens: tokens before the patches; has_class_token: whether the first of them is one.
    image_size: (height, width) in pixels; dynamic_size: whether other multiples of the patch size are taken too.
    mean, std: per channel, for pixels in 0…1; interpolation: for resizing.
    final_norm: the module after the last block: "norm", "fc_norm" (sits after pooling) or "none".
    weights: where the numbers come from: "sha256:…" of a file, "hub:…", "url:…", "random:<seed>" or "none".
    """

    name: str
    source: str
    patch_size: int
    depth: int
    dim: int
    heads: int
    num_prefix_tokens: int
    has_class_token: bool
    image_size: tuple[int, int]
    dynamic_size: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    final_norm: str
    weights: str
    kwargs: str = "{}"

    def as_dict(self) -> dict[str, Any]:
        """The facts as JSON-able values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Options:
    """The keys of `cfg.model` this module reads; see `cfgs/model/_defaults.yaml` for their meaning."""

    source: str
    name: str
    pretrained: bool = True
    weights: str | None = None
    weights_part: str | None = None
    digest: str | None = None
    rebuild: str | None = None
    image_size: tuple[int, int] | None = None
    norm: bool = False
    dtype: str = "float32"
    attention: str = "sdpa"
    compile: bool = False
    seed: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    position_embedding: str = "timm"
    kwargs: str = "{}"  # JSON: hashable

    @classmethod
    def read(cls, cfg: Mapping[str, Any]) -> Options:
        """Take the keys from a configuration block; a number as image size means a square."""
        values = {field.name: cfg.get(field.name) for field in dataclasses.fields(cls) if field.name in cfg}
        for key in ("image_size", "mean", "std"):
            value, n = values.get(key), 2 if key == "image_size" else 3
            if value is not None:
                value = tuple(value) if isinstance(value, Sequence) else (value,) * n
                if len(value) != n or not all(isinstance(v, int if n == 2 else int | float) and v >= 0 for v in value):
                    raise UserError(f"model.{key}={values[key]} is not understood, expected a number or a list of {n}")
                values[key] = value
        kwargs = plain(values.get("kwargs") or {})
        for key, value in kwargs.items():
            if any(not isinstance(v, str | int | float | None) for v in (value if isinstance(value, list) else [value])):
                raise UserError(f"model.kwargs.{key}: got {value}, expected a number, a text, null, true, false or a list")
        values["kwargs"] = json.dumps(kwargs, sort_keys=True)
        if not values.get("name"):
            raise UserError("model.name is missing, set it to the name of a ViT in timm (timm.list_models lists them)")
        if values.get("attention", "sdpa") not in ("sdpa", "xformers"):
            raise UserError(f"model.attention={values['attention']} is unknown, expected sdpa or xformers")
        if values.get("dtype", "float32") not in (*DTYPES, "auto"):
            raise UserError(f"model.dtype={values['dtype']} is unknown, expected one of {', '.join(DTYPES)}, auto")
        return cls(**values)


class Backbone(nn.Module):
    """A frozen ViT in eval mode. `facts` says what it is; `forward(images, layers)` gives the tokens of each layer."""

    def __init__(self, facts: BackboneFacts) -> None:
        super().__init__()
        self.facts = facts

    @classmethod
    def describe(cls, options: Options, remembered: Path | None = None) -> BackboneFacts:
        """The facts, from the configuration alone."""
        raise NotImplementedError

    @classmethod
    def load(cls, options: Options, device: torch.device, say: Callable[[str], None]) -> Backbone:
        """The backbone with its weights on `device`."""
        raise NotImplementedError

    def read(self, images: Tensor, layers: Sequence[Layer], grid: tuple[int, int]) -> list[Tensor]:
        """Tokens [B, P + N, D] of each layer, prefix first."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor, layers: Sequence[Layer]) -> list[Tokens]:
        """Run the images once and read layers on the way.

        Args:
            images: [B, 3, H, W] float32, normalised with `facts.mean`, `facts.std`.
            layers: block numbers 0…depth-1 and "embed", as `resolve_layers` gives them; the answer keeps their order.

        Raises:
            UserError: an image size the family refuses; a model whose tokens are not prefix + grid.
        """
        facts, (height, width) = self.facts, tuple(images.shape[-2:])
        if height % facts.patch_size or width % facts.patch_size:
            raise UserError(
                f"{facts.name} takes multiples of its patch size {facts.patch_size}, got images of {height} x {width}"
            )
        if not facts.dynamic_size and (height, width) != facts.image_size:
            raise UserError(
                f"{facts.name} takes images of one size, {by_pixels(facts.image_size)}, got {height} x {width}; "
                f"set model.image_size=[{height},{width}] or windows of its size"
            )
        grid = (height // facts.patch_size, width // facts.patch_size)
        layers_read = []
        for layer, x in zip(layers, self.read(images, layers, grid), strict=True):
            prefix = facts.num_prefix_tokens
            if x.shape[1] != prefix + grid[0] * grid[1]:
                raise UserError(
                    f"{facts.name} gives {x.shape[1]} tokens at layer {layer} for a grid of {by_pixels(grid)} patches and "
                    f"{prefix} prefix tokens, its tokens cannot be placed in the image"
                )
            layers_read.append(Tokens(x[:, :prefix], x[:, prefix:], grid))
        return layers_read


def by_pixels(size: tuple[int, ...] | None) -> str:
    """A size as text: height x width."""
    return " x ".join(map(str, size)) if size else "null"
