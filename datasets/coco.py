"""COCO 2017: things with their objects, stuff, or both, merged to supercategories as published or in full.

    <root>/images/{train,val}2017/<name>.jpg          or <root>/{train,val}2017
    <root>/annotations/instances_{train,val}2017.json things with `masks=annotations`: polygons and run lengths
    <root>/annotations/{train,val}2017/<name>.png     things with `masks=pixelmaps`: category numbers (made from the panoptic
                                                      masks), no objects
    <root>/annotations/[stuff_annotations/]stuff_{train,val}2017_pixelmaps/<name>.png    stuff: category numbers, 0 things

Merged, things are 12 classes and stuff 15: the supercategories in alphabetical order, which is the protocol of NeCo and
Hummingbird. In full they are 80 and 91. What the chosen kind does not label takes part in nothing (-1).

Left open by COCO and chosen here: objects that overlap are painted from the largest mask to the smallest, equal ones in
the order of their ids; a crowd region lies below all of them, keeps its class, and has no identity (-1), because it is
several objects that nobody took apart.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.coco_masks import ImageObjects, decode_mask, read_categories, read_instances
from datasets.listings import data_root, list_files
from datasets.pictures import read_image
from datasets.published import Published, check_unlabelled, read_classes, table_of
from datasets.scene import Scene, UnreadableScene, check_choice
from errors import UserError

COMPLETE = {"train": 118287, "val": 5000}
OTHER = 183  # of stuff pixel maps: labelled, of no category
KINDS = {"things": ("thing",), "stuff": ("stuff",), "all": ("thing", "stuff")}


class Coco(Published):
    """COCO 2017 images with class maps, and object maps where things are read from their annotations.

    Args:
        root: the folder that holds images/ and annotations/.
        labels: "things", "stuff" or "all" (things on top of stuff).
        merge: supercategories as classes (12, 15, 27); false: categories (80, 91, 171).
        masks: where things are read from: "annotations" (classes and objects) or "pixelmaps" (classes; not with `all`).
        unlabelled: what pixels without a label of the kind are: "ignore" (published) makes them -1, "background" 0.
        Others: see `Published`.

    Raises:
        UserError: no such folders, a damaged annotation file.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | os.PathLike[str],
        labels: str = "things",
        merge: bool = True,
        masks: str = "annotations",
        unlabelled: str = "ignore",
        **others: Any,
    ) -> None:
        check_choice("labels", labels, KINDS)
        check_choice("masks", masks, ("annotations", "pixelmaps"))
        if labels == "all" and masks == "pixelmaps":
            raise UserError("dataset.masks: got pixelmaps with labels=all, expected annotations, which have the things")
        self.root = data_root(root, "one with images/ and annotations/")
        self.kind, self.merge, self.masks = labels, merge, masks
        self._nothing, self.unlabelled = check_unlabelled(unlabelled), unlabelled
        self._categories = {category.id: category for category in read_categories()}
        self.classes, self._class_of = self._number_classes()
        self._objects: dict[str, ImageObjects] = {}
        super().__init__(split, **others)
        self._objects = {key: self._objects[key] for key in self.keys} if self._objects else {}

    def _number_classes(self) -> tuple[list[str], dict[int, int]]:
        """Names of the classes and {category: class}; things before stuff."""
        names, class_of = ["unlabelled"], {}
        for kind in KINDS[self.kind]:
            members = [category for category in self._categories.values() if category.kind == kind]
            name_of = {c.id: c.supercategory if self.merge else c.name for c in members}
            ordered = sorted(set(name_of.values())) if self.merge else list(name_of.values())
            number_of = {name: number for number, name in enumerate(ordered, start=len(names))}
            class_of |= {number: number_of[name] for number, name in name_of.items()}
            names += ordered
        return names, class_of

    @property
    def has_objects(self) -> bool:
        """Whether there are identity maps."""
        return self.kind != "stuff" and self.masks == "annotations"

    def _folder(self, *places: str) -> str:
        """The first of some folders below the root that is there; else the first."""
        return next((place for place in places if (self.root / place).is_dir()), places[0])

    @property
    def _annotations(self) -> Path:
        return self.root / "annotations" / f"instances_{self.part}2017.json"

    @property
    def _images(self) -> str:
        return self._folder(f"images/{self.part}2017", f"{self.part}2017")

    @property
    def _pixel_maps(self) -> str | None:
        """The folder of class maps, if the labels need one."""
        if self.kind == "things":
            return None if self.masks == "annotations" else f"annotations/{self.part}2017"
        name = f"stuff_{self.part}2017_pixelmaps"
        return self._folder(f"annotations/stuff_annotations/{name}", f"annotations/{name}")

    def _names(self) -> list[str]:
        things = {number: category for number, category in self._categories.items() if category.kind == "thing"}
        if self.has_objects:
            self._objects = read_instances(self._annotations, things)
            names = list(self._objects)
        else:  # from both folders, so that a missing half is found out
            maps = list_files(self.root / str(self._pixel_maps), ".png")
            names = sorted({*list_files(self.root / self._images, ".jpg"), *maps})
        self.complete = len(names) == COMPLETE[self.part]
        return names

    def _files(self, i: int) -> list[str]:
        key = self.keys[i]
        name = self._objects[key].file_name if self.has_objects else f"{key}.jpg"
        return [f"{self._images}/{name}", *([] if self._pixel_maps is None else [f"{self._pixel_maps}/{key}.png"])]

    def __getitem__(self, i: int) -> Scene:
        """Scene i: "class" and, where there are objects, "identity" (1, 2, … in the order of the annotations' ids).

        Raises:
            UnreadableScene: a file is missing or damaged, sizes differ, a mask is wrong or has a value of no category.
        """
        key, paths = self.keys[i], [self.root / name for name in self._files(i)]
        image = read_image(paths[0], key)
        height, width = image.shape[1:]
        classes = torch.full((height, width), self._nothing, dtype=torch.int32)
        if self._pixel_maps is not None:
            classes = read_classes(paths[1], key, image, self._table())
        if not self.has_objects:
            return Scene(image, {"class": classes}, key)
        return Scene(image, {"class": classes, "identity": self._paint(key, classes)}, key)

    def _table(self) -> Tensor:
        """Classes of the values of a pixel map: of stuff 0 is a thing; of things everything from 92 on is stuff."""
        kind = "thing" if self.kind == "things" else "stuff"
        others = [0, *range(92, 256)] if kind == "thing" else [0, OTHER]
        of_kind = {c.id: self._class_of[c.id] for c in self._categories.values() if c.kind == kind}
        return table_of({**dict.fromkeys(others, self._nothing), **of_kind})

    def _paint(self, key: str, classes: Tensor) -> Tensor:
        """Paint the objects of an image into its class map [H, W]; returns the identity map [H, W] int32."""
        facts = self._objects[key]
        height, width = classes.shape
        if (facts.height, facts.width) != (height, width):
            raise UnreadableScene(
                key,
                f"its annotations in {self._annotations} are of {facts.width}x{facts.height} pixels, {facts.file_name} has "
                f"{width}x{height}",
            )
        layers = []
        annotations = sorted(json.loads(facts.annotations), key=lambda annotation: annotation["id"])
        for number, annotation in enumerate((a for a in annotations if not a["iscrowd"]), start=1):
            annotation["number"] = number
        for annotation in annotations:
            try:
                mask = torch.from_numpy(decode_mask(annotation["segmentation"], facts.height, facts.width))
            except (ValueError, TypeError) as error:
                raise UnreadableScene(key, f"annotation {annotation['id']} in {self._annotations} has {error}") from None
            layers.append((not annotation["iscrowd"], -int(mask.sum()), annotation["id"], mask, annotation))
        identity = torch.zeros_like(classes)
        for *_, mask, annotation in sorted(layers, key=lambda layer: layer[:3]):
            classes[mask] = self._class_of[annotation["category_id"]]
            identity[mask] = -1 if annotation["iscrowd"] else annotation["number"]
        return identity

    def fingerprint(self) -> dict[str, Any]:
        """As `Published.fingerprint`, the annotation file, and how labels are made of it."""
        made = {"labels": self.kind, "merge": self.merge, "masks": self.masks, "unlabelled": self.unlabelled}
        if self.has_objects:
            status = os.stat(self.root / "annotations" / f"instances_{self.part}2017.json")
            made["annotations"] = [status.st_size, status.st_mtime_ns]
        return {**super().fingerprint(), **made}

    def report(self) -> dict[str, Any]:
        """As `Published.report`; the kind of labels and whether the release is complete."""
        background = self.unlabelled == "background"
        facts = {"labels": self.kind, "merged": self.merge, "object_maps": self.has_objects, "complete": self.complete}
        return {**super().report(), **facts, "background_is_a_class": background}
