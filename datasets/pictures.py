"""Picture files: decoded completely or refused by name, as pixels or as label maps."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from datasets.scene import UnreadableScene

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
        reason = getattr(error, "strerror", None) or error  # the system's reason without the path once more
        raise UnreadableScene(key, f"{path} is truncated or damaged ({reason})") from error
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
