"""mode=train_binding: how many bits of "which features belong together" are in a frozen representation Z.

A scene's object code Y says which conjunctions are present, its feature code F which features; F is a function of Y. Two
probes read them bit by bit, each bit after the true bits before it; their cross-entropies on the test split, in bits per
image, bound what Z leaves open: L_Y >= H(Y|Z), L_F >= H(F|Z). What follows from them is in `information.py`.

`Code` is the task: one of the codes read from an image's tokens. `run` fits it once for Y and once for F (and, with
`binding.conditional=true`, for Y given F) and puts the results together.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn import functional as F

import trainer
from activation import Labelled, PatchSample, fingerprints, open_planned, open_samples, plan_samples
from binding.examples import decoded_examples
from binding.information import bits_per_image, combine, suspicions
from binding.probes import BINDING_PROBES
from binding.settings import check_settings, feature_settings, is_reuse
from binding.tables import RATIO, information_table, split_table
from controls import PROBE_ROW, Opened, Subject, build_controls
from datasets.splits import split_report
from errors import UserError
from files import write_atomically
from machine import free_memory
from metrics.bootstrap import mean_estimate
from probes import Probe, build_probe
from runs.conclusion import concluded
from runs.progress import stage, stages
from runs.run import Run
from show.choice import best_layer, read_validation
from show.per_image import Predictions
from show.records import Column, Resampling, write_records
from show.tables import present
from tasks import Batch, Collector, ProbeResult, SubsetResult, Task, check_rank, check_stack, mean_scores, read_seeds

LADDER = "ladder"
LABELS = {"Y": ("object_code",), "F": ("feature_code",), "Y_given_F": ("feature_code", "object_code")}
NAME = re.compile(r"[\w=+-][\w .=+-]*")  # of a row of the ladder
CONTROLS = ("pixels", "random", "blind")  # those that mean something for whole images
COLUMNS = [RATIO] + [
    Column("binding", "", "images", metric, title)
    for metric, title in (
        ("binding_information", "binding information, bits"),
        ("information_Y", "I(Y;Z), bits"),
        ("information_F", "I(F;Z), bits"),
        ("loss_Y", "L_Y, bits"),
        ("loss_F", "L_F, bits"),
    )
]


class Code(Task):
    """One code read from an image's tokens: "Y", "F", or "Y_given_F", where all of F comes before the bits of Y."""

    probes = BINDING_PROBES

    def __init__(self, seeds: Sequence[int], name: str) -> None:
        super().__init__(seeds)
        self.name, self.labels = name, LABELS[name]

    def settings(self, probe_cfg: Mapping) -> dict[str, Any]:
        """The probe's settings: `probe` for Y, changed by what `probe.F` sets for the others."""
        plain = OmegaConf.to_container(probe_cfg, resolve=True) if isinstance(probe_cfg, DictConfig) else dict(probe_cfg)
        changes = plain.pop("F")
        if self.name == "F" or (self.name == "Y_given_F" and is_reuse(plain["mode"])):
            plain |= feature_settings(plain, changes)
        return plain

    def n_bits(self, sample: PatchSample) -> int:
        """Bits a probe of this code takes in or reads of an image."""
        return sum(sample.labels[label].shape[1] for label in self.labels)

    def build_probe(self, probe_cfg: Mapping[str, Any], sample: PatchSample, layers: Sequence) -> Probe:
        """A stack of probes with one output per bit."""
        known: dict[str, Any] = {"n_bits": self.n_bits(sample), "n_tokens": sample.tokens.shape[2]}
        if self.name == "Y":
            known["groups"] = [len(group) for group in sample.meta["classes"]]
        axes = {"seeds": self.seeds, "layers": list(layers), "dim": sample.tokens.shape[-1]}
        return build_probe(self.settings(probe_cfg), **axes, table=self.probes, **known)

    def code(self, batch: Batch) -> Tensor:
        """The bits [B, K] in the order they are read, 0.0 and 1.0."""
        return torch.cat([batch.labels[label] for label in self.labels], 1).float()

    def logits(self, probe: Probe, x: Tensor, batch: Batch) -> Tensor:
        """Log-odds [S, L, B, K] of the bits that are read, each after the true bits before it."""
        code = self.code(batch)
        return probe(x, code)[..., code.shape[1] - batch.labels[self.labels[-1]].shape[1] :]

    def loss(self, probe: Probe, x: Tensor, batch: Batch, running: Tensor | None = None) -> Tensor:
        """Binary cross-entropy [S, L] in nats, mean over images and bits, as published."""
        logits = self.logits(probe, x, batch)  # [S, L, B, K]
        code = batch.labels[self.labels[-1]].to(logits.dtype)
        return (F.softplus(logits) - code * logits).mean((-2, -1))

    def constant(self, train: PatchSample) -> Tensor:
        """Log-odds of every bit, [S, K]; half a case is added on both sides."""
        code = train.labels[self.labels[-1]].double()  # [M, K]
        odds = (code.sum(0) + 0.5) / ((1 - code).sum(0) + 0.5)
        before = self.n_bits(train) - code.shape[1]  # bits that are given, not read
        return F.pad(odds.log().float(), (before, 0)).expand(len(self.seeds), -1)

    def collector(self, sample: PatchSample, n_layers: int, detail: bool = True) -> Collector:
        """Collects bits and right answers per image."""
        return CodeCollector(self.labels[-1])


class CodeCollector:
    """Cross-entropy in bits and teacher-forced bit accuracy of every image, for the fits [seeds × layers]."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bits: list[Tensor] = []
        self.right: list[Tensor] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in the logits [S, L, B, K] of a batch."""
        code = batch.labels[self.label].to(logits.dtype)
        self.bits.append(bits_per_image(logits, code).flatten(0, 1).cpu())
        self.right.append(((logits > 0) == (code > 0)).float().mean(-1).flatten(0, 1).cpu())

    def results(self) -> list[SubsetResult]:
        """One subset, all images, with loss and accuracy."""
        bits = torch.cat(self.bits, 1)  # [S * L, M]
        metrics = {"loss": mean_estimate(bits), "accuracy": mean_estimate(torch.cat(self.right, 1))}
        return [SubsetResult(self.label, "", "images", metrics, {"n_images": bits.shape[1]}, [])]


# ------------------------------------------------------------------------------------------------------------- entries


def ladder_rows(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """One row; with probe.mode=ladder every entry of `binding.ladder`, the run's settings changed by what it names.

    Raises:
        UserError: no entry, one that names something unknown, or two of one name.
    """
    if cfg.probe.mode != LADDER:
        return [(PROBE_ROW, cfg)]
    rows: dict[str, DictConfig] = {}
    for number, entry in enumerate(OmegaConf.to_container(cfg.binding, resolve=True)["ladder"] or [], start=1):
        changes = dict(entry)
        name = changes.pop("name", None)
        if name is not None and (not NAME.fullmatch(str(name)) or str(name) in CONTROLS):
            raise UserError(
                f"binding.ladder, entry {number}: got name '{name}', expected letters, digits, spaces and . _ = + - (it "
                f"names files), and none of {', '.join(CONTROLS)}"
            )
        try:
            of_entry = OmegaConf.merge(cfg, changes)
        except OmegaConfBaseException as error:
            raise UserError(f"binding.ladder, entry {number}: {str(error).splitlines()[0]}") from error
        name = str(name or f"{of_entry.model.output_mode}-{of_entry.probe.mode}")
        if rows.get(name) == of_entry:  # model.output_mode may make two entries the same
            continue
        if name in rows or of_entry.probe.mode == LADDER:
            raise UserError(f"binding.ladder, entry {number}: '{name}' is there twice or names no probe; set its name")
        rows[name] = of_entry
    if not rows:
        raise UserError("binding.ladder is empty; list what to compare, or set probe.mode to one probe")
    return list(rows.items())


def check_probe(cfg: DictConfig) -> None:
    """Refuse an unknown probe, a *_reuse probe for F, attention without all tokens."""
    settings = OmegaConf.to_container(cfg.probe, resolve=True)
    modes_set = {"mode": settings["mode"], "F.mode": settings["F"]["mode"], "F.fallback": settings["F"]["fallback"]}
    for name, mode in modes_set.items():
        if mode is not None and mode not in BINDING_PROBES:
            raise UserError(f"unknown probe.{name} '{mode}'; valid: {', '.join([LADDER, *BINDING_PROBES])}")
    check_settings({"": settings, "F.": settings["F"]})
    modes = {"Y": settings["mode"], "F": (settings | feature_settings(settings, settings["F"]))["mode"]}
    for code, mode in modes.items():
        if mode == "attention_quadratic" and cfg.model.output_mode != "all":
            raise UserError(
                f"probe.mode={mode} (for {code}) attends to patch tokens and model.output_mode={cfg.model.output_mode} "
                "has none; set model.output_mode=all"
            )


def check_samples(samples: Mapping[str, PatchSample], cfg: DictConfig) -> None:
    """Refuse data without codes, and attention over tokens that do not begin with a class token."""
    for split, sample in samples.items():
        if "object_code" not in sample.labels or "feature_code" not in sample.labels:
            raise UserError(
                f"split {split} carries no object and feature codes; mode={cfg.mode} needs a data set of codes, "
                "for instance dataset=balancedcolorshape"
            )
        if not sample.meta["facts"]["has_class_token"] and "attention" in f"{cfg.probe.mode} {cfg.probe.F.mode}":
            raise UserError(
                f"probe.mode=attention_quadratic reads the class token and {sample.meta['facts']['name']} has none; "
                "take another probe or backbone"
            )


def check_plan(cfg: DictConfig, options: trainer.FitOptions, planned: Mapping[str, PatchSample]) -> None:
    """Refuse, before anything is extracted, what labels and sizes show to be wrong or too large."""
    check_samples(planned, cfg)
    train, seeds = planned["train"], read_seeds(cfg.trainer.seeds)
    for part in parts_of(cfg):
        check_rank(Code(seeds, part).settings(cfg.probe), BINDING_PROBES, train.tokens.shape[-1])
        check_stack(partial(Code, name=part), seeds, cfg.probe, train, options.batch_images, free_memory(options.device))


def report_splits(samples: Mapping[str, PatchSample], run: Run) -> None:
    """Print and record what decides whether scores of splits can be compared."""
    labels = {split: {k: v.numpy() for k, v in sample.labels.items()} for split, sample in samples.items()}
    report, rows = split_report(labels), []
    for split, counted in report["splits"].items():
        info, of_data = samples[split].info, samples[split].meta["report"]
        exact = {name: info.get(name) for name in ("H_Y", "H_F", "H_Y_all_splits", "H_F_all_splits")}
        counted = {**{("H_F_plug_in" if k == "H_F" else k): v for k, v in counted.items()}, **exact}
        more = {k: v for k, v in of_data.items() if k not in counted and isinstance(v, int | float | str)}
        run.write({"kind": "split", "split": split, **counted, **more})
        rows.append((split, counted, of_data))
    run.say(split_table(rows))
    shares = [f"{pair}: F {share['F']:.0%}, Y {share['Y']:.0%}" for pair, share in report["overlap"].items()]
    run.say("codes that occur in both splits, share of images; " + "; ".join(shares))
    warnings = report["warnings"]
    for (one, first), (other, second) in itertools.combinations(samples.items(), 2):
        if shared := sorted(set(first.keys) & set(second.keys)):
            warnings.append(f"{one} and {other} share {len(shared)} images, such as {shared[0]}; scores on {other} flatter")
    for split, sample in samples.items():
        warnings += [f"{split}: {text}" for text in sample.meta["report"].get("warnings", ())]
    run.write({"kind": "splits", "overlap": report["overlap"], "warnings": warnings})
    for warning in warnings:
        run.say(f"warning: {warning}")


def parts_of(cfg: DictConfig) -> list[str]:
    """The codes that are read: Y and F, perhaps Y given F."""
    return list(LABELS) if cfg.binding.conditional else ["Y", "F"]


def notes_of(cfg: DictConfig, sample: PatchSample) -> dict[str, Any]:
    """What every record of a row states beside its numbers."""
    return {
        "probe": cfg.probe.mode,
        "probe_F": Code([0], "F").settings(cfg.probe)["mode"],
        "output_mode": cfg.model.output_mode,
        "prior": sample.meta["report"]["prior"],
        "H_Y": sample.info.get("H_Y"),
        "H_F": sample.info.get("H_F"),
    }


def flags(subset: SubsetResult, metrics: Mapping[str, float]) -> list[str]:
    """What makes a record doubtful."""
    return suspicions(metrics, subset.notes["H_F"])


def check(cfg: DictConfig) -> dict[str, DictConfig]:
    """The rows of a run by name, after everything was refused that the configuration alone shows to be wrong.

    Raises:
        UserError: the first option that does not serve; no extraction has begun.
    """
    rows = dict(ladder_rows(cfg))
    for of_row in rows.values():
        check_probe(of_row)
        read_seeds(of_row.trainer.seeds)
        trainer.FitOptions.read(of_row)
    return rows


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Fit and score every row and its controls on every layer, write, show.

    Returns:
        {"objective": the first row's binding ratio on validation, at the layer chosen there (mean over seeds)}

    Raises:
        UserError: a mistake in command, data or weights, in one sentence.
    """
    rows = check(cfg)
    options = {name: trainer.FitOptions.read(of_row) for name, of_row in rows.items()}
    # Whole images first, here and for the controls: class and pooled tokens are then taken from what is stored.
    whole_first = sorted(rows, key=lambda name: rows[name].model.output_mode != "all")
    stages(("activations", 3), ("activations of controls", 3), *[(name, 4) for name in rows], "table and figure")
    stage("activations", parts=6 * len(rows))
    planned: dict[str, dict[str, Labelled]] = {}
    for name in whole_first:
        planned[name] = plan_samples(rows[name], run.say, check=partial(check_plan, rows[name], options[name]))
    run.rest_on({name: {split: fingerprints(s.sample) for split, s in of_row.items()} for name, of_row in planned.items()})
    if (ended := concluded(run)) is not None:
        return ended
    samples = {name: open_planned(of_row, run.say) for name, of_row in planned.items()}
    report_splits(samples[next(iter(rows))], run)
    stage("activations of controls", parts=9 * len(rows))
    controls = {name: build_controls(Opened(rows[name], samples[name], name), CONTROLS, run.say) for name in whole_first}
    results, resampling = [], Resampling.read(cfg)
    for name, of_row in rows.items():
        subjects = [Subject(name, "", of_row.probe, samples.pop(name), read_seeds(of_row.trainer.seeds)), *controls.pop(name)]
        stage(name, parts=3 * len(subjects) * len(parts_of(of_row)))
        fits = [(Code(s.seeds, part), s._replace(part=part)) for s in subjects for part in parts_of(of_row)]
        with trainer.ahead(run, fits, options[name]):
            for subject in subjects:
                stacks, answers = {}, {"test": {}, "val": {}}
                for part in parts_of(of_row):
                    task, of_part = Code(subject.seeds, part), subject._replace(part=part)
                    stacks[part] = trainer.fit_stack(run, task, of_part, options[name])
                    for split, of_split in answers.items():
                        of_split[part] = trainer.evaluate(task, stacks[part], of_part, options[name], split=split)
                scored = {s: combine(a, subject.samples[s], notes_of(of_row, subject.samples[s])) for s, a in answers.items()}
                results.append(scored["test"]._replace(validation=mean_scores(scored["val"])))
                write_records(run, results[-1], resampling, split="test", flags=flags)
                if not subject.control:
                    illustrate(results[-1], stacks["Y"], subject.samples["test"], of_row, run)
    stage("table and figure")
    return show(results, cfg, run, resampling, "test", learning_units(subject.samples["test"]))


def run_eval(fitted: DictConfig, cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=eval: score the probes of a finished run on `eval.split`, without controls.

    Args:
        fitted: configuration of the finished run; data, device and cache are those of now.
        cfg: of this run.

    Raises:
        UserError: no such checkpoint, or the activations at hand are not those the probes were fitted on.
    """
    split, rows = cfg.eval.split, check(fitted)
    stages("activations", *[(name, 2) for name in rows], "table and figure")
    stage("activations", parts=2 * len(rows))
    samples = {name: open_samples(of_row, run.say, [split]) for name, of_row in rows.items()}
    run.rest_on(trainer.rests_on_run(run, {name: {split: fingerprints(s[split])} for name, s in samples.items()}))
    results, resampling = [], Resampling.read(fitted)
    for name, of_row in rows.items():
        stage(name, parts=len(parts_of(of_row)))
        options, sample, seeds = trainer.FitOptions.read(of_row), samples[name][split], read_seeds(of_row.trainer.seeds)
        subject, answers = Subject(name, "", of_row.probe, samples[name], seeds), {}
        check_samples(samples[name], of_row)
        run.say(f"scoring {run.source} ({name}, {cfg.eval.checkpoint}) on {split}")
        for part in parts_of(of_row):
            task, of_part = Code(seeds, part), subject._replace(part=part)
            stack = trainer.load_stack(run.source, of_part.name, cfg.eval.checkpoint, task, sample)
            check_loaded(stack[0], task, sample)
            stack = [probe.to(options.device) for probe in stack]
            predictions = Predictions(task, sample) if cfg.eval.predictions else None
            answers[part] = trainer.evaluate(task, stack, of_part, options, split=split, also=predictions and predictions.add)
            if predictions is not None:
                about = {"task": fitted.task, "split": split, "row": name, "code": part}
                predictions.write(run.dir / "predictions" / name / f"{part}.safetensors", about)
        result = combine(answers, sample, notes_of(of_row, sample))
        results.append(result._replace(validation=read_validation(run.source, result.name)))
        write_records(run, results[-1], resampling, split=split, flags=flags)
    stage("table and figure")
    return show(results, fitted, run, resampling, split)


def check_loaded(probe: Probe, task: Code, sample: PatchSample) -> None:
    """Refuse a data set of other codes than a loaded probe reads."""
    n_bits, n_tokens = task.n_bits(sample), sample.tokens.shape[2]
    if probe.n_bits != n_bits or probe.n_tokens != n_tokens:
        raise UserError(
            f"the checkpoint reads {task.name} as {probe.n_bits} bits from {probe.n_tokens} tokens, these images have "
            f"{n_bits} bits and {n_tokens} tokens; score it on a data set with the same feature groups"
        )


def learning_units(sample: PatchSample) -> dict[str, tuple[float, str]]:
    """By part, the factor from nats per bit of a code to bits per image, and what they are called."""
    return {part: (sample.labels[labels[-1]].shape[1] / math.log(2), "bits per image") for part, labels in LABELS.items()}


def show(
    results: Sequence[ProbeResult],
    cfg: DictConfig,
    run: Run,
    resampling: Resampling,
    split: str,
    units: Mapping[str, tuple[float, str]] | None = None,
) -> dict[str, Any]:
    """Write the layer curve as table and figure, print the table."""
    from binding.figures import write_layer_curve  # here: no fit waits for matplotlib

    text = information_table(results, resampling, conditional=bool(cfg.binding.conditional))
    return present(results, COLUMNS, resampling, run, split=split, draw=write_layer_curve, text=text, units=units)


def illustrate(result: ProbeResult, stack: Sequence[Probe], sample: PatchSample, cfg: DictConfig, run: Run) -> None:
    """What the chosen layer of a row reads from a few test images."""
    from binding.figures import write_examples

    examples = decoded_examples(result.layers[best_layer(result, COLUMNS[0])], stack, sample, cfg)
    plain = [{k: v for k, v in example.items() if k != "image"} for example in examples]
    write_atomically(run.dir / f"decoded-{result.row}.json", json.dumps(plain, indent=1) + "\n")
    write_examples(examples, run.dir / f"decoded-{result.row}.png")
