"""Figures of score maps: the strip of one anchor, its frames for a GIF, and a sheet of several images and anchors."""

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor

from pairs.maps import Anchor, MapRow, ScoreMaps
from show.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, STYLE, YELLOW, figure_pixels, scale_colors

WIDTH, HEIGHT = 10.0, 5.6  # inches of a strip of one row at most
TABLE_WIDTH, ROW_HEIGHT, MOST_COLUMNS = 12.0, 2.6, 13  # of several rows: width, what a further row may add, columns
HEAD, TITLE, FOOT, GAP, BAR, LABEL = 0.3, 0.25, 0.19, 0.07, 0.74, 0.24  # inches: line, above, below, between, bar, row name
FRAME_MS, LAST_MS = 500, 1500
GIF_DPI = 110
SCALE_COLORS = 96  # of the GIF's 256 colours those of the scale
MISSING = "#d9d9d9"
VIEW_NAMES = {"probe": "probe", "cosine": "cosine", "attention": "attention"}
PALETTE = [
    np.array(tone)
    for change in (lambda c: c, lambda c: c * 0.6, lambda c: 1 - (1 - c) * 0.5)
    for tone in [change(np.array(matplotlib.colors.to_rgb(c))) for c in (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY)]
]


class _Sheet(NamedTuple):
    """Where panels of one size stand, in inches.

    figure: theirs. w, h: of a panel. tops: of the rows of panels, from the upper edge down to where the title begins.
    titles: height of the title of each row. gutter: between the first column and the others, for the names of rows.
    """

    figure: Figure
    w: float
    h: float
    tops: list[float]
    titles: list[float]
    gutter: float

    def panel(self, row: int, column: int) -> Axes:
        return self.place(self.tops[row] + self.titles[row], GAP + column * (self.w + GAP) + (self.gutter if column else 0))

    def place(self, top: float, x: float) -> Axes:
        """A panel whose upper edge lies `top` inches below that of the figure."""
        width, height = self.figure.get_size_inches()
        return self.figure.add_axes((x / width, (height - top - self.h) / height, self.w / width, self.h / height))


def draw_score_maps(maps: ScoreMaps, about: str = "") -> Figure:
    """The strip: image and true objects at the left, then the map of every layer, a row per run and measure.

    Every map is shown from 0 to 1: cosines below 0 as 0, attention divided by its largest weight in the map. The AUROC of
    the map against the anchor's object stands below it, where objects are known.

    Args:
        about: a line above all: run, model, probe, image.
    """
    first = ["image"] if maps.identity is None else ["image", "objects"]
    foot, n_rows, n_layers = _foot(maps), len(maps.rows), max(len(row.layers) for row in maps.rows)
    gutter = _gutter(maps)
    shape = maps.image.shape[1] / maps.image.shape[2]
    columns, w = _arrange(shape, n_rows, n_layers, len(first), foot, gutter)
    with matplotlib.rc_context(STYLE):
        sheet = _sheet(w, shape, 1 + columns, math.ceil(n_layers / columns), n_rows, len(first), foot, gutter)
        _write_line(sheet.figure, about + _legend(maps))
        for number, view in enumerate(first):
            _draw_view(sheet.place(HEAD + TITLE + number * (sheet.h + TITLE + GAP), GAP), maps, view)
        for index, row in enumerate(maps.rows):
            for layer in range(len(row.layers)):
                chunk, column = divmod(layer, columns)
                axes = sheet.panel(chunk * n_rows + index, 1 + column)
                _draw_map(axes, maps, row, layer, titled=index == 0)
                if n_rows > 1 and column == 0:
                    axes.text(-0.04, 0.5, _row_name(maps, row), transform=axes.transAxes, rotation=90, ha="right", va="center")
        _draw_bar(sheet.figure, " · ".join(dict.fromkeys(row.name for row in maps.rows)))
    return sheet.figure


def _arrange(shape: float, n_rows: int, n_layers: int, n_first: int, foot: float, gutter: float) -> tuple[int, float]:
    """Columns of layers and the width of a panel in inches.

    One row of maps is folded so that its panels are largest on one page. Several rows stand under each other, so that a
    layer is a column; they are folded only where a panel would be too small.
    """
    if n_rows > 1:
        columns = math.ceil(n_layers / math.ceil(n_layers / MOST_COLUMNS))
        highest = HEIGHT + (n_rows - 1) * ROW_HEIGHT
        wide = (TABLE_WIDTH - BAR - GAP - gutter) / (columns + 1) - GAP
        n_chunks = math.ceil(n_layers / columns)
        tall = ((highest - HEAD) / n_chunks - TITLE) / n_rows - foot - GAP
        return columns, min(wide, tall / shape)
    options = []
    for columns in range(1, n_layers + 1):
        wide = (WIDTH - BAR - GAP) / (columns + 1) - GAP
        tall = (HEIGHT - HEAD) / math.ceil(n_layers / columns) - TITLE - foot - GAP
        beside = (HEIGHT - HEAD) / n_first - TITLE - GAP
        w = min(wide, tall / shape, beside / shape)
        options.append((round(w, 6), -columns, w))
    _, columns, w = max(options)
    return -columns, w


def _sheet(
    w: float, shape: float, n_columns: int, n_chunks: int, n_rows: int, n_first: int, foot: float, gutter: float = 0.0
) -> _Sheet:
    """A figure of the size its panels and the colour bar need: chunks of rows, of which the first has titles."""
    h, tops, titles, top = w * shape, [], [], HEAD
    for _ in range(n_chunks):
        for row in range(n_rows):
            tops.append(top)
            titles.append(0.0 if row else TITLE)
            top += titles[-1] + h + foot + GAP
    height = max(top, HEAD + n_first * (h + TITLE + GAP))
    width = GAP + gutter + n_columns * (w + GAP) + BAR
    return _Sheet(Figure(figsize=(width, height)), w, h, tops, titles, gutter)


def _foot(maps: ScoreMaps) -> float:
    """Inches below a panel: for its AUROC, or for the word that it has no numbers."""
    said = any(value is not None for row in maps.rows for value in row.auroc)
    return FOOT if said or any(bool(of_layer.isnan().all()) for row in maps.rows for of_layer in row.maps) else 0.0


def _gutter(maps: ScoreMaps) -> float:
    """Inches for the names of rows: none for one row, two lines where there are several runs."""
    if len(maps.rows) == 1:
        return 0.0
    return LABEL if len({row.run for row in maps.rows}) == 1 else 1.8 * LABEL


def _row_name(maps: ScoreMaps, row: MapRow) -> str:
    """What a row shows; of several runs also the run's number, whose name stands in the line above all panels."""
    runs = list(dict.fromkeys(other.run for other in maps.rows))
    return f"run {runs.index(row.run) + 1}\n{VIEW_NAMES[row.view]}" if len(runs) > 1 else VIEW_NAMES[row.view]


def _legend(maps: ScoreMaps) -> str:
    """What the outlines are, for the line above the panels."""
    if maps.identity is None or maps.anchor.object_id <= 0:
        return ""
    return " · outlined: the anchor's object" + (", dashed: the nearest other of its class" if maps.neighbour > 0 else "")


def _write_line(figure: Figure, text: str) -> None:
    """The line above all panels, in the letters that fit."""
    width, height = figure.get_size_inches()
    fits = int((width - 2 * GAP) / 0.062)
    text = text if len(text) <= fits else text[: fits - 1] + "…"
    figure.text(GAP / width, 1 - 0.06 / height, text, ha="left", va="top", fontsize=8, color="#444444")


def _draw_bar(figure: Figure, name: str) -> None:
    """The colour bar at the right."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((1 - (BAR - GAP) / width, GAP / height, 0.14 / width, 1 - (2 * GAP + TITLE) / height))
    axes.imshow(np.linspace(1, 0, 256)[:, None], vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=(0, 1, 0, 1))
    axes.set_xticks([]), axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.yaxis.tick_right(), axes.yaxis.set_label_position("right")
    axes.tick_params(length=2, width=0.6)
    size = 9 if len(name) * 0.07 < height - TITLE else 6.5
    axes.set_ylabel(name, labelpad=2, fontsize=size)


def _draw_view(axes: Axes, maps: ScoreMaps, view: str) -> None:
    """The image, or its true objects, with the anchor."""
    extent = (0, maps.image.shape[2], maps.image.shape[1], 0)
    if view == "image":
        axes.imshow(maps.image.permute(1, 2, 0).numpy(), extent=extent)
    else:
        axes.imshow(color_identities(maps.identity), extent=extent, interpolation="nearest")
    axes.set_title({"image": "image", "objects": "true objects"}[view], pad=3)
    _mark(axes, maps, outlines=view == "image")


def _draw_map(axes: Axes, maps: ScoreMaps, row: MapRow, layer: int, titled: bool = True) -> AxesImage:
    """The map of a layer, with the anchor, the outlines and its AUROC."""
    axes.set_facecolor(MISSING)
    extent = (0, maps.image.shape[2], maps.image.shape[1], 0)
    picture = axes.imshow(shown_map(row, layer), vmin=0, vmax=1, cmap="viridis", extent=extent, interpolation="nearest")
    axes.set_title(layer_name(row.layers[layer]) if titled else "", pad=3)
    below = "no block reads it" if bool(row.maps[layer].isnan().all()) else _auroc_text(row.auroc[layer])
    axes.text(0.5, -0.02, below, transform=axes.transAxes, ha="center", va="top", fontsize=7.5, color="#444444")
    _mark(axes, maps)
    return picture


def _auroc_text(value: float | None) -> str:
    return "" if value is None else f"AUROC {value:.2f}".replace(" 0.", " .")


def layer_name(layer: int | str) -> str:
    """A layer as a title."""
    return "embed" if layer == "embed" else f"layer {layer}"


def shown_map(row: MapRow, layer: int) -> np.ndarray:
    """The map of a layer as it is coloured, [H, W] from 0 to 1: attention as a share of its largest weight."""
    values = row.maps[layer].numpy()
    highest = np.nan_to_num(values).max() if row.view == "attention" else 1.0
    return values / highest if highest > 0 else values


def _mark(axes: Axes, maps: ScoreMaps, outlines: bool = True) -> None:
    """The anchor's box; the outline of its object, solid, and of the nearest object of its class, dashed."""
    _, height, width = maps.image.shape
    axes.set_xticks([]), axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if outlines and maps.identity is not None:
        for number, style in ((maps.anchor.object_id, "solid"), (maps.neighbour, "dashed")):
            if number > 0:
                _outline(axes, maps.identity == number, style)
    _draw_box(axes, maps.anchor, width)
    axes.set_xlim(0, width), axes.set_ylim(height, 0)


def _outline(axes: Axes, mask: Tensor, style: str) -> None:
    inside = np.pad(mask.numpy(), 1)  # so that an outline closes at the border
    y, x = (np.arange(n + 2) - 0.5 for n in mask.shape)
    line = axes.contour(x, y, inside, levels=[0.5], colors="white", linewidths=1.2, linestyles=style)
    line.set_path_effects([withStroke(linewidth=2.2, foreground="black")])


def _draw_box(axes: Axes, anchor: Anchor, width: int) -> None:
    if anchor.box is None:
        return
    top, left, bottom, right = anchor.box
    points = 72 * axes.get_position().width * axes.figure.get_figwidth() * (right - left) / width  # of the box on paper
    thick = min(max(0.2 * points, 0.7), 1.6)
    style = "dotted" if anchor.kind == "object" else "solid"  # of an object the box is where it was named, not what is asked
    box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=RED, lw=thick, ls=style)
    box.set_path_effects([withStroke(linewidth=thick + 1, foreground="white")])
    axes.add_patch(box)


def color_identities(identity: Tensor) -> np.ndarray:
    """A picture [H, W, 3] float of an identity map: background and ignored light grey, neighbours parted by white lines."""
    identity = identity.clamp(min=0)
    ids, place = identity.unique(return_inverse=True)  # neighbours in number get unlike colours, whatever the ids are
    colors = np.resize(np.stack(PALETTE), (len(ids), 3))
    colors = np.concatenate([np.full((1, 3), 0.93), colors]) if int(ids[0]) == 0 else colors
    picture = colors[place.numpy()]
    edge = np.zeros(identity.shape, bool)
    edge[1:] |= (identity[1:] != identity[:-1]).numpy()
    edge[:, 1:] |= (identity[:, 1:] != identity[:, :-1]).numpy()
    picture[edge] = 1.0
    return picture


def draw_sheet(several: Sequence[ScoreMaps], about: str = "", most: int = 5) -> Figure:
    """Several images or anchors, a row each: image, true objects, and the first row of maps at some layers.

    Args:
        most: layers that are shown; more than that are thinned evenly, the last one always among them.
    """
    layers = several[0].rows[0].layers
    most = min(most, len(layers))
    shown = sorted({round(i * (len(layers) - 1) / max(most - 1, 1)) for i in range(most)})
    n_columns = len(shown) + 2
    w = min(1.5, (WIDTH - BAR - GAP) / n_columns - GAP)
    heights = [w * maps.image.shape[1] / maps.image.shape[2] + TITLE + FOOT + GAP for maps in several]
    width, height = GAP + n_columns * (w + GAP) + BAR, HEAD + sum(heights)
    with matplotlib.rc_context(STYLE):
        figure, top = Figure(figsize=(width, height)), height - HEAD
        _write_line(figure, about + max((_legend(maps) for maps in several), key=len))
        for maps, taken in zip(several, heights, strict=True):
            top -= taken
            for column in range(n_columns):
                x, h = GAP + column * (w + GAP), taken - TITLE - FOOT - GAP
                axes = figure.add_axes((x / width, (top + FOOT + GAP) / height, w / width, h / height))
                if column > 1:
                    _draw_map(axes, maps, maps.rows[0], shown[column - 2])
                elif column == 0 or maps.identity is not None:
                    _draw_view(axes, maps, "objects" if column else "image")
                else:
                    axes.set_axis_off()
                if column == 0:
                    axes.text(0, -0.02, maps.key, transform=axes.transAxes, ha="left", va="top", fontsize=6.5, color="#444444")
        _draw_bar(figure, several[0].rows[0].name)
    return figure


# --------------------------------------------------------------------------------------------------------------- GIF


class Frames(NamedTuple):
    """A figure whose maps change from frame to frame: (axes, row, picture) of each."""

    figure: Figure
    panels: list[tuple[Axes, MapRow, AxesImage]]


def draw_frames(maps: ScoreMaps, about: str = "") -> Frames:
    """The figure of the GIF at its first layer: image, true objects, and a map per row; what stands still is drawn once."""
    first = ["image"] if maps.identity is None else ["image", "objects"]
    shape, n_panels, foot = maps.image.shape[1] / maps.image.shape[2], len(first) + len(maps.rows), _foot(maps)
    n_columns = 1 if shape < 0.55 else n_panels  # one above the other if wide
    w = 4.0 if n_columns == 1 else min(2.4, 3.6 / shape)
    with matplotlib.rc_context(STYLE):
        sheet = _sheet(w, shape, n_columns, math.ceil(n_panels / n_columns), 1, 0, foot)
        _write_line(sheet.figure, about + _legend(maps))
        panels = []
        for number in range(n_panels):
            axes = sheet.panel(*divmod(number, n_columns))
            if number < len(first):
                _draw_view(axes, maps, first[number])
            else:
                row = maps.rows[number - len(first)]
                panels.append((axes, row, _draw_map(axes, maps, row, 0)))
        _draw_bar(sheet.figure, " · ".join(dict.fromkeys(row.name for row in maps.rows)))
    frames = Frames(sheet.figure, panels)
    show_frame(frames, 0)
    return frames


def show_frame(frames: Frames, layer: int) -> None:
    """Put the maps of another layer into the figure."""
    for axes, row, picture in frames.panels:
        at = min(layer, len(row.layers) - 1)
        picture.set_data(shown_map(row, at))
        name = "" if len(frames.panels) == 1 else f", {VIEW_NAMES[row.view]}"
        axes.set_title(layer_name(row.layers[at]) + name, pad=3)
        below = "no block reads it" if bool(row.maps[at].isnan().all()) else _auroc_text(row.auroc[at])
        axes.texts[0].set_text(below)


def gif_bytes(maps: ScoreMaps, about: str = "") -> bytes:
    """The GIF: a frame per layer, the last one longer.

    All frames share one palette that holds the colour scale, the anchor's colour, black, white and the objects' colours as
    they are; what is left of 256 goes to the image. Every pixel takes the nearest of these.
    """
    with matplotlib.rc_context(STYLE):
        frames, pictures = draw_frames(maps, about), []
        for layer in range(max(len(row.layers) for row in maps.rows)):
            show_frame(frames, layer)
            pictures.append(np.asarray(figure_pixels(frames.figure, GIF_DPI)))
    fixed = [np.array([matplotlib.colors.to_rgb(c) for c in (RED, "white", "black", MISSING)])]
    if maps.identity is not None:
        fixed.append(np.unique(color_identities(maps.identity).reshape(-1, 3), axis=0)[:100])
    fixed = np.concatenate([scale_colors(SCALE_COLORS), (np.concatenate(fixed) * 255).round().astype(np.uint8)])
    image = Image.fromarray(maps.image.permute(1, 2, 0).numpy()).quantize(256 - len(fixed))
    rest = np.array(image.getpalette(), np.uint8).reshape(-1, 3)[: 256 - len(fixed)]
    palette = np.concatenate([fixed, rest])
    indexed = nearest_colors(np.stack(pictures), palette)
    found = [Image.fromarray(frame, "P") for frame in indexed]
    for frame in found:
        frame.putpalette(palette.ravel().tolist())
    data, times = io.BytesIO(), [FRAME_MS] * (len(found) - 1) + [LAST_MS]
    found[0].save(data, "gif", save_all=True, append_images=found[1:], duration=times, loop=0, optimize=False)
    return data.getvalue()


def nearest_colors(pictures: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index [..., H, W] uint8 of the nearest colour of a palette [n, 3] for every pixel [..., H, W, 3] uint8."""
    code = pictures.astype(np.int64) @ np.array([65536, 256, 1])
    codes, place = np.unique(code, return_inverse=True)
    colors = np.stack([codes >> 16, (codes >> 8) & 255, codes & 255], -1).astype(np.float32)
    table = palette.astype(np.float32)
    nearest = [
        (np.square(part).sum(1)[:, None] - 2 * part @ table.T + np.square(table).sum(1)).argmin(1)
        for part in np.array_split(colors, max(1, len(colors) // 20000))
    ]
    return np.concatenate(nearest).astype(np.uint8)[place.reshape(code.shape)]
