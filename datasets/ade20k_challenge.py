"""ADE20K of the 2016 scene-parsing challenge: maps of 150 classes, no objects (the full release is `ade20k`).

    <root>/[ADEChallengeData2016/]images/{training,validation}/ADE_{train,val}_########.jpg
    <root>/[ADEChallengeData2016/]annotations/{training,validation}/ADE_{train,val}_########.png

Masks are grey PNGs: 1 … 150 as in objectInfo150.txt, 0 "other", which published evaluations leave out.
"""

from __future__ import annotations

import os
from typing import Any

from datasets.ade20k_files import CLASS_LIST, read_class_list
from datasets.listings import data_root, list_files
from datasets.pictures import read_image
from datasets.published import Published, check_unlabelled, read_classes, table_of
from datasets.scene import Scene
from errors import UserError

COMPLETE = {"train": 20210, "val": 2000}
FOLDERS = {"train": "training", "val": "validation"}


class Ade20kChallenge(Published):
    """Images of ADEChallengeData2016 with class maps.

    Args:
        root: the folder ADEChallengeData2016, or the one it lies in.
        unlabelled: what value 0 ("other") is: "ignore" (published) makes it -1, "background" a class of its own.
        Others: see `Published`.

    Raises:
        UserError: no such folder, or the full release.
    """

    def __init__(self, split: str, *, root: str | os.PathLike[str], unlabelled: str = "ignore", **others: Any) -> None:
        folder = data_root(root, "the folder ADEChallengeData2016")
        places = [place for place in (folder, folder / "ADEChallengeData2016") if (place / "annotations").is_dir()]
        if not places or not (places[0] / "images").is_dir():
            full = any((place / "images" / "ADE").is_dir() for place in (folder, folder / "ADE20K_2021_17_01"))
            reason = "is the full release of ADE20K (dataset=ade20k)" if full else "has no images/ and annotations/"
            raise UserError(
                f"dataset.root: got {folder}, which {reason}; expected the folder ADEChallengeData2016 "
                "(scripts/download_ade20k_challenge.sh)"
            )
        self.root, self.unlabelled = places[0], unlabelled
        self.classes = ["other", *read_class_list(CLASS_LIST)]
        numbers = {number: number for number in range(1, len(self.classes))}
        self._table = table_of({**numbers, 0: check_unlabelled(unlabelled)})
        super().__init__(split, **others)

    def _names(self) -> list[str]:
        folder = FOLDERS[self.part]
        images = list_files(self.root / "images" / folder, ".jpg")
        names = sorted({*images, *list_files(self.root / "annotations" / folder, ".png")})  # a missing half is found out
        self.complete = len(names) == COMPLETE[self.part]
        return names

    def _files(self, i: int) -> list[str]:
        folder = FOLDERS[self.part]
        return [f"images/{folder}/{self.keys[i]}.jpg", f"annotations/{folder}/{self.keys[i]}.png"]

    def __getitem__(self, i: int) -> Scene:
        """Scene i: "class" [H, W] int32, 1 … 150; 0 and -1 as `unlabelled` says.

        Raises:
            UnreadableScene: a file is missing or damaged, sizes differ, a mask has a value that is no class.
        """
        key, (image_path, mask_path) = self.keys[i], [self.root / name for name in self._files(i)]
        image = read_image(image_path, key)
        return Scene(image, {"class": read_classes(mask_path, key, image, self._table)}, key)

    def fingerprint(self) -> dict[str, Any]:
        """As `Published.fingerprint`, and what value 0 is."""
        return {**super().fingerprint(), "unlabelled": self.unlabelled}

    def report(self) -> dict[str, Any]:
        """As `Published.report`, and whether the release is complete."""
        background = self.unlabelled == "background"
        return {**super().report(), "complete": self.complete, "background_is_a_class": background}
