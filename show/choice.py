"""The layer a reader is shown: chosen on validation, scored once on test; what that cost; gains over controls at every layer.

    best_layer       the layer with the best validation score, of every column by itself
    chosen           the score at that layer
    regret           what the best test layer has over it; its interval takes the maximum inside every resample
    gains            probe minus control at every layer of the probe, paired over images, p-values corrected over layers
    write_choices    all of it as records of metrics.jsonl: kinds "choice" and "gain"

Intervals and p-values come from the resamples of all other numbers of a run, so they agree with them. A p-value is two-sided
and corrected over the layers of one probe (Holm), not over controls and columns.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metrics.bootstrap import Estimate, draws_of, draws_over_seeds, holm, mean_over_seeds, p_value, percentiles, pooled_estimate
from runs.records import read_records
from runs.run import Run
from show.records import VALIDATION, Column, Resampling, find_subset
from tasks import ProbeResult, SubsetResult

Ends = tuple[float, float, float]  # a score with the two ends of its interval


class Chosen(NamedTuple):
    """The score at the chosen layer: its name (of folds that differ all names), value and ends, and its draws [n_boot]."""

    layer: int | str
    score: Ends
    draws: Tensor


class Regret(NamedTuple):
    """What choosing on validation cost: the best layer of the scored split, its score, and that minus the chosen layer's."""

    layer: int | str
    score: Ends
    regret: Ends


class Gains(NamedTuple):
    """What the L layers of a probe have over a control at the layer chosen for that (`over`): float64 [L] each.

    chosen: the same at the layer chosen for the probe. p_chosen: its p-value, which needs no correction over layers.
    """

    over: int | str
    value: Tensor
    low: Tensor
    high: Tensor
    p: Tensor
    p_holm: Tensor
    chosen: Ends
    p_chosen: float


def better(column: Column) -> int:
    """1 where a larger number of a column is the better one, -1 of losses."""
    return -1 if column.metric.startswith("loss") else 1


def best_layer(result: ProbeResult, column: Column) -> int | None:
    """Index of the layer with the best score on validation, mean over seeds.

    Where there is one layer only, it is that one. None where there is nothing to choose by: the score is undefined on
    every layer of the validation split, there are no validation scores (runs of the version before), or folds have each
    chosen for themselves.
    """
    subset = find_subset(result, column)
    if subset is None or column.metric not in subset.metrics:
        return None
    if len(result.layers) == 1:
        return 0
    values = (result.validation or {}).get(tuple(column[:4]))
    if values is None:
        return None
    signed = torch.tensor([better(column) * value for value in values], dtype=torch.float64).nan_to_num(-math.inf)
    index = int(signed.argmax())
    return None if signed[index] == -math.inf else index


def objective(result: ProbeResult, column: Column, split: str) -> float | None:
    """What a sweeper may optimise: the validation score of the chosen layer; None where there is none.

    A run that scores the validation split itself (mode=eval eval.split=val) hands out that score. Of folds it is the mean
    over them, weighted by images.
    """
    if result.folds:
        values = [(objective(fold.result, column, split), len(fold.images)) for fold in result.folds]
        known = [(value, n) for value, n in values if value is not None]
        return sum(value * n for value, n in known) / sum(n for _, n in known) if known else None
    index = best_layer(result, column)
    if index is None:
        return None
    here = mean_over_seeds(_estimate(result, column), len(result.seeds)).value.tolist()
    values = here if split == "val" else (result.validation or {}).get(tuple(column[:4]))
    return None if values is None or math.isnan(values[index]) else values[index]


def chosen_estimate(result: ProbeResult, column: Column) -> tuple[int | str, Estimate] | None:
    """The layer chosen on validation and the score there of every seed, [S]; pooled from folds, each at its own layer.

    None where none is chosen or its score is undefined.
    """
    if result.folds:
        parts = [chosen_estimate(fold.result, column) for fold in result.folds]
        if None in parts:
            return None
        layers = [layer for layer, _ in parts]
        pooled = pooled_estimate([e for _, e in parts], [fold.images for fold in result.folds], len(result.keys))
        return (layers[0] if len(set(layers)) == 1 else " ".join(map(str, layers))), pooled
    index = best_layer(result, column)
    if index is None:
        return None
    at = Estimate(*(field.unflatten(0, (len(result.seeds), -1))[:, index] for field in _estimate(result, column)))  # [S]
    return None if bool(at.value.isnan().any()) else (result.layers[index], at)


def chosen(result: ProbeResult, column: Column, counts: Tensor) -> Chosen | None:
    """The score at the layer chosen on validation; None where none is chosen or its score is undefined."""
    found = chosen_estimate(result, column)
    if found is None:
        return None
    (layer, estimate), subset = found, find_subset(result, column)
    draws = _draws(estimate, subset, len(result.seeds), counts)[0]
    return Chosen(layer, _ends(float(estimate.value.mean()), draws, subset.bounds), draws)


def regret(result: ProbeResult, column: Column, counts: Tensor) -> Regret | None:
    """What the chosen layer lacks to the one that is best on the scored split: a maximum, taken inside every resample too."""
    here, sign = chosen(result, column, counts), better(column)
    if here is None:
        return None
    subset, estimate = find_subset(result, column), _estimate(result, column)
    value = sign * mean_over_seeds(estimate, len(result.seeds)).value  # [L]
    draws = sign * _draws(estimate, subset, len(result.seeds), counts)  # [L, n_boot]
    best = int(value.nan_to_num(-math.inf).argmax())
    highest = draws.nan_to_num(-math.inf).amax(0)  # [n_boot]
    score = _ends(sign * float(value[best]), sign * highest, subset.bounds)
    lacking = float(value[best]) - sign * here.score[0]
    return Regret(result.layers[best], score, _ends(lacking, highest - sign * here.draws, (0.0, math.inf)))


def gains(probe: ProbeResult, control: ProbeResult, column: Column, counts: Tensor) -> Gains | None:
    """What every layer of a probe has over a control at its chosen layer; None where either has no score there."""
    ours, theirs = chosen(probe, column, counts), chosen(control, column, counts)
    if ours is None or theirs is None:
        return None
    subset, estimate = find_subset(probe, column), _estimate(probe, column)
    span = subset.bounds[1] - subset.bounds[0]
    value = mean_over_seeds(estimate, len(probe.seeds)).value - theirs.score[0]  # [L]
    draws = _draws(estimate, subset, len(probe.seeds), counts) - theirs.draws  # [L, n_boot]
    low, high = percentiles(draws, (-span, span))
    p, paired = p_value(draws), ours.draws - theirs.draws
    at_chosen = _ends(ours.score[0] - theirs.score[0], paired, (-span, span))
    return Gains(theirs.layer, value, low, high, p, holm(p), at_chosen, float(p_value(paired[None])))


def write_choices(
    run: Run, results: Sequence[ProbeResult], columns: Sequence[Column], resampling: Resampling, split: str
) -> None:
    """Append the records of what was chosen and of all gains to metrics.jsonl."""
    for record in choice_records(results, columns, resampling, split):
        run.write(record)


def choice_records(
    results: Sequence[ProbeResult], columns: Sequence[Column], resampling: Resampling, split: str
) -> Iterator[dict[str, Any]]:
    """Per result with several layers and column a record "choice"; per control, layer of its probe and column a "gain"."""
    counts = resampling.counts(results[0])
    for result in results:
        for column in columns:
            common = {"name": result.name, "row": result.row, "control": result.control, "split": split, **_named(column)}
            here, cost = chosen(result, column, counts), regret(result, column, counts)
            if len(result.layers) > 1 and here is not None and cost is not None:
                yield {
                    "kind": "choice", **common, "layer": here.layer, "value": here.score[0], "interval": here.score[1:],
                    "validation": objective(result, column, "test"),
                    "best_layer": cost.layer, "best_value": cost.score[0], "best_interval": cost.score[1:],
                    "regret": cost.regret[0], "regret_interval": cost.regret[1:],
                }  # fmt: skip
    for probe, control in probe_and_controls(results):
        for column in columns:
            found = gains(probe, control, column, counts)
            if found is None:
                continue
            common = {"name": control.name, "row": control.row, "control": control.control, "split": split, **_named(column)}
            chosen_layer = best_layer(probe, column)
            for index, layer in enumerate(probe.layers):
                yield {
                    "kind": "gain", **common, "layer": layer, "layer_index": index, "over_layer": found.over,
                    "chosen": index == chosen_layer, "value": float(found.value[index]),
                    "interval": [float(found.low[index]), float(found.high[index])],
                    "p": float(found.p[index]), "p_holm": float(found.p_holm[index]),
                }  # fmt: skip
            if probe.folds and len(probe.layers) > 1:  # where every fold has a layer of its own
                yield {
                    "kind": "gain", **common, "layer": "chosen", "layer_index": len(probe.layers), "over_layer": found.over,
                    "chosen": True, "value": found.chosen[0], "interval": found.chosen[1:], "p": found.p_chosen,
                    "p_holm": found.p_chosen,
                }  # fmt: skip


def probe_and_controls(results: Sequence[ProbeResult]) -> list[tuple[ProbeResult, ProbeResult]]:
    """Every control with the probe of its row."""
    probes = {result.row: result for result in results if not result.control}
    return [(probes[result.row], result) for result in results if result.control and result.row in probes]


def read_validation(directory: Path, name: str) -> dict[tuple[str, str, str, str], list[float]] | None:
    """The validation scores of a finished run's probe or control, as `ProbeResult.validation`; None where it has none."""
    found: dict[tuple[str, str, str, str], dict[int, float]] = {}
    for record in read_records(directory / "metrics.jsonl"):
        if record.get("kind") == VALIDATION and record["name"] == name:
            for metric, value in record["metrics"].items():
                key = (record["question"], record["readout"], record["subset"], metric)
                found.setdefault(key, {})[record["layer_index"]] = math.nan if value is None else value
    return {key: [values[index] for index in sorted(values)] for key, values in found.items()} or None


def _named(column: Column) -> dict[str, str]:
    return dict(zip(("question", "readout", "subset", "metric"), column[:4], strict=True))


def _estimate(result: ProbeResult, column: Column) -> Estimate:
    return find_subset(result, column).metrics[column.metric]


def _draws(estimate: Estimate, subset: SubsetResult, n_seeds: int, counts: Tensor) -> Tensor:
    """The mean over seeds of fits [S * L] in every resample, [L, n_boot]; over seeds too where the subset says so."""
    if subset.over_seeds:
        return draws_over_seeds(estimate, n_seeds, counts)
    return draws_of(mean_over_seeds(estimate, n_seeds), counts)


def _ends(value: float, draws: Tensor, bounds: tuple[float, float]) -> Ends:
    low, high = percentiles(draws[None], bounds)
    return value, float(low), float(high)
