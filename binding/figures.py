"""Figures of mode=train_binding: pure `draw_*` functions return figures, `write_*` put them into PNG files.

    layer curve        binding ratio, binding information, I(Y;Z) and I(F;Z) by layer, one line per probe and control
    examples           a few test images with their objects: read, missed, and read though absent

Figures are made without pyplot, so no display, backend or global state is involved.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from binding.tables import CONTROL_LABELS
from controls import BLIND_LAYER
from files import write_atomically
from show.style import BLUE, FALLING, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE, layer_places, note_below, png_bytes

# Okabe and Ito's colours, which every reader can distinguish.
COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, "#000000")
FOUND, MISSED, INVENTED = GREEN, GREY, RED
N_NAMES = 24  # of one example; a code may have hundreds of bits
N_PANELS = 4  # of the layer curve: the first columns, losses say the same once more


def draw_layer_curve(rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]], about: str = "") -> Figure:
    """Information by layer with intervals, one panel per column; a colour per probe, its controls broken in that colour.

    Args:
        rows: "row", "control", "layer", "layer_index", "question", "readout", "subset", "metric", "value", "low", "high".
        columns: (question, readout, subset, metric, title) per panel.
        about: what is shown, in one small line at the bottom.
    """
    columns = [c for c in columns if any(row["metric"] == c[3] for row in rows)][:N_PANELS]
    names = list(dict.fromkeys((row["row"], row["control"]) for row in rows))
    by_depth = lambda layer: -1 if layer == "embed" else int(layer)
    layers = layer_places(sorted({row["layer"] for row in rows} - {BLIND_LAYER}, key=by_depth))
    across, down = min(len(columns), 2), math.ceil(len(columns) / 2)
    below = math.ceil(len(names) / 2)  # lines of the legend
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * across, 2.9 * down + 0.2 * below + 0.2), layout="constrained")
        for panel, (question, readout, subset, metric, title) in enumerate(columns):
            axes = figure.add_subplot(down, across, panel + 1)
            for number, name in enumerate(names):
                mine = [row for row in rows if (row["row"], row["control"]) == name and row["metric"] == metric]
                keys = (question, readout, subset)
                chosen = [row for row in mine if (row["question"], row["readout"], row["subset"]) == keys]
                _draw_line(axes, chosen, layers, names, number)
            axes.axhline(0, color="0.6", lw=0.6, zorder=0)
            axes.set_title(title, loc="left", fontweight="bold")
            step = math.ceil(len(layers) / 14)
            shown = list(layers)[::-1][::step]  # the last one always
            axes.set_xticks([layers[layer] for layer in shown], [str(layer) for layer in shown])
            axes.set_xlabel("layer (block whose output is read)")
            axes.margins(x=0.08)
        # Filled column by column: those in full lines left, controls right of them.
        lines = sorted(zip(*figure.axes[0].get_legend_handles_labels(), names, strict=True), key=lambda line: line[2][1] != "")
        handles, labels, _ = zip(*lines, strict=True)
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 2), frameon=False, fontsize=8)
        note_below(figure, about)
    return figure


def _draw_line(
    axes: Axes, rows: Sequence[Mapping[str, Any]], layers: Mapping, names: Sequence[tuple[str, str]], number: int
) -> None:
    rows = [row for row in rows if row["value"] is not None and math.isfinite(row["value"])]
    rows = sorted(rows, key=lambda row: row["layer_index"])
    spread = min(0.24, 0.08 * max(1, len(layers) - 1))  # about as wide on paper for few layers as for many
    apart = spread / max(1, len(names) - 1) * (number - (len(names) - 1) / 2)  # so that no interval hides another
    if [row["layer"] for row in rows] == [BLIND_LAYER]:  # the same at every depth
        rows, x = [rows[0], rows[0]], [min(layers.values()), max(layers.values())]
    else:
        x = [layers[row["layer"]] + apart for row in rows]
    value = [row["value"] for row in rows]
    error = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
    row, control = names[number]
    of_rows = list(dict.fromkeys(name for name, _ in names))
    color = COLORS[of_rows.index(row) % len(COLORS)]
    style = {"": "-", "random": "--", "blind": "-."}.get(control, ":")
    parts = (row if not control or len(of_rows) > 1 else "", CONTROL_LABELS.get(control, control))
    falling = [i for i, row in enumerate(rows) if row.get("still_falling")]
    label = ", ".join(part for part in parts if part).replace("_", " ") + " ↓" * bool(falling)
    axes.plot([x[i] for i in falling], [value[i] for i in falling], FALLING, color=color, mfc="white", ms=7, zorder=4)
    dot = "" if control == "blind" else "o"
    axes.errorbar(x, value, error, color=color, ls=style, marker=dot, ms=4, capsize=2, lw=1.4, elinewidth=0.9, label=label)
    ringed = [i for i, row in enumerate(rows) if row.get("chosen")]  # the layer chosen on validation
    axes.plot([x[i] for i in ringed], [value[i] for i in ringed], "o", ms=8, mfc="none", mec=color, mew=1.0)


def draw_examples(examples: Sequence[Mapping[str, Any]]) -> Figure:
    """Images beside the objects a probe reads: read, missed, and read though absent.

    Args:
        examples: "key", "layer", "true" and "predicted" names, "image" [3, H, W] uint8.
    """
    lines = min(max(len(set(e["true"]) | set(e["predicted"])) for e in examples), N_NAMES + 1) + 1
    text_height = 0.14 * lines
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(examples), 2.7 + text_height), layout="constrained")
        grid = figure.add_gridspec(2, len(examples), height_ratios=[2.4, text_height])
        for i, example in enumerate(examples):
            axes = figure.add_subplot(grid[0, i])
            image: Tensor = example["image"]
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_title(f"{example['key']}, layer {example['layer']}", fontsize=7)
            axes.axis("off")
            axes = figure.add_subplot(grid[1, i])
            axes.axis("off")
            true, predicted = example["true"], example["predicted"]
            shown = [(name, "found", FOUND) for name in true if name in predicted]
            shown += [(name, "missed", MISSED) for name in true if name not in predicted]
            shown += [(name, "not there", INVENTED) for name in predicted if name not in true]
            axes.text(0, 1, f"{len(true)} objects, {len(predicted)} read", fontsize=7, fontweight="bold", va="top")
            if len(shown) > N_NAMES:
                shown[N_NAMES:] = [(f"and {len(shown) - N_NAMES} more", "found", "black")]
            for row, (name, what, color) in enumerate(shown, start=1):
                mark = "" if what == "found" else f"  ({what})"
                axes.text(0, 1 - row / lines, name + mark, fontsize=7, color=color, va="top")
    return figure


def write_layer_curve(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]], path: Path, about: str = ""
) -> None:
    """Draw the layer curve into a PNG file."""
    write_atomically(Path(path), png_bytes(draw_layer_curve(rows, columns, about)))


def write_examples(examples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the decoded examples into a PNG file."""
    write_atomically(Path(path), png_bytes(draw_examples(examples)))
