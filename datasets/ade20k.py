"""ADE20K, full release of 2021-01-17, read from its folder tree and JSON files: no index file, nothing unpickled.

    <root>/[ADE20K_2021_17_01/]images/ADE/{training,validation}/<scene>/…/ADE_{train,val}_########
        .jpg  _seg.png  _parts_{1,2,…}.png  .json  and a folder of that name (one PNG per object: not read)

Classes are the 150 of the scene-parsing benchmark plus 0, found by name as in "Does Object Binding Naturally Emerge in
Large Pretrained Vision Transformers?" (arXiv 2510.24709): an image's own JSON names every class in its masks, so no
image depends on another. `objectInfo150.csv` in the data folder replaces the list that comes with the project.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.ade20k_files import (
    CLASS_LIST,
    RAW_CLASSES,
    build_class_map,
    number_objects,
    read_annotation,
    read_class_list,
    split_segmentation,
)
from datasets.listings import data_root, file_fingerprint, spread
from datasets.pictures import open_picture, read_image, same_size
from datasets.scene import Scene, UnreadableScene, check_choice
from errors import UserError

DECODER_VERSION = 1  # part of the fingerprint: raise it with every change that alters a label
RELEASE = "ADE20K_2021_17_01"
N_TRAINING, N_VALIDATION = 25574, 2000  # images of the complete release
STEM = re.compile(r"ADE_(train|val|test)_(\d{8})")
FOLDERS = {"train": "training", "val": "training", "test": "validation"}


class SplitRule(NamedTuple):
    """How the training folder is cut: contiguously, at `train_ratio`; positions (0-based, by name) that are left out."""

    train_ratio: float
    removed_training: tuple[int, ...]
    removed_validation: tuple[int, ...]


_REMOVED = (7689, 8904, 8905, 20433, 20543, 21029, 22979, 23011, 23048, 24103, 24794)
# 20455 / 5108 / 2000 and 20455 / 5108 / 1999 images. (The newer list also names 27278, which no training image has.)
SPLIT_RULES = {
    "object_binding_2025": SplitRule(0.8, _REMOVED, ()),
    "object_binding_2026": SplitRule(0.8, _REMOVED, (20,)),
}


def find_release(root: str | os.PathLike[str]) -> Path:
    """The folder that holds `images/ADE`: the one named, or `ADE20K_2021_17_01` in it.

    Raises:
        UserError: it is none, or another release of ADE20K.
    """
    start = data_root(root, f"the folder {RELEASE} (datasets/README.md)")
    for folder in (start, start / RELEASE):
        if (folder / "images" / "ADE").is_dir():
            return folder
    for folder in (start, start / "ADEChallengeData2016"):
        if (folder / "annotations").is_dir() and (folder / "images").is_dir():
            raise UserError(
                f"dataset.root: got {folder}, the scene-parsing release ADEChallengeData2016, whose masks tell no objects "
                f"apart; expected the full release {RELEASE} (scripts/download_ade20k.sh says where it comes from)"
            )
    for folder in (start, start / "ADE20K_2016_07_26"):
        if (folder / "images" / "training").is_dir():
            raise UserError(
                f"dataset.root: got {folder}, which looks like the full release of 2016 (no JSON files); expected the "
                f"full release {RELEASE} (scripts/download_ade20k.sh says where it comes from)"
            )
    raise UserError(
        f"dataset.root: got {start}, which has no images/ADE; expected the folder {RELEASE} or the folder it lies in"
    )


def list_stems(folder: Path, release: Path) -> dict[str, str]:
    """{stem: its path below the release, without ending} of all scenes under a folder, sorted by stem.

    A scene counts from any of its files, so that a missing one is found out. The folders of single objects, by far
    the most files of the release, are not entered.

    Raises:
        UserError: one stem in two places.
    """
    paths: dict[str, str] = {}
    waiting = [os.fspath(folder)]
    while waiting:
        place = waiting.pop()
        below = os.path.relpath(place, release).replace(os.sep, "/")
        try:
            with os.scandir(place) as listing:
                entries = list(listing)
        except OSError as error:
            raise UserError(f"cannot list {place}: {error.strerror}") from error
        for entry in entries:
            match = STEM.match(entry.name)
            if match is None:
                if entry.is_dir():
                    waiting.append(entry.path)
            elif entry.name[match.end() :] in (".jpg", "_seg.png", ".json"):
                stem, path = match.group(), f"{below}/{match.group()}"
                if paths.setdefault(stem, path) != path:
                    raise UserError(f"{stem} lies in two places, {paths[stem]} and {path}; remove one")
    return dict(sorted(paths.items()))


class Ade20k:
    """Scenes of the full ADE20K release with object, class and raw-class maps.

    Args:
        split: "train" and "val", cut from the training folder, or "test", the validation folder.
        root: the folder ADE20K_2021_17_01, or the folder it lies in.
        split_rule: a name of SPLIT_RULES: the published cut and the images left out.
        train_ratio, removed_training, removed_validation: replace that part of the rule (positions in the sorted list
            of the complete folder, from 0).
        limit: use at most this many images of the split, evenly spread over it (neighbours show similar places).
        on_error: what the caller does with an unreadable scene, "raise" or "skip".

    Positions are those of the complete release. In a partial tree the place in the list says nothing, so there an
    image's position is its number minus one, which is the same in the complete release: an image is in the same split
    wherever it is found.

    Attributes:
        classes: 151 names (the list's, synonyms joined by ";"), 0 "background" being unlabelled and all other classes.

    Raises:
        UserError: no such folder, another release, a split without an image, an option out of range.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | os.PathLike[str],
        split_rule: str = "object_binding_2025",
        train_ratio: float | None = None,
        removed_training: Sequence[int] | None = None,
        removed_validation: Sequence[int] | None = None,
        limit: int | None = None,
        on_error: str = "raise",
    ) -> None:
        check_choice("split", split, FOLDERS)
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("split_rule", split_rule, SPLIT_RULES)
        replaced = {
            "train_ratio": train_ratio,
            "removed_training": removed_training,
            "removed_validation": removed_validation,
        }
        rule = SPLIT_RULES[split_rule]._replace(**{name: value for name, value in replaced.items() if value is not None})
        if not 0 <= rule.train_ratio <= 1:
            raise UserError(f"dataset.train_ratio: got {rule.train_ratio}, expected a share from 0 to 1")
        self.split, self.on_error, self.split_rule = split, on_error, split_rule
        self.release = find_release(root)
        lists = [folder / "objectInfo150.csv" for folder in (Path(root).expanduser(), self.release)]
        self.class_list = next((path for path in lists if path.exists()), CLASS_LIST)
        names = read_class_list(self.class_list)
        self.classes = ["background", *names]
        self._numbers = {name: number for number, name in enumerate(names, start=1)}

        name = FOLDERS[split]
        folder = self.release / "images" / "ADE" / name
        if not folder.is_dir():
            raise UserError(f"{folder} is missing: split {split} is read from it")
        stems = list_stems(folder, self.release)
        complete = {"training": N_TRAINING, "validation": N_VALIDATION}[name]
        self.complete, self.n_files = len(stems) == complete, len(stems)
        position = {stem: place if self.complete else int(stem.rpartition("_")[2]) - 1 for place, stem in enumerate(stems)}
        removed = set(rule.removed_validation if split == "test" else rule.removed_training)
        boundary = int(rule.train_ratio * N_TRAINING)
        inside = [s for s in stems if split == "test" or (position[s] < boundary) == (split == "train")]
        self.removed = [stem for stem in inside if position[stem] in removed]
        kept = [stem for stem in inside if position[stem] not in removed]
        if not kept:
            raise UserError(
                f"dataset split {split}: none of the {len(stems)} images found under {folder} belongs to it (the tree is "
                f"{'complete' if self.complete else f'partial, {complete} images are the whole'}); the first "
                f"{boundary} of {N_TRAINING} training images are train, the others val: place more images or change "
                "dataset.train_ratio"
            )
        self.keys = spread(kept, limit)
        self._paths = [stems[stem] for stem in self.keys]

    def __len__(self) -> int:
        return len(self.keys)

    def _file(self, i: int, ending: str) -> Path:
        return self.release / (self._paths[i] + ending)

    def _picture(self, i: int, ending: str) -> Image.Image:
        """A mask of scene i, refused unless it is 8-bit RGB."""
        path = self._file(i, ending)
        picture = open_picture(path, self.keys[i])
        if picture.mode != "RGB":
            raise UnreadableScene(self.keys[i], f"{path} is of mode {picture.mode}, expected 8-bit RGB")
        return picture

    def __getitem__(self, i: int) -> Scene:
        """Scene i: "identity", "class", "raw_class" [H, W] int32 and "class_of_raw" [RAW_CLASSES] int32.

        Raises:
            UnreadableScene: a file of it is missing or damaged, or mask and image are of different size.
        """
        key = self.keys[i]
        annotation = read_annotation(self._file(i, ".json"), key)
        image = read_image(self._file(i, ".jpg"), key)
        raw, blue = split_segmentation(self._picture(i, "_seg.png"))
        same_size(image, raw, self._file(i, "_seg.png"), key)
        identity, _ = number_objects(raw, blue, annotation.n_objects)
        table, flat = build_class_map(annotation.names, self._numbers), torch.from_numpy(raw)
        labels = {
            "identity": torch.from_numpy(identity),
            "class": table.index_select(0, flat.flatten()).view_as(flat),
            "raw_class": flat,
            "class_of_raw": table,
        }
        return Scene(image, labels, key)

    def parts(self, i: int) -> list[Tensor]:
        """Raw class of the part at each pixel, one [H, W] int32 map per level of parts the scene has (0: none).

        Raises:
            UnreadableScene: a parts file is damaged.
        """
        maps, level = [], 1
        while self._file(i, f"_parts_{level}.png").exists():
            maps.append(torch.from_numpy(split_segmentation(self._picture(i, f"_parts_{level}.png"))[0]))
            level += 1
        return maps

    def inspect(self, i: int) -> dict[str, Any]:
        """What a scene's files say beyond the Scene, for checking a copy of the data.

        Returns:
            "names": {raw class: name}; "remarks": faults that keep no scene from being used, one sentence each.

        Raises:
            UnreadableScene: as the scene itself.
        """
        annotation = read_annotation(self._file(i, ".json"), self.keys[i])
        remarks = list(annotation.remarks)
        raw, blue = split_segmentation(self._picture(i, "_seg.png"))
        _, rule = number_objects(raw, blue, annotation.n_objects)
        if rule == "class_and_code":
            remarks.append(f"{annotation.n_objects} objects share 255 codes: kept apart by (class, code)")
        elif rule == "rank" and blue.any():
            remarks.append(f"object codes do not fit {annotation.n_objects} objects: numbered by rank")
        present = np.zeros(RAW_CLASSES, bool)
        present[raw] = True
        nameless = [int(value) for value in present.nonzero()[0] if value and int(value) not in annotation.names]
        if nameless:
            remarks.append(f"classes {nameless} of the mask have no name in the JSON: class 0")
        files = {level: self._file(i, f"_parts_{level}.png") for level in annotation.part_levels}
        remarks += [f"{file} is missing, the JSON lists parts of level {n}" for n, file in files.items() if not file.exists()]
        try:
            parts = self.parts(i)
        except UnreadableScene as error:
            remarks.append(error.reason)
        else:
            if any(part.shape != raw.shape for part in parts):
                remarks.append("a parts map is of another size than the mask")
        return {"names": annotation.names, "remarks": remarks}

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        names = (path + ending for path in self._paths for ending in (".jpg", "_seg.png", ".json"))
        list_digest = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16).hexdigest()
        return {"decoder": DECODER_VERSION, "class_list": list_digest, **file_fingerprint(self.release, names)}

    def fingerprint(self) -> dict[str, Any]:
        """Digests of the list of files (name, size, time) and of the class list."""
        return dict(self._fingerprint)

    def info(self) -> dict[str, float]:
        """No constants."""
        return {}

    def report(self) -> dict[str, Any]:
        """Release found, how complete it is, and the images the split rule leaves out."""
        shipped = self.class_list == CLASS_LIST
        return {
            "release": RELEASE,
            "folder": str(self.release / "images" / "ADE" / FOLDERS[self.split]),
            "complete": self.complete,
            "images_in_folder": self.n_files,
            "split_rule": self.split_rule,
            "removed": list(self.removed),
            "images": len(self),
            "class_list": "objectInfo150.csv of the project" if shipped else str(self.class_list),
        }
