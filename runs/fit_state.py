"""Everything a restart of a fit needs, in one file: parameters, their average and best, the optimizer's moments, how far it is.

A state is that of one fit, `of`: a file of another fit in its place is refused by name, and so is one that claims what
this fit cannot have reached.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from runs.states import REMEDY, load_state, save_state

LEAST_GAIN = 1e-3  # an epoch that lowers the loss by less than this share of it counts as none (our choice)


class Progress(NamedTuple):
    """Where a fit stands, beside its parameters and the optimizer's moments.

    epoch: epochs done. best: [S, L] lowest validation loss so far. best_epoch: [S, L] epoch that reached it, counted
    from 1; 0 before the first. curve: [epochs, S, L] validation loss; nan once a fit was stopped. level, since: [S, L] the
    loss and the epoch of the last gain that counted. stopped: bool [S, L]. step: batches done of the epoch under way.
    total: [S, L] sum over their images of the training loss. n_images: number of these images.
    """

    epoch: int
    best: Tensor
    best_epoch: Tensor
    curve: Tensor
    level: Tensor
    since: Tensor
    stopped: Tensor
    step: int
    total: Tensor
    n_images: int

    @classmethod
    def start(cls, n_fits: int, n_layers: int) -> "Progress":
        """Before the first epoch."""
        zeros, infinite = torch.zeros(n_fits, n_layers), torch.full((n_fits, n_layers), torch.inf)
        return cls(0, infinite, zeros.long(), zeros[None][:0], infinite, zeros.long(), zeros.bool(), 0, zeros, 0)

    def after_batch(self, loss: Tensor, n_images: int) -> "Progress":
        """One batch later, with its mean loss [S, L] over its images."""
        return self._replace(step=self.step + 1, total=self.total + loss * n_images, n_images=self.n_images + n_images)

    def after_epoch(self, val_loss: Tensor, patience: int | None = None) -> "Progress":
        """One epoch later, with its validation loss [S, L]; a fit that gained nothing for `patience` epochs is stopped."""
        epoch, running = self.epoch + 1, ~self.stopped
        better, counts = running & (val_loss < self.best), running & (val_loss < self.level * (1 - LEAST_GAIN))
        now, since = torch.tensor(epoch), torch.where(counts, torch.tensor(epoch), self.since)
        stopped = self.stopped if patience is None else self.stopped | (epoch - since >= patience)
        return Progress(
            epoch=epoch,
            best=torch.where(better, val_loss, self.best),
            best_epoch=torch.where(better, now, self.best_epoch),
            curve=torch.cat([self.curve, torch.where(running, val_loss, torch.nan)[None]]),
            level=torch.where(counts, val_loss, self.level),
            since=since,
            stopped=stopped,
            step=0,
            total=torch.zeros_like(self.total),
            n_images=0,
        )


class Weights:
    """The parameters of a stack while it is fitted: as trained (in the probe), averaged over steps, and the best so far.

    Args:
        probe: the stack; its parameters lead with the axes [S, L].
        averaging: g of the average whose newest step weighs (g + 1) / (n + g) after n steps, so that it spans about the
            last n / (g + 1) of them (Shamir and Zhang, arXiv 1212.1824); None: the parameters as trained.

    Attributes:
        best, average: by name; `average` is empty without averaging.
    """

    def __init__(self, probe: nn.Module, averaging: float | None) -> None:
        self.probe, self.averaging = probe, averaging
        self.best = {n: p.detach().clone() for n, p in probe.named_parameters()}
        self.average = {} if averaging is None else {n: p.detach().clone() for n, p in probe.named_parameters()}

    @torch.no_grad()
    def after_step(self, n_steps: int) -> None:
        """Take the parameters after the n-th step into the average."""
        for name, p in self.probe.named_parameters():
            if name in self.average:
                self.average[name].lerp_(p, (self.averaging + 1) / (n_steps + self.averaging))

    @contextlib.contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """The probe answers with the average for a while; without averaging as it is."""
        trained = {n: p.clone() for n, p in self.probe.named_parameters() if n in self.average}
        _copy(self.average, self.probe)
        try:
            yield
        finally:
            _copy(trained, self.probe)

    @torch.no_grad()
    def keep_better(self, better: Tensor) -> None:
        """Take over into `best` what answers now, of the fits [S, L] that are better than before."""
        for name, p in self.probe.named_parameters():
            self.best[name] = torch.where(_spread(better, p), self.average.get(name, p), self.best[name])

    @torch.no_grad()
    def rest(self, stopped: Tensor) -> None:
        """Put the fits [S, L] that were stopped back to their best."""
        if bool(stopped.any()):
            for name, p in self.probe.named_parameters():
                for kept in (p, *(value for key, value in self.average.items() if key == name)):
                    kept.copy_(torch.where(_spread(stopped, p), self.best[name], kept))

    @torch.no_grad()
    def restore(self, which: Mapping[str, Tensor]) -> None:
        """Put `best` or `average` into the probe."""
        _copy(which, self.probe)


def _spread(fits: Tensor, parameter: Tensor) -> Tensor:
    return fits.to(parameter.device).view(*fits.shape, *[1] * (parameter.ndim - 2))  # [S, L, 1, …]


def _copy(values: Mapping[str, Tensor], probe: nn.Module) -> None:
    for name, p in probe.named_parameters():
        if name in values:
            p.copy_(values[name])


def build_optimizer(probe: nn.Module, name: str, lr: float, beta2: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (decoupled decay; none on biases) or Adam as published, for what of a stack is trained."""
    named = [(n, p) for n, p in probe.named_parameters() if p.requires_grad]
    if name == "adam":
        return torch.optim.Adam([p for _, p in named], lr=lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    groups = [
        {"params": [p for n, p in named if "bias" not in n], "weight_decay": weight_decay},
        {"params": [p for n, p in named if "bias" in n], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, beta2), fused=True)


def save_fit(path: Path, weights: Weights, optimizer: torch.optim.Optimizer, progress: Progress, of: Mapping) -> None:
    """Write the state of a fit, whole or not at all.

    Args:
        of: what the fit is, JSON-able.

    Raises:
        UserError: a number is not finite, or the file cannot be written.
    """
    tensors = {}
    for name, parameter in weights.probe.named_parameters():
        tensors[f"last/{name}"], tensors[f"best/{name}"] = parameter, weights.best[name]
        if name in weights.average:
            tensors[f"average/{name}"] = weights.average[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    # Losses as text keep every bit of a float32; an infinite or undefined one becomes null.
    reached = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in progress._asdict().items()}
    save_state(path, tensors, {"fit": of, "progress": reached})


def load_fit(path: Path, weights: Weights, optimizer: torch.optim.Optimizer, of: Mapping, epochs: int) -> Progress:
    """Put a saved state back into probe, averages, best parameters and optimizer (in place).

    Args:
        of: what the fit is; epochs: how many it has.

    Raises:
        UserError: the file is damaged, of another fit, or claims what this fit cannot have reached.
    """
    state, probe = load_state(path, {"fit": of}), weights.probe
    progress = _progress(state.recipe.get("progress"), next(iter(weights.best.values())).shape[:2], epochs)
    if progress is None:
        raise UserError(f"{path} claims a progress that a fit of {epochs} epochs cannot have; {REMEDY}")
    parts = ("last", "best", "average") if weights.average else ("last", "best")
    for name, parameter in probe.named_parameters():
        for kept in (f"{part}/{name}" for part in parts):
            if kept not in state.tensors or state.tensors[kept].shape != parameter.shape:
                raise UserError(f"{path} holds no {kept} of shape {list(parameter.shape)}; {REMEDY}")
    with torch.no_grad():
        for name, parameter in probe.named_parameters():
            parameter.copy_(state.tensors[f"last/{name}"])
            weights.best[name] = state.tensors[f"best/{name}"].to(parameter.device)
            if weights.average:
                weights.average[name] = state.tensors[f"average/{name}"].to(parameter.device)
            moments = {
                key: value if key == "step" else value.to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (value := state.tensors.get(f"optimizer/{key}/{name}")) is not None
            }
            if moments:
                optimizer.state[parameter] = moments
    return progress


def _progress(reached: Any, shape: tuple[int, ...], epochs: int) -> Progress | None:
    """What was saved of a progress, if a fit of this shape and number of epochs can have it."""
    if not isinstance(reached, dict) or reached.keys() != set(Progress._fields):
        return None
    counts = [reached[key] for key in ("epoch", "step", "n_images")]
    if not all(type(count) is int and count >= 0 for count in counts) or reached["epoch"] > epochs:
        return None
    try:
        best, level = (_losses(reached[key], math.inf) for key in ("best", "level"))
        curve = torch.stack([_losses(row, math.nan) for row in reached["curve"]]) if reached["curve"] else best[None][:0]
        best_epoch, since, stopped = (torch.tensor(reached[key]) for key in ("best_epoch", "since", "stopped"))
        total = torch.tensor(reached["total"], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None
    if any(part.shape != shape for part in (best, level, best_epoch, since, stopped, total)):
        return None
    if curve.shape != (reached["epoch"], *shape) or stopped.dtype != torch.bool:
        return None
    for epoch in (best_epoch, since):
        if epoch.dtype != torch.int64 or not bool(((epoch >= 0) & (epoch <= reached["epoch"])).all()):
            return None
    return Progress(
        reached["epoch"], best, best_epoch, curve, level, since, stopped, reached["step"], total, reached["n_images"]
    )


def _losses(rows: Any, missing: float) -> Tensor:
    """Losses [S, L] that were saved as text, those that were not finite as `missing`."""
    return torch.tensor([[missing if value is None else value for value in row] for row in rows], dtype=torch.float32)
