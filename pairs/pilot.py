"""The pilot of mode=plan: everything is run on a few images, for what a run costs and how wide its intervals will be.

    read_some   a few images of each split          ask   run everything on them
    Costs       seconds, fixed and per image        Pilot   costs, and deviations of scores per image

Seconds: a part that does not grow with the number of images (weights are loaded) is separated from one that does by running it
for a quarter of the images first.

Deviations: an interval over M images is sqrt(m / M) times as wide as one over m. So that a few images say as much as they
can, all of them are tested, in FOLDS folds, by probes fitted on the others. A probe that has seen more images scores more
evenly; what that does to the width is followed from half of the training images of a fold to all of them, and on to those of
the run as a power of their number: between not at all and 1 / sqrt(n), the same for all columns (our choice; how often it hits
is in docs/results.md).
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import trainer
from activation import PatchSample, open_samples
from controls import CONTROLS, PROBE_ROW, Opened, Subject, build_controls
from datasets.in_memory import Collection, hand_over
from datasets.scene import Scene, UnreadableScene
from errors import UserError
from metrics.bootstrap import Estimate, mean_over_seeds
from pairs.folds import deal, pool, pool_results, take
from pairs.task import columns, show, task_maker
from runs.fit_ahead import FASTER, seconds_beside
from runs.progress import stage, track
from runs.run import Run, identify
from show.records import Column, Resampling, find, write_records
from tasks import Fold, ProbeResult, Task, read_seeds

NORMAL = 1.959964  # half-width of a 95 % interval in standard deviations
BACKWARD = 3  # a training step costs about three times as much as asking the probe
LEAST = 8  # images of a split that a pilot needs
FOLDS = 4


class Costs(NamedTuple):
    """Seconds of a run: what does not grow with images, and per image.

    fixed: loading weights. show: table and figure. read: an image of the data set. tokens: labels and tokens of an image, for
    all models. fit: a visit of an image by every fit. score: a scored image by every fit, with its records.
    """

    fixed: float
    show: float
    read: float
    tokens: float
    fit: float
    score: float

    def seconds(self, images: Mapping[str, int], epochs: float) -> dict[str, float]:
        """Of each part of a run of so many images in each split."""
        total = sum(images.values())
        return {
            "labels and tokens": self.fixed + total * (self.read + self.tokens),
            "fits": self.fit * visits(images, epochs),
            "scores and figure": self.show + self.score * (images["test"] + images["val"]),
        }


def visits(images: Mapping[str, int], epochs: float) -> float:
    """How often a fit asks about an image, a training step counted as often as it costs."""
    return epochs * (BACKWARD * images["train"] + images["val"])


class Pilot(NamedTuple):
    """What a few images showed.

    costs: of this machine. deviation: per column and number of patches, the deviation of the score per image, of probes that
    have seen the run's training images. value: the pilot's score per column, at its best layer `layer`. images: tested ones.
    """

    costs: Costs
    deviation: dict[str, dict[int, float]]
    value: dict[str, float]
    layer: dict[str, int | str]
    images: int

    def half_width(self, title: str, n_patches: int, n_images: int) -> float:
        """Of the 95 % interval of a column over so many images with so many patches."""
        return NORMAL * self.deviation[title][n_patches] / math.sqrt(n_images)


def read_some(data: Mapping[str, Any], n_images: int) -> tuple[dict[str, list[Scene]], float]:
    """A few images of each split, evenly spread, and the seconds one takes to read.

    Raises:
        UserError: a split has fewer than LEAST readable images.
    """
    scenes: dict[str, list[Scene]] = {}
    started, n_read = time.perf_counter(), 0
    for split, dataset in data.items():
        wanted = min(len(dataset), n_images if split != "val" else max(LEAST, n_images // 4))
        scenes[split] = []
        for i in track(range(wanted), split, "image"):
            try:
                scenes[split].append(dataset[i * len(dataset) // wanted])
            except UnreadableScene:
                if dataset.on_error != "skip":
                    raise
            n_read += 1
        if len(scenes[split]) < LEAST:
            raise UserError(f"split {split} has {len(scenes[split])} readable images, a plan needs {LEAST}; add images")
    return scenes, (time.perf_counter() - started) / n_read


def ask(cfg: DictConfig, scenes: Mapping[str, list[Scene]], classes: list[str], seconds_to_read: float, n_train: int) -> Pilot:
    """Run everything on the images of a pilot, tokens in a temporary folder; the run has `n_train` training images."""
    times, counts = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, share in enumerate((4, 1)):
            stage("tokens of all of them" if number else "tokens of a quarter", parts=9)
            part = {split: of_split[::share] if len(of_split) >= LEAST * share else of_split[: LEAST // 2 * (1 + number)]
                    for split, of_split in scenes.items()}  # fmt: skip
            small = pilot_config(cfg, part, classes, Path(folder) / str(number))
            started = time.perf_counter()
            samples = open_samples(small, _silent)
            controls = build_controls(Opened(small, samples), CONTROLS, _silent)
            for subject in controls:
                for sample in subject.samples.values():
                    sample.tokens.gather([0])
            times.append(time.perf_counter() - started)
            counts.append(sum(map(len, part.values())))
        per_image = max(0.0, (times[1] - times[0]) / max(counts[1] - counts[0], 1))
        fixed = max(0.0, times[0] - per_image * counts[0])
        aside = Path(folder) / "run"
        aside.mkdir()
        quiet = Run(aside, identify(cfg))
        quiet.say = _silent  # type: ignore[method-assign]
        try:
            costs, shown = _costs(small, quiet, samples, controls, Costs(fixed, 0.0, seconds_to_read, per_image, 0.0, 0.0))
            return _widths(small, quiet, samples, shown, n_train)._replace(costs=costs)
        finally:
            quiet.close()


def pilot_config(cfg: DictConfig, scenes: Mapping[str, list[Scene]], classes: list[str], folder: Path) -> DictConfig:
    """The configuration of a run on these images alone."""
    small = cfg.copy()
    handle = hand_over(Collection({split: list(of_split) for split, of_split in scenes.items()}, classes))
    data = {"_target_": "datasets.in_memory.InMemory", "handle": handle, "on_error": "raise"}
    OmegaConf.update(small, "dataset", data, merge=False)
    OmegaConf.update(small, "cache.dir", str(folder))
    OmegaConf.update(small, "cache.workers", 0)
    return small


def _silent(text: str) -> None:
    pass


def _costs(
    cfg: DictConfig, run: Run, samples: dict[str, PatchSample], controls: Sequence[Subject], costs: Costs
) -> tuple[Costs, list[Column]]:
    """Fit and score the probe and its controls on the pilot, for the seconds per image; and the columns of the table."""
    stage("fits", parts=3 * (1 + len(controls)))
    make, seeds, options = task_maker(cfg), read_seeds(cfg.trainer.seeds), trainer.FitOptions.read(cfg)
    counts, resampling = {split: len(sample.keys) for split, sample in samples.items()}, Resampling.read(cfg)
    began = time.perf_counter()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # the first optimizer of a process imports half of torch
    costs = costs._replace(fixed=costs.fixed + time.perf_counter() - began)
    scoring, fitting, n_threads, beside = 0.0, [], torch.get_num_threads(), options.processes > 1
    results: list[ProbeResult] = []
    for subject in [Subject(PROBE_ROW, "", cfg.probe, samples, seeds), *controls]:
        task = make(subject.seeds)
        torch.set_num_threads(1 if beside else n_threads)  # as the run will fit
        began = time.perf_counter()
        stack = trainer.fit_stack(run, task, subject, options)
        fitted = time.perf_counter()
        torch.set_num_threads(n_threads)
        scored = trainer.evaluate(task, stack, subject, options, split="test")
        trainer.evaluate(task, stack, subject, options, split="val", detail=False)
        write_records(run, scored, resampling, split="test")
        scoring += time.perf_counter() - fitted
        fitting.append((fitted - began) / visits(counts, _epochs(scored, options.epochs)))
        results.append(scored)
    result, began = results[0], time.perf_counter()
    show(results, cfg, run, resampling, "test")
    costs = costs._replace(show=time.perf_counter() - began)
    fit = seconds_beside(fitting, options.processes) if beside else None
    fit = fit or sum(fitting) / (FASTER if beside else 1.0)
    costs = costs._replace(fit=fit, score=scoring / (counts["test"] + counts["val"]))
    questions = {subset.question for subset in result.subsets}
    return costs, [c for c in columns(cfg.task, cfg.protocol.pairs.accuracy, questions) if c.metric == "auroc"]


def _epochs(result: ProbeResult, most: int) -> float:
    """The epochs of the fits of a stack, on average; `most` where nothing was fitted by epochs."""
    counted = [fit.epochs for fit in result.fits if fit.epochs]
    return sum(counted) / len(counted) if counted else float(most)


def _widths(cfg: DictConfig, run: Run, samples: dict[str, PatchSample], shown: Sequence[Column], n_train: int) -> Pilot:
    """Deviations of the scores, by folds over the images of all splits, of one seed (seeds differ little).

    Args:
        n_train: training images of the run.
    """
    make, seeds, options = task_maker(cfg), read_seeds(cfg.trainer.seeds)[:1], trainer.FitOptions.read(cfg)
    pooled, kept = pool(samples), int(samples["test"].position.shape[1])
    sizes = [n for n in (kept // 4, kept // 2) if n >= 8] + [kept]
    stage("folds", parts=FOLDS * (2 + len(sizes)))
    whole: dict[int, list[Fold]] = {n_patches: [] for n_patches in sizes}
    half: list[Fold] = []
    folds = deal({split: len(sample.keys) for split, sample in samples.items()}, FOLDS, int(cfg.seed))
    for number, images in enumerate(folds, start=1):
        for name, train in (("", images["train"]), ("half", images["train"][::2])):
            parts = {split: take(pooled, of_split) for split, of_split in {**images, "train": train}.items()}
            subject = Subject(PROBE_ROW, "", cfg.probe, parts, seeds, part=f"fold-{number}{name}")
            stack = trainer.fit_stack(run, make(seeds), subject, options)
            for n_patches in [kept] if name else sizes:
                task = partial_task(make, seeds, n_patches) if n_patches < kept else make(seeds)
                found = Fold(images["test"], trainer.evaluate(task, stack, subject, options, split="test"))
                (half if name else whole[n_patches]).append(found)
    n_fold = min(len(images["train"]) for images in folds)
    results = {n_patches: pool_results(of_size, pooled.keys) for n_patches, of_size in whole.items()}
    result, with_half = results[kept], pool_results(half, pooled.keys)
    best = {c.title: _best(result, c) for c in shown}
    shown = [c for c in shown if best[c.title] is not None]
    ratios = [_deviation(with_half, c) / _deviation(result, c) for c in shown if _deviation(result, c) > 0]
    factor = growth(ratios, n_fold, n_train)
    deviation = {c.title: {n: factor * _deviation(r, c) for n, r in sorted(results.items())} for c in shown}
    value = {c.title: float(_mean(result, c).value[best[c.title]]) for c in shown}
    layer = {c.title: result.layers[best[c.title]] for c in shown}
    return Pilot(Costs(0.0, 0.0, 0.0, 0.0, 0.0, 0.0), deviation, value, layer, len(pooled.keys))


def growth(ratios: Sequence[float], n_fold: int, n_train: int) -> float:
    """Factor from the deviations of probes of `n_fold` training images to those of `n_train`, a power of their number.

    Args:
        ratios: of each column, the deviation with half of the training images by that with all.
    """
    known = [math.log2(ratio) for ratio in ratios if ratio > 0 and math.isfinite(ratio)]
    power = min(0.5, max(0.0, sum(known) / len(known))) if known else 0.0
    return min(1.0, n_fold / n_train) ** power


def partial_task(make: Callable[[Sequence[int]], Task], seeds: Sequence[int], n_patches: int) -> Task:
    """The task that looks at some of the patches of an image only."""
    task = make(seeds)
    task.per_visit = n_patches
    return task


def _mean(result: ProbeResult, column: Column) -> Estimate:
    return mean_over_seeds(find(result, column), len(result.seeds))


def _best(result: ProbeResult, column: Column) -> int | None:
    """Index of the layer with the highest score; None where it is undefined everywhere."""
    if find(result, column) is None:
        return None
    value = _mean(result, column).value
    return None if bool(value.isnan().all()) else int(value.nan_to_num(-1).argmax())


def _deviation(result: ProbeResult, column: Column) -> float:
    """Deviation of a score per image, from the influence of each; of the layers, which differ little, the mean."""
    if find(result, column) is None:
        return math.nan
    influence: Tensor = _mean(result, column).influence  # [L, M]
    n_images = influence.shape[1]
    return float((n_images * influence.square().sum(1) * n_images / max(n_images - 1, 1)).mean().sqrt())
