"""PASCAL VOC 2012 segmentation: 20 classes and background, objects apart where the masks of VOC itself are used.

Two published layouts:

    <root>/[VOCdevkit/][VOC2012/]                    as VOC gives it, SBD's masks added
        JPEGImages/<name>.jpg   SegmentationClass/<name>.png   SegmentationObject/<name>.png   SegmentationClassAug/<name>.png
        ImageSets/Segmentation/{train,val,trainaug}.txt
    <root>/[VOCSegmentation/]                        as NeCo and Hummingbird have it
        images/<name>.jpg   SegmentationClass/<name>.png   SegmentationClassAug/<name>.png   sets/{train,val,trainaug}.txt

Masks are palette or grey PNGs: 0 background, 1 … 20 classes (1, 2, … objects), 255 the void border, which takes part in
nothing (-1). `trainaug` (10 582 images) adds the masks of the Semantic Boundaries Dataset (Hariharan et al. 2011).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from datasets.listings import data_root, read_names
from datasets.pictures import read_image, read_label_map, same_size
from datasets.published import Published, read_classes, table_of
from datasets.scene import Scene, check_choice
from errors import UserError

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255
COMPLETE = {"train": 1464, "trainaug": 10582, "val": 1449}  # images of the published lists
TABLE = table_of({**{number: number for number in range(len(CLASSES))}, VOID: -1})


class Layout(NamedTuple):
    """Folders of a published layout; masks of the training sets and of the validation set."""

    images: str
    lists: tuple[str, ...]
    masks: dict[str, str]


OFFICIAL = Layout(
    "JPEGImages",
    ("ImageSets/Segmentation", "ImageSets/SegmentationAug"),
    {"train": "SegmentationClass", "trainaug": "SegmentationClassAug", "val": "SegmentationClass"},
)
# Here every training mask comes from SegmentationClassAug, as the two programs that use the layout read it.
REARRANGED = Layout(
    "images", ("sets",), {"train": "SegmentationClassAug", "trainaug": "SegmentationClassAug", "val": "SegmentationClass"}
)


def find_layout(root: str | os.PathLike[str]) -> tuple[Path, Layout]:
    """The folder that holds the images folder, and its layout.

    Raises:
        UserError: neither layout is there.
    """
    folder = data_root(root, "one with VOCdevkit/VOC2012 or VOCSegmentation")
    for place in (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"):
        if (place / OFFICIAL.images).is_dir():
            return place, OFFICIAL
    for place in (folder, folder / "VOCSegmentation"):
        if (place / REARRANGED.images).is_dir() and (place / "sets").is_dir():
            return place, REARRANGED
    raise UserError(
        f"dataset.root: got {folder}, which has neither JPEGImages (VOCdevkit/VOC2012) nor images and sets (VOCSegmentation); "
        "scripts/download_voc.sh makes the former"
    )


class Voc(Published):
    """VOC 2012 images with class maps, and object maps with `train_set=train` where SegmentationObject is there.

    SBD has no object masks in this form, so `trainaug` yields classes alone, in every split.

    Args:
        root: a folder of one of the two layouts, or the one it lies in.
        train_set: "train" (1464 images) or "trainaug" (10 582).
        Others: see `Published`.

    Raises:
        UserError: no such layout, a list that is missing.
    """

    BACKGROUND_IS_A_CLASS = True

    def __init__(self, split: str, *, root: str | os.PathLike[str], train_set: str = "train", **others: Any) -> None:
        check_choice("train_set", train_set, ("train", "trainaug"))
        self.root, self.layout = find_layout(root)
        self.train_set, self.classes = train_set, list(CLASSES)
        self.has_objects = train_set == "train" and (self.root / "SegmentationObject").is_dir()
        super().__init__(split, **others)

    @property
    def _list(self) -> str:
        return self.train_set if self.part == "train" else "val"

    def _names(self) -> list[str]:
        files = [self.root / folder / f"{self._list}.txt" for folder in self.layout.lists]
        path = next((file for file in files if file.exists()), files[0])
        names = read_names(path)
        self.complete = len(names) == COMPLETE[self._list]
        return sorted(names)

    def _files(self, i: int) -> list[str]:
        key = self.keys[i]
        files = [f"{self.layout.images}/{key}.jpg", f"{self.layout.masks[self._list]}/{key}.png"]
        return [*files, f"SegmentationObject/{key}.png"] if self.has_objects else files

    def __getitem__(self, i: int) -> Scene:
        """Scene i: "class" and perhaps "identity", [H, W] int32; -1 at the void border.

        Raises:
            UnreadableScene: a file is missing or damaged, sizes differ, a mask has a value that is no class.
        """
        key, paths = self.keys[i], [self.root / name for name in self._files(i)]
        image = read_image(paths[0], key)
        labels = {"class": read_classes(paths[1], key, image, TABLE)}
        if self.has_objects:
            identity = read_label_map(paths[2], key)
            same_size(image, identity, paths[2], key)
            labels["identity"] = identity.masked_fill(identity == VOID, -1)
        return Scene(image, labels, key)

    def fingerprint(self) -> dict[str, Any]:
        """As `Published.fingerprint`; which masks are read is part of the names."""
        return {**super().fingerprint(), "train_set": self.train_set}

    def report(self) -> dict[str, Any]:
        """As `Published.report`; the list that is read and whether it is the whole published one."""
        return {**super().report(), "list": self._list, "complete": self.complete, "object_maps": self.has_objects}
