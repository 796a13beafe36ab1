"""Planted worlds: scenes and features of a known distribution, to see how often a claim is made that is not true.

    WorldOptions    how many images and patches, what the features carry
    draw_scenes     objects, classes, colours and places of images: the labels of patches and their pixels
    draw_tokens     features of several worlds on the same scenes: to a probe a world is a layer
    draw_random     what a network of random weights makes of the same pixels and places
    as_sample       scenes and features as a probe reads them

A scene is a board of patches with discs on it; later discs hide earlier ones. The objects of a scene share a few classes; the
colour of an object is that of its class and a little of its own. A feature mixes class, pixels, place, a smooth field, texture
and noise; a vector of the object itself is planted with a strength that is 0 in a null world. A null world says which object
a patch lies on only as far as its pixels do: discs reach over the edge of the board, so that no place on it is special, and two
patches of one class equally far apart are on one object with the same probability wherever they lie.

Shapes: L worlds, M images, T patches, D width, O most objects of a scene, C channels of content.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from activation import PatchSample
from store.shards import StackedTokens

N_CLASSES = 8
CLASS, FIELD, TEXTURE, OBJECT = 4, 4, 6, 4  # channels of what a feature carries; pixels have 3, a place has 4
PLANTED = slice(CLASS + 3 + 4 + FIELD + TEXTURE, CLASS + 3 + 4 + FIELD + TEXTURE + OBJECT)
PLACE_WAVE = 24.0  # patches


@dataclass(frozen=True)
class WorldOptions:
    """Sizes and amplitudes of a world; lengths in patches.

    n_train, n_val, n_test: images; patches: of an image. n_population, population_patches: of the large sample that stands
    for the truth. side: of the board. objects: fewest and most, those beside the board included. radius: smallest and largest.
    classes: that the objects of one scene share. own_color: how far colours of one class lie apart. shading: noise of a pixel.
    field, smooth: amplitude of the smooth field and the length it changes over. texture: amplitude. width: D. noise: of a
    channel. known: amplitude of class, pixels and place.
    """

    n_train: int = 200
    n_val: int = 40
    n_test: int = 400
    patches: int = 48
    n_population: int = 2000
    population_patches: int = 48
    side: int = 12
    objects: tuple[int, int] = (18, 26)
    radius: tuple[float, float] = (2.0, 3.2)
    classes: int = 2
    own_color: float = 0.15
    shading: float = 0.5
    field: float = 1.5
    smooth: float = 4.0
    texture: float = 2.0
    width: int = 28
    noise: float = 0.2
    known: float = 1.0

    def size(self, split: str) -> tuple[int, int]:
        """Images and patches of an image of a split; what follows a dash only tells splits of one kind apart."""
        split = split.partition("-")[0]
        n_images = getattr(self, f"n_{split}")
        return n_images, self.population_patches if split == "population" else self.patches


class Scenes(NamedTuple):
    """The patches of M images: labels, and what features and controls are made of.

    identity, class_: int64 [M, T], 0 is background. place: float32 [M, T, 2] row and column. pixels: float32 [M, T, 3].
    name: says which scenes these are; everything drawn on them later depends on it.
    """

    identity: Tensor
    class_: Tensor
    place: Tensor
    pixels: Tensor
    name: str


def stream(*names: int | str) -> torch.Generator:
    """A stream of random numbers of its own for every combination of names."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_scenes(split: str, options: WorldOptions, name: str) -> Scenes:
    """Draw the scenes of a split.

    Patches are drawn evenly from the board, so that the share of every kind of pair does not depend on their number.
    """
    (n_images, n_patches), rng = options.size(split), stream(name, split)
    n_objects, side, (low, high) = options.objects[1], options.side, options.radius
    count = torch.randint(options.objects[0], n_objects + 1, (n_images, 1, 1), generator=rng)
    center = torch.rand(n_images, n_objects, 2, generator=rng) * (side - 1 + 2 * high) - high  # [M, O, 2]
    radius = low + (high - low) * torch.rand(n_images, 1, n_objects, generator=rng)
    of_scene = torch.randint(1, N_CLASSES + 1, (n_images, options.classes), generator=rng)
    class_ = of_scene.gather(1, torch.randint(0, options.classes, (n_images, n_objects), generator=rng))  # [M, O]
    class_ = torch.cat([torch.zeros_like(class_[:, :1]), class_], 1)  # [M, 1 + O], the ground first
    palette = torch.rand(N_CLASSES + 1, 3, generator=stream("palette"))
    color = palette[class_] + options.own_color * torch.randn(n_images, n_objects + 1, 3, generator=rng)

    cell = torch.rand(n_images, side * side, generator=rng).argsort(1)[:, :n_patches]  # [M, T]
    place = torch.stack([cell // side, cell % side], -1).float()
    covers = (place[:, :, None] - center[:, None]).norm(dim=-1) < radius  # [M, T, O]
    covers &= torch.arange(n_objects) < count
    identity = (covers * torch.arange(1, n_objects + 1)).amax(-1)  # the last disc lies on top; 0: none
    pixels = color.gather(1, identity[..., None].expand(-1, -1, 3))
    pixels = pixels + options.shading * torch.randn(pixels.shape, generator=rng)
    return Scenes(identity, class_.gather(1, identity), place, pixels, f"{name}/{split}")


def draw_tokens(scenes: Scenes, strengths: Mapping[int, float] | Sequence[float], options: WorldOptions) -> Tensor:
    """Features [L, M, T, D] of worlds on the same scenes.

    Worlds differ in field, texture, vectors of objects, noise, and in how the contents are mixed, which is the same in all
    splits.

    Args:
        strengths: amplitude of the planted vector of each object, by the number of a world or of worlds 0, 1, …
    """
    if not isinstance(strengths, Mapping):
        strengths = dict(enumerate(strengths))
    (n_images, n_patches), base = scenes.identity.shape, scenes.name.rpartition("/")[0]
    angle = 2 * torch.pi / PLACE_WAVE * scenes.place  # [M, T, 2]
    of_class = torch.randn(N_CLASSES + 1, CLASS, generator=stream("class"))[scenes.class_]
    shared = [options.known * part for part in (of_class, scenes.pixels, angle.sin(), angle.cos())]
    tokens = []
    for world, strength in strengths.items():
        rng = stream(scenes.name, "world", world)
        draw = lambda *shape, rng=rng: torch.randn(n_images, *shape, generator=rng)
        phase = 2 * torch.pi * torch.rand(n_images, 1, FIELD, generator=rng)
        field = options.field * (scenes.place @ (draw(2, FIELD) / options.smooth) + phase).cos()  # [M, T, FIELD]
        texture = options.texture * draw(n_patches, TEXTURE)
        of_object = strength * draw(options.objects[1] + 1, OBJECT)
        planted = of_object.gather(1, scenes.identity[..., None].expand(-1, -1, OBJECT))
        content = torch.cat([*shared, field, texture, planted], -1)  # [M, T, C]
        mixing = draw_mixing(base, world, options)[: content.shape[-1]]  # [C, D]
        tokens.append(content @ mixing + options.noise * draw(n_patches, options.width))
    return torch.stack(tokens)


def draw_mixing(name: str, world: int, options: WorldOptions) -> Tensor:
    """Orthonormal rows [D, D]: what each channel of content is in a feature; the planted vector has the channels PLANTED."""
    square = torch.randn(options.width, options.width, generator=stream(name, "mixing", world))
    return torch.linalg.qr(square).Q


def draw_random(scenes: Scenes, options: WorldOptions) -> Tensor:
    """Features [1, M, T, D] of a layer of random weights that reads pixels and place."""
    read = torch.cat([scenes.pixels, scenes.place / options.side, torch.ones_like(scenes.pixels[..., :1])], -1)
    weights = torch.randn(read.shape[-1], options.width, generator=stream(scenes.name.rpartition("/")[0], "random"))
    return (read @ weights).tanh()[None]


def as_sample(scenes: Scenes, tokens: Tensor, layers: Sequence[int | str]) -> PatchSample:
    """Features [L, M, T, D] on scenes as a probe reads them; every patch is valid."""
    valid = torch.ones_like(scenes.identity, dtype=torch.bool)
    labels = {
        "identity": scenes.identity, "identity_valid": valid, "class": scenes.class_, "class_valid": valid,
        "place": scenes.place,
    }  # fmt: skip
    position = torch.cat([torch.zeros_like(scenes.place[..., :1]), scenes.place], -1).long()
    keys = [f"{scenes.name}/{i}" for i in range(len(scenes.identity))]
    meta = {"fingerprint": scenes.name, "index": scenes.name, "selected_by": "identity"}
    meta["classes"] = [str(k) for k in range(N_CLASSES + 1)]
    grids = torch.ones(len(keys), 2, dtype=torch.long)
    return PatchSample(StackedTokens.from_tensor(tokens, layers), position, labels, {}, keys, grids, meta)
