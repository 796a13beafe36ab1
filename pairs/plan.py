"""mode=plan: bytes, minutes and widths of intervals before any work, from labels' sizes and a pilot of a few images.

    python main.py mode=plan model=dinov2_large dataset=ade20k dataset.root=…       what mode=train of it would take and give
    … plan.width=0.01                                                               the cheapest way to intervals of ± 0.01

Bytes are those of the token files, exactly, if no image is dropped or unreadable. Minutes come from running everything on a
few images of each split: a part that does not grow with their number (weights are loaded) and one that does, separated by
running it for a quarter of them first. Half-widths come from the influence of every pilot image on the score: an interval over
M images is sqrt(m / M) times as wide as one over m. A probe that has seen more images scores better and more evenly: what
that does to the width is followed from half of the pilot's training images to all of them, and on to those of the run as
1 / sqrt(n) (our choice).
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
from activation import SPLITS, PatchSample, build_dataset, open_samples
from backbones.load import backbone_facts, layers_of
from controls import CONTROLS, PROBE_ROW, Opened, Subject, build_controls
from datasets.in_memory import Collection, hand_over
from datasets.scene import Scene, UnreadableScene
from errors import UserError
from metrics.bootstrap import Estimate, mean_over_seeds
from pairs.folds import pool, take
from pairs.task import columns, show, task_maker
from runs.progress import clock, stage, stages
from runs.run import Run, identify
from show.records import Column, Resampling, find, write_records
from show.text import format_table
from store.plan import stored_bytes, tokens_per_image
from tasks import ProbeResult, read_seeds

NORMAL = 1.959964  # half-width of a 95 % interval in standard deviations
NIGHT = 10 * 3600.0
BACKWARD = 3  # a training step costs about three times as much as asking the probe
LEAST = 8  # images of a split that a pilot needs


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

    def seconds(self, images: Mapping[str, int], epochs: int) -> dict[str, float]:
        """Of each part of a run of so many images in each split."""
        total = sum(images.values())
        return {
            "labels and tokens": self.fixed + total * (self.read + self.tokens),
            "fits": self.fit * visits(images, epochs),
            "scores and figure": self.show + self.score * (images["test"] + images["val"]),
        }


def visits(images: Mapping[str, int], epochs: int) -> int:
    """How often a fit asks about an image, a training step counted as often as it costs."""
    return epochs * (BACKWARD * images["train"] + images["val"])


class Pilot(NamedTuple):
    """What a few images showed.

    costs: of this machine. deviation: per column and number of patches, the deviation of the score per image. value: the
    pilot's score per column, at its best layer `layer`.
    """

    costs: Costs
    deviation: dict[str, dict[int, float]]
    value: dict[str, float]
    layer: dict[str, int | str]

    def half_width(self, title: str, n_patches: int, n_images: int) -> float:
        """Of the 95 % interval of a column over so many images with so many patches."""
        return NORMAL * self.deviation[title][n_patches] / math.sqrt(n_images)


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=plan: write one record and print it.

    Raises:
        UserError: a mistake in command, data or weights; too few images for a pilot.
    """
    width = cfg.plan.width
    if width is not None and not (isinstance(width, int | float) and 0 < width < 0.5):
        raise UserError(f"plan.width: got {width}, expected a half-width between 0 and 0.5, such as 0.01, or null")
    if cfg.trainer.folds != 1:
        raise UserError(f"mode=plan plans one fit of each probe, got trainer.folds={cfg.trainer.folds}; leave it out")
    task_maker(cfg), trainer.FitOptions.read(cfg)  # what these refuse is refused before any image is read
    stages(("a few images", 1), ("a quarter of them", 2), ("all of them", 6), "plan")
    stage("a few images")
    data = {split: build_dataset(cfg, split) for split in SPLITS}
    images = {split: len(dataset) for split, dataset in data.items()}
    scenes, seconds_to_read = read_some(data, int(cfg.plan.images))
    pilot = ask(cfg, scenes, list(data["train"].classes), seconds_to_read, images["train"])
    stage("plan")
    stored = planned_bytes(cfg, images)
    kept = tokens_per_image(cfg, backbone_facts(cfg.model))
    seconds = pilot.costs.seconds(images, int(cfg.trainer.epochs))
    half_widths = {title: pilot.half_width(title, kept, images["test"]) for title in pilot.deviation}
    record = {
        "kind": "plan", "images": images, "patches": kept, "bytes": stored, "total_bytes": sum(stored.values()),
        "seconds": seconds, "total_seconds": sum(seconds.values()), "half_width": half_widths,
        "pilot": {"images": {k: len(v) for k, v in scenes.items()}, "score": pilot.value, "layer": pilot.layer,
                  "costs": pilot.costs._asdict()},
    }  # fmt: skip
    ways = None if width is None else cheapest(cfg, pilot, images, float(width))
    if ways is not None:
        record["width"], record["ways"] = float(width), ways
    run.write(record)
    run.finishing()
    run.say(report(record))
    return {"objective": None, "plan": record}


def planned_bytes(cfg: DictConfig, images: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the token files of every model, by model and split: exact if no image is dropped."""
    facts = backbone_facts(cfg.model)
    n_layers, kept = len(layers_of(cfg.model.layers, facts)), tokens_per_image(cfg, facts)
    sizes = {"model": (facts.dim, n_layers, kept)}
    subjects = control_choice(cfg)
    if {"pixels", "pixels_position"} & set(subjects) and cfg.probe.mode != "attention":
        patches = kept - facts.has_class_token if cfg.model.output_mode == "all" else kept
        sizes["pixels"] = (3 * facts.patch_size**2, 1, patches)
    if "random" in subjects:
        sizes["random weights"] = sizes["model"]
    return {
        f"{name}, {split}": stored_bytes(cfg, images[split], n_tokens, dim, n_layers)
        for name, (dim, n_layers, n_tokens) in sizes.items()
        for split in SPLITS
    }


def control_choice(cfg: DictConfig) -> list[str]:
    """The controls a run of this configuration has tokens of its own for, beside those that read the probe's."""
    from backbones.module import has_random_weights
    from controls import control_names

    names = control_names(cfg.controls)
    has_random = cfg.model.pretrained and (cfg.model.source != "module" or has_random_weights(cfg.model.name))
    return [name for name in names if name != "random" or has_random]


# ---------------------------------------------------------------------------------------------------------------- pilot


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
        for i in range(wanted):
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
            stage("all of them" if number else "a quarter of them")
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
            return _fit(small, quiet, samples, controls, Costs(fixed, 0.0, seconds_to_read, per_image, 0.0, 0.0), n_train)
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


def _fit(
    cfg: DictConfig,
    run: Run,
    samples: dict[str, PatchSample],
    controls: Sequence[Subject],
    costs: Costs,
    n_train: int,
) -> Pilot:
    """Fit and score the probe and its controls on the pilot; seconds per image, and deviations of the scores."""
    make, seeds, options = task_maker(cfg), read_seeds(cfg.trainer.seeds), trainer.FitOptions.read(cfg)
    counts, resampling = {split: len(sample.keys) for split, sample in samples.items()}, Resampling.read(cfg)
    fitting = scoring = 0.0
    main_stack: Any = None
    results: list[ProbeResult] = []
    for subject in [Subject(PROBE_ROW, "", cfg.probe, samples, seeds), *controls]:
        began = time.perf_counter()
        task = make(subject.seeds)
        stack = trainer.fit_stack(run, task, subject, options)
        fitted = time.perf_counter()
        scored = trainer.evaluate(task, stack, subject, options, split="test")
        trainer.evaluate(task, stack, subject, options, split="val", detail=False)
        write_records(run, scored, resampling, split="test")
        fitting, scoring = fitting + fitted - began, scoring + time.perf_counter() - fitted
        results.append(scored)
        if len(results) == 1:
            main_stack = (stack, subject)
    result, began = results[0], time.perf_counter()
    show(results, cfg, run, resampling, "test")
    costs = costs._replace(show=time.perf_counter() - began)
    costs = costs._replace(fit=fitting / visits(counts, options.epochs), score=scoring / (counts["test"] + counts["val"]))
    shown = [
        c for c in columns(cfg.task, cfg.protocol.pairs.accuracy, {s.question for s in result.subsets}) if c.metric == "auroc"
    ]
    kept = result_tokens(samples["test"])
    by_patches = {kept: result}
    for n_patches in (kept // 4, kept // 2):
        if n_patches >= 8:
            task = partial_task(make, seeds, n_patches)
            by_patches[n_patches] = trainer.evaluate(task, main_stack[0], main_stack[1], options, split="test")
    half = _with_half(cfg, run, make, seeds, samples, options)
    trend = {c.title: _trend(_deviation(half, c), _deviation(result, c), counts["train"] / n_train) for c in shown}
    deviation = {c.title: {n: trend[c.title] * _deviation(r, c) for n, r in sorted(by_patches.items())} for c in shown}
    best = {c.title: _best(result, c) for c in shown}
    known = {title: at for title, at in best.items() if at is not None}
    value = {title: float(_mean(result, c).value[known[title]]) for c in shown if (title := c.title) in known}
    layer = {title: result.layers[at] for title, at in known.items()}
    return Pilot(costs, {title: deviation[title] for title in known}, value, layer)


def _with_half(
    cfg: DictConfig, run: Run, make: Callable, seeds: Sequence[int], samples: dict[str, PatchSample], options: Any
) -> ProbeResult:
    """The scores of the probe fitted on half of the pilot's training images."""
    train = samples["train"]
    fewer = {**samples, "train": take(pool(samples), torch.arange(0, len(train.keys), 2))}
    subject = Subject(PROBE_ROW, "", cfg.probe, fewer, list(seeds), part="half")
    stack = trainer.fit_stack(run, make(seeds), subject, options)
    return trainer.evaluate(make(seeds), stack, subject, options, split="test")


def _trend(half: float, whole: float, share: float) -> float:
    """Factor from the deviation with all training images of the pilot to that with all of the run, as a + b / sqrt(n).

    Args:
        half, whole: deviations with half and with all of the pilot's images. share: of the run's images that the pilot has.
    """
    if not (half > 0 and whole > 0):
        return 1.0
    step = (1 - math.sqrt(min(share, 1.0))) / (math.sqrt(2) - 1)  # from half to whole is a step of one
    return min(1.0, max(0.5, 1 - (half / whole - 1) * step))


def result_tokens(sample: PatchSample) -> int:
    """Tokens of an image that are scored."""
    return int(sample.position.shape[1])


def partial_task(make: Callable, seeds: Sequence[int], n_patches: int) -> Any:
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


# ---------------------------------------------------------------------------------------------------- cheapest plan


def cheapest(cfg: DictConfig, pilot: Pilot, images: Mapping[str, int], width: float) -> list[dict[str, Any]]:
    """Ways to intervals of a half-width, by patches and layers; the cheapest first.

    Fewer patches make wider intervals of cheaper images, so more test images are needed; layers change cost alone. Reading and
    the forward pass cost the same whatever is kept of them; fits and scores grow with patches and layers (our model of it).
    """
    facts = backbone_facts(cfg.model)
    all_layers, kept = len(layers_of(cfg.model.layers, facts)), tokens_per_image(cfg, facts)
    title = next(iter(pilot.deviation))
    ways = []
    for n_patches, deviation in pilot.deviation[title].items():
        if not deviation > 0:
            continue
        needed = math.ceil((NORMAL * deviation / width) ** 2)
        for n_layers in sorted({all_layers, math.ceil(all_layers / 3), 1}, reverse=True):
            share = n_patches / kept * n_layers / all_layers
            counts = {**images, "test": needed}
            costs = pilot.costs._replace(fit=pilot.costs.fit * share, score=pilot.costs.score * share)
            seconds = sum(costs.seconds(counts, int(cfg.trainer.epochs)).values())
            n_bytes = sum(stored_bytes(cfg, n, n_patches, facts.dim, n_layers) for n in counts.values())
            ways.append({"patches": n_patches, "layers": n_layers, "test_images": needed, "enough": needed <= images["test"],
                         "bytes": n_bytes, "seconds": seconds})  # fmt: skip
    return sorted(ways, key=lambda way: (not way["enough"], way["seconds"]))


def report(record: Mapping[str, Any]) -> str:
    """What a reader sees of a plan."""
    images, pilot = record["images"], record["pilot"]
    stored: dict[str, int] = {}
    for name, n_bytes in record["bytes"].items():
        stored[name.rpartition(",")[0]] = stored.get(name.rpartition(",")[0], 0) + n_bytes
    parts = ", ".join(f"{name} {n_bytes / 1e9:.3f}" for name, n_bytes in stored.items())
    seconds = ", ".join(f"{name} {clock(value)}" for name, value in record["seconds"].items())
    counted = ", ".join(f"{n} {split}" for split, n in images.items())
    total, night = record["total_seconds"], NIGHT / max(record["total_seconds"], 1e-9)
    overnight = f"{night:.0f} times as much" if night >= 2 else "all of it" if night >= 1 else f"{night:.0%} of the images"
    body = [
        [title, f"{pilot['score'][title]:.3f}", str(pilot["layer"][title]), f"± {half:.4f}"]
        for title, half in record["half_width"].items()
    ]
    lines = [
        f"images    {counted}; {record['patches']} patches of each (pilot: {', '.join(map(str, pilot['images'].values()))})",
        f"bytes     {record['total_bytes']} = {record['total_bytes'] / 1e9:.3f} GB ({parts}), exact if no image is left out",
        f"time      {clock(total)} on this machine: {seconds}; beside starting the program",
        f"a night   of {NIGHT / 3600:.0f} h is enough for {overnight}",
        f"interval  95 % over {images['test']} test images; scores are those of the pilot, no result",
        format_table(["score", "pilot", "layer", "half-width"], body),
    ]
    if "ways" in record:
        lines.append(f"\nways to ± {record['width']} of the first score, the cheapest first")
        table = [
            [str(way["patches"]), str(way["layers"]), str(way["test_images"]) + ("" if way["enough"] else " (too few)"),
             f"{way['bytes'] / 1e9:.3f}", clock(way["seconds"])]
            for way in record["ways"]
        ]  # fmt: skip
        lines.append(format_table(["patches", "layers", "test images", "GB", "time"], table))
    return "\n".join(lines)
