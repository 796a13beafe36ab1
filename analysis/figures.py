"""Figures of mode=analyze: ranks and accuracy, what layers share, attention, binding coordinates as colours, objects, doses."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analysis.subspaces import Compared, overlap_square
from pairs.map_figures import color_identities, layer_name
from show.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE

COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY)
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))


def draw_factors(
    ranks: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    compared: Sequence[Compared],
    random: Tensor,
    attention: Tensor,
    layers: Sequence,
    layer: int | str,
) -> Figure:
    """Ranks per layer, accuracy against kept rank, overlap of layers, principal angles, attention of heads with the scores.

    Args:
        ranks: rows of `factors.rank_rows`; kept: of `kept_rank_rows`, with how = truncated or refitted.
        compared: subspaces of layers, seeds and runs. random: [n, k] angles of random ones.
        attention: [L, heads] Pearson r, NaN for the last layer. layer: whose angles are shown.
    """
    names = [str(name) for name in layers]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 6.4), layout="constrained")
        (top, curve, inside), (square, angles, heads) = figure.subplots(2, 3)
        for name, color, dash in zip(("effective_rank", "participation_ratio", "stable_rank"), COLORS, DASHES, strict=False):
            mean = [np.mean([row[name] for row in ranks if row["layer"] == of]) for of in layers]
            top.plot(names, mean, color=color, ls=dash, label=name.replace("_", " "))
        top.set_title("rank of the form", loc="left"), top.set_xlabel("layer"), top.set_ylim(0)
        top.legend(frameon=False, fontsize=7.5)
        _draw_kept(curve, kept, layers, "accuracy", "accuracy of all pairs")
        _draw_kept(inside, kept, layers, "foreground_auroc", "AUROC of pairs inside the foreground")
        _draw_matrix(square, overlap_square(compared, layers), "overlap of the subspaces of layers", 0)
        _draw_matrix(heads, attention.T, "attention of the next block with P(same object), r", -1)
        for axes in (square, heads):
            axes.set_xticks(range(len(names)), names), axes.set_xlabel("layer")
        square.set_yticks(range(len(names)), names), square.set_ylabel("layer")
        heads.set_yticks(range(attention.shape[1])), heads.set_ylabel("head")
        _draw_angles(angles, compared, random, layer)
    return figure


def _draw_kept(axes: Axes, kept: Sequence[Mapping[str, Any]], layers: Sequence, metric: str, title: str) -> None:
    """A score against kept rank, of first, middle and last layer, and refitted."""
    lines = []
    for layer, color, dash in zip(
        dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]), COLORS, DASHES, strict=False
    ):
        rows = [row for row in kept if row["layer"] == layer and row["how"] == "truncated"]
        lines.append((rows, color, dash, "o", f"{layer_name(layer)}, truncated"))
    refitted = [row for row in kept if row["how"] == "refitted"]
    if refitted:
        lines.append((refitted, "black", ":", "s", f"{layer_name(refitted[0]['layer'])}, refitted"))
    for rows, color, dash, marker, label in lines:
        known = [(row["rank"], row[metric]) for row in rows if row[metric] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=color, ls=dash, marker=marker, ms=3, label=label)
    axes.set_xscale("log", base=2), axes.set_xlabel("kept rank"), axes.set_title(title, loc="left")
    ranks = sorted({row["rank"] for row in kept})
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.legend(frameon=False, fontsize=7.5)


def _draw_matrix(axes: Axes, values: Tensor, title: str, low: int) -> None:
    """A matrix from `low` to 1 with its numbers, where they are few."""
    picture = axes.imshow(values.numpy(), vmin=low, vmax=1, cmap="viridis" if low == 0 else "RdBu_r", aspect="auto")
    axes.set_title(title, loc="left")
    axes.figure.colorbar(picture, ax=axes, shrink=0.9)
    for (y, x), value in np.ndenumerate(values.numpy()):
        if np.isfinite(value) and values.numel() <= 150:
            color = "white" if low == 0 and value < 0.6 else "black"
            axes.text(x, y, f"{value:.2f}".replace("0.", "."), ha="center", va="center", fontsize=6, color=color)


def _draw_angles(axes: Axes, compared: Sequence[Compared], random: Tensor, layer: int | str) -> None:
    """Principal angles in order: the layer against the one before it, its seeds, other runs; random ones as a grey band."""
    places = np.arange(1, random.shape[1] + 1)
    low, high = np.quantile(random.numpy(), [0.025, 0.975], axis=0)
    axes.fill_between(places, low, high, color=GREY, alpha=0.35, lw=0, label="random subspaces, 95 %")
    lines: dict[str, list[Tensor]] = {}
    before = [pair for pair in compared if pair.between == "layers" and pair.second == str(layer)][-1:]
    for pair in [*before, *(pair for pair in compared if pair.between != "layers" and pair.layer == layer)]:
        names = {"layers": f"layers {pair.first} and {layer}", "seeds": "its seeds, mean", "runs": pair.second[-28:]}
        lines.setdefault(names[pair.between], []).append(pair.angles)
    for (name, found), color, dash in zip(lines.items(), COLORS, DASHES, strict=False):
        axes.plot(places, torch.stack(found).mean(0).numpy(), color=color, ls=dash, label=name)
    axes.set_title(f"principal angles at {layer_name(layer)}, degrees", loc="left"), axes.set_ylim(0, 92)
    axes.set_xlabel("angle, smallest first"), axes.legend(frameon=False, fontsize=7.5)


def component_colors(components: Tensor) -> Tensor:
    """Three components [N, 3] as colours [N, 3] from 0 to 1, each stretched between its 2nd and 98th percentile."""
    low, high = (torch.quantile(components, q, dim=0) for q in (0.02, 0.98))
    return ((components - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)


def draw_grid(rows: Sequence[Sequence[tuple[str, np.ndarray | Tensor]]]) -> Figure:
    """Pictures in rows, each with a title: images [H, W, 3], or groups [H, W] of integers as colours."""
    n_columns = max(len(row) for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.75 * n_columns, 1.95 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), n_columns, squeeze=False)
        for line, row in zip(grid, rows, strict=True):
            for axes in line:
                axes.set_axis_off()
            for axes, (title, picture) in zip(line, row, strict=False):
                axes.imshow(color_identities(picture) if isinstance(picture, Tensor) else picture, interpolation="nearest")
                axes.set_title(title, fontsize=8, pad=2)
    return figure


def at_last_layer(rows: Sequence[Mapping[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(dose, value) of a metric at the last layer that has it, by rising dose."""
    known = [row for row in rows if row[metric] is not None]
    return sorted((row["dose"], row[metric]) for row in known if row["layer"] == known[-1]["layer"])


def strongest(rows: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """The value of a metric at the highest dose, at the last layer that has it."""
    found = at_last_layer(rows, metric)
    return found[-1][1] if found else None


def draw_doses(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> Figure:
    """Dose–response curves: a row per metric, a column per edit, a line per subspace, read at the last layer.

    Args:
        rows: of `causing.dose_rows`: edit, subspace, dose, layer and the metrics. metrics: key and title.
    """
    rows = [row for row in rows if row["edit"] != "knock out a head"]  # no dose
    edits = list(dict.fromkeys(row["edit"] for row in rows))
    subspaces = list(dict.fromkeys(row["subspace"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.3 * len(edits) + 1.6, 2.0 * len(metrics) + 0.4), layout="constrained")
        grid = figure.subplots(len(metrics), len(edits), squeeze=False, sharey="row")
        for number, (line, (metric, title)) in enumerate(zip(grid, metrics.items(), strict=True)):
            for axes, edit in zip(line, edits, strict=True):
                axes.set_title("" if number else edit, loc="left"), axes.set_xlim(-0.03, 1.03)
                for name, color, dash in zip(subspaces, COLORS, DASHES, strict=False):
                    found = at_last_layer([r for r in rows if (r["edit"], r["subspace"]) == (edit, name)], metric)
                    if found:
                        axes.plot(*zip(*found, strict=True), color=color, ls=dash, marker="o", ms=2.5, label=name)
                if not axes.lines:
                    axes.text(0.5, 0.5, "not asked", transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=8)
            line[0].set_ylabel(title)
        for axes in grid[-1]:
            axes.set_xlabel("dose")
        handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure
