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
from tasks import FitReport, ProbeResult, SubsetResult


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


VALIDATION = "validation"  # the kind of the records that hold what layers are chosen by
SUBSET = ("question", "readout", "subset")  # what tells a subset's records from those of the others
ENDINGS = ("still_falling", "worse_than_constant")  # how a fit should not end
# Warnings a record carries, from its subset and its numbers.
Flags = Callable[[SubsetResult, Mapping[str, float]], list[str]]


def no_flags(subset: SubsetResult, metrics: Mapping[str, float]) -> list[str]:
    """Nothing to warn of."""
    return []


def write_records(
    run: Run, result: ProbeResult, resampling: Resampling, *, split: str, flags: Flags = no_flags, chosen_on: str = "val"
) -> None:
    """Append the records of a result to metrics.jsonl: its scores, and those on `chosen_on` that layers are chosen by."""
    for record in records(result, resampling, split=split, flags=flags):
        run.write(record)
    for record in validation_records(result, chosen_on):
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
                **({"fitted_in": result.fitted_in} if result.fitted_in else {}),
            }  # fmt: skip
            for number, seed in enumerate(result.seeds):
                metrics = {k: float(e.value[number * n_layers + index]) for k, e in subset.metrics.items()}
                ended = _ended([fit for fit in fits_behind(result, subset, layer) if fit.seed == seed])
                yield {**common, "seed": seed, **ended, "metrics": metrics, **_warned(flags(subset, metrics))}
            metrics = {key: float(e.value[index]) for key, e in means.items()}
            yield {
                **common,
                "seed": "mean",
                **_ended(fits_behind(result, subset, layer)),
                "metrics": metrics,
                **_warned(flags(subset, metrics)),
                "interval": {key: [float(low[index]), float(high[index])] for key, (low, high) in ends.items()},
                "distance": [{**row, "auroc": float(e.value[index])} for row, e in bins],
            }


def validation_records(result: ProbeResult, split: str = "val") -> Iterator[dict[str, Any]]:
    """A record per layer and subset with the validation scores, means over seeds without intervals."""
    of_subsets: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for (*subset, metric), values in (result.validation or {}).items():
        of_subsets.setdefault(tuple(subset), {})[metric] = values
    for subset, metrics in of_subsets.items():
        for index, layer in enumerate(result.layers):
            yield {
                "kind": VALIDATION, "name": result.name, "row": result.row, "control": result.control, "split": split,
                "layer": layer, "layer_index": index, **dict(zip(SUBSET, subset, strict=True)), "seed": "mean",
                "metrics": {metric: values[index] for metric, values in metrics.items()},
            }  # fmt: skip


def fits_behind(result: ProbeResult, subset: SubsetResult, layer: int | str) -> list[FitReport]:
    """The fits of a layer, of every seed, that answered a subset."""
    return [fit for fit in result.fits if fit.layer == layer and subset.variant in ("", fit.variant)]


def _ended(fits: Sequence[FitReport]) -> dict[str, bool]:
    """Whether one of these fits had not converged, or reads less than a constant answer; nothing where nothing was fitted."""
    return {key: any(getattr(fit, key) for fit in fits) for key in ENDINGS} if fits else {}


def _warned(flags: list[str]) -> dict[str, list[str]]:
    return {"flags": flags} if flags else {}


def mean_interval(estimate: Estimate, subset: SubsetResult, n_seeds: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The 95 % interval of the mean over seeds of fits [S * L], two tensors [L]; over seeds too where the subset says so."""
    if subset.over_seeds:
        return interval_over_seeds(estimate, n_seeds, counts, subset.bounds)
    return interval(mean_over_seeds(estimate, n_seeds), counts, bounds=subset.bounds)


def curve_rows(run: Run, results: Sequence[ProbeResult], split: str) -> list[dict[str, Any]]:
    """The rows of layers.csv, read from metrics.jsonl: the two cannot disagree, also where an earlier process wrote records.

    Those of the split that is scored; folds have records of their own.

    kind "score": a row per result, layer, subset and metric, mean over seeds with interval; `chosen` is 1 at the layer
    chosen on validation, `n` how many images it is a score of. kind "gain": a row per control (`name`) and layer of its probe,
    the probe's score minus that of the control at `over_layer`, paired over images, with its p-value and the one corrected
    over layers.
    """
    rows, number = [], lambda value: math.nan if value is None else value
    about = {"model": run.identity["model"], "data": run.identity["dataset"], "probe": run.identity["probe"]}
    names = {result.name for result in results}
    found = [r for r in read_records(run.dir / "metrics.jsonl", run.say) if r.get("name") in names and r.get("split") == split]
    chosen = {
        (r["name"], str(r["layer"]), *(r[key] for key in SUBSET), r["metric"])
        for r in found
        if r["kind"] == "choice"
    }  # fmt: skip
    scores = [record for record in found if record["kind"] == "score"]
    n_images = {(record["row"], *(record[key] for key in SUBSET)): record["n_images"] for record in scores}
    for record in found:
        if record["kind"] not in ("score", "gain") or record.get("seed", "mean") != "mean":
            continue
        common = about | {key: record[key] for key in ("kind", "name", "row", "control", "layer", "layer_index", *SUBSET)}
        common["n"] = n_images.get((record["row"], *(record[key] for key in SUBSET)), "")
        if record["kind"] == "gain":
            low, high = map(number, record["interval"])
            ends = {"metric": record["metric"], "value": number(record["value"]), "low": low, "high": high}
            tests = {"over_layer": record["over_layer"], "p": number(record["p"]), "p_holm": number(record["p_holm"])}
            endings = dict.fromkeys(ENDINGS, "")
            rows.append({**common, **endings, **ends, "chosen": int(record["chosen"]), **tests})
            continue
        common |= {key: bool(record.get(key)) for key in ENDINGS}
        for metric, value in record["metrics"].items():
            low, high = map(number, record["interval"][metric])
            key = (record["name"], str(record["layer"]), *(record[name] for name in SUBSET), metric)
            ends = {"metric": metric, "value": number(value), "low": low, "high": high}
            rows.append({**common, **ends, "chosen": int(key in chosen), "over_layer": "", "p": "", "p_holm": ""})
    return rows


def find_subset(result: ProbeResult, column: Column) -> SubsetResult | None:
    """The subset a column shows; None where this result has none."""
    return next((s for s in result.subsets if (s.question, s.readout, s.subset) == column[:3]), None)


def find(result: ProbeResult, column: Column) -> Estimate | None:
    """The estimate a column shows; None where this result has none."""
    subset = find_subset(result, column)
    return None if subset is None else subset.metrics.get(column.metric)
