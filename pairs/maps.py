"""The numbers of score maps: one anchor against all patches of an image, at every layer, by probe, cosine and attention."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from datasets.scene import Scene
from errors import UserError
from pairs.encode import EncodedScene, FittedRun
from patches.anchor import anchor_at, default_anchor, patch_box
from patches.geometry import Geometry
from patches.selection import owned_patches
from patches.windows import join_scores

Place = tuple[int, int, int]  # window, row, column of a patch
ANCHORS = ("patch", "object", "cls")
VIEWS = ("probe", "cosine", "attention")


class Anchor(NamedTuple):
    """What a map is asked about.

    kind: "patch"; "object", the mean of the tokens of the patches of one object; "cls", the class token.
    place: the patch; of an object, the patch it was named by; None for the class token.
    box: (top, left, bottom, right) of the place in pixels of the image. object_id: its identity; 0 background or unknown.
    members: bool [n, h, w], the patches whose tokens are averaged; empty of the class token.
    """

    kind: str
    place: Place | None
    box: tuple[float, float, float, float] | None
    object_id: int
    members: Tensor


class MapRow(NamedTuple):
    """The maps of one run by one measure.

    run: its name. view: probe, cosine or attention. name: what the numbers are, for the colour bar.
    layers: the L layers. patch_scores: float32 [L, n_windows, h, w] of every patch with the anchor; NaN where there is no
        number (attention reaches no other window, and no block reads the last layer).
    maps: float32 [L, H, W], the windows joined; NaN for a layer without numbers.
    auroc: per layer, of the patch scores against the patches of the anchor's object; None where that is undefined.
    """

    run: str
    view: str
    name: str
    layers: list[int | str]
    patch_scores: Tensor
    maps: Tensor
    auroc: list[float | None]


class ScoreMaps(NamedTuple):
    """What the figures of one anchor in one image show.

    key, image [3, H, W] uint8: of the scene. identity: [H, W] int, the true objects; None for a photo without labels.
    neighbour: identity of the nearest other object of the class of the anchor's object; 0: none.
    rows: the maps, one row per run and measure.
    """

    key: str
    image: Tensor
    identity: Tensor | None
    anchor: Anchor
    neighbour: int
    rows: list[MapRow]


def choose_anchor(
    encoded: EncodedScene, kind: str, pixel: Sequence[int] | None = None, patch: Sequence[int] | None = None, nth: int = 0
) -> Anchor:
    """The anchor that is asked for, by default in the middle of the largest object (of a photo: in the middle).

    Args:
        kind: one of ANCHORS. pixel: [row, column] in the image. patch: [window, row, column], goes before the pixel.
        nth: without pixel and patch, 1 takes the second largest object, and so on.

    Raises:
        UserError: unknown kind, no such place, no object there, or no class token.
    """
    if kind not in ANCHORS:
        raise UserError(f"unknown vis.anchor={kind}; valid: {', '.join(ANCHORS)}")
    scene, geometry = encoded.scene, encoded.geometry
    nowhere = torch.zeros(len(geometry.starts), *geometry.grid, dtype=torch.bool)
    if kind == "cls":
        if encoded.prefix.shape[2] == 0:
            raise UserError("vis.anchor=cls needs a backbone with a class token; choose vis.anchor=patch")
        return Anchor("cls", None, None, 0, nowhere)
    place = _place(encoded, pixel, patch, nth)
    object_id = int(encoded.labels["identity"].label[place]) if encoded.labels else 0
    box = patch_box(place, geometry, scene.image.shape[-2:])
    members = nowhere
    members[place] = True
    if kind == "object":
        if object_id == 0:
            raise UserError(f"{scene.key} has no known object at the anchor; name one with vis.pixel, or set vis.anchor=patch")
        labels = encoded.labels["identity"]
        members = (labels.label == object_id) & labels.valid & owned_patches(geometry)
    return Anchor(kind, place, box, object_id, members)


def _place(encoded: EncodedScene, pixel: Sequence[int] | None, patch: Sequence[int] | None, nth: int) -> Place:
    geometry, image_hw = encoded.geometry, tuple(encoded.scene.image.shape[-2:])
    if patch is not None:
        sizes = (len(geometry.starts), *geometry.grid)
        if len(patch) != 3 or not all(0 <= int(p) < n for p, n in zip(patch, sizes, strict=True)):
            raise UserError(f"vis.patch={list(patch)}, expected [window, row, column] below {list(sizes)}")
        return tuple(int(p) for p in patch)
    if pixel is not None:
        return anchor_at(pixel, geometry, image_hw)
    if not encoded.labels:
        return anchor_at([image_hw[0] // 2, image_hw[1] // 2], geometry, image_hw)
    identity = encoded.scene.labels["identity"]
    for _ in range(nth):  # leave out the objects that were shown before
        ids, sizes = identity[identity > 0].unique(return_counts=True)
        shown = set(encoded.labels["identity"].label.unique().tolist())
        largest = [n for n in ids[sizes.argsort(descending=True, stable=True)].tolist() if n in shown]
        if len(largest) < 2:
            break
        identity = torch.where(identity == largest[0], 0, identity)
    return default_anchor(identity, encoded.labels["identity"], geometry)


def nearest_of_class(scene: Scene, object_id: int) -> int:
    """The object of the class of `object_id` whose middle is nearest to its middle; 0 where there is none."""
    if object_id <= 0 or "class" not in scene.labels:
        return 0
    identity, category = scene.labels["identity"], scene.labels["class"]
    places = {n: (identity == n).nonzero().float().mean(0) for n in identity[identity > 0].unique().tolist()}
    of_class = {n: int(category[identity == n].mode().values) for n in places}
    if object_id not in places or of_class[object_id] == 0:
        return 0
    others = [n for n in places if n != object_id and of_class[n] == of_class[object_id]]
    return min(others, key=lambda n: float((places[n] - places[object_id]).norm()), default=0)


@torch.inference_mode()
def map_row(run: FittedRun, encoded: EncodedScene, anchor: Anchor, view: str, *, smooth: bool = True) -> MapRow:
    """The maps of an anchor at all layers of a run by one measure.

    The score of a pair is the mean over seeds of the probe's probability (`pairs.pair_form`), the cosine of two tokens, or
    the attention that the anchor pays in the block that reads the layer, mean over heads. For an object the anchor's token
    is the mean of its patches' tokens, and its attention the mean of theirs; a class token is asked in its own window.

    Args:
        smooth: whether the map between the middles of patches is bilinear (`join_scores`).
    """
    geometry, n_layers = encoded.geometry, len(encoded.layers)
    n_windows, n_patches = encoded.tokens.shape[1:3]
    if view == "attention":
        scores = torch.stack([_attention_scores(encoded, anchor, layer) for layer in range(n_layers)])
        name = "attention / largest"
    elif view in VIEWS:
        forms, name = (run.forms(), run.score_name) if view == "probe" else ([None] * n_layers, "cosine")
        x = anchor_tokens(encoded, anchor)  # [L, n, D]
        scores = torch.empty(n_layers, n_windows, n_patches)
        for layer, form in enumerate(forms):
            for window in range(n_windows):
                ours, theirs = x[layer, window][None], encoded.tokens[layer, window]
                scores[layer, window] = torch.cosine_similarity(ours, theirs) if form is None else form.scores(ours, theirs)[0]
    else:
        raise UserError(f"unknown row '{view}' in vis.rows; valid: {', '.join(VIEWS)}")
    patch_scores = scores.view(n_layers, n_windows, *geometry.grid)
    maps = torch.stack([joined_map(of_layer, geometry, encoded.scene.image.shape[-2:], smooth) for of_layer in patch_scores])
    auroc = [map_auroc(of_layer, encoded, anchor) for of_layer in patch_scores]
    return MapRow(run.directory.name, view, name, list(encoded.layers), patch_scores, maps, auroc)


def anchor_tokens(encoded: EncodedScene, anchor: Anchor) -> Tensor:
    """The token [L, n_windows, D] the anchor stands for, as seen from each window."""
    if anchor.kind == "cls":
        return encoded.prefix[:, :, 0]
    n_layers, n_windows, _, dim = encoded.tokens.shape
    mean = encoded.tokens.flatten(1, 2)[:, anchor.members.flatten()].mean(1)  # [L, D]
    return mean[:, None].expand(n_layers, n_windows, dim)


def _attention_scores(encoded: EncodedScene, anchor: Anchor, layer: int) -> Tensor:
    """Attention [n_windows, N] of the anchor at a layer; NaN in windows it does not see."""
    weights = encoded.attention[layer]  # [n, P + N, N]
    n_windows, n_patches = encoded.tokens.shape[1:3]
    if weights is None:
        return torch.full((n_windows, n_patches), torch.nan)
    n_prefix = weights.shape[1] - n_patches
    if anchor.kind == "cls":
        return weights[:, 0]
    members = anchor.members.flatten(1)  # [n, N]
    rows = [weights[w, n_prefix:][members[w]] for w in range(n_windows)]
    return torch.stack([row.mean(0) if len(row) else torch.full((n_patches,), torch.nan) for row in rows])


def joined_map(patch_scores: Tensor, geometry: Geometry, image_hw: Sequence[int], smooth: bool = True) -> Tensor:
    """The map [H, W] of scores [n, h, w]: windows that have numbers, joined; NaN where none has."""
    valid = ~patch_scores.isnan().flatten(1).any(1)
    return join_scores(patch_scores, valid, geometry, image_hw, smooth=smooth)


def map_auroc(patch_scores: Tensor, encoded: EncodedScene, anchor: Anchor) -> float | None:
    """AUROC of scores [n, h, w] against the patches of the anchor's object (of the background, if the anchor lies there).

    Over valid patches that stand for an area, without the anchor patch; ties count one half.
    """
    if not encoded.labels or anchor.place is None:
        return None
    labels = encoded.labels["identity"]
    if not bool(labels.valid[anchor.place]):
        return None
    used = labels.valid & owned_patches(encoded.geometry) & ~patch_scores.isnan()
    if anchor.kind == "patch":
        used = used & ~anchor.members
    return auroc(patch_scores[used].numpy(), (labels.label == anchor.object_id)[used].numpy())


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Share of (positive, negative) couples in the right order, ties half; None where there is no couple."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return None
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
