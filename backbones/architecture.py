"""What an architecture of timm is like: read from a skeleton without weights, remembered on disk.

A run whose activations are cached needs these facts and nothing else of timm, whose import takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from backbones.build import Size, skeleton
from errors import UserError
from files import digest, plain, safe_name, write_atomically

FORMAT = 1  # raise it when the meaning of a fact changes: what is remembered is then read anew


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Facts of a model, whatever its weights are.

    patch_size, image_size: (height, width) in pixels, the latter as the weights of timm were trained.
    depth: blocks; dim: width D; heads: of one attention block (0: none).
    num_prefix_tokens: tokens before the patches; has_class_token: whether the first of them is one.
    dynamic_size: whether any multiple of the patch size is taken.
    norms: modules after the last block that normalise, of "norm" and "fc_norm".
    mean, std, interpolation: preprocessing of timm's weights; hub: "hub:…" or "url:…" of them, None if there are none.
    """

    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    depth: int
    dim: int
    heads: int
    num_prefix_tokens: int
    has_class_token: bool
    dynamic_size: bool
    norms: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    hub: str | None


def find_architecture(name: str, kwargs: str, image_size: Size, folder: Path | None = None) -> Architecture:
    """The facts of a model, from `folder` if they are remembered there; else timm builds its skeleton, and they are written.

    Args:
        name, kwargs, image_size: as `build.create` takes them.
        folder: where facts of architectures are kept; None keeps none.

    Raises:
        UserError: as `build.skeleton`.
    """
    if folder is None:
        return read_architecture(name, kwargs, image_size)
    made_from = {"format": FORMAT, "name": name, "kwargs": kwargs, "image_size": image_size, "timm": metadata.version("timm")}
    made_from = plain(made_from)
    file = folder / f"{safe_name(name)[:100]}-{digest(made_from)}.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["made_from"] == made_from and stored["digest"] == digest(stored["facts"]):
            return Architecture(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored["facts"].items()})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # absent or damaged: what timm says now is as good
        pass
    architecture = read_architecture(name, kwargs, image_size)
    facts = plain(dataclasses.asdict(architecture))
    text = json.dumps({"made_from": made_from, "facts": facts, "digest": digest(facts)}, indent=1)
    with contextlib.suppress(UserError):  # a cache that is only read: the next run asks timm again
        write_atomically(file, text + "\n")
    return architecture


@functools.lru_cache(maxsize=8)
def read_architecture(name: str, kwargs: str, image_size: Size) -> Architecture:
    """The facts of a model, from its skeleton."""
    model, dynamic = skeleton(name, kwargs, image_size)
    pretrained: dict[str, Any] = model.pretrained_cfg
    native = json.loads(kwargs).get("img_size") or pretrained["input_size"][1:]
    prefix, hub = getattr(model, "num_prefix_tokens", 0), None
    if pretrained.get("hf_hub_id"):
        hub = f"hub:{pretrained['hf_hub_id']}/{pretrained.get('hf_hub_filename') or 'model.safetensors'}"
    elif pretrained.get("url"):
        hub = f"url:{pretrained['url']}"
    return Architecture(
        patch_size=tuple(model.patch_embed.patch_size),
        image_size=(native, native) if isinstance(native, int) else tuple(native),
        depth=len(model.blocks),
        dim=model.embed_dim,
        heads=getattr(getattr(model.blocks[0], "attn", None), "num_heads", 0),
        num_prefix_tokens=prefix,
        has_class_token=prefix > 0 and getattr(model, "cls_token", None) is not None,
        dynamic_size=dynamic,
        norms=tuple(norm for norm in ("norm", "fc_norm") if _is_norm(getattr(model, norm, None))),
        mean=tuple(pretrained["mean"]),
        std=tuple(pretrained["std"]),
        interpolation=pretrained["interpolation"],
        hub=hub,
    )


def _is_norm(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)
