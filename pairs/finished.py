"""A finished run, read from its files: rows, table, curve, scores by image, and its probe for further tokens."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from controls import PROBE_ROW
from errors import UserError
from pairs.pair_form import PairForm, pair_forms
from pairs.task import ARITY, columns
from probes import Probe, load_probe
from runs.adopt import complete, with_new_names
from runs.conclusion import TABLE
from runs.finished import check_fit, read_config
from runs.run import checkpoint_files
from runs.validity import refuse_other_layer, refuse_other_use, refuse_standardised
from show.records import ENDINGS, Column

NO_PROBES = "it is no run of probes, is unfinished or of an earlier version; look at its log.txt, or repeat its command"
NUMBERS = {"value", "low", "high", "p", "p_holm", "auroc", "influence", "n_pairs", "n_positive", "n"}


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The rows of layers.csv, numbers as numbers (None where undefined).

    Raises:
        UserError: the run has none.
    """
    rows = _read_csv(directory / "layers.csv")
    for row in rows:
        row["layer_index"] = int(row["layer_index"])
        row |= {"kind": row.get("kind", "score"), "chosen": row.get("chosen") == "1"}  # runs of before have neither
        row |= {ending: row.get(ending) == "True" for ending in ENDINGS}
    return rows


def image_scores_of(directory: Path) -> list[dict[str, Any]]:
    """The rows of scores.csv: AUROC and influence of every scored image, by layer and subset.

    Raises:
        UserError: the run has none.
    """
    return _read_csv(directory / "scores.csv")


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of a run: numbers as numbers, an empty field as None."""
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: {NO_PROBES}")
    with open(path, newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row["layer"] = int(row["layer"]) if row["layer"].lstrip("-").isdigit() else row["layer"]
        for key in NUMBERS & row.keys():
            row[key] = None if row[key] in ("", "nan") else float(row[key])
    return rows


def _shown(directory: Path, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of a run's table: those of its task; every score that was chosen by, for a task of another question."""
    cfg = read_config(directory)
    questions = list(dict.fromkeys(row["question"] for row in rows))
    if cfg.get("task") in ARITY:
        return columns(cfg.task, cfg.protocol.pairs.accuracy, questions)
    listed = [row for row in rows if row["chosen"]] or rows
    keys = dict.fromkeys(tuple(row[key] for key in Column._fields[:4]) for row in listed)
    return [Column(*key, " ".join(key)) for key in keys]


def table_of(directory: Path) -> str:
    """The text a run ended with.

    Raises:
        UserError: there is none.
    """
    path = directory / TABLE
    if not path.is_file():
        raise UserError(f"{directory} has no {TABLE}: {NO_PROBES}")
    return path.read_text(encoding="utf-8").rstrip("\n")


def curve_of(directory: Path) -> Any:
    """The layer curve of a run, a new figure."""
    from pairs.layer_curve import draw_layer_curve  # here: nothing waits for matplotlib but the figure

    rows = rows_of(directory)
    return draw_layer_curve([row for row in rows if row["kind"] == "score"], _shown(directory, rows))


class TrainedProbe(NamedTuple):
    """The best probes of a run (the chunks of one stack), to be asked about further tokens.

    made_by: what the tokens must have been made with (`activation.made_by`); anything else is refused.
    """

    directory: Path
    cfg: DictConfig
    probes: list[Probe]

    @property
    def layers(self) -> list[int | str]:
        """Layers of all chunks, in order."""
        return [layer for probe in self.probes for layer in probe.layers]

    @property
    def made_by(self) -> dict[str, Any]:
        """What it states of the activations it was fitted on."""
        return dict(self.probes[0].facts.get("made_by") or {})

    def form(self, layer: int | str, pairs: str = "all") -> PairForm:
        """The formula at a layer, of the fits that saw these pairs.

        Raises:
            UserError: no such layer, or no fit of such pairs.
        """
        index = refuse_other_layer(self.directory, self.layers, layer)
        variants = list(self.cfg.protocol.pairs.fit) if self.probes[0].arity == "pairwise" else ["all"]
        if pairs not in variants:
            raise UserError(f"{self.directory} has no fit of pairs {pairs!r}, only of {', '.join(variants)}; name one of these")
        forms = []
        for probe in self.probes:
            n_seeds = len(probe.seeds) // len(variants)
            start = variants.index(pairs) * n_seeds
            forms += pair_forms(probe, slice(start, start + n_seeds))
        return forms[index]

    def scores(self, tokens: Tensor, *, layer: int | str, made_by: Mapping[str, Any], pairs: str = "all") -> Tensor:
        """What the probe answers about every pair of tokens of one image: P(same object), mean over seeds, [N, N] float32.

        Args:
            tokens: [N, D] as the model gives them; the probe standardises them itself.
            layer: they are of. made_by: what they were made with.

        Raises:
            UserError: they were made in another way than those the probe was fitted on.
        """
        form = self.form(layer, pairs)
        refuse_other_use(self.directory, self.made_by, made_by)
        dim = self.probes[0].dim
        if tokens.ndim != 2 or tokens.shape[1] != dim or not tokens.is_floating_point():
            raise UserError(
                f"{self.directory} reads tokens [N, {dim}] of floating point, got {list(tokens.shape)} {tokens.dtype}"
            )
        tokens = tokens.detach().float().cpu()
        if form.scale is not None and len(tokens) > 1:
            fitted = float((form.shift / form.scale).abs().mean()), float((1 / form.scale).mean())
            here = float(tokens.mean(0).abs().mean()), float(tokens.std(0).mean())
            refuse_standardised(self.directory, fitted, here)
        with torch.no_grad():
            return form.scores(tokens, tokens)


def open_trained(directory: Path) -> TrainedProbe:
    """The probe of a finished run.

    Raises:
        UserError: it is no run of pairs, has no checkpoint, or a file of it is damaged or of another fit.
    """
    cfg = complete(with_new_names(read_config(directory)), directory / "config.yaml")
    if cfg.get("task") not in ARITY:
        raise UserError(f"{directory} is a run of mode={cfg.mode}, which fits no probe of pairs; name one of mode=train…")
    files = checkpoint_files(directory, PROBE_ROW, "best")
    probes = [load_probe(file).eval() for file in files]
    for file, probe in zip(files, probes, strict=True):
        check_fit(file, probe.facts, directory, PROBE_ROW)
        probe.matmul_dtype = "float32"
    return TrainedProbe(directory, cfg, probes)
