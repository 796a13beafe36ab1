"""Binding subspaces compared: principal angles between layers, seeds and runs, beside those of random subspaces."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from analysis.factors import binding_basis
from analysis.interventions import random_basis
from errors import UserError
from pairs.encode import FittedRun
from pairs.pair_form import PairForm

RANDOM_PAIRS = 200  # of random subspaces


class Compared(NamedTuple):
    """Two subspaces of rank k: what tells them apart ("layers", "seeds", "runs"), their names, and their angles.

    layer: where both are; of "layers" the first. angles: [k] degrees, smallest first.
    """

    between: str
    first: str
    second: str
    layer: int | str
    angles: Tensor


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles in degrees [k], smallest first, between the spans of orthonormal bases [D, k]."""
    return torch.linalg.svdvals(a.mT @ b).clamp(max=1).acos().rad2deg()


def overlap(angles: Tensor) -> Tensor:
    """Mean squared cosine of principal angles [..., k]: 1 the same span, k / D by chance."""
    return angles.deg2rad().cos().square().mean(-1)


def random_angles(dim: int, rank: int, seed: int = 0, n: int = RANDOM_PAIRS) -> Tensor:
    """Principal angles [n, k] of independent random subspaces of the same rank and width."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([principal_angles(*(random_basis(dim, rank, generator) for _ in range(2))) for _ in range(n)])


def check_same_space(run: FittedRun, others: Sequence[FittedRun]) -> None:
    """Refuse runs whose tokens are not those of the first: their subspaces have no axes in common.

    Raises:
        UserError: another backbone, other weights, or no layer in common.
    """
    for other in others:
        for key in ("name", "weights", "dim"):
            a, b = getattr(run.backbone.facts, key), getattr(other.backbone.facts, key)
            if a != b:
                raise UserError(
                    f"analyze.compare: {other.directory} reads tokens of another backbone than {run.directory} ({key} {b}, "
                    f"not {a}), so their subspaces have no common axes; name runs of one backbone"
                )
        if not set(run.layers) & set(other.layers):
            raise UserError(f"analyze.compare: {other.directory} has none of the layers of {run.directory}; name another run")


def compare_subspaces(run: FittedRun, forms: Sequence[PairForm], others: Sequence[FittedRun], rank: int) -> list[Compared]:
    """All pairs of layers (mean form over seeds), of seeds within a layer, and of this run with others at a layer."""
    bases = {layer: binding_basis(form, rank) for layer, form in zip(run.layers, forms, strict=True)}
    compared = [
        Compared("layers", str(a), str(b), a, principal_angles(bases[a], bases[b])) for a, b in combinations(run.layers, 2)
    ]
    for layer, form in zip(run.layers, forms, strict=True):
        of_seeds = [binding_basis(form._replace(form=form.form[s : s + 1]), rank) for s in range(len(form.bias))]
        for (i, a), (j, b) in combinations(enumerate(of_seeds), 2):
            compared.append(Compared("seeds", f"seed {i}", f"seed {j}", layer, principal_angles(a, b)))
    for other in others:
        for layer, form in zip(other.layers, other.forms(), strict=True):
            if layer in bases:
                angles = principal_angles(bases[layer], binding_basis(form, rank))
                compared.append(Compared("runs", run.directory.name, other.directory.name, layer, angles))
    return compared


def angle_rows(compared: Sequence[Compared], random: Tensor) -> Iterator[dict[str, Any]]:
    """Rows for a table: overlap, smallest, median and largest angle of every pair; random subspaces last."""
    for pair in compared:
        names = {"between": pair.between, "first": pair.first, "second": pair.second, "layer": pair.layer}
        yield names | _facts(pair.angles[None])
    yield {"between": "random", "first": f"{len(random)} pairs", "second": "", "layer": ""} | _facts(random)


def _facts(angles: Tensor) -> dict[str, float]:
    """Means over pairs of subspaces, angles [n, k]."""
    sorted_means = angles.mean(0)
    return {
        "rank": angles.shape[1], "overlap": float(overlap(angles).mean()), "smallest": float(sorted_means[0]),
        "median": float(sorted_means.median()), "largest": float(sorted_means[-1]),
    }  # fmt: skip


def overlap_square(compared: Sequence[Compared], layers: Sequence) -> Tensor:
    """Overlap [L, L] of all pairs of layers."""
    square, place = torch.eye(len(layers)), {str(layer): i for i, layer in enumerate(layers)}
    for pair in compared:
        if pair.between == "layers":
            i, j = place[pair.first], place[pair.second]
            square[i, j] = square[j, i] = float(overlap(pair.angles))
    return square


def angle_table(compared: Sequence[Compared], random: Tensor, layer: int | str) -> list[list[str]]:
    """Lines for the terminal at a layer: the layer before it, its seeds, every other run, random subspaces with 95 % range."""
    mine = [pair for pair in compared if pair.layer == layer or (pair.between == "layers" and pair.second == str(layer))]
    groups: dict[str, list[Tensor]] = {}
    for pair in mine:
        if pair.between == "layers":
            continue
        name = f"seeds at layer {layer}" if pair.between == "seeds" else f"{pair.second} at layer {layer}"
        groups.setdefault(name, []).append(pair.angles)
    before = [pair for pair in mine if pair.between == "layers" and pair.second == str(layer)][-1:]
    for pair in before:
        groups = {f"layers {pair.first} and {layer}": [pair.angles]} | groups
    lines = []
    for name, angles in groups.items():
        facts = _facts(torch.stack(angles))
        lines.append([name, str(len(angles)), f"{facts['overlap']:.2f}", *(f"{facts[key]:.0f}" for key in _ANGLES)])
    low, high = np.quantile(overlap(random).numpy(), [0.025, 0.975])
    facts = _facts(random)
    chance = f"{facts['overlap']:.2f} [{low:.2f}, {high:.2f}]"
    lines.append(["random subspaces", str(len(random)), chance, *(f"{facts[key]:.0f}" for key in _ANGLES)])
    return lines


_ANGLES = ("smallest", "median", "largest")
