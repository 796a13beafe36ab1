"""The main figure of a comparison: score by relative depth, a line and ribbon per run, the controls as a band."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from show.comparison import Cell, Key, RunRow
from show.style import BLUE, GREEN, GREY, ORANGE, PINK, PURPLE, RED, SKY, STYLE, layer_places, note_below

COLORS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, PINK, "#000000")
DASHES = ("-", "--", "-.", ":")
# Controls that know nothing of the backbone's weights; oracles and similarities are no floor.
FLOOR = ("position", "pixels", "pixels_position", "random")


def draw_depth_curves(rows: Sequence[RunRow], labels: Sequence[str], columns: Mapping[Key, str], about: str) -> Figure:
    """Score by relative depth, 0 the input of the first block and 1 the output of the last layer read.

    Args:
        rows, labels: what is compared; rows without scores are left out.
        columns: one panel each, with its title.
        about: one small line at the bottom.
    """
    across, down = min(len(columns), 2), math.ceil(len(columns) / 2)
    drawn = [(row, label) for row, label in zip(rows, labels, strict=True) if row.curves]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8 * across, 3.2 * down + 0.2 * math.ceil((len(drawn) + 1) / 2)), layout="constrained")
        for panel, (key, title) in enumerate(columns.items()):
            axes = figure.add_subplot(down, across, panel + 1)
            _draw_band(axes, [row for row, _ in drawn], key)
            widest = 0.0
            for number, (row, label) in enumerate(drawn):
                widest = max(widest, _draw_run(axes, row, label, key, number))
            low, high = axes.get_ylim()
            missing = max(0.0, 2 * widest - (high - low)) / 2  # a narrower scale would make noise look like an effect
            axes.set_ylim(low - missing, high + missing)
            axes.set_title(title, loc="left", fontweight="bold")
            if panel >= len(columns) - across:
                axes.set_xlabel("relative depth")
            axes.grid(axis="y", color="0.9", lw=0.6)
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=min(2, len(names)), frameon=False, fontsize=8)
        note_below(figure, about)
    return figure


def _depths(cells: Sequence[Cell]) -> np.ndarray:
    """Relative depth of layers, float64 [L]; one layer alone stands at 1."""
    places = np.array(list(layer_places(cell.layer for cell in cells).values()), float)
    return places / places.max() if places.max() > 0 else np.ones_like(places)


def _draw_run(axes: Axes, row: RunRow, label: str, key: Key, number: int) -> float:
    """The line of a run, its chosen layer ringed; the widest of its intervals."""
    cells, at = row.curves[key], row.chosen.get(key)
    x, value, low, high = _depths(cells), *(np.array([getattr(c, name) for c in cells]) for name in ("value", "low", "high"))
    color, dashes = COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]  # lines that lie on each other stay two
    axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0)
    axes.plot(x, value, dashes, color=color, marker="o", ms=3, lw=1.8, label=label)
    if at is not None:
        axes.plot(x[at], value[at], "o", ms=8, mfc="none", mec=color, mew=1.2)
    widths = (high - low)[np.isfinite(high - low)]
    return float(widths.max()) if len(widths) else 0.0


def _draw_band(axes: Axes, rows: Sequence[RunRow], key: Key) -> None:
    """From the lowest to the highest score that any control which knows no trained weights reaches at any layer."""
    scores = [
        cell.value for row in rows for name, curves in row.controls.items() if name in FLOOR for cell in curves.get(key, ())
    ]
    scores = [score for score in scores if math.isfinite(score)]
    if scores:
        names = "position, pixels, both, random weights"
        axes.axhspan(min(scores), max(scores), color=GREY, alpha=0.15, lw=1, label=f"controls of all rows ({names})")
