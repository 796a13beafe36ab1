"""How procedural scenes are painted: the look of each class, the background, the objects with their occlusion.

Plain NumPy on one thread; everything random comes from the caller's generator and plan.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

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
TABLE = np.array(
    [[*look[:7], *look.disc_1, *look.disc_2, TEXTURES.index(look.texture), look.disc_hue] for look in LOOKS.values()],
    np.float32,
)


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


class Canvas:
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
        first, last = to_rgb(ends[0], 0.1 + 0.6 * ends[1], 0.25 + 0.65 * ends[2]).astype(np.float32)
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
        table = TABLE[plan.category][:, :, None, None]  # [n, 15, 1, 1]
        half_width, half_height, exponent, lobes, depth, hole, bend = (table[:, i] for i in range(7))
        u2 = u * u
        bent = v - bend * (u2 - 0.1)

        # Superellipse |u/a|^p + |v/b|^p = 1, its radius modulated by the lobes; f = 1 on the outline.
        a, b = np.abs(u / half_width) + 1e-4, np.abs(bent / half_height) + 1e-4
        f = np.exp(np.log(np.exp(exponent * np.log(a)) + np.exp(exponent * np.log(b))) / exponent)
        lobed = np.flatnonzero(TABLE[plan.category, 3])
        if len(lobed):
            angle = np.arctan2(bent[lobed], u[lobed])
            f[lobed] /= 1 + depth[lobed] * (np.cos(lobes[lobed] * angle) - 0.45)
        sharp = radius * np.minimum(half_width, half_height)  # edges fade over about one pixel
        body = np.clip((1 - f) * sharp + 0.5, 0, 1)
        holed = np.flatnonzero(TABLE[plan.category, 5])
        if len(holed):
            body[holed] *= np.clip((f[holed] - hole[holed]) * sharp[holed] + 0.5, 0, 1)
        disc = np.zeros_like(body)
        for first in (7, 10):
            x, y, r = table[:, first], table[:, first + 1], table[:, first + 2]
            disc = np.maximum(disc, np.clip((r - np.sqrt((u - x) ** 2 + (v - y) ** 2)) * radius + 0.5, 0, 1) * (r > 0))

        shade = 1 - 0.22 * (u2 + v * v)
        texture = TABLE[plan.category, 13]
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


def to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """HSV in [0, 1] (hue on a circle) to RGB, one more axis of three at the end."""
    sector = (np.array([5.0, 3.0, 1.0]) + 6 * (hue % 1.0)[..., None]) % 6
    return value[..., None] * (1 - saturation[..., None] * np.clip(np.minimum(sector, 4 - sector), 0, 1))


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
