"""The files of ADE20K's full release: decoding the masks, the JSON beside each image, the list of classes.

`_seg.png` holds, per pixel, the class (R div 10) * 256 + G (0 unlabelled; the JSON's `name_ndx`) and in B the object:
floor(255 k / K + 1/2) for object k = 1 … K of the K whole objects (part level 0) of the image, 0 where there is none.
The reader of the data set's authors numbers objects by the rank of B among the values present, which gives the first
object of a completely labelled image the number of the background and cannot tell more than 255 objects apart;
`decode_segmentation` keeps that numbering for comparison, `number_objects` is the one used here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.pictures import split_planes
from datasets.scene import UnreadableScene
from errors import UserError

RAW_CLASSES = 26 * 256  # more than (R div 10) * 256 + G can be
CLASS_LIST = Path(__file__).parent / "objectInfo150.csv"
# Names the list spells differently, after normalising: the published special cases (classes 15, 90 and 142).
ALIASES = {
    "door": "door;double;door",
    "double;door": "door;double;door",
    "television;receiver;television;television;set;tv;tv;set;idiot;box;boob;tube;telly;goggle;box": (
        "television;television;receiver;television;set;tv;tv;set;idiot;box;boob;tube;telly;goggle;box"
    ),
    "screen;crt;screen": "crt;screen",
}


# --------------------------------------------------------------------------------------------------------- decoding


def split_segmentation(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Raw class [H, W] int32 and object code B [H, W] uint8 of a `_seg.png` or `_parts_*.png` picture (RGB)."""
    red, green, blue = split_planes(picture)
    raw = (red // 10).astype(np.int32)  # in place from here: the time is in touching memory
    raw <<= 8
    raw += green
    return raw, blue


def decode_segmentation(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Class [H, W] int32 and instance [H, W] int64 as the authors' reader gives them: the rank of B among those present.

    An object has number 0 where no pixel is unlabelled. Parts are decoded alike (as whole numbers: the authors'
    reader gives floating-point values for parts).
    """
    raw, blue = split_segmentation(picture)
    present = np.zeros(256, bool)
    present[blue] = True
    return raw, np.take(np.cumsum(present) - 1, blue)


def number_objects(raw: np.ndarray, blue: np.ndarray, n_objects: int | None) -> tuple[np.ndarray, str]:
    """Number of the object at each pixel, 0 where there is none, and the rule by which it was found.

    Args:
        raw: [H, W] int32 class, 0 unlabelled.
        blue: [H, W] uint8 object code B.
        n_objects: K, the whole objects the JSON lists; None if it does not say.

    Returns:
        identity: [H, W] int32.
        rule: "paint_order" where every B is the code of a k of K objects: k = round(B K / 255), so that a hidden object
            leaves a gap and shifts nothing; "class_and_code" for more than 255 objects, some of which share a B: the dense rank
            of the pair (class, B), which keeps apart what can be; "rank" otherwise (no K, or a B that no k of K has):
            the dense rank of B. B = 0 stays 0 in the first and last, unlabelled with B = 0 in the second.
    """
    if n_objects is not None and n_objects > 255:
        return _dense_rank(raw * 256 + blue, RAW_CLASSES * 256), "class_and_code"
    if n_objects:
        number = np.arange(n_objects + 1, dtype=np.int32)  # k
        table = np.full(256, -1, np.int32)
        table[(510 * number + n_objects) // (2 * n_objects)] = number  # at floor(255 k / K + 1/2): distinct for K <= 255
        identity = np.take(table, blue)
        if identity.min(initial=0) == 0:
            return identity, "paint_order"
    return _dense_rank(blue, 256), "rank"


def _dense_rank(code: np.ndarray, n_codes: int) -> np.ndarray:
    """Rank of each code among those present, [H, W] int32; code 0 has rank 0, present or not."""
    present = np.zeros(n_codes, bool)
    present[code] = True
    present[0] = True
    return np.take((np.cumsum(present) - 1).astype(np.int32), code)


# ---------------------------------------------------------------------------------------------------------- classes


def read_class_list(path: Path) -> list[str]:
    """The names of classes 1 … K from an objectInfo150.csv (columns Idx and Name; Idx counts from 1).

    Raises:
        UserError: the file is no such list.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        names = [row["Name"].strip() for row in rows]
        numbers = [int(row["Idx"]) for row in rows]
    except OSError as error:
        raise UserError(f"cannot read the class list {path}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise UserError(f"class list {path}: got unreadable rows ({error!r}), expected columns Idx and Name") from error
    if not names or numbers != list(range(1, len(names) + 1)) or len(set(names)) != len(names):
        raise UserError(f"class list {path}: expected Idx 1, 2, 3, … and every Name once, got {len(names)} other rows")
    return names


def class_of_name(name: str, numbers: Mapping[str, int]) -> int:
    """Class of a full-release name, 0 where the list has none: exact and case-sensitive after ", " and " " become ";".

    Args:
        name: as in the JSON files, synonyms joined by ", ".
        numbers: class number of each name of the list.
    """
    normal = name.replace(", ", ";").replace(" ", ";")
    return numbers.get(normal) or numbers.get(ALIASES.get(normal, ""), 0)


def build_class_map(names: Mapping[int, str], numbers: Mapping[str, int]) -> Tensor:
    """Class of each raw class, [RAW_CLASSES] int32, from {raw class: name}; raw classes without a name become 0.

    A raw class is the value in the mask, counted from 1: one more than the position in the release's `objectnames`.
    """
    table = torch.zeros(RAW_CLASSES, dtype=torch.int32)
    for raw, name in names.items():
        table[raw] = class_of_name(name, numbers)
    return table


# ------------------------------------------------------------------------------------------------------- JSON files


class Annotation(NamedTuple):
    """What a scene's JSON file says.

    names: of each raw class, the first if several. n_objects: whole objects. remarks: contradictions. part_levels: those
    above 0 that an object is listed at (1: parts of objects, 2: parts of parts …), ascending.
    """

    names: dict[int, str]
    n_objects: int | None
    remarks: list[str]
    part_levels: list[int]


def read_annotation(path: Path, key: str) -> Annotation:
    """Read a scene's JSON; its types are loose (one object stands without its list, numbers come as text).

    Raises:
        UnreadableScene: the file is missing or is no such JSON.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UnreadableScene(key, f"{path} is missing") from None
    except OSError as error:
        raise UnreadableScene(key, f"{path} cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:  # some file names of the sources are Latin-1; no class name is
        text = data.decode("latin-1")
    try:
        objects = json.loads(text, strict=False)["annotation"]["object"]
    except (json.JSONDecodeError, RecursionError) as error:
        raise UnreadableScene(key, f"{path} is truncated or damaged ({error})") from error
    except (KeyError, TypeError):
        raise UnreadableScene(key, f"{path} has no annotation.object") from None
    objects = [objects] if isinstance(objects, dict) else objects or []
    if not isinstance(objects, list) or not all(isinstance(entry, dict) for entry in objects):
        raise UnreadableScene(key, f"{path}: annotation.object is no list of objects")
    names: dict[int, str] = {}
    remarks: list[str] = []
    levels: list[int | None] = []
    for place, entry in enumerate(objects):
        raw, name, parts = _whole(entry.get("name_ndx")), entry.get("name"), entry.get("parts")
        levels.append(_whole(parts.get("part_level")) if isinstance(parts, dict) else None)
        if raw is None or not isinstance(name, str) or not 0 < raw < RAW_CLASSES:
            remarks.append(f"{path.name}: object[{place}] has no usable name and name_ndx")
        elif names.setdefault(raw, name) != name:
            remarks.append(f"{path.name}: class {raw} is called both {names[raw]!r} and {name!r}")
    part_levels = sorted({level for level in levels if level})
    return Annotation(names, None if None in levels else levels.count(0), remarks, part_levels)


def _whole(value: Any) -> int | None:
    """A whole number that may be written as text or as 3.0; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None
