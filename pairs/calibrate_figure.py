"""The figure of mode=calibrate: claims against the planted effect, and how many intervals cover the truth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from files import write_atomically
from pairs.calibrate_summary import Rate
from show.style import BLUE, GREY, ORANGE, RED, STYLE, png_bytes


def draw_calibration(summary: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Two panels: rate of claims by effect, cover of intervals by effect, with 95 % intervals of these rates.

    Args:
        summary: lines of `calibrate_summary.summarise`, that of all worlds last. curve: of `calibrate_summary.by_effect`.
    """
    lines = summary[:-1]
    effect = np.array([line["effect"] for line in lines])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.5), layout="constrained")
        claims, cover = figure.subplots(1, 2)
        for null, color, marker, line, label in ((False, BLUE, "o", "-", "planted"), (True, RED, "s", "", "null worlds")):
            points = [point for point in curve if point["null"] == null]
            rates = [point["claimed"] for point in points]
            _draw_rates(claims, np.array([point["effect"] for point in points]), rates, color, marker, line, label)
        for level, text in ((0.05, "5 %"), (0.95, "95 %")):
            claims.axhline(level, color="black", ls=(0, (1, 3)), lw=0.9)
            claims.annotate(text, (1.0, level), xycoords=("axes fraction", "data"), xytext=(3, -3), textcoords="offset points")
        claims.axvline(0.03, color=GREY, ls=":", lw=0.9)
        claims.set(ylim=(-0.03, 1.03), ylabel="worlds with the claim", xlabel="true gain over the best control (AUROC)")
        claims.set_title("IsSameObject above every control", loc="left", fontweight="bold")
        claims.legend(frameon=False, loc=(0.6, 0.3), fontsize=8)
        shift = 0.006 * np.ptp(effect) if len(effect) > 1 else 0.0
        for name, color, marker, side in (("scores", BLUE, "o", -1), ("gains", ORANGE, "D", 1)):
            rates = [line[name] for line in lines]
            _draw_rates(cover, effect + side * shift, rates, color, marker, "", f"of {name}")
        cover.axhline(0.95, color="black", ls=(0, (1, 3)), lw=0.9)
        cover.axhspan(0.93, 0.97, color="0.92", zorder=0)
        cover.set(ylim=(0.83, 1.005), ylabel="intervals that cover the truth", xlabel="true gain over the best control (AUROC)")
        cover.set_title("95 % intervals", loc="left", fontweight="bold")
        cover.legend(frameon=False, loc="lower left", fontsize=8, ncols=2)
    return figure


def _draw_rates(
    axes: Any, x: np.ndarray, rates: Sequence[Rate], color: str, marker: str, line: str, label: str
) -> None:
    """Rates with their intervals."""
    values = np.array([rate.hits / max(rate.n, 1) for rate in rates])
    ends = np.array([(rate.low, rate.high) for rate in rates]).T
    axes.errorbar(
        x, values, np.abs(ends - values), color=color, marker=marker, ls=line or "none", ms=5, lw=1.3, capsize=2.5, label=label
    )


def write_calibration(summary: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the figure into a PNG file."""
    write_atomically(path, png_bytes(draw_calibration(summary, curve)))
