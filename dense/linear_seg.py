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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dense.contract import (
    Grids,
    LabelMaps,
    Result,
    check_choices,
    patch_vote,
    predict_pixels,
    resize_map,
    score_size,
    seed_list,
    segmentation_result,
    soft_labels,
)
from dense.heads import CHOICES as TRAINING
from dense.heads import (
    Batch,
    Heads,
    Normalization,
    Recipe,
    Target,
    patch_loss,
    pixel_loss,
    pixel_target,
    share_target,
    train_epoch,
)
from dense.projection import fit_projection
from dense.sliding import Windows, score_windows
from errors import UserError
from metrics.convergence import judge
from metrics.segmentation import ImageConfusions, class_metrics

CHOICES = TRAINING | {
    "normalize": ("none", "standardize", "batch_norm"),
    "loss": ("patches", "pixels"),
    "selection": ("train_part", "reported"),
}


def linear_seg(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    lrs: Sequence[float] = (2e-2, 3e-2),
    weight_decays: Sequence[float] = (1e-4, 1e-2),
    seeds: int | Sequence[int] = 3,
    epochs: int = 24,
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
    matmul_dtype: str = "auto",
    augmented: Callable[[Tensor, int], Iterable[Batch]] | None = None,
    windows: Callable[[int], Windows] | None = None,
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
        max_gb: memory of the logits of loss=pixels.
        matmul_dtype: of the products of loss=patches while fitting, see `forms.resolve_matmul_dtype`; scores are float32.
        augmented: live training images in place of stored tokens: (images [n] in order, epoch) -> batches.
        windows: test images are scored in windows that overlap (`sliding.sliding_windows`) in place of stored tokens; a
            choice on the reported split (selection=reported) is made on stored tokens all the same.

    Returns:
        a result per layer, seed and score size; the notes say what was chosen and on what, and how its fit ended.

    Raises:
        UserError: an unknown option value, a loss that is not finite, no image left to choose on.
    """
    check_choices("linear_seg", CHOICES, locals())
    test, maps, listed = features["test"], labels["test"], seed_list(seeds, "linear_seg.seeds")
    recipe = Recipe(
        lrs, weight_decays, epochs, batch_size, optimizer, momentum, schedule, drop_at, gamma, warmup, max_gb, matmul_dtype
    )
    n_classes, on_train_part = maps.n_classes, selection == "train_part"
    fit = HeadFit(features["train"], labels["train"], recipe, listed, normalize, held_out * on_train_part, order_seed)
    target = share_target(n_classes) if loss == "patches" else pixel_target(n_classes, loss_size)
    best: tuple[Tensor, list[Tensor], list[Tensor]] | None = None
    for epoch in range(epochs):
        fit.epoch(epoch, target, augmented)
        if not on_train_part:
            best = keep_best(best, fit.heads, grid_scores(fit.heads, fit.norm, test, maps, absent, size=loss_size))
    if on_train_part:
        scores = fit.held_out_scores(absent)
    else:
        scores, *parameters = best
        for p, kept in zip([*fit.heads.weights, *fit.heads.offsets], itertools.chain(*parameters), strict=True):
            p.data.copy_(kept)
    chosen = scores.mean(2).nan_to_num(-1).argmax(1)  # [L]
    notes = [
        {"lr": recipe.grid[r][0], "weight_decay": recipe.grid[r][1], "selected_on": selection,
         "selection_score": float(scores[i, r].mean())}
        for i, r in enumerate(chosen.tolist())
    ]  # fmt: skip
    notes = [note | ending for note, ending in zip(notes, fit.endings(chosen, target), strict=True)]
    heads = fit.heads.choose(chosen)
    if windows is None:
        found = score_pixels(heads, fit.norm, test, maps, score_sizes)
    else:
        found = score_windows(heads, fit.norm, windows, maps, score_sizes)
    return [
        segmentation_result({"layer": test.layers[i], "seed": listed[s], "size": size}, each, absent=absent, notes=notes[i])
        for (i, s, size), each in found.items()
    ]


class HeadFit:
    """A stack of heads being fitted on some of the training images; the others are kept apart to choose on.

    Args:
        grids, maps: the training split. held_out: share of its images that is kept apart, 0 for none.
        seeds: of the heads; order_seed: of the batches and of what is kept apart. n_classes: outputs; None: those of the maps.
    """

    def __init__(
        self,
        grids: Grids,
        maps: LabelMaps,
        recipe: Recipe,
        seeds: Sequence[int],
        normalize: str,
        held_out: float,
        order_seed: int,
        n_classes: int | None = None,
    ) -> None:
        self.grids, self.maps, self.recipe, self.order_seed = grids, maps, recipe, order_seed
        self.fitted_on, self.kept_apart = split_images(grids.n_images, held_out, order_seed)
        self.heads = Heads(len(recipe.grid), seeds, grids.layers, grids.dim, n_classes or maps.n_classes)
        self.norm = Normalization(normalize, len(grids.layers), grids.dim)
        if normalize == "standardize":
            set_statistics(self.norm, grids.subset(self.fitted_on))
        self.optimizer = recipe.optimizer_for(self.heads)
        self.losses: list[Tensor] = []  # on the images kept apart, [L, R, S] of every epoch; none where none are

    def epoch(self, epoch: int, target: Target, augmented: Callable[[Tensor, int], Iterable[Batch]] | None = None) -> None:
        """One pass over the images, in an order that depends on (order_seed, epoch) alone."""
        generator = torch.Generator().manual_seed(self.order_seed * 100_003 + epoch)
        order = self.fitted_on[torch.randperm(len(self.fitted_on), generator=generator)]
        if augmented is not None:
            batches, n_batches = augmented(order, epoch), math.ceil(len(order) / self.recipe.batch_size)
        else:
            batches = stored_batches(self.grids, self.maps, self.recipe.batch_size, order)
            n_batches = sum(1 for _ in self.grids.batch_images(self.recipe.batch_size, order))
        train_epoch(self.heads, self.norm, self.optimizer, batches, n_batches, epoch, self.recipe, target)
        if len(self.kept_apart):
            self.losses.append(self.held_out_loss(target))

    @torch.no_grad()
    def held_out_loss(self, target: Target, constant: bool = False) -> Tensor:
        """Mean loss of every head on the images kept apart, [L, R, S].

        Args:
            constant: of the best answer that looks at nothing instead, the shares of the classes in the fitted images.
        """
        self.heads.eval()
        self.norm.eval()
        shape = (len(self.grids.layers), self.heads.n_recipes, self.heads.n_seeds)
        answer = self._class_shares(target).log() if constant else None  # [C]
        total, count = torch.zeros(shape[0], shape[1] * shape[2], dtype=torch.float64), 0.0
        for x, maps in stored_batches(self.grids, self.maps, 1, self.kept_apart):  # logits of pixels are large
            wanted = target(maps, x.shape[2:4])
            logits = self.heads(self.norm(x))  # [L, B, h, w, G, C]
            if answer is not None:
                logits = answer.expand_as(logits)
            of_patches = wanted.ndim == 4
            total += (patch_loss if of_patches else pixel_loss)(logits, wanted)
            count += float(wanted.sum() if of_patches else (wanted >= 0).sum())
        return (total / max(count, 1e-9)).view(shape)

    def _class_shares(self, target: Target) -> Tensor:
        """Shares of the classes in the images that are fitted on, half a patch added to each, [C]."""
        shares = torch.full((self.heads.n_classes,), 0.5, dtype=torch.float64)
        for image in self.fitted_on.split(1):
            grid = self.grids.shapes[int(image)].tolist()
            wanted = target(self.maps.at(image, [side * self.grids.patch for side in grid]), grid)
            if wanted.ndim == 4:
                shares += wanted.flatten(0, 2).sum(0)
            else:
                shares += torch.bincount(wanted[wanted >= 0], minlength=len(shares))
        return (shares / shares.sum()).float()

    def endings(self, chosen: Tensor, target: Target) -> list[dict[str, Any]]:
        """How the fits of the chosen recipe [L] ended, a note per layer; {} where no image is kept apart to tell by.

        Returns:
            still_falling, epochs_needed, worse_than_constant: of any seed (`metrics.convergence.judge`).
        """
        if not self.losses:
            return [{} for _ in self.grids.layers]
        curve = torch.stack(self.losses)[:, torch.arange(len(chosen)), chosen].transpose(1, 2)  # [E, S, L]
        constant = self.held_out_loss(target, constant=True)[0, 0]  # [S]
        verdict = judge(curve, constant)
        return [
            {"still_falling": bool(verdict.still_falling[:, i].any()), "epochs": len(curve),
             "epochs_needed": int(verdict.epochs[:, i].max()),
             "worse_than_constant": bool(verdict.worse_than_constant[:, i].any())}
            for i in range(len(chosen))
        ]  # fmt: skip

    def held_out_scores(self, absent: str) -> Tensor:
        """Patch mIoU of every head on the images kept apart, [L, R, S]."""
        parts = self.grids.subset(self.kept_apart), self.maps.subset(self.kept_apart)
        return grid_scores(self.heads, self.norm, *parts, absent)


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
            f"held_out={held_out} of {n_images} training images leaves {count} to choose on; take more images or another share"
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
def grid_scores(
    heads: Heads, norm: Normalization, grids: Grids, maps: LabelMaps, absent: str, *, size: int | None = None
) -> Tensor:
    """The mIoU of every head [L, R, S] on some images: of patches against their majority class (size None), or of pixels."""
    heads.eval()
    norm.eval()
    shape = (len(grids.layers), heads.n_recipes * heads.n_seeds)
    found = [[ImageConfusions(grids.n_images, heads.n_classes) for _ in range(shape[1])] for _ in range(shape[0])]
    for images, x in grids.batches(4):
        logits = heads(norm(x))  # [L, B, h, w, G, C]
        if size is None:
            seen = maps.at(images, [side * grids.patch for side in x.shape[2:4]])
            wanted = patch_vote(soft_labels(seen, x.shape[2:4], heads.n_classes))
        else:
            wanted = maps.at(images, (size, size))
        for i, g in itertools.product(*map(range, shape)):
            each = logits[i, ..., g, :]
            found[i][g].add(images, wanted, each.argmax(-1) if size is None else predict_pixels(each, (size, size)))
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
def score_pixels(
    heads: Heads, norm: Normalization, grids: Grids, maps: LabelMaps, sizes: Sequence[int | str]
) -> dict[tuple[int, int, int | str], ImageConfusions]:
    """Classes against predictions of a stack with one recipe, by (layer row, seed row, size)."""
    heads.eval()
    norm.eval()
    keys = list(itertools.product(range(len(grids.layers)), range(heads.n_seeds), sizes))
    found = {key: ImageConfusions(grids.n_images, heads.n_classes) for key in keys}
    for images, x in grids.batches(4):
        logits = heads(norm(x))
        for b, image in enumerate(images.tolist()):
            full = maps.read(image)
            for size in sizes:
                size_here = score_size(size, x.shape[2:4], grids.patch, full.shape)
                wanted = resize_map(full, size_here)[None]
                for i, s in itertools.product(range(len(x)), range(heads.n_seeds)):
                    called = predict_pixels(logits[i, b : b + 1, ..., s, :], size_here)
                    found[i, s, size].add(torch.tensor([image]), wanted, called)
    return found
