"""A user's own images with identity maps, and class maps if there are any.

    <root>/images/[train|val|test/]…/<stem>.jpg       or .jpeg .png .webp .bmp .tif .tiff
    <root>/identity/[train|val|test/]…/<stem>.png     8- or 16-bit grey, or palette: 0 background, objects 1, 2, …
    <root>/class/[train|val|test/]…/<stem>.png        optional, alike: 0 unlabelled, class numbers of classes.txt
    <root>/classes.txt                                with class/: one name per line, line n names class n

Without class maps every object is of the one class "object". With split folders under images/, they are the splits;
without, every image is put into one by the hash of its name, so that adding images moves no other.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets.scene import (
    Scene,
    UnreadableScene,
    check_choice,
    file_fingerprint,
    read_image,
    read_label_map,
    same_size,
    spread,
)
from errors import UserError

READER_VERSION = 1  # part of the fingerprint: raise it with every change that alters a label
SPLITS = ("train", "val", "test")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def place_by_hash(key: str, val_fraction: float, test_fraction: float, seed: int) -> str:
    """The split of an image from its name alone: test, val and train take that share of all possible hashes."""
    value = hashlib.blake2b(f"{seed}|{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    share = int.from_bytes(value, "big") / 2**64
    if share < test_fraction:
        return "test"
    return "val" if share < test_fraction + val_fraction else "train"


def list_images(folder: Path) -> dict[str, str]:
    """{name without ending: ending} of the images below a folder, sorted; names are relative, with forward slashes.

    Raises:
        UserError: two images of one name.
    """
    found: dict[str, str] = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in IMAGE_ENDINGS or name.startswith("."):
                continue
            key = Path(os.path.relpath(os.path.join(place, stem), folder)).as_posix()
            if key in found:
                raise UserError(f"{folder / key} is there as {found[key]} and as {ending}: their masks would share a name")
            found[key] = ending
    return dict(sorted(found.items()))


class Folder:
    """Images and identity PNGs of a folder (the layout is in the module's text).

    Args:
        split: "train", "val" or "test".
        root: the folder that holds images/ and identity/.
        val_fraction, test_fraction: share of the images in these splits where images/ has no split folders.
        split_seed: another number cuts otherwise.
        ignore: value of pixels, in identity and class maps, that take part in nothing (often 255); they become -1.
        limit: use at most this many images of the split, evenly spread over the sorted names.
        on_error: what the caller does with an unreadable scene, "raise" or "skip".

    Pictures are turned upright as their EXIF orientation says, as the tools do that masks are painted with.

    Raises:
        UserError: the layout is not there, a split without an image, a knob out of range.
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
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"dataset.root: got {self.root}, which is no folder; expected one with images/ and identity/")
        for name in ("images", "identity"):
            if not (self.root / name).is_dir():
                raise UserError(f"{self.root / name} is missing: expected {self.root} to hold images/ and identity/")
        self.has_classes = (self.root / "class").is_dir()
        self.classes = ["background", *(self._class_names() if self.has_classes else ["object"])]

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
            mend = (
                f"put images into {self.root / 'images' / split}"
                if self.split_folders
                else f"add images, make folders images/{split} and identity/{split}, or change dataset.split_seed"
            )
            raise UserError(f"dataset split {split}: none of the {len(images)} images in {self.root} belongs to it; {mend}")
        self.keys = spread(keys, limit)
        self._endings = [images[key] for key in self.keys]

    def _class_names(self) -> list[str]:
        """Names of the classes 1 … K; a first line "background" or "unlabelled" may stand for class 0."""
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
        return names

    def __len__(self) -> int:
        return len(self.keys)

    def _names(self, i: int) -> list[str]:
        """Files of scene i, below the root."""
        kinds = ("identity", "class") if self.has_classes else ("identity",)
        return [f"images/{self.keys[i]}{self._endings[i]}", *(f"{kind}/{self.keys[i]}.png" for kind in kinds)]

    def __getitem__(self, i: int) -> Scene:
        """Scene i: "identity" as in the file and "class", [H, W] int32; -1 where ignored.

        Raises:
            UnreadableScene: a file is missing or damaged, sizes differ, a class has no name.
        """
        key, paths = self.keys[i], [self.root / name for name in self._names(i)]
        image = read_image(paths[0], key, upright=True)
        maps = [read_label_map(path, key) for path in paths[1:]]
        for path, label_map in zip(paths[1:], maps, strict=True):
            same_size(image, label_map, path, key)
            if self.ignore is not None:
                label_map[label_map == self.ignore] = -1
        identity = maps[0]
        if not self.has_classes:
            return Scene(image, {"identity": identity, "class": identity.sign()}, key)
        highest = int(maps[1].max())
        if highest >= len(self.classes):
            raise UnreadableScene(
                key, f"{paths[2]} has class {highest}, but {self.root / 'classes.txt'} names {len(self.classes) - 1} classes"
            )
        return Scene(image, {"identity": identity, "class": maps[1]}, key)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        names = (name for i in range(len(self)) for name in self._names(i))
        classes = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16).hexdigest()
        facts = {"reader": READER_VERSION, "classes": classes, "ignore": self.ignore}
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
            "class_maps": self.has_classes,
        }
