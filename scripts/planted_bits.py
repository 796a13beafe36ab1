"""Bits per pair in planted worlds, beside the truth: usable information beyond class and distance, and code length.

    python scripts/planted_bits.py                       # worlds of the default size: minutes
    python scripts/planted_bits.py --images 100 20 60 --patches 16 --large 300

The vectors of objects are normal, so that the truth is known. Usable information is measured in worlds whose features also
carry class, colour, place, a smooth field and texture; code length in worlds of objects and noise alone, where nothing else
tells the answer. Colours are those of the class. The truth has two bounds, with code of their own: *family*, what the best form
of the probe's family reads (by symmetry a multiple of the planted inner product, two numbers that are fitted), and *any*, the
Shannon information of the two planted vectors, from their exact densities. Nothing can be above *any*; no probe of the family
can be above *family*. Both are taken on a large sample of scenes, and the family's also on the scenes that are scored, whose
luck the measured number shares: *share* is of that. ↓: a fit was still falling when it ended.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from controls import Subject
from metrics.bootstrap import interval, resample
from pairs.code_length import code_length
from pairs.usable_information import usable_information
from pairs.worlds import PLANTED, Scenes, WorldOptions, as_sample, draw_mixing, draw_scenes, draw_tokens
from runs.run import Run
from show.text import format_table
from tasks import ProbeResult
from trainer import FitOptions

FULL = WorldOptions(own_color=0.0)
BARE = replace(FULL, known=0.0, field=0.0, texture=0.0)
STRENGTHS = (0.0, 0.3, 0.5, 0.8)
SUBSETS = ("foreground", "same_class")
NAME = "bits"


class Truth(NamedTuple):
    """Bits per pair of a subset: what the best form of the family reads, what anything can read, entropy without either."""

    family: float
    any: float
    entropy: float


def pairs_of(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second patch [P], whether they are one object [M, P], and what is known of the pair, a number [M, P]."""
    first, second = torch.triu_indices(scenes.identity.shape[1], scenes.identity.shape[1], 1)
    place = scenes.place.long()
    square = (place[:, first] - place[:, second]).square().sum(-1)
    agree = scenes.class_[:, first] == scenes.class_[:, second]
    return first, second, scenes.identity[:, first] == scenes.identity[:, second], 2 * square + agree.long()


def bits(logits: Tensor, same: Tensor) -> Tensor:
    """-log2 of the probability of the answer."""
    return F.softplus(torch.where(same, -logits, logits)) / torch.log(torch.tensor(2.0, dtype=torch.float64))


def truth_of(scenes: Scenes, strength: float, world: int, options: WorldOptions, *, given: bool) -> dict[str, Truth]:
    """The truth of every subset, from a large sample.

    Args:
        given: class agreement and distance are known, and information is what comes on top of them.
    """
    tokens = draw_tokens(scenes, {world: strength}, options)[0].double()  # [M, T, D]
    base = scenes.name.rpartition("/")[0]
    planted = tokens @ draw_mixing(base, world, options)[PLANTED].double().T  # [M, T, 4]
    first, second, same, cell = pairs_of(scenes)
    used = (scenes.identity[:, first] > 0) & (scenes.identity[:, second] > 0)
    x, y = planted[:, first][used], planted[:, second][used]  # [n, 4]
    same, cell = same[used], cell[used] if given else torch.zeros_like(cell[used])
    n, yes = torch.bincount(cell).double(), torch.bincount(cell, same.double())
    prior = torch.special.logit((yes / n.clamp_min(1)).clamp(1e-9, 1 - 1e-9))[cell]  # [n]

    inner, theta = (x * y).sum(-1), torch.zeros(2, dtype=torch.float64)
    columns = torch.stack([torch.ones_like(inner), inner], 1)  # [n, 2]
    for _ in range(30):  # Newton's method
        p = (prior + columns @ theta).sigmoid()
        hessian = columns.T @ (columns * (p * (1 - p))[:, None]) + 1e-9 * torch.eye(2)
        theta = theta - torch.linalg.solve(hessian, columns.T @ (p - same.double()))

    variance, noise = strength**2 + options.noise**2, options.noise**2
    rho = strength**2 / variance  # of a channel of two patches of one object
    quadratic = rho**2 * (x.square() + y.square()) - 2 * rho * x * y
    ratio = (-0.5 * torch.log1p(torch.tensor(-(rho**2))) - quadratic / (2 * variance * (1 - rho**2))).sum(-1)
    assert noise > 0, "without noise the densities are not defined"

    class_ = scenes.class_[:, first][used] == scenes.class_[:, second][used]
    truths = {}
    for subset, members in (("foreground", torch.ones_like(same)), ("same_class", class_)):
        alone, family, exact = (
            float(bits(logits, same)[members].mean()) for logits in (prior, prior + columns @ theta, prior + ratio)
        )
        truths[subset] = Truth(alone - family, alone - exact, alone)
    return truths


def measured(
    scenes: Mapping[str, Scenes], options: WorldOptions, kind: str, strengths: Sequence[float], cfg, folder: Path
) -> ProbeResult:
    """Usable information or code length of worlds of all strengths, a layer each, fitted as mode=train fits."""
    layers = list(range(len(strengths)))
    samples = {split: as_sample(s, draw_tokens(s, strengths, options), layers) for split, s in scenes.items()}
    subject, fit = Subject(kind, "", cfg.probe, samples, [0]), FitOptions.read(cfg)
    run, settings = Run(folder, {}), {"variants": ["foreground"], "per_visit": None, "pairs": "upper"}
    measure = usable_information if kind == "usable" else code_length
    return measure(run, settings, subject, fit)


def compare(options: WorldOptions, kind: str, strengths: Sequence[float], large: Scenes, cfg, folder: Path) -> list[list]:
    """Rows of subset and strength, estimate, interval, truth of the family on the scored scenes, of it and anything on many."""
    scenes = {split: draw_scenes(split, options, NAME) for split in ("train", "val", "test")}
    result, rows = measured(scenes, options, kind, strengths, cfg, folder), []
    scored = scenes["test" if kind == "usable" else "train"]
    metric = "usable_information" if kind == "usable" else "saved"
    for world, strength in enumerate(strengths):
        truth, here = (truth_of(s, strength, world, options, given=kind == "usable") for s in (large, scored))
        for subset in result.subsets:
            if subset.subset in SUBSETS:
                estimate = subset.metrics[metric]
                counts = resample(estimate.influence.shape[1], 1000, 0)
                low, high = (float(end[world]) for end in interval(estimate, counts, bounds=subset.bounds))
                falling = any(fit.still_falling for fit in result.fits if fit.layer == world)
                numbers = float(estimate.value[world]), low, high, here[subset.subset].family, *truth[subset.subset][:2]
                rows.append([f"{subset.subset}, {strength:g}{' ↓' * falling}", *numbers])
    return rows


def table(rows: list[list]) -> str:
    """Rows as text."""
    body = [
        [name, f"{value:.4f} [{low:.4f}, {high:.4f}]", f"{here:.4f}", f"{value / here:.2f}" if here > 1e-3 else "–",
         f"{family:.4f}", f"{anything:.4f}"]
        for name, value, low, high, here, family, anything in rows
    ]  # fmt: skip
    header = ["pairs, planted", "measured, bits per pair", "family, here", "share", "family, many", "any, many"]
    return format_table(header, body)


def main(arguments: list[str] | None = None) -> list[list]:
    """Print both tables; returns their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=3, default=[800, 100, 300], help="training, validation, test images")
    parser.add_argument("--patches", type=int, default=64, help="of an image")
    parser.add_argument("--large", type=int, default=4000, help="images of the sample that gives the truth")
    parser.add_argument("--only", choices=("usable", "code"), help="one of the two tables")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="of what is planted")
    parser.add_argument("overrides", nargs="*", help="options of mode=train, such as trainer.epochs=4")
    args = parser.parse_args(arguments)
    with initialize_config_dir(str(Path(__file__).resolve().parents[1] / "cfgs"), version_base="1.3"):
        cfg = compose("config", ["trainer.seeds=1", *args.overrides])
    sizes = dict(zip(("n_train", "n_val", "n_test"), args.images, strict=True), patches=args.patches)
    sizes |= {"n_population": args.large, "population_patches": 24}
    every = []
    for kind, title, world in (
        ("usable", "usable information beyond class and distance", FULL), ("code", "saved by the online code", BARE)
    ):  # fmt: skip
        if args.only not in (None, kind):
            continue
        options = replace(world, **sizes)
        large = draw_scenes("population", options, NAME)
        with tempfile.TemporaryDirectory() as folder:
            rows = compare(options, kind, args.strengths, large, cfg, Path(folder))
        print(f"{title}\n{table(rows)}\n", flush=True)
        every += [[kind, *row] for row in rows]
    return every


if __name__ == "__main__":
    main()
