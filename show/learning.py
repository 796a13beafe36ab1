"""Learning curves: the loss of every fit by epoch, a panel per subject, with the epoch that is kept."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from files import write_atomically
from runs.records import read_records
from show.style import BLUE, FALLING, STYLE, png_bytes

ACROSS = 4  # panels side by side
BLOCK = "code-"  # parts of fits to blocks of an online code (`pairs.code_length`): too many to be drawn


def draw_learning_curves(
    history: Sequence[Mapping[str, Any]],
    fits: Sequence[Mapping[str, Any]],
    units: Mapping[str, tuple[float, str]] | None = None,
) -> Figure:
    """Loss by epoch, mean over seeds: a panel per subject, part and variant, a line per layer; validation full, training thin.

    A dot marks the epoch that is kept, a triangle the end of a fit that was still falling. Fits that were solved for have
    no curve.

    Args:
        history: records of kind "epoch" of history.jsonl: "name", "layer" (text of a list), "epoch", "fits" [S] of (variant,
            seed), "train_loss" and "val_loss" [S][L], None once a fit was stopped.
        fits: records of kind "fit" of the same file.
        units: by part, what a loss is multiplied by and called; nats otherwise.
    """
    curves = _curves(history)
    panels = list(dict.fromkeys((name, variant) for name, variant, _ in curves))
    layers = list(dict.fromkeys(layer for _, _, layer in curves))
    across, down = min(ACROSS, max(1, len(panels))), max(1, math.ceil(len(panels) / ACROSS))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * across + 1.1, 2.3 * down + 0.2), layout="constrained")
        for number, (name, variant) in enumerate(panels):
            axes = figure.add_subplot(down, across, number + 1)
            part = name.rpartition("/")[2]
            factor, unit = (units or {}).get(part, (1.0, "nats"))
            of_panel = {layer: curve for (n, v, layer), curve in curves.items() if (n, v) == (name, variant)}
            for layer, curve in of_panel.items():
                color = _color(layer, layers) if len(of_panel) > 1 else BLUE
                _draw_curve(axes, curve, factor, color, _endings(fits, name, variant, layer))
            several = len({v for n, v in panels if n == name}) > 1
            axes.set_title(f"{name}, {variant}" if several else name, loc="left", fontweight="bold", fontsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=5))
            axes.tick_params(length=2, width=0.6)
            if number % across == 0:
                axes.set_ylabel(f"loss, {unit}")
            if number >= len(panels) - across:
                axes.set_xlabel("epoch")
        figure.legend(handles=_legend(layers), loc="outside right upper", frameon=False, fontsize=7)
    return figure


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], np.ndarray]:
    """Training and validation loss by epoch, mean over seeds, [E, 2]; by name, variant and layer."""
    sums: dict[tuple[str, str, str], dict[int, list]] = {}
    for record in history:
        if record["kind"] != "epoch":
            continue
        for s, (variant, _) in enumerate(record["fits"]):
            for i, layer in enumerate(re.findall(r"[\w-]+", record["layer"])):
                pair = [record[key][s][i] for key in ("train_loss", "val_loss")]
                by_epoch = sums.setdefault((record["name"], variant, layer), {})
                by_epoch.setdefault(record["epoch"], []).append([math.nan if x is None else x for x in pair])
    return {key: np.array([_mean(rows[epoch]) for epoch in sorted(rows)]) for key, rows in sums.items()}


def _mean(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Mean over the seeds that were still fitted; nan where none was."""
    rows = np.array(rows, float)
    counted = np.isfinite(rows)
    return np.where(counted, rows, 0).sum(0) / np.where(counted.any(0), counted.sum(0), np.nan)


def _endings(fits: Sequence[Mapping[str, Any]], name: str, variant: str, layer: str) -> list[Mapping[str, Any]]:
    return [fit for fit in fits if (fit["name"], fit["variant"], str(fit["layer"])) == (name, variant, layer)]


def _draw_curve(axes: Axes, curve: np.ndarray, factor: float, color: Any, endings: Sequence[Mapping[str, Any]]) -> None:
    """One layer: training and validation, the kept epochs of its seeds, their ends where they still fell."""
    epochs, single = np.arange(1, len(curve) + 1), len(curve) == 1
    axes.plot(epochs, factor * curve[:, 0], color=color, lw=0.7, ls=":", marker="." if single else None)
    axes.plot(epochs, factor * curve[:, 1], color=color, lw=1.3, marker="." if single else None)
    for fit in endings:
        for epoch, shown, marker in ((fit["best_epoch"], True, "o"), (fit["epochs"], fit["still_falling"], FALLING)):
            if shown and 0 < epoch <= len(curve):
                face = color if marker == "o" else "white"
                axes.plot(epoch, factor * curve[epoch - 1, 1], marker, color=color, mfc=face, ms=4, zorder=4)


def _color(layer: str, layers: Sequence[str]) -> Any:
    return matplotlib.colormaps["viridis"](0.92 * layers.index(layer) / max(1, len(layers) - 1))


def _legend(layers: Sequence[str]) -> list[Line2D]:
    step = math.ceil(max(1, len(layers)) / 14)
    named = [Line2D([], [], color=_color(layer, layers), label=f"layer {layer}") for layer in layers[::step]]
    marks = [
        Line2D([], [], color="0.3", lw=1.3, label="validation"), Line2D([], [], color="0.3", lw=0.7, ls=":", label="training"),
        Line2D([], [], color="0.3", marker="o", ls="", ms=4, label="kept epoch"),
        Line2D([], [], color="0.3", marker=FALLING, mfc="white", ls="", ms=4, label="still falling"),
    ]  # fmt: skip
    return named + marks


def write_learning_curves(directory: Path, units: Mapping[str, tuple[float, str]] | None = None) -> None:
    """Draw the learning curves of a run directory into learning.png; nothing where every fit was solved for."""
    records = [r for r in read_records(directory / "history.jsonl") if not str(r.get("part", "")).startswith(BLOCK)]
    history, fits = ([record for record in records if record["kind"] == kind] for kind in ("epoch", "fit"))
    if history:
        write_atomically(directory / "learning.png", png_bytes(draw_learning_curves(history, fits, units)))
