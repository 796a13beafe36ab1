"""Position embeddings on another grid than that of the weights: two conventions, which give other tokens.

    timm   the new size, bicubic with antialias: what timm does, and torch.hub for DINOv2 with registers
    hub    torch.hub for DINOv2 without registers: samples lie (grid + 0.1) / old grid apart, bicubic without antialias

Off the native grid the two differ by 3 to 8 % of the embedding's length; on it they are the same. Published numbers of
DINOv2 without registers that come from torch.hub need `hub`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from errors import UserError

CONVENTIONS = ("timm", "hub")
OFFSET = 0.1


def check_convention(name: str, model_name: str, dynamic_size: bool) -> None:
    """Refuse an unknown convention, and one that a model cannot follow.

    Raises:
        UserError: naming what is possible.
    """
    if name not in CONVENTIONS:
        raise UserError(f"model.position_embedding={name} is unknown, expected one of {', '.join(CONVENTIONS)}")
    if name == "hub" and not dynamic_size:
        raise UserError(f"{model_name} takes images of one size, so nothing is resized; set model.position_embedding=timm")


def resize_as_hub(model: nn.Module, image_size: tuple[int, int]) -> None:
    """Set a timm ViT to one image size (height, width), its position embeddings resized as torch.hub does for DINOv2.

    With registers the hub does what timm does, so nothing else is changed then.

    Raises:
        UserError: a model without position embeddings.
    """
    if getattr(model, "pos_embed", None) is None:
        raise UserError("this model has no position embeddings to resize; set model.position_embedding=timm")
    position, old = model.pos_embed.detach(), model.patch_embed.grid_size  # [1, P + M N, D], (M, N)
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    model.set_input_size(image_size)
    new = model.patch_embed.grid_size
    if new == old or getattr(model, "reg_token", None) is not None:
        return
    maps = position[:, prefix:].float().unflatten(1, old).movedim(-1, 1)  # [1, D, M, N]
    scale = tuple((n + OFFSET) / o for n, o in zip(new, old, strict=True))
    maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", antialias=False)
    moved = torch.cat([position[:, :prefix].float(), maps.flatten(2).mT], 1)
    model.pos_embed = nn.Parameter(moved.to(position.dtype), requires_grad=False)
