"""What a reader sees of a training run: layers.csv, the layer curve, the table on the terminal."""

import importlib
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from metrics.bootstrap import Estimate, difference, interval, mean_over_seeds
from runs.records import write_table
from runs.run import Run
from show.records import Scored, best_layer, bootstrap_counts, curve_rows, find
from show.text import format_table
from tasks import Task


def report(summary: Sequence[Scored], task: Task, cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write layers.csv, draw the layer curve, mirror it, print the table.

    Args:
        summary: the probe first, then its controls.

    Returns:
        {"objective": the headline score of the best layer}.
    """
    counts = bootstrap_counts(summary[0].scores[0], cfg)
    rows = curve_rows(summary, counts)
    write_table(run.dir / "layers.csv", rows)
    run.mirror_curve(rows)
    figures = importlib.import_module(task.figures)  # here, so that no fit waits for or depends on matplotlib
    figures.write_layer_curve(rows, task.columns, run.dir / "layers.png")
    run.say(task.table(summary, counts) or table(summary, task, counts))
    run.say(f"\nrecords, curve and checkpoints: {run.dir}")
    best = best_layer(summary[0], task.columns[0])
    return {"objective": None if best is None else best[1]}


def table(summary: Sequence[Scored], task: Task, counts: Tensor) -> str:
    """The layers of the probe, then every control at its best layer and what the probe has over it.

    Best means best per column. A gain is the probe's best layer minus the control's, paired over images.
    """
    probe = summary[0]

    def cell(scored: Scored, column: tuple, index: int) -> str:
        estimate = find(scored, column)
        if estimate is None:
            return "–"
        mean = mean_over_seeds(estimate, len(scored.seeds))
        low, high = interval(mean, counts)
        return _number(float(mean.value[index]), float(low[index]), float(high[index]))

    header = ["layer", *(column[-1] for column in task.columns)]
    body = [[str(layer), *(cell(probe, c, i) for c in task.columns)] for i, layer in enumerate(probe.layers)]
    for control in summary[1:]:
        row, gain = [control.name], ["  probe gains"]
        for column in task.columns:
            ours, theirs = best_layer(probe, column), best_layer(control, column)
            if ours is None or theirs is None:
                row.append("–")
                gain.append("")
                continue
            at = f" @{control.layers[theirs[0]]}" if len(control.layers) > 1 else ""
            row.append(cell(control, column, theirs[0]) + at)
            pick = lambda scored, index, column=column: Estimate(
                *(field[index : index + 1] for field in mean_over_seeds(find(scored, column), len(scored.seeds)))
            )
            gained = difference(pick(probe, ours[0]), pick(control, theirs[0]))
            low, high = interval(gained, counts, bounds=(-1.0, 1.0))
            gain.append(_number(float(gained.value), float(low), float(high), sign="+"))
        body += [row, gain]
    block = find_counts(probe)
    return format_table(header, body) + "\n" + block


def find_counts(probe: Scored) -> str:
    """What the numbers rest on, in one line."""
    block = probe.scores[0]
    rate, majority = (block.metrics.get(key) for key in ("positive_rate", "majority"))
    seeds = f"{len(probe.seeds)} seeds" if len(probe.seeds) > 1 else "one seed"
    text = f"mean over {seeds}, 95 % intervals over {block.counts['n_images']} images"
    if rate is not None and majority is not None:
        text += f", {block.counts['n_pairs']} pairs, {float(rate.value[0]):.3f} of them one object"
        text += f" (majority rate {float(majority.value[0]):.3f})"
    return text


def _number(value: float, low: float, high: float, sign: str = "") -> str:
    if value != value:
        return "–"
    shown = [f"{x:{sign}.3f}".replace("0.", ".", 1) for x in (value, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
