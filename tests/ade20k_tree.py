"""Writes tiny trees in the format of the full ADE20K release (2021_17_01), for tests that need one."""

import json
from math import floor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

RELEASE = "ADE20K_2021_17_01"
NAMES = {  # raw class -> name as the release spells it
    64: "ashcan, trash can, garbage can, wastebin, ash bin, ash-bin, ashbin, dustbin, trash barrel, trash bin",
    401: "car, auto, automobile, machine, motorcar",
    461: "central reservation",  # none of the 150
    774: "door",  # by the special case
    1831: "person, individual, someone, somebody, mortal, soul",
    2420: "sky",
    2855: "tree",
}
PART_NAMES = {3035: "wheel", 1279: "housing"}
FIRST_VAL_NUMBER = 20460  # file numbers from here on are val under the published cut


class Written(NamedTuple):
    """What a written scene holds: number of the object (paint order) and raw class at each pixel, [H, W]."""

    stem: str
    folder: Path
    order: np.ndarray
    raw: np.ndarray

    def file(self, ending: str) -> Path:
        return self.folder / f"{self.stem}{ending}"


def encode(raw: np.ndarray, order: np.ndarray, n_objects: int) -> Image.Image:
    """A mask picture: R and G the class, B the object (k of K objects)."""
    blue = np.array([floor(255 * k / max(1, n_objects) + 0.5) for k in range(int(order.max()) + 1)], np.uint8)
    return Image.fromarray(np.stack([raw // 256 * 10, raw % 256, blue[order]], axis=-1).astype(np.uint8))


def entry(number: int, raw: int, name: str, level: int = 0, parent: int | None = None) -> dict[str, Any]:
    """An object of a scene's JSON, with the loose types of the release."""
    return {
        "id": number,
        "name": name,
        "name_ndx": raw,
        "hypernym": [],
        "raw_name": name.split(",")[0],
        "attributes": [],
        "depth_ordering_rank": number + 1,
        "occluded": "no" if number % 2 else [],
        "crop": "0",
        "parts": {"hasparts": [], "ispartof": [] if parent is None else parent, "part_level": level},
        "instance_mask": f"x/instance_{number:03d}.png",
        "polygon": {"x": [0, 1, 1], "y": [0, 0, 1], "click_date": []},
        "saved_date": "18-Dec-2005 06:56:48",
    }


def write_scene(
    folder: Path,
    stem: str,
    order: np.ndarray,
    classes: list[int],
    *,
    parts: bool = True,
    names: dict[int, str] | None = None,
    seed: int = 0,
) -> Written:
    """Write one scene: object k = 1 … K of `order` [H, W] has raw class classes[k - 1]; 0 is unlabelled."""
    known = {**NAMES, **PART_NAMES, **(names or {})}
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, int(stem[-8:])])
    raw = np.array([0, *classes])[order]
    colours = rng.integers(0, 256, (len(classes) + 1, 3))
    picture = np.clip(colours[order] + rng.normal(0, 8, (*order.shape, 3)), 0, 255).astype(np.uint8)
    written = Written(stem, folder, order, raw)
    Image.fromarray(picture).save(written.file(".jpg"), quality=92)
    encode(raw, order, len(classes)).save(written.file("_seg.png"))
    objects = [entry(i, value, known[value]) for i, value in enumerate(classes)]
    if parts:
        level_1 = np.zeros_like(order)
        level_1[: order.shape[0] // 4] = 1
        encode(np.array([0, 3035])[level_1], level_1, 1).save(written.file("_parts_1.png"))
        objects.append(entry(len(objects), 3035, known[3035], level=1, parent=0))
    height, width = order.shape
    annotation = {
        "filename": f"{stem}.jpg",
        "folder": "ADE20K_2021_17_01/images/ADE/training/urban/street",
        "imsize": [height, width, 3],
        "source": {"folder": "x", "filename": "x.jpg", "origin": "x"},
        "scene": ["outdoor", "urban", "street"],
        "object": objects[0] if len(objects) == 1 else objects,  # as the release's exporter does
    }
    written.file(".json").write_text(json.dumps({"annotation": annotation}), encoding="utf-8")
    (folder / stem).mkdir(exist_ok=True)
    Image.fromarray(((order == 1) * 255).astype(np.uint8)).save(folder / stem / f"instance_000_{stem}.png")
    return written


def blocks(size: tuple[int, int], n_objects: int, seed: int) -> np.ndarray:
    """A map [H, W] of K rectangles on unlabelled ground; the first quarter of the rows stays unlabelled."""
    height, width = size
    rng = np.random.default_rng(seed)
    order = np.zeros(size, np.int64)
    for k in range(1, n_objects + 1):
        y, x = rng.integers(height // 4, height * 3 // 4), rng.integers(0, width * 3 // 4)
        order[y : y + height // 4, x : x + width // 4] = k
    return order


def write_ade20k_tree(
    root: Path, n_train: int = 4, n_val: int = 2, n_test: int = 2, size: tuple[int, int] = (48, 64), n_objects: int = 5
) -> dict[str, Written]:
    """Write `<root>/ADE20K_2021_17_01` with that many scenes per split (of the published cut).

    Args:
        root: the folder the release is to lie in.
        n_train, n_val: scenes of the training folder that are train and val, by their file numbers.
        n_test: scenes of the validation folder.
        size: (height, width) in pixels.
        n_objects: whole objects per scene.

    Returns:
        What was written, by stem, sorted.
    """
    numbers = [("train", 1 + i) for i in range(n_train)]
    numbers += [("train", FIRST_VAL_NUMBER + i) for i in range(n_val)]
    numbers += [("val", 1 + i) for i in range(n_test)]
    found = {}
    for place, (kind, number) in enumerate(numbers):
        scene = ("urban/street", "home_or_hotel/bedroom")[place % 2]
        folder = root / RELEASE / "images" / "ADE" / {"train": "training", "val": "validation"}[kind] / scene
        stem = f"ADE_{kind}_{number:08d}"
        classes = [list(NAMES)[(place + i) % len(NAMES)] for i in range(n_objects)]
        found[stem] = write_scene(folder, stem, blocks(size, n_objects, place), classes)
    return dict(sorted(found.items()))
