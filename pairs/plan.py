"""mode=plan: bytes, minutes and widths of intervals before any work, from labels' sizes and a pilot of a few images.

    python main.py mode=plan model=dinov2_large dataset=ade20k dataset.root=…       what mode=train of it would take and give
    … plan.width=0.01                                                               the cheapest way to intervals of ± 0.01

Bytes are those of the token files, exactly, if no image is dropped or unreadable. Minutes and half-widths come from running
everything on a few images of each split (`pairs/pilot.py`). What takes longer than a night is followed by what does not.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

import trainer
from activation import SPLITS, build_dataset
from backbones.load import backbone_facts, layers_of
from errors import UserError
from pairs.pilot import NORMAL, Pilot, ask, read_some
from pairs.task import task_maker
from runs.progress import clock, stage, stages
from runs.run import Run
from show.text import format_table
from store.plan import stored_bytes, tokens_per_image

NIGHT = 8 * 3600.0
FEWEST = 50  # test images of a night's plan; below, intervals cover less than they say (`metrics.sample_size`)


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
    stages("a few images", ("tokens of a quarter", 2), ("tokens of all of them", 4), ("fits", 3), ("folds", 3), "plan")
    stage("a few images", parts=len(SPLITS))
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
        "patience": cfg.trainer.patience, "warnings": disk_warnings(cfg, stored),
        "pilot": {"images": {k: len(v) for k, v in scenes.items()}, "score": pilot.value, "layer": pilot.layer,
                  "costs": pilot.costs._asdict()},
    }  # fmt: skip
    if width is not None:
        record["width"], record["ways"] = float(width), cheapest(cfg, pilot, images, float(width))
    if record["total_seconds"] > NIGHT or record["warnings"]:
        record["overnight"] = overnight(cfg, pilot, images)
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


def disk_warnings(cfg: DictConfig, stored: Mapping[str, int]) -> list[str]:
    """What mode=train would refuse: splits whose tokens take more than `cache.disk_gb`."""
    limit = cfg.cache.disk_gb
    large = [f"{name} {n_bytes / 1e9:.3g} GB" for name, n_bytes in stored.items() if n_bytes > limit * 1e9]
    way_out = "raise it, or take fewer layers or patches"
    return [f"mode=train refuses a split of more than cache.disk_gb={limit} ({'; '.join(large)}); {way_out}"] if large else []


def control_choice(cfg: DictConfig) -> list[str]:
    """The controls a run of this configuration has tokens of its own for, beside those that read the probe's."""
    from backbones.module import has_random_weights
    from controls import control_names

    names = control_names(cfg.controls)
    has_random = cfg.model.pretrained and (cfg.model.source != "module" or has_random_weights(cfg.model.name))
    return [name for name in names if name != "random" or has_random]


def cheapest(cfg: DictConfig, pilot: Pilot, images: Mapping[str, int], width: float) -> list[dict[str, Any]]:
    """Ways to intervals of a half-width, by patches and layers; the cheapest first.

    Fewer patches make wider intervals of cheaper images, so more test images are needed; layers change cost alone.
    """
    ways = []
    for n_patches, n_layers, way in _ways(cfg, pilot):
        deviation = next(iter(pilot.deviation.values()))[n_patches]
        if deviation > 0:
            needed = math.ceil((NORMAL * deviation / width) ** 2)
            n_bytes, seconds = way({**images, "test": needed})
            ways.append({"patches": n_patches, "layers": n_layers, "test_images": needed, "enough": needed <= images["test"],
                         "bytes": sum(n_bytes.values()), "seconds": seconds})  # fmt: skip
    return sorted(ways, key=lambda way: (not way["enough"], way["seconds"]))


def overnight(cfg: DictConfig, pilot: Pilot, images: Mapping[str, int], limit: float = NIGHT) -> list[dict[str, Any]]:
    """Ways that take at most `limit` seconds, by patches and layers, each with as many images as fit; the narrowest first.

    All splits are cut alike. What would need more disk than `cache.disk_gb` allows a split is left out, and so is what has
    fewer than FEWEST test images.
    """
    title, ways = next(iter(pilot.deviation)), []
    for n_patches, n_layers, way in _ways(cfg, pilot):
        fixed, all_of_them = way(dict.fromkeys(images, 0))[1], way(images)[1]
        share = min(1.0, max(0.0, limit - fixed) / max(all_of_them - fixed, 1e-9))
        counts = {split: int(n * share) for split, n in images.items()}
        n_bytes, seconds = way(counts)
        if counts["test"] >= FEWEST and counts["val"] > 0 and max(n_bytes.values()) <= cfg.cache.disk_gb * 1e9:
            half_width = pilot.half_width(title, n_patches, counts["test"])
            ways.append({"patches": n_patches, "layers": n_layers, "images": counts, "share": share,
                         "bytes": sum(n_bytes.values()), "seconds": seconds, "half_width": half_width})  # fmt: skip
    return sorted(ways, key=lambda way: (way["half_width"], -way["layers"]))


def _ways(cfg: DictConfig, pilot: Pilot) -> Iterator[tuple[int, int, Any]]:
    """Numbers of patches and layers, with what gives bytes by split and seconds of so many images in each split.

    Reading and the forward pass cost the same whatever is kept of them; fits and scores grow with patches and layers (our
    model of it).
    """
    facts = backbone_facts(cfg.model)
    all_layers, kept = len(layers_of(cfg.model.layers, facts)), tokens_per_image(cfg, facts)
    for n_patches in next(iter(pilot.deviation.values())):
        for n_layers in sorted({all_layers, math.ceil(all_layers / 3), 1}, reverse=True):

            def way(counts: Mapping[str, int], n_patches: int = n_patches, n_layers: int = n_layers) -> tuple[dict, float]:
                share = n_patches / kept * n_layers / all_layers
                costs = pilot.costs._replace(fit=pilot.costs.fit * share, score=pilot.costs.score * share)
                n_bytes = {split: stored_bytes(cfg, n, n_patches, facts.dim, n_layers) for split, n in counts.items()}
                return n_bytes, sum(costs.seconds(counts, int(cfg.trainer.epochs)).values())

            yield n_patches, n_layers, way


def report(record: Mapping[str, Any]) -> str:
    """What a reader sees of a plan."""
    images, pilot, test = record["images"], record["pilot"], record["images"]["test"]
    stored: dict[str, int] = {}
    for name, n_bytes in record["bytes"].items():
        stored[name.rpartition(",")[0]] = stored.get(name.rpartition(",")[0], 0) + n_bytes
    parts = ", ".join(f"{name} {n_bytes / 1e9:.3f}" for name, n_bytes in stored.items())
    seconds = ", ".join(f"{name} {clock(value)}" for name, value in record["seconds"].items())
    counted = ", ".join(f"{n} {split}" for split, n in images.items())
    tested = ", ".join(map(str, pilot["images"].values()))
    lines = [
        f"images: {counted}; {record['patches']} patches of each (pilot: {tested})",
        f"bytes: {record['total_bytes']} = {record['total_bytes'] / 1e9:.3f} GB ({parts}), exact if no image is left out",
        f"time: {clock(record['total_seconds'])} on this machine ({seconds}), beside starting the program"
        + ("; less where trainer.patience stops fits early" if record["patience"] else ""),
    ]
    lines += [f"warning: {sentence}" for sentence in record["warnings"]]
    lines.append(f"95 % intervals over {test} test images; scores are those of the pilot's probes, no result:")
    body = [
        [title, f"{pilot['score'][title]:.3f}", str(pilot["layer"][title]), f"± {half:.4f}"]
        for title, half in record["half_width"].items()
    ]
    lines.append(format_table(["score", "pilot", "layer", "half-width"], body))
    night = record["total_seconds"] / NIGHT
    taken = f"{night:.0%} of it" if night <= 1 else f"{night:.1f} nights"
    lines.append(f"\na night of {NIGHT / 3600:.0f} h: this takes {taken}")
    if "overnight" in record:
        lines.append(
            "what fits into one, the narrowest interval of the first score first (fewer images: dataset.limit or "
            "dataset.n_train, …; fewer patches: protocol.selection.patches; fewer layers: model.layers)"
        )
        table = [
            [str(way["patches"]), str(way["layers"]), " + ".join(map(str, way["images"].values())), f"{way['bytes'] / 1e9:.3f}",
             clock(way["seconds"]), f"± {way['half_width']:.4f}"]
            for way in record["overnight"]
        ]  # fmt: skip
        header = ["patches", "layers", "train + val + test images", "GB", "time", "half-width"]
        lines.append(format_table(header, table) if table else "nothing does: the time is in reading, controls or few images")
    if "ways" in record:
        lines.append(f"\nways to ± {record['width']} of the first score, the cheapest first")
        table = [
            [str(way["patches"]), str(way["layers"]), str(way["test_images"]) + ("" if way["enough"] else " (too few)"),
             f"{way['bytes'] / 1e9:.3f}", clock(way["seconds"])]
            for way in record["ways"]
        ]  # fmt: skip
        lines.append(format_table(["patches", "layers", "test images", "GB", "time"], table))
    return "\n".join(lines)
