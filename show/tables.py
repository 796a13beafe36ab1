"""What a reader sees of a run: layers.csv, the layer curve, the table on the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from metrics.bootstrap import Estimate, difference, interval, mean_over_seeds
from runs.records import write_table
from runs.run import Run
from show.records import Column, Resampling, best_layer, curve_rows, find
from show.text import format_table
from tasks import ProbeResult


def present(
    results: Sequence[ProbeResult],
    columns: Sequence[Column],
    resampling: Resampling,
    run: Run,
    *,
    draw: Callable[[list[dict], Sequence[Column], Path, str], None],
    text: str,
) -> dict[str, Any]:
    """Write layers.csv, draw the layer curve, mirror it, print the table.

    Args:
        results: the probe first, then its controls.
        draw: writes the figure of the rows of layers.csv to a path, with one line that says what it shows.
        text: the table.

    Returns:
        {"objective": the headline score of the probe's best layer}.
    """
    rows, figure = curve_rows(run, results), run.dir / "layers.png"
    if write_table(run.dir / "layers.csv", rows):
        figure.unlink(missing_ok=True)
    run.mirror_curve(rows)
    if not figure.exists():  # a finished run that is shown again has its figure
        draw(rows, columns, figure, about(run, results[0]))
    run.finishing()  # all is written: what follows is only shown
    run.say(text)
    run.say(f"\nrecords, curve and checkpoints: {run.dir}")
    best = best_layer(results[0], columns[0])
    return {"objective": None if best is None else best[1]}


def about(run: Run, probe: ProbeResult) -> str:
    """What a figure of a run shows, in one line."""
    names, n_images, n_seeds = run.identity, probe.subsets[0].counts["n_images"], len(probe.seeds)
    parts = [names["model"], names["dataset"], f"protocol {names['protocol']}", f"probe {names['probe']}"]
    return " · ".join([*parts, f"{n_images} images", f"{n_seeds} seeds" if n_seeds > 1 else "one seed"])


def table(results: Sequence[ProbeResult], columns: Sequence[Column], resampling: Resampling) -> str:
    """The layers of the probe, then every control at its best layer and what the probe has over it.

    Best means best per column. A gain is the probe's best layer minus the control's, paired over images.
    """
    probe, counts = results[0], resampling.counts(results[0])
    header = ["layer", *(column.title for column in columns)]
    body = [[str(layer), *(_cell(probe, c, i, counts) for c in columns)] for i, layer in enumerate(probe.layers)]
    for control in results[1:]:
        pairs = [_control_cells(probe, control, column, counts) for column in columns]
        body += [[control.name, *(score for score, _ in pairs)], ["  probe gains", *(gain for _, gain in pairs)]]
    return format_table(header, body) + "\n" + basis(probe)


def _cell(result: ProbeResult, column: Column, index: int, counts: Tensor) -> str:
    """Mean over seeds of a layer with its interval."""
    estimate = find(result, column)
    if estimate is None:
        return "–"
    mean = mean_over_seeds(estimate, len(result.seeds))
    low, high = interval(mean, counts)
    return _number(float(mean.value[index]), float(low[index]), float(high[index]))


def _control_cells(probe: ProbeResult, control: ProbeResult, column: Column, counts: Tensor) -> tuple[str, str]:
    """A control's best layer and the gain of the probe's best layer over it, as text."""
    ours, theirs = best_layer(probe, column), best_layer(control, column)
    if ours is None or theirs is None:
        return "–", ""
    at = f" @{control.layers[theirs[0]]}" if len(control.layers) > 1 else ""
    gained = difference(_at_layer(probe, column, ours[0]), _at_layer(control, column, theirs[0]))
    low, high = interval(gained, counts, bounds=(-1.0, 1.0))
    gain = _number(float(gained.value), float(low), float(high), sign="+")
    return _cell(control, column, theirs[0], counts) + at, gain


def _at_layer(result: ProbeResult, column: Column, index: int) -> Estimate:
    """The mean over seeds at one layer: value [1], influence [1, M]."""
    mean = mean_over_seeds(find(result, column), len(result.seeds))
    return Estimate(*(field[index : index + 1] for field in mean))


def basis(probe: ProbeResult) -> str:
    """What the numbers rest on, in one line."""
    subset = probe.subsets[0]
    rate, majority = (subset.metrics.get(key) for key in ("positive_rate", "majority"))
    seeds = f"{len(probe.seeds)} seeds" if len(probe.seeds) > 1 else "one seed"
    text = f"mean over {seeds}, 95 % intervals over {subset.counts['n_images']} images"
    if rate is not None and majority is not None:
        positive = {"is_same_object": "one object", "same_class": "one class"}.get(subset.question, "positive")
        text += f", {subset.counts['n_pairs']} pairs, {float(rate.value[0]):.3f} of them {positive}"
        text += f" (majority rate {float(majority.value[0]):.3f})"
    return text


def _number(value: float, low: float, high: float, sign: str = "") -> str:
    if value != value:
        return "–"
    shown = [f"{x:{sign}.3f}".replace("0.", ".", 1) for x in (value, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
