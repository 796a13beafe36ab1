"""States: tensors and what they are of in one safetensors file, believed only if its digest fits.

    pack, save_state   equal content makes equal bytes; what is not finite is refused
    load_state         digest and expected entries are checked before a number is used

The metadata of a file is one entry, `state`: JSON with sorted keys {"digest", "format", "recipe"}. The digest covers the
recipe and the name, dtype, shape and bytes of every tensor. Probes of the version before this one have the entries
`recipe` and `facts` and no digest; they are still read, with a warning.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from errors import UserError
from files import unreadable, write_atomically
from runs.records import jsonable

FORMAT = 1
HEADER_BYTES = 100 << 20  # the most a header of safetensors may have
REMEDY = "delete it and repeat the command that wrote it"


class State(NamedTuple):
    """What a file holds: tensors on the CPU, the recipe, and whether a digest vouches for both."""

    tensors: dict[str, Tensor]
    recipe: dict[str, Any]
    checked: bool


def pack(tensors: Mapping[str, Tensor], recipe: Mapping[str, Any], what: str = "a tensor") -> bytes:
    """Tensors of any shape and a JSON-able recipe as the bytes of a safetensors file; equal content gives equal bytes.

    Args:
        what: what the tensors are of, for the error.

    Raises:
        UserError: a number is not finite.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    if (name := not_finite(plain)) is not None:
        raise UserError(f"{what} would hold numbers that are not finite ({name}) and is not written; lower trainer.lr")
    recipe = jsonable(recipe)
    state = {"digest": digest_of(plain, recipe), "format": FORMAT, "recipe": recipe}
    # One entry only: safetensors writes several in an order that differs from process to process.
    return save(plain, {"state": json.dumps(state, sort_keys=True)})


def save_state(path: Path, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> None:
    """Write tensors and their recipe into one file, whole or not at all.

    Raises:
        UserError: a number is not finite, or the file cannot be written.
    """
    write_atomically(path, pack(tensors, recipe, str(path)))


def load_state(path: Path, expected: Mapping[str, Any] | None = None) -> State:
    """What a file written by `save_state` holds.

    Args:
        expected: entries the recipe must have; of an entry that is a mapping itself, those keys that are named.

    Raises:
        UserError: the file is missing, damaged, holds numbers that are not finite, or is of something else. A file without
            a digest, of a version that had none, is read with a warning on the error stream.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        tensors, state = load(data), _metadata(data)
    except OSError as error:
        raise UserError(f"{unreadable(path, error)}; {REMEDY}") from error
    except Exception as error:  # safetensors raises several kinds
        raise UserError(f"{path} is damaged ({_first_line(error)}); {REMEDY}") from error
    if state.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} is of format {state['format']}, this version reads {FORMAT}; {REMEDY}")
    recipe, checked = state["recipe"], "digest" in state
    if not checked:
        print(
            f"warning: {path} is of a version that wrote no checksums, so nobody would notice damage to it; to be sure, repeat "
            "the command that wrote it",
            file=sys.stderr,
        )
    if checked and state["digest"] != digest_of(tensors, recipe):
        raise UserError(f"{path} is damaged (its checksum differs); {REMEDY}")
    if (name := not_finite(tensors)) is not None:
        raise UserError(f"{path} holds numbers that are not finite ({name}); {REMEDY}")
    refuse_other(path, recipe, expected or {})
    return State(tensors, recipe, checked)


def peek(path: Path) -> dict[str, Any]:
    """The recipe in the header of a file, unchecked and without reading its tensors; empty where there is none to read."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            head = file.read(min(int.from_bytes(start, "little"), HEADER_BYTES))
        return _metadata(start + head)["recipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def refuse_other(path: Path, recipe: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a file that is whole but of something else.

    Raises:
        UserError: naming the first entry that differs, in the file and as expected.
    """
    for key, value in jsonable(expected).items():
        found = recipe.get(key)
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            refuse_other(path, found, value)
        elif found != value:
            raise UserError(f"{path} is of something else ({key}: {_short(found)}, expected {_short(value)}); {REMEDY}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds a number that is not finite."""
    floating = ((name, value) for name, value in tensors.items() if value.is_floating_point())
    return next((name for name, value in floating if not bool(torch.isfinite(value).all())), None)


def _metadata(data: bytes) -> dict[str, Any]:
    """The `state` entry of a file's header; of the version before, its two entries in the same form."""
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    texts = head["__metadata__"]
    if "state" not in texts:
        return {"recipe": {**json.loads(texts["recipe"]), "facts": json.loads(texts["facts"])}}
    state = json.loads(texts["state"])
    if set(state) != {"digest", "format", "recipe"} or not isinstance(state["recipe"], dict):
        raise ValueError("its description is not the one that was written")
    return state


def digest_of(tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> str:
    """SHA-256 of tensors on the CPU, with their names, dtypes and shapes, and of a JSON-able recipe."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
