"""Foreground from attention: which patches does the class token look at, and is that where the objects are?

The attention is the real softmax attention of the last block (`Grids.attention`). Constants as published by NeCo (from
Leopart and DINO): Gaussian blur 7 x 7 with sigma 0.6, the patches that hold 60 % of the attention (65 % for CBFE),
components of up to 2 patches are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from dense.contract import Grids, LabelMaps, Result, resize_map, score_size
from errors import UserError
from metrics.bootstrap import Estimate, ratio_estimate

BLUR, SIGMA = 7, 0.6
MASS, MASS_CBFE = 0.6, 0.65  # share of the attention that is foreground
SMALLEST = 3  # patches of a component that is kept


def blur(attention: Tensor) -> Tensor:
    """Gaussian blur of maps [..., h, w], mirrored at the edges without repeating them."""
    radius = BLUR // 2
    if min(attention.shape[-2:]) <= radius:
        raise UserError(f"a blur of {BLUR} patches needs a grid of more than {radius} on each side, got {attention.shape[-2:]}")
    at = torch.arange(-radius, radius + 1, dtype=attention.dtype)
    kernel = torch.exp(-0.5 * (at / SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    x = attention.reshape(-1, 1, *attention.shape[-2:])
    x = F.pad(x, (radius,) * 4, mode="reflect")
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return x.view(attention.shape)


def mass_mask(attention: Tensor, mass: float) -> Tensor:
    """The largest values of every map [..., h, w] that hold a share `mass` of its sum, bool.

    As published: ascending values normalised to 1, kept where their running sum exceeds 1 - mass.
    """
    flat = attention.flatten(-2)
    values, order = flat.sort(-1)
    kept = (values / values.sum(-1, keepdim=True)).cumsum(-1) > 1 - mass
    return torch.zeros_like(kept).scatter_(-1, order, kept).view(attention.shape)


def drop_small(mask: Tensor, smallest: int = SMALLEST) -> Tensor:
    """Masks [M, h, w] without components (diagonals connect) of fewer than `smallest` patches."""
    cleaned = np.zeros(mask.shape, bool)
    for i, one in enumerate(mask.numpy()):
        named, n = ndimage.label(one, structure=np.ones((3, 3)))
        large = np.bincount(named.ravel(), minlength=n + 1) >= smallest
        large[0] = False
        cleaned[i] = large[named]
    return torch.from_numpy(cleaned)


def attention_foreground(attention: Tensor, mass: float) -> Tensor:
    """Foreground bool [M, h, w] of attention maps averaged over heads [M, h, w]."""
    return drop_small(mass_mask(blur(attention), mass))


def jaccard(mask: Tensor, label_map: Tensor, n_classes: int, *, void: str = "ignore") -> float:
    """Overlap of a foreground mask [H, W] with everything labelled other than class 0; nan where both are empty.

    Args:
        void: what ignored pixels are: "ignore" (left out), "object" or "background" (both published, in different places).
    """
    known = (label_map >= 0) & (label_map < n_classes)
    truth = (label_map != 0) if void == "object" else (label_map != 0) & known
    mask = mask & known if void == "ignore" else mask
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else float("nan")


def best_head(masks: Tensor, label_map: Tensor, n_classes: int, *, published: bool) -> float:
    """Per class of an image the largest overlap any head's mask has with it, mean over classes; nan without one.

    Args:
        masks: bool [heads, H, W]; label_map: [H, W].
        published: the smallest and the largest value of the image are left out, whatever they mean; else class 0 and
            ignored pixels are.
    """
    values = label_map.unique()
    if published:
        values = values[1:-1]
    else:
        known = (label_map >= 0) & (label_map < n_classes)
        masks, values = masks & known, values[(values > 0) & (values < n_classes)]
    scores = []
    for value in values:
        truth = label_map == value
        union = (masks | truth).flatten(1).sum(1)
        scores.append(float(((masks & truth).flatten(1).sum(1) / union).max()))
    return sum(scores) / len(scores) if scores else float("nan")


def check_attention(features: Mapping[str, Grids]) -> None:
    """Refuse backbones without a class token.

    Raises:
        UserError: what to use instead.
    """
    for grids in features.values():
        if grids.attention is None:
            raise UserError(
                "the attention of the class token is asked for and this backbone has no class token with softmax attention; "
                "choose a model with one, or leave out cbfe_cd"
            )


def attention_maps(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    mass: float = MASS,
    published: bool = False,
    size: int | str = "full",
) -> list[Result]:
    """Overlap of the class token's attention with the labelled objects: all heads merged, and the best head per class.

    Args:
        mass: share of the attention that is foreground.
        published: ignored pixels count as foreground, the smallest and largest id of an image are left out, an image
            without a score counts 0; else each of these is left out.

    Returns:
        two results with the metric "jaccard", mean over images.
    """
    check_attention(features)
    grids, maps = features["test"], labels["test"]
    void = "object" if published else "ignore"
    merged, best = [], []
    for image in range(grids.n_images):
        full = maps.read(image)
        size_here = score_size(size, grids.shapes[image].tolist(), grids.patch, full.shape)
        target = resize_map(full, size_here)
        heads = grids.attention(torch.tensor([image]))[0]  # [heads, h, w]
        mask = attention_foreground(heads.mean(0, keepdim=True), mass)[0]
        merged.append(jaccard(resize_map(mask, size_here).bool(), target, maps.n_classes, void=void))
        masks = resize_map(mass_mask(heads, mass), size_here).bool()
        best.append(best_head(masks, target, maps.n_classes, published=published))
    return [
        Result({"heads": name, "mass": mass}, {"jaccard": image_mean(scores, published)})
        for name, scores in (("merged", merged), ("best", best))
    ]


def image_mean(scores: list[float], zero: bool = False) -> Estimate:
    """Mean over images with their influence; an image without a score (nan) is left out, or counts 0."""
    given = torch.tensor(scores, dtype=torch.float64)
    counted = torch.ones_like(given, dtype=torch.bool) if zero else ~given.isnan()
    return ratio_estimate(given.nan_to_num(0.0)[None], counted)
