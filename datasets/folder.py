"""A user's own images with identity maps, class maps, or both.

    <root>/images/[train|val|test/]…/<stem>.jpg       or .jpeg .png .webp .bmp .tif .tiff
    <root>/identity/[train|val|test/]…/<stem>.png     8- or 16-bit grey, or palette: 0 background, objects 1, 2, …
    <root>/class/[train|val|test/]…/<stem>.png        alike: 0 unlabelled or background, class numbers of classes.txt
    <root>/classes.txt                                with class/: one name per line, line n names class n

Without class maps every object is of the one class "object"; without identity maps only questions about classes can be
asked. With split folders under images/, they are the splits; without, every image is put into one by the hash of its
name, so that adding images moves no other.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from typing import Any

from datasets.listings import data_root, file_fingerprint, list_images, place_by_hash, spread
from datasets.pictures import read_image, read_label_map, same_size
from datasets.scene import Scene, UnreadableScene, check_choice
from datasets.splits import SPLITS
from errors import UserError

READER_VERSION = 1  # part of the fingerprint: raise it with every change that alters a label
MAPS = ("identity", "class")


class Folder:
    """Images and label PNGs of a folder (the layout is in the module's text).

    Args:
        split: "train", "val" or "test".
        root: the folder that holds images/, and identity/ or class/ or both.
        val_fraction, test_fraction: share of the images in these splits where images/ has no split folders.
        split_seed: another number cuts otherwise.
        ignore: value of pixels, in identity and class maps, that take part in nothing (often 255); they become -1.
        limit: use at most this many images of the split, evenly spread over the sorted names.
        on_error: what the caller does with an unreadable scene, "raise" or "skip".

    Pictures are turned upright as their EXIF orientation says, as the tools do that masks are painted with.

    Raises:
        UserError: the layout is not there, a split without an image, an option out of range.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | os.PathLike[str],
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        ignore: int | None = None,
        limit: int | None = None,
        on_error: str = "raise",
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("on_error", on_error, ("raise", "skip"))
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction <= 1):
            raise UserError(
                f"dataset.val_fraction and test_fraction: got {val_fraction} and {test_fraction}, expected shares of at "
                "least 0 that sum to at most 1"
            )
        if ignore is not None and not (0 < ignore < 65536 and ignore == int(ignore)):
            raise UserError(f"dataset.ignore: got {ignore}, expected a pixel value from 1 to 65535, or null")
        self.split, self.on_error, self.ignore = split, on_error, ignore
        self.root = data_root(root, "one with images/, and identity/ or class/ or both")
        self.maps = [name for name in MAPS if (self.root / name).is_dir()]
        if not (self.root / "images").is_dir() or not self.maps:
            missing = "identity" if (self.root / "images").is_dir() else "images"
            raise UserError(
                f"{self.root / missing} is missing: expected {self.root} to hold images/, and identity/ or class/ or both"
            )
        self.classes = self._class_names() if "class" in self.maps else ["background", "object"]

        images = list_images(self.root / "images")
        self.split_folders = any((self.root / "images" / name).is_dir() for name in SPLITS)
        if self.split_folders:
            outside = next((key for key in images if key.split("/")[0] not in SPLITS), None)
            if outside is not None:
                raise UserError(
                    f"{self.root / 'images' / outside}{images[outside]} lies outside the folders train, val and test that "
                    "images/ has: move it into one of them"
                )
            keys = [key for key in images if key.split("/")[0] == split]
        else:
            keys = [key for key in images if place_by_hash(key, val_fraction, test_fraction, split_seed) == split]
        if not keys:
            remedy = (
                f"put images into {self.root / 'images' / split}"
                if self.split_folders
                else f"add images, make folders images/{split} and {self.maps[0]}/{split}, or change dataset.split_seed"
            )
            raise UserError(f"dataset split {split}: none of the {len(images)} images in {self.root} belongs to it; {remedy}")
        self.keys = spread(keys, limit)
        self._endings = [images[key] for key in self.keys]

    def _class_names(self) -> list[str]:
        """Names of the classes 0 … K; a first line "background" or "unlabelled" may stand for class 0."""
        path = self.root / "classes.txt"
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except FileNotFoundError:
            raise UserError(f"{path} is missing: with {self.root / 'class'}, line n of it names class n") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}), expected one class name per line (UTF-8)") from error
        if names and names[0].lower() in ("background", "unlabelled", "unlabeled"):
            names = names[1:]
        if not names or len(set(names)) != len(names):
            raise UserError(f"{path}: got {len(names)} names, {len(set(names))} different; expected each class once")
        return ["background", *names]

    def __len__(self) -> int:
        return len(self.keys)

    def _names(self, i: int) -> list[str]:
        """Files of scene i, below the root."""
        return [f"images/{self.keys[i]}{self._endings[i]}", *(f"{kind}/{self.keys[i]}.png" for kind in self.maps)]

    def __getitem__(self, i: int) -> Scene:
        """Scene i: "identity" as in the file and "class", as far as there are maps, [H, W] int32; -1 where ignored.

        Raises:
            UnreadableScene: a file is missing or damaged, sizes differ, a class has no name.
        """
        key, (image_file, *map_files) = self.keys[i], [self.root / name for name in self._names(i)]
        image = read_image(image_file, key, upright=True)
        labels = {}
        for kind, path in zip(self.maps, map_files, strict=True):
            label_map = read_label_map(path, key)
            same_size(image, label_map, path, key)
            if self.ignore is not None:
                label_map[label_map == self.ignore] = -1
            labels[kind] = label_map
            highest = int(label_map.max())
            if kind == "class" and highest >= len(self.classes):
                raise UnreadableScene(
                    key, f"{path} has class {highest}, but {self.root / 'classes.txt'} names {len(self.classes) - 1} classes"
                )
        if "class" not in labels:
            labels["class"] = labels["identity"].sign()
        return Scene(image, labels, key)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        names = (name for i in range(len(self)) for name in self._names(i))
        classes = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16).hexdigest()
        facts = {"reader": READER_VERSION, "classes": classes, "ignore": self.ignore, "maps": self.maps}
        return {**facts, **file_fingerprint(self.root, names)}

    def fingerprint(self) -> dict[str, Any]:
        """Digests of the list of files (name, size, time) and of the class names."""
        return dict(self._fingerprint)

    def info(self) -> dict[str, float]:
        """No constants."""
        return {}

    def report(self) -> dict[str, Any]:
        """How the folder was understood."""
        return {
            "folder": str(self.root),
            "images": len(self),
            "splits": "folders" if self.split_folders else "by hash of the name",
            "maps": list(self.maps),
        }
