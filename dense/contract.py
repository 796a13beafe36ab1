"""What a dense evaluation takes and gives: grids of patch tokens, label maps, results. Nothing here knows where they come from.

An evaluation is a function `(features, labels, *, options) -> list[Result]`. `features` and `labels` are mappings with
the entries "train" (what may be fitted on) and "test" (what is scored); an evaluation that fits nothing reads "test" only.
Images are read in batches, so that a split never has to fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from metrics.bootstrap import Estimate
from metrics.segmentation import ClassCounts, ImageConfusions, class_metrics, iou_estimate


class Grids:
    """Patch tokens of M images at L layers, each image a grid of its own shape.

    Args:
        read: indices [B] of images of one shape -> tokens [L, B, h, w, D] float32.
        shapes: [M, 2] int64 rows and columns of every image.
        layers: their names.
        dim: width D.
        patch: pixels of a patch's side in the image the backbone saw: shapes * patch is the input resolution.
        attention: indices [B] -> attention of the class token to the patches in the last block [B, heads, h, w],
            where the backbone has one.
    """

    def __init__(
        self,
        read: Callable[[Tensor], Tensor],
        shapes: Tensor,
        *,
        layers: Sequence[int | str],
        dim: int,
        patch: int,
        attention: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.read, self.shapes, self.layers, self.dim = read, shapes.long(), list(layers), int(dim)
        self.patch, self.attention = int(patch), attention

    @classmethod
    def from_tensor(cls, x: Tensor, *, patch: int, layers: Sequence[int | str] | None = None) -> Grids:
        """Wrap tokens [L, M, h, w, D] that are in memory already."""
        shapes = torch.tensor(x.shape[2:4]).expand(x.shape[1], 2)
        layers = list(range(len(x))) if layers is None else layers
        return cls(lambda images: x[:, images].float(), shapes, layers=layers, dim=x.shape[-1], patch=patch)

    @property
    def n_images(self) -> int:
        """M."""
        return len(self.shapes)

    @property
    def n_tokens(self) -> int:
        """Patches of all images together."""
        return int(self.shapes.prod(1).sum())

    def at(self, layer: int | str) -> Grids:
        """The same images at one layer."""
        row = self.layers.index(layer)
        return self._like(lambda images: self.read(images)[row : row + 1], self.shapes, self.attention, [layer])

    def subset(self, images: Tensor) -> Grids:
        """Some of the images, in this order."""
        attention = self.attention and (lambda rows: self.attention(images[rows]))
        return self._like(lambda rows: self.read(images[rows]), self.shapes[images], attention, self.layers)

    def _like(self, read: Callable, shapes: Tensor, attention: Callable | None, layers: Sequence) -> Grids:
        return Grids(read, shapes, layers=layers, dim=self.dim, patch=self.patch, attention=attention)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B] and their tokens [L, B, h, w, D]: neighbours of one shape, at most `size` at a time."""
        for images in self.batch_images(size, order):
            yield images, self.read(images)

    def batch_images(self, size: int, order: Tensor | None = None) -> Iterator[Tensor]:
        """The images of `batches`, without reading them."""
        order = torch.arange(self.n_images) if order is None else order
        shapes = self.shapes[order]
        turns = (shapes[1:] != shapes[:-1]).any(1).nonzero().flatten() + 1
        for same in torch.tensor_split(order, turns):
            yield from same.split(size)


class LabelMaps:
    """Class of every pixel of M images; anything outside 0 … C - 1 is ignored.

    Args:
        read: index of an image -> its map [H, W] at full size, integer.
        n_images: M.
        classes: C names.
    """

    def __init__(self, read: Callable[[int], Tensor], n_images: int, classes: Sequence[str]) -> None:
        self.read, self.n_images, self.classes = read, n_images, list(classes)

    @classmethod
    def from_tensor(cls, maps: Tensor | Sequence[Tensor], classes: int | Sequence[str]) -> LabelMaps:
        """Wrap maps [M, H, W], or a list of maps [H, W], that are in memory already."""
        names = [str(c) for c in range(classes)] if isinstance(classes, int) else classes
        return cls(lambda image: maps[image], len(maps), names)

    @property
    def n_classes(self) -> int:
        """C."""
        return len(self.classes)

    def subset(self, images: Tensor) -> LabelMaps:
        """Some of the images, in this order."""
        return LabelMaps(lambda row: self.read(int(images[row])), len(images), self.classes)

    def at(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Maps [B, H', W'] int64 of some images at one size: the pixel at floor(i H / H'), as torch's nearest."""
        return torch.stack([resize_map(self.read(int(image)), size) for image in images])


def resize_map(label_map: Tensor, size: Sequence[int]) -> Tensor:
    """A label map [..., H, W] at another size, by the pixel at floor(i H / H')."""
    rows, columns = (torch.arange(n) * old // n for n, old in zip(size, label_map.shape[-2:], strict=True))
    return label_map[..., rows.to(label_map.device)[:, None], columns.to(label_map.device)].long()


def soft_labels(maps: Tensor, grid: Sequence[int], n_classes: int) -> Tensor:
    """Share of every class in every patch, float32 [B, h, w, C], of maps [B, h p, w p]; ignored pixels count for none."""
    (h, w), (height, width) = grid, maps.shape[-2:]
    p, q = height // h, width // w
    if (h * p, w * q) != (height, width):
        raise ValueError(f"a map of {height} x {width} does not divide into {h} x {w} patches")
    patch = (torch.arange(height) // p)[:, None] * w + torch.arange(width) // q
    known = (maps >= 0) & (maps < n_classes)
    code = (torch.arange(len(maps))[:, None, None] * h * w + patch) * n_classes + maps
    counts = torch.bincount(code[known], minlength=len(maps) * h * w * n_classes)
    return counts.view(len(maps), h, w, n_classes).float() / (p * q)


def patch_vote(shares: Tensor) -> Tensor:
    """Class of every patch by the majority of its pixels, the smallest of equally frequent ones; -1 where all are ignored.

    Args:
        shares: [..., C] of `soft_labels`.
    """
    return torch.where(shares.sum(-1) > 0, shares.argmax(-1), -1)


def predict_pixels(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Class of every pixel [B, H, W]: logits [B, h, w, C] scaled up bilinearly (corners not aligned), then the largest."""
    return F.interpolate(logits.movedim(-1, 1), size=tuple(size), mode="bilinear", align_corners=False).argmax(1)


def score_size(size: int | str, shape: Sequence[int], patch: int, full: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the maps an image is scored on.

    Args:
        size: a number (that many on both sides, as published for NeCo: 100), "input" (what the backbone saw) or "full"
            (the label map as it is).
        shape: rows and columns of patches; patch: pixels of one; full: size of the label map.
    """
    if size == "full":
        return int(full[0]), int(full[1])
    if size == "input":
        return int(shape[0]) * patch, int(shape[1]) * patch
    if isinstance(size, int) and not isinstance(size, bool) and size >= 1:
        return size, size
    raise UserError(f"a score size is a number of pixels, input or full, got {size!r}")


class Result(NamedTuple):
    """One scored prediction of a whole split.

    Attributes:
        setting: what tells it from the other results of its evaluation (layer, seed, n_clusters, matching, …).
        metrics: Estimates of one fit each.
        classes: IoU of every class, an Estimate of C fits; nan for classes that are nowhere. None where there are none.
        confusion: int64 [C, C] rows true, columns called; or None.
        notes: what a reader must know beside the numbers, JSON-able.
    """

    setting: dict[str, Any]
    metrics: dict[str, Estimate]
    classes: Estimate | None = None
    confusion: Tensor | None = None
    notes: Mapping[str, Any] = {}


def segmentation_result(
    setting: Mapping[str, Any], confusions: ImageConfusions, *, absent: str = "skip", notes: Mapping[str, Any] | None = None
) -> Result:
    """The result of predictions that are classes."""
    counts: ClassCounts = confusions.class_counts()
    metrics = class_metrics(counts, absent)
    return Result(dict(setting), metrics, iou_estimate(counts), confusions.total(), dict(notes or {}))


def mean_over_seeds(results: Sequence[Result]) -> list[Result]:
    """One result for those that differ in their seed only: the mean inside every resample. Confusions are summed."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        key = repr(sorted((k, v) for k, v in result.setting.items() if k != "seed"))
        groups.setdefault(key, []).append(result)
    merged = []
    for group in groups.values():
        first = group[0]
        metrics = {name: _mean([result.metrics[name] for result in group]) for name in first.metrics}
        classes = None if first.classes is None else _mean([result.classes for result in group])
        confusion = None if first.confusion is None else torch.stack([result.confusion for result in group]).sum(0)
        setting = {k: "mean" if k == "seed" else v for k, v in first.setting.items()}
        merged.append(Result(setting, metrics, classes, confusion, first.notes))
    return merged


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    return Estimate(*(torch.stack(fields).mean(0) for fields in zip(*estimates, strict=True)))


def seed_list(seeds: int | Sequence[int], option: str) -> list[int]:
    """A number of seeds, or a list of them, as a list.

    Raises:
        UserError: none, or one of them twice.
    """
    listed = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not listed or len(set(listed)) < len(listed):
        raise UserError(f"{option}={seeds}: expected a number of at least 1, or a list of different seeds")
    return listed


def check_choices(block: str, choices: Mapping[str, Sequence[Any]], options: Mapping[str, Any]) -> None:
    """Refuse option values that do not exist; of a list every entry is looked at.

    Args:
        block: name of the evaluation; choices: the values of each option that has a fixed set of them.

    Raises:
        UserError: naming the option and its values.
    """
    for name, valid in choices.items():
        given = options[name]
        listed = given if isinstance(given, list | tuple) else [given]
        if not listed or any(value not in valid for value in listed):
            raise UserError(f"unknown {block}.{name}={given}; valid: {', '.join(valid)}")
