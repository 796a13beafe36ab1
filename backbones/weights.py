"""Building a timm model and putting weights into it: from a hub, from a file of any known layout, or random.

Files are safetensors, or torch files read with `weights_only=True`. Recognised layouts: timm; DINOv2 hub (registers,
class token apart from its position, blocks in chunks); full checkpoints of MAE and DINO (`model`, `teacher` beside
optimiser state); NeCo's Lightning files (`model.*` the student, `teacher.*`); wrappers such as `module.backbone.*`; what
timm itself converts (DINOv3, OpenAI CLIP, open_clip, I-JEPA …); folders of the transformers library (`transformers_layout`).
Heads are left out, everything else that is left out is reported.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backbones.transformers_layout import folder_digest, is_folder, read_folder, to_timm
from errors import UserError
from files import ROOT

ANCHOR = "patch_embed.proj.weight"  # every ViT of timm's naming has it: what precedes it is the prefix of a backbone
PARTS = ("student", "teacher")
NOT_BODY = ("head", "attn_pool", "fc_norm")  # pooling and read-out: unused here, a file may lack them


def find_file(weights: str, rebuild: str | None) -> Path:
    """The weight file, or folder of the transformers library: a path relative to the working directory, else to this
    project; `~` is the home directory.
    """
    path = Path(weights).expanduser()
    for place in (path, ROOT / path):
        if place.is_file() or is_folder(place):
            return place
    if path.is_dir():
        raise UserError(
            f"{path} is a folder without config.json, expected one that transformers' `save_pretrained` wrote, or a "
            "safetensors or torch file; set model.weights to one"
        )
    remedy = f"make it with: {rebuild}" if rebuild else "set model.weights to a safetensors or torch file"
    raise UserError(f"there is no weight file {weights}, {remedy}, or take random weights with model.pretrained=false")


def file_digest(file: Path) -> str:
    """sha256 of a file or of the weights in a folder, 64 hexadecimal digits."""
    if file.is_dir():
        return folder_digest(file, file_digest)
    status = file.stat()
    return _digest(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _digest(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def load_weights(model: nn.Module, file: Path, *, part: str | None, dynamic: bool, say: Callable[[str], None]) -> None:
    """Put the backbone weights of a file into a model, in place.

    Args:
        part: "student" or "teacher" of a file that holds both; None takes what its authors evaluate (`backbone_state`).
        dynamic: the model takes any image size, so it may adopt the position grid of the file as it is.
        say: hears what was left out or resampled.

    Raises:
        UserError: an unreadable file, no such part, anything the body of the model needs missing or of another shape.
    """
    if file.is_dir():
        content, left_out = to_timm(*read_folder(file), model, file)
    else:
        content, left_out = read_checkpoint(file), []
    state = backbone_state(content, part, str(file))
    state, dropped = _adapt(model, state, dynamic, lambda text: say(f"{file.name}: {text}"))
    dropped += left_out
    wanted = model.state_dict()
    optional = tuple(name for name in NOT_BODY if name != "fc_norm" or _has_norm(model))
    missing = [key for key in wanted if key not in state and not key.startswith(optional)]
    architecture = type(model).__name__
    if missing:
        raise UserError(
            f"{file} lacks {len(missing)} of the {len(wanted)} weights this {architecture} needs ({_some(missing)}; it "
            f"holds {_some(list(state)) or 'none that are recognised'}), choose the model config of its architecture"
        )
    for key, value in state.items():
        if key in wanted and value.shape != wanted[key].shape:
            raise UserError(
                f"{file} holds {key} of shape {list(value.shape)} where this {architecture} needs "
                f"{list(wanted[key].shape)}, choose the model config of its architecture"
            )
    dropped += [key for key in state if key not in wanted]
    model.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    absent = [key for key in wanted if key not in state]
    for keys, what in ((dropped, "not part of the backbone, left out"), (absent, "absent and not used, left random")):
        if keys:
            groups = Counter(key.split(".")[0] for key in keys)
            say(f"{file.name}: {what}: {', '.join(f'{name} ({n})' for name, n in groups.items())}")


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a weight file on the CPU; nothing in it is executed.

    Raises:
        UserError: unreadable, or holding more than tensors and plain values.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and DINO keep their options in one
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}), set model.weights to a readable file") from error
    except Exception as error:  # whatever the readers stumble over in a file of another kind
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if foreign:
            raise UserError(
                f"{file} holds objects of {foreign.group(1)}, which are not loaded for safety; save its state dict alone, "
                "best as safetensors"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        remedy = "set model.weights to a safetensors or torch file"
        raise UserError(f"{file} is damaged or no weight file ({reason}); {remedy}") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a dictionary of weights")
    return dict(content)


def backbone_state(checkpoint: Mapping[str, Any], part: str | None = None, file: str = "the file") -> dict[str, Tensor]:
    """The weights of one backbone under bare names, without heads.

    What precedes `patch_embed.proj.weight` in a (nested) key is a backbone's prefix; it is a teacher if a component of
    the prefix says so ("teacher", "ema"), else a student. Of both, `part=None` takes the teacher where the other is
    called student (DINO, DINOv2) and the student where it is called model (NeCo). A file of another naming comes back
    as it is, for timm to convert.
    """
    if part not in (None, *PARTS):
        raise UserError(f"model.weights_part={part} is unknown, expected null, {' or '.join(PARTS)}")
    flat = dict(_flatten(checkpoint))
    prefixes: dict[str, str] = {}  # role -> prefix, the first of each
    for key in flat:
        if key == ANCHOR or key.endswith("." + ANCHOR):
            prefix = key.removesuffix(ANCHOR)
            teacher = any("teacher" in name or name.endswith("ema") for name in prefix.split("."))
            prefixes.setdefault("teacher" if teacher else "student", prefix)
    if part is not None and part not in prefixes:
        raise UserError(f"{file} holds no {part}, it has {' and '.join(prefixes) or 'no part'}; change model.weights_part")
    if not prefixes:
        return {key: value for key, value in checkpoint.items() if isinstance(key, str)}
    if part is None:
        named = "student" in prefixes.get("student", "student")
        part = "teacher" if "teacher" in prefixes and named else "student"
    prefix = prefixes[part]
    bare = {key[len(prefix) :]: value for key, value in flat.items() if key.startswith(prefix)}
    return {key: value for key, value in bare.items() if not any("head" in name for name in key.split("."))}


def _flatten(node: Mapping, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in node.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(key, str) and isinstance(value, Tensor):
            yield prefix + key, value


def _adapt(
    model: nn.Module, state: dict[str, Any], dynamic: bool, say: Callable[[str], None]
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename and reshape to the model's own keys, with timm's converter of the family last; and what was dropped."""
    from timm.models import VisionTransformer

    dropped = [key for key in ("mask_token", "register_tokens") if key in state]
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    if isinstance(model, VisionTransformer):
        registers = state.pop("register_tokens", None)
        if registers is not None and model.reg_token is not None:  # DINOv2 hub; without registers they are dropped
            dropped.remove("register_tokens")
            position = state["pos_embed"]
            state |= {"reg_token": registers, "pos_embed": position[:, 1:]}
            state["cls_token"] = state["cls_token"] + position[:, :1]
        if any(".mlp.w12." in key for key in state):
            state = {key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): state[key] for key in state}
        if hasattr(model.blocks[0], "ls1") and not isinstance(model.blocks[0].ls1, nn.Identity):
            state = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in state.items()}
    _meet_grid(model, state.get("pos_embed"), dynamic, say)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, RuntimeError, AttributeError, AssertionError) as error:
            raise UserError(
                f"the weight file does not fit this {type(model).__name__} ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}), choose the model config of its architecture"
            ) from error
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}, dropped


def _meet_grid(model: nn.Module, position: Tensor | None, dynamic: bool, say: Callable[[str], None]) -> None:
    """Adopt a square position grid of another size than the model's, so that it is resampled once, to the images' size."""
    expected = getattr(model, "pos_embed", None)
    if position is None or expected is None or position.ndim != 3 or position.shape == expected.shape:
        return
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side, patch = math.isqrt(max(0, position.shape[1] - prefix)), model.patch_embed.patch_size[0]
    here = " x ".join(map(str, model.patch_embed.grid_size))
    if side * side + prefix != position.shape[1]:
        raise UserError(
            f"the weight file has {position.shape[1]} position embeddings, which is no square grid and {prefix} prefix "
            f"tokens; this model's grid is {here}, choose the model config of its architecture"
        )
    say(f"position embeddings of a {side} x {side} grid where the model has {here}: resampled (bicubic, antialiased)")
    if dynamic:
        model.set_input_size((side * patch, side * patch))


def _has_norm(model: nn.Module) -> bool:
    return not isinstance(getattr(model, "norm", None), nn.Identity)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
