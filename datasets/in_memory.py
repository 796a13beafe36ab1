"""Images that a Python program hands over: arrays in memory instead of files (`vit_probing.probe`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.scene import Scene, check_choice
from datasets.splits import SPLITS
from errors import UserError

SHARES = (0.6, 0.15, 0.25)  # of the images in train, val, test, where they are not named


class Collection(NamedTuple):
    """Scenes of each split and the names of their classes."""

    splits: dict[str, list[Scene]]
    classes: list[str]


_handed: dict[str, Collection] = {}


def hand_over(collection: Collection) -> str:
    """Make images known to this process; returns the handle for `dataset.handle`, a digest of all that is in them."""
    found = hashlib.blake2b(repr(collection.classes).encode(), digest_size=8)
    for split, scenes in collection.splits.items():
        for scene in scenes:
            found.update(f"{split}/{scene.key}{list(scene.image.shape)}{sorted(scene.labels)}".encode())
            for value in (scene.image, *(scene.labels[name] for name in sorted(scene.labels))):
                found.update(value.contiguous().numpy())
    _handed[found.hexdigest()] = collection
    return found.hexdigest()


def collect(
    images: Sequence[Any],
    identity: Sequence[Any] | None = None,
    classes: Sequence[Any] | None = None,
    class_names: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
) -> Collection:
    """Arrays as scenes of three splits.

    Args:
        images: M images, each [H, W, 3] or [3, H, W] uint8, a PIL picture, a numpy array or a tensor.
        identity: M maps [H, W] of integers: 0 background, 1, 2, … objects of the image, -1 left out.
        classes: M maps [H, W] of integers: 0 background, others numbers of `class_names`; None: every object is of one class.
        class_names: names of the classes 0, 1, …; None: numbers.
        splits: "train", "val" or "test" of every image; None: drawn with a fixed seed (SHARES).

    Raises:
        UserError: which image is wrong, and how.
    """
    if identity is None and classes is None:
        raise UserError("there are no maps: hand over identity_maps, class_maps, or both")
    for name, maps in (("identity_maps", identity), ("class_maps", classes), ("splits", splits)):
        if maps is not None and len(maps) != len(images):
            raise UserError(f"{name} has {len(maps)} entries for {len(images)} images, expected one each")
    splits = draw_splits(len(images)) if splits is None else list(splits)
    of_split: dict[str, list[Scene]] = {name: [] for name in SPLITS}
    highest = 1
    for number, (image, split) in enumerate(zip(images, splits, strict=True)):
        check_choice("splits", split, SPLITS)
        picture = _picture(image, number)
        labels = {
            name: _map(maps[number], name, number, tuple(picture.shape[-2:]))
            for name, maps in (("identity", identity), ("class", classes))
            if maps is not None
        }
        if "class" not in labels:
            labels["class"] = labels["identity"].sign()
        highest = max(highest, int(labels["class"].max()))
        of_split[split].append(Scene(picture, labels, f"image-{number:05d}"))
    empty = [name for name, scenes in of_split.items() if not scenes]
    if empty:
        raise UserError(
            f"split {empty[0]} has no image among the {len(images)} handed over; hand over more, or name their splits"
        )
    names = list(class_names) if class_names is not None else ["background", *map(str, range(1, highest + 1))]
    if classes is None:
        names = ["background", "object"]
    if highest >= len(names):
        raise UserError(
            f"class_maps have class {highest} and class_names has {len(names)} names, of classes 0…{len(names) - 1}"
        )
    return Collection(of_split, names)


def draw_splits(n_images: int) -> list[str]:
    """The split of each of M images, drawn once with a fixed seed: at least one image in each."""
    n_test, n_val = (max(1, round(share * n_images)) for share in SHARES[:0:-1])
    names = ["test"] * n_test + ["val"] * n_val
    names += ["train"] * (n_images - len(names))
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(0)).tolist()
    return [names[i] for i in order]


def _picture(image: Any, number: int) -> Tensor:
    """One image as [3, H, W] uint8."""
    pixels = image if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    shape = list(pixels.shape)
    if pixels.ndim != 3 or 3 not in (shape[0], shape[-1]):
        raise UserError(f"image {number} has shape {shape}, expected [height, width, 3] or [3, height, width]")
    if pixels.dtype != torch.uint8:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise UserError(f"image {number} is of type {kind}, expected uint8 pixels of 0…255 as in the file, not normalised")
    return (pixels if shape[0] == 3 else pixels.movedim(-1, 0)).contiguous().cpu()


def _map(label_map: Any, name: str, number: int, size: tuple[int, int]) -> Tensor:
    """One label map as [H, W] int32."""
    values = label_map if isinstance(label_map, Tensor) else torch.from_numpy(np.array(label_map))
    if values.is_floating_point() or values.is_complex():
        raise UserError(f"the {name} map of image {number} is of type {values.dtype}, expected whole numbers")
    if tuple(values.shape) != size:
        raise UserError(f"the {name} map of image {number} has shape {list(values.shape)}, its image is {list(size)}")
    if int(values.min()) < -1:
        raise UserError(f"the {name} map of image {number} has the value {int(values.min())}, expected -1 (left out), 0, 1, …")
    return values.int().contiguous().cpu()


class InMemory:
    """Images handed over by this Python process.

    Args:
        split: "train", "val" or "test".
        handle: what `hand_over` returned; it looks up data, nothing is called.
        on_error: unused, in memory everything can be read.

    Raises:
        UserError: this process was handed nothing under that handle.
    """

    def __init__(self, split: str, *, handle: str, on_error: str = "raise") -> None:
        check_choice("split", split, SPLITS)
        if handle not in _handed:
            raise UserError(
                f"dataset.handle={handle}: these images were handed over in another Python process; hand them over again with "
                "vit_probing.probe"
            )
        self.split, self.handle, self.on_error = split, handle, on_error
        self.scenes, self.classes = _handed[handle].splits[split], _handed[handle].classes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> Scene:
        """Scene i."""
        return self.scenes[i]

    def fingerprint(self) -> dict[str, Any]:
        """The handle is a digest of all images and maps."""
        return {"handle": self.handle, "split": self.split}

    def info(self) -> dict[str, float]:
        """No constants."""
        return {}

    def report(self) -> dict[str, Any]:
        """How many there are."""
        return {"images": len(self)}
