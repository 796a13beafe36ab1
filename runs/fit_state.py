"""Everything a restart of a fit needs, in one file: parameters, the best so far, the optimizer's moments, how far it is.

A state is that of one fit, `of`: a file of another fit in its place is refused by name, and so is one that claims what
this fit cannot have reached.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from runs.states import REMEDY, load_state, save_state


class Progress(NamedTuple):
    """Where a fit stands, beside its parameters and the optimizer's moments.

    epoch: epochs done. best: [S, L] lowest validation loss so far. best_epoch: [S, L] epoch that reached it, counted
    from 1; 0 before the first. step: batches done of the epoch under way. total: [S, L] sum over their images of the
    training loss. n_images: number of these images.
    """

    epoch: int
    best: Tensor
    best_epoch: Tensor
    step: int
    total: Tensor
    n_images: int

    @classmethod
    def start(cls, n_fits: int, n_layers: int) -> "Progress":
        """Before the first epoch."""
        zeros = torch.zeros(n_fits, n_layers)
        return cls(0, torch.full((n_fits, n_layers), torch.inf), zeros.long(), 0, zeros, 0)

    def after_batch(self, loss: Tensor, n_images: int) -> "Progress":
        """One batch later, with its mean loss [S, L] over its images."""
        return self._replace(step=self.step + 1, total=self.total + loss * n_images, n_images=self.n_images + n_images)

    def after_epoch(self, val_loss: Tensor) -> "Progress":
        """One epoch later, with its validation loss [S, L]."""
        better, epoch = val_loss < self.best, self.epoch + 1
        best_epoch = torch.where(better, torch.tensor(epoch), self.best_epoch)
        zeros = torch.zeros_like(self.total)
        return Progress(epoch, torch.where(better, val_loss, self.best), best_epoch, 0, zeros, 0)


def save_fit(
    path: Path, probe: nn.Module, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor], progress: Progress, of: Mapping
) -> None:
    """Write the state of a fit, whole or not at all.

    Args:
        best: the parameters of the best epoch so far, by name.
        of: what the fit is, JSON-able.

    Raises:
        UserError: a number is not finite, or the file cannot be written.
    """
    tensors = {}
    for name, parameter in probe.named_parameters():
        tensors[f"last/{name}"], tensors[f"best/{name}"] = parameter, best[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    # Losses as text keep every bit of a float32; an infinite one, before the first epoch, becomes null.
    reached = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in progress._asdict().items()}
    save_state(path, tensors, {"fit": of, "progress": reached})


def load_fit(
    path: Path, probe: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], of: Mapping, epochs: int
) -> Progress:
    """Put a saved state back into probe, optimizer and best parameters (in place).

    Args:
        of: what the fit is; epochs: how many it has.

    Raises:
        UserError: the file is damaged, of another fit, or claims what this fit cannot have reached.
    """
    state, n_fits_layers = load_state(path, {"fit": of}), next(iter(best.values())).shape[:2]
    progress = _progress(state.recipe.get("progress"), n_fits_layers, epochs)
    if progress is None:
        raise UserError(f"{path} claims a progress that a fit of {epochs} epochs cannot have; {REMEDY}")
    for name, parameter in probe.named_parameters():
        for kept in (f"last/{name}", f"best/{name}"):
            if kept not in state.tensors or state.tensors[kept].shape != parameter.shape:
                raise UserError(f"{path} holds no {kept} of shape {list(parameter.shape)}; {REMEDY}")
    with torch.no_grad():
        for name, parameter in probe.named_parameters():
            parameter.copy_(state.tensors[f"last/{name}"])
            best[name] = state.tensors[f"best/{name}"].to(parameter.device)
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
        best = torch.tensor([[math.inf if value is None else value for value in row] for row in reached["best"]])
        best_epoch, total = torch.tensor(reached["best_epoch"]), torch.tensor(reached["total"], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not best.shape == best_epoch.shape == total.shape == shape or best_epoch.dtype != torch.int64:
        return None
    if not bool((best_epoch >= 0).all()) or not bool((best_epoch <= reached["epoch"]).all()):
        return None
    return Progress(reached["epoch"], best, best_epoch, reached["step"], total, reached["n_images"])
