"""From results to records: one per layer, seed and subset, and one for the mean over seeds with its 95 % interval.

Intervals are over images. Records name their protocol (`Run.identity`), and a table never mixes two.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig
from torch import Tensor

from metrics.bootstrap import Estimate, interval, interval_over_seeds, mean_over_seeds, resample
from runs.records import read_records
from runs.run import Run
from tasks import ProbeResult, SubsetResult


class Column(NamedTuple):
    """What a column of a table and a panel of a figure show."""

    question: str
    readout: str
    subset: str
    metric: str
    title: str


class Resampling(NamedTuple):
    """The bootstrap resamples of the images; the same for every number of a run, so that comparisons are paired."""

    n_boot: int
    seed: int

    @classmethod
    def read(cls, cfg: DictConfig) -> "Resampling":
        """As configured: `trainer.n_boot`, `seed`."""
        return cls(int(cfg.trainer.n_boot), int(cfg.seed))

    def counts(self, result: ProbeResult) -> Tensor:
        """How often each image is drawn in each resample, [n_boot, M]."""
        n_images = next(iter(result.subsets[0].metrics.values())).influence.shape[1]
        return resample(n_images, self.n_boot, self.seed)


SUBSET = ("question", "readout", "subset")  # what tells a subset's records from those of the others
# Warnings a record carries, from its subset and its numbers.
Flags = Callable[[SubsetResult, Mapping[str, float]], list[str]]


def no_flags(subset: SubsetResult, metrics: Mapping[str, float]) -> list[str]:
    """Nothing to warn of."""
    return []


def write_records(run: Run, result: ProbeResult, resampling: Resampling, *, split: str, flags: Flags = no_flags) -> None:
    """Append the records of a result to metrics.jsonl."""
    for record in records(result, resampling, split=split, flags=flags):
        run.write(record)


def records(result: ProbeResult, resampling: Resampling, *, split: str, flags: Flags = no_flags) -> Iterator[dict[str, Any]]:
    """A record per layer, seed and subset with the exact numbers, and one for the mean over seeds with its interval."""
    n_layers, n_seeds, counts = len(result.layers), len(result.seeds), resampling.counts(result)
    for subset in result.subsets:
        means = {key: mean_over_seeds(e, n_seeds) for key, e in subset.metrics.items()}
        ends = {key: mean_interval(e, subset, n_seeds, counts) for key, e in subset.metrics.items()}
        bins = [(row, mean_over_seeds(row["auroc"], n_seeds)) for row in subset.distance]
        for index, layer in enumerate(result.layers):
            common = {
                "kind": "score", "name": result.name, "row": result.row, "control": result.control, "split": split,
                "layer": layer, "layer_index": index, "question": subset.question, "readout": subset.readout,
                "subset": subset.subset, **subset.counts, **subset.notes,
            }  # fmt: skip
            for number, seed in enumerate(result.seeds):
                metrics = {k: float(e.value[number * n_layers + index]) for k, e in subset.metrics.items()}
                yield {**common, "seed": seed, "metrics": metrics, **_warned(flags(subset, metrics))}
            metrics = {key: float(e.value[index]) for key, e in means.items()}
            yield {
                **common,
                "seed": "mean",
                "metrics": metrics,
                **_warned(flags(subset, metrics)),
                "interval": {key: [float(low[index]), float(high[index])] for key, (low, high) in ends.items()},
                "distance": [{**row, "auroc": float(e.value[index])} for row, e in bins],
            }


def _warned(flags: list[str]) -> dict[str, list[str]]:
    return {"flags": flags} if flags else {}


def mean_interval(estimate: Estimate, subset: SubsetResult, n_seeds: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The 95 % interval of the mean over seeds of fits [S * L], two tensors [L]; over seeds too where the subset says so."""
    if subset.over_seeds:
        return interval_over_seeds(estimate, n_seeds, counts, subset.bounds)
    return interval(mean_over_seeds(estimate, n_seeds), counts, bounds=subset.bounds)


def curve_rows(run: Run, results: Sequence[ProbeResult]) -> list[dict[str, Any]]:
    """One row per result, layer, subset and metric, mean over seeds with interval: read from metrics.jsonl.

    The layer curve is made of the records, so the two cannot disagree, also where an earlier process wrote some of them.
    """
    rows, number = [], lambda value: math.nan if value is None else value
    names = {result.name for result in results}
    for record in read_records(run.dir / "metrics.jsonl", run.say):
        if record.get("kind") != "score" or record["seed"] != "mean" or record["name"] not in names:
            continue
        common = {key: record[key] for key in ("name", "row", "control", "layer", "layer_index", *SUBSET)}
        for metric, value in record["metrics"].items():
            low, high = map(number, record["interval"][metric])
            rows.append({**common, "metric": metric, "value": number(value), "low": low, "high": high})
    return rows


def find(result: ProbeResult, column: Column) -> Estimate | None:
    """The estimate a column shows; None where this result has none."""
    for subset in result.subsets:
        if (subset.question, subset.readout, subset.subset) == column[:3]:
            return subset.metrics.get(column.metric)
    return None


def best_layer(result: ProbeResult, column: Column) -> tuple[int, float] | None:
    """Index and value of the layer with the highest mean over seeds; None where the score is undefined everywhere."""
    estimate = find(result, column)
    if estimate is None:
        return None
    value = mean_over_seeds(estimate, len(result.seeds)).value.nan_to_num(-math.inf)
    index = int(value.argmax())
    return None if value[index] == -math.inf else (index, float(value[index]))
