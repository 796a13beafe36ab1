"""Layer curves by what they plot, not by pixels; anchors in images of every shape."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from errors import UserError
from pairs.layer_curve import LINES, _apart, draw_layer_curve, write_layer_curve
from patches.anchor import anchor_at, default_anchor, patch_box
from patches.geometry import plan_geometry
from patches.labels import patch_labels
from patches.selection import owned_patches

ROOT = Path(__file__).parent.parent
SHAPES = [(32, 32), (32, 128), (128, 32), (40, 56), (97, 61)]  # square, 1:4, 4:1, odd
RULES = OmegaConf.load(ROOT / "cfgs/protocol/clean.yaml").protocol


# ------------------------------------------------------------------------------------------------------- layer curves

KEYS = {"question": "is_same_object", "readout": "logit"}
COLUMNS = [
    ("is_same_object", "logit", "all", "auroc", "all pairs"),
    ("is_same_object", "logit", "all", "accuracy", "all pairs, accuracy"),
    ("is_same_object", "logit", "foreground", "auroc", "pairs on objects"),
    ("is_same_object", "logit", "same_class_matched", "auroc", "same class, matched"),
]


def curve_rows() -> list[dict]:
    rows = []
    for block in ("all", "foreground", "same_class_matched"):
        for metric in ("auroc", "accuracy", "majority"):
            for index, layer in enumerate(["embed", 0, 1, 5]):
                value = 0.6 + 0.05 * index
                common = {**KEYS, "subset": block, "metric": metric, "low": value - 0.02, "high": value + 0.01}
                rows.append({**common, "name": "probe", "layer": layer, "layer_index": index, "value": value})
                rows.append({**common, "name": "random", "layer": layer, "layer_index": index, "value": 0.58})
            common = {**KEYS, "subset": block, "metric": metric, "layer_index": 0, "low": 0.61, "high": 0.65}
            rows.append({**common, "name": "position", "layer": "position", "value": 0.63})
            rows.append({**common, "name": "pixels", "layer": "embed", "value": math.nan})
    return rows


def lines_of(axes) -> dict[str, tuple[list, list]]:
    colors = {color: name for name, (_, color, _) in LINES.items()}
    return {
        colors.get(line.get_color(), "base"): (list(line.get_xdata()), [round(float(y), 4) for y in line.get_ydata()])
        for line in axes.lines
    }


def test_the_curve_plots_values_intervals_controls_and_base_rates():
    figure = draw_layer_curve(curve_rows(), COLUMNS)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [column[4] for column in COLUMNS]
    for axes, column in zip(figure.axes, COLUMNS, strict=True):
        lines = lines_of(axes)
        assert lines["probe"] == ([0, 1, 2, 6], [0.6, 0.65, 0.7, 0.75])  # at their true depth
        assert lines["random"] == ([0, 1, 2, 6], [0.58] * 4)
        assert lines["position"] == ([0, 6], [0.63, 0.63])  # one layer of its own: a level line
        assert "pixels" not in lines  # undefined
        assert lines["base"][1] == ([0.5, 0.5] if column[3] == "auroc" else [0.6, 0.6])  # chance or majority
        assert {t.get_text(): t.get_position()[0] for t in axes.get_xticklabels()} == {"embed": 0, "0": 1, "1": 2, "5": 6}
        ribbons = [np.asarray(c.get_paths()[0].vertices) for c in axes.collections]
        assert any(np.isclose(r, [0, 0.58]).all(1).any() and np.isclose(r, [6, 0.76]).all(1).any() for r in ribbons)
        assert {t.get_text() for t in axes.texts} == {
            "probe", "random weights", "position only", "chance" if column[3] == "auroc" else "majority",
        }  # fmt: skip


def test_noise_does_not_fill_the_panel_and_the_figure_says_what_it_shows():
    rows = [{**row, "low": 0.4, "high": 0.8} for row in curve_rows() if row["name"] == "probe"]
    figure = draw_layer_curve(rows, COLUMNS[:1], about="demo_vit · scenes · 300 images · 3 seeds")
    low, high = figure.axes[0].get_ylim()
    assert high - low >= 4 * 0.2  # half-widths
    assert figure.get_supxlabel() == "demo_vit · scenes · 300 images · 3 seeds"


def test_no_two_lines_look_alike():
    looks = [(color, dashes) for _, color, dashes in LINES.values()]
    assert len({color for color, _ in looks}) == len(looks)


def test_the_curve_without_columns_has_a_panel_per_auroc():
    bare = [{k: v for k, v in row.items() if k not in KEYS} for row in curve_rows()]
    titles = [axes.get_title(loc="left") for axes in draw_layer_curve(bare).axes]
    assert titles == ["all AUROC", "foreground AUROC", "same class matched AUROC"]


def test_a_single_layer_is_a_point_with_its_interval_and_missing_blocks_say_so():
    rows = [row for row in curve_rows() if row["layer"] in (5, "position") and row["subset"] == "all"]
    first, *_, last = draw_layer_curve(rows, COLUMNS).axes
    assert len(first.containers) == 1  # the error bar
    assert first.containers[0].lines[0].get_ydata().tolist() == [0.75]
    assert last.texts[0].get_text() == "undefined: no such pairs"


def test_labels_of_lines_keep_apart_and_in_order():
    values = [0.5, 0.501, 0.502, 0.9, 0.1]
    places = _apart(values, 0.05)
    assert sorted(range(5), key=lambda i: places[i]) == sorted(range(5), key=lambda i: values[i])
    ordered = sorted(places)
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) >= 0.05 - 1e-9
    assert places[3] == 0.9 and places[4] == 0.1


def test_writing_figures_needs_no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it, the way to a window system, now fails
    monkeypatch.delenv("DISPLAY", raising=False)
    write_layer_curve(curve_rows(), COLUMNS, tmp_path / "layers.png")
    with Image.open(tmp_path / "layers.png") as picture:
        assert picture.width > picture.height > 500
    assert [p.name for p in tmp_path.iterdir()] == ["layers.png"]


# --------------------------------------------------------------------------------------------------------- score maps


def geometry_of(shape: tuple[int, int]):
    return plan_geometry(shape, geometry=RULES.geometry, patch_size=8, image_size=(32, 32))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_of_every_patch_leads_to_the_patch(shape):
    geometry = geometry_of(shape)
    for anchor in owned_patches(geometry).nonzero().tolist():
        top, left, bottom, right = patch_box(anchor, geometry, shape)
        pixel = [int((top + bottom) / 2), int((left + right) / 2)]
        assert anchor_at(pixel, geometry, shape) == tuple(anchor)
        assert 0 <= top < bottom <= shape[0] and 0 <= left < right <= shape[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_pixel_lies_in_the_box_of_its_patch(shape):
    geometry = geometry_of(shape)
    for y in range(0, shape[0], 5):
        for x in range(0, shape[1], 5):
            top, left, bottom, right = patch_box(anchor_at([y, x], geometry, shape), geometry, shape)
            assert top <= y + 0.5 <= bottom and left <= x + 0.5 <= right


def test_a_padded_window_cuts_the_box_at_the_image():
    rules = OmegaConf.load(ROOT / "cfgs/protocol/object_binding_2025.yaml").protocol.geometry
    geometry = plan_geometry((512, 700), geometry=rules, patch_size=14, image_size=(518, 518))
    assert patch_box((0, 0, 0), geometry, (512, 700)) == (0, 0, 11, 11)
    assert anchor_at([10, 10], geometry, (512, 700)) == (0, 0, 0)
    assert anchor_at([11, 11], geometry, (512, 700)) == (0, 1, 1)


def test_the_default_anchor_is_the_purest_and_most_central_patch_of_the_largest_object():
    identity = torch.zeros(32, 32, dtype=torch.int32)
    identity[4:28, 4:28] = 7  # pure: rows and columns 1 and 2; mixed around them
    identity[0:4, :] = 3
    geometry = geometry_of((32, 32))
    labels = patch_labels(identity, geometry, labels=RULES.labels)
    anchor = default_anchor(identity, labels, geometry)
    assert anchor in {(0, 1, 1), (0, 1, 2), (0, 2, 1), (0, 2, 2)}
    assert float(labels.purity[anchor]) == 1.0
    with pytest.raises(UserError, match="belongs to an object"):
        default_anchor(identity * 0, patch_labels(identity * 0, geometry, labels=RULES.labels), geometry)


@pytest.mark.parametrize("pixel", [[-1, 0], [0, 32], [3], [99, 3]])
def test_an_anchor_outside_the_image_is_refused(pixel):
    with pytest.raises(UserError, match=r"vis.pixel=.*outside the image.*\[32, 32\]"):
        anchor_at(pixel, geometry_of((32, 32)), (32, 32))
