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
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from datasets.scene import Scene
from errors import UserError

GENERATOR_VERSION = 1  # part of the fingerprint: raise it with every change that alters a pixel
STREAMS = {"pretrain": 0, "train": 1, "val": 2, "test": 3}
PRETRAIN_SCENES = 2**31  # the stream has no natural end; this is only what `len` says
MARGIN = 9 / 96  # centres keep this share of the short side away from the border
MOVING, SPEED, TURN = 0.5, (4.0, 8.0), 0.4  # of a clip: who moves; pixels (at 96 px) and largest radians per frame
REACH = 1.1  # the furthest painted point of any class, in radii (the discs of the banana)


class Look(NamedTuple):
    """Outline, discs and texture of a class; lengths in radii of the object, hue on the circle [0, 1)."""

    half_width: float
    half_height: float
    exponent: float  # of the superellipse: 2 round, 8 square
    lobes: int
    lobe_depth: float
    hole: float  # radius of the hole relative to the outline; 0 none
    bend: float
    disc_1: tuple[float, float, float]  # x, y, radius
    disc_2: tuple[float, float, float]  # radius 0: no second disc
    texture: str  # plain | stripes | dots | checker
    disc_hue: float  # added to the hue of the body


NO_DISC = (0.0, 0.0, 0.0)
LOOKS = {
    "beetle": Look(0.82, 0.64, 2.0, 0, 0.00, 0.0, 0.00, (0.72, 0.00, 0.27), NO_DISC, "stripes", 0.45),
    "crate": Look(0.78, 0.78, 8.0, 0, 0.00, 0.0, 0.00, (0.00, 0.00, 0.34), (0.58, 0.58, 0.20), "plain", 0.30),
    "dumbbell": Look(0.80, 0.22, 6.0, 0, 0.00, 0.0, 0.00, (0.70, 0.00, 0.32), (-0.70, 0.00, 0.32), "plain", 0.55),
    "star": Look(0.78, 0.78, 2.0, 5, 0.35, 0.0, 0.00, (0.00, 0.00, 0.28), NO_DISC, "plain", 0.40),
    "ring": Look(0.90, 0.90, 2.0, 0, 0.00, 0.5, 0.00, (0.72, 0.00, 0.27), NO_DISC, "stripes", 0.35),
    "trefoil": Look(0.74, 0.74, 2.0, 3, 0.38, 0.0, 0.00, (-0.30, 0.62, 0.22), (-0.30, -0.62, 0.22), "dots", 0.50),
    "banana": Look(0.90, 0.34, 2.5, 0, 0.00, 0.0, 0.55, (-0.80, 0.36, 0.20), (0.80, 0.36, 0.20), "plain", 0.60),
    "cross": Look(0.80, 0.80, 2.0, 4, 0.45, 0.0, 0.00, (0.82, 0.00, 0.20), NO_DISC, "checker", 0.35),
}
TEXTURES = ("plain", "stripes", "dots", "checker")
N_CLASSES = len(LOOKS)
# One row per class: the numbers of its Look, texture by index.
_TABLE = np.array(
    [[*look[:7], *look.disc_1, *look.disc_2, TEXTURES.index(look.texture), look.disc_hue] for look in LOOKS.values()],
    np.float32,
)
_DISC_HUE = _TABLE[:, 14]


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
        UserError: for a knob outside its range.
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
        if split not in STREAMS:
            raise UserError(f"dataset split: got {split!r}, expected one of {', '.join(STREAMS)}")
        if on_error not in ("raise", "skip"):
            raise UserError(f"dataset.on_error: got {on_error!r}, expected raise or skip")
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
        self._canvas = _Canvas(self.height, self.width, self.radius[1])

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
        disc_hue = body_hue + _DISC_HUE + 0.046 * wobble[1]
        jitter = (2 * self.inst_jitter * (rng.random((6, most)) - 0.5))[:, :n]
        hue = np.stack([body_hue[category] + jitter[0], disc_hue[category] + jitter[1]])
        saturation = 0.45 + 0.5 * tone[:2, category] + 2 * jitter[2:4]  # [2, n]: body, disc
        value = np.stack([0.55 + 0.45 * tone[2, category], 0.45 + 0.55 * tone[3, category]]) + 2 * jitter[4:]
        body, disc = _rgb(hue, np.clip(saturation, 0, 1), np.clip(value, 0, 1))

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


class Plan(NamedTuple):
    """What one scene holds: n objects. Colours are RGB in [0, 1]; lengths in pixels; angles in radians."""

    category: np.ndarray  # [n] class index, without background
    body: np.ndarray  # [n, 3]
    disc: np.ndarray  # [n, 3]
    radius: np.ndarray  # [n]
    x: np.ndarray  # [n]
    y: np.ndarray  # [n]
    angle: np.ndarray  # [n]
    phase: np.ndarray  # [n] in [0, 1): of the texture
    order: np.ndarray  # [n] painting order, last on top


class _Canvas:
    """Pixel grids shared by all scenes of one size, and the two painters."""

    def __init__(self, height: int, width: int, largest_radius: float) -> None:
        self.height, self.width = height, width
        self.scale = min(height, width) / 96
        self.x = (np.arange(width, dtype=np.float32) / self.scale)[None, :]  # [1, W] in pixels of a 96 px scene
        self.y = (np.arange(height, dtype=np.float32) / self.scale)[:, None]  # [H, 1]
        self.coarse = (_cubic(height, 6), _cubic(width, 6))
        self.fine = (_cubic(height, 12), _cubic(width, 12))
        self.half = math.ceil(REACH * largest_radius * self.scale) + 1  # half the side of the window around an object
        offset = np.arange(-self.half, self.half + 1, dtype=np.float32)
        self.window_x, self.window_y = offset[None, None, :], offset[None, :, None]

    def background(self, plan: Plan, rng: np.random.Generator) -> np.ndarray:
        """Gradient, colour clouds, stripes or checks, blobs coloured like the first object. [3, H, W] float32."""
        ends = rng.random((3, 2))
        first, last = _rgb(ends[0], 0.1 + 0.6 * ends[1], 0.25 + 0.65 * ends[2]).astype(np.float32)
        slope, stripe_angle, frequency, strength, striped, checked = rng.random(6)
        clouds, cloud_strength = rng.random((3, 6, 6), np.float32), 0.35 * rng.random()
        blobs, blob_level = rng.random((12, 12), np.float32), 0.68 + 0.14 * rng.random()
        blob_from_body = rng.random() < 0.5

        c, s = np.float32(math.cos(2 * math.pi * slope)), np.float32(math.sin(2 * math.pi * slope))
        t = np.clip((self.x - 48) / 96 * c + (self.y - 48) / 96 * s + 0.5, 0, 1)  # [H, W]
        image = first[:, None, None] + (last - first)[:, None, None] * t  # [3, H, W]
        if striped < 0.6:
            frequency = 0.25 + 0.7 * frequency  # radians per pixel of a 96 px scene
            angle = math.pi * stripe_angle
            c, s = np.float32(frequency * math.cos(angle)), np.float32(frequency * math.sin(angle))
            wave = np.sin(self.x * c + self.y * s)
            if checked < 0.4:
                wave *= np.sin(self.y * c - self.x * s)
            image += np.float32(0.22 * strength) * wave
        up, across = self.coarse
        image += (up @ (clouds - 0.5) @ across.T) * np.float32(cloud_strength)
        up, across = self.fine
        cover = 0.85 * np.clip((up @ blobs @ across.T - np.float32(blob_level)) * 12, 0, 1)  # [H, W]
        colour = (plan.body if blob_from_body else plan.disc)[0].astype(np.float32)
        image += (colour[:, None, None] - image) * cover
        return np.clip(image, 0, 1).astype(np.float32)

    def paint_objects(self, image: np.ndarray, identity: np.ndarray, category: np.ndarray, plan: Plan) -> None:
        """Paint in place, back to front: colours into image [3, H, W], k + 1 and class + 1 into the two maps [H, W]."""
        column, row = np.floor(plan.x).astype(int), np.floor(plan.y).astype(int)
        alpha, colour = self._windows(plan, (column - plan.x).astype(np.float32), (row - plan.y).astype(np.float32))
        for k in plan.order:
            top, left = row[k] - self.half, column[k] - self.half
            rows = slice(max(top, 0), min(top + 2 * self.half + 1, self.height))
            columns = slice(max(left, 0), min(left + 2 * self.half + 1, self.width))
            part = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
            under = image[:, rows, columns]
            under += (colour[k][(slice(None), *part)] - under) * alpha[k][part]
            solid = alpha[k][part] > 0.5
            identity[rows, columns][solid] = k + 1
            category[rows, columns][solid] = plan.category[k] + 1

    def _windows(self, plan: Plan, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cover [n, w, w] and colour [n, 3, w, w] of every object in its own window; dx, dy [n] place the window."""
        column = lambda a: np.asarray(a, np.float32)[:, None, None]
        radius = column(plan.radius)
        px, py = self.window_x + column(dx), self.window_y + column(dy)
        c, s = column(np.cos(plan.angle) / plan.radius), column(np.sin(plan.angle) / plan.radius)
        u, v = c * px + s * py, c * py - s * px  # [n, w, w] coordinates in radii, turned with the object
        table = _TABLE[plan.category][:, :, None, None]  # [n, 15, 1, 1]
        half_width, half_height, exponent, lobes, depth, hole, bend = (table[:, i] for i in range(7))
        u2 = u * u
        bent = v - bend * (u2 - 0.1)

        # Superellipse |u/a|^p + |v/b|^p = 1, its radius modulated by the lobes; f = 1 on the outline.
        a, b = np.abs(u / half_width) + 1e-4, np.abs(bent / half_height) + 1e-4
        f = np.exp(np.log(np.exp(exponent * np.log(a)) + np.exp(exponent * np.log(b))) / exponent)
        lobed = np.flatnonzero(_TABLE[plan.category, 3])
        if len(lobed):
            angle = np.arctan2(bent[lobed], u[lobed])
            f[lobed] /= 1 + depth[lobed] * (np.cos(lobes[lobed] * angle) - 0.45)
        sharp = radius * np.minimum(half_width, half_height)  # edges fade over about one pixel
        body = np.clip((1 - f) * sharp + 0.5, 0, 1)
        holed = np.flatnonzero(_TABLE[plan.category, 5])
        if len(holed):
            body[holed] *= np.clip((f[holed] - hole[holed]) * sharp[holed] + 0.5, 0, 1)
        disc = np.zeros_like(body)
        for first in (7, 10):
            x, y, r = table[:, first], table[:, first + 1], table[:, first + 2]
            disc = np.maximum(disc, np.clip((r - np.sqrt((u - x) ** 2 + (v - y) ** 2)) * radius + 0.5, 0, 1) * (r > 0))

        shade = 1 - 0.22 * (u2 + v * v)
        texture = _TABLE[plan.category, 13]
        for k in np.flatnonzero(texture):
            frequency = np.float32(9 * 1.3 * (0.8 + 0.5 * plan.phase[k]))
            along, across = np.sin(u[k] * frequency + np.float32(2 * math.pi * plan.phase[k])), np.sin(v[k] * frequency)
            if texture[k] == 1:
                wave = along
            elif texture[k] == 2:
                wave = (along * across > 0.45) * np.float32(1.6) - np.float32(0.4)
            else:
                wave = np.clip(along * across * 6, -1, 1)
            shade[k] *= 1 + np.float32(0.17) * wave
        body_colour = plan.body.astype(np.float32)[:, :, None, None] * shade[:, None]
        colour = body_colour + (plan.disc.astype(np.float32)[:, :, None, None] - body_colour) * disc[:, None]
        return np.maximum(body, disc), np.clip(colour, 0, 1)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV in [0, 1] (hue on a circle) to RGB, one more axis of three at the end."""
    sector = (np.array([5.0, 3.0, 1.0]) + 6 * (hue % 1.0)[..., None]) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(sector, 4 - sector), 0, 1))


def _beside(previous: float, step: float, low: float, high: float) -> float:
    """Previous + step, mirrored to the other side when that leaves [low, high], clipped at last."""
    there = previous + step
    if not low <= there <= high:
        there = previous - step
    return min(max(there, low), high)


def _cubic(n_out: int, n_in: int) -> np.ndarray:
    """Matrix [n_out, n_in] float32 that interpolates n_in values, ends aligned, with Keys' cubic kernel (a = -1/2)."""
    at = np.linspace(0, n_in - 1, n_out)[:, None]
    matrix = np.zeros((n_out, n_in))
    for tap in range(-1, 3):
        node = np.floor(at) + tap
        d = np.abs(at - node)
        weight = np.where(d < 1, 1.5 * d**3 - 2.5 * d**2 + 1, np.where(d < 2, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2, 0))
        np.add.at(matrix, (np.arange(n_out)[:, None], np.clip(node, 0, n_in - 1).astype(int)), weight)
    return matrix.astype(np.float32)


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
