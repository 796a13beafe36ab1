"""The layer curve: score per layer with its interval, beside the controls."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from errors import UserError
from files import write_atomically
from pairs.finished import rows_of
from show.style import (
    BLUE,
    BROWN,
    FALLING,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    SKY,
    STYLE,
    layer_places,
    note_below,
    png_bytes,
)

LINES = {
    "probe": ("probe", BLUE, "-"),
    "source": ("the run, on test", "#222222", "--"),  # mode=eval
    "random": ("random weights", RED, "-"),
    "position": ("position only", GREEN, "--"),
    "pixels": ("raw pixels", PINK, "--"),
    "pixels_position": ("pixels + position", PURPLE, "-."),
    "class_oracle": ("true class", GREY, "--"),
    "cosine": ("cosine", ORANGE, ":"),
    "dot_product": ("dot product", SKY, ":"),
    "shuffled": ("shuffled identities", BROWN, ":"),
}


def draw_layer_curve(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]] | None = None, about: str = ""
) -> Figure:
    """Score by layer: the probe and its controls with intervals, one panel per column.

    A control with one layer of its own (position, pixels, class oracle) is a level line across the panel.

    Args:
        rows: "name" (the probe's is "probe"), "layer" ("embed" or a block), "layer_index", "subset",
            "metric", "value", "low", "high"; "question" and "readout" where there are several. Undefined values (nan,
            None) are left out; "chosen", true at the layer chosen on validation, which gets a ring.
        columns: (question, readout, subset, metric, title) per panel; None: one panel per AUROC in the rows.
        about: what is shown (model, data, probe, images, seeds), in one small line at the bottom.
    """
    keys = ("question", "readout", "subset", "metric")
    if columns is None:
        panels = dict.fromkeys(tuple(row.get(k) for k in keys) for row in rows if row["metric"] == "auroc")
        columns = [(*key, f"{str(key[2]).replace('_', ' ')} AUROC") for key in panels]
    n_columns = 3 if len(columns) in (3, 5, 6) else min(len(columns), 2)
    n_rows = math.ceil(len(columns) / n_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9 * n_columns, 3.1 * n_rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        for panel, column in enumerate(columns):
            axes = figure.add_subplot(n_rows, n_columns, panel + 1)
            chosen = [row for row in rows if tuple(row.get(k) for k in keys) == tuple(column[:4])]
            majority = [row for row in rows if tuple(row.get(k) for k in keys) == (*column[:3], "majority")]
            _draw_panel(axes, chosen, majority, str(column[3]))
            axes.set_title(column[4], loc="left", fontweight="bold")
            if panel >= len(columns) - n_columns:
                axes.set_xlabel("layer (block whose output is read)")
        note_below(figure, about)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Mapping], majority: Sequence[Mapping], metric: str) -> None:
    """One score by layer: a line per name, the line of chance or of the majority answer, labels at the right."""
    series: dict[str, list[Mapping]] = {}
    for row in rows:
        if row["value"] is not None and math.isfinite(row["value"]):
            series.setdefault(row["name"], []).append(row)
    axes.set_ylabel({"auroc": "AUROC", "average_precision": "average precision"}.get(metric, metric.replace("_", " ")))
    if not series:
        axes.text(0.5, 0.5, "undefined: no such pairs", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_xticks([]), axes.set_yticks([])
        return
    in_order = sorted(series.get("probe", rows), key=lambda row: row["layer_index"])
    layers = layer_places(row["layer"] for row in in_order)
    names = sorted(series, key=lambda name: (name == "probe", name == "source", name))  # the probe lies on top
    ends = [_draw_series(axes, name, series[name], layers) for name in names]
    base = majority[0]["value"] if metric.startswith("accuracy") and majority else 0.5 if metric == "auroc" else None
    if base is not None:
        axes.axhline(base, color="black", ls=(0, (1, 3)), lw=0.9, zorder=1)
        ends.append((base, "chance" if metric == "auroc" else "majority", "black"))
    widest = max((row["high"] - row["low"] for name in series for row in series[name] if row["high"] is not None), default=0.0)
    _finish_axes(axes, layers, ends, 0.0 if math.isnan(widest) else 2 * widest)


def _draw_series(axes: Axes, name: str, rows: Sequence[Mapping], layers: Mapping) -> tuple[float, str, str]:
    """The line of the probe or of a control with its intervals; value, label and colour of its right end.

    layers: where on the axis each of them stands.
    """
    label, color, dashes = LINES.get(name, (name.replace("_", " "), GREY, "-."))
    points = sorted(rows, key=lambda row: row["layer_index"])
    values, low, high = (np.array([row[k] for row in points], float) for k in ("value", "low", "high"))
    is_probe, ends = name == "probe", [min(layers.values()), max(layers.values())]
    level = len(points) == 1 and not is_probe  # one layer of its own: a level line across the panel
    if level:
        x, values, low, high = np.array(ends), *(np.repeat(v, 2) for v in (values, low, high))
    else:
        x = np.array([layers[row["layer"]] for row in points if row["layer"] in layers])
    order = 4 if is_probe else 3
    if len(points) == 1 and not level:
        axes.errorbar(x, values, [values - low, high - values], color=color, marker="o", capsize=3, zorder=order)
    else:
        axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0, zorder=order - 1)
        style = {"marker": None if level else "o", "ms": 4 if is_probe else 2.5, "lw": 2.2 if is_probe else 1.3}
        axes.plot(x, values, color=color, ls=dashes, zorder=order, **style)
        ringed = [] if level else [i for i, row in enumerate(points) if row.get("chosen") and row["layer"] in layers]
        if ringed:
            axes.plot(x[ringed], values[ringed], "o", ms=9 if is_probe else 7, mfc="none", mec=color, mew=1.2, zorder=order + 1)
    falling = np.array([bool(row.get("still_falling")) for row in points])
    if falling.any():
        at = np.ones(len(x), dtype=bool) if level else falling
        axes.plot(x[at], values[at], FALLING, color=color, mfc="white", ms=5, zorder=order + 1)
    return values[-1], label + " ↓" * bool(falling.any()), color


def _finish_axes(axes: Axes, layers: Mapping, ends: Sequence[tuple[float, str, str]], least: float) -> None:
    """Ticks at layers, a grid, and a label at the right end of every line, moved apart where they would touch.

    least: height of the scale; a narrower one would make noise look like an effect.
    """
    step, first, last = max(1, math.ceil(len(layers) / 13)), min(layers.values()), max(layers.values())
    length = max(last - first, 1)
    shown = list(layers)[::-1][::step]  # the last one always
    axes.set_xticks([layers[layer] for layer in shown], [str(layer) for layer in shown])
    axes.set_xlim(first - 0.03 * length, first + length * 1.03)
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.tick_params(length=2, width=0.6)
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    missing = max(0.0, least - (high - low)) / 2
    low, high = low - missing, high + missing
    axes.set_ylim(low, high)
    edge = first + length
    for (value, label, color), y in zip(ends, _apart([end[0] for end in ends], (high - low) * 0.072), strict=True):
        axes.annotate(
            label, (edge + 0.03 * length, value), (edge + 0.08 * length, y),
            color=color, va="center", fontsize=8, annotation_clip=False,
            fontweight="bold" if label == "probe" else None,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels near their values, in the same order of height, at least a gap apart."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = [[i] for i in order]  # labels that touch share one block, centred on their mean

    def span(group: list[int]) -> tuple[float, float]:
        centre, half = sum(values[i] for i in group) / len(group), gap * (len(group) - 1) / 2
        return centre - half, centre + half

    at = 0
    while at + 1 < len(groups):
        if span(groups[at + 1])[0] - span(groups[at])[1] < gap:
            groups[at : at + 2] = [groups[at] + groups[at + 1]]
            at = max(at - 1, 0)
        else:
            at += 1
    places = {i: span(group)[0] + n * gap for group in groups for n, i in enumerate(group)}
    return [places[i] for i in range(len(values))]


def source_rows(source: Path | None) -> list[dict[str, Any]]:
    """The scores of a finished run that is scored again, to be drawn beside the new ones; its probe is called "source".

    None where no run is looked at, or where it holds none.
    """
    if source is None:
        return []
    try:
        rows = [row for row in rows_of(source) if row["kind"] == "score"]
    except UserError:  # of an earlier version: the new scores stand alone
        return []
    return [{**row, "name": "source" if row["name"] == "probe" else row["name"]} for row in rows]


def write_layer_curve(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]] | None, path: Path, about: str = ""
) -> None:
    """Draw the layer curve into a PNG file."""
    write_atomically(Path(path), png_bytes(draw_layer_curve(rows, columns, about)))
