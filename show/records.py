"""From scores to records: one per layer, seed and block, and one for the mean over seeds with its 95 % interval over images."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig
from torch import Tensor

from metrics.bootstrap import Estimate, interval, interval_over_seeds, mean_over_seeds, resample
from tasks import Scores


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
