"""Weights in the layout of the transformers library: a folder with config.json and safetensors files.

    is_folder, folder_digest    what such a folder is, and what tells it from another
    read_folder                 its tensors and its configuration
    to_timm                     its names as the authors of the model use them, which `weights` knows

Families: ViT, MAE, DINOv2 (with registers), DINOv3, CLIP and what is named like them. Names as of transformers 4.57.
Nothing in a folder is executed; its configuration is only compared with the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from errors import UserError
from files import read_json

REMEDY = "save the model again with `save_pretrained`, or set model.weights to a safetensors file"
WHOLE, PARTS = "model.safetensors", "model.safetensors.index.json"
# What comes before the names of a backbone ends where its patch embedding begins.
ANCHOR = re.compile(r"(.*?)embeddings\.patch_embeddings?(\.projection)?\.weight")
# Names below that prefix -> names of the authors' files; of a block, below its number.
NAMES = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.class_embedding": "cls_token",
    r"embeddings\.register_tokens": "register_tokens",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.position_embedding\.weight": "pos_embed",
    r"embeddings\.patch_embeddings?(?:\.projection)?\.(weight|bias)": r"patch_embed.proj.\1",
    r"pre_layrnorm\.(weight|bias)": r"norm_pre.\1",  # the misspelling is theirs
    r"(?:layernorm|post_layernorm|norm)\.(weight|bias)": r"norm.\1",
}
BLOCK = re.compile(r"(?:model\.)?(?:encoder\.)?layers?\.(\d+)\.(.*)")
BLOCK_NAMES = {
    r"(?:norm1|layernorm_before|layer_norm1)\.(weight|bias)": r"norm1.\1",
    r"(?:norm2|layernorm_after|layer_norm2)\.(weight|bias)": r"norm2.\1",
    r"(?:attention\.attention\.(query|key|value)|(?:attention|self_attn)\.(q|k|v)_proj)\.(weight|bias)": r"attn.\1\2.\3",
    r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.(weight|bias)": r"attn.proj.\1",
    r"layer_scale([12])\.lambda1": r"ls\1.gamma",
    r"(?:intermediate\.dense|mlp\.fc1)\.(weight|bias)": r"mlp.fc1.\1",
    r"(?:output\.dense|mlp\.fc2)\.(weight|bias)": r"mlp.fc2.\1",
    r"mlp\.weights_in\.(weight|bias)": r"mlp.w12.\1",
    r"mlp\.weights_out\.(weight|bias)": r"mlp.w3.\1",
    r"mlp\.gate_proj\.(weight|bias)": r"mlp.w1.\1",
    r"mlp\.up_proj\.(weight|bias)": r"mlp.up.\1",
    r"mlp\.down_proj\.(weight|bias)": r"mlp.down.\1",
}


def is_folder(path: Path) -> bool:
    """Whether a path is a folder of the transformers library."""
    return path.is_dir() and (path / "config.json").is_file()


def folder_digest(folder: Path, digest_of: Any) -> str:
    """sha256 of the one weight file, or of the digests of several in the order of their names."""
    digests = [digest_of(file) for file in weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in the order of their names.

    Raises:
        UserError: there are none, or the list of them names something outside the folder.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    try:
        listed = read_json(folder / PARTS, REMEDY).get("weight_map")
    except FileNotFoundError:
        raise UserError(f"{folder} holds neither {WHOLE} nor {PARTS}; {REMEDY}") from None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise UserError(f"{folder / PARTS} is damaged (it has no weight_map of file names); {REMEDY}")
    files = [folder / name for name in sorted(set(listed.values()))]
    for file in files:
        if file.parent != folder or file.suffix != ".safetensors" or not file.is_file():
            raise UserError(f"{folder / PARTS} names {file.name}, which is no safetensors file of this folder; {REMEDY}")
    return files


def read_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a folder, and the part of its configuration that describes the image model.

    Raises:
        UserError: a file is missing or damaged.
    """
    config, state = read_json(folder / "config.json", REMEDY), {}
    for file in weight_files(folder):
        try:
            state |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged or no weight file ({error}); {REMEDY}") from error
    inner = config.get("vision_config")
    return state, {**config, **inner} if isinstance(inner, dict) else config


def to_timm(
    state: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module, folder: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names of the authors' own files, and the names that are left out.

    Args:
        state, config: as `read_folder` gives them.
        model: the timm model they are for.
        folder: for the errors.

    Raises:
        UserError: a family that is not known; heads, activation or biases that the model does not have.
    """
    prefixes = {match[1] for key in state if (match := ANCHOR.fullmatch(key))}
    if len(prefixes) != 1:
        kind = config.get("model_type", "unknown")
        raise UserError(
            f"{folder} holds a model of type {kind}, whose weights are not known here (known: ViT, MAE, DINOv2, DINOv3, CLIP); "
            "set model.weights to a file in the layout of its authors or of timm"
        )
    _compare(config, model, folder)
    renamed, left_out = {}, []
    (prefix,) = prefixes
    for key, value in state.items():
        name = _name(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name is None:
            left_out.append(key)
        else:
            renamed[name] = value
    if any(".mlp.w1." in name for name in renamed):  # DINOv3's gated MLP
        renamed = {name.replace(".mlp.up.", ".mlp.w2.").replace(".mlp.down.", ".mlp.w3."): renamed[name] for name in renamed}
    renamed = {name.replace(".mlp.up.", ".mlp.fc1.").replace(".mlp.down.", ".mlp.fc2."): renamed[name] for name in renamed}
    rotary = "pos_embed" not in renamed
    if rotary and "register_tokens" in renamed:
        renamed["storage_tokens"] = renamed.pop("register_tokens")
    for name, dims in (("cls_token", 3), ("pos_embed", 3)):  # CLIP keeps [D] and [N, D]
        while name in renamed and renamed[name].ndim < dims:
            renamed[name] = renamed[name][None]
    return _join_qkv(renamed, model, folder), left_out


def _name(key: str) -> str | None:
    """A name below the prefix as the authors have it; None for what is no part of the backbone."""
    block = BLOCK.fullmatch(key)
    for pattern, new in (BLOCK_NAMES if block else NAMES).items():
        match = re.fullmatch(pattern, block[2] if block else key)
        if match:
            name = re.sub(r"^attn\.([qkv])[a-z]*\.", r"attn.\1.", match.expand(new))  # query or q_proj: q
            return f"blocks.{block[1]}.{name}" if block else name
    return None


def _join_qkv(state: dict[str, Tensor], model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Query, key and value of every block side by side, as one projection; a bias that is not there is zero."""
    attention = model.blocks[0].attn
    projection = getattr(attention, "qkv", None) or attention.q_proj
    takes_bias = getattr(attention, "q_bias", None) is not None or projection.bias is not None
    joined = {name: value for name, value in state.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for first in [name for name in state if name.endswith(".attn.q.weight")]:
        block = first.removesuffix("q.weight")
        weights, biases = ([state.get(f"{block}{part}.{end}") for part in "qkv"] for end in ("weight", "bias"))
        if any(weight is None for weight in weights):
            continue  # what is missing is named by the caller
        joined[f"{block}qkv.weight"] = torch.cat(weights)  # [3 D, D]
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)]
        if takes_bias:
            joined[f"{block}qkv.bias"] = torch.cat(biases)  # [3 D]
        elif any(bool(bias.any()) for bias in biases):
            raise UserError(
                f"{folder} has attention biases and this {type(model).__name__} takes none; choose the variant of model.name "
                "with biases (for DINOv3 its name has _qkvb)"
            )
    return joined


def _compare(config: Mapping[str, Any], model: nn.Module, folder: Path) -> None:
    """Refuse what shapes do not show: another number of heads, another activation."""
    heads, here = config.get("num_attention_heads"), model.blocks[0].attn.num_heads
    if heads is not None and heads != here:
        raise UserError(f"{folder} has {heads} attention heads and model.name {here}, choose the model of its architecture")
    quick, act = config.get("hidden_act") == "quick_gelu", type(getattr(model.blocks[0].mlp, "act", None)).__name__
    if quick != ("QuickGELU" in act) and "GELU" in act:
        variant = "…_clip_quickgelu_…" if quick else "without quickgelu"
        raise UserError(
            f"{folder} was trained with the activation {config.get('hidden_act')} where model.name has {act}, choose the "
            f"variant of model.name {variant}"
        )
