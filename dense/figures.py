"""Figures of the dense evaluations: pure `draw_` functions, and the one that writes them into a run directory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from omegaconf import DictConfig
from torch import Tensor

from dense.contract import mean_over_seeds
from dense.examples import Example, cluster_gallery, retrieval_examples
from dense.features import Split
from dense.report import BACKBONE, MAIN, Results, class_rows, label
from files import write_atomically
from show.style import BLUE, FALLING, GREEN, PINK, RED, STYLE, png_bytes

COLOURS = {BACKBONE: BLUE, "random": RED, "pixels": PINK, "position": GREEN}
NAMES = {BACKBONE: "backbone", "random": "random weights", "pixels": "raw pixels", "position": "position only"}


def palette(n_classes: int) -> np.ndarray:
    """Colours [C, 3] in 0 … 1 as PASCAL VOC assigns them to class ids; other data sets get the same."""
    ids = np.arange(n_classes)
    colours = np.zeros((n_classes, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((ids >> channel) & 1) << (7 - bit)
        ids = ids >> 3
    return colours / 255


def coloured(label_map: Tensor, colours: np.ndarray) -> np.ndarray:
    """A label map as a picture [H, W, 3]; what is ignored is light grey."""
    ids = label_map.numpy().astype(int)
    known = (ids >= 0) & (ids < len(colours))
    return np.where(known[..., None], colours[np.where(known, ids, 0)], 0.85)


def draw_evaluations(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """One bar per subject and evaluation with its interval.

    Args:
        rows: "evaluation", "setting", "subject", "value", "low", "high"; "still_falling" is marked by a triangle.
    """
    keys = list(dict.fromkeys((row["evaluation"], row["setting"]) for row in rows))
    subjects = [name for name in COLOURS if any(row["subject"] == name for row in rows)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.9 + 0.46 * len(keys)), layout="constrained")
        axes = figure.add_subplot()
        height = 0.8 / len(subjects)
        for s, subject in enumerate(subjects):
            found = {(row["evaluation"], row["setting"]): row for row in rows if row["subject"] == subject}
            at = [i + (s - (len(subjects) - 1) / 2) * height for i, key in enumerate(keys) if key in found]
            here = [found[key] for key in keys if key in found]
            value = [row["value"] for row in here]
            errors = [[row["value"] - row["low"] for row in here], [row["high"] - row["value"] for row in here]]
            axes.barh(at, value, height * 0.92, color=COLOURS[subject], label=NAMES[subject])
            falling = [(row["value"], y) for row, y in zip(here, at, strict=True) if row.get("still_falling")]
            axes.plot([v for v, _ in falling], [y for _, y in falling], FALLING, color="black", mfc="white", ms=5, zorder=4)
            axes.errorbar(value, at, xerr=np.clip(errors, 0, None), fmt="none", ecolor="black", elinewidth=0.8)
        axes.set_yticks(range(len(keys)), [f"{a} {b}".replace("_", " ").strip() for a, b in keys])
        axes.invert_yaxis()
        axes.set_xlim(0, None)
        axes.set_xlabel("mIoU (attention and foreground: Jaccard), 95 % intervals over images")
        figure.legend(frameon=False, loc="outside upper right", ncols=len(subjects))
    return figure


def draw_layers(rows: Sequence[Mapping[str, Any]], layers: Sequence[int | str]) -> Figure:
    """A panel per evaluation: score by layer with its interval; a control with one layer of its own is a level line.

    Args:
        rows: as for `draw_evaluations`, with "layer".
        layers: those of the backbone, in order.
    """
    keys = list(dict.fromkeys((row["evaluation"], row["setting"]) for row in rows))
    n_columns = min(3, len(keys))
    n_rows = math.ceil(len(keys) / n_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * n_columns, 2.4 * n_rows), layout="constrained")
        for panel, key in enumerate(keys):
            axes = figure.add_subplot(n_rows, n_columns, panel + 1)
            for subject, colour in COLOURS.items():
                here = [row for row in rows if (row["evaluation"], row["setting"], row["subject"]) == (*key, subject)]
                at = {str(row["layer"]): row for row in here}
                chosen = [(i, at[str(layer)]) for i, layer in enumerate(layers) if str(layer) in at]
                if len(here) == 1:
                    chosen = [(0, here[0]), (len(layers) - 1, here[0])]
                if not chosen:
                    continue
                x, found = zip(*chosen, strict=True)
                marks = "-" if len(here) == 1 else "o-"
                axes.plot(x, [row["value"] for row in found], marks, ms=3, lw=1.4, color=colour, label=NAMES[subject])
                falling = [(i, row["value"]) for i, row in chosen if row.get("still_falling")]
                axes.plot([i for i, _ in falling], [v for _, v in falling], FALLING, color=colour, mfc="white", ms=6, zorder=4)
                axes.fill_between(
                    x, [row["low"] for row in found], [row["high"] for row in found], color=colour, alpha=0.2, lw=0
                )
            axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set_ylim(0, None)
            axes.set_title(" ".join(key).replace("_", " ").strip(), loc="left")
            axes.set_xlabel("layer")
        figure.axes[0].set_ylabel("score")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside upper right", ncols=len(labels))
    return figure


def draw_classes(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """IoU of every class with its interval, one row of points per subject.

    Args:
        rows: "subject", "class", "iou", "low", "high"; undefined values are left out.
    """
    names = list(dict.fromkeys(row["class"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.8 + 0.26 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        for s, (subject, colour) in enumerate(COLOURS.items()):
            here = [row for row in rows if row["subject"] == subject and row["iou"] == row["iou"]]
            if not here:
                continue
            at = [names.index(row["class"]) + 0.16 * (s - 1.5) for row in here]
            value = [row["iou"] for row in here]
            errors = [[row["iou"] - row["low"] for row in here], [row["high"] - row["iou"] for row in here]]
            axes.errorbar(
                value, at, xerr=np.clip(errors, 0, None), fmt="o", ms=3.5, color=colour, elinewidth=1, label=NAMES[subject]
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(axis="x", lw=0.3)
        axes.set_xlabel("IoU, 95 % intervals over images")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.legend(frameon=False)
    return figure


def draw_confusion(confusion: Tensor, classes: Sequence[str], title: str) -> Figure:
    """Rows: the true class; columns: what its pixels were called, as shares of the row."""
    share = confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)
    n, side = len(classes), max(3.2, 0.24 * len(classes) + 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=1)
        if n <= 40:
            axes.set_xticks(range(n), classes, rotation=90)
            axes.set_yticks(range(n), classes)
        axes.set_xlabel("called")
        axes.set_ylabel("true")
        axes.set_title(title, loc="left", fontweight="bold")
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true pixels")
    return figure


def draw_examples(examples: Sequence[Example], classes: Sequence[str]) -> Figure:
    """Per image: the picture with the query patch, its nearest training patches, the transferred map, the true map."""
    colours, n_near = palette(len(classes)), max(len(example.neighbours) for example in examples)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 * 3 + 0.62 * n_near, 1.65 * len(examples)), layout="constrained")
        grid = figure.add_gridspec(len(examples), 3 + n_near, width_ratios=[1.5] + [0.62] * n_near + [1.5] * 2)
        for i, example in enumerate(examples):
            height, width = example.truth.shape
            (row, column), (h, w) = example.query, example.grid
            axes = figure.add_subplot(grid[i, 0])
            axes.imshow(example.image.permute(1, 2, 0).numpy())
            box = (column * width / w - 0.5, row * height / h - 0.5)
            axes.add_patch(Rectangle(box, width / w, height / h, fill=False, ec="white", lw=1.6))
            for k, (picture, cosine) in enumerate(zip(example.neighbours, example.cosines, strict=True)):
                near = figure.add_subplot(grid[i, 1 + k])
                near.imshow(picture.permute(1, 2, 0).numpy())
                near.set_title(f"nearest\n{cosine:.2f}" if i == k == 0 else f"{cosine:.2f}", fontsize=7)
                near.axis("off")
            shown = [(1 + n_near, example.prediction, "retrieved"), (2 + n_near, example.truth, "true")]
            for at, label_map, title in shown:
                panel = figure.add_subplot(grid[i, at])
                panel.imshow(coloured(label_map, colours))
                panel.axis("off")
                if i == 0:
                    panel.set_title(title)
            axes.axis("off")
            if i == 0:
                axes.set_title("image, query")
        ids = sorted({int(c) for e in examples for m in (e.truth, e.prediction) for c in m.unique() if 0 <= c < len(classes)})
        handles = [Rectangle((0, 0), 1, 1, color=colours[c]) for c in ids]
        figure.legend(handles, [classes[c] for c in ids], loc="outside lower center", ncols=min(7, len(ids)), frameon=False)
    return figure


def draw_gallery(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Figure:
    """Members of the clusters that lie most on one class, one row each: patches with their neighbours, of several images."""
    n = max(len(row["pictures"]) for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.7 + 0.85 * n, 0.95 * len(rows)), layout="constrained")
        for i, row in enumerate(rows):
            for k, picture in enumerate(row["pictures"]):
                axes = figure.add_subplot(len(rows), n, i * n + k + 1)
                axes.imshow(picture.permute(1, 2, 0).numpy())
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
                if k == 0:
                    text = f"{classes[row['class']]}\n{100 * row['purity']:.0f} % of pixels"
                    axes.set_ylabel(text, rotation=0, ha="right", va="center", color="black")
    return figure


def at_last_layer(rows: Sequence[Mapping[str, Any]], layers: Sequence[int | str]) -> list[Mapping[str, Any]]:
    """The rows of the last layer, and those of a control that has one layer of its own."""
    seen: dict[tuple, set[str]] = {}
    key = lambda row: (row["evaluation"], row["subject"])
    for row in rows:
        seen.setdefault(key(row), set()).add(str(row["layer"]))
    return [row for row in rows if len(seen[key(row)]) == 1 or str(row["layer"]) == str(layers[-1])]


def write_figures(
    cfg: DictConfig,
    directory: Path,
    rows: Sequence[Mapping[str, Any]],
    results: Results,
    splits: Mapping[str, Split],
    counts: Tensor,
) -> None:
    """Draw everything there is something to draw of: bars, layer curves, classes and confusions, examples, clusters."""
    classes, layers = splits["test"].maps.classes, splits["test"].grids.layers
    shown = {
        (evaluation, label(result.setting))
        for evaluation, subjects in results.items()
        for result in mean_over_seeds(subjects[BACKBONE])
        if result.notes.get("published", True)
    }
    main = [row for row in rows if row["metric"] in MAIN and (row["evaluation"], row["setting"]) in shown]
    main = [row for row in main if not (row["metric"] == "jaccard" and row["value"] != row["value"])]
    drawn = {"evaluations": draw_evaluations(at_last_layer(main, layers))}
    if len(layers) > 1:
        drawn["layers"] = draw_layers([row for row in main if row["layer"] != ""], layers)
    of_classes = class_rows(results, classes, counts)
    for evaluation in ("linear_seg", "patch_class", "dense_retrieval", "overcluster"):
        found = at_last_layer([row for row in of_classes if row["evaluation"] == evaluation], layers)
        if found:
            setting = found[-1]["setting"]
            title = f"{evaluation} {setting}, layer {layers[-1]}".replace("_", " ")
            drawn["classes"] = draw_classes([row for row in found if row["setting"] == setting], title)
            last = [r for r in mean_over_seeds(results[evaluation][BACKBONE]) if r.setting["layer"] == layers[-1]][-1]
            drawn["confusion"] = draw_confusion(last.confusion, classes[-len(last.confusion) :], title)
            break
    if "dense_retrieval" in results and (examples := retrieval_examples(cfg, splits)):
        drawn["examples"] = draw_examples(examples, classes)
    if "overcluster" in results and (gallery := cluster_gallery(cfg, splits)):
        drawn["clusters"] = draw_gallery(gallery, classes)
    for name, figure in drawn.items():
        write_atomically(directory / f"{name}.png", png_bytes(figure))
