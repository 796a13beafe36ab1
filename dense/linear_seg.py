"""Linear segmentation: a 1 x 1 convolution on frozen patch tokens, for every layer, seed, learning rate and decay at once.

The options of `linear_seg` span the protocols:

    clean          AdamW, soft patch labels, learning rate and decay chosen on a part of the training images
    neco_linear    SGD 0.01, pixels at 100 x 100, the best epoch on the reported split (published; said in every record)
    dinov2_linear  batch norm before the convolution, AdamW, warm-up and linear decay

Batch norm has no factor and offset of its own: the convolution after it can express both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dense.contract import (
    Grids,
    LabelMaps,
    Result,
    patch_vote,
    predict_pixels,
    resize_map,
    score_size,
    seed_list,
    segmentation_result,
    soft_labels,
)
from dense.heads import Batch, Heads, Normalization, Recipe, train_epoch
from dense.projection import fit_projection
from errors import UserError
from metrics.segmentation import ImageConfusions, check_absent, class_metrics

CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("constant", "step", "linear", "cosine"),
    "normalize": ("none", "standardize", "batch_norm"),
    "loss": ("patches", "pixels"),
    "selection": ("train_part", "reported"),
}


def linear_seg(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    lrs: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2),
    weight_decays: Sequence[float] = (1e-4, 1e-2),
    seeds: int | Sequence[int] = 3,
    epochs: int = 10,
    batch_size: int = 16,
    optimizer: str = "adamw",
    momentum: float = 0.9,
    schedule: str = "cosine",
    drop_at: int = 20,
    gamma: float = 0.1,
    warmup: float = 0.0,
    normalize: str = "standardize",
    loss: str = "patches",
    loss_size: int = 100,
    score_sizes: Sequence[int | str] = ("full",),
    selection: str = "train_part",
    held_out: float = 0.1,
    absent: str = "skip",
    order_seed: int = 0,
    max_gb: float = 2.0,
    augmented: Mapping[str, Any] | None = None,
) -> list[Result]:
    """Train a stack of heads on the training split, score the chosen ones on the test split.

    Args:
        lrs, weight_decays, seeds: the grid; every combination is a head for every layer.
        momentum: of SGD. drop_at, gamma: schedule=step. warmup: epochs of linear warm-up.
        normalize: none, standardize (statistics of the training tokens) or batch_norm.
        loss: patches (soft labels, no resizing) or pixels (logits scaled to loss_size).
        score_sizes: resolutions the prediction is scored at, see `contract.score_size`; one result each.
        selection: train_part: a share `held_out` of the training images is kept apart and the (learning rate, decay) of
            highest patch mIoU on it (mean over seeds) is taken, per layer; the head is not refitted. reported: also the
            best epoch, both chosen by the pixel mIoU on the very split that is reported, as published for NeCo.
        order_seed: of the batches and of the held-out part.
        max_gb: memory of the logits.
        augmented: live training images in place of stored tokens: `augmented["stream"](images, epoch)` yields a `Batch`
            at a time, in the order of `images` [n].

    Returns:
        a result per layer, seed and score size; the notes say what was chosen and on what.

    Raises:
        UserError: an unknown option value, a loss that is not finite, no image left to choose on.
    """
    given = {"optimizer": optimizer, "schedule": schedule, "normalize": normalize, "loss": loss, "selection": selection}
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise UserError(f"unknown linear_seg.{name}={value}; valid: {', '.join(CHOICES[name])}")
    check_absent(absent)
    train, test, n_classes = features["train"], features["test"], labels["test"].n_classes
    listed, recipe = seed_list(seeds, "linear_seg.seeds"), Recipe(
        lrs, weight_decays, epochs, batch_size, optimizer, momentum, schedule, drop_at, gamma, warmup, loss, loss_size, max_gb
    )  # fmt: skip
    fitted_on, kept_apart = split_images(train.n_images, held_out if selection == "train_part" else 0.0, order_seed)
    heads = Heads(len(recipe.grid), listed, train.layers, train.dim, n_classes)
    norm = Normalization(normalize, len(train.layers), train.dim)
    if normalize == "standardize":
        set_statistics(norm, train.subset(fitted_on))
    trainer = recipe.optimizer_for(heads)
    best: tuple[Tensor, list[Tensor], list[Tensor]] | None = None  # scores [L, R, S] and parameters of the best epochs
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(order_seed * 100_003 + epoch)
        order = fitted_on[torch.randperm(len(fitted_on), generator=generator)]
        if augmented is not None:
            batches = augmented["stream"](order, epoch)
        else:
            batches = stored_batches(train, labels["train"], batch_size, order)
        train_epoch(heads, norm, trainer, batches, math.ceil(len(order) / batch_size), epoch, recipe)
        if selection == "reported":
            best = keep_best(best, heads, grid_scores(heads, norm, test, labels["test"], absent, loss_size))
    if selection == "reported":
        scores, weights, offsets = best
        for p, kept in zip([*heads.weights, *heads.offsets], [*weights, *offsets], strict=True):
            p.data.copy_(kept)
    else:
        parts = train.subset(kept_apart), labels["train"].subset(kept_apart)
        scores = grid_scores(heads, norm, *parts, absent, None)
    chosen = scores.mean(2).nan_to_num(-1).argmax(1)  # [L]
    notes = [
        {"lr": recipe.grid[r][0], "weight_decay": recipe.grid[r][1], "selected_on": selection,
         "selection_score": float(scores[i, r].mean())}
        for i, r in enumerate(chosen.tolist())
    ]  # fmt: skip
    return score_heads(heads, norm, chosen, listed, test, labels["test"], score_sizes, absent, notes)


def split_images(n_images: int, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Training images that are fitted on and those kept apart, both ascending, by a seeded draw.

    Raises:
        UserError: a share that leaves either empty.
    """
    if held_out == 0:
        return torch.arange(n_images), torch.arange(0)
    count = round(n_images * held_out)
    if not 0 < count < n_images:
        raise UserError(
            f"linear_seg.held_out={held_out} of {n_images} training images leaves {count} to choose on; take more images "
            "or another share"
        )
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed))
    return order[count:].sort().values, order[:count].sort().values


def set_statistics(norm: Normalization, grids: Grids) -> None:
    """Mean and variance of every channel and layer over all tokens; a constant channel becomes 0."""
    for i, layer in enumerate(grids.layers):
        found = fit_projection(grids.at(layer), n_components=None)
        norm.mean[i], norm.var[i] = found.shift, found.scale.pow(-2)


def stored_batches(grids: Grids, maps: LabelMaps, size: int, order: Tensor) -> Iterator[Batch]:
    """Stored tokens with their label maps at the input resolution."""
    for images, x in grids.batches(size, order):
        yield x, maps.at(images, [side * grids.patch for side in x.shape[2:4]])


@torch.no_grad()
def grid_scores(heads: Heads, norm: Normalization, grids: Grids, maps: LabelMaps, absent: str, size: int | None) -> Tensor:
    """The mIoU of every head [L, R, S] on some images: of patches against their majority class (size None), or of pixels."""
    heads.eval()
    norm.eval()
    shape = (len(grids.layers), heads.n_recipes * heads.n_seeds)
    found = [[ImageConfusions(grids.n_images, heads.n_classes) for _ in range(shape[1])] for _ in range(shape[0])]
    for images, x in grids.batches(4):
        logits = heads(norm(x))  # [L, B, h, w, G, C]
        if size is None:
            seen = maps.at(images, [side * grids.patch for side in x.shape[2:4]])
            target = patch_vote(soft_labels(seen, x.shape[2:4], heads.n_classes))
        else:
            target = maps.at(images, (size, size))
        for i, g in itertools.product(*map(range, shape)):
            each = logits[i, ..., g, :]
            found[i][g].add(images, target, each.argmax(-1) if size is None else predict_pixels(each, (size, size)))
    scores = [[float(class_metrics(each.class_counts(), absent)["miou"].value) for each in row] for row in found]
    return torch.tensor(scores, dtype=torch.float64).view(shape[0], heads.n_recipes, heads.n_seeds)


def keep_best(best: tuple | None, heads: Heads, scores: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """For every head its parameters at the epoch of its highest score so far."""
    now = [p.detach().clone() for p in heads.weights], [p.detach().clone() for p in heads.offsets]
    if best is None:
        return scores, *now
    better = scores > best[0]  # [L, R, S]
    for r in range(heads.n_recipes):
        mask = better[:, r]  # [L, S]
        now[0][r] = torch.where(mask[:, None, :, None], now[0][r], best[1][r])
        now[1][r] = torch.where(mask[:, :, None], now[1][r], best[2][r])
    return torch.where(better, scores, best[0]), *now


@torch.no_grad()
def score_heads(
    heads: Heads,
    norm: Normalization,
    chosen: Tensor,
    seeds: Sequence[int],
    grids: Grids,
    maps: LabelMaps,
    sizes: Sequence[int | str],
    absent: str,
    notes: Sequence[Mapping[str, Any]],
) -> list[Result]:
    """Results of the chosen recipe of every layer: a stack of S heads per layer, scored at every size."""
    final = Heads(1, seeds, grids.layers, grids.dim, heads.n_classes)
    for i, r in enumerate(chosen.tolist()):
        final.weights[0][i] = heads.weights[r][i]
        final.offsets[0][i] = heads.offsets[r][i]
    norm.eval()
    keys = list(itertools.product(range(len(grids.layers)), range(len(seeds)), sizes))
    found = {key: ImageConfusions(grids.n_images, heads.n_classes) for key in keys}
    for images, x in grids.batches(4):
        logits = final(norm(x))
        for b, image in enumerate(images.tolist()):
            full = maps.read(image)
            for size in sizes:
                size_here = score_size(size, x.shape[2:4], grids.patch, full.shape)
                target = resize_map(full, size_here)[None]
                for i, s in itertools.product(range(len(x)), range(len(seeds))):
                    each = predict_pixels(logits[i, b : b + 1, ..., s, :], size_here)
                    found[i, s, size].add(torch.tensor([image]), target, each)
    return [
        segmentation_result(
            {"layer": grids.layers[i], "seed": seeds[s], "size": size}, found[i, s, size], absent=absent, notes=notes[i]
        )
        for i, s, size in keys
    ]
