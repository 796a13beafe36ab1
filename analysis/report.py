"""mode=analyze: read a fitted IsSameObject probe: factors, attention, binding coordinates, objects (or intervene: causing)."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from activation import PatchSample, open_sample
from analysis import interventions as act
from analysis import objects
from analysis.causing import Subjects, intervene
from analysis.factors import (
    attention_correlation,
    binding_basis,
    binding_coordinates,
    kept_pairs,
    kept_rank_rows,
    overlap,
    pair_accuracy,
    principal_components,
    rank_rows,
    smallest_rank,
)
from analysis.figures import component_colors, draw_factors, draw_grid
from controls import Subject
from datasets.scene import Scene
from errors import UserError
from files import write_atomically
from pairs.encode import EncodedScene, FittedRun, encode_scene, open_fitted_run, scene_windows
from pairs.map_figures import color_identities
from pairs.pair_form import PairForm, pair_forms
from pairs.task import Pairwise
from patches.anchor import patch_box
from patches.selection import owned_patches
from runs.records import write_table
from runs.run import Run
from show.style import png_bytes
from show.text import format_table
from store.index import build_dataset
from trainer import FitOptions, fit_stack

BLOCKS_LEFT = 3  # layers that are read after an intervention, unless a later layer is named
METHODS = ("spectral", "correlation", "k-means", "normalised cut")


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=analyze: tables (CSV) and figures (PNG) in the run directory; `analyze.do` is read or intervene.

    Raises:
        UserError: a run without a quadratic pair probe, no such layer, an unknown thing to do.
    """
    options = cfg.analyze
    if options.do not in ("read", "intervene"):
        raise UserError(f"unknown analyze.do={options.do}; valid: read, intervene")
    fitted = open_fitted_run(run.source, cfg)
    forms = fitted.forms()
    rank_rows(forms[0], fitted.layers[0])  # refuses what has no form, before anything is read
    samples = {split: open_sample(fitted.cfg, split, say=run.say) for split in ("train", "val", str(options.split))}
    left = BLOCKS_LEFT if options.do == "intervene" else 0
    at = _layer(options.layer, fitted, forms, samples["val"], left)
    kept = kept_rank_rows(
        forms[at], fitted.layers[at], *kept_pairs(samples["val"], at, int(options.pair_images)), options.ranks
    )
    rank = smallest_rank(kept)
    run.say(f"layer {fitted.layers[at]}, binding subspace of rank {rank} (both chosen on val)")
    dataset = build_dataset(fitted.cfg, str(options.split))
    n_scenes = min(int(options.images), len(dataset))
    scenes = [dataset[i * len(dataset) // n_scenes] for i in range(n_scenes)]
    subjects = Subjects(fitted, forms, at, rank, scenes)
    if options.do == "intervene":
        return intervene(subjects, samples["train"], options, run)
    return read(subjects, samples, options, run)


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


def read(subjects: Subjects, samples: dict[str, PatchSample], options: Any, run: Run) -> dict[str, Any]:
    """Factors, what layers share, attention, binding coordinates and objects."""
    fitted, forms, at, rank, scenes = subjects
    split = str(options.split)
    ranks = [row for form, layer in zip(forms, fitted.layers, strict=True) for row in rank_rows(form, layer)]
    kept = []
    for position, (form, layer) in enumerate(zip(forms, fitted.layers, strict=True)):
        kept += kept_rank_rows(form, layer, *kept_pairs(samples[split], position, int(options.pair_images)), options.ranks)
    kept += refitted_rows(subjects, split, options, run)
    shared = overlap([binding_basis(form, rank) for form in forms])
    per_seed = [form._replace(form=form.form[s : s + 1]) for form in forms[at : at + 1] for s in range(len(form.bias))]
    seeds = overlap([binding_basis(form, rank) for form in per_seed])
    seen = [encode_scene(scene, fitted.layers, fitted.cfg, fitted.backbone) for scene in scenes]
    attention = head_correlations(subjects, seen)
    write_table(run.dir / "ranks.csv", ranks)
    write_table(run.dir / "kept_rank.csv", kept)
    layers = fitted.layers
    write_table(run.dir / "overlap.csv", [
        {"layer": a, "other": b, "overlap": float(shared[i, j])} for i, a in enumerate(layers) for j, b in enumerate(layers)
    ])  # fmt: skip
    write_table(run.dir / "attention.csv", [
        {"layer": layer, "head": head, "r": float(r)}
        for layer, row in zip(layers, attention, strict=True)
        for head, r in enumerate(row)
    ])  # fmt: skip
    write_atomically(run.dir / "factors.png", png_bytes(draw_factors(ranks, kept, shared, attention, layers)))
    write_atomically(run.dir / "components.png", png_bytes(draw_components(subjects, seen[:4])))
    rows, pictures = object_rows(subjects, seen, run)
    write_table(run.dir / "objects.csv", rows)
    write_atomically(run.dir / "objects.png", png_bytes(draw_grid(pictures[:4])))
    table = [[str(layer), *(_mean(ranks, "layer", layer, name) for name in ("effective_rank", "stable_rank", "rank_95%")),
              *(_at_rank(kept, layer, r) for r in (rank, None)), f"{float(attention[i].nanmean()):.2f}"]
             for i, layer in enumerate(layers)]  # fmt: skip
    header = ["layer", "effective rank", "stable rank", "rank of 95 %", f"accuracy, rank {rank}", "whole", "attention r"]
    run.say(format_table(header, table))
    off = ~torch.eye(len(seeds), dtype=torch.bool)
    if bool(off.any()):
        chance = rank / forms[at].form.shape[-1]
        run.say(f"seeds share {float(seeds[off].mean()):.2f} of the subspace at layer {layers[at]} (chance {chance:.2f})")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    scores = [[m, *(_mean(rows, "method", m, key) for key in ("fg_ari", "mbo", "n_groups"))] for m in methods]
    run.say("\n" + format_table(["objects by", "FG-ARI", "mBO", "groups"], scores))
    run.say(f"\ntables and figures: {run.dir}")
    return {"rank": rank, "layer": layers[at], "objective": kept[-1]["accuracy"]}


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
    for rank in (r for r in options.ranks if r % 2 == 0 and r < samples["train"].tokens.shape[-1]):
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
    for encoded in seen:
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


def paint(encoded: EncodedScene, values: Tensor) -> Tensor:
    """A map of the image from one value per patch: values [n N, ...] -> [H, W, ...], of the patches that stand for areas."""
    image_hw = encoded.scene.image.shape[-2:]
    picture = torch.zeros(*image_hw, *values.shape[1:], dtype=values.dtype)
    numbers = torch.arange(len(values)).view(len(encoded.geometry.starts), *encoded.geometry.grid)
    for place in owned_patches(encoded.geometry).nonzero().tolist():
        top, left, bottom, right = (round(v) for v in patch_box(place, encoded.geometry, image_hw))
        picture[top:bottom, left:right] = values[numbers[tuple(place)]]
    return picture


def object_rows(subjects: Subjects, seen: Sequence[EncodedScene], run: Run) -> tuple[list[dict], list[list[tuple[str, Any]]]]:
    """Objects of every image by every method: scores against the pixels, masks as PNG, and pictures.

    `objects/` is laid out for `dataset=folder dataset.root=…/objects`: images, and the masks of correlation clustering,
    whose largest group that touches the border is the background.
    """
    rows, pictures = [], []
    for encoded in seen:
        owned = owned_patches(encoded.geometry).flatten()
        x = encoded.tokens[subjects.at].flatten(0, 1)[owned]
        logits = subjects.forms[subjects.at].logits(x, x).mean(0)
        unit = torch.nn.functional.normalize(x, dim=-1)
        groups = {
            "spectral": objects.normalised_cut(logits.sigmoid()),
            "correlation": objects.correlation_clustering(logits),
            "normalised cut": objects.normalised_cut((unit @ unit.mT).clamp_min(0)),
        }
        groups["k-means"] = objects.k_means(unit, int(groups["normalised cut"].max()) + 1)
        true = encoded.scene.labels["identity"]
        masks = {}
        for method in METHODS:
            everywhere = torch.zeros(len(owned), dtype=torch.long)
            everywhere[owned] = groups[method] + 1
            masks[method] = paint(encoded, everywhere)
        ceiling = paint(encoded, encoded.labels["identity"].label.flatten().long())
        for method, mask in [*masks.items(), ("true patches (ceiling)", ceiling)]:
            rows.append({
                "key": encoded.scene.key, "method": method, "n_groups": len(mask.unique()),
                "fg_ari": objects.foreground_ari(true.numpy(), mask.numpy()),
                "mbo": objects.mean_best_overlap(true.numpy(), mask.numpy()),
            })  # fmt: skip
        _write_masks(encoded.scene, masks["correlation"], run)
        pictures.append([*_first_panels(encoded), *((method, masks[method] - 1) for method in METHODS)])
    return rows, pictures


def _write_masks(scene: Scene, mask: Tensor, run: Run) -> None:
    """Image and mask of a scene as `dataset=folder` reads them."""
    border = torch.cat([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    background = int(border.mode().values)
    ids = torch.where(mask == background, 0, mask).unique(return_inverse=True)[1]
    ids = ids if bool((mask == background).any()) else ids + 1
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in scene.key)
    for folder, array in (("images", scene.image.permute(1, 2, 0).numpy()), ("identity", ids.numpy().astype(np.uint8))):
        path = run.dir / "objects" / folder / "test" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _png(array))


def _png(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, "png")
    return data.getvalue()
