"""Procedural scenes of many similar objects: the data set that needs no files.

What makes them a test of binding: a scene holds one to three classes and more objects than classes, so some class
always repeats; the objects of one class share their palette up to a small jitter; every object carries one or two
discs of another hue, so an object is not one colour; objects stand next to each other and occlude; the background is
textured and carries blobs in an object's own colours (distractors). Class, colour and position alone therefore do not
tell which object a patch belongs to.

Everything random about scene `i` comes from `default_rng([seed, split, i])`, and each scene is rendered by itself:
the same index gives the same bytes whatever was asked before or beside it. Splits are different random streams, hence
disjoint. Rendering is plain NumPy on one thread. (Bytes are identical on one machine; the vector maths of another
processor may move a pixel by one grey level.)

`noise` cuts the link from pixels to labels. The picture shown is `(1 - noise) * scene + noise * stranger`, where the
stranger is a scene of the same distribution from an independent stream, while labels stay those of the scene. At
`noise=1` the picture is statistically independent of the label maps, so nothing but their prior (where objects tend
to lie) can be read from it; yet it is an ordinary scene, so a backbone is never asked about pictures unlike those it
was trained on. In between the signal-to-interference ratio `(1 - noise) / noise` slides. White noise was not taken
because it would change two things at once: the signal, and how far the picture is from everything the backbone knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datasets.painting import LOOKS, N_CLASSES, TABLE, Canvas, Plan, to_rgb
from datasets.scene import Scene, check_choice
from errors import UserError

GENERATOR_VERSION = 1  # part of the fingerprint: raise it with every change that alters a pixel
STREAMS = {"pretrain": 0, "train": 1, "val": 2, "test": 3}
PRETRAIN_SCENES = 2**31  # the stream has no natural end; this is only what `len` says
MARGIN = 9 / 96  # centres keep this share of the short side away from the border
MOVING, SPEED, TURN = 0.5, (4.0, 8.0), 0.4  # of a clip: who moves; pixels (at 96 px) and largest radians per frame


class Scenes:
    """Generated scenes with identity and class maps.

    Args:
        split: "train", "val", "test" or "pretrain" (the endless stream on which backbones are pretrained).
        size: pixels, one number for a square or (height, width); lengths of objects scale with the shorter side / 96.
        n_train, n_val, n_test: scenes per split.
        seed: of the whole data set; another seed gives other scenes in every split.
        objects: fewest and most objects in a scene.
        radius: smallest and largest radius of an object, in pixels of a 96 px scene.
        near: probability that an object is put next to the one before it.
        inst_jitter: how far the colours of objects of one class lie apart: half the range of the hue (saturation and
            value get twice as much).
        hue_spread: standard deviation of the hue of a class between scenes.
        noise: share of the picture replaced by an unrelated scene, 0 to 1 (see the module text).
        on_error: accepted like by every data set ("raise" or "skip"); a generated scene is never unreadable.

    Raises:
        UserError: for an option outside its range.
    """

    def __init__(
        self,
        split: str,
        *,
        size: int | Sequence[int] = 96,
        n_train: int = 800,
        n_val: int = 100,
        n_test: int = 300,
        seed: int = 0,
        objects: Sequence[int] = (3, 6),
        radius: Sequence[float] = (15.0, 22.0),
        near: float = 0.35,
        inst_jitter: float = 0.10,
        hue_spread: float = 0.08,
        noise: float = 0.0,
        on_error: str = "raise",
    ) -> None:
        check_choice("split", split, STREAMS)
        check_choice("on_error", on_error, ("raise", "skip"))
        self.height, self.width = _size(size)
        lowest, highest = _pair("objects", objects)
        if not (lowest == int(lowest) and highest == int(highest) and 2 <= lowest <= highest <= 64):
            raise UserError(f"dataset.objects: got {list(objects)}, expected whole numbers, 2 <= fewest <= most <= 64")
        smallest, largest = _pair("radius", radius)
        if not 4 <= smallest <= largest <= 48:
            raise UserError(f"dataset.radius: got {list(radius)}, expected 4 <= smallest <= largest <= 48 (at 96 px)")
        shares = {
            "near": (near, 1),
            "noise": (noise, 1),
            "inst_jitter": (inst_jitter, 0.5),
            "hue_spread": (hue_spread, 0.5),
        }
        for name, (value, most) in shares.items():
            if not 0 <= value <= most:
                raise UserError(f"dataset.{name}: got {value}, expected a number from 0 to {most}")
        if seed < 0 or seed != int(seed):
            raise UserError(f"dataset.seed: got {seed}, expected a whole number of at least 0")
        counts = {"pretrain": PRETRAIN_SCENES, "train": n_train, "val": n_val, "test": n_test}
        if counts[split] < 1 or counts[split] != int(counts[split]):
            raise UserError(f"dataset.n_{split}: got {counts[split]}, expected a whole number of at least 1")
        self.split, self.on_error, self.seed = split, on_error, int(seed)
        self.length = int(counts[split])
        self.objects = (int(lowest), int(highest))
        self.radius = (float(smallest), float(largest))
        self.near, self.noise = float(near), float(noise)
        self.inst_jitter, self.hue_spread = float(inst_jitter), float(hue_spread)
        self.classes = ["background", *LOOKS]
        self._canvas = Canvas(self.height, self.width, self.radius[1])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Scene:
        """Scene `index`: image [3, H, W] uint8, labels "identity" and "class" [H, W] int32 (0 background)."""
        index = int(index)
        if index < 0:
            index += self.length
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        image, identity, category = self._scene(index)
        labels = {
            "identity": torch.from_numpy(identity.astype(np.int32)),
            "class": torch.from_numpy(category.astype(np.int32)),
        }
        return Scene(torch.from_numpy(image), labels, f"{self.split}-{self.seed}-{index:07d}")

    def render_batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The same scenes as by single index, stacked: images [B, 3, H, W], identity and class [B, H, W], all uint8."""
        size = (self.height, self.width)
        images = np.empty((len(indices), 3, *size), np.uint8)
        identity = np.empty((len(indices), *size), np.uint8)
        category = np.empty((len(indices), *size), np.uint8)
        for b, index in enumerate(indices):
            images[b], identity[b], category[b] = self._scene(int(index))
        return torch.from_numpy(images), torch.from_numpy(identity), torch.from_numpy(category)

    def render_clip(self, indices: Sequence[int], episodes: int = 1) -> Tensor:
        """Moments of each scene: the picture of `render_batch`, then per episode one before and one after it.

        The camera and the background stand still. In each episode every object rests or, with probability MOVING, passes
        through its place in the picture on a straight line, turning, at constant speed. No label is involved: this is what a
        video camera would see of things that are pushed about now and then.

        Returns:
            [B, 1 + 2 * episodes, 3, H, W] uint8.
        """
        clips = np.empty((len(indices), 1 + 2 * episodes, 3, self.height, self.width), np.uint8)
        for b, index in enumerate(indices):
            stream = [self.seed, STREAMS[self.split], int(index)]
            rng = np.random.default_rng(stream)
            plan = self._plan(rng)
            ground = self._canvas.background(plan, rng)
            pushes = np.random.default_rng([*stream, 2])
            poses = [np.zeros((3, len(plan.x)))]
            for _ in range(episodes):
                push = self._push(pushes, len(plan.x))
                poses += [-push, push]
            for frame, (dx, dy, turn) in enumerate(poses):
                moment = plan._replace(x=plan.x + dx, y=plan.y + dy, angle=plan.angle + turn)
                image = ground.copy()
                maps = np.empty((2, self.height, self.width), np.uint8)  # painted beside it, not looked at
                self._canvas.paint_objects(image, maps[0], maps[1], moment)
                clips[b, frame] = np.rint(image * 255)
        return torch.from_numpy(clips)

    def fingerprint(self) -> dict:
        """Everything that decides the content of this split, JSON-able."""
        return {
            "dataset": "scenes",
            "generator": GENERATOR_VERSION,
            "split": self.split,
            "length": self.length,
            "seed": self.seed,
            "size": [self.height, self.width],
            "objects": list(self.objects),
            "radius": list(self.radius),
            "near": self.near,
            "inst_jitter": self.inst_jitter,
            "hue_spread": self.hue_spread,
            "noise": self.noise,
        }

    def info(self) -> dict[str, float]:
        """No constants beyond the labels themselves."""
        return {}

    def report(self) -> dict:
        """Facts worth a line in a summary."""
        return {"source": "generated", "scenes": self.length, "classes": N_CLASSES}

    def _scene(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image [3, H, W], identity and class [H, W], all uint8."""
        stream = [self.seed, STREAMS[self.split], index]
        image, identity, category = self._render(np.random.default_rng(stream))
        if self.noise > 0:
            stranger, _, _ = self._render(np.random.default_rng([*stream, 1]))
            image = (1 - self.noise) * image + self.noise * stranger
        return np.rint(image * 255).astype(np.uint8), identity, category

    def _render(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        plan = self._plan(rng)
        image = self._canvas.background(plan, rng)
        identity = np.zeros(image.shape[1:], np.uint8)
        category = np.zeros(image.shape[1:], np.uint8)
        self._canvas.paint_objects(image, identity, category, plan)
        return image, identity, category

    def _push(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Step of each object between two moments: x, y in pixels, angle in radians. [3, n]; zero for those that rest."""
        most = self.objects[1]
        moves, direction, speed, spin = rng.random((4, most))[:, :n]
        length = (SPEED[0] + (SPEED[1] - SPEED[0]) * speed) * min(self.height, self.width) / 96
        direction = 2 * math.pi * direction
        step = np.stack([length * np.cos(direction), length * np.sin(direction), TURN * (2 * spin - 1)])
        return step * (moves < MOVING)

    def _plan(self, rng: np.random.Generator) -> Plan:
        """Classes, colours and poses of the objects; every draw has a fixed size, so none shifts another."""
        low, most = self.objects
        scale = min(self.height, self.width) / 96
        n = int(rng.integers(low, most + 1))
        n_classes = min(int(rng.integers(1, 4)), n - 1)  # fewer classes than objects: some class repeats
        here = rng.permutation(N_CLASSES)
        category = here[(rng.random(most) * n_classes).astype(int)][:n]

        # Palette of each class in this scene, then a jitter per object.
        wobble = math.sqrt(12) * (rng.random((2, N_CLASSES)) - 0.5)  # unit standard deviation
        tone = rng.random((4, N_CLASSES))
        body_hue = np.arange(N_CLASSES) / N_CLASSES + self.hue_spread * wobble[0]
        disc_hue = body_hue + TABLE[:, 14] + 0.046 * wobble[1]
        jitter = (2 * self.inst_jitter * (rng.random((6, most)) - 0.5))[:, :n]
        hue = np.stack([body_hue[category] + jitter[0], disc_hue[category] + jitter[1]])
        saturation = 0.45 + 0.5 * tone[:2, category] + 2 * jitter[2:4]  # [2, n]: body, disc
        value = np.stack([0.55 + 0.45 * tone[2, category], 0.45 + 0.55 * tone[3, category]]) + 2 * jitter[4:]
        body, disc = to_rgb(hue, np.clip(saturation, 0, 1), np.clip(value, 0, 1))

        radius = (self.radius[0] + (self.radius[1] - self.radius[0]) * rng.random(most)) * scale
        pose = rng.random((7, most))
        margin = MARGIN * 96 * scale
        x = margin + (self.width - 2 * margin) * pose[0]
        y = margin + (self.height - 2 * margin) * pose[1]
        # Some objects go next to the one before, at 0.55 to 0.83 of the sum of the radii: touching or occluding.
        step, turn = 0.55 * (1.0 + 0.5 * pose[3]), 2 * math.pi * pose[4]
        for k in range(1, n):
            if pose[2, k] < self.near:
                reach = step[k] * (radius[k] + radius[k - 1])
                x[k] = _beside(x[k - 1], reach * math.cos(turn[k]), margin, self.width - margin)
                y[k] = _beside(y[k - 1], reach * math.sin(turn[k]), margin, self.height - margin)
        order = np.argsort(rng.random(most)[:n])  # who lies on top does not depend on who was placed first
        return Plan(category, body, disc, radius[:n], x[:n], y[:n], 2 * math.pi * pose[5, :n], pose[6, :n], order)


def _beside(previous: float, step: float, low: float, high: float) -> float:
    """Previous + step, mirrored to the other side when that leaves [low, high], clipped at last."""
    there = previous + step
    if not low <= there <= high:
        there = previous - step
    return min(max(there, low), high)


def _size(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else _pair("size", size)
    if not all(value == int(value) and 16 <= value <= 4096 for value in (height, width)):
        raise UserError(f"dataset.size: got {size}, expected 16 to 4096 whole pixels, one number or [height, width]")
    return int(height), int(width)


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    try:
        first, second = values
        return float(first), float(second)
    except (TypeError, ValueError):
        raise UserError(f"dataset.{name}: got {values!r}, expected two numbers, as in dataset.{name}=[3,6]") from None
