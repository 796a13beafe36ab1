"""The class of a patch by a linear read-out: ProbeIt (ViT-patch-probing) as published, and a clean variant beside it.

Published (protocol=probeit): images squashed to 32 x 32 patches, label maps resized by their nearest pixel, void counted
as background, a patch called by the majority of its pixels (the smallest id of equally frequent ones), background patches
left out of loss and score; Adam 5e-3, no decay, 3 epochs of 16 images, the last epoch, pooled accuracy.
Clean: void has no vote, background is a class, learning rates are chosen on a part of the training images, channels are
standardised; accuracy is also given by purity, the share of a patch that carries its label.

All layers, seeds and learning rates are one stack (`heads`). With selection=none every learning rate is reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dense.contract import Grids, LabelMaps, Result, check_choices, patch_vote, seed_list, segmentation_result, soft_labels
from dense.heads import CHOICES as TRAINING
from dense.heads import Recipe
from dense.linear_seg import HeadFit, score_pixels
from metrics.bootstrap import ratio_estimate
from metrics.segmentation import ImageConfusions

CHOICES = TRAINING | {
    "normalize": ("none", "standardize"),
    "void": ("ignore", "background"),
    "background": ("class", "drop"),
    "selection": ("train_part", "none"),
}
PURITY = (0.0, 0.5, 0.75, 0.9, 1.0)  # lower ends of the bins; the last one holds pure patches


def patch_class(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    lrs: Sequence[float] = (2e-2, 3e-2),
    weight_decays: Sequence[float] = (0.0,),
    seeds: int | Sequence[int] = 3,
    epochs: int = 8,
    batch_size: int = 16,
    optimizer: str = "adam",
    schedule: str = "linear",
    normalize: Sequence[str] = ("standardize", "none"),
    void: str = "ignore",
    background: str = "class",
    selection: str = "train_part",
    held_out: float = 0.1,
    score_sizes: Sequence[int | str] = ("full",),
    absent: str = "skip",
    order_seed: int = 0,
    max_gb: float = 2.0,
    matmul_dtype: str = "auto",
) -> list[Result]:
    """Fit linear read-outs of the class of a patch on the training split, score them on the test split.

    Args:
        lrs, weight_decays, seeds, epochs, batch_size, optimizer, schedule, max_gb, matmul_dtype: as for
            `linear_seg`.
        normalize: none or standardize, or both: the whole is done once for each.
        void: ignore (no vote) or background (ignored pixels are class 0, as published).
        background: class, or drop: patches called 0 are in neither loss nor score, the read-out has no such class.
        selection: train_part (as for `linear_seg`), or none: no image is kept apart, every (learning rate, decay) is
            reported; with a single one this is the published way.
        score_sizes: resolutions at which the logits, scaled up, are also compared with pixels.

    Returns:
        per layer, seed and normalisation a result "patches" (metrics as `class_metrics`, and accuracy_purity_… by bin) and
        one per score size.

    Raises:
        UserError: an unknown option value, a loss that is not finite, no image left to choose on.
    """
    check_choices("patch_class", CHOICES, locals())
    listed = seed_list(seeds, "patch_class.seeds")
    recipe = Recipe(lrs, weight_decays, epochs, batch_size, optimizer, 0.0, schedule, 1, 1.0, 0.0, max_gb, matmul_dtype)
    rule = PatchRule(void == "background", background == "drop", labels["test"].n_classes)
    maps = {name: rule.filled(each) for name, each in labels.items()}
    left = rule.shifted(labels["test"])  # pixels are compared as the data set has them: void stays ignored
    results = []
    for kind in normalize:
        apart = held_out if selection == "train_part" else 0.0
        fit = HeadFit(features["train"], maps["train"], recipe, listed, kind, apart, order_seed, n_classes=rule.n_left)
        for epoch in range(epochs):
            fit.epoch(epoch, rule.target)
        layers = len(features["train"].layers)
        if selection == "none":
            reported = [torch.full((layers,), r) for r in range(len(recipe.grid))]
        else:
            kept = features["train"].subset(fit.kept_apart), maps["train"].subset(fit.kept_apart)
            scores = torch.stack([held_out_miou(fit, r, rule, *kept, absent) for r in range(len(recipe.grid))])  # [R, L]
            reported = [scores.nan_to_num(-1).argmax(0)]
        for recipes in reported:
            endings = fit.endings(recipes, rule.target)
            heads = fit.heads.choose(recipes)
            found = score_patches(heads, fit.norm, features["test"], maps["test"], rule)
            pixels = score_pixels(heads, fit.norm, features["test"], left, score_sizes)
            for i, s in itertools.product(range(layers), range(len(listed))):
                lr, decay = recipe.grid[int(recipes[i])]
                setting = {"layer": features["test"].layers[i], "seed": listed[s], "normalize": kind}
                setting |= {"lr": lr, "weight_decay": decay} if selection == "none" else {}
                notes = {"lr": lr, "weight_decay": decay, "selected_on": selection, **endings[i]}
                confusions, right, asked = found[i, s]
                result = segmentation_result({**setting, "size": "patches"}, confusions, absent=absent, notes=notes)
                for b, low in enumerate(PURITY):
                    result.metrics[f"accuracy_purity_{low:g}"] = ratio_estimate(right[None, :, b], asked[:, b])
                results.append(result)
                for size in score_sizes:
                    each = pixels[i, s, size]
                    results.append(segmentation_result({**setting, "size": size}, each, absent=absent, notes=notes))
    return results


class PatchRule:
    """What a patch is called.

    Args:
        fill: ignored pixels are class 0. drop: patches called 0 are left out, the other classes move down by one.
        n_classes: C of the label maps.
    """

    def __init__(self, fill: bool, drop: bool, n_classes: int) -> None:
        self.fill, self.drop, self.n_classes = fill, drop, n_classes
        self.n_left = n_classes - drop

    def filled(self, maps: LabelMaps) -> LabelMaps:
        """Label maps whose ignored pixels are class 0, where the rule says so."""
        if not self.fill:
            return maps
        inside = lambda x: torch.where((x >= 0) & (x < self.n_classes), x, 0)
        return LabelMaps(lambda image: inside(maps.read(image)), maps.n_images, maps.classes)

    def shifted(self, maps: LabelMaps) -> LabelMaps:
        """Label maps of the classes that are left."""
        if not self.drop:
            return maps
        shift = lambda x: torch.where((x > 0) & (x < self.n_classes), x.short() - 1, -1)
        return LabelMaps(lambda image: shift(maps.read(image)), maps.n_images, maps.classes[1:])

    def votes(self, maps: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Class of every patch among those left [B, h, w] int64, -1 where left out, and the share that carries it."""
        shares = soft_labels(maps, grid, self.n_classes)
        named = patch_vote(shares)
        return (named - 1).clamp_min(-1) if self.drop else named, shares.amax(-1)

    def target(self, maps: Tensor, grid: Sequence[int]) -> Tensor:
        """The votes as shares [B, h, w, C]: one for the class, nothing for a patch that is left out."""
        named, _ = self.votes(maps, grid)
        return F.one_hot(named + 1, self.n_left + 1)[..., 1:].float()


@torch.no_grad()
def score_patches(
    heads: torch.nn.Module, norm: torch.nn.Module, grids: Grids, maps: LabelMaps, rule: PatchRule
) -> dict[tuple[int, int], tuple[ImageConfusions, Tensor, Tensor]]:
    """By (layer row, seed row): votes against answers, and right answers and patches [M, bins] by purity."""
    heads.eval()
    norm.eval()
    keys = list(itertools.product(range(len(grids.layers)), range(heads.n_seeds)))
    confusions = {key: ImageConfusions(grids.n_images, rule.n_left) for key in keys}
    right = {key: torch.zeros(grids.n_images, len(PURITY)) for key in keys}
    asked = torch.zeros(grids.n_images, len(PURITY))
    lows = torch.tensor(PURITY)
    for images, x in grids.batches(4):
        wanted, purity = rule.votes(maps.at(images, [side * grids.patch for side in x.shape[2:4]]), x.shape[2:4])
        called = heads(norm(x)).argmax(-1)  # [L, B, h, w, S]
        bins = F.one_hot(torch.bucketize(purity, lows, right=True) - 1, len(PURITY)) * (wanted >= 0)[..., None]
        asked[images] = bins.sum((1, 2)).float()
        for i, s in keys:
            confusions[i, s].add(images, wanted, called[i, ..., s])
            hit = (called[i, ..., s] == wanted)[..., None]
            right[i, s][images] = (bins * hit).sum((1, 2)).float()
    return {key: (confusions[key], right[key], asked) for key in keys}


def held_out_miou(fit: HeadFit, recipe: int, rule: PatchRule, grids: Grids, maps: LabelMaps, absent: str) -> Tensor:
    """Patch mIoU [L] of one recipe on the images kept apart, mean over seeds."""
    heads = fit.heads.choose(torch.full((len(grids.layers),), recipe))
    found = score_patches(heads, fit.norm, grids, maps, rule)
    value = lambda i, s: float(segmentation_result({}, found[i, s][0], absent=absent).metrics["miou"].value)
    return torch.tensor(
        [[value(i, s) for s in range(heads.n_seeds)] for i in range(len(grids.layers))], dtype=torch.float64
    ).mean(1)
