"""The one probe loop: every layer and every seed of a probe is fitted in one stacked pass over cached activations.

    run        mode=train, train_class, train_identity, train_binding: open samples → fit → evaluate → controls →
               records, curve, table
    run_eval   mode=eval: score a finished run's checkpoint again, on any split or data set
    fit        AdamW or Adam on a stack of probes, validation selection per fit, exact resume
    evaluate   per-image scores of a stack, in one place

Law of the stack (tested): a fit alone and the same fit in a stack give the same numbers, because every fit draws its
weights from its own generator, all share the order of the batches, the loss is a sum over fits and Adam is element-wise.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

import options
from activation import PatchSample, open_sample
from controls import Control, build_controls, control_names, oracle_scores
from errors import UserError
from files import write_atomically
from machine import choose_device
from metrics.bootstrap import Estimate
from probes import Probe, load_probe
from runs.run import Run, checkpoint_files, checkpoint_path, identify, read_config, read_facts
from show.records import Scored, records
from show.tables import report
from tasks import Scores, Task, find_task

SPLITS = ("train", "val", "test")
OPTIMIZERS = ("adamw", "adam")
CHECKPOINTS = ("best", "last")


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Fit the task's probe on every layer, score it beside its controls, write and show the layer curve.

    Returns:
        {"objective": best layer's headline score (mean over seeds)}

    Raises:
        UserError: anything the user can mend, in one sentence.
    """
    device, kind = set_up(cfg), find_task(cfg.task)
    tasks = {name: kind(own) for name, own in kind.rows(cfg)}  # all of them first: a wrong setting costs no extraction
    opened: dict[str, dict[str, PatchSample]] = {}
    # Whole images first, here and for the controls: class and pooled tokens are then taken from what is stored.
    whole_first = sorted(tasks, key=lambda name: tasks[name].cfg.model.output_mode != "all")
    for name in whole_first:
        opened[name] = {split: open_sample(tasks[name].cfg, split, say=run.say) for split in SPLITS}
        tasks[name].check(opened[name])
    run.rest_on({name: {split: fingerprints(s) for split, s in samples.items()} for name, samples in opened.items()})
    next(iter(tasks.values())).introduce(opened[next(iter(tasks))], run)
    controls = {name: build_controls(tasks[name].cfg, opened[name], tasks[name].controls, run.say) for name in whole_first}
    summary: list[Scored] = []
    for name, task in tasks.items():
        own, samples, beside = task.cfg, opened.pop(name), controls.pop(name)
        if len(tasks) > 1:
            beside = [control._replace(name=f"{name}/{control.name}") for control in beside]
        for control in (Control(name, own.probe, samples), *beside):
            asked = task if control.seeds is None else kind(own, control.seeds)
            parts = asked.parts() if control.probe is not None else []
            stacks = [fit_stack(control, part, own, run, device) for part in parts]
            summary.append(score(control, stacks, asked, own, run, device, split="test"))
            if control.name == name:
                task.illustrate(summary[-1], stacks, samples["test"], run)
    return report(summary, task, cfg, run)


def run_eval(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Score a finished run's probes again: `run`, `eval.split`, `eval.checkpoint`, and any data set.

    Model, protocol and probe are those of the run; the data set is the run's own unless one is named on the command line.

    Raises:
        UserError: no such run or checkpoint, or the activations at hand are not those the probe was fitted on.
    """
    device = set_up(cfg)
    directory, split, which = run.source, cfg.eval.split, cfg.eval.checkpoint
    if which not in CHECKPOINTS:
        raise UserError(f"unknown eval.checkpoint '{which}'; valid: {', '.join(CHECKPOINTS)}")
    fitted = options.adopt(read_config(directory), cfg, directory)
    if "dataset" in options.named():
        run.identity["dataset"] = identify(cfg)["dataset"]
    kind, summary = find_task(fitted.task), []
    rows = [(name, own, open_sample(own, split, say=run.say)) for name, own in kind.rows(fitted)]
    inputs = {name: {split: fingerprints(sample)} for name, _, sample in rows}
    run.rest_on({**inputs, "run": directory.name, "fitted on": read_facts(directory).get("inputs")})
    for name, own, sample in rows:
        task = kind(own)
        stacks = [load_stack(directory, name, which, part, sample) for part in task.parts()]
        task.check({split: sample})
        run.say(f"scoring {directory} ({name}, {which}) on {split}")
        stacks = [[probe.to(device) for probe in stack] for stack in stacks]
        summary.append(score(Control(name, own.probe, {split: sample}), stacks, task, own, run, device, split=split))
    return report(summary, task, fitted, run)


def fingerprints(sample: PatchSample) -> dict[str, str]:
    """What tells these activations and labels from all others."""
    return {"activations": sample.meta["fingerprint"], "labels": sample.meta["index"]}


def load_stack(directory: Path, name: str, which: str, part: Task, sample: PatchSample) -> list[Probe]:
    """The probes of one part of a run, in the cuts they were fitted in.

    Raises:
        UserError: there are none, or the activations at hand are not those they were fitted on.
    """
    files = checkpoint_files(directory, part_name(name, part), which)
    probes = [load_probe(file, part.probes) for file in files]
    expected = [layer for probe in probes for layer in probe.layers]
    width = sample.tokens.shape[-1]
    made_on, weights = probes[0].facts.get("backbone"), sample.meta["facts"]["weights"]
    if made_on != weights:
        raise UserError(
            f"the checkpoint in {directory} was fitted on the backbone weights {made_on}, those at hand are {weights}; "
            "put the former back, or fit a probe on the latter"
        )
    if expected != list(sample.tokens.layers) or probes[0].dim != width:
        raise UserError(
            f"the checkpoint in {directory} holds layers {expected} of width {probes[0].dim}, the activations are layers "
            f"{list(sample.tokens.layers)} of width {width}; name the run that was fitted on this backbone with run=…"
        )
    part.refuse(probes[0], sample)
    return probes


def part_name(name: str, part: Task) -> str:
    """What the files of a part of a task are called."""
    return f"{name}/{part.name}" if part.name else name


def set_up(cfg: DictConfig) -> torch.device:
    """Set the number of threads, choose the device, look at what would otherwise be refused only after an extraction.

    Raises:
        UserError: the device asked for is not there; an unknown control, schedule or optimizer.
    """
    control_names(cfg)
    learning_rate(cfg.trainer, 0.0)
    optimizer_name(cfg.trainer)
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    return choose_device(cfg.device)


class Progress(NamedTuple):
    """Where a fit stands: everything a restart needs beside the parameters and Adam's moments."""

    epoch: int  # epochs done
    best: Tensor  # [S, L] lowest validation loss so far
    best_epoch: Tensor  # [S, L]


def fit_stack(control: Control, task: Task, cfg: DictConfig, run: Run, device: torch.device) -> list[Probe]:
    """Fit a probe on every layer of a sample; the stack is cut by layers where `trainer.stack_gb` asks for it.

    Returns:
        one probe per cut, best validation parameters restored, covering all layers in order.
    """
    train, val = control.samples["train"], control.samples["val"]
    layers = list(train.tokens.layers)
    step = layers_per_stack(task, control.probe, train, cfg.trainer, device)
    probes = []
    for number, first in enumerate(range(0, len(layers), step)):
        chunk, name = layers[first : first + step], part_name(control.name, task)
        done = checkpoint_path(run.dir, name, f"best.{number:02d}")
        if done.exists():  # written last: this very fit is complete, the directory is that of its configuration and code
            probes.append(load_probe(done, task.probes).to(device))
            continue
        probe = task.build_probe(control.probe, train, chunk, say=run.say).to(device)
        if probe.needs_statistics:
            probe.set_statistics(*token_statistics(train, chunk, cfg.trainer.batch_images))
        probes.append(fit(probe, task, train, val, cfg, run, name=name, number=number))
    return probes


def layers_per_stack(task: Task, probe_cfg: Mapping, sample: PatchSample, trainer: Mapping, device: torch.device) -> int:
    """How many layers fit into `trainer.stack_gb` at once (at least one): tokens, scores and four copies of the weights."""
    n_layers, _, n_tokens, dim = sample.tokens.shape
    n_stack, batch = len(task.stack), int(trainer.batch_images)
    n_tokens = min(n_tokens, task.tokens_per_visit or n_tokens)
    tokens = batch * n_tokens * dim * 4 * (1 + n_stack)
    scores = n_stack * batch * n_tokens * task.outputs_per_token(sample, n_tokens, probe_cfg) * 4 * 4
    weights = 5 * 4 * n_stack * task.build_probe(probe_cfg, sample, sample.tokens.layers[:1]).n_parameters / n_stack
    return max(1, min(n_layers, int(float(trainer.stack_gb) * 1e9 // (tokens + scores + weights))))


def token_statistics(sample: PatchSample, layers: Sequence, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over the valid patches of a (training) sample.

    Returns:
        two float32 tensors [L, D]; a constant channel gets deviation 1.
    """
    index = [list(sample.tokens.layers).index(layer) for layer in layers]
    n_images = sample.tokens.shape[1]
    valid = sample.labels.get("valid")
    total, square = torch.zeros(2, len(index), sample.tokens.shape[-1], dtype=torch.float64)
    count = 0.0
    for first in range(0, n_images, batch_size):
        images = torch.arange(first, min(first + batch_size, n_images))
        weight = torch.ones(len(images), sample.tokens.shape[2]) if valid is None else valid[images]
        weight = weight.flatten().to(torch.float64)  # [B T]
        for row, layer in enumerate(index):  # one at a time: float64 copies of all layers at once are large
            x = sample.tokens.gather(images, [layer])[0].flatten(0, 1).to(weight)  # [B T, D]
            total[row] += weight @ x
            square[row] += weight @ x.square_()
        count += float(weight.sum())
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std))
    return mean.float(), std.float()


def learning_rate(trainer: Mapping, epoch: float) -> float:
    """Learning rate at a (fractional) epoch: constant, linear or cosine to zero, or a drop every `step_size` epochs."""
    share = min(epoch / float(trainer["epochs"]), 1.0)
    schedules = {
        "constant": 1.0,
        "linear": 1.0 - share,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "step": float(trainer["gamma"]) ** (int(epoch) // int(trainer["step_size"])),
    }
    if trainer["schedule"] not in schedules:
        raise UserError(f"unknown trainer.schedule '{trainer['schedule']}'; valid: {', '.join(schedules)}")
    return float(trainer["lr"]) * schedules[trainer["schedule"]]


def optimizer_name(trainer: Mapping) -> str:
    """The optimizer asked for, one of OPTIMIZERS."""
    if trainer["optimizer"] not in OPTIMIZERS:
        raise UserError(f"unknown trainer.optimizer '{trainer['optimizer']}'; valid: {', '.join(OPTIMIZERS)}")
    return trainer["optimizer"]


def build_optimizer(probe: Probe, trainer: Mapping) -> torch.optim.Optimizer:
    """AdamW (decoupled decay; none on biases) or Adam as published (no decay)."""
    named = [(n, p) for n, p in probe.named_parameters() if p.requires_grad]
    lr, decay = float(trainer["lr"]), float(trainer["weight_decay"])
    if optimizer_name(trainer) == "adam":
        return torch.optim.Adam([p for _, p in named], lr=lr, weight_decay=decay, fused=True)
    groups = [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": decay},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)


def fit(
    probe: Probe, task: Task, train: PatchSample, val: PatchSample, cfg: DictConfig, run: Run, *, name: str, number: int = 0
) -> Probe:
    """Fit a stack of probes and restore, for every fit by itself, the epoch with the lowest validation loss.

    A restart continues at the last saved epoch and ends with the same numbers: the order of the batches depends on
    (cfg.seed, epoch) alone.

    Args:
        probe: a stack with axes [S, L]; its `layers` say which layers of the samples it reads.
        name, number: what the checkpoint files are called; `number` counts the cuts of one stack.

    Raises:
        UserError: a loss is not finite (layer, seed, epoch and learning rate are named).
    """
    trainer, epochs = cfg.trainer, int(cfg.trainer.epochs) if probe.trained else 0
    device = next(probe.parameters()).device if probe.trained else torch.device("cpu")
    index = [list(train.tokens.layers).index(layer) for layer in probe.layers]
    state_file = checkpoint_path(run.dir, name, f"state.{number:02d}")
    best = {n: p.detach().clone() for n, p in probe.named_parameters()}
    shape = (len(task.stack), len(index))
    progress = Progress(0, torch.full(shape, torch.inf), torch.zeros(shape, dtype=torch.int64))
    optimizer = build_optimizer(probe, trainer) if epochs else None
    if optimizer is not None and state_file.exists():
        progress = load_state(state_file, probe, optimizer, best)
    saved = time.monotonic()
    bar = tqdm(total=epochs, initial=progress.epoch, desc=f"fit {name}", unit="epoch", disable=None, leave=False)
    for epoch in range(progress.epoch, epochs):
        # One generator per epoch: a restart needs no state of it.
        order = torch.Generator().manual_seed(int(cfg.seed) * 100_003 + epoch)
        batches = list(task.batches(train, int(trainer.batch_images), order))
        total, seen = torch.zeros(shape), 0
        probe.train()
        for step, batch in enumerate(batches):
            rate = learning_rate(trainer, epoch + step / len(batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            x, batch = batch.tokens(train, index, device), batch.to(device)
            loss = task.loss(task.logits(probe, x, batch), batch)  # [S, L]
            if not torch.isfinite(loss).all():
                s, layer = (int(i) for i in (~torch.isfinite(loss)).nonzero()[0])
                raise UserError(
                    f"the loss is not finite (fit {name}, layer {probe.layers[layer]}, seed {task.stack[s].seed}, epoch "
                    f"{epoch + 1}, learning rate {rate:.2g}); lower trainer.lr or set probe.standardize=true"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            optimizer.step()
            total += loss.detach().cpu() * len(batch.images)
            seen += len(batch.images)
        val_loss = mean_loss(probe, task, val, index, int(trainer.batch_images), device)
        better = val_loss < progress.best
        for n, p in probe.named_parameters():
            mask = better.to(p.device).view(*shape, *[1] * (p.ndim - 2))
            best[n] = torch.where(mask, p.detach(), best[n])
        progress = Progress(
            epoch + 1,
            torch.where(better, val_loss, progress.best),
            torch.where(better, torch.tensor(epoch + 1), progress.best_epoch),
        )
        run.write(
            {"kind": "epoch", "name": name, "layer": str(probe.layers), "epoch": epoch + 1, "learning_rate": rate,
             "train_loss": (total / seen).tolist(), "val_loss": val_loss.tolist()},
            file="history.jsonl",
        )  # fmt: skip
        bar.set_postfix(train=f"{(total / seen).mean():.4f}", val=f"{val_loss.mean():.4f}")
        bar.update()
        if time.monotonic() - saved > float(trainer.checkpoint_seconds) or epoch + 1 == epochs:
            save_state(state_file, probe, optimizer, best, progress)
            saved = time.monotonic()
    bar.close()
    made_on = {"backbone": train.meta.get("facts", {}).get("weights"), "classes": list(train.meta.get("classes", ()))}
    probe.save(checkpoint_path(run.dir, name, f"last.{number:02d}"), **made_on)
    with torch.no_grad():
        for n, p in probe.named_parameters():
            p.copy_(best[n])
    probe.save(checkpoint_path(run.dir, name, f"best.{number:02d}"), **made_on, best_epoch=progress.best_epoch.tolist())
    return probe


@torch.no_grad()
def mean_loss(
    probe: Probe, task: Task, sample: PatchSample, index: Sequence[int], batch_size: int, device: torch.device
) -> Tensor:
    """Mean loss over a sample, every image weighted equally, [S, L] on the CPU."""
    probe.eval()
    total, seen = 0.0, 0
    for batch in task.batches(sample, batch_size, None):
        x, batch = batch.tokens(sample, index, device), batch.to(device)
        loss = task.loss(task.logits(probe, x, batch), batch)
        total, seen = total + loss.cpu() * len(batch.images), seen + len(batch.images)
    return total / seen


def save_state(
    path: Path, probe: Probe, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor], progress: Progress
) -> None:
    """Write all a restart needs into one file, whole or not at all."""
    tensors = {"progress/best": progress.best, "progress/best_epoch": progress.best_epoch}
    for n, p in probe.named_parameters():
        tensors[f"last/{n}"], tensors[f"best/{n}"] = p.detach(), best[n]
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{key}/{n}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save({k: v.cpu().contiguous() for k, v in tensors.items()}, {"epoch": json.dumps(progress.epoch)})
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space and repeat the command") from error


def load_state(path: Path, probe: Probe, optimizer: torch.optim.Optimizer, best: dict[str, Tensor]) -> Progress:
    """Put a saved state back into probe, optimizer and best parameters (in place)."""
    try:
        with safe_open(path, "pt") as file:
            epoch = json.loads(file.metadata()["epoch"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:
        raise UserError(f"the checkpoint {path} cannot be read ({error}); delete it and repeat the command") from error
    with torch.no_grad():
        for n, p in probe.named_parameters():
            p.copy_(tensors[f"last/{n}"])
            best[n] = tensors[f"best/{n}"].to(p.device)
            parts = ((k.split("/", 2), v) for k, v in tensors.items())
            moments = {key[1]: v for key, v in parts if key[0] == "optimizer" and key[2] == n}
            if moments:
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in moments.items()}
    return Progress(epoch, tensors["progress/best"], tensors["progress/best_epoch"])


def score(
    control: Control,
    stacks: Sequence[Sequence[Probe]],
    task: Task,
    cfg: DictConfig,
    run: Run,
    device: torch.device,
    *,
    split: str,
) -> Scored:
    """Evaluate a control on a split and write a record per layer, seed and block, then the means over seeds.

    Args:
        stacks: for every part of the task its probes, in the cuts they were fitted in; none for the class oracle.
    """
    sample, batch_size, found = control.samples[split], int(cfg.trainer.batch_images), []
    for part, probes in zip(task.parts(), stacks, strict=False):
        cuts = [evaluate(probe, part, sample, batch_size, device) for probe in probes]
        found.append([concatenate(blocks, len(task.seeds)) for blocks in zip(*cuts, strict=True)])
    layers = [layer for probe in stacks[0] for layer in probe.layers] if stacks else [control.name]
    if control.probe is None:
        found = [evaluate_oracle(task, sample, batch_size)]
    scored = Scored(control.name, layers, task.seeds, task.combine(found, sample))
    for record in records(scored, cfg, split):
        run.write(record)
    return scored


@torch.no_grad()
def evaluate(probe: Probe, task: Task, sample: PatchSample, batch_size: int, device: torch.device) -> list[Scores]:
    """Per-image scores of a stack on a sample, turned into blocks in one place (`tasks.Scorer`)."""
    probe.eval()
    index = [list(sample.tokens.layers).index(layer) for layer in probe.layers]
    scorer = task.scorer(sample, len(index))
    for batch in tqdm(list(task.batches(sample, batch_size, None)), desc="evaluate", disable=None, leave=False):
        x, batch = batch.tokens(sample, index, device), batch.to(device)
        scorer.add(batch, task.logits(probe, x, batch))
    return scorer.finish()


def evaluate_oracle(task: Task, sample: PatchSample, batch_size: int) -> list[Scores]:
    """The same blocks for the class oracle, whose score needs labels only."""
    scorer = task.scorer(sample, 1)
    for batch in task.batches(sample, batch_size, None):
        scorer.add_pairs(batch, task.columns[0][1], oracle_scores(batch.labels["class"], len(task.stack)))
    return scorer.finish()


def concatenate(blocks: Sequence[Scores], n_seeds: int) -> Scores:
    """Join the layers of the cuts of one stack: fits [seeds × layers] of each cut to fits of all layers, seed first."""
    if len(blocks) == 1:
        return blocks[0]

    def join(estimates: Sequence[Estimate]) -> Estimate:
        parts = [[field.unflatten(0, (n_seeds, -1)) for field in e] for e in estimates]
        return Estimate(*(torch.cat(fields, 1).flatten(0, 1) for fields in zip(*parts, strict=True)))

    metrics = {key: join([b.metrics[key] for b in blocks]) for key in blocks[0].metrics}
    distance = [{**row, "auroc": join([b.distance[i]["auroc"] for b in blocks])} for i, row in enumerate(blocks[0].distance)]
    return blocks[0]._replace(metrics=metrics, distance=distance)
