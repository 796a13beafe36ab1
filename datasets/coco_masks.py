"""COCO annotations of objects: categories, the JSON file, and masks from polygons and run lengths (pycocotools).

A segmentation is a list of polygons [x0, y0, x1, y1, …]; or run lengths {"size": [H, W], "counts": …}, counted down the
columns, as a list of numbers (crowd regions) or as the compressed text of pycocotools. Everything is checked before
pycocotools sees it: its C code believes what it gets.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from datasets.metadata import Entry, read_json

KEPT = ("id", "category_id", "iscrowd", "segmentation")  # of an annotation
CATEGORIES = Path(__file__).parent / "coco_categories.csv"


class Category(NamedTuple):
    """A COCO category: number, name, supercategory, "thing" or "stuff"."""

    id: int
    name: str
    supercategory: str
    kind: str


class ImageObjects(NamedTuple):
    """An image of an annotation file: name of the file, size in pixels, its annotations as JSON (see `read_instances`)."""

    file_name: str
    height: int
    width: int
    annotations: bytes


def read_categories() -> list[Category]:
    """The 80 thing and 91 stuff categories of COCO, in the order of their numbers."""
    with open(CATEGORIES, newline="", encoding="utf-8") as file:
        return [Category(int(row["id"]), row["name"], row["supercategory"], row["kind"]) for row in csv.DictReader(file)]


def read_instances(path: Path, categories: Mapping[int, Category]) -> dict[str, ImageObjects]:
    """{stem of the image: its objects} of an instances file, sorted; images without objects are among them.

    The annotations of an image are kept as text, a tenth of what they take as Python lists (train2017: 860 000 objects).

    Args:
        path: such as annotations/instances_val2017.json.
        categories: by number; the names in the file must be theirs.

    Raises:
        UserError: the file is missing or damaged, or an entry is wrong; entry and key are named.
    """
    content = read_json(path, missing="scripts/download_coco.sh says where the annotations come from")
    for entry in content.key("categories").each():
        number = entry.key("id").whole()
        if number not in categories or entry.key("name").text() != categories[number].name:
            raise entry.wrong("a category of COCO")
    images: dict[int, Entry] = {}
    for entry in content.key("images").each():
        number = entry.key("id").whole()
        if number in images:
            raise entry.key("id").wrong("every image once")
        images[number] = entry
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    seen: set[int] = set()
    listed = content.key("annotations")
    for place, annotation in enumerate(listed.value if isinstance(listed.value, list) else listed.each()):
        if not _is_sound(annotation, images, categories, seen):  # the quick look; the slow one says what is wrong
            _explain(Entry(annotation, listed, place), images, categories, seen)
        seen.add(annotation["id"])
        objects[annotation["image_id"]].append({name: annotation.get(name, 0) for name in KEPT})
    by_stem = {}
    for number, entry in images.items():
        name = entry.key("file_name").text()
        stem = name.rpartition(".")[0]
        if not stem or "/" in name or "\\" in name or stem in by_stem:
            raise entry.key("file_name").wrong("the name of a picture file, each once")
        size = (entry.key(side).whole(1, 65535) for side in ("height", "width"))
        by_stem[stem] = ImageObjects(name, *size, json.dumps(objects.pop(number)).encode())
    return dict(sorted(by_stem.items()))


def _is_sound(annotation: Any, images: Mapping[int, Entry], categories: Mapping[int, Category], seen: set[int]) -> bool:
    """Whether an annotation has everything in its kind and range."""
    try:
        return (
            annotation["image_id"] in images
            and annotation["category_id"] in categories
            and type(annotation["id"]) is type(annotation["image_id"]) is type(annotation["category_id"]) is int
            and annotation["id"] not in seen
            and annotation.get("iscrowd", 0) in (0, 1)
            and isinstance(annotation["segmentation"], list | dict)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _explain(entry: Entry, images: Mapping[int, Entry], categories: Mapping[int, Category], seen: set[int]) -> None:
    """Raise the error that names the key of an annotation that is not sound."""
    if entry.key("image_id").whole() not in images:
        raise entry.key("image_id").wrong("the id of an image of this file")
    if entry.key("category_id").whole() not in categories:
        raise entry.key("category_id").wrong("a category of COCO")
    if entry.key("id").whole() in seen:
        raise entry.key("id").wrong("every annotation once")
    if entry.has("iscrowd"):
        entry.key("iscrowd").whole(0, 1)
    raise entry.key("segmentation").wrong("polygons or run lengths")


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels of an object, [H, W] bool.

    Raises:
        ValueError: neither polygons nor run lengths of that size; the text says what is wrong.
    """
    if isinstance(segmentation, list):
        if not segmentation:
            return np.zeros((height, width), bool)
        runs = coco_mask.merge(coco_mask.frPyObjects([_check_polygon(polygon) for polygon in segmentation], height, width))
        return coco_mask.decode(runs).astype(bool)
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        size = segmentation.get("size") if isinstance(segmentation, dict) else segmentation
        raise ValueError(f"run lengths of size {size}, its image is [{height}, {width}]")
    counts = segmentation.get("counts")
    runs = _runs_of_text(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"run lengths that do not sum to the {height * width} pixels of the image")
    if not isinstance(counts, str):
        segmentation = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    return coco_mask.decode(segmentation).astype(bool)


def _check_polygon(polygon: Any) -> list[float]:
    """A polygon of at least three corners, in numbers that a picture can have (which NaN and infinity are not)."""
    numbers = isinstance(polygon, list) and all(type(x) in (int, float) and abs(x) < 1e6 for x in polygon)
    if not numbers or len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon that is no list of at least three corners (x, y)")
    return polygon


def _runs_of_text(text: str) -> list[int] | None:
    """Run lengths of pycocotools' compressed text: 5 bits per character, from the third run on less the one two before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 50:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs if not shift else None
