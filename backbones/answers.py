"""What a model of somebody else's returned, as layers of tokens in one form; what cannot be understood is named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backbones.contract import Tokens, by_pixels
from errors import UserError

# Fields in which known libraries return patch tokens: transformers, DINOv2's `forward_features`.
FIELDS = ("last_hidden_state", "x_norm_patchtokens")
MOST_PREFIX = 16  # more tokens than this beside the patches are no class and register tokens


def token_layers(answer: Any, n_images: int, grid: tuple[int, int], prefix: int, patch: int) -> list[Tensor]:
    """The layers of an answer, each [B, P + N, D], prefix tokens first.

    Args:
        answer: a tensor [B, P + N, D], a map [B, D, h, w] or [B, h, w, D], `Tokens`, an object with one of FIELDS, or a list
            or dictionary of these, one per layer.
        n_images: B; grid: (h, w); prefix: P; patch: the side of a patch in pixels, for the message.

    Raises:
        UserError: what was returned, what was expected, and what to change.
    """
    parts = _parts(answer)
    layers = [_layer(part, n_images, grid, prefix, patch) for part in parts]
    widths = {layer.shape[-1] for layer in layers}
    if len(widths) > 1:
        raise UserError(f"the module returns layers of different widths ({sorted(widths)}), expected one; return some of them")
    return layers


def _parts(answer: Any) -> list[Any]:
    """One entry per layer."""
    if isinstance(answer, Tensor | Tokens):
        return [answer]
    for name in FIELDS:
        value = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
        if isinstance(value, Tensor):
            return [value]
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    if isinstance(answer, Sequence) and not isinstance(answer, str) and answer:
        if all(isinstance(part, Tensor | Tokens) for part in answer):
            return list(answer)
        wrong = next(part for part in answer if not isinstance(part, Tensor | Tokens))
        raise UserError(f"the module returns a list with a {type(wrong).__name__} in it, expected tensors, one per layer")
    raise UserError(
        f"the module returns {_kind(answer)}, expected patch tokens: a torch tensor [images, patches, channels], a map "
        "[images, channels, rows, columns], or a list of them, one per layer"
    )


def _kind(answer: Any) -> str:
    name = type(answer).__name__
    return "nothing" if answer is None else f"an empty {name}" if isinstance(answer, Sequence | Mapping) else f"a {name}"


def _layer(part: Tensor | Tokens, n_images: int, grid: tuple[int, int], prefix: int, patch: int) -> Tensor:
    """One layer as [B, P + N, D]."""
    x = torch.cat(part[:2], dim=1) if isinstance(part, Tokens) else part
    shape = list(x.shape)
    if not x.is_floating_point():
        raise UserError(f"the module returns numbers of type {str(x.dtype).removeprefix('torch.')}, expected floating point")
    if x.ndim == 2:
        raise UserError(
            f"the module returns pooled output {shape}, one vector per image; return its patch tokens, of a timm model "
            "for example forward_features(x)[:, num_prefix_tokens:]"
        )
    if x.ndim == 4:
        x = _from_map(x, grid)
        if prefix:
            raise UserError(f"the module returns a map {shape}, which has no prefix tokens; state prefix_tokens=0")
    if x.ndim != 3:
        raise UserError(f"the module returns a tensor of shape {shape}, expected [images, patches, channels]")
    _check_axes(x, n_images, grid, prefix)
    if x.shape[1] != prefix + grid[0] * grid[1]:
        raise UserError(_other_number(x.shape[1], grid, prefix, patch))
    return x


def _from_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [B, D, h, w] or [B, h, w, D] as tokens [B, N, D]."""
    first, last, turned = tuple(x.shape[2:]), tuple(x.shape[1:3]), grid[::-1]
    if first == grid:
        return x.flatten(2).mT
    if last == grid:
        return x.flatten(1, 2)
    if turned in (first, last):
        raise UserError(
            f"the module returns a transposed map {list(x.shape)}: {by_pixels(turned)} where the images have "
            f"{by_pixels(grid)} rows x columns of patches; swap its last axes with .mT"
        )
    raise UserError(
        f"the module returns a map {list(x.shape)} and the images have {by_pixels(grid)} patches; state the patch_size and "
        "image_size that it has"
    )


def _check_axes(x: Tensor, n_images: int, grid: tuple[int, int], prefix: int) -> None:
    """Refuse axes in another order."""
    n_patches, shape = grid[0] * grid[1], list(x.shape)
    counts = {n_patches, n_patches + prefix}
    if x.shape[0] != n_images and x.shape[1] == n_images:
        raise UserError(
            f"the module returns {shape}, patches before images; return [images, patches, channels] with x.transpose(0, 1)"
        )
    if x.shape[0] != n_images:
        raise UserError(f"the module returns {shape} for {n_images} images, expected {n_images} as the first size")
    if abs(x.shape[1] - n_patches) > MOST_PREFIX and x.shape[2] in counts:
        raise UserError(f"the module returns {shape}, channels before patches; return [images, patches, channels] with x.mT")


def _other_number(n_tokens: int, grid: tuple[int, int], prefix: int, patch: int) -> str:
    """The sentence for a number of tokens that is not prefix + patches."""
    n_patches = grid[0] * grid[1]
    here = f"the module returns {n_tokens} tokens for a grid of {by_pixels(grid)} = {n_patches} patches"
    more = n_tokens - n_patches
    if more == 0:
        return f"{here} and prefix_tokens={prefix} is stated: it returns patch tokens alone, state prefix_tokens=0"
    if 0 < more <= MOST_PREFIX:
        return (
            f"{here}: {more} more, as class and register tokens would be; state prefix_tokens={more}, or return patch tokens "
            f"alone with x[:, {more}:]"
        )
    for other in range(1, 8 * patch):
        sides = [side * patch / other for side in grid]
        if other != patch and all(side == int(side) for side in sides) and math.prod(sides) in (n_tokens, n_tokens - prefix):
            return f"{here} of {patch} pixels: its patches have {other} pixels, state patch_size={other}"
    if -MOST_PREFIX <= more < 0:
        return f"{here}: {-more} patches are missing, as if prefix tokens were cut off twice; return all patch tokens"
    return f"{here} and {prefix} prefix tokens; state the patch_size, image_size and prefix_tokens that it has"
