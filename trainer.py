"""The one probe loop: every layer and every seed of a probe is fitted in one stacked pass over cached activations.

    probe       fit a stack (or take it up where it stopped) and score it: results of a probe or a control
    fit         AdamW or Adam on a stack of probes (or Newton's method), validation selection per fit, exact resume
    evaluate    the answers of a stack to a split, collected in one place

Law of the stack (tested): a fit alone and the same fit in a stack give the same numbers, because every fit draws its
weights from its own generator, all share the order of the batches, the loss is a sum over fits and Adam is element-wise.

Shapes: S fits of a layer (variants × seeds), L layers, B images, T tokens, D width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from activation import PatchSample, made_by, token_correlation, token_statistics
from controls import Subject, constant_loss, control_names, fit_digest
from errors import UserError
from machine import choose_device, keep_freed_memory, set_threads
from metrics.convergence import judge, solved
from options import named
from probes import Probe, load_probe
from runs.adopt import adopt
from runs.equal_fits import take_over
from runs.finished import check_fit
from runs.fit_ahead import Job, fits_ahead
from runs.fit_state import Progress, Weights, build_optimizer, load_fit, save_fit
from runs.progress import count, track
from runs.provenance import made_with
from runs.run import Run, checkpoint_files, checkpoint_path, identify, read_config, read_facts
from runs.signals import stop_later
from runs.validity import refuse_other_use
from tasks import Batch, Chunk, ProbeResult, Task, concatenate, ending, find_question, fit_reports, mean_scores, stack_chunks

OPTIMIZERS = ("adamw", "adam")
CHECKPOINTS = ("best", "last")
SCHEDULES = ("constant", "inverse_sqrt", "linear", "cosine", "step")
BATCH_ORDER = 100_003  # a prime: the seeds of the batch order of two runs (cfg.seed) meet in no epoch


@dataclass(frozen=True)
class FitOptions:
    """How stacks are fitted: the `trainer` section, the seed of the batch order, the device."""

    epochs: int  # at most
    patience: int | None  # epochs without a gain after which a fit is stopped; None: never
    averaging: float | None  # `runs.fit_state.Weights`
    batch_images: int
    optimizer: str
    lr: float
    lr_width: int | None  # channels of a token up to which `lr` holds
    beta2: float  # how much of the mean square gradient of the steps before is kept
    weight_decay: float
    schedule: str
    step_size: int  # epochs
    gamma: float
    stack_gb: float  # of one stack
    checkpoint_seconds: float
    seed: int
    device: torch.device
    processes: int  # that fit side by side, at most

    @classmethod
    def read(cls, cfg: DictConfig) -> "FitOptions":
        """Read them, and refuse what would otherwise be refused only after an extraction.

        Raises:
            UserError: the device is not there; an unknown control, schedule or optimizer; a patience below 1.
        """
        trainer = cfg.trainer
        control_names(cfg.controls)
        for key, valid in (("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)):
            if trainer[key] not in valid:
                raise UserError(f"unknown trainer.{key} '{trainer[key]}'; valid: {', '.join(valid)}")
        for key, least, what in (("patience", 1, " of epochs"), ("lr_width", 1, " of channels"), ("averaging", 0, "")):
            if trainer[key] is not None and not trainer[key] >= least:
                raise UserError(f"trainer.{key} is {trainer[key]}; expected a number{what} of at least {least}, or null")
        if not 0 <= trainer.beta2 < 1:
            raise UserError(f"trainer.beta2 is {trainer.beta2}; expected a number from 0 to below 1")
        set_threads(int(cfg.threads or 0))
        keep_freed_memory()
        device = choose_device(cfg.device)
        return cls(
            epochs=int(trainer.epochs),
            patience=None if trainer.patience is None else int(trainer.patience),
            averaging=None if trainer.averaging is None else float(trainer.averaging),
            batch_images=int(trainer.batch_images),
            optimizer=trainer.optimizer,
            lr=float(trainer.lr),
            lr_width=None if trainer.lr_width is None else int(trainer.lr_width),
            beta2=float(trainer.beta2),
            weight_decay=float(trainer.weight_decay),
            schedule=trainer.schedule,
            step_size=int(trainer.step_size),
            gamma=float(trainer.gamma),
            stack_gb=float(trainer.stack_gb),
            checkpoint_seconds=float(trainer.checkpoint_seconds),
            seed=int(cfg.seed),
            device=device,
            processes=int(cfg.processes or torch.get_num_threads()) if device.type == "cpu" else 1,
        )

    def learning_rate(self, epoch: float, dim: int) -> float:
        """Learning rate at a (fractional) epoch for tokens of D channels; beyond `lr_width` it falls as 1 / sqrt(D).

        constant; inverse_sqrt: falling as 1 / sqrt(1 + epoch / 2), whatever the number of epochs (2: chosen on validation of
        the default run); linear or cosine: to zero at the last epoch; step: a drop every `step_size` epochs.
        """
        share = min(epoch / self.epochs, 1.0)
        lr = self.lr if self.lr_width is None else self.lr * min(1.0, self.lr_width / dim) ** 0.5
        return lr * {
            "constant": 1.0,
            "inverse_sqrt": (1.0 + epoch / 2) ** -0.5,
            "linear": 1.0 - share,
            "cosine": 0.5 * (1 + math.cos(math.pi * share)),
            "step": self.gamma ** (int(epoch) // self.step_size),
        }[self.schedule]


def probe(run: Run, task: Task, subject: Subject, options: FitOptions, *, split: str = "test") -> ProbeResult:
    """Fit a probe or a control on every layer and score it on a split; fits that are complete already are only read.

    The validation split is scored too, for layers are chosen on it; a control of one layer has nothing to choose.
    """
    stack = fit_stack(run, task, subject, options)
    result = evaluate(task, stack, subject, options, split=split)
    if subject.control and len(result.layers) == 1:
        return result
    return result._replace(validation=mean_scores(evaluate(task, stack, subject, options, split="val", detail=False)))


def ahead(run: Run, fits: Sequence[tuple[Task, Subject]], options: FitOptions) -> AbstractContextManager[None]:
    """Begin these fits side by side where that is faster; inside the context `fit_stack` waits for the one it comes to."""
    jobs = []
    for task, subject in fits:
        train = subject.samples["train"]
        for number, chunk in enumerate(_chunks(task, subject, options) if subject.build is None else []):
            if checkpoint_path(run.dir, subject.name, f"best.{number:02d}").exists():
                continue
            for split in ("train", "val"):  # here, so that the processes share them
                subject.samples[split].tokens.preload()
            cost = float(len(task.fits()) * len(chunk.layers) * math.prod(train.tokens.shape[1:]) * options.epochs)
            work = partial(_fit_chunk, run, task, subject, options, chunk.layers, number)
            jobs.append(Job(f"{subject.name} {number}", work, cost, chunk.nbytes, options.epochs))
    return fits_ahead(run, jobs, options.processes)


def fit_stack(run: Run, task: Task, subject: Subject, options: FitOptions) -> list[Probe]:
    """Fit a probe on every layer of a sample; the stack is cut by layers where it would take more than `stack_gb`.

    Returns:
        one probe per chunk of layers, best validation parameters restored, covering all layers in order.
    """
    if subject.build is not None:  # nothing to fit
        train = subject.samples["train"]
        return [subject.build(task, train, list(train.tokens.layers)).to(options.device)]
    probes = []
    for number, chunk in enumerate(_chunks(task, subject, options)):
        if run.ahead is not None:
            run.ahead.wait(f"{subject.name} {number}")
        probes.append(_fit_chunk(run, task, subject, options, chunk.layers, number))
    return probes


def _chunks(task: Task, subject: Subject, options: FitOptions) -> list[Chunk]:
    on_processor, train = options.device.type == "cpu", subject.samples["train"]
    return stack_chunks(task, subject.probe, train, options.batch_images, options.stack_gb * 1e9, on_processor)


def _fit_chunk(run: Run, task: Task, subject: Subject, options: FitOptions, layers: Sequence, number: int) -> Probe:
    """Fit a probe on some layers; one that is complete is only read."""
    train = subject.samples["train"]
    last, best = (checkpoint_path(run.dir, subject.name, f"{which}.{number:02d}") for which in CHECKPOINTS[::-1])
    identity = identity_of(run, task, subject, layers, number)
    if not (last.exists() and best.exists()):  # best is written last: this fit is complete
        probe = task.build_probe(subject.probe, train, layers).to(options.device)
        if probe.needs_statistics:
            probe.set_statistics(*token_statistics(train, layers, options.batch_images))
        if probe.needs_correlation:
            probe.set_correlation(token_correlation(train, layers, options.batch_images))
        equal = fit_digest(subject, task, probe, vars(options), made_with(run.facts))
        probe.facts = {} if equal is None else {"equal": equal}
        if equal is None or not take_over(run, subject.name, number, equal, _fitted_on(train, identity)):
            return fit(probe, task, subject, options, run, number=number)
    return load_probe(best, task.probes, {"fit": identity, "which": "best"}).to(options.device)


def identity_of(run: Run, task: Task, subject: Subject, layers: Sequence, number: int) -> dict[str, Any]:
    """What a fit is, as its files say: a file of another fit in their place is refused."""
    metas = {split: subject.samples[split].meta for split in ("train", "val")}
    data = {split: {key: meta.get(key) for key in ("fingerprint", "index")} for split, meta in metas.items()}
    fits = [[fit.seed, fit.variant] for fit in task.fits()]
    name = f"{subject.name}/{number:02d}"
    return {"name": name, "layers": list(layers), "fits": fits, "data": data, "configuration": run.configuration}


def load_stack(directory: Path, name: str, which: str, task: Task, sample: PatchSample) -> list[Probe]:
    """The probes of a finished fit, in the chunks of layers they were fitted in.

    Raises:
        UserError: there are none, or the activations at hand are not those they were fitted on.
    """
    files = checkpoint_files(directory, name, which)
    probes = [load_probe(file, task.probes) for file in files]
    expected = [layer for probe in probes for layer in probe.layers]
    width = sample.tokens.shape[-1]
    fitted_on, weights = probes[0].facts.get("backbone"), sample.meta["facts"]["weights"]
    if fitted_on != weights:
        raise UserError(
            f"the checkpoint in {directory} was fitted on the backbone weights {fitted_on}, those at hand are {weights}; "
            "put the former back, or fit a probe on the latter"
        )
    if expected != list(sample.tokens.layers) or probes[0].dim != width:
        raise UserError(
            f"the checkpoint in {directory} holds layers {expected} of width {probes[0].dim}, the activations are layers "
            f"{list(sample.tokens.layers)} of width {width}; name the run that was fitted on this backbone with run=…"
        )
    for file, probe in zip(files, probes, strict=True):
        check_fit(file, probe.facts, directory, name)
        refuse_other_use(file, probe.facts.get("made_by"), made_by(sample.meta))
    return probes


def run_eval(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=eval: score a finished run's probes again, on any split or data set; its question says how.

    Model, protocol and probe are those of the run; the data set is the run's unless one is named on the command line.

    Raises:
        UserError: no such run or checkpoint, or the activations at hand are not those the probe was fitted on.
    """
    if cfg.eval.checkpoint not in CHECKPOINTS:
        raise UserError(f"unknown eval.checkpoint '{cfg.eval.checkpoint}'; valid: {', '.join(CHECKPOINTS)}")
    fitted = adopt(read_config(run.source), cfg, run.source)
    if "dataset" in named():
        run.identity["dataset"] = identify(cfg)["dataset"]
    return find_question(fitted.task).run_eval(fitted, cfg, run)


def rests_on_run(run: Run, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What numbers of a run that scores another one rest on: the activations, and that run with what it was fitted on."""
    return {**inputs, "run": run.source.name, "fitted on": read_facts(run.source).get("inputs")}


def fit(probe: Probe, task: Task, subject: Subject, options: FitOptions, run: Run, *, number: int = 0) -> Probe:
    """Fit a stack of probes and restore, for every fit by itself, the epoch with the lowest validation loss.

    With `options.patience` a fit is stopped that gained nothing for so many epochs, and the stack when all of its fits are.
    A restart continues at the last saved epoch and ends with the same numbers: the order of the batches depends on
    (options.seed, epoch) alone.

    Args:
        probe: a stack with axes [S, L]; its `layers` say which layers of the samples it reads.
        subject: its samples, and its name for checkpoints and history.
        number: counts the chunks of one stack.

    Raises:
        UserError: a loss is not finite (layer, seed, epoch and learning rate are named).
    """
    name, train, val = subject.name, subject.samples["train"], subject.samples["val"]
    layer_rows = [list(train.tokens.layers).index(layer) for layer in probe.layers]
    if probe.solver == "newton":
        return _solve(probe, task, subject, layer_rows, options, run, number)
    state_file = checkpoint_path(run.dir, name, f"state.{number:02d}")
    identity = identity_of(run, task, subject, probe.layers, number)
    weights = Weights(probe, options.averaging)
    optimizer = build_optimizer(probe, options.optimizer, options.lr, options.beta2, options.weight_decay)
    progress = Progress.start(len(task.fits()), len(layer_rows))
    if state_file.exists():
        progress = load_fit(state_file, weights, optimizer, identity, options.epochs)
    save = lambda: save_fit(state_file, weights, optimizer, progress, identity)
    saved = time.monotonic()
    counted = count("fitting", options.epochs, "epoch", progress.epoch)
    with counted as step, stop_later() as stopping:  # a signal waits for the end of a batch, then the state is saved
        while not (progress.epoch == options.epochs or progress.stopped.all()):
            progress, rate, complete = _fit_epoch(
                task, train, layer_rows, weights, optimizer, options, progress, name, stopping
            )
            if not complete:
                save()
                break
            train_loss = torch.where(progress.stopped, torch.nan, progress.total / progress.n_images)
            with weights.averaged():
                val_loss = mean_loss(  # [S, L]
                    probe, task, val, layer_rows, options.batch_images, options.device, running=~progress.stopped
                )
            weights.keep_better(~progress.stopped & (val_loss < progress.best))
            progress = progress.after_epoch(val_loss, options.patience)
            weights.rest(progress.stopped)
            run.write(
                {"kind": "epoch", "name": name, "row": subject.row, "control": subject.control, "part": subject.part,
                 "layer": str(probe.layers), "epoch": progress.epoch, "learning_rate": rate,
                 "fits": [[fit.variant, fit.seed] for fit in task.fits()],
                 "train_loss": train_loss.tolist(), "val_loss": progress.curve[-1].tolist()},
                file="history.jsonl",
            )  # fmt: skip
            step.update(note=f"loss {progress.curve[-1].nanmean():.4f}")
            ended = progress.epoch == options.epochs or bool(progress.stopped.all())
            if stopping() or time.monotonic() - saved > options.checkpoint_seconds or ended:
                save()
                saved = time.monotonic()
            if stopping():
                break
    weights.restore(weights.average)
    epochs = (progress.curve == progress.curve).sum(0)  # [S, L]
    verdict = judge(progress.curve, constant_loss(task, subject.samples, options.batch_images))
    probe.facts |= _fitted_on(train, identity) | ending(verdict, epochs, progress.best_epoch, progress.best)
    _write_endings(run, task, probe, subject)
    probe.save(checkpoint_path(run.dir, name, f"last.{number:02d}"), **probe.facts, which="last")
    weights.restore(weights.best)
    probe.save(checkpoint_path(run.dir, name, f"best.{number:02d}"), **probe.facts, which="best")
    return probe


def _write_endings(run: Run, task: Task, probe: Probe, subject: Subject) -> None:
    """A record per fit of a stack: how it ended."""
    names = {"name": subject.name, "row": subject.row, "control": subject.control}
    for report in fit_reports(task, probe, subject.part):
        run.write({"kind": "fit", **names, **report._asdict()}, file="history.jsonl")


def _fitted_on(train: PatchSample, identity: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its fit and of the data it was fitted on."""
    weights, classes = train.meta.get("facts", {}).get("weights"), list(train.meta.get("classes", ()))
    return {"backbone": weights, "classes": classes, "fit": identity, "made_by": made_by(train.meta)}


def _solve(
    probe: Probe, task: Task, subject: Subject, layer_rows: Sequence[int], options: FitOptions, run: Run, number: int
) -> Probe:
    """Set a stack of probes to the optimum of its loss; nothing is drawn and nothing selected, so a restart repeats it."""
    train = subject.samples["train"]
    device, n_images = options.device, options.batch_images
    batches = lambda: ((b.tokens(train, layer_rows, device), b.to(device)) for b in task.batches(train, n_images, None))
    with torch.no_grad():
        notes = task.solve(probe, batches)
    val_loss = mean_loss(probe, task, subject.samples["val"], layer_rows, options.batch_images, options.device)  # [S, L]
    run.write(
        {"kind": "solution", "name": subject.name, "row": subject.row, "control": subject.control, "part": subject.part,
         "layer": str(probe.layers), **notes, "val_loss": val_loss.tolist()},
        file="history.jsonl",
    )  # fmt: skip
    facts, none = _fitted_on(train, identity_of(run, task, subject, probe.layers, number)), torch.zeros_like(val_loss).long()
    verdict = solved(torch.tensor(notes["converged"]), val_loss, constant_loss(task, subject.samples, options.batch_images))
    probe.facts |= facts | {key: notes[key] for key in ("solver", "converged")} | ending(verdict, none, none, val_loss)
    _write_endings(run, task, probe, subject)
    for which in ("last", "best"):
        probe.save(checkpoint_path(run.dir, subject.name, f"{which}.{number:02d}"), **probe.facts, which=which)
    return probe


def _fit_epoch(
    task: Task, train: PatchSample, layer_rows: Sequence[int], weights: Weights, optimizer: torch.optim.Optimizer,
    options: FitOptions, progress: Progress, name: str, stopping: Callable[[], bool],
) -> tuple[Progress, float, bool]:  # fmt: skip
    """The rest of a pass over the training images; the last learning rate, and whether the pass was not stopped."""
    # One generator per epoch: a restart needs no state of it.
    order = torch.Generator().manual_seed(options.seed * BATCH_ORDER + progress.epoch)
    batches, probe = list(task.batches(train, options.batch_images, order)), weights.probe
    running = (~progress.stopped).to(options.device)
    probe.train()
    for batch in batches[progress.step :]:
        rate = options.learning_rate(progress.epoch + progress.step / len(batches), probe.dim)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _loss(probe, task, train, layer_rows, batch, options.device, running)  # [S, L]
        loss = torch.where(running, loss, 0.0)  # no gradient for the fits that were stopped
        if not torch.isfinite(loss).all():
            s, layer = (int(i) for i in (~torch.isfinite(loss)).nonzero()[0])
            raise UserError(
                f"the loss is not finite (fit {name}, layer {probe.layers[layer]}, seed {task.fits()[s].seed}, epoch "
                f"{progress.epoch + 1}, learning rate {rate:.2g}); lower trainer.lr or set probe.standardize=true"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimizer.step()
        progress = progress.after_batch(loss.detach().cpu(), len(batch.images))
        weights.after_step(progress.epoch * len(batches) + progress.step)
        if stopping() and progress.step < len(batches):
            return progress, rate, False
    return progress, rate, True


def _loss(
    probe: Probe, task: Task, sample: PatchSample, layer_rows: Sequence[int], batch: Batch, device: torch.device,
    running: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Loss [S, L] of every fit on a batch; only that of the fits `running` [S, L] is wanted."""
    x, batch = batch.tokens(sample, layer_rows, device), batch.to(device)  # [L, B, T, D]
    return task.loss(probe, x, batch, running)


@torch.no_grad()
def mean_loss(
    probe: Probe, task: Task, sample: PatchSample, layer_rows: Sequence[int], batch_size: int, device: torch.device,
    running: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean loss over a sample, every image weighted equally, [S, L] on the CPU; only that of the fits `running` is wanted."""
    probe.eval()
    total, n_images, running = 0.0, 0, None if running is None else running.to(device)
    for batch in task.batches(sample, batch_size, None):
        loss = _loss(probe, task, sample, layer_rows, batch, device, running)
        total, n_images = total + loss.cpu() * len(batch.images), n_images + len(batch.images)
    return total / n_images


@torch.no_grad()
def evaluate(
    task: Task, probes: Sequence[Probe], subject: Subject, options: FitOptions, *, split: str, detail: bool = True,
    also: Callable[[Probe, Batch, Tensor], None] | None = None,
) -> ProbeResult:  # fmt: skip
    """The answers of a stack, in its chunks of layers, to a split of its samples.

    Args:
        detail: also what the choice of a layer does not need.
        also: gets every batch with its logits [S, L, B, …], chunk by chunk.
    """
    sample = subject.samples[split]
    chunks = []
    for probe in probes:
        probe.eval()
        layer_rows = [list(sample.tokens.layers).index(layer) for layer in probe.layers]
        collector = task.collector(sample, len(layer_rows), detail)
        batches = list(task.batches(sample, options.batch_images, None))
        for batch in track(batches, "scoring", "batch"):
            x, batch = batch.tokens(sample, layer_rows, options.device), batch.to(options.device)  # [L, B, T, D]
            logits = task.logits(probe, x, batch)
            collector.add(batch, logits)
            if also is not None:
                also(probe, batch, logits)
        chunks.append(collector.results())
    subsets = [concatenate(parts, len(subject.seeds)) for parts in zip(*chunks, strict=True)]
    layers = [layer for probe in probes for layer in probe.layers]
    n_train = len(subject.samples["train"].keys) if "train" in subject.samples else None
    seeds = list(subject.seeds)
    fits = [report for probe in probes for report in fit_reports(task, probe, subject.part)]
    result = ProbeResult(subject.row, subject.control, subject.title, layers, seeds, subsets, None, n_train, sample.keys)
    origins = dict.fromkeys(origin for probe in probes if (origin := probe.facts.get("fitted_in")))
    return result._replace(fits=fits, fitted_in=", ".join(origins))
