"""The options of mode=neco, read once, with everything checked that can be checked before a network is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from backbones.contract import BackboneFacts
from errors import UserError
from files import plain
from machine import DTYPES
from neco.crops import CropOptions
from neco.networks import Sorter
from neco.patch_ordering import LOSS_MASKS, REFERENCE_NETWORKS, REFERENCE_PLACES, SIMILARITIES, Ordering

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """Which images are cropped.

    split: of the data set; folder: a plain folder of images in its place; limit: at most this many, evenly spread.
    workers: processes that decode and crop ahead.
    """

    split: str = "train"
    folder: str | None = None
    limit: int | None = None
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """How networks are scored while they train and at the end.

    every: epochs between two scores on the validation split (0: none); select: the score that chooses the best.
    size: pixels of the square images; null: what the backbone was trained at.
    memory_images: training images the retrieval and the linear head learn from; val_images, test_images: images scored.
    n_clusters: of overclustering, besides the number of classes; seeds: of its k-means and of the linear head at the end.
    final: score both networks on the test split before and after, with paired intervals.
    """

    every: int = 1
    select: str = "retrieval"
    size: int | None = None
    memory_images: int = 200
    val_images: int = 100
    test_images: int = 300
    n_clusters: int = 100
    seeds: int = 3
    linear_epochs: int = 10
    final: bool = True


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A post-training, in the units of one optimiser step over all processes.

    epochs: passes over the images; batch_images: of a step, over all processes and accumulated parts.
    accumulate: parts a step's batch is cut into (batch references come from one part).
    dtype: of the networks' products; sorting and the loss are float32.
    checkpoint_activations: keep one tensor per block and compute the rest again in backward.
    grid, network, student_steepness, teacher_steepness (null: the student's), swap, similarity: `patch_ordering.Ordering`.
    assign: global crops whose teacher maps are targets.
    reference_by: teacher (the reference program) or student (the paper); reference_from: queue or batch.
    queue_length: patches kept per global crop. shuffle_references: a control: the teacher's references in another order.
    loss_mask: all | fg | bg, cells by the teacher's class attention, mask_threshold of its mass.
    use_teacher: false: the student's own maps are the target. registers: keep, or drop as in the XR rows.
    trainable_blocks: null all; n from block n on (negative: the last); or a list; all else is frozen then.
    same_heads: both networks start with the same head. In the reference program they differ and meet only through the moving
        average, for which a short training has no time.
    drop_path: of the student's last block, rising from 0.
    momentum, weight_decay: along a cosine from the first to the second; lr_…: along a cosine to final_lr.
    clip: largest norm of all gradients together; null: none.
    expects: [width, patch size] of the architecture this recipe is for; null: any.
    save_seconds: shortest time between two saved states; keep_every: epochs between kept checkpoints (null: none).
    """

    images: ImageOptions = dataclasses.field(default_factory=ImageOptions)
    crops: CropOptions = dataclasses.field(default_factory=CropOptions)
    evaluate: EvaluationOptions = dataclasses.field(default_factory=EvaluationOptions)
    epochs: int = 25
    batch_images: int = 64
    accumulate: int = 1
    dtype: str = "auto"
    checkpoint_activations: bool = False
    grid: int = 7
    network: str = "bitonic"
    student_steepness: float = 100.0
    teacher_steepness: float | None = 100.0
    swap: str = "cauchy"
    similarity: str = "cosine"
    assign: tuple[int, ...] = (0, 1)
    reference_by: str = "teacher"
    reference_from: str = "queue"
    queue_length: int = 8192
    shuffle_references: bool = False
    loss_mask: str = "all"
    mask_threshold: float = 0.6
    use_teacher: bool = True
    registers: str = "keep"
    trainable_blocks: int | tuple[int, ...] | None = None
    head_hidden: int = 2048
    head_out: int = 256
    head_layers: int = 3
    same_heads: bool = False
    drop_path: float = 0.1
    momentum: tuple[float, ...] = (0.9995, 1.0)
    lr_backbone: float = 1e-5
    lr_head: float = 1e-4
    final_lr: float = 0.0
    weight_decay: tuple[float, ...] = (0.04, 0.5)
    clip: float | None = None
    expects: tuple[int, ...] | None = None
    save_seconds: float = 300.0
    keep_every: int | None = None

    @property
    def ordering(self) -> Ordering:
        """What is ordered how."""
        steep = self.student_steepness if self.teacher_steepness is None else self.teacher_steepness
        sorters = (Sorter(self.network, s, self.swap) for s in (self.student_steepness, steep))
        return Ordering(self.grid, *sorters, self.similarity, self.assign)

    def check(self, facts: BackboneFacts, processes: int) -> Recipe:
        """This recipe with crop sizes that fit the patches of a backbone.

        Raises:
            UserError: the first option that cannot be followed.
        """
        choices = {
            "dtype": (*DTYPES[:2], "auto"),  # float16 would need its losses scaled
            "similarity": tuple(SIMILARITIES),
            "reference_by": REFERENCE_NETWORKS,
            "reference_from": REFERENCE_PLACES,
            "loss_mask": LOSS_MASKS,
            "registers": ("keep", "drop"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise UserError(f"unknown neco.{name}={getattr(self, name)}; valid: {', '.join(valid)}")
        for name in ("epochs", "batch_images", "accumulate", "grid", "head_layers", "head_hidden", "head_out", "queue_length"):
            if getattr(self, name) < 1:
                raise UserError(f"neco.{name}: got {getattr(self, name)}, expected a whole number of at least 1")
        for name in ("momentum", "weight_decay"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) < 0:
                raise UserError(f"neco.{name}: got {list(getattr(self, name))}, expected where it starts and where it ends")
        if max(self.momentum) > 1 or not 0 <= self.drop_path < 1:
            raise UserError("neco.momentum may be 1 at most, neco.drop_path is below 1")
        if self.clip is not None and self.clip <= 0:
            raise UserError(f"neco.clip: got {self.clip}, expected a number above 0, or null for no clipping")
        parts = processes * self.accumulate
        if self.batch_images % parts:
            raise UserError(
                f"neco.batch_images={self.batch_images} cannot be cut into {processes} processes x {self.accumulate} parts "
                f"(neco.accumulate), take a multiple of {parts}"
            )
        if self.expects is not None and (facts.dim, facts.patch_size) != tuple(self.expects):
            raise UserError(
                f"this recipe is for a ViT of width {self.expects[0]} and patches of {self.expects[-1]} px, {facts.name} has "
                f"width {facts.dim} and patches of {facts.patch_size} px; choose the experiment of its architecture, or set "
                "neco.expects=null"
            )
        if not facts.dynamic_size:
            raise UserError(f"{facts.name} takes images of one size and crops have two, choose a ViT without that limit")
        globals_ = range(self.crops.numbers[0])
        if not self.assign or not set(self.assign) <= set(globals_):
            raise UserError(f"neco.assign={list(self.assign)}: expected numbers of global crops, 0 … {len(globals_) - 1}")
        ordering = self.ordering
        ordering.student.check()
        ordering.teacher.check()
        part = self.batch_images // self.accumulate
        needed = part * self.grid**2
        if self.reference_from == "queue" and self.queue_length < needed:
            raise UserError(
                f"neco.queue_length={self.queue_length} is smaller than a batch ({part} images x {self.grid**2} cells = "
                f"{needed} references); take at least {needed}, a smaller batch, or "
                "neco.reference_from=batch"
            )
        return dataclasses.replace(self, crops=self.crops.check(facts.patch_size))


def read_recipe(block: Mapping[str, Any]) -> Recipe:
    """The options of the `neco:` block.

    Raises:
        UserError: an option nothing reads, a value of another kind.
    """
    return _read(Recipe, plain(block), "neco")


def _read(cls: type[T], block: Mapping[str, Any], where: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, value in block.items():
        if name not in fields:
            raise UserError(f"unknown option {where}.{name}; valid: {', '.join(sorted(fields))}")
        kind = str(fields[name].type)
        nested = {"ImageOptions": ImageOptions, "CropOptions": CropOptions, "EvaluationOptions": EvaluationOptions}.get(kind)
        if nested is not None:
            if not isinstance(value, Mapping):
                raise UserError(f"{where}.{name} is a section of options, got {value!r}")
            given[name] = _read(nested, value, f"{where}.{name}")
        elif not _fits(value, kind):
            raise UserError(f"{where}.{name}: got {value!r}, expected {_in_words(kind)}")
        else:
            given[name] = tuple(value) if isinstance(value, list) else value
    return cls(**given)


def _fits(value: Any, kind: str) -> bool:
    """Whether a plain value is of an annotation's kind, such as `int | None` or `tuple[float, float]`."""
    for part in kind.split(" | "):
        if part.startswith("tuple"):
            inner = part[6:].split(",")[0].rstrip("]")
            if isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, inner) for v in value):
                return True
        elif part == "None":
            if value is None:
                return True
        elif isinstance(value, bool):
            if part == "bool":
                return True
        elif isinstance(value, {"int": int, "float": (int, float), "str": str, "bool": ()}[part]):
            return isinstance(value, str) or abs(value) < 2**31
    return False


def _in_words(kind: str) -> str:
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "None": "null"}
    return " or ".join(words.get(part, "a list of numbers") for part in kind.split(" | "))
