"""From scores to what a reader sees: records, layers.csv, the table on the terminal, the layer curve.

A record belongs to one layer, seed and block; the record with seed "mean" carries the 95 % interval over images of the
mean over seeds. Records name their protocol, and a table never mixes two.
"""

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig
from torch import Tensor

from metrics import Estimate, difference, interval, interval_over_seeds, mean_over_seeds, resample
from results import Run, format_table, write_table
from tasks import Scores, Task


class Scored(NamedTuple):
    """The scores of a probe or a control, all layers in order."""

    name: str
    layers: list[int | str]
    seeds: list[int]
    scores: list[Scores]


def records(scored: Scored, cfg: DictConfig, split: str) -> Iterator[dict[str, Any]]:
    """A record per layer, seed and block with the exact scores, and one for the mean over seeds with its interval."""
    n_layers, counts = len(scored.layers), None
    for block in scored.scores:
        counts = bootstrap_counts(block, cfg) if counts is None else counts
        means = {key: mean_over_seeds(e, len(scored.seeds)) for key, e in block.metrics.items()}
        ends = {key: block_interval(e, block, len(scored.seeds), counts) for key, e in block.metrics.items()}
        bins = [(row, mean_over_seeds(row["auroc"], len(scored.seeds))) for row in block.distance]
        for index, layer in enumerate(scored.layers):
            common = {
                "kind": "score", "name": scored.name, "split": split, "layer": layer, "layer_index": index,
                "question": block.question, "readout": block.readout, "block": block.block, **block.counts, **block.facts,
            }  # fmt: skip
            for number, seed in enumerate(scored.seeds):
                fit = number * n_layers + index
                found = {k: float(e.value[fit]) for k, e in block.metrics.items()}
                yield {**common, "seed": seed, "metrics": found, **warned(block, found)}
            found = {key: float(e.value[index]) for key, e in means.items()}
            yield {
                **common,
                "seed": "mean",
                "metrics": found,
                **warned(block, found),
                "interval": {key: [float(low[index]), float(high[index])] for key, (low, high) in ends.items()},
                "distance": [{**row, "auroc": float(e.value[index])} for row, e in bins],
            }


def warned(block: Scores, metrics: dict[str, float]) -> dict[str, list[str]]:
    """The warnings a record carries, if any."""
    flags = block.flag(metrics)
    return {"flags": flags} if flags else {}


def bootstrap_counts(block: Scores, cfg: DictConfig) -> Tensor:
    """The resamples of the images; the same for every score of a run, so that comparisons are paired."""
    n_images = next(iter(block.metrics.values())).influence.shape[1]
    return resample(n_images, int(cfg.trainer.n_boot), int(cfg.seed))


def block_interval(estimate: Estimate, block: Scores, n_seeds: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The 95 % interval of the mean over seeds of fits [S * L], two tensors [L]; over seeds too where the block says so."""
    if block.over_seeds:
        return interval_over_seeds(estimate, n_seeds, counts, block.bounds)
    return interval(mean_over_seeds(estimate, n_seeds), counts, bounds=block.bounds)


def report(summary: Sequence[Scored], task: Task, cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Write layers.csv, draw the layer curve, mirror it, print the table.

    Args:
        summary: the probe first, then its controls.

    Returns:
        {"objective": the headline score of the best layer}.
    """
    counts = bootstrap_counts(summary[0].scores[0], cfg)
    rows = curve_rows(summary, counts)
    write_table(run, rows)
    run.mirror_curve(rows)
    figures = importlib.import_module(task.figures)  # here, so that no fit waits for or depends on matplotlib
    figures.write_layer_curve(rows, task.columns, run.dir / "layers.png")
    run.say(task.table(summary, counts) or table(summary, task, counts))
    run.say(f"\nrecords, curve and checkpoints: {run.dir}")
    best = best_layer(summary[0], task.columns[0])
    return {"objective": None if best is None else best[1]}


def curve_rows(summary: Sequence[Scored], counts: Tensor) -> list[dict[str, Any]]:
    """One row per name, layer, block and metric: mean over seeds with interval."""
    rows = []
    for scored in summary:
        for block in scored.scores:
            for metric, estimate in block.metrics.items():
                mean = mean_over_seeds(estimate, len(scored.seeds))
                low, high = block_interval(estimate, block, len(scored.seeds), counts)
                for index, layer in enumerate(scored.layers):
                    rows.append({
                        "name": scored.name, "layer": layer, "layer_index": index, "question": block.question,
                        "readout": block.readout, "block": block.block, "metric": metric,
                        "value": float(mean.value[index]), "low": float(low[index]), "high": float(high[index]),
                    })  # fmt: skip
    return rows


def find(scored: Scored, column: tuple) -> Estimate | None:
    """The estimate a column shows; None where this control has none."""
    question, readout, block, metric, _ = column
    for found in scored.scores:
        if (found.question, found.readout, found.block) == (question, readout, block):
            return found.metrics.get(metric)
    return None


def best_layer(scored: Scored, column: tuple) -> tuple[int, float] | None:
    """Index and value of the layer with the highest mean over seeds; None where the score is undefined everywhere."""
    estimate = find(scored, column)
    if estimate is None:
        return None
    value = mean_over_seeds(estimate, len(scored.seeds)).value.nan_to_num(-math.inf)
    index = int(value.argmax())
    return None if value[index] == -math.inf else (index, float(value[index]))


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
