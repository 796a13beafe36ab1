"""mode=show: what will be measured, before it is: windows, patches, their labels and purity, which are kept, kinds of pairs."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from activation import build_dataset
from backbones.load import backbone_facts
from datasets.scene import Scene
from errors import UserError
from files import write_atomically
from patches.anchor import patch_box
from patches.geometry import Geometry, plan_geometry
from patches.labels import PatchLabels, label_patches
from patches.selection import owned_patches
from runs.progress import stage, track
from runs.run import Run
from show.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE, YELLOW, png_bytes
from store.labelled import LabelledItems

PALETTE = [matplotlib.colors.to_rgb(c) for c in (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW)]
BACKGROUND, UNUSED = (0.93, 0.93, 0.93), (1.0, 1.0, 1.0)
# Kinds of pairs i < j of kept patches, as the scores are split by them, and their colours.
PAIR_KINDS = {
    "same object": GREEN, "same class, other object": ORANGE, "other class": BLUE, "class unknown": PINK,
    "with background": GREY,
}  # fmt: skip
WIDTH, TITLE, GAP, HEAD = 11.0, 0.24, 0.1, 0.34  # inches
N_PANELS = 5


class Looked(NamedTuple):
    """One image as it will be measured.

    labels: of its patches, "identity" and "class" as far as the data have them. owned: bool [n, h, w], the patches that
    stand for an area. kept: int64 [T, 3] window, row, column of the patches the protocol keeps; usable: bool [T], those
    with a label. pairs: number of pairs of every kind among them; empty without identities.
    """

    scene: Scene
    geometry: Geometry
    labels: dict[str, PatchLabels]
    owned: Tensor
    kept: Tensor
    usable: Tensor
    pairs: dict[str, int]


def run(cfg: Any, run: Run) -> dict[str, Any]:
    """mode=show: a contact sheet of some images (PNG) and its numbers (JSON) in the run directory.

    Raises:
        UserError: images that have no patches to show (codes), or that cannot be read.
    """
    stage("contact sheet", parts=2)
    return contact_sheet(build_dataset(cfg, str(cfg.show.split)), cfg, run)


def contact_sheet(dataset: Any, cfg: Any, run: Run) -> dict[str, Any]:
    """The contact sheet of a split that is open already; as `run`."""
    shown = min(int(cfg.show.images), len(dataset))
    items = LabelledItems(dataset, cfg.protocol, backbone_facts(cfg.model), whole_images=False)
    looked, left_out = [], []
    numbers = [i * len(dataset) // shown for i in range(shown)]
    for number in track(numbers, "reading", "image"):
        found = look_at(items, number)
        looked.append(found) if isinstance(found, Looked) else left_out.append(found)
    for reason in left_out:
        run.say(f"left out: {reason}")
    if not looked:
        raise UserError(f"none of {shown} images of split {cfg.show.split} is used by protocol {cfg.protocol.name}")
    about = f"{type(dataset).__name__} {cfg.show.split}, {len(looked)} of {len(dataset)} · protocol {cfg.protocol.name}"
    write_atomically(run.dir / "contact_sheet.png", png_bytes(draw_contact_sheet(looked, list(dataset.classes), about)))
    facts = {"about": about, "left_out": left_out, "images": [image_facts(image) for image in looked]}
    write_atomically(run.dir / "contact_sheet.json", json.dumps(facts, indent=1) + "\n")
    total = {kind: sum(image.pairs.get(kind, 0) for image in looked) for kind in PAIR_KINDS}
    if n_pairs := sum(total.values()):
        run.say("pairs: " + ", ".join(f"{kind} {count / n_pairs:.0%}" for kind, count in total.items() if count))
    run.say(str(run.dir / "contact_sheet.png"))
    return {"images": len(looked), "pairs": total}


def look_at(items: LabelledItems, number: int) -> Looked | str:
    """Item `number` with what the index of activations would keep of it; a text if it is left out.

    Raises:
        UserError: nothing of this data set can be shown.
    """
    record = items[number]
    if "fatal" in record:
        raise UserError(f"mode=show shows patches: {record['fatal']}")
    for fault in ("dropped", "fault"):
        if fault in record:
            key, reason = record[fault]
            return f"{key}: {reason}"
    scene = items.dataset[number]
    geometry = plan_geometry(scene.image.shape[-2:], geometry=items.protocol["geometry"], **items.sizes)
    labels = label_patches(scene.labels, geometry, labels=items.protocol["labels"])
    kept = torch.from_numpy(record["position"].astype(np.int64))
    columns = {name.removeprefix("label."): torch.from_numpy(np.asarray(v)) for name, v in record.items() if "label." in name}
    primary = "identity" if "identity" in columns else "class"
    usable = columns[f"{primary}_valid"]
    pairs = pair_kinds(columns["identity"], columns.get("class"), usable) if "identity" in columns else {}
    return Looked(scene, geometry, labels, owned_patches(geometry), kept, usable, pairs)


def pair_kinds(identity: Tensor, category: Tensor | None, usable: Tensor) -> dict[str, int]:
    """Number of pairs i < j of usable patches of every kind, from identities [T] and classes [T] (0: background, none)."""
    ids = identity[usable]
    classes = torch.zeros_like(ids) if category is None else category[usable]
    first, second = torch.triu_indices(len(ids), len(ids), 1)
    with_background = (ids[first] == 0) | (ids[second] == 0)
    same = ~with_background & (ids[first] == ids[second])
    others = ~with_background & ~same
    unknown = others & (classes[first] == 0) & (classes[second] == 0)
    same_class = others & ~unknown & (classes[first] == classes[second])
    other_class = others & ~unknown & ~same_class
    kinds = (same, same_class, other_class, unknown, with_background)
    return {name: int(members.sum()) for name, members in zip(PAIR_KINDS, kinds, strict=True)}


def image_facts(image: Looked) -> dict[str, Any]:
    """What the JSON says of an image."""
    geometry, owned = image.geometry, image.owned
    purity = {name: float(labels.purity[owned & labels.valid].mean()) for name, labels in image.labels.items()}
    return {
        "key": image.scene.key, "image_hw": list(image.scene.image.shape[-2:]), "scaled": list(geometry.scaled),
        "windows": len(geometry.starts), "grid": list(geometry.grid), "patches": int(owned.sum()),
        "kept": int(image.usable.sum()), "mean_purity": purity, "pairs": image.pairs,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ drawing


def draw_contact_sheet(looked: Sequence[Looked], classes: Sequence[str], about: str = "") -> Figure:
    """A row per image: windows and patches, identity and class of every patch, purity, and its kinds of pairs.

    Args:
        classes: their names, background first. about: a line above all.
    """
    w = (WIDTH - GAP) / N_PANELS - GAP
    heights = [min(w * im.scene.image.shape[1] / im.scene.image.shape[2], 1.6 * w) + TITLE + GAP for im in looked]
    height, top = HEAD + sum(heights), HEAD
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        figure.text(GAP / WIDTH, 1 - 0.08 / height, about, ha="left", va="top", fontsize=9)
        for image, taken in zip(looked, heights, strict=True):
            panels = []
            for column in range(N_PANELS):
                left, h = GAP + column * (w + GAP), taken - TITLE - GAP
                bottom = height - top - TITLE - h
                panels.append(figure.add_axes((left / WIDTH, bottom / height, w / WIDTH, h / height)))
            _draw_windows(panels[0], image)
            _draw_labels(panels[1], image, "identity", [])
            _draw_labels(panels[2], image, "class", classes)
            _draw_purity(panels[3], image)
            _draw_pairs(panels[4], image)
            top += taken
    return figure


def _draw_windows(axes: Axes, image: Looked) -> None:
    """The picture, its windows and the patches that stand for its areas."""
    scene, geometry = image.scene, image.geometry
    axes.imshow(scene.image.permute(1, 2, 0).numpy())
    n_windows = len(geometry.starts)
    axes.set_title(f"{scene.key[-22:]}: {n_windows} window{'s' * (n_windows > 1)}", pad=3, fontsize=8)
    image_hw = scene.image.shape[-2:]
    for place in image.owned.nonzero().tolist():
        top, left, bottom, right = patch_box(place, geometry, image_hw)
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, lw=0.3, ec="white", alpha=0.7))
    for number, start in enumerate(geometry.starts):
        (y, x), (h, w) = (
            [v * n / s for v, n, s in zip(pair, image_hw, geometry.scaled, strict=True)] for pair in (start, geometry.window)
        )
        inset = 0.006 * max(image_hw) * (number + 1)  # so that windows that share an edge stay distinguishable
        axes.add_patch(
            Rectangle(
                (x + inset, y + inset), w - 2 * inset, h - 2 * inset, fill=False, lw=1.4, ec=PALETTE[number % len(PALETTE)]
            )
        )
    _bare(axes, image_hw)


def painted_patches(image: Looked, colors: Tensor) -> np.ndarray:
    """A picture [H, W, 3]: every patch that stands for an area in its colour; colors [n, h, w, 3]."""
    height, width = image.scene.image.shape[-2:]
    picture = np.ones((height, width, 3), np.float32)
    for place in image.owned.nonzero().tolist():
        top, left, bottom, right = (round(v) for v in patch_box(place, image.geometry, (height, width)))
        picture[top:bottom, left:right] = colors[tuple(place)].numpy()
    return picture


def label_colors(labels: PatchLabels) -> Tensor:
    """Colours [n, h, w, 3] of patch labels: by their place among the labels of the image, so that up to seven are unlike."""
    ids = labels.label.long()
    present = ids[ids > 0].unique()
    table = torch.tensor([BACKGROUND, *(PALETTE[i % len(PALETTE)] for i in range(len(present)))])
    place = torch.where(ids > 0, torch.searchsorted(present, ids) + 1, 0)
    return torch.where(labels.valid[..., None], table[place], torch.tensor(UNUSED))


def _draw_labels(axes: Axes, image: Looked, name: str, classes: Sequence[str]) -> None:
    """The label of every patch, and a dot in those that are kept (a cross: kept, but without a label)."""
    labels = image.labels.get(name)
    if labels is None:
        axes.text(0.5, 0.5, f"no {name} map", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_axis_off()
        return
    ids = labels.label.long()
    axes.imshow(painted_patches(image, label_colors(labels)))
    image_hw = image.scene.image.shape[-2:]
    boxes = np.array([patch_box(place, image.geometry, image_hw) for place in image.kept.tolist()])
    y, x = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    usable = image.usable.numpy()
    axes.scatter(x[usable], y[usable], s=4, c="black", linewidths=0)
    axes.scatter(x[~usable], y[~usable], s=8, c=RED, marker="x", linewidths=0.7)
    present = ids[image.owned & labels.valid].unique().tolist()
    title = f"{len([i for i in present if i])} objects, {int(usable.sum())} kept" if name == "identity" else "classes"
    if name == "class":
        names = [classes[i] if i < len(classes) else str(i) for i in present if i]
        title = ", ".join(names)[:30] or "no class"
    axes.set_title(title, pad=3, fontsize=8)
    _bare(axes, image_hw)


def _draw_purity(axes: Axes, image: Looked) -> None:
    """The share of every patch that carries its label, black 0 to white 1."""
    labels = image.labels.get("identity", next(iter(image.labels.values())))
    axes.imshow(painted_patches(image, labels.purity[..., None].expand(*labels.purity.shape, 3)))
    axes.set_title(f"purity, mean {float(labels.purity[image.owned & labels.valid].mean()):.2f}", pad=3, fontsize=8)
    _bare(axes, image.scene.image.shape[-2:])


def _draw_pairs(axes: Axes, image: Looked) -> None:
    """The kinds of pairs of kept patches as shares."""
    total = sum(image.pairs.values())
    if not total:
        axes.text(0.5, 0.5, "no pairs", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_axis_off()
        return
    axes.set_title(f"{total} pairs", pad=3, fontsize=8)
    for row, (kind, color) in enumerate(PAIR_KINDS.items()):
        share = image.pairs[kind] / total
        axes.barh(row, share, color=color, height=0.45)
        axes.text(0.0, row - 0.3, f"{kind}  {share:.0%}", fontsize=7, va="bottom")
    axes.set_xlim(0, 1), axes.set_ylim(len(PAIR_KINDS) - 0.5, -0.75)
    axes.set_axis_off()


def _bare(axes: Axes, image_hw: Sequence[int]) -> None:
    axes.set_xlim(0, image_hw[1]), axes.set_ylim(image_hw[0], 0)
    axes.set_axis_off()
    axes.set_aspect("auto" if image_hw[0] / image_hw[1] <= 1.6 else "equal")
