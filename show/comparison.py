"""Finished runs side by side: what their records say, whether they may share a column, and how far they are apart.

    read_run      the rows of one run directory, checked against each other: records, run.json, config.yaml, scores.safetensors
                  (of the dense evaluations: `show.dense_rows`)
    same_ground   refuses runs that do not measure the same thing, by the field that differs
    labels_of     what tells runs apart in a table: model, probe, and every other setting that varies
    apart         the difference of two runs at their chosen layers, paired over images

Nothing is computed again but differences, and these from the influences of the images that a run keeps.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor

from errors import UserError
from metrics.bootstrap import Estimate, difference, draws_of, p_value, percentiles, resample
from runs.finished import read_config, read_facts
from runs.records import read_lines
from show.per_image import read_scores

Key = tuple[str, str, str, str]  # question, readout, subset, metric of a column
MEASURES = ("train", "train_class", "train_identity", "train_binding", "eval")  # the modes whose runs hold scores by layer
IDENTITY = ("mode", "task", "protocol", "model", "dataset", "probe")
NOT_DATA = ("root", "allow", "on_error")  # of the section dataset: where it lies and what to do, not what it is
# Fields that may differ between tables but never inside one; `report.by` names those that get a table each.
FIELDS = ("task", "dataset", "protocol", "split", "windows", "metric", "resamples", "images")
ROW_SECTIONS = ("model", "probe", "trainer", "binding", "seed")  # whose settings may vary from row to row
UNFINISHED, FAILED = "unfinished", "failed"
REMEDY = "leave this run out, or repeat its command"


class Cell(NamedTuple):
    """A score at a layer, mean over seeds, with the ends of its 95 % interval (nan where undefined)."""

    layer: int | str
    value: float
    low: float
    high: float


class RunRow(NamedTuple):
    """One row of a run (a run of binding information has several), as its files tell it.

    ground: what must agree inside a table, by dotted name, in the order of FIELDS. settings: of the row, by dotted name.
    curves: the probe by column, a cell per layer. controls: the same by control. chosen: position of the layer chosen on
    validation, by column. flags: what is doubtful. images: keys of the scored images. influence: float64 [L, M] by column.
    layer_rule: how the layer of a score is chosen.
    """

    directory: Path
    name: str
    command: str
    identity: dict[str, str]
    ground: dict[str, str]
    settings: dict[str, str]
    curves: dict[Key, list[Cell]]
    controls: dict[str, dict[Key, list[Cell]]]
    chosen: dict[Key, int]
    flags: tuple[str, ...]
    images: tuple[str, ...]
    influence: dict[Key, Tensor]
    n_images: int
    n_seeds: int
    resamples: tuple[int, int]
    layer_rule: str = "layer chosen on validation"

    def cell(self, key: Key) -> Cell | None:
        """The score at the layer chosen on validation; None where there is none."""
        at = self.chosen.get(key)
        return None if at is None or key not in self.curves else self.curves[key][at]


class Difference(NamedTuple):
    """A run minus another at their chosen layers: value, ends of its interval, two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


class Files(NamedTuple):
    """What every run directory holds: configuration, run.json, records, checked against each other."""

    directory: Path
    cfg: Any
    facts: dict[str, Any]
    records: list[dict[str, Any]]


def open_files(directory: Path, modes: Sequence[str]) -> Files:
    """Configuration, run.json and records of a run.

    Raises:
        UserError: a file is missing, damaged, or of another run than the others, or the run is of none of these modes.
    """
    cfg, facts = read_config(directory), read_facts(directory)
    identity = facts.get("identity")
    if not isinstance(identity, dict) or not isinstance(facts.get("command"), list):
        raise UserError(f"{directory / 'run.json'} is missing or lacks identity or command; {REMEDY}")
    if identity.get("mode") not in modes:
        raise UserError(f"{directory} is a run of mode={identity.get('mode')}; runs= takes those of {', '.join(modes)}")
    stored = facts.get("config_sha256")
    if stored is not None and stored != hashlib.sha256((directory / "config.yaml").read_bytes()).hexdigest():
        raise UserError(f"{directory / 'config.yaml'} is not the one this run was made with; {REMEDY}")
    lines = read_lines(directory / "metrics.jsonl")
    if lines.damaged:
        raise UserError(f"{lines.damaged[0]}; a table is made of whole records only: {REMEDY}")
    same = [key for key in IDENTITY if key != "probe" or identity.get("task") != "binding"]  # a ladder names a probe per row
    for record in lines.records:
        if wrong := next((key for key in same if key in record and record[key] != identity.get(key)), None):
            raise UserError(
                f"{directory / 'metrics.jsonl'} holds a record of {wrong} {record[wrong]} and run.json says "
                f"{identity.get(wrong)}; {REMEDY}"
            )
    return Files(directory, cfg, facts, lines.records)


def check_scores(directory: Path, facts: Mapping[str, Any], name: str) -> None:
    """Refuse scores of the images that are not those run.json names by their checksum."""
    path = directory / name
    if not path.is_file():
        raise UserError(f"{path} is not there; {REMEDY}")
    if (facts.get("sha256") or {}).get(name) != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(f"{path} is not the file that run.json names by its checksum; {REMEDY}")


def read_run(directory: Path) -> list[RunRow]:
    """The rows of a run directory.

    Raises:
        UserError: a file is missing, damaged, or of another run than the others; the file and what to do are named.
    """
    _, cfg, facts, records = open_files(directory, MEASURES)
    if facts.get("status") != "finished":
        return [unfinished(directory, cfg, facts)]
    state = read_scores(directory)
    check_scores(directory, facts, "scores.safetensors")
    scores = [r for r in records if r.get("kind") == "score" and r.get("seed") == "mean"]
    scores = [r for r in scores if not r["split"].startswith("fold-")]  # pooled: folds have records of their own
    rows = []
    for name in dict.fromkeys(entry["row"] for entry in state.recipe["results"] if not entry["control"]):
        rows.append(_row(directory, cfg, facts, name, scores, records, state))
    return rows


def unfinished(directory: Path, cfg: Any, facts: Mapping[str, Any]) -> RunRow:
    """A run without results, so that a table shows that it is missing."""
    flag = FAILED if facts.get("status") == "failed" else UNFINISHED
    return RunRow(
        directory, "", command_of(facts), facts["identity"], ground_of(cfg, facts, "", ""), _settings(cfg), {}, {}, {}, (flag,),
        (), {}, 0, 0, (0, 0),
    )  # fmt: skip


def _row(
    directory: Path, cfg: Any, facts: Mapping[str, Any], name: str, scores: Sequence[dict], records: Sequence[dict], state: Any
) -> RunRow:
    """The row of a finished run, its curves from the records, its influences from the scores of every image."""
    recipe, remedy = state.recipe, REMEDY
    entries = [entry for entry in recipe["results"] if entry["row"] == name and not entry["control"]]
    keys = [(e["question"], e["readout"], e["subset"], metric) for e in entries for metric in e["metrics"]]
    curves: dict[Key, list[Cell]] = {}
    controls: dict[str, dict[Key, list[Cell]]] = {}
    flags: dict[str, None] = {}
    n_images, identity = 0, facts["identity"]
    for record in scores:
        if record["row"] != name:
            continue
        for metric, value in record["metrics"].items():
            key = (record["question"], record["readout"], record["subset"], metric)
            if key in keys:
                low, high = record["interval"][metric]
                cells = controls.setdefault(record["control"], {}) if record["control"] else curves
                cells.setdefault(key, []).append(Cell(record["layer"], *map(_number, (value, low, high))))
        if not record["control"]:
            flags |= dict.fromkeys(record.get("flags", ()))
            n_images, identity = max(n_images, record["n_images"]), {**identity, "probe": record["probe"]}
    layers = entries[0]["layers"]
    for key in keys:
        if [cell.layer for cell in curves.get(key, ())] != layers:
            raise UserError(
                f"{directory / 'metrics.jsonl'} has {len(curves.get(key, ()))} records of {key[2]} {key[3]} for the "
                f"{len(layers)} layers of {name}; {remedy}"
            )
    chosen = {key: 0 for key in keys} if len(layers) == 1 else {}
    for record in records:
        if record.get("kind") == "choice" and record["row"] == name and not record["control"]:
            key = (record["question"], record["readout"], record["subset"], record["metric"])
            if record["layer"] not in layers:
                if cfg.trainer.get("folds", 1) > 1:  # every fold chose a layer of its own
                    flags["every fold chose a layer of its own"] = None
                    continue
                raise UserError(f"{directory / 'metrics.jsonl'} chose layer {record['layer']}, none of the run's; {remedy}")
            chosen[key] = layers.index(record["layer"])
    influence = {}
    for entry in entries:
        for metric in entry["metrics"]:
            key = (entry["question"], entry["readout"], entry["subset"], metric)
            tensor = state.tensors["/".join((entry["name"], *key[:3], "influence", metric))]
            influence[key] = tensor.mean(0) if tensor.ndim == 3 else tensor  # [L, M]
    ground = ground_of(cfg, facts, recipe["split"], digest_of(recipe["images"]))
    ground["resamples"] = f"{recipe['n_boot']} of seed {recipe['seed']}"
    return RunRow(
        directory, name, command_of(facts), identity, in_order(ground),
        _settings(cfg), curves, controls, chosen, tuple(flags), tuple(recipe["images"]), influence, n_images,
        len(entries[0]["seeds"]), (recipe["n_boot"], recipe["seed"]),
    )  # fmt: skip


def command_of(facts: Mapping[str, Any]) -> str:
    """The command of a run as it was typed."""
    return "python main.py " + shlex.join(map(str, facts["command"][1:]))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def digest_of(keys: Sequence[str]) -> str:
    """What tells these images in this order from all others."""
    return hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()[:12]


def in_order(ground: Mapping[str, str]) -> dict[str, str]:
    """The ground with its fields as FIELDS has them."""
    return {key: ground[key] for key in sorted(ground, key=lambda key: (FIELDS.index(key.partition(".")[0]), key))}


def flat(section: Any, prefix: str) -> dict[str, str]:
    """A section of a configuration as dotted names and values."""
    if not isinstance(section, Mapping):
        return {prefix: str(section)}
    pairs: dict[str, str] = {}
    for key, value in section.items():
        pairs |= flat(value, f"{prefix}.{key}")
    return pairs


def ground_of(cfg: Any, facts: Mapping[str, Any], split: str, images: str) -> dict[str, str]:
    """What must agree between the runs of one table."""
    plain: Any = OmegaConf.to_container(cfg)
    protocol = {key: value for key, value in plain["protocol"].items() if key not in ("geometry", "name")}
    dataset = {key: value for key, value in plain["dataset"].items() if key not in NOT_DATA}
    windows = {"geometry": plain["protocol"].get("geometry"), "image_size": plain["model"].get("image_size")}
    ground = {"task": str(facts["identity"].get("task") or cfg.mode), "split": split, "images": images}
    return ground | flat(protocol, "protocol") | flat(dataset, "dataset") | flat(windows, "windows") | {
        "protocol.name": str(plain["protocol"].get("name")), "dataset.name": str(facts["identity"].get("dataset")),
    }  # fmt: skip


def _settings(cfg: Any) -> dict[str, str]:
    """Settings that may vary from row to row."""
    plain: Any = OmegaConf.to_container(cfg)
    settings: dict[str, str] = {}
    for section in ROW_SECTIONS:
        if section in plain:
            settings |= flat(plain[section], section)
    return settings


def same_ground(rows: Sequence[RunRow], by: Iterable[str]) -> list[list[RunRow]]:
    """The rows in groups that may share a column: one per value of the fields named in `by`.

    Raises:
        UserError: two runs of a group differ in another field; it and both values are named.
    """
    by = list(by)
    if unknown := [field for field in by if field not in FIELDS]:
        raise UserError(f"report.by={unknown[0]} is no field that can have tables of its own; valid: {', '.join(FIELDS)}")
    splitting = {*by, *({"images", "windows"} if {"dataset", "protocol", "split", "windows"} & set(by) else set())}
    groups: dict[tuple, list[RunRow]] = {}
    for row in rows:
        groups.setdefault(tuple((k, v) for k, v in row.ground.items() if k.partition(".")[0] in splitting), []).append(row)
    for group in groups.values():
        finished = [row for row in group if row.curves]
        for row in finished[1:]:
            first = finished[0]
            for key in dict.fromkeys([*first.ground, *row.ground]):
                mine, other = first.ground.get(key, "not set"), row.ground.get(key, "not set")
                lacking = key not in first.ground or key not in row.ground
                if lacking and key.startswith("metric."):  # an evaluation that one of them has not: no column of it is shared
                    continue
                if mine != other:
                    fields = ",".join([*by, key.partition(".")[0]])
                    raise UserError(
                        f"{first.directory} and {row.directory} may not share a table: {key} is {mine} in the first and "
                        f"{other} in the second; set report.by=[{fields}] for a table each, or name the runs with runs=[…]"
                    )
    return list(groups.values())


def labels_of(rows: Sequence[RunRow]) -> list[str]:
    """A label per row: model, probe and row of the run, then every setting in which rows of one label still differ."""
    labels = []
    several = len({row.name for row in rows if row.name}) > 1
    for row in rows:
        name = row.name.replace("_", " ") if several else ""
        probe = "" if several and row.identity["probe"] in row.name else row.identity["probe"]
        parts = [row.identity["model"], probe, name]
        labels.append(" · ".join(filter(None, parts)))
    for _ in range(2):  # what the model's or the probe's name says already is not repeated
        for label in [label for label in dict.fromkeys(labels) if labels.count(label) > 1]:
            same = [i for i, other in enumerate(labels) if other == label]
            keys = dict.fromkeys(key for i in same for key in rows[i].settings)
            values = {key: [rows[i].settings.get(key, "not set") for i in same] for key in keys}
            varying = [key for key, found in values.items() if len(set(found)) > 1]
            for i in same:
                labels[i] = " · ".join([label, *(f"{key}={rows[i].settings.get(key, 'not set')}" for key in varying)])
    counts: dict[str, int] = {}
    unique = []
    for label in labels:  # equal settings, another code or another day
        counts[label] = counts.get(label, 0) + 1
        unique.append(label if counts[label] == 1 else f"{label} ({counts[label]})")
    return unique


def columns_of(rows: Sequence[RunRow]) -> list[Key]:
    """The columns that every finished row has, in the order of the first; those with a chosen layer, where there are any."""
    finished = [row for row in rows if row.curves]
    shared = [key for key in finished[0].curves if all(key in row.curves for row in finished)] if finished else []
    return [key for key in shared if any(key in row.chosen for row in finished)] or shared


def apart(row: RunRow, reference: RunRow, key: Key) -> Difference | None:
    """A row minus the reference at the layer each chose on validation, over the same resamples of the same images."""
    ours, theirs = row.chosen.get(key), reference.chosen.get(key)
    if ours is None or theirs is None or row.images != reference.images or row.resamples != reference.resamples:
        return None
    estimates = []
    for of_row, at in ((row, ours), (reference, theirs)):
        value = torch.tensor([of_row.curves[key][at].value], dtype=torch.float64)
        estimates.append(Estimate(value, of_row.influence[key][at : at + 1].double()))
    found = difference(*estimates)
    draws = draws_of(found, resample(len(row.images), *row.resamples))  # [1, n_boot]
    low, high = percentiles(draws, (-float("inf"), float("inf")))
    return Difference(float(found.value), float(low), float(high), float(p_value(draws)))
