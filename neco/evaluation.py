"""How good the patch tokens of a network are, in process: dense evaluations while it trains, and before against after.

Tokens are those the training works on: final-norm patch tokens of the last block, from square images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from backbones.contract import BackboneFacts
from datasets.listings import spread
from dense.contract import Grids, LabelMaps, Result, mean_over_seeds
from dense.linear_seg import linear_seg
from dense.overcluster import overcluster
from dense.retrieval import retrieval
from errors import UserError
from metrics.bootstrap import Estimate, difference, interval, resample
from neco.recipe import EvaluationOptions
from neco.student_teacher import PatchEncoder

BATCH = 32


class Scored(NamedTuple):
    """A split with class maps: images [M, 3, S, S] uint8, and their maps at full size."""

    images: Tensor
    maps: LabelMaps


def open_scored(dataset: Any, limit: int, size: int) -> Scored:
    """At most `limit` images of a split, evenly spread, resized to squares (bilinear, antialiased).

    Raises:
        UserError: a data set without class maps.
    """
    images, maps = [], []
    for number in spread(range(len(dataset)), min(limit, len(dataset))):
        scene = dataset[number]
        if "class" not in scene.labels:
            raise UserError(
                f"{scene.key} has no class map, which networks are scored by; take a data set of class maps, or "
                "neco.evaluate.every=0 neco.evaluate.final=false"
            )
        images.append(pixels.resize(scene.image, [size, size], antialias=True))
        maps.append(scene.labels["class"].short())
    return Scored(torch.stack(images), LabelMaps.from_tensor(maps, list(dataset.classes)))


@torch.no_grad()
def read_tokens(encoder: PatchEncoder, images: Tensor, facts: BackboneFacts, device: torch.device, products: Callable) -> Grids:
    """Final-norm patch tokens of images [M, 3, S, S] uint8 as a grid of one layer, float16 on the CPU."""
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (facts.mean, facts.std))
    was_training = encoder.training
    encoder.eval()
    side, tokens = images.shape[-1] // facts.patch_size, []
    for start in range(0, len(images), BATCH):
        seen = pixels.to_dtype(images[start : start + BATCH].to(device), torch.float32, scale=True)
        with products():
            tokens.append(encoder.tokens((seen - mean) / std).half().cpu())
    encoder.train(was_training)
    x = torch.cat(tokens)
    return Grids.from_tensor(x.view(1, len(x), side, side, -1), patch=facts.patch_size, layers=["last"])


# Name -> (features, labels, options, whether it is the last evaluation) -> results; the first score chooses the best.
Evaluation = Callable[[Mapping[str, Grids], Mapping[str, LabelMaps], EvaluationOptions, bool], list[Result]]


def _retrieval(features: Mapping, labels: Mapping, options: EvaluationOptions, last: bool) -> list[Result]:
    found = retrieval(features, labels, size="full", memory_size=None)
    return [result for result in found if result.setting["matching"] == "direct"]


def _overcluster(features: Mapping, labels: Mapping, options: EvaluationOptions, last: bool) -> list[Result]:
    counts = ["classes", min(options.n_clusters, features["test"].n_tokens)]
    quick = {"seeds": 1, "restarts": 1, "iterations": 30}
    settings = {"seeds": options.seeds, "restarts": 3, "iterations": 100} if last else quick
    components = 50 if features["test"].dim > 50 else None  # published: 50
    found = overcluster(features, labels, n_clusters=counts, size=100, pca=components, **settings)
    return [result for result in mean_over_seeds(found) if result.notes["published"]]


def _linear(features: Mapping, labels: Mapping, options: EvaluationOptions, last: bool) -> list[Result]:
    if not last:
        return []
    settings = {"epochs": options.linear_epochs, "seeds": options.seeds, "lrs": (1e-3, 3e-3, 1e-2), "weight_decays": (1e-4,)}
    return mean_over_seeds(linear_seg(features, labels, **settings))


EVALUATIONS: dict[str, Evaluation] = {"retrieval": _retrieval, "overcluster": _overcluster, "linear": _linear}


def evaluate(
    encoder: PatchEncoder,
    memory: Scored,
    scored: Scored,
    options: EvaluationOptions,
    *,
    facts: BackboneFacts,
    device: torch.device,
    products: Callable = contextlib.nullcontext,
    last: bool = False,
) -> dict[str, Estimate]:
    """Scores of a network by name, with the influence of every scored image.

    Args:
        memory: what retrieval and the linear head learn from; scored: what is scored.
        last: the thorough evaluation at the end; else the quick one while it trains.
    """
    splits = {"train": memory, "test": scored}
    features = {name: read_tokens(encoder, split.images, facts, device, products) for name, split in splits.items()}
    labels = {"train": memory.maps, "test": scored.maps}
    found: dict[str, Estimate] = {}
    for name, evaluation in EVALUATIONS.items():
        for result in evaluation(features, labels, options, last):
            clusters = result.setting.get("n_clusters")
            label = name if clusters is None else f"{name} K={clusters}"
            for metric, estimate in result.metrics.items():
                found[f"{label} {metric}"] = estimate
    return found


def values(scores: Mapping[str, Estimate]) -> dict[str, float]:
    """The numbers alone."""
    return {name: float(estimate.value.reshape(-1)[0]) for name, estimate in scores.items()}


def compare(before: Mapping[str, Estimate], after: Mapping[str, Estimate], *, n_boot: int, seed: int) -> list[dict[str, Any]]:
    """Rows of before, after and their difference, each with a 95 % interval; the same images are drawn for both."""
    rows = []
    for name, first in before.items():
        second = after[name]
        counts = resample(first.influence.shape[-1], n_boot, seed)
        row: dict[str, Any] = {"metric": name}
        for key, estimate in (("before", first), ("after", second), ("gain", difference(second, first))):
            low, high = interval(estimate, counts, bounds=(-1.0, 1.0) if key == "gain" else (0.0, 1.0))
            row |= {key: float(estimate.value[0]), f"{key}_low": float(low[0]), f"{key}_high": float(high[0])}
        rows.append(row)
    return rows


def rows_as_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows of `compare` as text, in percent."""

    def cell(row: Mapping[str, Any], key: str, sign: str = "") -> str:
        return f"{100 * row[key]:{sign}.1f} [{100 * row[f'{key}_low']:{sign}.1f}, {100 * row[f'{key}_high']:{sign}.1f}]"

    return [[row["metric"], cell(row, "before"), cell(row, "after"), cell(row, "gain", "+")] for row in rows]
