"""mode=analyze: read a fitted IsSameObject probe: factors, attention, binding coordinates, objects (or intervene: causing)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from activation import PatchSample, open_sample
from analysis import interventions as act
from analysis.causing import Subjects, intervene
from analysis.factors import (
    attention_correlation,
    binding_coordinates,
    kept_pairs,
    kept_rank_rows,
    pair_accuracy,
    principal_components,
    rank_rows,
    smallest_rank,
)
from analysis.figures import component_colors, draw_factors, draw_grid
from analysis.grouping import METHODS, choose_settings, group_scenes, paint, patches_of, shown, summary, write_masks
from analysis.subspaces import angle_rows, angle_table, check_same_space, compare_subspaces, random_angles
from controls import Subject
from datasets.scene import Scene
from errors import UserError
from files import write_atomically
from pairs.encode import EncodedScene, FittedRun, encode_scene, open_fitted_run, scene_windows
from pairs.map_figures import color_identities
from pairs.pair_form import PairForm, pair_forms
from pairs.task import Pairwise
from runs.progress import stage, stages, track
from runs.records import write_table
from runs.run import Run
from show.style import png_bytes
from show.text import format_table
from store.index import build_dataset
from trainer import FitOptions, fit_stack

BLOCKS_LEFT = 3  # layers that are read after an intervention, unless a later layer is named


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=analyze: tables (CSV) and figures (PNG) in the run directory; `analyze.do` is read or intervene.

    Raises:
        UserError: a run without a quadratic pair probe, no such layer, an unknown thing to do.
    """
    options = cfg.analyze
    if options.do not in ("read", "intervene"):
        raise UserError(f"unknown analyze.do={options.do}; valid: read, intervene")
    reading = [("factors", 2), ("attention", 2), ("figures", 1), ("objects", 4)]
    stages(("run and activations", 2), *([("interventions", 6)] if options.do == "intervene" else reading))
    stage("run and activations", parts=6)
    fitted = open_fitted_run(run.source, cfg)
    forms = fitted.forms()
    others = [open_fitted_run(Path(str(d)), cfg, [fitted.backbone], [fitted.cfg.model]) for d in options.compare]
    check_same_space(fitted, others)
    for seen in (fitted, *others):
        rank_rows(seen.forms()[0], seen.layers[0])  # refuses what has no form, before anything is read
    samples = {split: open_sample(fitted.cfg, split, say=run.say) for split in ("train", "val", str(options.split))}
    left = BLOCKS_LEFT if options.do == "intervene" else 0
    at = _layer(options.layer, fitted, forms, samples["val"], left)
    kept = kept_rank_rows(
        forms[at], fitted.layers[at], *kept_pairs(samples["val"], at, int(options.pair_images)), options.ranks
    )
    rank = smallest_rank(kept)
    run.say(f"layer {fitted.layers[at]}, binding subspace of rank {rank} (both chosen on val)")
    subjects = Subjects(fitted, forms, at, rank, spread_scenes(fitted, str(options.split), int(options.images)))
    if options.do == "intervene":
        stage("interventions")
        return intervene(subjects, samples["train"], options, run)
    return {**read(subjects, others, samples, options, run), "objective": kept[-1]["accuracy"]}  # of the whole probe on val


def spread_scenes(fitted: FittedRun, split: str, most: int) -> list[Scene]:
    """At most so many scenes, evenly spread over a split."""
    dataset = build_dataset(fitted.cfg, split)
    n_scenes = min(most, len(dataset))
    return [dataset[i * len(dataset) // n_scenes] for i in range(n_scenes)]


def _layer(asked: Any, fitted: FittedRun, forms: Sequence[PairForm], val: PatchSample, left: int) -> int:
    """Position of the layer: the one named, or the best by AUROC on validation images of those with `left` layers after it."""
    if asked is not None:
        if asked not in fitted.layers:
            raise UserError(f"analyze.layer={asked}: the run has layers {', '.join(map(str, fitted.layers))}")
        return fitted.layers.index(asked)
    scores = [
        pair_accuracy(form, *kept_pairs(val, at, 100))["auroc"] or 0.0
        for at, form in enumerate(forms[: max(len(forms) - left, 1)])
    ]
    return int(np.argmax(scores))


# ------------------------------------------------------------------------------------------------------------ reading


def read(
    subjects: Subjects, others: Sequence[FittedRun], samples: dict[str, PatchSample], options: Any, run: Run
) -> dict[str, Any]:
    """Factors, what layers, seeds and runs share, attention, binding coordinates and objects."""
    fitted, forms, at, rank, scenes = subjects
    stage("factors", parts=2)
    split, layers = str(options.split), fitted.layers
    ranks = [row for form, layer in zip(forms, layers, strict=True) for row in rank_rows(form, layer)]
    kept = []
    for position, (form, layer) in enumerate(track(list(zip(forms, layers, strict=True)), "ranks", "layer")):
        kept += kept_rank_rows(form, layer, *kept_pairs(samples[split], position, int(options.pair_images)), options.ranks)
    kept += refitted_rows(subjects, split, options, run)
    compared = compare_subspaces(fitted, forms, others, rank)
    random = random_angles(forms[at].form.shape[-1], rank, int(options.seed))
    stage("attention", parts=2)
    seen = [encode_scene(scene, layers, fitted.cfg, fitted.backbone) for scene in track(scenes, "backbone", "image")]
    attention = head_correlations(subjects, seen)
    write_table(run.dir / "ranks.csv", ranks)
    write_table(run.dir / "kept_rank.csv", kept)
    write_table(run.dir / "angles.csv", list(angle_rows(compared, random)))
    write_table(run.dir / "attention.csv", [
        {"layer": layer, "head": head, "r": float(r)}
        for layer, row in zip(layers, attention, strict=True)
        for head, r in enumerate(row)
    ])  # fmt: skip
    stage("figures")
    figure = draw_factors(ranks, kept, compared, random, attention, layers, layers[at])
    write_atomically(run.dir / "factors.png", png_bytes(figure))
    write_atomically(run.dir / "components.png", png_bytes(draw_components(subjects, seen[:4])))
    table = [[str(layer), *(_mean(ranks, "layer", layer, name) for name in ("effective_rank", "stable_rank", "rank_95%")),
              *(_at_rank(kept, layer, r) for r in (rank, None)), _number(float(attention[i].nanmean()))]
             for i, layer in enumerate(layers)]  # fmt: skip
    header = ["layer", "effective rank", "stable rank", "rank of 95 %", f"accuracy, rank {rank}", "whole", "attention r"]
    run.say(format_table(header, table))
    header = [f"subspaces of rank {rank}", "pairs", "overlap", "smallest angle", "median", "largest"]
    run.say("\n" + format_table(header, angle_table(compared, random, layers[at])))
    read_objects(subjects, options, run)
    run.say(f"\ntables and figures: {run.dir}")
    return {"rank": rank, "layer": layers[at]}


def read_objects(subjects: Subjects, options: Any, run: Run) -> None:
    """Group the patches of scenes into objects: what was tried on val, scores with intervals, pictures, and masks.

    The masks are those of the method that reads the probe and is best on validation images.
    """
    stage("objects", parts=4)
    fitted, form, layer = subjects.run, subjects.forms[subjects.at], subjects.run.layers[subjects.at]
    look = lambda scene: encode_scene(scene, [layer], fitted.cfg, fitted.backbone)
    val_scenes = spread_scenes(fitted, "val", int(options.val_images))
    val = [patches_of(look(scene), form, 0) for scene in track(val_scenes, "backbone", "validation image")]
    chosen, tried = choose_settings(val)
    del val
    scenes = spread_scenes(fitted, str(options.split), int(options.object_images))
    seen = [look(scene) for scene in track(scenes, "backbone", "image")]
    rows, masks = group_scenes((patches_of(encoded, form, 0) for encoded in track(seen, "grouping", "image")), chosen)
    records, gain = summary(rows, chosen, int(options.seed))
    write_table(run.dir / "objects_tried.csv", tried)
    write_table(run.dir / "objects.csv", rows)
    write_table(run.dir / "objects_mean.csv", records)
    best = max((name for name, method in METHODS.items() if method.reads_probe), key=lambda name: chosen[name].score)
    for encoded, of_scene in zip(seen, masks, strict=True):
        write_masks(encoded, of_scene[best], run)
    pictures = [[*_first_panels(encoded), *of_scene.items()] for encoded, of_scene in zip(seen[:4], masks[:4], strict=True)]
    write_atomically(run.dir / "objects.png", png_bytes(draw_grid(pictures)))
    table = [[r["method"], r["chosen_on_val"], shown(r, "fg_ari"), shown(r, "mbo"), f"{r['n_groups']:.1f}"] for r in records]
    table.append([gain["method"], "", shown(gain, "fg_ari"), shown(gain, "mbo"), ""])
    header = [f"objects at layer {layer}", "chosen on val", "FG-ARI", "mBO", "groups"]
    run.say("\n" + format_table(header, table))
    run.say(f"[95 % intervals over {records[0]['images']} images]; masks of '{best}': {run.dir / 'objects'}")


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def _mean(rows: Sequence[dict], key: str, value: Any, name: str) -> str:
    found = [row[name] for row in rows if row[key] == value and row[name] is not None]
    return f"{np.mean(found):.2f}" if found else "–"


def _at_rank(kept: Sequence[dict], layer: Any, rank: int | None) -> str:
    rows = [row for row in kept if row["layer"] == layer and row["how"] == "truncated"]
    return f"{next((row for row in rows if row['rank'] == rank), rows[-1])['accuracy']:.3f}"


def refitted_rows(subjects: Subjects, split: str, options: Any, run: Run) -> list[dict[str, Any]]:
    """Accuracy of probes of fixed rank fitted anew at the layer: W1, W2 of half the rank each, so that M has the rank."""
    fitted, layer = subjects.run, subjects.run.layers[subjects.at]
    if not options.refit:
        return []
    cfg = OmegaConf.merge(fitted.cfg, {"model": {"layers": [layer]}})
    samples = {name: open_sample(cfg, name, say=run.say) for name in ("train", "val", split)}
    rows = []
    ranks = [r for r in options.ranks if r % 2 == 0 and r < samples["train"].tokens.shape[-1]]
    for rank in track(ranks, "refitting", "rank"):
        settings = {**cfg.probe, "mode": "quadratic_fixed_rank", "rank": rank // 2}
        subject = Subject(f"rank{rank}", "", settings, samples, [0])
        task = Pairwise([0], ["all"], cfg.protocol.selection.get("per_visit"), pairs=cfg.protocol.pairs.loss)
        (probe,) = fit_stack(run, task, subject, FitOptions.read(cfg))
        (form,) = pair_forms(probe.cpu())
        measured = pair_accuracy(form, *kept_pairs(samples[split], 0, int(options.pair_images)))
        rows.append({"layer": layer, "rank": rank, "how": "refitted", **measured})
    return rows


def head_correlations(subjects: Subjects, seen: Sequence[EncodedScene]) -> Tensor:
    """Pearson r [L, heads] of the attention of the next block with P(same object), mean over windows; NaN: no next block."""
    fitted, prefix = subjects.run, subjects.run.backbone.facts.num_prefix_tokens
    found: list[list[Tensor]] = [[] for _ in fitted.layers]
    for encoded in track(seen, "attention", "image"):
        windows = scene_windows(encoded.scene, encoded.geometry, fitted.cfg, fitted.backbone)
        keep = lambda w: w[:, :, prefix:, prefix:].float().cpu()
        _, weights = act.run_blocks(fitted.backbone, windows, [fitted.backbone.facts.depth - 1], keep=keep)
        for position, (layer, form) in enumerate(zip(fitted.layers, subjects.forms, strict=True)):
            reader = 0 if layer == "embed" else int(layer) + 1
            if reader < len(weights):
                for window, x in zip(weights[reader], encoded.tokens[position], strict=True):
                    found[position].append(attention_correlation(window, form.scores(x, x)))
    heads = max(subjects.run.backbone.facts.heads, 1)
    return torch.stack([torch.stack(r).mean(0).float() if r else torch.full((heads,), torch.nan) for r in found])


def draw_components(subjects: Subjects, seen: Sequence[EncodedScene]) -> Any:
    """Image, true objects, and the first three principal components of the binding coordinates as colours, at some layers."""
    layers, rows = subjects.run.layers, []
    shown = sorted({0, len(layers) // 2, subjects.at, len(layers) - 1})
    for encoded in seen:
        row = _first_panels(encoded)
        for position in shown:
            z = binding_coordinates(subjects.forms[position], encoded.tokens[position].flatten(0, 1), max(subjects.rank, 3))
            parts, share = principal_components(z)
            picture = paint(encoded, component_colors(parts)).numpy()
            row.append((f"{layers[position]}: {float(share.sum()):.0%} in 3", picture))
        rows.append(row)
    return draw_grid(rows)


def _first_panels(encoded: EncodedScene) -> list[tuple[str, Any]]:
    scene = encoded.scene
    return [("image", scene.image.permute(1, 2, 0).numpy()), ("true objects", color_identities(scene.labels["identity"]))]
