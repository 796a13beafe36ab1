"""One style for every figure: colours, fonts, and how a figure becomes pixels."""

import io
import textwrap
from collections.abc import Iterable

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from PIL import Image

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6}
DPI = 160
# Okabe and Ito's colours, which every reader can distinguish; lines also differ in their dashes.
BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#777777",
)  # fmt: skip
PURPLE, BROWN = "#5D3A9B", "#8C564B"  # two more, darker than all of these


def layer_places(layers: Iterable[int | str]) -> dict[int | str, int]:
    """Where layers stand on an axis of depth: `embed` at 0, the output of block i at i + 1; others in their order."""
    named = list(dict.fromkeys(layers))
    if all(layer == "embed" or isinstance(layer, int) for layer in named):
        return {layer: 0 if layer == "embed" else int(layer) + 1 for layer in named}
    return {layer: i for i, layer in enumerate(named)}


def note_below(figure: Figure, text: str) -> None:
    """Small grey lines below a figure, broken to its width: what it shows, and what to doubt."""
    if text:
        width = int(20 * figure.get_figwidth())  # about 20 characters of this size fit on an inch
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, width)]
        figure.supxlabel("\n".join(lines), fontsize=6.5, color="0.45", x=0.01, ha="left")

FALLING = "v"  # marker of a fit that was still falling when it ended


def scale_colors(n: int) -> np.ndarray:
    """The colour scale of every map, viridis, in n steps: [n, 3] uint8."""
    return (matplotlib.colormaps["viridis"](np.linspace(0, 1, n))[:, :3] * 255).round().astype(np.uint8)


def figure_pixels(figure: Figure, dpi: int) -> Image.Image:
    """A drawn figure as an RGB picture."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def pdf_bytes(figure: Figure) -> bytes:
    """A drawn figure as a PDF of vectors, for print; equal figures give equal bytes."""
    data = io.BytesIO()
    FigureCanvasPdf(figure).print_pdf(data, metadata={"CreationDate": None})
    return data.getvalue()


def png_bytes(figure: Figure) -> bytes:
    """A drawn figure as the bytes of a PNG file."""
    data = io.BytesIO()
    figure_pixels(figure, DPI).save(data, "png", optimize=True)
    return data.getvalue()
