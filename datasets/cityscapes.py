"""Cityscapes, fine annotations: the 19 classes that are evaluated, and the objects of 8 of them.

    <root>/[cityscapes/]leftImg8bit/{train,val}/<city>/<name>_leftImg8bit.png
    <root>/[cityscapes/]gtFine/{train,val}/<city>/<name>_gtFine_labelIds.png     8-bit
    <root>/[cityscapes/]gtFine/{train,val}/<city>/<name>_gtFine_instanceIds.png  16-bit

A label id is one of 35; 19 of them are evaluated and the rest takes part in nothing. An instance id is label * 1000 + k
for object k; of a class with objects, a bare label stands for a group that nobody took apart: its pixels keep their
class and have no identity (-1). The labels of the test set are not public.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from datasets.listings import data_root, list_files
from datasets.pictures import read_image, read_label_map, same_size
from datasets.published import Published, read_classes, table_of
from datasets.scene import Scene, UnreadableScene
from errors import UserError

CLASSES = (
    "unlabelled", "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label ids, in the order of CLASSES
WITH_OBJECTS = (24, 25, 26, 27, 28, 29, 30, 31, 32, 33)  # label ids of humans and vehicles, caravan and trailer among them
LABELS = range(34)  # ids of the masks; the licence plate, -1 in the published table, is stored as 255 or left out
VOID = (0, 1, 2, 3, 255)  # unlabelled, own car, border of rectification, outside; nobody looked for objects there
TABLE = table_of({**dict.fromkeys(LABELS, -1), 255: -1, **{label: n for n, label in enumerate(EVALUATED, start=1)}})
COMPLETE = {"train": 2975, "val": 500}
IMAGE, CLASS, OBJECT = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_instanceIds.png"


class Cityscapes(Published):
    """Street scenes with class and object maps.

    Args:
        root: the folder that holds leftImg8bit and gtFine, or the one `cityscapes` lies in.
        Others: see `Published`.

    Raises:
        UserError: no such folder.
    """

    def __init__(self, split: str, *, root: str | os.PathLike[str], **others: Any) -> None:
        folder = data_root(root, "one with leftImg8bit/ and gtFine/")
        places = [folder, folder / "cityscapes"]
        self.root = next((place for place in places if (place / "leftImg8bit").is_dir()), folder)
        for name in ("leftImg8bit", "gtFine"):
            if not (self.root / name).is_dir():
                raise UserError(
                    f"{self.root / name} is missing: expected {self.root} to hold leftImg8bit/ and gtFine/ "
                    "(scripts/download_cityscapes.sh says where they come from)"
                )
        self.classes = list(CLASSES)
        super().__init__(split, **others)

    def _names(self) -> list[str]:
        images = list_files(self.root / "leftImg8bit" / self.part, IMAGE, deep=True)
        masks = list_files(self.root / "gtFine" / self.part, CLASS, deep=True)
        names = sorted({*images, *masks})  # a missing half is found out
        self.complete = len(names) == COMPLETE[self.part]
        return names

    def _files(self, i: int) -> list[str]:
        key = self.keys[i]
        masks = f"gtFine/{self.part}/{key}"
        return [f"leftImg8bit/{self.part}/{key}{IMAGE}", masks + CLASS, masks + OBJECT]

    def __getitem__(self, i: int) -> Scene:
        """Scene i: "class" 1 … 19 and "identity" (the rank of the instance id), [H, W] int32; -1 as the module says.

        Raises:
            UnreadableScene: a file is missing or damaged, sizes differ, masks contradict each other or hold other values.
        """
        key, (image_path, class_path, object_path) = self.keys[i], [self.root / name for name in self._files(i)]
        image = read_image(image_path, key)
        classes = read_classes(class_path, key, image, TABLE)
        instance = read_label_map(object_path, key)
        same_size(image, instance, object_path, key)
        label = torch.where(instance >= 1000, instance // 1000, instance)
        known = torch.zeros(256, dtype=torch.bool)
        known[[*LABELS, 255]] = True
        if int(label.min()) < 0 or int(label.max()) > 255 or not bool(known[label].all()):
            value = int(instance[(label < 0) | (label > 255) | ~known[label.clamp(0, 255)]][0])
            raise UnreadableScene(key, f"{object_path} has value {value}, expected a label id or label id * 1000 + number")
        if not torch.equal(TABLE[label], classes):
            raise UnreadableScene(key, f"{object_path} and {class_path.name} do not agree on the classes")
        numbers, rank = instance.unique(return_inverse=True)
        objects = (numbers >= 1000).cumsum(0) * (numbers >= 1000)  # rank among the objects, 0 for the rest
        unknown = torch.isin(numbers, torch.tensor((*WITH_OBJECTS, *VOID)))
        identity = torch.where(unknown, -1, objects)[rank].int()
        return Scene(image, {"class": classes, "identity": identity}, key)

    def report(self) -> dict[str, Any]:
        """As `Published.report`, and whether the release is complete."""
        return {**super().report(), "complete": self.complete}
