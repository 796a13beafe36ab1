"""What data sets with published training and validation sets share: the cut into splits, few-shot lists, the fingerprint.

Benchmarks hide the labels of their test images, so results are reported on the published validation set. It is split
`test` here. Split `val`, on which probes are selected, is a part of the published training set, so that no reported
image is ever selected on; `validation=published` makes it the validation set itself, for protocols that did it so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.listings import file_fingerprint, place_by_hash, read_names, spread
from datasets.pictures import read_label_map, same_size
from datasets.scene import UnreadableScene, check_choice
from datasets.splits import SPLITS
from errors import UserError

UNKNOWN = -2  # in a table of classes: a value that no mask of the data set may have


class Published:
    """Base of data sets with files per image; a subclass lists names, says which files they have, and reads a scene.

    Args:
        split: "train", "val" or "test" (the published validation set).
        validation: "held_out": `val` is a part of the published training set; "published": it is the published validation
            set, and `train` the whole training set.
        val_fraction: share of the training images that are held out, by the hash of their names.
        split_seed: another number holds out others.
        file_set: a text file with the names of the training images to use, one per line (published few-shot lists).
        limit: use at most this many images of the split, evenly spread over the sorted names.
        on_error: what the caller does with an unreadable scene, "raise" or "skip".

    Attributes:
        keys: names of the images, sorted.
        part: "train" or "val", the published set that the images of the split come from.

    Raises:
        UserError: an option out of range, a split without an image, a file set that names other images.
    """

    READER_VERSION = 1  # part of the fingerprint: raise it with every change that alters a label
    BACKGROUND_IS_A_CLASS = False  # whether value 0 of the class map is scored like the others

    root: Path
    classes: list[str]

    def __init__(
        self,
        split: str,
        *,
        validation: str = "held_out",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        file_set: str | os.PathLike[str] | None = None,
        limit: int | None = None,
        on_error: str = "raise",
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("validation", validation, ("held_out", "published"))
        if not 0 < val_fraction < 1:
            raise UserError(f"dataset.val_fraction: got {val_fraction}, expected a share between 0 and 1")
        self.split, self.on_error, self.validation = split, on_error, validation
        self.part = "val" if split == "test" or (split == "val" and validation == "published") else "train"
        names = self._names()
        if self.part == "train":
            names = self._cut(names, split, val_fraction, split_seed, file_set)
        if not names:
            raise UserError(f"dataset split {split}: no image of {self.root} belongs to it; change dataset.val_fraction")
        self.keys = spread(names, limit)

    def _cut(
        self, names: Sequence[str], split: str, val_fraction: float, seed: int, file_set: str | os.PathLike[str] | None
    ) -> list[str]:
        """The training or held-out images among all training images; images of a file set are never held out."""
        held_out = set()
        if self.validation == "held_out":
            held_out = {name for name in names if place_by_hash(name, val_fraction, 0, seed) == "val"}
        if file_set is None:
            return [name for name in names if (name in held_out) == (split == "val")]
        listed = read_names(Path(file_set).expanduser())
        if unknown := sorted(set(listed) - set(names)):
            raise UserError(
                f"dataset.file_set={file_set}: {len(unknown)} of its {len(listed)} names, first {unknown[0]}, are no training "
                f"image of {self.root}; name a list of this data set"
            )
        return sorted(listed) if split == "train" else [name for name in names if name in held_out - set(listed)]

    def _names(self) -> list[str]:
        """Sorted names of all images of the published set `part`."""
        raise NotImplementedError

    def _files(self, i: int) -> list[str]:
        """Files of scene i below the root, the image first."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        names = (name for i in range(len(self)) for name in self._files(i))
        classes = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16).hexdigest()
        facts = {"reader": self.READER_VERSION, "classes": classes, "part": self.part}
        return {**facts, **file_fingerprint(self.root, names)}

    def fingerprint(self) -> dict[str, Any]:
        """Digests of the list of files (name, size, time) and of the class names."""
        return dict(self._fingerprint)

    def info(self) -> dict[str, float]:
        """No constants."""
        return {}

    def report(self) -> dict[str, Any]:
        """Where the images come from."""
        return {
            "folder": str(self.root),
            "images": len(self),
            "published_set": self.part,
            "validation": self.validation,
            "background_is_a_class": self.BACKGROUND_IS_A_CLASS,
        }


def check_unlabelled(unlabelled: str) -> int:
    """The value in the class map of pixels that nobody labelled: -1, or 0 where they are a class of their own.

    Raises:
        UserError: it is neither "ignore" nor "background".
    """
    check_choice("unlabelled", unlabelled, ("ignore", "background"))
    return -1 if unlabelled == "ignore" else 0


def read_classes(path: Path, key: str, image: Tensor, table: Tensor) -> Tensor:
    """The class map [H, W] int32 of a mask whose values `table` [n] translates; UNKNOWN refuses a value.

    Raises:
        UnreadableScene: the file is missing or damaged, of another size than the image, or has a value of no class.
    """
    values = read_label_map(path, key)
    same_size(image, values, path, key)
    outside = (values < 0) | (values >= len(table))
    classes = table[values.masked_fill(outside, 0)]
    wrong = (outside | (classes == UNKNOWN)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise UnreadableScene(
            key, f"{path} has value {int(values[row, column])} (row {row}, column {column}), which is no class of this data set"
        )
    return classes


def table_of(classes: dict[int, int], size: int = 256) -> Tensor:
    """A table for `read_classes`, [size] int32, from {value in the mask: class}; all other values are refused."""
    table = torch.full((size,), UNKNOWN, dtype=torch.int32)
    for value, number in classes.items():
        table[value] = number
    return table
