"""mode=vis, and every figure of the project: pure `draw_*` functions return figures, the rest gathers and saves.

    run                  mode=vis: score maps of an anchor patch at every layer of a finished run, as strip, GIF and numbers
    score_maps           IsSameObject probability of one patch with every patch of its image, windows merged
    draw_score_maps      the strip: image, true objects, one map per layer, one fixed 0-1 colour scale
    draw_layer_curve     score by layer with intervals, beside its controls, one panel per question
    write_layer_curve    the same into a file; what a training run calls when everything else is written

Figures are made without pyplot, so no display, backend or global state is involved. No training path imports this module
at its head.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save
from torch import Tensor

import options
import results
from activation import build_dataset, choose_device
from backbones import load_backbone
from errors import UserError
from patches import DroppedImage, Geometry, PatchLabels, cut_windows, merge_scores, owned_patches, patch_labels, plan_geometry
from probes import Probe, load_probe
from results import Run, write_atomically

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
DPI = 160
FRAME_MS = 500
TITLE, GAP, BAR = 0.25, 0.07, 0.74  # inches above a panel, between panels, for the colour bar
# Okabe and Ito's colours: told apart with any colour vision. Lines also differ in their dashes.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777",
)  # fmt: skip
LINES = {
    "probe": ("probe", BLUE, "-"),
    "random": ("random weights", RED, "-"),
    "position": ("position only", GREEN, "--"),
    "pixels": ("raw pixels", PINK, "--"),
    "pixels_position": ("pixels + position", PINK, "-."),
    "class_oracle": ("true class", GREY, "--"),
    "cosine": ("cosine", ORANGE, ":"),
    "dot_product": ("dot product", SKY, ":"),
}


# ------------------------------------------------------------------------------------------------------- layer curves


def draw_layer_curve(rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]] | None = None) -> Figure:
    """Score by layer: the probe and its controls with intervals, one panel per column.

    A control with one layer of its own (position, pixels, class oracle) is a level line across the panel.

    Args:
        rows: "name" (the probe's is "probe"), "layer" ("embed" or a block), "layer_index", "block", "metric", "value",
            "low", "high"; "question" and "readout" where there are several. Undefined values (nan, None) are left out.
        columns: (question, readout, block, metric, title) per panel; None: one panel per AUROC in the rows.
    """
    keys = ("question", "readout", "block", "metric")
    if columns is None:
        found = dict.fromkeys(tuple(row.get(k) for k in keys) for row in rows if row["metric"] == "auroc")
        columns = [(*key, f"{str(key[2]).replace('_', ' ')} AUROC") for key in found]
    n_columns = 3 if len(columns) in (3, 5, 6) else min(len(columns), 2)
    n_rows = math.ceil(len(columns) / n_columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.9 * n_columns, 3.1 * n_rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        for panel, column in enumerate(columns):
            axes = figure.add_subplot(n_rows, n_columns, panel + 1)
            chosen = [row for row in rows if tuple(row.get(k) for k in keys) == tuple(column[:4])]
            majority = [row for row in rows if tuple(row.get(k) for k in keys) == (*column[:3], "majority")]
            _draw_panel(axes, chosen, majority, str(column[3]))
            axes.set_title(column[4], loc="left", fontweight="bold")
            if panel >= len(columns) - n_columns:
                axes.set_xlabel("layer (block whose output is read)")
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Mapping], majority: Sequence[Mapping], metric: str) -> None:
    series: dict[str, list[Mapping]] = {}
    for row in rows:
        if row["value"] is not None and math.isfinite(row["value"]):
            series.setdefault(row["name"], []).append(row)
    axes.set_ylabel({"auroc": "AUROC", "average_precision": "average precision"}.get(metric, metric.replace("_", " ")))
    if not series:
        axes.text(0.5, 0.5, "undefined: no such pairs", ha="center", va="center", transform=axes.transAxes, color=GREY)
        axes.set_xticks([]), axes.set_yticks([])
        return
    layers = [row["layer"] for row in sorted(series.get("probe", rows), key=lambda row: row["layer_index"])]
    layers = list(dict.fromkeys(layers))
    last = max(len(layers) - 1, 1)
    ends: list[tuple[float, str, str]] = []
    for name in sorted(series, key=lambda n: (n == "probe", n)):  # the probe lies on top
        label, color, dashes = LINES.get(name, (name.replace("_", " "), GREY, "-."))
        points = sorted(series[name], key=lambda row: row["layer_index"])
        values, low, high = (np.array([row[k] for row in points], float) for k in ("value", "low", "high"))
        level = len(points) == 1 and name != "probe"
        if level:
            x, values, low, high = np.array([0, last]), *(np.repeat(v, 2) for v in (values, low, high))
        else:
            x = np.array([layers.index(row["layer"]) for row in points if row["layer"] in layers])
        order = {"probe": 4}.get(name, 3)
        if len(points) == 1 and not level:
            axes.errorbar(x, values, [values - low, high - values], color=color, marker="o", capsize=3, zorder=order)
        else:
            width = 2.2 if name == "probe" else 1.3
            axes.fill_between(x, low, high, color=color, alpha=0.18, lw=0, zorder=order - 1)
            style = {"marker": None if level else "o", "ms": 4 if name == "probe" else 2.5}
            axes.plot(x, values, color=color, ls=dashes, lw=width, zorder=order, **style)
        ends.append((values[-1], label, color))
    base = majority[0]["value"] if metric.startswith("accuracy") and majority else 0.5 if metric == "auroc" else None
    if base is not None:
        axes.axhline(base, color="black", ls=(0, (1, 3)), lw=0.9, zorder=1)
        ends.append((base, "chance" if metric == "auroc" else "majority", "black"))
    step = max(1, math.ceil(len(layers) / 13))
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlim(-0.03 * last, last * 1.03)
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.tick_params(length=2, width=0.6)
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    for (value, label, color), y in zip(ends, _apart([end[0] for end in ends], (high - low) * 0.072), strict=True):
        axes.annotate(
            label, (last * 1.03, value), (last * 1.08, y), color=color, va="center", fontsize=8, annotation_clip=False,
            fontweight="bold" if label == "probe" else None,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels near their values, in the same order of height, at least a gap apart."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = [[i] for i in order]  # labels that touch share one block, centred on their mean

    def span(group: list[int]) -> tuple[float, float]:
        centre, half = sum(values[i] for i in group) / len(group), gap * (len(group) - 1) / 2
        return centre - half, centre + half

    at = 0
    while at + 1 < len(groups):
        if span(groups[at + 1])[0] - span(groups[at])[1] < gap:
            groups[at : at + 2] = [groups[at] + groups[at + 1]]
            at = max(at - 1, 0)
        else:
            at += 1
    places = {i: span(group)[0] + n * gap for group in groups for n, i in enumerate(group)}
    return [places[i] for i in range(len(values))]


def write_layer_curve(rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]] | None, path: Path) -> None:
    """Draw the layer curve into a PNG file."""
    write_atomically(Path(path), _png(draw_layer_curve(rows, columns)))


# --------------------------------------------------------------------------------------------------------- score maps


class ScoreMaps(NamedTuple):
    """What the maps of one anchor patch show.

    key: name of the image. image: [3, H, W] uint8. identity: [H, W] int, the true objects.
    layers: the L layers. patch_scores: float32 [L, n_windows, h, w] probability of being one object with the anchor, of
        every patch of every window. maps: float32 [L, H, W], the same merged.
    anchor: (window, row, column). box: (top, left, bottom, right) of the anchor in pixels of the image.
    object_id: identity of the anchor patch, 0 for background.
    """

    key: str
    image: Tensor
    identity: Tensor
    layers: list[int | str]
    patch_scores: Tensor
    maps: Tensor
    anchor: tuple[int, int, int]
    box: tuple[float, float, float, float]
    object_id: int


def anchor_at(pixel: Sequence[int], geometry: Geometry, image_hw: Sequence[int]) -> tuple[int, int, int]:
    """The patch (window, row, column) that stands for a pixel [y, x] of the image.

    Raises:
        UserError: the pixel lies outside the image, or in a strip that no window sees.
    """
    if len(pixel) != 2 or not all(0 <= int(p) < n for p, n in zip(pixel, image_hw, strict=True)):
        raise UserError(f"vis.pixel={list(pixel)} lies outside the image, expected [y, x] within {list(image_hw)}")
    place = [(int(p) + 0.5) * s / n for p, s, n in zip(pixel, geometry.scaled, image_hw, strict=True)]
    owned, found = owned_patches(geometry), []
    for window, start in enumerate(geometry.starts):
        inside = [p - s for p, s in zip(place, start, strict=True)]
        if all(0 <= p < n for p, n in zip(inside, geometry.window, strict=True)):
            before = geometry.pad[2], geometry.pad[0]
            row, column = (int((p + b) // geometry.patch) for p, b in zip(inside, before, strict=True))
            off_centre = sum((p - n / 2) ** 2 for p, n in zip(inside, geometry.window, strict=True))
            found.append((not bool(owned[window, row, column]), off_centre, (window, row, column)))
    if not found:
        raise UserError(f"vis.pixel={list(pixel)} lies where this protocol has no window; choose another pixel")
    return min(found)[2]


def default_anchor(identity: Tensor, labels: PatchLabels, geometry: Geometry) -> tuple[int, int, int]:
    """The purest patch of the largest object, the most central one among equals.

    Args:
        identity: [H, W]; labels: identities of its patches.

    Raises:
        UserError: no patch of the image belongs to an object.
    """
    usable = labels.valid & owned_patches(geometry)
    ids, sizes = identity[identity > 0].unique(return_counts=True)
    for number in ids[sizes.argsort(descending=True, stable=True)].tolist():
        patches = (usable & (labels.label == number)).nonzero()  # [n, 3]
        if len(patches):
            starts = torch.tensor(geometry.starts)[patches[:, 0]]
            place = (starts + patches[:, 1:] * geometry.patch).double()
            purity = labels.purity[tuple(patches.T)].double()
            best = (purity * 1e6 - (place - place.mean(0)).norm(dim=1)).argmax()
            return tuple(patches[best].tolist())
    raise UserError("no patch of this image belongs to an object; choose another vis.image, or an anchor with vis.pixel=[y,x]")


def patch_box(anchor: Sequence[int], geometry: Geometry, image_hw: Sequence[int]) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) of a patch in pixels of the image, cut where padding begins."""
    window, *cell = anchor
    low, high = [], []
    for axis, before in ((0, geometry.pad[2]), (1, geometry.pad[0])):
        start, scale = geometry.starts[window][axis], image_hw[axis] / geometry.scaled[axis]
        first = cell[axis] * geometry.patch - before
        low.append((start + max(first, 0)) * scale)
        high.append((start + min(first + geometry.patch, geometry.window[axis])) * scale)
    return (*low, *high)


@torch.inference_mode()
def score_maps(cfg: DictConfig, probes: Sequence[Probe], scene: Any, pixel: Sequence[int] | None) -> ScoreMaps:
    """Score one patch of a scene against all its patches, those of other windows included, at every layer of the probes.

    Probabilities are means over the seeds. A pairwise run that fitted one stack on all pairs and one on pairs of objects is
    shown with the first, because a map has background. A pointwise probe scores a pair with the inner product of its two
    distributions.

    Args:
        cfg: of the run the probes come from.
        probes: the cuts of one stack.
        scene: with labels["identity"].
        pixel: [y, x] of the anchor; None: `default_anchor`.

    Raises:
        UserError: the scene has no identity map, the protocol leaves it out, or there is no such anchor.
    """
    if "identity" not in scene.labels:
        raise UserError(f"{scene.key} has no identity map, score maps need one; name another dataset")
    device = choose_device(cfg.device)
    backbone = load_backbone(cfg.model, device)
    facts, rules, image_hw = backbone.facts, cfg.protocol.geometry, tuple(scene.image.shape[-2:])
    try:
        geometry = plan_geometry(image_hw, geometry=rules, patch_size=facts.patch_size, image_size=facts.image_size)
    except DroppedImage as error:
        raise UserError(f"protocol {cfg.protocol.name} leaves out {scene.key}: {error}; choose another vis.image") from error
    identity = scene.labels["identity"]
    labels = patch_labels(identity, geometry, labels=cfg.protocol.labels)
    anchor = default_anchor(identity, labels, geometry) if pixel is None else anchor_at(pixel, geometry, image_hw)
    windows = cut_windows(
        scene.image, geometry, mean=facts.mean, std=facts.std, interpolation=facts.interpolation, antialias=rules.antialias
    )
    layers = [layer for probe in probes for layer in probe.layers]
    parts = [[t.patch.float() for t in backbone(w.to(device), layers)] for w in windows.split(int(cfg.cache.batch_size))]
    tokens = torch.stack([torch.cat(of_layer) for of_layer in zip(*parts, strict=True)])  # [L, n_windows, N, D]
    at = (anchor[0] * geometry.grid[0] + anchor[1]) * geometry.grid[1] + anchor[2]
    scores, first = [], 0
    for probe in probes:
        x = tokens[first : first + len(probe.layers)].flatten(1, 2)[:, None]  # [L, 1, n_windows * N, D]
        first += len(probe.layers)
        scores.append(_probability(probe.to(device).eval(), x, at, cfg).cpu())
    patch_scores = torch.cat(scores).view(len(layers), len(geometry.starts), *geometry.grid)
    valid = torch.ones(len(geometry.starts), dtype=torch.bool)
    maps = torch.stack([merge_scores(of_layer, valid, geometry, image_hw) for of_layer in patch_scores])
    box, object_id = patch_box(anchor, geometry, image_hw), int(labels.label[anchor])
    return ScoreMaps(scene.key, scene.image, identity, layers, patch_scores, maps, anchor, box, object_id)


def _probability(probe: Probe, x: Tensor, at: int, cfg: DictConfig) -> Tensor:
    """Probability [L, N] that token `at` and each of the tokens x [L, 1, N, D] are one object, mean over seeds."""
    if probe.kind == "pointwise":
        share = probe(x).softmax(-1)[:, :, 0]  # [S, L, N, K]
        return (share * share[:, :, at : at + 1]).sum(-1).mean(0)
    fits = list(cfg.protocol.pairs.fit)
    n_seeds = len(probe.seeds) // len(fits)
    start = fits.index("all") * n_seeds if "all" in fits else 0
    return torch.sigmoid(probe(x[:, :, at : at + 1], x)[start : start + n_seeds, :, 0, 0]).mean(0)


def draw_score_maps(maps: ScoreMaps) -> Figure:
    """The strip: image and true objects with the anchor's box, then the map of every layer, 0 to 1 on one colour scale."""
    shape, n_panels = maps.identity.shape[0] / maps.identity.shape[1], len(maps.layers) + 2
    for n_columns in range(1, n_panels + 1):
        width = (10.0 - BAR - GAP) / n_columns - GAP
        if math.ceil(n_panels / n_columns) * (width * shape + TITLE + GAP) <= 5.6:
            break
    else:  # few tall panels in one row
        width = (5.6 - TITLE - GAP) / shape
    return _lay_out(maps, range(-2, len(maps.layers)), n_columns, width)


def draw_layer_frame(maps: ScoreMaps, index: int) -> Figure:
    """One frame of the GIF: image, true objects and the map of one layer, side by side (one above the other if wide)."""
    shape = maps.identity.shape[1] / maps.identity.shape[0]
    return _lay_out(maps, (-2, -1, index), *((1, 4.0) if shape > 1.8 else (3, 2.4 * min(1.0, 1.5 * shape))))


def _lay_out(maps: ScoreMaps, views: Sequence[int], n_columns: int, w: float) -> Figure:
    """Panels of w inches width, row by row, and the colour bar at their right."""
    h = w * maps.identity.shape[0] / maps.identity.shape[1]
    width = GAP + n_columns * (w + GAP) + BAR
    height = math.ceil(len(views) / n_columns) * (h + TITLE + GAP)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for panel, view in enumerate(views):
            row, column = divmod(panel, n_columns)
            left, bottom = GAP + column * (w + GAP), height - (row + 1) * (h + TITLE + GAP) + GAP
            axes = figure.add_axes((left / width, bottom / height, w / width, h / height))
            _draw_view(axes, maps, view)
        axes = figure.add_axes((1 - (BAR - GAP) / width, GAP / height, 0.14 / width, 1 - (GAP + TITLE) / height))
        axes.imshow(np.linspace(1, 0, 256)[:, None], vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=(0, 1, 0, 1))
        axes.set_xticks([]), axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.yaxis.tick_right(), axes.yaxis.set_label_position("right")
        axes.tick_params(length=2, width=0.6)
        axes.set_ylabel("P(same object)", labelpad=2)
    return figure


def _draw_view(axes: Axes, maps: ScoreMaps, view: int) -> None:
    """The image (-2), the true objects (-1) or the map of a layer, with the anchor's box and its object's outline."""
    height, width = maps.identity.shape
    extent = (0, width, height, 0)
    if view == -2:
        axes.imshow(maps.image.permute(1, 2, 0).numpy(), extent=extent)
    elif view == -1:
        axes.imshow(color_identities(maps.identity), extent=extent, interpolation="nearest")
    else:
        axes.imshow(maps.maps[view].numpy(), vmin=0, vmax=1, cmap="viridis", extent=extent)
    names = [*(layer if layer == "embed" else f"layer {layer}" for layer in maps.layers), "image", "true objects"]
    axes.set_title(names[view], pad=3)
    axes.set_axis_off()
    inside = np.pad((maps.identity == maps.object_id).numpy(), 1)  # so that an outline closes at the border
    if view != -1 and maps.object_id:
        y, x = (np.arange(n + 2) - 0.5 for n in (height, width))
        line = axes.contour(x, y, inside, levels=[0.5], colors="white", linewidths=1.2)
        line.set_path_effects([withStroke(linewidth=2.2, foreground="black")])
    top, left, bottom, right = maps.box
    points = 72 * axes.get_position().width * axes.figure.get_figwidth() * (right - left) / width  # of the box on paper
    thick = min(max(0.2 * points, 0.7), 1.6)
    box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=RED, lw=thick)
    box.set_path_effects([withStroke(linewidth=thick + 1, foreground="white")])
    axes.add_patch(box)
    axes.set_xlim(0, width), axes.set_ylim(height, 0)


def color_identities(identity: Tensor) -> np.ndarray:
    """A picture [H, W, 3] float of an identity map: background and ignored light grey, neighbours parted by white lines."""
    identity = identity.clamp(min=0)
    palette = [matplotlib.colors.to_rgb(c) for c in (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY)]
    tones = [np.array(palette), np.array(palette) * 0.6, 1 - (1 - np.array(palette)) * 0.5]
    ids, place = identity.unique(return_inverse=True)  # neighbours in number get unlike colours, whatever the ids are
    colors = np.resize(np.concatenate(tones), (len(ids), 3))
    colors = np.concatenate([np.full((1, 3), 0.93), colors]) if int(ids[0]) == 0 else colors
    picture = colors[place.numpy()]
    edge = np.zeros(identity.shape, bool)
    edge[1:] |= (identity[1:] != identity[:-1]).numpy()
    edge[:, 1:] |= (identity[:, 1:] != identity[:, :-1]).numpy()
    picture[edge] = 1.0
    return picture


# -------------------------------------------------------------------------------------------------------------- files


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=vis: strip, GIF (`vis.gif`), numbers and facts of one image of a finished run, into `vis.out` or the run directory.

    Raises:
        UserError: no such run, image or anchor.
    """
    vis = cfg.vis
    directory = Path(vis.run) if vis.run else results.newest_run(cfg.output_dir, results.PATCH_MODES)
    fitted = options.adopt(results.read_config(directory), cfg, directory)
    dataset = build_dataset(fitted, str(vis.split))
    if not 0 <= int(vis.image) < len(dataset):
        raise UserError(f"vis.image={vis.image}, expected 0 … {len(dataset) - 1} (images of split {vis.split})")
    probes = [load_probe(file) for file in results.checkpoint_files(directory, "probe", "best")]
    maps = score_maps(fitted, probes, dataset[int(vis.image)], vis.pixel)
    folder = Path(vis.out) if vis.out else run.dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder vis.out={folder}: {error.strerror}; name another") from error
    for path in write_score_maps(maps, folder, gif=bool(vis.gif), facts={"run": str(directory), "split": vis.split}):
        run.say(str(path))
    return {"own_score": [float(m[maps.anchor]) for m in maps.patch_scores]}


def write_score_maps(maps: ScoreMaps, folder: Path, *, gif: bool, facts: Mapping[str, Any]) -> list[Path]:
    """Write strip (PNG), GIF, numbers (safetensors) and facts (JSON); names come from the image and the anchor alone."""
    window, row, column = maps.anchor
    stem = "".join(c if c.isalnum() or c in "-_" else "_" for c in maps.key) + f"_w{window}_r{row}_c{column}"
    inside = (maps.identity == maps.object_id)[None]
    told = {
        **facts, "key": maps.key, "image_hw": list(maps.identity.shape), "layers": maps.layers,
        "anchor": {"window": window, "row": row, "column": column}, "box": list(maps.box), "object": maps.object_id,
        "own_score": [float(s[maps.anchor]) for s in maps.patch_scores],
        "mean_on_object": [float(m[inside[0]].mean()) for m in maps.maps],
        "mean_elsewhere": [float(m[~inside[0]].mean()) if bool((~inside).any()) else None for m in maps.maps],
    }  # fmt: skip
    numbers = {"patch_scores": maps.patch_scores, "maps": maps.maps.half(), "identity": maps.identity}
    files = {
        f"{stem}.png": _png(draw_score_maps(maps)),
        f"{stem}.safetensors": save({name: value.contiguous() for name, value in numbers.items()}),
        f"{stem}.json": (json.dumps(told, indent=2) + "\n").encode(),
    }
    if gif:
        files[f"{stem}.gif"] = _gif([draw_layer_frame(maps, index) for index in range(len(maps.layers))])
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]


def _pixels(figure: Figure, dpi: int) -> Image.Image:
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    _pixels(figure, DPI).save(data, "png", optimize=True)
    return data.getvalue()


def _gif(figures: Sequence[Figure]) -> bytes:
    """Frames with one palette: 100 colours of the scale, so that a colour means the same everywhere, the rest the image's."""
    pictures, data = [_pixels(figure, 110) for figure in figures], io.BytesIO()
    scale = (matplotlib.colormaps["viridis"](np.linspace(0, 1, 100))[:, :3] * 255).round().astype(int)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*scale.ravel().tolist(), *pictures[0].quantize(156).getpalette()[: 3 * 156]])
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    frames[0].save(data, "gif", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return data.getvalue()
