"""All dense evaluations in one table, on one extraction: mode=dense_suite, and the modes that are a part of it.

    EVALUATIONS   name -> function, and what it needs; the options of an evaluation are the block of its name
    run           the entry of mode=dense_suite, patch_class, linear_seg, overcluster, dense_retrieval, cbfe_cd

Every evaluation runs on the backbone and on its controls (random weights, raw pixels, position). A finished evaluation is
kept in the run directory: the same command after a kill goes on with the next one and ends with the same numbers.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from activation import build_dataset
from backbones.attention import check_class_attention
from backbones.load import backbone_facts
from controls import position_code
from dense import cbfe_cd, linear_seg, logistic, overcluster, patch_class, retrieval
from dense.contract import Grids, Result, check_choices, mean_over_seeds, score_size, seed_list
from dense.features import Split, dense_config, open_split
from dense.foreground import attention_maps
from dense.live import Augment, live_stream
from dense.projection import check_clusters, check_components
from dense.references import ceiling, majority
from dense.report import BACKBONE, load_results, main_metric, records, save_results, table, write_image_scores, write_rows
from dense.sliding import check_slide, sliding_windows
from errors import UserError
from files import digest, plain
from machine import choose_device, set_threads
from metrics.bootstrap import resample
from runs.progress import count, stage, stages
from runs.run import Run
from show.text import score_text


class Evaluation(NamedTuple):
    """A function `(features, labels, *, options) -> list[Result]`, the options being the block of its name.

    choices: the values of its options that have a fixed set of them. per_layer: it takes one layer at a time (its results
    are given their layer here). attention: it reads the attention of the class token.
    """

    function: Callable[..., list[Result]]
    choices: Mapping[str, Any] = {}
    per_layer: bool = False
    attention: bool = False


EVALUATIONS: dict[str, Evaluation] = {
    "patch_class": Evaluation(patch_class.patch_class, patch_class.CHOICES),
    "linear_seg": Evaluation(linear_seg.linear_seg, linear_seg.CHOICES),
    "logistic_seg": Evaluation(logistic.logistic_seg, logistic.CHOICES),
    "overcluster": Evaluation(overcluster.overcluster, overcluster.CHOICES, per_layer=True),
    "dense_retrieval": Evaluation(retrieval.retrieval, retrieval.CHOICES, per_layer=True),
    "cbfe_cd": Evaluation(cbfe_cd.cbfe_cd, cbfe_cd.CHOICES, per_layer=True, attention=True),
    "attention_maps": Evaluation(attention_maps, attention=True),
}
CONTROLS = ("random", "pixels", "position")


def options_of(cfg: DictConfig, name: str) -> dict[str, Any]:
    """The options of an evaluation, as its function takes them.

    Raises:
        UserError: an option it does not have.
    """
    given = OmegaConf.to_container(cfg[name], resolve=True)
    given |= {"seed": int(cfg.seed)} if name == "cbfe_cd" else {}
    for key in ("live", "augment", "slide"):  # they say where the images come from, see `live_images` and `evaluate`
        given.pop(key, None)
    known = inspect.signature(EVALUATIONS[name].function).parameters
    for key in given:
        if key not in known:
            valid = ", ".join(k for k, p in known.items() if p.kind == p.KEYWORD_ONLY)
            raise UserError(f"unknown option {name}.{key}; valid: {valid}")
    return given


def live_images(cfg: DictConfig, name: str) -> Augment | None:
    """What is drawn of the training images at every pass, where an evaluation sees them live; None: it reads stored tokens.

    Raises:
        UserError: an option that does not exist, or shares out of range.
    """
    block = cfg[name]
    return Augment.read(OmegaConf.to_container(block.augment), name) if block.get("live") else None


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Run the evaluations of `dense.evaluations` on the backbone and its controls; records, CSV files, figures, the table.

    Returns:
        {"objective": the main metric of the first evaluation at its last setting; None where the test split is scored, on
        which no sweeper may choose: with dense.test_split=val there is one}.

    Raises:
        UserError: whatever can be known to fail, before anything is extracted.
    """
    set_threads(cfg.threads)
    device = choose_device(cfg.device)
    cfg = dense_config(cfg)
    names = check(cfg)
    train, test = cfg.dense.train_split, cfg.dense.test_split
    attention = any(EVALUATIONS[name].attention for name in names)
    stages(("features", 2), ("evaluations", 4), "table and figures")
    stage("features", parts=4)
    opened: dict[str, dict[str, Split]] = {}
    for subject, own in subjects(cfg):
        reads = attention and subject in (BACKBONE, "random")
        opened[subject] = {
            role: open_split(own, split, run.say, attention=reads) for role, split in (("train", train), ("test", test))
        }
    if "position" in control_names(cfg):
        opened["position"] = {role: at_position(split) for role, split in opened[BACKBONE].items()}
    run.rest_on({subject: {role: made_from(split) for role, split in splits.items()} for subject, splits in opened.items()})

    results: dict[str, dict[str, list[Result]]] = {name: {} for name in names}
    test_maps = opened[BACKBONE]["test"].maps
    counts = resample(test_maps.n_images, int(cfg.trainer.n_boot), int(cfg.seed))
    jobs = list(plan(names, opened))
    stage("evaluations", parts=len(jobs))
    for name, subject, layer in jobs:
        with count(f"{name} of {subject}" + ("" if layer is None else f", layer {layer}"), 1, "evaluation") as step:
            found = evaluate(cfg, run, name, subject, layer, opened[subject], str(device))
            step.update()
        results[name].setdefault(subject, []).extend(found)
        for record in records(name, subject, found, test, test_maps.classes, counts):
            run.write(record)
    stage("table and figures")
    features, labels = contents(opened[BACKBONE])
    size = cfg.dense.reference_size
    references = ceiling(features, labels, size=size) + majority(features, labels, size=size)
    for record in records("reference", "labels", references, test, test_maps.classes, counts):
        run.write(record)
    rows = write_rows(run.dir, results, test_maps.classes, counts)
    write_image_scores(run.dir, results, opened[BACKBONE]["test"].sample.keys)
    run.facts["sha256"] = {"scores.csv": hashlib.sha256((run.dir / "scores.csv").read_bytes()).hexdigest()}
    if cfg.dense.figures:
        from dense import figures  # here, so that no result waits for or depends on matplotlib

        figures.write_figures(cfg, run.dir, rows, results, opened[BACKBONE], counts)
    n_images = f"{labels['train'].n_images} training, {test_maps.n_images} scored"
    run.say(table(results, counts, references))
    run.say(f"mIoU unless said; 95 % intervals over images ({n_images}); protocol {cfg.protocol.name}\nresults: {run.dir}")
    say_published(cfg, run, results)
    first = results[names[0]][BACKBONE][-1]
    return {"objective": None if test == "test" else float(first.metrics[main_metric(first)].value)}


def say_published(cfg: DictConfig, run: Run, results: Mapping[str, Mapping[str, list[Result]]]) -> None:
    """Ours beside the published pooled accuracy of patches, where `dense.published` has one for the model."""
    published, found = cfg.dense.published.get(run.identity["model"]), results.get("patch_class", {}).get(BACKBONE)
    if published is None or not found:
        return
    ours = [result for result in mean_over_seeds(found) if result.setting["size"] == "patches"][-1]
    value = float(ours.metrics["accuracy"].value)
    shown = score_text(published), score_text(value), score_text(value - published, "+")
    run.say(f"pooled accuracy of {run.identity['model']}: published {shown[0]}, ours {shown[1]}, difference {shown[2]}")


def check(cfg: DictConfig) -> list[str]:
    """The names of the evaluations, after everything that can be refused without tokens was.

    Raises:
        UserError: an unknown evaluation, control or option, a fraction that leaves no image, more clusters than tokens, a
            model without a class token whose attention is read, a data set without the split asked for.
    """
    names = list(cfg.dense.evaluations)
    unknown = [name for name in names if name not in EVALUATIONS]
    if unknown or not names:
        raise UserError(f"dense.evaluations={names}: expected some of {', '.join(EVALUATIONS)}")
    control_names(cfg)
    score_size(cfg.dense.reference_size, (1, 1), 1, (1, 1))
    facts = backbone_facts(cfg.model)
    n_images = {split: len(build_dataset(cfg, split)) for split in (cfg.dense.train_split, cfg.dense.test_split)}
    classes = build_dataset(cfg, cfg.dense.test_split).classes
    train, test = n_images[cfg.dense.train_split], n_images[cfg.dense.test_split]
    patches = facts.image_size[0] * facts.image_size[1] // facts.patch_size**2  # of one window; images have one or more
    for name in names:
        options = options_of(cfg, name)
        check_choices(name, EVALUATIONS[name].choices, options)
        if "seeds" in options:
            seed_list(options["seeds"], f"{name}.seeds")
        for size in [options.get("size", "full"), *options.get("score_sizes", ())]:
            score_size(size, (1, 1), 1, (1, 1))
        if options.get("pca"):
            check_components(options["pca"], facts.dim)
        live_images(cfg, name)
        check_slide(cfg[name].get("slide"), name)
        if options.get("held_out") and options.get("selection", "train_part") == "train_part":
            linear_seg.split_images(train, options["held_out"], 0)
        if EVALUATIONS[name].attention:
            check_class_attention(facts)
        if name == "overcluster":
            for count in overcluster.cluster_counts(options["n_clusters"], len(classes)):
                check_clusters(count, test * patches)
        if name == "cbfe_cd":
            check_clusters(options["foreground_clusters"], (train + test) * patches)
        if name == "dense_retrieval":
            retrieval.choose_images(train, options["fraction"], options["fraction_seed"])
    return names


def control_names(cfg: DictConfig) -> list[str]:
    """The controls of `dense.controls`.

    Raises:
        UserError: an unknown one.
    """
    names = list(cfg.dense.controls)
    unknown = [name for name in names if name not in CONTROLS]
    if unknown:
        raise UserError(f"unknown control {unknown[0]} in dense.controls; valid: {', '.join(CONTROLS)}")
    return names


def subjects(cfg: DictConfig) -> list[tuple[str, DictConfig]]:
    """The backbone and the controls that are models of their own, each with its configuration."""
    changes = {
        "random": {"pretrained": False, "weights": None, "digest": None},
        "pixels": {"source": "pixels", "layers": ["embed"], "norm": False},
    }
    found = [(BACKBONE, cfg)]
    for name in control_names(cfg):
        if name in changes and not (name == "random" and not cfg.model.pretrained):
            other = cfg.copy()
            OmegaConf.update(other, "model", OmegaConf.merge(cfg.model, changes[name]), merge=False)
            found.append((name, other))
    return found


def at_position(split: Split) -> Split:
    """The same images with sine-cosine codes of row and column in place of tokens."""
    shapes = split.grids.shapes

    def read(images: torch.Tensor) -> torch.Tensor:
        h, w = shapes[int(images[0])].tolist()
        place = torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(w))[None]  # [1, N, 3]
        return position_code(place).view(1, 1, h, w, -1).expand(-1, len(images), -1, -1, -1)

    grids = Grids(read, shapes, layers=["position"], dim=read(torch.arange(1)).shape[-1], patch=split.grids.patch)
    return split._replace(grids=grids)


def plan(names: list[str], opened: Mapping[str, Mapping[str, Split]]) -> list[tuple[str, str, int | str | None]]:
    """What is run, in order: (evaluation, subject, layer, or None for all at once)."""
    jobs = []
    for name in names:
        for subject, splits in opened.items():
            grids = splits["test"].grids
            if EVALUATIONS[name].attention and grids.attention is None:
                continue
            jobs += [(name, subject, layer) for layer in (grids.layers if EVALUATIONS[name].per_layer else [None])]
    return jobs


def contents(splits: Mapping[str, Split], layer: int | str | None = None) -> tuple[dict, dict]:
    """Features and labels of a subject, at one layer or all."""
    pick = lambda grids: grids if layer is None else grids.at(layer)
    return {role: pick(s.grids) for role, s in splits.items()}, {role: s.maps for role, s in splits.items()}


def made_from(split: Split) -> dict[str, str]:
    """What tells the tokens and labels of a split from all others."""
    return {"activations": split.sample.meta["fingerprint"], "labels": split.sample.meta["index"]}


def evaluate(
    cfg: DictConfig, run: Run, name: str, subject: str, layer: int | str | None, splits: Mapping[str, Split], device: str
) -> list[Result]:
    """The results of one job: those kept in the run directory, or new ones, which are then kept."""
    options = options_of(cfg, name)
    augment = live_images(cfg, name)
    recipe = {"evaluation": name, "subject": subject, "layer": layer, "options": options}
    slide = cfg[name].get("slide")
    recipe |= {"augment": augment and augment._asdict(), "slide": slide}
    recipe = plain(recipe | {"on": {role: made_from(split) for role, split in splits.items()}})
    at = "all" if layer is None else layer
    path = run.dir / "checkpoints" / "dense" / name / f"{subject}-{at}-{digest(recipe)}.safetensors"
    if path.exists():
        return load_results(path, recipe)
    features, labels = contents(splits, layer)
    if name == "dense_retrieval":
        options["device"] = device
    if subject != "position":  # where a patch lies is the same in every picture
        own = dict(subjects(cfg))[subject].copy()
        if layer is not None:
            own.model.layers = [layer]
        if augment is not None:
            train, size = splits["train"], options.get("batch_size", 16)
            numbers = train.sample.meta["numbers"]
            options["augmented"] = live_stream(
                own, cfg.dense.train_split, numbers, train.maps, augment, batch_size=size, say=run.say
            )
        if slide is not None:
            numbers = splits["test"].sample.meta["numbers"]
            options["windows"] = sliding_windows(own, cfg.dense.test_split, numbers, slide, run.say)
    started = time.monotonic()
    found = EVALUATIONS[name].function(features, labels, **options)
    if layer is not None:
        found = [result._replace(setting={"layer": layer, **result.setting}) for result in found]
    save_results(path, found, recipe)
    run.say(f"{name} on {subject}{'' if layer is None else f', layer {layer}'}: {time.monotonic() - started:.1f} s")
    return found
