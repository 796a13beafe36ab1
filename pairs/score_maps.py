"""mode=vis: the IsSameObject map of an anchor patch at every layer: strip, GIF, numbers."""

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
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

import options
from backbones.load import load_backbone
from errors import UserError
from files import write_atomically
from machine import choose_device
from patches.anchor import anchor_at, default_anchor, patch_box
from patches.geometry import DroppedImage, plan_geometry
from patches.labels import patch_labels
from patches.windows import cut_windows, merge_scores
from probes import Probe, load_probe
from runs.run import Run, checkpoint_files, read_config
from runs.states import pack
from show.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE, YELLOW, figure_pixels, png_bytes
from store.index import build_dataset

FRAME_MS = 500
TITLE, GAP, BAR = 0.25, 0.07, 0.74  # inches above a panel, between panels, for the colour bar


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
    parts = [[t.patch.float() for t in backbone(w.to(device), layers)] for w in windows.split(int(cfg.cache.batch_windows))]
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


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """mode=vis: strip, GIF (`vis.gif`), numbers and facts of one image of a finished run, into `vis.out` or the run directory.

    Raises:
        UserError: no such run, image or anchor.
    """
    vis = cfg.vis
    directory = run.source
    fitted = options.adopt(read_config(directory), cfg, directory)
    dataset = build_dataset(fitted, str(vis.split))
    if not 0 <= int(vis.image) < len(dataset):
        raise UserError(f"vis.image={vis.image}, expected 0 … {len(dataset) - 1} (images of split {vis.split})")
    probes = [load_probe(file) for file in checkpoint_files(directory, "probe", "best")]
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
        f"{stem}.png": png_bytes(draw_score_maps(maps)),
        f"{stem}.safetensors": pack(numbers, told, stem),
        f"{stem}.json": (json.dumps(told, indent=2) + "\n").encode(),
    }
    if gif:
        files[f"{stem}.gif"] = _gif([draw_layer_frame(maps, index) for index in range(len(maps.layers))])
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]


def _gif(figures: Sequence[Figure]) -> bytes:
    """Frames with one palette: 100 colours of the scale, so that a colour means the same everywhere, the rest the image's."""
    pictures, data = [figure_pixels(figure, 110) for figure in figures], io.BytesIO()
    scale = (matplotlib.colormaps["viridis"](np.linspace(0, 1, 100))[:, :3] * 255).round().astype(int)
    palette = Image.new("P", (1, 1))
    palette.putpalette([*scale.ravel().tolist(), *pictures[0].quantize(156).getpalette()[: 3 * 156]])
    frames = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    frames[0].save(data, "gif", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return data.getvalue()
