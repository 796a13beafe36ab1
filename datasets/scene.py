"""The one item type every data set yields, and what data sets kept in files share: reading pictures, knowing files."""

from __future__ import annotations

import hashlib
import inspect
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from PIL import Image, ImageOps
from torch import Tensor

from errors import UserError, unwrap

T = TypeVar("T")
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}  # in words


class Scene(NamedTuple):
    """One item of any data set.

    image: [3, H, W] uint8, as on disk; normalising is the backbone's business.
    labels: pixel maps "identity" and "class", [H, W] int32, 0 background or unlabelled; or codes: "object_code" [n_Y]
        uint8, "feature_code" [n_F] uint8 and "H_Y_given_F" [1] float32 in bits. A data set whose classes are a summary
        of finer ones adds "raw_class" [H, W] int32 (0 unlabelled) and "class_of_raw" [C] int32, the class of each.
    key: stable name of the item (file stem, or split, seed and index): part of the cache fingerprint.
    """

    image: Tensor
    labels: dict[str, Tensor]
    key: str


class UnreadableScene(UserError):
    """A scene whose files are missing, damaged or do not fit together; the caller raises, or counts and skips it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableScene], tuple[str, str]]:
        return type(self), (self.key, self.reason)  # so that it survives the way back from a worker process


def build(cfg: Any, split: str) -> Any:
    """The split of the data set a configuration names.

    Raises:
        UserError: what the data set itself reports, the option it does not take, a word where a number belongs.
    """
    own = [cls.__init__ for cls in reversed(get_class(cfg._target_).__mro__)]  # some name only what differs from a base
    for name, parameter in (pair for init in own for pair in inspect.signature(init).parameters.items()):
        given, kinds = cfg.get(name), getattr(parameter.annotation, "__name__", str(parameter.annotation))
        if isinstance(given, str) and not any(kind in kinds for kind in ("str", "Path", "Any", "_empty")):
            told = " or ".join(KINDS.get(kind, kind) for kind in kinds.split(" | "))
            raise UserError(f"dataset.{name}: got '{given}', expected {told}")
    try:
        return instantiate(cfg, split=split)
    except InstantiationException as error:
        raise unwrap(error)  # noqa: B904  (its own cause stays)


def check_choice(name: str, value: Any, valid: Iterable[str]) -> None:
    """Refuse a knob's value that is not among the valid ones.

    Raises:
        UserError: naming the knob and the valid values.
    """
    if value not in (valid := list(valid)):
        raise UserError(f"dataset.{name}: got {value!r}, expected one of {', '.join(valid)}")


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, evenly spread over all of them; None takes all.

    Raises:
        UserError: the limit is no whole number of at least 1.
    """
    if limit is None:
        return list(items)
    if limit < 1 or limit != int(limit):
        raise UserError(f"dataset.limit: got {limit}, expected a whole number of at least 1, or null")
    n = min(int(limit), len(items))
    return [items[i * len(items) // n] for i in range(n)]


# What Pillow raises on damaged files, beyond OSError: broken chunks, streams, headers, absurd sizes.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def open_picture(path: Path, key: str) -> Image.Image:
    """A picture file, completely decoded.

    Raises:
        UnreadableScene: the file is missing, is no picture, is truncated or damaged; the file is named.
    """
    try:
        with Image.open(path) as picture:
            picture.load()
    except FileNotFoundError:
        raise UnreadableScene(key, f"{path} is missing") from None
    except Image.UnidentifiedImageError:
        raise UnreadableScene(key, f"{path} is not a picture Pillow knows (or its header is damaged)") from None
    except _DAMAGED as error:
        raise UnreadableScene(key, f"{path} is truncated or damaged ({error})") from error
    return picture


def read_image(path: Path, key: str, upright: bool = False) -> Tensor:
    """Pixels of a picture file, [3, H, W] uint8 RGB; alpha is left out, 16-bit grey is scaled to 8 bit.

    Args:
        path: the file.
        key: the scene it belongs to, for the error.
        upright: turn the picture as its EXIF orientation says.

    Raises:
        UnreadableScene: as `open_picture`, or a pixel format without a known range.
    """
    picture = open_picture(path, key)
    if upright:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # Pillow's own conversion would clip everything above 255
        grey = np.asarray(picture).astype(np.int64)
        if grey.size and not 0 <= int(grey.min()) <= int(grey.max()) <= 65535:
            raise UnreadableScene(key, f"{path} has values beyond 16 bit, expected 8- or 16-bit pixels")
        return torch.from_numpy(((grey * 255 + 32767) // 65535).astype(np.uint8)).expand(3, -1, -1).contiguous()
    if picture.mode == "F":
        raise UnreadableScene(key, f"{path} has floating-point pixels, expected 8- or 16-bit ones")
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return torch.from_numpy(np.stack(split_planes(picture)))  # planes first: three times faster than a transpose


def split_planes(picture: Image.Image) -> list[np.ndarray]:
    """The channels of a picture, [H, W] each."""
    return [np.asarray(plane) for plane in picture.split()]


def read_label_map(path: Path, key: str) -> Tensor:
    """Values of a single-channel label picture, [H, W] int32: 8- or 16-bit grey, or palette indices.

    Raises:
        UnreadableScene: as `open_picture`, or the picture has several channels.
    """
    picture = open_picture(path, key)
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise UnreadableScene(key, f"{path} is of mode {picture.mode}, expected one channel of 8 or 16 bit (grey or palette)")
    return torch.from_numpy(np.asarray(picture).astype(np.int32))


def same_size(image: Tensor, label_map: Tensor | np.ndarray, path: Path, key: str) -> None:
    """Refuse a label map [H, W] of another size than its image [3, H, W].

    Raises:
        UnreadableScene: naming the map's file and both sizes.
    """
    (height, width), (rows, columns) = image.shape[-2:], label_map.shape[-2:]
    if (height, width) != (rows, columns):
        raise UnreadableScene(key, f"{path} is {columns}x{rows} pixels, its image {width}x{height}")


def file_fingerprint(root: Path, names: Iterable[str]) -> dict[str, Any]:
    """What stands for files without reading them: their number and a digest of names (below root), sizes and times.

    An absent file counts as such, so that putting it in place changes the fingerprint.
    """
    digest, count, folder = hashlib.blake2b(digest_size=16), 0, os.fspath(root)
    for name in names:
        try:
            facts = os.stat(os.path.join(folder, name))
            told = f"{facts.st_size} {facts.st_mtime_ns}"
        except OSError:
            told = "absent"
        digest.update(f"{name} {told}\n".encode(errors="surrogateescape"))
        count += 1
    return {"files": count, "digest": digest.hexdigest()}
