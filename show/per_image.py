"""The numbers of every image by itself: which ones fail, and all another test needs.

    write_scores    scores.csv (the probe) and scores.safetensors (controls too): pairs, AUROC and influence of each image
    read_scores     what scores.safetensors holds
    Predictions     collects what every fit answers; writes predictions.safetensors (mode=eval eval.predictions=true)

With the counts of `metrics.bootstrap.resample(M, n_boot, seed)` the draws of a score are its value plus influence @ counts,
and the percentiles of these are its interval in metrics.jsonl.
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from activation import PatchSample
from files import write_if_changed
from metrics.bootstrap import mean_over_seeds
from probes import Probe
from runs.run import Run
from runs.states import State, load_state, pack, save_state
from show.records import SUBSET, Column, Resampling
from tasks import Batch, ProbeResult, SubsetResult, Task

UNDEFINED = -1.0  # stands for an AUROC that an image has not: files hold finite numbers only
HEADER = ("row", "layer", *SUBSET, "image", "n_pairs", "n_positive", "auroc", "metric", "influence")


def write_scores(
    run: Run, results: Sequence[ProbeResult], columns: Sequence[Column], resampling: Resampling, split: str
) -> None:
    """Write both files whole or not at all; run.json names their SHA-256.

    scores.safetensors: per result and subset, under "<name>/<question>/<readout>/<subset>/", "influence/<metric>" float64
    [L, M], means over seeds ([S, L, M] where intervals are over seeds too), "auroc" float32 [L, M], "n_pairs" and "n_positive"
    [M]. Metrics are AUROC and those of the table.
    scores.csv: a row per layer, subset and image of each probe, means over seeds.
    """
    tensors, listed = {}, []
    for result in results:
        for subset in result.subsets:
            metrics = metrics_of(subset, columns)
            place = {"question": subset.question, "readout": subset.readout, "subset": subset.subset}
            prefix = "/".join((result.name, *place.values()))
            for metric in metrics:
                influence = subset.metrics[metric].influence.unflatten(0, (len(result.seeds), -1))  # [S, L, M]
                tensors[f"{prefix}/influence/{metric}"] = influence if subset.over_seeds else influence.mean(0)
            for name, value in _means(subset, len(result.seeds)).items():
                tensors[f"{prefix}/{name}"] = value.nan_to_num(UNDEFINED) if name == "auroc" else value
            listed.append({
                "name": result.name, "row": result.row, "control": result.control, **place, "layers": result.layers,
                "seeds": result.seeds, "metrics": metrics, "over_seeds": subset.over_seeds,
            })  # fmt: skip
    recipe = {"images": list(results[0].keys), "split": split, "undefined": UNDEFINED, "results": listed}
    recipe |= resampling._asdict()
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(HEADER)
    for result in results:
        if not result.control:
            writer.writerows(_rows(result, columns))
    files = {"scores.safetensors": pack(tensors, recipe, "scores.safetensors"), "scores.csv": text.getvalue().encode()}
    for name, content in files.items():
        write_if_changed(run.dir / name, content)
    run.facts["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def read_scores(directory: Path) -> State:
    """What scores.safetensors of a run holds, its digest checked."""
    return load_state(directory / "scores.safetensors")


def metrics_of(subset: SubsetResult, columns: Sequence[Column]) -> list[str]:
    """The metrics of a subset whose influences are kept: AUROC where it has one, then those of the table."""
    shown = [c.metric for c in columns if (c.question, c.readout, c.subset) == (subset.question, subset.readout, subset.subset)]
    return [metric for metric in dict.fromkeys(["auroc", *shown]) if metric in subset.metrics]


def _means(subset: SubsetResult, n_seeds: int) -> dict[str, Tensor]:
    """Scores per image, means over seeds: "auroc" [L, M], "n_pairs", "n_positive" [M]."""
    per_image = dict(subset.per_image)
    if "auroc" in per_image:
        per_image["auroc"] = per_image["auroc"].unflatten(0, (n_seeds, -1)).mean(0).float()
    return per_image


def _rows(result: ProbeResult, columns: Sequence[Column]) -> Iterator[tuple]:
    """The lines of scores.csv of a probe."""
    for subset in result.subsets:
        metrics, n_images = metrics_of(subset, columns), len(result.keys)
        if not metrics:
            continue
        per_image = _means(subset, len(result.seeds))
        influence = mean_over_seeds(subset.metrics[metrics[0]], len(result.seeds)).influence.tolist()  # [L][M]
        blank = [[""] * n_images] * len(result.layers)
        auroc = [[f"{x:.6f}" if x == x else "" for x in row] for row in per_image["auroc"].tolist()] if per_image else blank
        pairs, positive = ([*per_image[k].tolist()] if per_image else blank[0] for k in ("n_pairs", "n_positive"))
        for index, layer in enumerate(result.layers):
            numbers = zip(result.keys, pairs, positive, auroc[index], influence[index], strict=True)
            for key, n, m, score, moved in numbers:
                place = (subset.question, subset.readout, subset.subset)
                yield (result.row, layer, *place, key, n, m, score, metrics[0], f"{moved:.9g}")


class Predictions:
    """What every fit answers for every image, collected chunk of layers by chunk of layers.

    Args:
        task: its `prediction` says what of the logits is kept.
        sample: the scored split.
    """

    def __init__(self, task: Task, sample: PatchSample) -> None:
        self.task, self.sample = task, sample
        self.chunks: dict[tuple, list[Tensor]] = {}
        self.visited: dict[int, Tensor] = {}

    def add(self, probe: Probe, batch: Batch, logits: Tensor) -> None:
        """Take in the logits [S, L, B, …] of a batch; batches come in the order of the images."""
        self.chunks.setdefault(tuple(probe.layers), []).append(self.task.prediction(logits).cpu())
        if batch.visited is not None:
            self.visited[int(batch.images[0])] = batch.visited

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write "prediction" [S, L, M, …], "position" [M, T, 3] and the labels; fits, layers and image keys in the recipe."""
        tensors = {"prediction": torch.cat([torch.cat(parts, 2) for parts in self.chunks.values()], 1)}
        tensors["position"] = self.sample.position
        tensors |= {f"label/{name}": value for name, value in self.sample.labels.items()}
        if self.visited:
            tensors["visited"] = torch.cat([self.visited[first] for first in sorted(self.visited)])  # [M, T'] tokens asked
        layers = [layer for chunk in self.chunks for layer in chunk]
        fits = [fit._asdict() for fit in self.task.fits()]
        recipe = {**about, "fits": fits, "layers": layers, "images": list(self.sample.keys)}
        save_state(path, tensors, recipe)
