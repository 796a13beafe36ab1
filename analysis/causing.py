"""mode=analyze analyze.do=intervene: dose–response of the binding subspace and of its controls, at every later layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from activation import PatchSample
from analysis import interventions as act
from analysis.factors import binding_basis, kept_pairs
from analysis.figures import draw_doses, strongest
from datasets.scene import Scene
from files import write_atomically
from pairs.encode import FittedRun, plan_scene, scene_windows
from pairs.maps import auroc
from pairs.pair_form import PairForm
from patches.labels import label_patches
from runs.progress import track
from runs.records import write_table
from runs.run import Run
from show.style import png_bytes
from show.text import format_table

METRICS = {
    "auroc": "AUROC, foreground", "flips": "answers flipped", "class_accuracy": "class accuracy",
    "attention": "attention on object",
}  # fmt: skip
# Beside equal-rank random subspaces (the mean over RANDOM of them) and one of top variance.
CONTROLS = {"shuffle": ["shuffle within object"], "remove": ["noise in binding"]}
RANDOM = 3
READOUT_IMAGES = 400  # training images of the class read-outs


class Subjects(NamedTuple):
    """What is analysed: the run, its formulas per layer, the layer and rank of the binding subspace, and some scenes."""

    run: FittedRun
    forms: list[PairForm]
    at: int  # position of the layer in run.layers
    rank: int
    scenes: list[Scene]


def intervene(subjects: Subjects, train: PatchSample, options: Any, run: Run) -> dict[str, Any]:
    """Edit the tokens after the layer, run the remaining blocks, read every later layer: table, figure and CSV."""
    rows = dose_rows(subjects, train, [float(d) for d in options.doses], int(options.seed), run)
    write_table(run.dir / "interventions.csv", rows)
    write_atomically(run.dir / "interventions.png", png_bytes(draw_doses(rows, METRICS)))
    body = []
    for edit, subspace in dict.fromkeys((row["edit"], row["subspace"]) for row in rows):
        of_row = [row for row in rows if (row["edit"], row["subspace"]) == (edit, subspace)]
        numbers = [strongest(of_row, metric) for metric in METRICS]
        body.append([f"{edit}, {subspace}", *("–" if number is None else f"{number:.3f}" for number in numbers)])
    layer = subjects.run.layers[subjects.at]
    run.say(format_table([f"after layer {layer}, full dose", *METRICS.values()], body))
    run.say(f"\nread at the last layer that has the number; every layer and dose: {run.dir / 'interventions.csv'}")
    return {"rank": subjects.rank, "layer": layer, "rows": len(rows)}


class _Data(NamedTuple):
    """What every intervention is made on and read with.

    windows: [B, 3, H, W] of all scenes. identity, category: [B, N], labels of their patches. pairs: per window the patches
    that exchange their binding parts. later: positions of the layers that are read. readouts: per layer a class read-out
    [D + 1, C]. before: per layer and window the logits [N, N] without any change.
    """

    windows: Tensor
    identity: Tensor
    category: Tensor
    pairs: list[tuple[Tensor, Tensor]]
    later: list[int]
    readouts: dict[int, Tensor]
    before: dict[int, list[Tensor]]


def _prepare(subjects: Subjects, train: PatchSample, seed: int) -> _Data:
    """Windows and labels of the scenes, class read-outs fitted on training patches, and the answers before any change."""
    fitted, later = subjects.run, list(range(subjects.at, len(subjects.run.layers)))
    windows, identity, category = [], [], []
    for scene in subjects.scenes:
        geometry = plan_scene(scene, fitted.cfg, fitted.backbone)
        labels = label_patches(scene.labels, geometry, labels=fitted.cfg.protocol.labels)
        windows.append(scene_windows(scene, geometry, fitted.cfg, fitted.backbone))
        identity.append(labels["identity"].label.flatten(1).long())
        category.append(labels.get("class", labels["identity"]).label.flatten(1).long())
    ids = torch.cat(identity)
    pairs = [_swapped_pairs(of_window, torch.Generator().manual_seed(seed + i)) for i, of_window in enumerate(ids)]
    readouts = {}
    for position in later:
        tokens, *_ = kept_pairs(train, position, READOUT_IMAGES)
        name = "class" if "class" in train.labels else "identity"
        known, valid = (train.labels[column][: len(tokens)] for column in (name, f"{name}_valid"))
        readouts[position] = act.ridge_classes(tokens[valid], known[valid], int(known.max()) + 1)
    plain, _ = act.run_blocks(fitted.backbone, torch.cat(windows), [fitted.layers[p] for p in later])
    before = {p: [subjects.forms[p].logits(h, h).mean(0) for h in x] for p, x in zip(later, plain, strict=True)}
    return _Data(torch.cat(windows), ids, torch.cat(category), pairs, later, readouts, before)


def dose_rows(subjects: Subjects, train: PatchSample, doses: Sequence[float], seed: int, run: Run) -> list[dict[str, Any]]:
    """The rows of `intervene`: per edit the binding subspace, random ones and one of top variance of the same rank, and
    what else is a control of this edit; then every head of the next block knocked out.
    """
    fitted, rank, data = subjects.run, subjects.rank, _prepare(subjects, train, seed)
    layer = fitted.layers[subjects.at]
    tokens = act.run_blocks(fitted.backbone, data.windows, [layer])[0][0].flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    bases = {
        "binding": [binding_basis(subjects.forms[subjects.at], rank)],
        "random": [act.random_basis(tokens.shape[-1], rank, generator) for _ in range(RANDOM)],
        "top variance": [act.variance_basis(tokens, rank)],
    }
    centred = tokens - tokens.mean(0)
    for name, alike in bases.items():
        share = sum(float((centred @ basis).square().sum() / centred.square().sum()) for basis in alike) / len(alike)
        run.say(f"{name}: rank {rank}, {share:.1%} of the variance of the tokens")
    rows = []
    edits = [(edit, name) for edit in ("remove", "shuffle", "inject", "swap") for name in [*bases, *CONTROLS.get(edit, [])]]
    for edit, subspace in track(edits, "interventions", "edit"):
        alike, named = bases.get(subspace, bases["binding"]), edit if subspace in bases else subspace
        for dose in doses:
            read = []
            for basis in alike if dose else alike[:1]:  # no dose, no difference between subspaces
                change = act.edited_after(fitted.backbone, layer, _edit(named, basis, dose, data, seed))
                read.append(_read(subjects, data, change, {"edit": edit, "subspace": subspace, "dose": dose}))
            rows += [_mean_row(of_layer) for of_layer in zip(*read, strict=True)]
    if len(data.later) > 1:
        block = int(fitted.layers[data.later[1]])
        for head in range(fitted.backbone.facts.heads):
            change = act.without_heads(fitted.backbone, {block: [head]})
            rows += _read(subjects, data, change, {"edit": "knock out a head", "subspace": f"head {block}.{head}", "dose": 1.0})
    return rows


def _mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of several that differ in their subspace alone: the mean of every metric that all of them have."""
    if len(rows) == 1:
        return rows[0]
    known = [metric for metric in METRICS if all(row[metric] is not None for row in rows)]
    return rows[0] | {metric: sum(row[metric] for row in rows) / len(rows) for metric in known}


def _swapped_pairs(identity: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches [n], [n] of different objects that exchange their binding parts: a third of the smaller of two objects."""
    ids, sizes = identity[identity > 0].unique(return_counts=True)
    if len(ids) < 2:
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    largest = ids[sizes.argsort(descending=True)[:2]]
    a, b = (torch.nonzero(identity == n)[:, 0] for n in largest)
    n = max(1, min(len(a), len(b)) // 3)
    return a[torch.randperm(len(a), generator=generator)[:n]], b[torch.randperm(len(b), generator=generator)[:n]]


def _edit(name: str, basis: Tensor, dose: float, data: _Data, seed: int) -> act.Edit:
    """The edit of a batch of windows by its name, with the same random choices at every dose."""

    def one(h: Tensor, image: int) -> Tensor:
        if dose == 0:
            return h
        generator, ids = torch.Generator().manual_seed(seed * 1000 + image), data.identity[image]
        basis_here = basis.to(h)
        match name:
            case "remove":
                return act.remove(h, basis_here, dose)
            case "shuffle":
                return act.shuffle(h, basis_here, act.derangement(len(h), dose, generator))
            case "shuffle within object":
                return act.shuffle(h, basis_here, act.derangement(len(h), dose, generator, ids))
            case "inject":
                return act.inject(h, basis_here, ids, dose)
            case "swap":
                return act.swap(h, basis_here, *data.pairs[image], dose)
            case _:
                return act.noise(h, basis_here, dose, generator)

    return act.per_image(one)


def _read(subjects: Subjects, data: _Data, change: Any, about: dict[str, Any]) -> list[dict[str, Any]]:
    """IsSameObject inside the foreground, flipped answers, class and attention at every later layer after a change."""
    fitted, prefix = subjects.run, subjects.run.backbone.facts.num_prefix_tokens
    keep = lambda w: act.attention_on_object(w[:, :, prefix:, prefix:].float().cpu(), data.identity).nanmean()
    layers = [fitted.layers[position] for position in data.later]
    read = [*layers, fitted.backbone.facts.depth - 1]  # the block after the last layer has to run as well
    tokens, attention = act.run_blocks(fitted.backbone, data.windows, read, change, keep)
    rows = []
    for position, layer, x in zip(data.later, layers, tokens, strict=False):
        scores, same, flipped, asked = [], [], 0, 0
        for image, (h, ids) in enumerate(zip(x, data.identity, strict=True)):
            logits = subjects.forms[position].logits(h, h).mean(0)
            inside = torch.nonzero(ids > 0)[:, 0]
            first, second = torch.triu_indices(len(inside), len(inside), 1)
            scores.append(logits[inside[first], inside[second]])
            same.append(ids[inside[first]] == ids[inside[second]])
            turned, of = act.flip_rate(data.before[position][image], logits, *data.pairs[image], ids)
            flipped, asked = flipped + turned, asked + of
        reader = 0 if layer == "embed" else int(layer) + 1
        rows.append({
            **about, "layer": layer, "auroc": auroc(torch.cat(scores).numpy(), torch.cat(same).numpy()),
            "flips": flipped / asked if asked and about["edit"] == "swap" else None,
            "class_accuracy": act.class_accuracy(x.flatten(0, 1), data.category.flatten(), data.readouts[position]),
            "attention": float(attention[reader]) if reader < len(attention) else None,
        })  # fmt: skip
    return rows
