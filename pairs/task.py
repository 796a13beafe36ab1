"""Questions asked about patches: IsSameObject of two tokens, the class and the object of one.

pairwise   IsSameObject from the tokens of two patches (mode=train)
class      the class of every patch (mode=train_class); pairs are scored by how far two read-outs agree
identity   mask queries per image (mode=train_identity); pairs are scored the same way
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from activation import PatchSample
from backbones.attention import next_block_query_key
from backbones.load import backbone_facts, load_backbone, resolve_layers
from errors import UserError
from metrics.bootstrap import ratio_estimate
from pairs.losses import agreement, class_loss, identity_loss, pair_bce
from pairs.scores import PairScores, pair_strata
from probes import Probe, Projections
from tasks import Batch, Scores, StackEntry, Task


class PairScored(Task):
    """What the tasks share whose answers are scored on pairs of patches."""

    def scorer(self, sample: PatchSample, n_layers: int) -> "Scorer":
        """Collects the scores of every image of a sample."""
        return Scorer(self, sample, n_layers)

    def pair_scores(self, logits: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Read-out name and pair scores [S, L, B, T, T] in [0, 1] of pointwise logits [S, L, B, T, K].

        Args:
            logits: of a probe of this task.
        """
        yield "inner_product", agreement(logits, "inner")
        yield "argmax", agreement(logits, "argmax")


class Pairwise(PairScored):
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


class Class(PairScored):
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


class Identity(PairScored):
    """Which object of its image a patch belongs to, by mask queries matched to objects."""

    def outputs_per_token(self, sample: PatchSample, n_tokens: int, probe_cfg: Mapping) -> int:
        """Queries and pair scores."""
        return 2 * n_tokens + int(probe_cfg["n_queries"])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Matched dice and binary cross-entropy [S, L]; 0 for a batch without an object."""
        return identity_loss(logits, batch.labels["identity"], valid=batch.labels["valid"])


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
