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

from activation import PatchSample, build_dataset
from binding_probes import BINDING_PROBES, check_knobs
from datasets.codes import Groups, split_report
from errors import UserError
from metrics import Estimate, mean_estimate, mean_over_seeds
from probes import Probe
from report import Scored, block_interval
from results import Run, format_table, read_records, write_atomically
from tasks import Batch, Scores, Task

LADDER = "ladder"
LABELS = {"Y": ("object_code",), "F": ("feature_code",), "Y_given_F": ("feature_code", "object_code")}
WEAK = 0.25  # an F probe that reads less than this share of H(F) is flagged (our choice)
N_EXAMPLES = 4
NAME = re.compile(r"[\w=+-][\w .=+-]*")  # of a row of the ladder
CONTROL_LABELS = {"random": "random weights", "pixels": "raw pixels"}


def bits_per_image(logits: Tensor, code: Tensor) -> Tensor:
    """Cross-entropy of a code in bits, summed over its bits: logits [..., B, K], code [B, K] of 0 and 1 -> [..., B]."""
    return (F.softplus(logits) - code * logits).sum(-1) / math.log(2)


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


def binding_estimates(loss: Mapping[str, Estimate], entropy: Tensor, info: Mapping[str, float]) -> dict[str, Estimate]:
    """Information in bits from the losses, with the influence of every image (delta method).

    Args:
        loss: Estimates of L_Y, L_F and perhaps L_Y_given_F, [F] fits and [F, M].
        entropy: H(Y|F) of every image [M], bits.
        info: H_Y and H_F of the split, where the law is known; also H_Y_all_splits, H_F_all_splits: of a reader who does
            not know which feature codes the split holds, which a probe fitted on others cannot.

    Returns:
        information_Y, information_F (perhaps with _all_splits) and information_Y_ratio = I(Y;Z) / H(Y);
        binding_information and ratio, 0 where H(Y|F) is 0; lower_bound and ratio_lower of the conditional probe.
    """
    unknown = mean_estimate(entropy[None])  # [1], [1, M]: images differ in what there is to know
    found = {}
    for code in ("Y", "F"):
        for name in (f"H_{code}", f"H_{code}_all_splits"):
            if name in info:
                found[name.replace("H_", "information_")] = _less(info[name], loss[code])
    if "H_Y" in info and info["H_Y"] > 0:
        found["information_Y_ratio"] = Estimate(*(x / info["H_Y"] for x in found["information_Y"]))
    gap = Estimate(*(y - f for y, f in zip(loss["Y"], loss["F"], strict=True)))
    for name, ratio, left in (
        ("binding_information", "ratio", gap),
        ("lower_bound", "ratio_lower", loss.get("Y_given_F")),
    ):
        if left is not None:
            bits = Estimate(*(h - x for h, x in zip(unknown, left, strict=True)))
            found |= {name: bits, ratio: _ratio(bits, unknown)}
    return found


def _less(constant: float, estimate: Estimate) -> Estimate:
    return Estimate(constant - estimate.value, -estimate.influence)


def _ratio(part: Estimate, whole: Estimate) -> Estimate:
    if whole.value <= 0:
        return Estimate(torch.zeros_like(part.value), torch.zeros_like(part.influence))
    value = part.value / whole.value
    return Estimate(value, (part.influence - value[:, None] * whole.influence) / whole.value)


class Binding(Task):
    """Y and F read from one representation, and what follows of it."""

    kind = "binding"
    probes = BINDING_PROBES
    controls = ("pixels", "random")
    figures = "visualize_binding"
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
        figures = importlib.import_module("visualize_binding")  # here: no fit depends on matplotlib
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


def suspicions(values: Mapping[str, float], feature_entropy: float | None) -> list[str]:
    """What makes a binding ratio doubtful, a sentence each; nothing is clipped."""
    found = []
    if values["ratio"] > 1:
        found.append("ratio above 1, the F probe reads less of the features than the Y probe does")
    if values["ratio"] < 0:
        found.append("ratio below 0, the Y probe knows less of the objects than the F probe and the law of Y tell")
    if feature_entropy and values["information_F"] < WEAK * feature_entropy:
        found.append(f"weak F probe, it reads less than {WEAK:.0%} of H(F), so binding information may be inflated")
    return found


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


@torch.no_grad()
def decode(probe: Probe, x: Tensor, fit: int, layer: int) -> Tensor:
    """The code a probe reads by itself, bit after bit, each given its own answers before: uint8 [B, K].

    Args:
        probe: a stack of binding probes.
        x: activations [L, B, T, D].
        fit, layer: indices of the fit in the stack.
    """
    probe.eval()
    code = torch.zeros(x.shape[1], probe.n_bits, device=x.device)
    for bit in range(probe.n_bits):
        code[:, bit] = (probe(x, code)[fit, layer, :, bit] > 0).float()
    return code.to(torch.uint8).cpu()


def decoded_examples(scored: Scored, stack: Sequence[Probe], sample: PatchSample, cfg: DictConfig) -> list[dict[str, Any]]:
    """The first test images with their true objects and those the best layer's Y probe (first seed) reads.

    Returns:
        key, layer, "true" and "predicted" lists of names, and the "image" [3, H, W] uint8.
    """
    best = int(mean_over_seeds(scored.scores[0].metrics["ratio"], len(scored.seeds)).value.argmax())
    layer = scored.layers[best]
    probe = next(probe for probe in stack if layer in probe.layers)
    images = torch.arange(min(N_EXAMPLES, len(sample.keys)))
    index = [list(sample.tokens.layers).index(name) for name in probe.layers]
    x = sample.tokens.gather(images, index).to(next(probe.parameters()).device)
    read = decode(probe, x, 0, probe.layers.index(layer))
    groups, examples = Groups(sample.meta["classes"]), []
    pictures = _pictures(cfg, [sample.keys[i] for i in images.tolist()])
    for i in images.tolist():
        true, found = (groups.decode_objects(code.numpy()) for code in (sample.labels["object_code"][i], read[i]))
        names = {"true": [" ".join(o) for o in true], "predicted": [" ".join(o) for o in found]}
        examples.append({"key": sample.keys[i], "layer": layer, **names, "image": pictures[sample.keys[i]]})
    return examples


def _pictures(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Tensor]:
    """Test images by name; unreadable ones were left out of the sample, so they are passed over."""
    dataset, found = build_dataset(cfg, "test"), {}
    for index in range(len(dataset)):
        try:
            scene = dataset[index]
        except UserError:
            continue
        if scene.key in keys:
            found[scene.key] = scene.image
        if len(found) == len(keys):
            break
    return found
