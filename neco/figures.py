"""Figures of a post-training: loss and schedules, scores over time, nearest patches, and what the loss orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from show.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE

Place = tuple[int, int, int]  # image, row, column


def draw_training(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, gradient norm and schedules against the optimiser step.

    Args:
        rows: one per step, with step, loss, gradient_norm, lr_backbone, lr_head, weight_decay, momentum.
    """
    panels = (
        ("loss", "loss in nats per cell", BLUE, "linear"),
        ("gradient_norm", "gradient norm, before clipping", ORANGE, "log"),
        ("lr_backbone", "learning rate, backbone", GREEN, "linear"),
        ("lr_head", "learning rate, head", SKY, "linear"),
        ("weight_decay", "weight decay", PINK, "linear"),
        ("momentum", "teacher momentum", GREY, "linear"),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.2), layout="constrained")
        for axes, (key, title, colour, scale) in zip(figure.subplots(2, 3).flat, panels, strict=True):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], color=colour, linewidth=1)
            axes.set(title=title, xlabel="optimiser step", yscale=scale if all(y > 0 for _, y in points) else "linear")
    return figure


def draw_scores(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation scores over training, in percent; the first point is the network training started from.

    Args:
        rows: one per evaluation, with step and scores {name: value in 0 … 1}.
    """
    names = [name for name in rows[0]["scores"] if name.endswith("miou")]
    colours = (BLUE, ORANGE, GREEN, PINK, SKY, RED)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(names):
            steps, line = [row["step"] for row in rows], [100 * row["scores"][name] for row in rows]
            style = ("-", "--", ":", "-.")[index % 4]
            axes.plot(steps, line, style, color=colours[index % 6], marker="o", markersize=3, label=name)
        axes.set(xlabel="optimiser step", ylabel="validation score, %")
        axes.legend(frameon=False)
    return figure


def patch_image(image: Tensor, patch: int, row: int, column: int, around: int = 1) -> Tensor:
    """Pixels [side, side, 3] of a patch of an image [3, H, W] in 0 … 1 with `around` patches on each side, edges repeated."""
    border = around * patch
    padded = F.pad(image[None], (border,) * 4, mode="replicate")[0]
    side = (2 * around + 1) * patch
    top, left = row * patch, column * patch
    return padded[:, top : top + side, left : left + side].permute(1, 2, 0).clamp(0, 1)


def nearest_patches(tokens: Tensor, query: Place, k: int) -> tuple[list[Place], list[float]]:
    """Places (image, row, column) and cosines of the k patches of other images most like one, the best first.

    Args:
        tokens: [M, h, w, D].
    """
    m, h, w, _ = tokens.shape
    unit = F.normalize(tokens.float(), dim=-1)
    cosines = unit @ unit[query]  # [M, h, w]
    cosines[query[0]] = -1.0
    found, places = cosines.flatten().topk(min(k, (m - 1) * h * w))
    return [(int(p) // (h * w), int(p) // w % h, int(p) % w) for p in places], found.tolist()


def draw_nearest(
    images: Tensor, before: Tensor, after: Tensor, queries: Sequence[Place], patch: int, k: int = 6
) -> Figure:
    """For each query patch its nearest patches in other images, before (above) and after (below).

    Args:
        images: [M, 3, H, W] in 0 … 1; before, after: tokens [M, h, w, D] of the two networks; queries: (image, row, column).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.95 * (k + 1), 1.05 * 2 * len(queries)), layout="constrained")
        grid = figure.subplots(2 * len(queries), k + 1, squeeze=False)
        for index, query in enumerate(queries):
            for below, (name, tokens) in enumerate((("before", before), ("after", after))):
                places, cosines = nearest_patches(tokens, query, k)
                row = grid[2 * index + below]
                _show(row[0], images, query, patch, name, RED)
                for axes, place, cosine in zip(row[1:], places, cosines, strict=False):
                    _show(axes, images, place, patch, f"{cosine:.2f}", None)
    return figure


def draw_order(
    images: Tensor, before: Tensor, after: Tensor, query: Place, references: Sequence[Place], patch: int
) -> Figure:
    """What the loss orders: the same reference patches sorted by likeness to a query patch, nearest first, before and after.

    Args:
        as of `draw_nearest`; references: their places (image, row, column).
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.62 * (len(references) + 1), 2.0), layout="constrained")
        grid = figure.subplots(2, len(references) + 1, squeeze=False)
        for row, (name, tokens) in zip(grid, (("before", before), ("after", after)), strict=True):
            unit = F.normalize(tokens.float(), dim=-1)
            cosines = torch.stack([unit[place] @ unit[query] for place in references])
            _show(row[0], images, query, patch, name, RED)
            for axes, index in zip(row[1:], cosines.argsort(descending=True).tolist(), strict=True):
                _show(axes, images, references[index], patch, f"{float(cosines[index]):.2f}", None)
    return figure


def _show(axes: Any, images: Tensor, place: Place, patch: int, title: str, colour: str | None) -> None:
    """A patch with its neighbours, its own outline drawn in."""
    axes.imshow(patch_image(images[place[0]], patch, *place[1:]).numpy(), interpolation="nearest")
    axes.plot(*zip(*[(x * patch - 0.5, y * patch - 0.5) for x, y in ((1, 1), (2, 1), (2, 2), (1, 2), (1, 1))], strict=True),
              color=colour or "white", linewidth=0.8)  # fmt: skip
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()
