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
from errors import UserError
from metrics.bootstrap import Estimate
from probes import PROBES, Probe, build_probe


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
    figures = "pairs.layer_curve"  # the module whose write_layer_curve draws the scores
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
                "name the run it was fitted in with run=…"
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

    def scorer(self, sample: PatchSample, n_layers: int) -> Any:
        """Collects the scores of every image of a sample."""
        raise NotImplementedError

    def combine(self, found: Sequence[list[Scores]], sample: PatchSample) -> list[Scores]:
        """The task's scores from those of its parts."""
        return found[0]

    def illustrate(self, scored: Any, stacks: Sequence[Sequence[Probe]], sample: PatchSample, run: Any) -> None:
        """Draw what only the fitted probes can show."""

    def table(self, summary: Sequence[Any], counts: Tensor) -> str | None:
        """The terminal's table, where it is not the usual one (`report.table`)."""
        return None


TASKS = {
    "pairwise": "pairs.task.Pairwise",
    "class": "pairs.task.Class",
    "identity": "pairs.task.Identity",
    "binding": "binding.task.Binding",
}


def find_task(name: str) -> type[Task]:
    """The class behind the name of a task (`TASKS`); a name, so that a task may live in a module above this one."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'; valid: {', '.join(TASKS)}")
    module, _, task = TASKS[name].rpartition(".")
    return getattr(importlib.import_module(module), task)
