"""Runs of the dense evaluations as rows of a comparison: their records, the scores of every image, what must agree.

A column is an evaluation at one setting and its main metric; a control is a subject in the place of the backbone. These
evaluations choose no layer, so a score stands at the last layer that was read, which is said under the table. Rows may
differ in model and in how a read-out is fitted, never in what is scored and how (`METRIC`): then the field is named.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from errors import UserError
from files import unreadable
from show.comparison import (
    REMEDY,
    Cell,
    Files,
    Key,
    RunRow,
    check_scores,
    command_of,
    digest_of,
    flat,
    ground_of,
    in_order,
    open_files,
    unfinished,
)  # fmt: skip

MODES = ("dense_suite", "patch_class", "linear_seg", "overcluster", "dense_retrieval", "cbfe_cd")
SUBJECT = "backbone"  # the others are controls
SCORES = "scores.csv"
# Options of an evaluation that say what is scored and how; the others say how a read-out is fitted.
METRIC = (
    "absent", "background", "ignore", "mass", "published", "published_angles", "score_sizes", "selection", "size", "slide",
    "upsample", "void",
)  # fmt: skip
OF_ALL = ("background", "grid", "input_size", "reference_size", "train_split")  # the same of the section `dense`


def read_dense_run(directory: Path) -> list[RunRow]:
    """The row of a run of dense evaluations.

    Raises:
        UserError: a file is missing, damaged, or of another run than the others; the file and what to do are named.
    """
    files = open_files(directory, MODES)
    facts = {**files.facts, "identity": {**files.facts["identity"], "probe": ""}}  # the one configured was not asked
    if facts.get("status") != "finished":
        row = unfinished(directory, files.cfg, facts)
        return [row._replace(ground=in_order(row.ground | _metric(files.cfg)), settings=_settings(files.cfg))]
    check_scores(directory, facts, SCORES)
    images, influence = _read_influence(directory / SCORES)
    records = [r for r in files.records if r.get("kind") == "dense" and r.get("question") != "reference"]
    means = [r for r in records if r.get("seed") == "mean" and r["notes"].get("published", True)]
    curves: dict[Key, list[Cell]] = {}
    controls: dict[str, dict[Key, list[Cell]]] = {}
    for record in means:
        for metric, value in record["metrics"].items():
            key = _key(record["question"], record["subset"], metric)
            if key in influence:
                cells = curves if record["name"] == SUBJECT else controls.setdefault(record["name"], {})
                numbers = (float("nan") if x is None else float(x) for x in (value, *record["interval"][metric]))
                layer = "last" if record["layer"] is None else record["layer"]
                cells.setdefault(key, []).append(Cell(layer, *numbers))
    _check_layers(files, curves, influence)
    return [
        RunRow(
            directory, "", command_of(facts), facts["identity"], _ground(files, facts, images), _settings(files.cfg), curves,
            controls, {key: len(cells) - 1 for key, cells in curves.items()}, (), tuple(images),
            {key: torch.stack(list(of_layers.values())) for key, of_layers in influence.items() if key in curves},
            len(images), len({r.get("seed") for r in records} - {"mean", None}) or 1, _resamples(files.cfg),
            layer_rule="last layer that was read, none is chosen",
        )
    ]  # fmt: skip


def _key(evaluation: str, setting: str, metric: str) -> Key:
    return evaluation, "", f"{evaluation} {setting}".replace("_", " ").strip(), metric


def _read_influence(path: Path) -> tuple[list[str], dict[Key, dict[str, Tensor]]]:
    """Keys of the scored images, and how each bears on the backbone's main metrics: float64 [M] by column and layer.

    Raises:
        UserError: the file cannot be read, or its results are not all of the same images.
    """
    found: dict[Key, dict[str, list[tuple[str, float]]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                if line["subject"] == SUBJECT:
                    key = _key(line["evaluation"], line["setting"], line["metric"])
                    found.setdefault(key, {}).setdefault(line["layer"], []).append((line["image"], float(line["influence"])))
    except OSError as error:
        raise UserError(f"{unreadable(path, error)}; {REMEDY}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from error
    images = {tuple(image for image, _ in pairs) for of_layers in found.values() for pairs in of_layers.values()}
    if len(images) != 1:
        raise UserError(f"{path} holds results of {len(images)} sets of images, expected one; {REMEDY}")
    tensors = {
        key: {layer: torch.tensor([x for _, x in pairs], dtype=torch.float64) for layer, pairs in of_layers.items()}
        for key, of_layers in found.items()
    }
    return list(images.pop()), tensors


def _check_layers(files: Files, curves: Mapping[Key, Sequence[Cell]], influence: Mapping[Key, Mapping[str, Tensor]]) -> None:
    """Refuse records that are not of the results whose images are scored."""
    for key, of_layers in influence.items():
        variants = [r for r in files.records if _key(r.get("question", ""), r.get("subset", ""), key[3]) == key]
        if variants and not any(r["notes"].get("published", True) for r in variants):
            continue  # which no table shows
        layers = ["" if cell.layer == "last" else str(cell.layer) for cell in curves.get(key, ())]
        if layers != list(of_layers):
            raise UserError(
                f"{files.directory / 'metrics.jsonl'} has {len(layers)} records of {key[2]} {key[3]} for the {len(of_layers)} "
                f"results in {SCORES}; {REMEDY}"
            )


def _ground(files: Files, facts: Mapping[str, Any], images: Sequence[str]) -> dict[str, str]:
    n_boot, seed = _resamples(files.cfg)
    ground = ground_of(files.cfg, facts, str(files.cfg.dense.test_split), digest_of(images))
    return in_order(ground | _metric(files.cfg) | {"resamples": f"{n_boot} of seed {seed}"})


def _resamples(cfg: Any) -> tuple[int, int]:
    return int(cfg.trainer.n_boot), int(cfg.seed)


def _metric(cfg: Any) -> dict[str, str]:
    """What is scored and how, by dotted name."""
    plain: Any = OmegaConf.to_container(cfg)
    found = {f"metric.{key}": str(plain["dense"].get(key)) for key in OF_ALL}
    for name in plain["dense"]["evaluations"]:
        found |= {f"metric.{name}.{key}": str(plain[name][key]) for key in METRIC if key in (plain.get(name) or {})}
    return found


def _settings(cfg: Any) -> dict[str, str]:
    """Settings that may vary from row to row: the model, the seed, how the read-outs are fitted."""
    plain: Any = OmegaConf.to_container(cfg)
    settings = flat(plain["model"], "model") | {"seed": str(plain["seed"])}
    for name in plain["dense"]["evaluations"]:
        settings |= flat({key: value for key, value in (plain.get(name) or {}).items() if key not in METRIC}, name)
    return settings
