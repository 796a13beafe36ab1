"""What labels alone give: the ceiling of the patch grid, and the most frequent class everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dense.contract import (
    Grids,
    LabelMaps,
    Result,
    patch_vote,
    predict_pixels,
    resize_map,
    score_size,
    segmentation_result,
    soft_labels,
)
from metrics.segmentation import ImageConfusions


def ceiling(
    features: Mapping[str, Grids], labels: Mapping[str, LabelMaps], *, size: int | str = "input", absent: str = "skip"
) -> list[Result]:
    """The scores of a predictor that knows the labels but has one answer per patch.

    vote: the majority class of a patch, scaled up by the nearest patch: no method that names patches does better in
    accuracy at the input resolution. shares: the shares of the classes in a patch, scaled up bilinearly, then the largest:
    what a perfect soft prediction gives.
    """
    grids, maps = features["test"], labels["test"]
    found = {name: ImageConfusions(grids.n_images, maps.n_classes) for name in ("vote", "shares")}
    for image, shape in enumerate(grids.shapes.tolist()):
        full = maps.read(image)
        size_here = score_size(size, shape, grids.patch, full.shape)
        target = resize_map(full, size_here)[None]
        seen = resize_map(full, [side * grids.patch for side in shape])[None]
        shares = soft_labels(seen, shape, maps.n_classes)  # [1, h, w, C]
        vote = resize_map(patch_vote(shares).clamp_min(0), size_here)  # a patch without a label holds no counted pixel
        found["vote"].add(torch.tensor([image]), target, vote)
        found["shares"].add(torch.tensor([image]), target, predict_pixels(shares, size_here))
    return [segmentation_result({"rule": name, "size": size}, each, absent=absent) for name, each in found.items()]


def majority(
    features: Mapping[str, Grids], labels: Mapping[str, LabelMaps], *, size: int | str = "input", absent: str = "skip"
) -> list[Result]:
    """The scores of the class most frequent in the training maps, called everywhere."""
    train, maps, grids = labels["train"], labels["test"], features["test"]
    counts = torch.zeros(maps.n_classes, dtype=torch.int64)
    for image in range(train.n_images):
        pixels = train.read(image)
        counts += torch.bincount(pixels[(pixels >= 0) & (pixels < maps.n_classes)].long(), minlength=maps.n_classes)
    found = ImageConfusions(grids.n_images, maps.n_classes)
    for image, shape in enumerate(grids.shapes.tolist()):
        full = maps.read(image)
        target = resize_map(full, score_size(size, shape, grids.patch, full.shape))[None]
        found.add(torch.tensor([image]), target, counts.argmax().expand(target.shape))
    return [segmentation_result({"rule": "majority", "size": size}, found, absent=absent)]
