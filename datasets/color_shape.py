"""ColorShape: flat shapes on a plain ground, every set of colour-shape conjunctions equally likely.

Published as the synthetic data set of "Formalizing the Binding Problem" (arXiv 2606.03976). Colours, shapes, split
rules and pixels are the published ones; at the published settings one feature code (all features present) holds 70 %
of the test split and validation shares its codes with training, so read the split report before comparing splits.

Random numbers: `sampling=hashed` draws every scene from its own stream, a hash of (seed, split, index), so scenes are
independent of each other and of the order they are asked in. `sampling=published` repeats the published program's
single stream (seed, seed + 1, seed + 2 for train, val, test) and with it its very scenes, at the cost of drawing all
positions when the data set is built.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw

import datasets.priors as priors
import datasets.sampling as random_draws
from datasets.codes import CodeScenes, Groups
from datasets.pictures import split_planes
from datasets.priors import Prior
from datasets.scene import Scene, UnreadableScene, check_choice, check_whole
from datasets.splits import SPLITS, pack, parse_buckets, split_codes, split_name
from errors import UserError

GENERATOR_VERSION = 2  # part of the fingerprint: raise it with every change that alters a code, a box or a pixel
COLORS = {
    "red": (220, 20, 60),
    "blue": (30, 144, 255),
    "green": (34, 139, 34),
    "yellow": (255, 215, 0),
    "purple": (138, 43, 226),
    "orange": (255, 140, 0),
    "cyan": (0, 206, 209),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "square", "triangle", "diamond", "pentagon", "hexagon", "cross", "star")
CORNERS = {"triangle": 3, "pentagon": 5, "hexagon": 6}
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels


class Board(NamedTuple):
    """The square picture and the rule by which objects find their place; lengths in pixels."""

    size: int
    obj: int
    margin: int
    tries: int
    disjoint: bool
    background: tuple[int, int, int]

    def place(self, n: int, draw: Callable[[], tuple[int, int]], key: str) -> list[Box]:
        """Boxes of n objects, one after the other, each at the first drawn corner (x, y) that is free.

        Boxes that touch count as disjoint, as published.

        Raises:
            UnreadableScene: an object found no place; the scene is not begun anew, which would change the distribution of
                positions.
        """
        boxes: list[Box] = []
        for k in range(n):
            for _ in range(self.tries):
                x, y = draw()
                reach = self.obj
                if not self.disjoint or all(abs(x - a) >= reach or abs(y - b) >= reach for a, b, _, _ in boxes):
                    boxes.append((x, y, x + reach, y + reach))
                    break
            else:
                raise UnreadableScene(
                    key,
                    f"object {k + 1} of {n} ({self.obj} px) found no free place in {self.tries} tries on {self.size} px; lower "
                    "dataset.obj_size or the number of objects, or raise dataset.image_size",
                )
        return boxes

    def paint(self, objects: Sequence[tuple[str, str]], boxes: Sequence[Box]) -> torch.Tensor:
        """The picture [3, H, W] uint8 of (colour, shape) objects in their boxes; later ones on top."""
        picture = Image.new("RGB", (self.size, self.size), self.background)
        pen = ImageDraw.Draw(picture)
        for (color, shape), box in zip(objects, boxes, strict=True):
            draw_shape(pen, shape, box, COLORS[color])
        return torch.from_numpy(np.stack(split_planes(picture)))

    @property
    def capacity(self) -> int:
        """Most disjoint boxes that fit: a square of side L holds floor(L / obj) rows and columns, no packing more."""
        return ((self.size - 2 * self.margin) // self.obj) ** 2


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, box: Box, color: tuple[int, int, int]) -> None:
    """Fill one shape without anti-aliasing; the far edge of the box is painted too (16 px reach 17), as published."""
    x0, y0, x1, y1 = box
    x, y, r = (x0 + x1) / 2, (y0 + y1) / 2, min(x1 - x0, y1 - y0) / 2
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "square":
        pen.rectangle(box, fill=color)
    elif shape == "diamond":
        pen.polygon([(x, y0), (x1, y), (x, y1), (x0, y)], fill=color)
    elif shape == "cross":
        bar = max(2, int(0.25 * min(x1 - x0, y1 - y0)))
        pen.rectangle((int(x - bar / 2), y0, int(x + bar / 2), y1), fill=color)
        pen.rectangle((x0, int(y - bar / 2), x1, int(y + bar / 2)), fill=color)
    else:  # regular polygons and the star: first corner up, then clockwise on the screen
        radii = [r, 0.45 * r] * 5 if shape == "star" else [r] * CORNERS[shape]
        # In this very order of operations: the last bit of a corner decides whether Pillow fills a row of pixels.
        turns = [-math.pi / 2 + 2 * math.pi * k / len(radii) for k in range(len(radii))]
        corners = [(x + q * math.cos(t), y + q * math.sin(t)) for q, t in zip(radii, turns, strict=True)]
        pen.polygon(corners, fill=color)


class ColorShape(CodeScenes):
    """Scenes of coloured shapes; Y uniform over the object codes of at most `max_objects` objects.

    Args:
        split: "train", "val" or "test".
        n_colors, n_shapes: the first so many of the published eight each.
        image_size, obj_size, margin: pixels of the square picture, of an object, kept free at the border.
        max_place_tries: drawn positions per object before the scene is given up.
        non_overlapping: objects do not overlap; false takes the first position drawn.
        background: RGB.
        distribution_mode: "uniform", the only published prior.
        max_objects: most objects in a scene; None for no limit.
        seed: of the whole data set.
        split_mode and f_split_*, exclude_all_ones_f: which feature codes a split holds, see `splits.split_codes`.
        f_split_max_attempt_factor: draws per wanted scene before sampling is given up.
        n_train, n_val, n_test: scenes; the defaults are the published 49 000 cut 80:20, and 9 800.
        sampling: "hashed" or "published", see the module text.
        on_error: "raise" or "skip", for the caller: a scene whose objects find no place raises `UnreadableScene` either way.

    Raises:
        UserError: for an option outside its range, or objects that can never be placed.
    """

    name = "colorshape"

    def __init__(
        self,
        split: str,
        *,
        n_colors: int = 7,
        n_shapes: int = 7,
        image_size: int = 256,
        obj_size: int = 16,
        margin: int = 4,
        max_place_tries: int = 2000,
        non_overlapping: bool = True,
        background: Sequence[int] = (255, 255, 255),
        distribution_mode: str = "uniform",
        max_objects: int | None = 16,
        seed: int = 0,
        split_mode: str = "f_disjoint_hash",
        exclude_all_ones_f: bool = False,
        f_split_hash_mod: int = 10,
        f_split_test_buckets: int | str | Sequence[int] = (0, 1),
        f_split_val_buckets: int | str | Sequence[int] | None = None,
        f_split_salt: str = "colorshape_fsplit_v1",
        f_split_train_count: int | None = None,
        f_split_val_count: int | None = None,
        f_split_test_count: int | None = None,
        f_split_max_attempt_factor: float = 200,
        n_train: int = 39200,
        n_val: int = 9800,
        n_test: int = 9800,
        sampling: str = "hashed",
        on_error: str = "raise",
    ) -> None:
        self.split, self.on_error = split_name(split), on_error
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("sampling", sampling, ("hashed", "published"))
        check_choice("distribution_mode", distribution_mode, ("uniform",))
        self.sampling, self.seed = sampling, check_whole("seed", seed, 0)
        groups = Groups(
            [
                list(COLORS)[: check_whole("n_colors", n_colors, 1, len(COLORS))],
                SHAPES[: check_whole("n_shapes", n_shapes, 1, len(SHAPES))],
            ]
        )
        most = groups.n_objects if max_objects is None else check_whole("max_objects", max_objects, 1)
        self.max_objects = min(most, groups.n_objects)
        self.board = _board(image_size, obj_size, margin, max_place_tries, non_overlapping, background)
        counts = {"train": n_train, "val": n_val, "test": n_test}
        n = check_whole(f"n_{self.split}", counts[self.split], 1)
        self.groups = groups
        self.prior = self._prior()
        if self.board.disjoint and self._largest_scene > self.board.capacity:
            raise UserError(
                f"dataset: {self._largest_scene} objects of {obj_size} px cannot be placed side by side on {image_size} px "
                f"with a margin of {margin}, at most {self.board.capacity} fit; change dataset.max_objects, obj_size or "
                "image_size"
            )
        self.rule = {
            "mode": split_mode,
            "salt": f_split_salt,
            "exclude_all_ones": bool(exclude_all_ones_f),
            "hash_mod": f_split_hash_mod,
            "test_buckets": parse_buckets(f_split_test_buckets, "f_split_test_buckets"),
            "val_buckets": parse_buckets(f_split_val_buckets, "f_split_val_buckets"),
            "train_count": f_split_train_count,
            "val_count": f_split_val_count,
            "test_count": f_split_test_count,
        }
        self.support = split_codes(self._candidates(), self.split, **self.rule)  # [n_F, n]
        if not len(self.support):
            raise UserError(f"dataset.split_mode={split_mode}: no feature code is left for {self.split}")
        budget = max(n, int(n * max(1, f_split_max_attempt_factor)))
        self._published_boxes: list[list[Box]] | None = None
        if sampling == "published":
            object_code, self.attempts = self._draw_published(n, budget)
        else:
            object_code, self.attempts = self._draw(n, budget)
        self.set_codes(groups, object_code, self.prior.name, self.prior)

    def __getitem__(self, index: int) -> Scene:
        """Scene `index`: image [3, H, W] uint8 and the three labels of every data set of codes."""
        index = self.position(index)
        objects = self.groups.decode_objects(self.object_code[index])
        return Scene(self.board.paint(objects, self.boxes(index)), self.labels(index), self.key(index))

    def key(self, index: int) -> str:
        """Name of a scene: split, seed, index."""
        return f"{self.split}-{self.seed}-{index:07d}"

    def boxes(self, index: int) -> list[Box]:
        """Where the objects of a scene lie, in index order of their conjunctions."""
        if self._published_boxes is not None:
            return self._published_boxes[index]
        low, span = self.board.margin, self.board.size - 2 * self.board.margin - self.board.obj + 1

        def corners():
            key = random_draws.stream(self.name, self.seed, self.split, "place")
            for block in range(2 * self.board.tries * self.max_objects):
                drawn = random_draws.unit(random_draws.random_words(key, [index], 128 * block, 128))[0]
                yield from (low + (drawn * span).astype(int)).reshape(-1, 2).tolist()

        n = int(self.object_code[index].sum())
        return self.board.place(n, corners().__next__, self.key(index))

    def details(self, index: int) -> dict[str, Any]:
        """Boxes [x0, y0, x1, y1] and number of objects of a scene."""
        return {"boxes": [list(box) for box in self.boxes(index)], **super().details(index)}

    @cached_property
    def population(self) -> dict[str, Any]:
        """Exact entropies of the prior on the feature codes of this split, see `Prior.population`."""
        return self.prior.population(self.support)

    @cached_property
    def _all_splits(self) -> dict[str, Any]:
        mode = self.rule | {"mode": "independent"}
        return self.prior.population(split_codes(self._candidates(), "train", **mode))

    def info(self) -> dict[str, float]:
        """Constants in bits: mean H_Y_given_F of the scenes; exact H_Y, H_F, E_H_Y_given_F of the split's prior.

        H_Y_all_splits and H_F_all_splits are those of a reader who does not know which feature codes the split holds:
        a probe trained on other codes cannot, so I(Y;Z) against H_Y understates what it has learnt.
        """
        of_split, everything = self.population, self._all_splits
        return super().info() | {
            "H_Y": of_split["H_Y"],
            "H_F": of_split["H_F"],
            "E_H_Y_given_F": of_split["E_H_Y_given_F"],
            "H_Y_all_splits": everything["H_Y"],
            "H_F_all_splits": everything["H_F"],
        }

    def report(self) -> dict[str, Any]:
        """Facts on the split beside those of the base: its support and the sampling."""
        return super().report() | {
            "source": "generated",
            "split_mode": self.rule["mode"],
            "support_F": len(self.support),
            "support_mass": self.population["acceptance"] / self._all_splits["acceptance"],
            "attempts": self.attempts,
            "rejections": self.attempts - len(self),
            "acceptance_rate": len(self) / self.attempts,
        }

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the content of this split, JSON-able."""
        return {
            "dataset": self.name,
            "generator": GENERATOR_VERSION,
            "pillow": int(PIL.__version__.split(".")[0]),  # another major version may move pixels of an outline
            "split": self.split,
            "length": len(self),
            "seed": self.seed,
            "sampling": self.sampling,
            "groups": self.groups.names,
            "prior": self.prior.name,
            "board": list(self.board[:5]) + list(self.board.background),
            "rule": self.rule,
        }

    # What a relative of this data set changes.

    @property
    def _largest_scene(self) -> int:
        return self.max_objects

    def _prior(self) -> Prior:
        return priors.uniform_up_to(self.groups.sizes, self.max_objects)

    def _candidates(self) -> np.ndarray:
        return self.groups.candidates()

    def _draw(self, n: int, budget: int) -> tuple[np.ndarray, int]:
        """Object codes [n, K] and the number of draws they took."""
        key = random_draws.stream(self.name, self.seed, self.split, "objects")
        draw = random_draws.draw_uniform(key, self.groups.n_objects, self.max_objects)
        why = "raise dataset.f_split_max_attempt_factor or give the split more feature codes"
        return random_draws.sample_until(n, draw, self._admits, budget, why)

    def _draw_published(self, n: int, budget: int) -> tuple[np.ndarray, int]:
        generator, rng = published_streams(self.seed, self.split)
        drawn, self._published_boxes, attempts = [], [], 0
        support = {row.tobytes() for row in self.support}
        while len(drawn) < n:
            if attempts == budget:
                raise UserError(
                    f"sampling: {len(drawn)} of {n} scenes found in {attempts} draws, giving up; raise "
                    "dataset.f_split_max_attempt_factor or give the split more feature codes"
                )
            attempts += 1
            code = random_draws.draw_published(generator, self.groups.n_objects, self.max_objects)
            if self.groups.feature_code(code).tobytes() in support:
                drawn.append(code)
                self._published_boxes.append(self._place_published(int(code.sum()), rng, len(drawn) - 1))
        return np.stack(drawn), attempts

    def _place_published(self, n: int, rng: random.Random, index: int) -> list[Box]:
        low, high = self.board.margin, self.board.size - self.board.margin - self.board.obj
        return self.board.place(n, lambda: (rng.randint(low, high), rng.randint(low, high)), self.key(index))

    def _admits(self, object_code: np.ndarray) -> np.ndarray:
        return np.isin(pack(self.groups.feature_code(object_code)), pack(self.support))


def published_streams(seed: int, split: str) -> tuple[torch.Generator, random.Random]:
    """The two random streams the published program uses, as if freshly seeded for the split."""
    seed += SPLITS.index(split)
    return torch.Generator().manual_seed(seed), random.Random(seed)


def _board(size: int, obj: int, margin: int, tries: int, disjoint: bool, background: Sequence[int]) -> Board:
    board = Board(
        check_whole("image_size", size, 8),
        check_whole("obj_size", obj, 2),
        check_whole("margin", margin, 0),
        check_whole("max_place_tries", tries, 1),
        bool(disjoint),
        tuple(int(value) for value in background),
    )
    if board.size - 2 * board.margin < board.obj:
        raise UserError(
            f"dataset.obj_size: an object of {obj} px cannot be placed on {size} px with a margin of {margin}, "
            "lower it or raise dataset.image_size"
        )
    if len(board.background) != 3 or not all(0 <= value <= 255 for value in board.background):
        raise UserError(f"dataset.background: got {list(background)}, expected three numbers from 0 to 255")
    return board
