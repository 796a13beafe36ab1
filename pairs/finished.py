"""A finished run of pairs, read from its files: rows, table, curve, scores by image, and its probe for further tokens."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

import trainer
from activation import PatchSample, open_samples
from controls import PROBE_ROW
from errors import UserError
from machine import choose_device
from pairs.pair_form import PairForm, pair_forms
from pairs.task import ARITY, columns, task_maker
from probes import Probe, load_probe
from runs.adopt import complete, with_new_names
from runs.finished import check_fit, read_config
from runs.run import checkpoint_files
from runs.validity import refuse_other_layer, refuse_other_use, refuse_standardised
from show.records import Column
from show.text import format_table
from tasks import read_seeds

NUMBERS = ("value", "low", "high")


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The rows of layers.csv, numbers as numbers (None where undefined).

    Raises:
        UserError: the run has none.
    """
    path = directory / "layers.csv"
    if not path.is_file():
        raise UserError(f"{directory} has no layers.csv: it is no run of probes, or has not finished; look at its log.txt")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["layer_index"] = int(row["layer_index"])
        row["layer"] = int(row["layer"]) if row["layer"].lstrip("-").isdigit() else row["layer"]
        row |= {key: float(row[key]) if row[key] not in ("", "nan") else None for key in NUMBERS}
    return rows


def _shown(directory: Path, rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns of a run's table: those of its task; every AUROC for a task of another question."""
    cfg = read_config(directory)
    questions = list(dict.fromkeys(row["question"] for row in rows))
    if cfg.get("task") in ARITY:
        return columns(cfg.task, cfg.protocol.pairs.accuracy, questions)
    keys = dict.fromkeys((row["question"], row["readout"], row["subset"], row["metric"]) for row in rows)
    return [Column(*key, " ".join(key)) for key in keys]


def table_of(directory: Path) -> str:
    """Layers of the probe, then every other row at its best layer, from layers.csv."""
    rows = rows_of(directory)
    shown = _shown(directory, rows)
    at = {(row["name"], row["layer"], *(row[key] for key in Column._fields[:4])): row for row in rows}
    layers: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: row["layer_index"]):
        of_name = layers.setdefault(row["name"], [])
        of_name += [] if row["layer"] in of_name else [row["layer"]]

    def best(name: str, column: Column) -> str:
        scored = [(row["value"], layer) for layer in layers[name] if (row := at.get((name, layer, *column[:4])))]
        value, layer = max(((v, n) for v, n in scored if v is not None), key=lambda pair: pair[0], default=(None, None))
        where = f" @{layer}" if len(layers[name]) > 1 and value is not None else ""
        return _cell(at.get((name, layer, *column[:4]))) + where

    names = sorted(layers, key=lambda name: name != PROBE_ROW)
    body = []
    for name in names:
        if name == PROBE_ROW:
            body += [[str(layer), *(_cell(at.get((name, layer, *c[:4]))) for c in shown)] for layer in layers[name]]
        else:
            body.append([name, *(best(name, column) for column in shown)])
    return format_table(["layer", *(column.title for column in shown)], body)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "–"
    value, low, high = (f"{row[key]:.3f}".replace("0.", ".", 1) for key in NUMBERS)
    return f"{value} [{low}, {high}]"


def curve_of(directory: Path) -> Any:
    """The layer curve of a run, a new figure."""
    from pairs.layer_curve import draw_layer_curve  # here: nothing waits for matplotlib but the figure

    rows = rows_of(directory)
    return draw_layer_curve(rows, _shown(directory, rows))


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


def image_scores_of(directory: Path, split: str = "test") -> list[dict[str, Any]]:
    """The AUROC of the pairs of every image at every layer, mean over seeds: all pairs, and those inside the foreground.

    An image without two kinds of pairs has None. Tokens come from the cache, or are extracted again.

    Raises:
        UserError: as `open_trained`; a probe of another question than pairs of tokens.
    """
    fitted = open_trained(directory)
    if ARITY[fitted.cfg.task] != "pairwise":
        raise UserError(f"{directory} is a run of mode={fitted.cfg.mode}, scores by image are of mode=train; read its records")
    task = task_maker(fitted.cfg)(read_seeds(fitted.cfg.trainer.seeds))
    sample = open_samples(fitted.cfg, print, [split])[split]
    stack = trainer.load_stack(directory, PROBE_ROW, "best", task, sample)
    device, n_images = choose_device(fitted.cfg.device), int(fitted.cfg.trainer.batch_images)
    rows = []
    for probe in stack:
        probe.to(device).eval()
        at = [list(sample.tokens.layers).index(layer) for layer in probe.layers]
        for batch in task.batches(sample, n_images, None):
            with torch.no_grad():
                logits = task.logits(probe, batch.tokens(sample, at, device), batch).cpu()  # [S, L, B, T, T]
            rows += _image_rows(sample, batch, dict(zip(task.variants, logits.split(len(task.seeds)), strict=True)), probe)
    return rows


def _image_rows(sample: PatchSample, batch: Any, logits: Mapping[str, Tensor], probe: Probe) -> list[dict[str, Any]]:
    """One row per image and layer of a batch; the subset inside the foreground is scored by the fit that saw only it."""
    rows = []
    for number, image in enumerate(batch.images.tolist()):
        identity, valid = (batch.labels[name][number] for name in ("identity", "identity_valid"))  # [T]
        for index, layer in enumerate(probe.layers):
            row = {"image": sample.keys[image], "layer": layer}
            for subset, kept in (("all", valid), ("foreground", valid & (identity > 0))):
                of_fit = logits.get(subset, next(iter(logits.values())))[:, index, number]  # [S, T, T]
                row[f"{subset}_auroc"] = _auroc(of_fit[:, kept][:, :, kept], identity[kept])
            rows.append(row)
    return rows


def _auroc(logits: Tensor, identity: Tensor) -> float | None:
    """Mean over seeds of the AUROC of the pairs i < j, logits [S, T, T], identity [T]; ties count one half."""
    first, second = torch.triu_indices(len(identity), len(identity), 1)
    scores, same = logits[:, first, second].contiguous(), identity[first] == identity[second]
    positive, negative = scores[:, same].contiguous(), scores[:, ~same].sort(1).values.contiguous()
    if not positive.shape[1] or not negative.shape[1]:
        return None
    below = torch.searchsorted(negative, positive), torch.searchsorted(negative, positive, right=True)
    return float(sum(side.double() for side in below).mean() / (2 * negative.shape[1]))
