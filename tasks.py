"""The contract of a question: what a probe is asked, and the numbers that come back.

    Task           fits, a probe, batches, logits, a loss, a collector: all the loop needs of a question
    SubsetResult   the exact numbers of one subset, with the influence of every image on each
    ProbeResult    those of a probe or of a control, all layers in order
    TASKS          every task by name: a class in the module that asks it

A task knows numbers only: no table, figure, file name or terminal. The module that a mode names as `entry` composes: it
opens the samples, has probes and controls fitted and scored (`trainer.probe`), then shows and writes.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from activation import PatchSample
from errors import UserError
from machine import even_parts
from metrics.bootstrap import Estimate, mean_over_seeds
from metrics.convergence import Convergence
from probes import PROBES, Probe, options_of

# Evaluation draws the tokens of a visit with this seed, so that every probe, layer and epoch is judged on the same ones.
VISIT_SEED = 0
CPU_STACK = 18  # fits; on a processor a larger stack is no faster per fit (measured), and a smaller one stops sooner
# The control that is a task of its own: no rival explanation of a score, so no claim waits for it.
CONTROL_TASK = "shuffled"


class Fit(NamedTuple):
    """One entry of the first stacked axis: which pairs or labels its loss sees, and the seed of its weights."""

    variant: str
    seed: int


class Batch(NamedTuple):
    """A batch of B images: which they are, which of their tokens are looked at, and their labels [B, T]."""

    images: Tensor  # [B] int64
    visited: Tensor | None  # [B, T'] int64 tokens of this visit; None: all
    labels: dict[str, Tensor]

    def tokens(self, sample: PatchSample, layer_rows: Sequence[int], device: torch.device) -> Tensor:
        """Activations [L, B, T, D] float32 of the layers in these rows of the sample."""
        x = sample.tokens.gather(self.images, list(layer_rows))  # [L, B, T, D]
        if self.visited is not None:
            x = x.gather(2, self.visited[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[-1]))
        return x.to(device, non_blocking=True)

    def to(self, device: torch.device) -> "Batch":
        """The same batch with its labels on a device."""
        return self._replace(labels={k: v.to(device, non_blocking=True) for k, v in self.labels.items()})


class SubsetResult(NamedTuple):
    """The numbers of one subset of one question for the fits [seeds × layers], seed first.

    question: is_same_object, same_class, class, binding … readout: how an answer is read from the logits.
    subset: which pairs, patches or images were asked. counts: how many. distance: AUROC by distance of the patches.
    notes: what every record of the subset states beside its numbers. bounds: where an interval may end.
    over_seeds: intervals of the mean resample the seeds too. per_image: scores of the images by themselves, "auroc"
    [S * L, M] (nan where undefined), "n_pairs" and "n_positive" [M]. variant: of the fits that answered; "": all of them did.
    """

    question: str
    readout: str
    subset: str
    metrics: dict[str, Estimate]
    counts: dict[str, int]
    distance: list[dict[str, Any]]
    notes: Mapping[str, Any] = {}
    bounds: tuple[float, float] = (0.0, 1.0)
    over_seeds: bool = False
    per_image: Mapping[str, Tensor] = {}
    variant: str = ""


class FitReport(NamedTuple):
    """How one fit ended (`metrics.convergence`).

    part: which of several tasks of a row. epochs: how many it had; 0 of a fit that was solved for. best_epoch: the one
    that is kept. val_loss: its validation loss. epochs_needed: those that would do, 0 where that cannot be known.
    """

    part: str
    variant: str
    seed: int
    layer: int | str
    epochs: int
    best_epoch: int
    val_loss: float | None
    still_falling: bool
    epochs_needed: int
    worse_than_constant: bool


class ProbeResult(NamedTuple):
    """What a probe or a control answered: all layers in order, every subset.

    row: which row of the run, "probe" where it has one. control: which control of that row; "" for the probe itself.
    name: both in one word, as records, checkpoints and figures call it.
    validation: what layers are chosen by: the mean over seeds on the validation split, per layer, of every metric by
        (question, readout, subset, metric). None: no layer is chosen.
    n_train: images the probe was fitted on, where that is known. keys: names of the M scored images.
    folds: the results this one is pooled from (`trainer.folds`); it has no validation scores of its own then.
    fits: how its fits ended, of every variant, seed and layer; none where nothing was fitted.
    fitted_in: the run its fits are taken over from (`runs.equal_fits`); "": they are of this run.
    """

    row: str
    control: str
    name: str
    layers: list[int | str]
    seeds: list[int]
    subsets: list[SubsetResult]
    validation: Mapping[tuple[str, str, str, str], list[float]] | None = None
    n_train: int | None = None
    keys: Sequence[str] = ()
    folds: "Sequence[Fold]" = ()
    fits: Sequence[FitReport] = ()
    fitted_in: str = ""


class Fold(NamedTuple):
    """The result of one fold, and which of all images it tested."""

    images: Tensor  # [m] int64
    result: ProbeResult


def mean_scores(result: ProbeResult) -> dict[tuple[str, str, str, str], list[float]]:
    """The mean over seeds of every metric by (question, readout, subset, metric), a value per layer."""
    return {
        (subset.question, subset.readout, subset.subset, metric): mean_over_seeds(e, len(result.seeds)).value.tolist()
        for subset in result.subsets
        for metric, e in subset.metrics.items()
    }


def concatenate(chunks: Sequence[SubsetResult], n_seeds: int) -> SubsetResult:
    """Join the layers of the chunks of one stack: fits [seeds × layers] of each to fits of all layers, seed first."""
    if len(chunks) == 1:
        return chunks[0]

    def stack(fields: Sequence[Tensor]) -> Tensor:
        return torch.cat([field.unflatten(0, (n_seeds, -1)) for field in fields], 1).flatten(0, 1)

    def join(estimates: Sequence[Estimate]) -> Estimate:
        return Estimate(*(stack(fields) for fields in zip(*estimates, strict=True)))

    metrics = {key: join([c.metrics[key] for c in chunks]) for key in chunks[0].metrics}
    distance = [{**row, "auroc": join([c.distance[i]["auroc"] for c in chunks])} for i, row in enumerate(chunks[0].distance)]
    per_image = {key: stack([c.per_image[key] for c in chunks]) if x.ndim > 1 else x for key, x in chunks[0].per_image.items()}
    return chunks[0]._replace(metrics=metrics, distance=distance, per_image=per_image)


class Collector(Protocol):
    """Takes in the logits of batch after batch and turns them into results, in one place: no mean of batch means."""

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in the logits of a batch, with the leading axes [S, L, B]."""

    def results(self) -> list[SubsetResult]:
        """The numbers of every subset."""


def ending(verdict: Convergence, epochs: Tensor, best_epoch: Tensor, best: Tensor) -> dict[str, Any]:
    """How the fits [S, L] of a stack ended, as its checkpoint says it."""
    return {
        "epochs": epochs.tolist(), "best_epoch": best_epoch.tolist(), "val_loss": best.tolist(),
        "still_falling": verdict.still_falling.tolist(), "epochs_needed": verdict.epochs.tolist(),
        "worse_than_constant": verdict.worse_than_constant.tolist(),
    }  # fmt: skip


def fit_reports(task: "Task", probe: Probe, part: str) -> Iterator[FitReport]:
    """How each fit of a stack ended; nothing of one that was not fitted, or by the version before this one."""
    if "still_falling" not in probe.facts:
        return
    for s, of_fit in enumerate(task.fits()):
        for i, layer in enumerate(probe.layers):
            numbers = {key: probe.facts[key][s][i] for key in FitReport._fields[4:]}
            yield FitReport(part, of_fit.variant, of_fit.seed, layer, **numbers)


class Task:
    """What a probe is asked. A new task overrides what differs; these ten members are all the loop knows of it.

    Args:
        seeds: of the fits.
        variants: what the losses of a seed's fits see; a task gives them their meaning.
        per_visit: tokens of an image looked at in one visit; None: all.
    """

    labels: tuple[str, ...] = ()  # of the index, in a batch
    probes: Mapping[str, type[Probe]] = PROBES  # what probe.mode chooses from

    def __init__(self, seeds: Sequence[int], variants: Sequence[str] = ("all",), per_visit: int | None = None) -> None:
        self.seeds, self.variants, self.per_visit = list(seeds), list(variants), per_visit

    def fits(self) -> list[Fit]:
        """The entries of the first stacked axis, variant by variant."""
        return [Fit(variant, seed) for variant in self.variants for seed in self.seeds]

    def build_probe(self, probe_cfg: Mapping[str, Any], sample: PatchSample, layers: Sequence) -> Probe:
        """A fresh stack of probes for some layers of a sample."""
        raise NotImplementedError(f"{type(self).__name__}.build_probe")

    def batches(self, sample: PatchSample, batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """Batches of images: shuffled by a generator for training, in order and with fixed tokens without one."""
        n_images, n_tokens = sample.position.shape[:2]
        order = torch.arange(n_images) if generator is None else torch.randperm(n_images, generator=generator)
        visited = visited_tokens(n_images, n_tokens, self.per_visit, generator)  # [M, T']
        for images in order.split(batch_size):
            rows = None if visited is None else visited[images]  # [B, T']
            labels = {name: sample.labels[name][images] for name in self.labels}
            if rows is not None:
                labels = {name: value.gather(1, rows) for name, value in labels.items()}
            yield Batch(images, rows, labels)

    def logits(self, probe: Probe, x: Tensor, batch: Batch) -> Tensor:
        """What the probe answers to activations x [L, B, T, D] of a batch, [S, L, B, …]."""
        return probe(x)

    def loss(self, probe: Probe, x: Tensor, batch: Batch, running: Tensor | None = None) -> Tensor:
        """Loss [S, L] of every fit on activations x [L, B, T, D], mean over the batch.

        Only that of the fits `running`, bool [S, L], is wanted; a task may save the work of the others and answer 0.
        """
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def constant(self, train: PatchSample) -> Tensor:
        """The logits of the best answer that looks at nothing, from the base rates of a split: [S] or [S, K]."""
        raise NotImplementedError(f"{type(self).__name__}.constant")

    def solve(self, probe: Probe, batches: Callable[[], Iterator[tuple[Tensor, Batch]]]) -> dict[str, Any]:
        """Set a probe that declares `solver = "newton"` to the optimum of its loss over a split.

        Args:
            batches: makes a fresh pass over the split, activations x [L, B, T, D] and batch.

        Returns:
            what the history records of it.
        """
        raise NotImplementedError(f"{type(self).__name__}.solve")

    def prediction(self, logits: Tensor) -> Tensor:
        """What of the logits [S, L, B, …] is written where predictions are asked for (`eval.predictions`)."""
        return logits

    def collector(self, sample: PatchSample, n_layers: int, detail: bool = True) -> Collector:
        """Collects the answers to all images of a sample; `detail`: also what the choice of a layer does not need."""
        raise NotImplementedError(f"{type(self).__name__}.collector")


def visited_tokens(n_images: int, n_tokens: int, per_visit: int | None, generator: torch.Generator | None) -> Tensor | None:
    """The tokens [M, T'] looked at in this pass where a protocol keeps more than it looks at; None: all.

    Training draws them anew every epoch; evaluation (no generator) always looks at the same ones.
    """
    if per_visit is None or per_visit >= n_tokens:
        return None
    generator = torch.Generator().manual_seed(VISIT_SEED) if generator is None else generator
    return torch.rand(n_images, n_tokens, generator=generator).argsort(1)[:, :per_visit]


def read_seeds(seeds: Any) -> list[int]:
    """The seeds behind `trainer.seeds`: a number n means 0 … n - 1, a list names them.

    Raises:
        UserError: none, or one twice.
    """
    listed = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not listed:
        raise UserError(f"trainer.seeds is {seeds}, expected a number of at least 1 or a list of seeds")
    if len(set(listed)) < len(listed):
        raise UserError(f"trainer.seeds names a seed twice, got {listed}; the fits of one seed are equal")
    return listed


def stack_bytes(task: Task, probe_cfg: Mapping[str, Any], sample: PatchSample, batch_images: int) -> tuple[int, int]:
    """About how many bytes one layer of a stack takes while it is fitted: what all fits share, and all fits together.

    Shared are the tokens of a batch; each fit has its own copy of them, its logits and five copies of its weights.
    """
    dim = sample.tokens.shape[-1]
    batch = next(task.batches(sample, batch_images, None))
    n_tokens = sample.tokens.shape[2] if batch.visited is None else batch.visited.shape[1]
    alone, n_fits = task.build_probe(probe_cfg, sample, sample.tokens.layers[:1]), len(task.fits())
    tokens = batch_images * n_tokens * dim * 4
    logits = batch_images * n_tokens * alone.outputs_per_token(n_tokens) * 4 * 4
    return tokens, n_fits * (tokens + logits) + 5 * 4 * alone.n_parameters


class Chunk(NamedTuple):
    """Some layers of a stack that are fitted together, and about how many bytes that takes."""

    layers: Sequence[int | str]
    nbytes: int


def stack_chunks(
    task: Task, probe_cfg: Mapping[str, Any], sample: PatchSample, batch_images: int, most_bytes: float, on_processor: bool
) -> list[Chunk]:  # fmt: skip
    """The layers of a sample in the chunks they are fitted in, at least one layer each.

    Args:
        most_bytes: what a chunk may take. on_processor: none has more than `CPU_STACK` fits then.
    """
    each = sum(stack_bytes(task, probe_cfg, sample, batch_images))
    most = min(most_bytes // each, CPU_STACK // len(task.fits()) if on_processor else math.inf)
    return [Chunk(layers, each * len(layers)) for layers in even_parts(list(sample.tokens.layers), max(1, int(most)))]


def check_rank(settings: Mapping[str, Any], table: Mapping[str, type[Probe]], dim: int) -> None:
    """Refuse a probe of more rank than its tokens have channels: a form of that many channels has no more.

    Raises:
        UserError: naming the largest rank.
    """
    if "rank" in options_of(table[settings["mode"]]) and settings["rank"] > dim:
        raise UserError(f"probe.rank={settings['rank']} and tokens have {dim} channels; at most probe.rank={dim} fits")


def check_stack(
    build_task: Callable[[Sequence[int]], Task],
    seeds: Sequence[int],
    probe_cfg: Mapping[str, Any],
    sample: PatchSample,
    batch_images: int,
    free: int,
) -> None:
    """Refuse fits that do not fit in memory one layer at a time.

    Args:
        build_task: the task with some seeds.
        sample: the training split; its tokens may be planned only.
        free: bytes of memory.

    Raises:
        UserError: naming the largest value that fits.
    """
    one = build_task(seeds[:1])
    shared, each = stack_bytes(one, probe_cfg, sample, batch_images)
    needed = shared + each * len(seeds)
    if needed <= free:
        return
    most, gb = (free - shared) // each, f"about {needed / 1e9:.3g} GB of memory a layer ({free / 1e9:.3g} GB are free)"
    if most >= 1:
        raise UserError(f"the fits of trainer.seeds={len(seeds)} take {gb}; at most trainer.seeds={most} fits")
    images = max(1, int(batch_images * free / (shared + each)))
    patches = int(sample.tokens.shape[2] * (free / (shared + each)) ** 0.5)  # pairs grow with their square
    raise UserError(
        f"one seed takes {gb}; at most about trainer.batch_images={images} fits, or protocol.selection.patches={patches} with "
        f"trainer.batch_images={batch_images}"
    )


TASKS = {
    "pairwise": "pairs.task.Pairwise",
    "class": "pairs.task.ClassReadout",
    "identity": "pairs.task.IdentityReadout",
    "binding": "binding.task.Code",
}


def find_task(name: str) -> type[Task]:
    """The class behind the name of a task (`TASKS`); by name, so that a task may live in a module above this one."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'; valid: {', '.join(TASKS)}")
    module, _, task = TASKS[name].rpartition(".")
    return getattr(importlib.import_module(module), task)


def find_question(name: str) -> ModuleType:
    """The module that asks a task; it offers `check(cfg)`, `run(cfg, run)`, `run_eval(fitted, cfg, run)`."""
    return sys.modules[find_task(name).__module__]
