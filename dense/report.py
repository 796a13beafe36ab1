"""From results to what a reader sees: records, CSV files, the table; and results kept on disk, so that a kill costs one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dense.contract import Result, mean_over_seeds
from metrics.bootstrap import Estimate, draws_of, interval, percentiles
from runs.records import write_table
from runs.states import load_state, save_state
from show.text import format_table, interval_text

# Results by evaluation, then by subject: the backbone, or a control in its place.
Results = Mapping[str, Mapping[str, Sequence[Result]]]
BACKBONE = "backbone"
# Keys of a setting in the order a reader sees them, and the word before their value.
WORDS = {
    "n_clusters": "K", "step": "", "rule": "", "heads": "heads", "mass": "mass", "normalize": "", "lr": "lr",
    "weight_decay": "weight decay", "fraction": "fraction", "size": "at", "matching": "",
}  # fmt: skip
ENDINGS = {"still_falling": "↓", "worse_than_constant": "!"}  # notes on how fits ended, and their marks behind a score
MAIN = ("miou", "jaccard")  # the metric a table shows of a result: the first it has


def save_results(path: Path, results: Sequence[Result], made_from: Mapping[str, Any]) -> None:
    """Write results into one file, whole or not at all; `made_from` is checked when they are read."""
    tensors, settings = {}, []
    for number, result in enumerate(results):
        estimates = {**{f"metric/{name}": e for name, e in result.metrics.items()}}
        if result.classes is not None:
            estimates["classes"] = result.classes
        for name, estimate in estimates.items():  # an undefined score is kept as -1, files hold finite numbers only
            tensors[f"{number}/{name}/value"] = estimate.value.nan_to_num(-1.0)
            tensors[f"{number}/{name}/influence"] = estimate.influence
        if result.confusion is not None:
            tensors[f"{number}/confusion"] = result.confusion
        settings.append({"setting": result.setting, "notes": dict(result.notes), "metrics": list(result.metrics)})
    save_state(path, tensors, {"made_from": dict(made_from), "results": settings})


def load_results(path: Path, made_from: Mapping[str, Any]) -> list[Result]:
    """The results of a file that was made from the same.

    Raises:
        UserError: the file is damaged or of something else.
    """
    state = load_state(path, {"made_from": made_from})

    def estimate(prefix: str) -> Estimate | None:
        if f"{prefix}/value" not in state.tensors:
            return None
        value = state.tensors[f"{prefix}/value"]
        return Estimate(torch.where(value < 0, torch.nan, value), state.tensors[f"{prefix}/influence"])

    return [
        Result(
            entry["setting"],
            {name: estimate(f"{number}/metric/{name}") for name in entry["metrics"]},
            estimate(f"{number}/classes"),
            state.tensors.get(f"{number}/confusion"),
            entry["notes"],
        )
        for number, entry in enumerate(state.recipe["results"])
    ]


def records(
    evaluation: str, subject: str, results: Sequence[Result], split: str, classes: Sequence[str], counts: Tensor
) -> Iterator[dict[str, Any]]:
    """A record per result, and one per mean over seeds with 95 % intervals over images and the IoU of every class."""
    for result in results:
        common = _common(evaluation, subject, result, split)
        if "seed" in result.setting:
            yield {**common, "metrics": {name: float(e.value) for name, e in result.metrics.items()}}
    for result in mean_over_seeds(results):
        ends = {name: interval(e, counts) for name, e in result.metrics.items()}
        record = {
            **_common(evaluation, subject, result, split),
            "seed": "mean",
            "metrics": {name: float(e.value) for name, e in result.metrics.items()},
            "interval": {name: [float(low), float(high)] for name, (low, high) in ends.items()},
        }
        if result.classes is not None:
            names = classes[-len(result.classes.value) :]  # a read-out may leave the background out
            record["iou"] = dict(zip(names, result.classes.value.tolist(), strict=True))
        yield record


def _common(evaluation: str, subject: str, result: Result, split: str) -> dict[str, Any]:
    setting = result.setting
    return {
        "kind": "dense", "name": subject, "split": split, "question": evaluation, "layer": setting.get("layer"),
        "seed": setting.get("seed"), "subset": label(setting), "setting": setting, "notes": dict(result.notes),
        **{key: result.notes[key] for key in ENDINGS if key in result.notes},
    }  # fmt: skip


def label(setting: Mapping[str, Any]) -> str:
    """What tells a result from its siblings at other layers and seeds, in words; whatever order its keys were read in."""
    named = [f"{WORDS[key]} {setting[key]}".strip() for key in WORDS if key in setting]
    rest = [f"{key} {setting[key]}" for key in sorted(setting) if key not in (*WORDS, "layer", "seed")]
    return " ".join([*named, *rest]).replace("_", " ")


def main_metric(result: Result) -> str:
    """The metric a table shows."""
    return next(name for name in MAIN if name in result.metrics)


def curve_rows(results: Results, counts: Tensor) -> list[dict[str, Any]]:
    """A row per evaluation, subject, setting and metric: mean over seeds with its 95 % interval over images."""
    rows = []
    for evaluation, subjects in results.items():
        for subject, found in subjects.items():
            for result in mean_over_seeds(found):
                for metric, estimate in result.metrics.items():
                    low, high = interval(estimate, counts)
                    rows.append({
                        "evaluation": evaluation, "subject": subject, "layer": result.setting.get("layer", ""),
                        "setting": label(result.setting), "metric": metric, "value": float(estimate.value),
                        "low": float(low), "high": float(high), **{key: bool(result.notes.get(key)) for key in ENDINGS},
                    })  # fmt: skip
    return rows


def class_rows(results: Results, classes: Sequence[str], counts: Tensor) -> list[dict[str, Any]]:
    """A row per evaluation, subject, setting and class: its IoU, mean over seeds, with its interval."""
    rows = []
    for evaluation, subjects in results.items():
        for subject, found in subjects.items():
            for result in mean_over_seeds(found):
                if result.classes is None:
                    continue
                low, high = interval(result.classes, counts)
                values = zip(classes[-len(low) :], result.classes.value, low, high, strict=True)
                for name, value, a, b in values:
                    rows.append({
                        "evaluation": evaluation, "subject": subject, "layer": result.setting.get("layer", ""),
                        "setting": label(result.setting), "class": name, "iou": float(value), "low": float(a), "high": float(b),
                    })  # fmt: skip
    return rows


def write_rows(directory: Path, results: Results, classes: Sequence[str], counts: Tensor) -> list[dict[str, Any]]:
    """dense.csv (every metric) and classes.csv (every class); the rows of the first."""
    rows, of_classes = curve_rows(results, counts), class_rows(results, classes, counts)
    write_table(directory / "dense.csv", rows)
    if of_classes:
        write_table(directory / "classes.csv", of_classes)
    return rows


def write_image_scores(directory: Path, results: Results, keys: Sequence[str]) -> None:
    """scores.csv: how every image bears on the main metric of each result, mean over seeds (all metrics: checkpoints/dense)."""
    rows = []
    for evaluation, subjects in results.items():
        for subject, found in subjects.items():
            for result in mean_over_seeds(found):
                metric = main_metric(result)
                common = {"evaluation": evaluation, "subject": subject, "layer": result.setting.get("layer", ""),
                          "setting": label(result.setting), "metric": metric}  # fmt: skip
                influence = result.metrics[metric].influence.flatten().tolist()
                rows += [{**common, "image": key, "influence": f"{x:.9g}"} for key, x in zip(keys, influence, strict=True)]
    write_table(directory / "scores.csv", rows)


def table(results: Results, counts: Tensor, references: Sequence[Result]) -> str:
    """A row per evaluation, setting and layer; the backbone, its controls, and what it has over the best of them.

    A control of one layer of its own (pixels, position) stands in every row. The gain is paired over images, and which control
    is the best is asked again in every resample.
    """
    controls = list(dict.fromkeys(name for subjects in results.values() for name in subjects if name != BACKBONE))
    header = ["evaluation", "layer", BACKBONE, *controls, "gain over the best"]
    body = []
    for evaluation, subjects in results.items():
        beside = {name: mean_over_seeds(subjects.get(name, [])) for name in controls}
        for result in mean_over_seeds(subjects[BACKBONE]):
            if not result.notes.get("published", True):
                continue
            metric, layer = main_metric(result), result.setting.get("layer", "")
            ours = result.metrics[metric]
            others = {name: _counterpart(result, beside[name]) for name in controls}
            theirs = {name: (other, None if other is None else other.metrics[metric]) for name, other in others.items()}
            known = [e for _, e in theirs.values() if e is not None and not bool(e.value.isnan())]
            gain = gain_over_best(ours, known, counts) if known else "–"
            cells = ["–" if e is None else number(e, counts) + marks(other) for other, e in theirs.values()]
            name = f"{evaluation} {label(result.setting)}".replace("_", " ").strip()
            name += "" if metric == "miou" else f" ({metric})"
            body.append([name, str(layer), number(ours, counts) + marks(result), *cells, gain])
    lines = [format_table(header, body)]
    for result in references:
        lines.append(f"{label(result.setting)}: mIoU {number(result.metrics['miou'], counts)}")
    return "\n".join([*lines, *sentences(results)])


def marks(result: Result) -> str:
    """What stands behind a score whose fits did not end well."""
    found = "".join(mark for key, mark in ENDINGS.items() if result.notes.get(key))
    return f" {found}" if found else ""


def sentences(results: Results) -> list[str]:
    """One sentence per kind of bad ending, with the fits it concerns and what to do; none where every fit ended well."""
    places: dict[str, list[str]] = {key: [] for key in ENDINGS}
    needed: dict[str, int] = {}  # by evaluation
    for evaluation, subjects in results.items():
        for subject, result in ((subject, result) for subject, found in subjects.items() for result in found):
            for key in ENDINGS:
                where = f"{evaluation} of {subject} (layer {result.setting.get('layer')})"
                if result.notes.get(key) and where not in places[key]:
                    places[key].append(where)
            if result.notes.get("still_falling"):
                most = result.notes["epochs_needed"] or 4 * result.notes["epochs"]
                needed[evaluation] = max(most, needed.get(evaluation, 0))
    lines, options = [], ", ".join(f"{evaluation}.epochs={most}" for evaluation, most in needed.items())
    if places["still_falling"]:
        where = ", ".join(places["still_falling"])
        lines.append(f"↓ the loss on the images kept apart was still falling when the fit ended: {where}; try {options}")
    if places["worse_than_constant"]:
        where = ", ".join(places["worse_than_constant"])
        lines.append(f"! worse than a constant answer on the images kept apart: {where}; lower the learning rates (lrs)")
    return lines


def gain_over_best(ours: Estimate, theirs: Sequence[Estimate], counts: Tensor) -> str:
    """A score minus the best of several, paired over images; the interval takes that maximum inside every resample."""
    value = float(ours.value) - max(float(e.value) for e in theirs)
    if value != value:
        return "–"
    best = torch.cat([draws_of(e, counts) for e in theirs]).amax(0)  # [n_boot]
    low, high = percentiles(draws_of(ours, counts) - best, (-1.0, 1.0))
    return interval_text(value, float(low), float(high), "+")


def _counterpart(result: Result, others: Sequence[Result]) -> Result | None:
    """The result of a control at the same setting, at the same layer where the control has it."""
    rest = lambda setting: {k: v for k, v in setting.items() if k != "layer"}
    same = [other for other in others if rest(other.setting) == rest(result.setting)]
    here = [other for other in same if other.setting.get("layer") == result.setting.get("layer")] or same
    return here[0] if here else None


def number(estimate: Estimate, counts: Tensor) -> str:
    """A score with its 95 % interval over images; a dash where it is undefined."""
    low, high = interval(estimate, counts)
    return interval_text(float(estimate.value), float(low), float(high))
