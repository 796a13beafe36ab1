"""mode=train_binding: how many bits of "which features belong together" are in a frozen representation Z.

A scene's object code Y says which conjunctions are present, its feature code F which features; F is a function of Y. Two
probes read them bit by bit, each bit given the true bits before it; their cross-entropies on the test split, in bits per
image, bound what Z leaves open: L_Y >= H(Y|Z), L_F >= H(F|Z). From them (arXiv 2606.03976)

    I(Y;Z) ~ H(Y) - L_Y      I(F;Z) ~ H(F) - L_F      lower bounds, as far as the law of Y is the assumed one
    binding information ~ H(Y|F) - (L_Y - L_F)        estimates I(Y;Z|F); ratio = binding information / H(Y|F)

Binding information is a difference of two bounds and so no bound itself: a weak F probe inflates it, beyond ratio 1 even.
Nothing is clipped, what is suspect is flagged, and `binding.conditional=true` adds the probe q(Y|Z,F) whose
H(Y|F) - L is a true lower bound.

Everything else is as for any other task: `Code` is one of the fits, `Binding` makes the scores of them. H(Y), H(F) and
H(Y|F) are those of the law the data set names (`prior` in every record), exact, of the split that is scored.
"""

import importlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn import functional as F

from activation import PatchSample
from binding.examples import decoded_examples
from binding.information import binding_estimates, bits_per_image, suspicions
from binding.probes import BINDING_PROBES, check_knobs
from datasets.splits import split_report
from errors import UserError
from files import write_atomically
from metrics.bootstrap import mean_estimate, mean_over_seeds
from probes import Probe
from runs.records import read_records
from runs.run import Run
from show.records import Scored, block_interval
from show.text import format_table
from tasks import Batch, Scores, Task

LADDER = "ladder"
LABELS = {"Y": ("object_code",), "F": ("feature_code",), "Y_given_F": ("feature_code", "object_code")}
NAME = re.compile(r"[\w=+-][\w .=+-]*")  # of a row of the ladder
CONTROL_LABELS = {"random": "random weights", "pixels": "raw pixels"}


class Code(Task):
    """One code read from an image's tokens: "Y", "F", or "Y_given_F", where all of F comes before the bits of Y."""

    kind = "binding"
    probes = BINDING_PROBES

    def __init__(self, cfg: DictConfig, seeds: Sequence[int], name: str) -> None:
        super().__init__(cfg, seeds)
        self.name, self.labels, self.tokens_per_visit = name, LABELS[name], None

    def check_probe(self, cfg: DictConfig) -> None:
        """Checked by `Binding`."""

    def settings(self, probe_cfg: Mapping) -> dict[str, Any]:
        """The probe's settings: `probe` for Y, changed by what `probe.F` sets for the others."""
        plain = OmegaConf.to_container(probe_cfg, resolve=True) if isinstance(probe_cfg, DictConfig) else dict(probe_cfg)
        changes = plain.pop("F")
        if self.name == "F" or (self.name == "Y_given_F" and is_reuse(plain["mode"])):
            plain |= feature_settings(plain, changes)
        return plain

    def build_probe(self, probe_cfg: Mapping, sample: PatchSample, layers: Sequence, **given: Any) -> Probe:
        """A stack of probes with one output per bit."""
        given["n_bits"] = sum(sample.labels[label].shape[1] for label in self.labels)
        given["n_tokens"] = sample.tokens.shape[2]
        if self.name == "Y":
            given["groups"] = [len(group) for group in sample.meta["classes"]]
        given.pop("say", None)
        return super().build_probe(self.settings(probe_cfg), sample, layers, **given)

    def outputs_per_token(self, sample: PatchSample, n_tokens: int, probe_cfg: Mapping) -> int:
        """Hidden units or factors per bit, spread over the tokens."""
        settings = self.settings(probe_cfg)
        per_bit = 2 * int(settings["rank"])
        if settings["mode"].startswith("dnn"):
            per_bit = int(settings["dnn_hidden_dim"] or 1024) * int(settings["dnn_num_layers"])
        return math.ceil(per_bit * sum(sample.labels[label].shape[1] for label in self.labels) / n_tokens)

    def refuse(self, probe: Probe, sample: PatchSample) -> None:
        """Refuse a data set of other codes."""
        n_bits = sum(sample.labels[label].shape[1] for label in self.labels)
        if probe.n_bits != n_bits or probe.n_tokens != sample.tokens.shape[2]:
            raise UserError(
                f"the checkpoint reads {self.name} as {probe.n_bits} bits from {probe.n_tokens} tokens, these images have "
                f"{n_bits} bits and {sample.tokens.shape[2]} tokens; score it on a data set with the same feature groups"
            )

    def code(self, batch: Batch) -> Tensor:
        """The bits [B, K] in the order they are read, 0.0 and 1.0."""
        return torch.cat([batch.labels[label] for label in self.labels], 1).float()

    def logits(self, probe: Probe, x: Tensor, batch: Batch) -> Tensor:
        """Log-odds [S, L, B, K] of the bits that are asked for, each given the true bits before it."""
        code = self.code(batch)
        return probe(x, code)[..., code.shape[1] - batch.labels[self.labels[-1]].shape[1] :]

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy [S, L] in nats, mean over images and bits, as published."""
        code = batch.labels[self.labels[-1]].to(logits.dtype)
        return (F.softplus(logits) - code * logits).mean((-2, -1))

    def scorer(self, sample: PatchSample, n_layers: int) -> "CodeScorer":
        """Collects bits and right answers per image."""
        return CodeScorer(self.labels[-1])


class CodeScorer:
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

    def finish(self) -> list[Scores]:
        """One block with loss and accuracy."""
        bits = torch.cat(self.bits, 1)
        metrics = {"loss": mean_estimate(bits), "accuracy": mean_estimate(torch.cat(self.right, 1))}
        return [Scores(self.label, "", "images", metrics, {"n_images": bits.shape[1]}, [])]


def is_reuse(mode: str) -> bool:
    """Whether a probe shares weights between conjunctions, which only the object code has."""
    return mode.endswith("_reuse")


def feature_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """What differs for the F probe: all that `probe.F` sets; instead of a *_reuse probe of Y its fallback.

    Raises:
        UserError: a *_reuse probe is asked for, which needs conjunctions.
    """
    own = {key: value for key, value in changes.items() if value is not None and key != "fallback"}
    if is_reuse(settings["mode"]):
        own.setdefault("mode", changes["fallback"])
    if is_reuse(own.get("mode", "")):
        fitting = ", ".join(name for name in BINDING_PROBES if not is_reuse(name))
        raise UserError(
            f"probe.F asks for {own['mode']}, which shares weights between conjunctions and the feature code has none; "
            f"take one of {fitting}"
        )
    return own


class Binding(Task):
    """Y and F read from one representation, and what follows of it."""

    kind = "binding"
    probes = BINDING_PROBES
    controls = ("pixels", "random")
    figures = "binding.figures"
    columns = [
        ("binding", "", "images", metric, title)
        for metric, title in (
            ("ratio", "binding ratio"),
            ("binding_information", "binding information, bits"),
            ("information_Y", "I(Y;Z), bits"),
            ("information_F", "I(F;Z), bits"),
            ("loss_Y", "L_Y, bits"),
            ("loss_F", "L_F, bits"),
        )
    ]

    def __init__(self, cfg: DictConfig, seeds: Sequence[int] | None = None) -> None:
        super().__init__(cfg, seeds)
        names = [*LABELS] if cfg.binding.conditional else ["Y", "F"]
        self._parts = [Code(cfg, self.seeds, name) for name in names]

    @classmethod
    def rows(cls, cfg: DictConfig) -> list[tuple[str, DictConfig]]:
        """One row; with probe.mode=ladder every entry of `binding.ladder`, the run's settings changed by what it names.

        Raises:
            UserError: no entry, one that names something unknown, or two of one name.
        """
        if cfg.probe.mode != LADDER:
            return [("probe", cfg)]
        found: dict[str, DictConfig] = {}
        for number, entry in enumerate(OmegaConf.to_container(cfg.binding, resolve=True)["ladder"] or [], start=1):
            changes = dict(entry)
            name = changes.pop("name", None)
            if name is not None and (not NAME.fullmatch(str(name)) or str(name) in CONTROL_LABELS):
                raise UserError(
                    f"binding.ladder, entry {number}: got name '{name}', expected letters, digits, spaces and . _ = + - (it "
                    f"names files), and none of {', '.join(CONTROL_LABELS)}"
                )
            try:
                own = OmegaConf.merge(cfg, changes)
            except OmegaConfBaseException as error:
                raise UserError(f"binding.ladder, entry {number}: {str(error).splitlines()[0]}") from error
            name = str(name or f"{own.model.output_mode}-{own.probe.mode}")
            if found.get(name) == own:  # model.output_mode may make two entries the same
                continue
            if name in found or own.probe.mode == LADDER:
                raise UserError(f"binding.ladder, entry {number}: '{name}' is there twice or names no probe; set its name")
            found[name] = own
        if not found:
            raise UserError("binding.ladder is empty; list what to compare, or set probe.mode to one probe")
        return list(found.items())

    def check_probe(self, cfg: DictConfig) -> None:
        """Refuse an unknown probe, a *_reuse probe for F, attention without all tokens."""
        settings = OmegaConf.to_container(cfg.probe, resolve=True)
        asked = {"mode": settings["mode"], "F.mode": settings["F"]["mode"], "F.fallback": settings["F"]["fallback"]}
        for name, mode in asked.items():
            if mode is not None and mode not in BINDING_PROBES:
                raise UserError(f"unknown probe.{name} '{mode}'; valid: {', '.join([LADDER, *BINDING_PROBES])}")
        check_knobs({"": settings, "F.": settings["F"]})
        modes = {"Y": settings["mode"], "F": (settings | feature_settings(settings, settings["F"]))["mode"]}
        for code, mode in modes.items():
            if mode == "attention_quadratic" and cfg.model.output_mode != "all":
                raise UserError(
                    f"probe.mode={mode} (for {code}) attends to patch tokens and model.output_mode={cfg.model.output_mode} "
                    "has none; set model.output_mode=all"
                )

    def parts(self) -> list[Task]:
        """The fits of Y and of F, perhaps of Y given F."""
        return self._parts

    def check(self, samples: Mapping[str, PatchSample]) -> None:
        """Refuse data without codes, and attention over tokens that do not begin with a class token."""
        for split, sample in samples.items():
            if "object_code" not in sample.labels or "feature_code" not in sample.labels:
                raise UserError(
                    f"split {split} carries no object and feature codes; mode={self.cfg.mode} needs a data set of codes, "
                    "for instance dataset=balancedcolorshape"
                )
            if not sample.meta["facts"]["has_class_token"] and "attention" in f"{self.cfg.probe.mode} {self.cfg.probe.F.mode}":
                raise UserError(
                    f"probe.mode=attention_quadratic reads the class token and {sample.meta['facts']['name']} has none; "
                    "take another probe or backbone"
                )

    def introduce(self, samples: Mapping[str, PatchSample], run: Run) -> None:
        """Print and record what decides whether scores of splits can be compared."""
        labels = {split: {k: v.numpy() for k, v in sample.labels.items()} for split, sample in samples.items()}
        found, rows = split_report(labels), []
        for split, facts in found["splits"].items():
            info, report = samples[split].info, samples[split].meta["report"]
            exact = {name: info.get(name) for name in ("H_Y", "H_F", "H_Y_all_splits", "H_F_all_splits")}
            facts = {**{("H_F_plug_in" if k == "H_F" else k): v for k, v in facts.items()}, **exact}
            more = {k: v for k, v in report.items() if k not in facts and isinstance(v, int | float | str)}
            run.write({"kind": "split", "split": split, **facts, **more})
            support = f" of {report['support_F']}" if "support_F" in report else ""  # codes the split may hold
            rows.append([
                split, str(facts["n"]), f"{facts['distinct_F']}{support}", str(facts["distinct_Y"]),
                f"{facts['largest_F_mass']:.1%}",
                *(_bits(facts[name]) for name in ("E_H_Y_given_F", "H_F", "H_F_plug_in", "H_Y")), report["prior"],
            ])  # fmt: skip
        titles = ["split", "n", "distinct F", "distinct Y", "largest F", "E H(Y|F)", "H(F)", "H(F) plug-in", "H(Y)", "prior"]
        run.say(format_table(titles, rows))
        shares = [f"{pair}: F {share['F']:.0%}, Y {share['Y']:.0%}" for pair, share in found["overlap"].items()]
        run.say("codes that occur in both splits, share of images; " + "; ".join(shares))
        for (one, first), (other, second) in itertools.combinations(samples.items(), 2):
            if shared := sorted(set(first.keys) & set(second.keys)):
                text = f"{one} and {other} share {len(shared)} images, such as {shared[0]}; scores on {other} flatter"
                found["warnings"].append(text)
        for split, sample in samples.items():
            found["warnings"] += [f"{split}: {text}" for text in sample.meta["report"].get("warnings", ())]
        run.write({"kind": "splits", "overlap": found["overlap"], "warnings": found["warnings"]})
        for warning in found["warnings"]:
            run.say(f"warning: {warning}")

    def combine(self, found: Sequence[list[Scores]], sample: PatchSample) -> list[Scores]:
        """Losses, accuracies and information of every fit, in one block."""
        loss, metrics = {}, {}
        for part, (scores,) in zip(self._parts, found, strict=True):
            loss[part.name] = metrics[f"loss_{part.name}"] = scores.metrics["loss"]
            metrics[f"accuracy_{part.name}"] = scores.metrics["accuracy"]
        entropy = sample.labels["H_Y_given_F"].double().flatten()
        metrics |= binding_estimates(loss, entropy, sample.info)
        facts = {
            "probe": self.cfg.probe.mode,
            "probe_F": self._parts[1].settings(self.cfg.probe)["mode"],
            "output_mode": self.cfg.model.output_mode,
            "prior": sample.meta["report"]["prior"],
            "H_Y": sample.info.get("H_Y"),
            "H_F": sample.info.get("H_F"),
            "H_Y_given_F": float(entropy.mean()),
        }
        counts = {"n_images": len(entropy)}

        def flag(values: Mapping[str, float]) -> list[str]:
            return suspicions(values, facts["H_F"])

        return [Scores("binding", "", "images", metrics, counts, [], facts, (-math.inf, math.inf), True, flag)]

    def table(self, summary: Sequence[Scored], counts: Tensor) -> str:
        """Every row and layer; ± is half of the 95 % interval."""
        names = ["loss_Y", "loss_F", "information_Y", "information_F", "binding_information", "ratio"]
        titles = ["L_Y", "L_F", "I(Y;Z)", "I(F;Z)", "binding inf.", "ratio"]
        if self.cfg.binding.conditional:
            names, titles = [*names, "lower_bound", "ratio_lower"], [*titles, "lower bound", "ratio ≥"]
        body: list[list[str]] = []
        warnings: dict[str, dict[str, list[str]]] = {}  # text -> row -> layers
        for scored in summary:
            block = scored.scores[0]
            means = {key: mean_over_seeds(e, len(scored.seeds)).value for key, e in block.metrics.items()}
            ends = {key: block_interval(block.metrics[key], block, len(scored.seeds), counts) for key in means}
            for index, layer in enumerate(scored.layers):
                cells = []
                for name in names:
                    digits = 3 if "ratio" in name else 2
                    if name in means:
                        low, high = (float(end[index]) for end in ends[name])
                        cells.append(f"{float(means[name][index]):.{digits}f} ±{(high - low) / 2:.{digits}f}")
                    else:
                        cells.append("–")
                label = row_label(scored.name, block.facts)
                body.append([label, str(layer), *cells])
                for text in block.flag({key: float(value[index]) for key, value in means.items()}):
                    warnings.setdefault(text, {}).setdefault(label, []).append(str(layer))
        block, seeds = summary[0].scores[0], sorted({len(scored.seeds) for scored in summary}, reverse=True)
        given = ", ".join(f"{name} {_bits(block.facts[key])}" for name, key in (
            ("H(Y)", "H_Y"), ("H(F)", "H_F"), ("H(Y|F)", "H_Y_given_F"),
        ))  # fmt: skip
        note = (
            f"bits per image, {block.counts['n_images']} images, prior {block.facts['prior']}: {given}; "
            f"mean over {seeds[0]} seed{'s' * (seeds[0] > 1)}{f' (controls {seeds[-1]})' if len(seeds) > 1 else ''}, "
            "± half of the 95 % interval over images and seeds"
        )
        readers = {(f["probe"], f["probe_F"]) for f in (scored.scores[0].facts for scored in summary)}
        swapped = [f"F is read by {other}, Y by {mode}" for mode, other in sorted(readers) if mode != other]
        flagged = []
        for text, where in warnings.items():
            places = "; ".join(f"{label}, layer {', '.join(layers)}" for label, layers in where.items())
            everywhere = len(body) > 1 and sum(map(len, where.values())) == len(body)
            flagged.append(f"warning: {text}: {'every row' if everywhere else places}")
        return "\n".join([format_table(["tokens and probe", "layer", *titles], body), "; ".join([note, *swapped]), *flagged])

    def illustrate(self, scored: Scored, stacks: Sequence[Sequence[Probe]], sample: PatchSample, run: Run) -> None:
        """Training curves of the row, and what its best layer reads from a few test images."""
        figures = importlib.import_module("binding.figures")  # here: no fit depends on matplotlib
        names = {f"{scored.name}/{part.name}" for part in self._parts}  # not those of its controls, fitted by an earlier run
        history = [record for record in read_records(run.dir / "history.jsonl") if record["name"] in names]
        n_bits = {part.name: sample.labels[part.labels[-1]].shape[1] for part in self._parts}
        figures.write_training_curves(history, n_bits, run.dir / f"training-{scored.name}.png")
        examples = decoded_examples(scored, stacks[0], sample, self.cfg)
        plain = [{k: v for k, v in example.items() if k != "image"} for example in examples]
        write_atomically(run.dir / f"decoded-{scored.name}.json", json.dumps(plain, indent=1) + "\n")
        figures.write_examples(examples, run.dir / f"decoded-{scored.name}.png")


def row_label(name: str, facts: Mapping[str, Any]) -> str:
    """What a row of the table is called: tokens and probe, or the name it was given in `binding.ladder`; then its control."""
    row, _, control = name.rpartition("/")
    plain = f"{facts['output_mode']} {facts['probe']}"
    label = row or ("" if control in CONTROL_LABELS else control)
    label = plain if label in ("", "probe", plain.replace(" ", "-")) else label
    return label + (f", {CONTROL_LABELS[control]}" if control in CONTROL_LABELS else "")


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
