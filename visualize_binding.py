"""Figures of mode=train_binding: pure `draw_*` functions return figures, `write_*` put them into PNG files.

    layer curve        binding ratio, binding information, I(Y;Z) and I(F;Z) by layer, one line per probe and control
    training curves    cross-entropy in bits per image by epoch, training and validation, of every layer
    examples           a few test images with their objects: read, missed, and read though absent

Figures are made without pyplot, so no display, backend or global state is involved.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from results import write_atomically

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
DPI = 160
# Okabe and Ito's colours, told apart with any colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FOUND, MISSED, INVENTED = "#009E73", "#777777", "#D55E00"
N_PANELS = 4  # of the layer curve: the first columns, losses say the same once more


def draw_layer_curve(rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]]) -> Figure:
    """Information by layer with intervals, one panel per column, one line per probe or control.

    Args:
        rows: "name", "layer", "layer_index", "question", "readout", "block", "metric", "value", "low", "high".
        columns: (question, readout, block, metric, title) per panel.
    """
    columns = [c for c in columns if any(row["metric"] == c[3] for row in rows)][:N_PANELS]
    names = list(dict.fromkeys(row["name"] for row in rows))
    layers = sorted({row["layer"] for row in rows}, key=lambda layer: -1 if layer == "embed" else int(layer))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * min(len(columns), 2), 3.0 * math.ceil(len(columns) / 2)), layout="constrained")
        for panel, (question, readout, block, metric, title) in enumerate(columns):
            axes = figure.add_subplot(math.ceil(len(columns) / 2), min(len(columns), 2), panel + 1)
            for number, name in enumerate(names):
                mine = [row for row in rows if row["name"] == name and row["metric"] == metric]
                chosen = [row for row in mine if (row["question"], row["readout"], row["block"]) == (question, readout, block)]
                _draw_line(axes, chosen, layers, name, number)
            axes.axhline(0, color="0.6", lw=0.6)
            axes.set_title(title, loc="left", fontweight="bold")
            axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set_xlabel("layer (block whose output is read)")
            axes.margins(x=0.08)
            if panel == 0:
                axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_line(axes: Axes, rows: Sequence[Mapping[str, Any]], layers: Sequence[int | str], name: str, number: int) -> None:
    rows = [row for row in rows if row["value"] is not None and math.isfinite(row["value"])]
    rows = sorted(rows, key=lambda row: row["layer_index"])
    x = [layers.index(row["layer"]) for row in rows]
    value = [row["value"] for row in rows]
    error = [[row["value"] - row["low"] for row in rows], [row["high"] - row["value"] for row in rows]]
    style = "--" if "/" in name or name in ("random", "pixels") else "-"
    label = {"random": "random weights", "pixels": "raw pixels"}.get(name, name.replace("/", ", "))
    axes.errorbar(x, value, error, color=COLORS[number % len(COLORS)], ls=style, marker="o", ms=4, capsize=2, label=label)


def draw_training_curves(history: Sequence[Mapping[str, Any]], n_bits: Mapping[str, int]) -> Figure:
    """Cross-entropy by epoch: one panel per code, a line per layer, validation full and training dashed, mean over seeds.

    Args:
        history: records of a fit: "name" ending in the code, "layer" (text of the list of layers), "epoch", and
            "train_loss", "val_loss" [S][L] in nats per bit.
        n_bits: length of every code.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * len(n_bits), 3.2), layout="constrained")
        for panel, (code, bits) in enumerate(n_bits.items()):
            axes, number = figure.add_subplot(1, len(n_bits), panel + 1), 0
            mine = [record for record in history if record["name"].split("/")[-1] == code]
            for cut in dict.fromkeys(record["layer"] for record in mine):
                records = sorted((r for r in mine if r["layer"] == cut), key=lambda r: r["epoch"])
                for i, layer in enumerate(cut.strip("[]").split(", ")):
                    color = COLORS[number % len(COLORS)]
                    for key, style in (("train_loss", "--"), ("val_loss", "-")):
                        values = [sum(row[i] for row in r[key]) / len(r[key]) * bits / math.log(2) for r in records]
                        label = f"layer {layer}".replace("'", "") if style == "-" else None
                        axes.plot([r["epoch"] for r in records], values, style, color=color, lw=1.2, label=label)
                    number += 1
            axes.set_title(f"{code.replace('_', ' ')}: bits per image", loc="left", fontweight="bold")
            axes.set_xlabel("epoch (full: validation, dashed: training)")
            axes.legend(frameon=False, fontsize=8)
    return figure


def draw_examples(examples: Sequence[Mapping[str, Any]]) -> Figure:
    """Images beside the objects a probe reads: found, missed, and read though absent.

    Args:
        examples: "key", "layer", "true" and "predicted" names, "image" [3, H, W] uint8.
    """
    lines = max(len(set(e["true"]) | set(e["predicted"])) for e in examples) + 1
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
            for row, (name, what, color) in enumerate(shown, start=1):
                mark = "" if what == "found" else f"  ({what})"
                axes.text(0, 1 - row / lines, name + mark, fontsize=7, color=color, va="top")
    return figure


def _write(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(data, format="png", dpi=DPI)
    write_atomically(Path(path), data.getvalue())


def write_layer_curve(rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]], path: Path) -> None:
    """Draw the layer curve into a PNG file."""
    _write(draw_layer_curve(rows, columns), path)


def write_training_curves(history: Sequence[Mapping[str, Any]], n_bits: Mapping[str, int], path: Path) -> None:
    """Draw the training curves into a PNG file."""
    _write(draw_training_curves(history, n_bits), path)


def write_examples(examples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the decoded examples into a PNG file."""
    _write(draw_examples(examples), path)
