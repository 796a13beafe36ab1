"""What a probe is asked: batches, the loss of a stack, and the scores of every image.

    pairwise   IsSameObject from the tokens of two patches (mode=train)
    class      the class of every patch (mode=train_class); pairs are scored by how far two read-outs agree
    identity   mask queries per image (mode=train_identity); pairs are scored the same way
    binding    which conjunctions and features an image holds (mode=train_binding), in `binding.py`

A task owns one axis of the stack beside the layers: `stack` lists what each entry is (a seed, and for the pairwise task
the pairs its loss sees). Everything else, the loop, the checkpoints and the records, is the trainer's.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from activation import PatchSample
from backbones import backbone_facts, load_backbone, next_block_query_key, resolve_layers
from errors import UserError
from losses import agreement, class_loss, identity_loss, pair_bce
from metrics import Estimate, PairScores, pair_strata, ratio_estimate
from probes import PROBES, Probe, Projections, build_probe


class StackEntry(NamedTuple):
    """One entry of the first stacked axis: the seed of its weights and what its loss sees."""

    seed: int
    variant: str


class Batch(NamedTuple):
    """A batch of B images: which they are, which of their tokens are looked at, and their labels [B, T]."""

    images: Tensor  # [B] int64
    visited: Tensor | None  # [B, T'] int64 tokens of this visit; None: all
    labels: dict[str, Tensor]

    def tokens(self, sample: PatchSample, layers: Sequence[int], device: torch.device) -> Tensor:
        """Activations [L, B, T, D] float32 of the layers with these indices."""
        x = sample.tokens.gather(self.images, list(layers))
        if self.visited is not None:
            x = x.gather(2, self.visited[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[-1]))
        return x.to(device, non_blocking=True)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its labels on a device."""
        return self._replace(labels={k: v.to(device, non_blocking=True) for k, v in self.labels.items()})


class Scores(NamedTuple):
    """The scores of one block of one question for the fits [seeds × layers], seed first.

    question: is_same_object, same_class, class or binding. readout: how a pair's score is read from the logits.
    facts: what every record of the block says beside its numbers. bounds: where an interval may end.
    over_seeds: intervals of the mean resample the seeds too. flag: what a reader must be warned of, from the metrics.
    """

    question: str
    readout: str
    block: str
    metrics: dict[str, Estimate]
    counts: dict[str, int]
    distance: list[dict[str, Any]]
    facts: Mapping[str, Any] = {}
    bounds: tuple[float, float] = (0.0, 1.0)
    over_seeds: bool = False
    flag: Callable[[Mapping[str, float]], list[str]] = lambda metrics: []


class Task:
    """What all tasks share.

    Args:
        cfg: the whole configuration.
        seeds: of the fits; None: those of `trainer.seeds`.
    """

    kind = "pointwise"
    name = ""  # of a part, where a task has several
    probes: Mapping[str, type[Probe]] = PROBES  # what probe.mode chooses from
    controls: tuple[str, ...] = ("position", "pixels", "pixels_position", "random", "class_oracle", "cosine", "dot_product")
    figures = "visualize"  # the module whose write_layer_curve draws the scores
    labels: tuple[str, ...] = ("identity", "class", "valid")
    # What the table shows: question, readout, block, metric, title. The first one ranks the layers.
    columns = [
        ("is_same_object", "inner_product", "all", "auroc", "same object AUROC"),
        ("is_same_object", "argmax", "all", "accuracy", "same object accuracy"),
        ("is_same_object", "inner_product", "same_class_matched", "auroc", "same class, matched AUROC"),
        ("same_class", "inner_product", "all", "auroc", "same class AUROC"),
    ]

    def __init__(self, cfg: DictConfig, seeds: Sequence[int] | None = None) -> None:
        seeds = cfg.trainer.seeds if seeds is None else seeds
        self.cfg = cfg
        self.seeds = list(range(seeds)) if isinstance(seeds, int) else [int(s) for s in seeds]
        if not self.seeds:
            raise UserError(f"trainer.seeds is {seeds}, expected a number of at least 1 or a list of seeds")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"trainer.seeds names a seed twice, got {self.seeds}; the fits of one seed are equal")
        self.stack = [StackEntry(seed, "all") for seed in self.seeds]
        self.tokens_per_visit: int | None = cfg.protocol.selection.get("per_visit")
        self.check_probe(cfg)

    @classmethod
    def rows(cls, cfg: DictConfig) -> list[tuple[str, DictConfig]]:
        """What one run fits: a name and the configuration of each; here one, the run's own."""
        return [("probe", cfg)]

    def parts(self) -> list["Task"]:
        """The fits a score is made of, each with its own loss and its own best epoch; here one."""
        return [self]

    def check_probe(self, cfg: DictConfig) -> None:
        """Refuse a probe that is unknown or asks something else, and tokens it cannot be asked about."""
        if cfg.model.output_mode not in ("patches", "all"):
            raise UserError(
                f"model.output_mode={cfg.model.output_mode} and mode={cfg.mode} scores pairs of patches: expected patches or "
                "all, set model.output_mode=patches"
            )
        if cfg.probe.mode not in PROBES:
            raise UserError(f"unknown probe.mode '{cfg.probe.mode}'; valid: {', '.join(PROBES)}")
        if PROBES[cfg.probe.mode].kind != self.kind:
            fitting = ", ".join(name for name, probe in PROBES.items() if probe.kind == self.kind)
            raise UserError(
                f"probe.mode={cfg.probe.mode} scores {PROBES[cfg.probe.mode].kind} and mode={cfg.mode} needs a "
                f"{self.kind} probe; valid: {fitting}"
            )

    def check(self, samples: Mapping[str, PatchSample]) -> None:
        """Refuse samples no pair can be scored on.

        Raises:
            UserError: a split lacks pairs of one object or pairs of two.
        """
        for split, sample in samples.items():
            if "identity" not in sample.labels:
                raise UserError(f"{sample.meta['dataset']} tells no objects apart, mode={self.cfg.mode} needs maps of them")
            identity, valid = sample.labels["identity"], sample.labels["valid"]
            low = torch.where(valid, identity, identity.max() + 1).amin(1)
            high = torch.where(valid, identity, -1).amax(1)
            differ = bool((low < high).any())
            # Two patches of one identity: fewer distinct identities than valid patches in some image.
            ordered = torch.where(valid, identity, -1 - torch.arange(identity.shape[1])).sort(1).values
            agree = bool((ordered[:, 1:] == ordered[:, :-1]).any())
            if not (differ and agree):
                raise UserError(
                    f"split {split} has no usable pair: {sample.tokens.shape[1]} images, "
                    f"{'no' if not agree else 'some'} pair of one object and {'no' if not differ else 'some'} pair of two; "
                    "check the labels with mode=check_data, or take more images or patches"
                )

    def batches(self, sample: PatchSample, batch_size: int, order: torch.Generator | None) -> Iterator[Batch]:
        """Batches of images: shuffled by a generator for training, in order and with fixed tokens without one."""
        n_images, n_tokens = sample.position.shape[:2]
        images = torch.arange(n_images) if order is None else torch.randperm(n_images, generator=order)
        visited = self.visited_tokens(n_images, n_tokens, order)
        for chosen in images.split(batch_size):
            rows = None if visited is None else visited[chosen]
            labels = {name: sample.labels[name][chosen] for name in self.labels}
            if rows is not None:
                labels = {name: value.gather(1, rows) for name, value in labels.items()}
            yield Batch(chosen, rows, labels)

    def visited_tokens(self, n_images: int, n_tokens: int, order: torch.Generator | None) -> Tensor | None:
        """The tokens [M, T'] looked at in this pass where the protocol keeps more than it looks at; None: all.

        Training draws them anew every epoch; evaluation always looks at the same ones.
        """
        if self.tokens_per_visit is None or self.tokens_per_visit >= n_tokens:
            return None
        order = torch.Generator().manual_seed(0) if order is None else order
        return torch.rand(n_images, n_tokens, generator=order).argsort(1)[:, : self.tokens_per_visit]

    def build_probe(self, probe_cfg: Mapping, sample: PatchSample, layers: Sequence, **given: Any) -> Probe:
        """A fresh stack of probes for some layers of a sample; `given` is what the probe needs beside its settings."""
        seeds, dim = [entry.seed for entry in self.stack], sample.tokens.shape[-1]
        return build_probe(probe_cfg, seeds=seeds, layers=list(layers), dim=dim, table=self.probes, **given)

    def refuse(self, probe: Probe, sample: PatchSample) -> None:
        """Refuse a loaded probe that cannot be asked about a sample (layers and width are known to fit)."""
        if probe.recipe["mode"] != self.cfg.probe.mode:
            raise UserError(
                f"the checkpoint holds a {probe.recipe['mode']} probe and its run was of probe.mode={self.cfg.probe.mode}; "
                "name the run it was fitted in with eval.run=…"
            )

    def introduce(self, samples: Mapping[str, PatchSample], run: Any) -> None:
        """Say and record what a reader must know of the splits before any score."""

    def logits(self, probe: Probe, x: Tensor, batch: Batch) -> Tensor:
        """What the probe answers to activations x [L, B, T, D] of a batch."""
        return probe(x)

    def outputs_per_token(self, sample: PatchSample, n_tokens: int, probe_cfg: Mapping) -> int:
        """Logits per token, for the estimate of the memory a stack takes."""
        return n_tokens

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Loss [S, L] of every fit, mean over the batch."""
        raise NotImplementedError

    def scorer(self, sample: PatchSample, n_layers: int) -> "Scorer":
        """Collects the scores of every image of a sample."""
        return Scorer(self, sample, n_layers)

    def combine(self, found: Sequence[list[Scores]], sample: PatchSample) -> list[Scores]:
        """The task's scores from those of its parts."""
        return found[0]

    def illustrate(self, scored: Any, stacks: Sequence[Sequence[Probe]], sample: PatchSample, run: Any) -> None:
        """Draw what only the fitted probes can show."""

    def table(self, summary: Sequence[Any], counts: Tensor) -> str | None:
        """The terminal's table, where it is not the usual one (`report.table`)."""
        return None

    def pair_scores(self, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Read-out name and pair scores [S, L, B, T, T] in [0, 1] of pointwise logits [S, L, B, T, K].

        Args:
            logits: of a probe of this task.
        """
        yield "inner_product", agreement(logits, "inner")
        yield "argmax", agreement(logits, "argmax")


class Pairwise(Task):
    """IsSameObject from two tokens; one fit sees all pairs, where the protocol says so another only pairs on objects.

    The fit on all pairs mostly learns figure against ground and says little about pairs inside the foreground, so the
    blocks inside the foreground are scored with the fit that saw only those.
    """

    kind = "pairwise"

    def __init__(self, cfg: DictConfig, seeds: Sequence[int] | None = None) -> None:
        super().__init__(cfg, seeds)
        accuracies = {"upper": "accuracy", "upper_diagonal": "accuracy_upper_diagonal", "all": "accuracy_all"}
        pairs = cfg.protocol.pairs
        for key, value in (("accuracy", pairs.accuracy), ("loss", pairs.loss)):
            if value not in accuracies:
                raise UserError(f"unknown protocol.pairs.{key} '{value}'; valid: {', '.join(accuracies)}")
        self.columns = [
            ("is_same_object", "logit", "all", "auroc", "all pairs AUROC"),
            ("is_same_object", "logit", "all", accuracies[pairs.accuracy], "all pairs accuracy"),
            ("is_same_object", "logit", "foreground", "auroc", "foreground AUROC"),
            ("is_same_object", "logit", "same_class_matched", "auroc", "same class, matched AUROC"),
        ]
        self.stack = [StackEntry(seed, variant) for variant in pairs.fit for seed in self.seeds]
        unknown = {entry.variant for entry in self.stack} - {"all", "foreground"}
        if unknown:
            raise UserError(f"protocol.pairs.fit names '{unknown.pop()}'; valid: all, foreground")
        if cfg.probe.mode == "attention":  # said here, not after an extraction
            depth = backbone_facts(cfg.model).depth
            layers = resolve_layers(cfg.model.layers, depth)
            if depth - 1 in layers:
                taken = [layer for layer in layers if layer != depth - 1] or ["embed"]
                raise UserError(
                    f"probe.mode=attention reads with the block after each layer and no block comes after layer {depth - 1}; "
                    f"set model.layers=[{','.join(map(str, taken))}]"
                )

    def build_probe(self, probe_cfg: Mapping, sample: PatchSample, layers: Sequence, **given: Any) -> Probe:
        """A stack of pair probes; the attention probe is given the frozen projections of the block after each layer."""
        if probe_cfg["mode"] == "attention":
            backbone = load_backbone(sample.meta["model"], torch.device("cpu"))
            given["projections"] = {layer: Projections(*next_block_query_key(backbone, layer)) for layer in layers}
        return super().build_probe(probe_cfg, sample, layers, **given)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean binary cross-entropy [S, L] over the protocol's pairs (`protocol.pairs.loss`)."""
        parts, n_seeds, pairs = [], len(self.seeds), self.cfg.protocol.pairs.loss
        identity, valid = batch.labels["identity"], batch.labels["valid"]
        same = identity[:, :, None] == identity[:, None, :]
        for first in range(0, len(self.stack), n_seeds):
            foreground = self.stack[first].variant == "foreground"
            used = valid & (identity > 0) if foreground else valid
            parts.append(pair_bce(logits[first : first + n_seeds], same, pairs=pairs, valid=used))
        return torch.cat(parts)

    def pair_scores(self, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The logits themselves are the scores."""
        yield "logit", logits


class Class(Task):
    """The class of a patch by a linear read-out; 0 (background, unlabelled) is a class like any other."""

    columns = [*Task.columns, ("class", "argmax", "patches", "accuracy", "class accuracy")]

    def build_probe(self, probe_cfg: Mapping, sample: PatchSample, layers: Sequence, **given: Any) -> Probe:
        """A stack with one output per class of the data set."""
        return super().build_probe(probe_cfg, sample, layers, n_classes=len(sample.meta["classes"]), **given)

    def refuse(self, probe: Probe, sample: PatchSample) -> None:
        """Also refuse a data set of other classes."""
        super().refuse(probe, sample)
        fitted, found = probe.facts["classes"], list(sample.meta["classes"])
        if fitted != found:
            raise UserError(
                f"the checkpoint names {len(fitted) - 1} classes ({', '.join(fitted[1:4])} …), these images have "
                f"{len(found) - 1} ({', '.join(found[1:4])} …); score it on data of the same classes"
            )

    def outputs_per_token(self, sample: PatchSample, n_tokens: int, probe_cfg: Mapping) -> int:
        """Pair scores outweigh the classes."""
        return 2 * n_tokens

    def check(self, samples: Mapping[str, PatchSample]) -> None:
        """Also refuse data without class maps."""
        super().check(samples)
        for split, sample in samples.items():
            if not bool((sample.labels["class"] > 0).any()):
                raise UserError(f"split {split} carries no class labels; mode={self.cfg.mode} needs class maps")

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy [S, L], mean over valid patches."""
        return class_loss(logits, batch.labels["class"], valid=batch.labels["valid"])


class Identity(Task):
    """Which object of its image a patch belongs to, by mask queries matched to objects."""

    def outputs_per_token(self, sample: PatchSample, n_tokens: int, probe_cfg: Mapping) -> int:
        """Queries and pair scores."""
        return 2 * n_tokens + int(probe_cfg["n_queries"])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Matched dice and binary cross-entropy [S, L]; 0 for a batch without an object."""
        return identity_loss(logits, batch.labels["identity"], valid=batch.labels["valid"])


TASKS = {
    "pairwise": "tasks.Pairwise",
    "class": "tasks.Class",
    "identity": "tasks.Identity",
    "binding": "binding.Binding",
}


def find_task(name: str) -> type[Task]:
    """The class behind the name of a task (`TASKS`); a name, so that a task may live in a module above this one."""
    module, _, task = TASKS[name].rpartition(".")
    return getattr(importlib.import_module(module), task)


class Scorer:
    """Collects per-image scores batch by batch and turns them into blocks; the one place where scores are summed."""

    def __init__(self, task: Task, sample: PatchSample, n_layers: int) -> None:
        self.task = task
        n_images, n_tokens = sample.position.shape[:2]
        rows = task.visited_tokens(n_images, n_tokens, None)
        pick = lambda x: x if rows is None else x.gather(1, rows)
        labels = {name: pick(sample.labels[name]) for name in ("identity", "class", "valid")}
        place = sample.labels["place"] if rows is None else sample.labels["place"].gather(1, rows[..., None].expand(-1, -1, 2))
        place = torch.cat([torch.zeros_like(place[..., :1]), place], -1)  # one frame: distances reach across windows
        strata = {"is_same_object": pair_strata(labels["identity"], labels["class"], labels["valid"], place)}
        if task.kind == "pointwise":
            # "Same class" asked as if every class were one object: background stays background.
            strata["same_class"] = pair_strata(labels["class"], None, labels["valid"], place)
        n_seeds = len(task.seeds)
        variants = list(dict.fromkeys(entry.variant for entry in task.stack))
        self.parts: dict[tuple[str, str, str], PairScores] = {}
        self.slices = {v: slice(i * n_seeds, (i + 1) * n_seeds) for i, v in enumerate(variants)}
        self.new = lambda question, readout: PairScores(
            strata[question], n_seeds * n_layers, threshold=0.0 if readout == "logit" else 0.5
        )
        self.questions = list(strata)
        self.labels = labels
        self.right: list[Tensor] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in the logits of a batch of images."""
        for readout, scores in self.task.pair_scores(logits):
            self.add_pairs(batch, readout, scores)
        if self.task.kind == "pointwise" and isinstance(self.task, Class):
            hit = (logits.argmax(-1) == batch.labels["class"]) & batch.labels["valid"]
            self.right.append(hit.sum(-1).flatten(0, 1).cpu())  # [S * L, B]

    def add_pairs(self, batch: Batch, readout: str, scores: Tensor) -> None:
        """Take in pair scores [S, L, B, T, T]: of a read-out, or made from labels alone."""
        for question in self.questions:
            for variant, part in self.slices.items():
                key = (question, readout, variant)
                if key not in self.parts:
                    self.parts[key] = self.new(question, readout)
                self.parts[key].add(batch.images, scores[part])

    def finish(self) -> list[Scores]:
        """Every block of every question, each from the fit that was made for it."""
        found = []
        for (question, readout, variant), part in self.parts.items():
            names = ["all", "foreground", "same_class", "same_class_matched"]
            if len(self.slices) > 1:
                names = names[1:] if variant == "foreground" else names[:1]
            if question == "same_class":  # the blocks inside a class are empty by construction
                names = [name for name in names if not name.startswith("same_class")]
            for block, scored in part.evaluate(names).items():
                found.append(Scores(question, readout, block, scored.metrics, scored.counts, scored.distance))
        if self.right:
            asked = self.labels["valid"].sum(1)  # [M]; an image may have none
            accuracy = ratio_estimate(torch.cat(self.right, 1), asked)
            counts = {"n_patches": int(asked.sum()), "n_images": int((asked > 0).sum())}
            found.append(Scores("class", "argmax", "patches", {"accuracy": accuracy}, counts, []))
        return found
