"""Figures of score maps by what they plot, not by pixels; the GIF by its colours."""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from looking import SHAPES, painted
from PIL import Image

from pairs.map_figures import color_identities, draw_frames, draw_score_maps, draw_sheet, gif_bytes, nearest_colors, show_frame
from show.style import RED, figure_pixels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_layers", [1, 9, 25])
def test_the_strip_shows_image_objects_and_every_layer_on_one_scale(shape, n_layers):
    maps = painted(shape, n_layers)
    figure = draw_score_maps(maps, "a line")
    *panels, bar = figure.axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["image", "true objects", "embed", *(f"layer {i}" for i in range(n_layers - 1))]
    line = "a line · outlined: the anchor's object, dashed: the nearest other of its class"
    assert bar.get_ylabel() == "P(same object)" and line.startswith(figure.texts[0].get_text().rstrip("…"))
    for index, axes in enumerate(panels):
        shown = axes.images[0]
        assert shown.get_extent() == [0, shape[1], shape[0], 0]
        if index > 1:
            assert shown.get_clim() == (0, 1)
            assert np.array_equal(np.asarray(shown.get_array()), maps.rows[0].maps[index - 2].numpy())
            assert axes.texts[0].get_text() == "AUROC .75"
        top, left, bottom, right = maps.anchor.box
        assert axes.patches[0].get_bbox().extents.tolist() == pytest.approx([left, top, right, bottom])
        place = axes.get_position()
        assert place.width * figure.get_figwidth() / (place.height * figure.get_figheight()) == pytest.approx(
            shape[1] / shape[0], rel=1e-6
        )
        assert 0 <= place.x0 < place.x1 <= bar.get_position().x0 and 0 <= place.y0 < place.y1 <= 1
    assert figure.get_figwidth() <= 10 + 1e-9 and figure.get_figheight() <= 5.6 + 1e-9
    covered = sum(axes.get_position().width * axes.get_position().height for axes in panels)
    assert covered > 0.2  # no half-empty sheet, not for tall images either


def test_rows_stand_under_each_other_and_a_layer_is_a_column():
    figure = draw_score_maps(painted((40, 56), 9, views=("probe", "cosine", "attention")))
    panels = figure.axes[2:-1]
    assert len(panels) == 27
    for layer in range(9):
        lefts = {round(panels[row * 9 + layer].get_position().x0, 9) for row in range(3)}
        assert len(lefts) == 1
    assert [panels[row * 9].texts[-1].get_text() for row in range(3)] == ["probe", "cosine", "attention"]
    tops = [panels[row * 9].get_position().y1 for row in range(3)]
    assert tops == sorted(tops, reverse=True)
    assert [p.get_title() for p in panels[9:18]] == [""] * 9  # named once
    boxes = [axes.get_position() for axes in figure.axes]
    apart = lambda a, b: min(a.x1, b.x1) <= max(a.x0, b.x0) + 1e-9 or min(a.y1, b.y1) <= max(a.y0, b.y0) + 1e-9
    assert all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_rows_of_several_runs_are_named_by_number_beside_their_panels():
    maps = painted((40, 56), 3, views=("probe", "cosine"))
    several = maps._replace(rows=[row._replace(run=name) for name in ("a long name of a run " * 4, "b") for row in maps.rows])
    figure = draw_score_maps(several)
    names = [figure.axes[2 + 3 * row].texts[-1] for row in range(4)]
    assert [name.get_text() for name in names] == ["run 1\nprobe", "run 1\ncosine", "run 2\nprobe", "run 2\ncosine"]
    figure.canvas.draw()
    first = figure.axes[1].get_window_extent()
    assert all(name.get_window_extent().x0 >= first.x1 for name in names)


def test_outlines_follow_the_anchors_object_and_its_neighbour():
    axes = draw_score_maps(painted((40, 56), 1)).axes[2]
    assert len(axes.collections) == 2
    own, neighbour = (np.concatenate([p.vertices for p in c.get_paths()]) for c in axes.collections)
    assert own[:, 0].min() == pytest.approx(0, abs=0.5) and own[:, 0].max() == pytest.approx(28, abs=0.5)
    assert own[:, 1].min() == pytest.approx(20, abs=0.5) and own[:, 1].max() == pytest.approx(40, abs=0.5)
    assert neighbour[:, 0].min() == pytest.approx(18, abs=0.5) and neighbour[:, 1].max() == pytest.approx(20, abs=0.5)
    assert not draw_score_maps(painted((40, 56), 1, object_id=0)).axes[2].collections


def test_a_photo_without_labels_has_no_panel_of_objects():
    maps = painted((40, 56), 3)._replace(identity=None)
    maps = maps._replace(rows=[maps.rows[0]._replace(auroc=[None] * 3)])
    assert [axes.get_title() for axes in draw_score_maps(maps).axes[:-1]] == ["image", "embed", "layer 0", "layer 1"]


def test_a_layer_without_numbers_says_so_and_attention_is_a_share_of_its_largest_weight():
    maps = painted((32, 32), 3, views=("attention",))
    values = maps.rows[0].maps.clone() * 0.01
    values[2] = torch.nan
    figure = draw_score_maps(maps._replace(rows=[maps.rows[0]._replace(maps=values)]))
    assert np.asarray(figure.axes[3].images[0].get_array()).max() == 1.0
    assert figure.axes[4].texts[0].get_text() == "no block reads it"


def test_a_sheet_has_a_row_per_anchor_and_the_last_layer():
    several = [painted((40, 56), 9), painted((97, 61), 9), painted((32, 32), 9)]
    *panels, _ = draw_sheet(several).axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["image", "true objects", "embed", "layer 1", "layer 3", "layer 5", "layer 7"] * 3
    assert [panels[i].texts[0].get_text() for i in (0, 7, 14)] == [maps.key for maps in several]


def test_objects_have_colours_of_their_own_and_background_is_grey():
    identity = torch.arange(20).repeat_interleave(3)[None].repeat(4, 1) * 100
    colors = color_identities(identity)
    inside = colors[2, 1::3]
    assert len(np.unique(inside.round(6), axis=0)) == 20
    assert inside[0].tolist() == [0.93] * 3
    assert (color_identities(torch.full((2, 2), 4))[0, 0] != [0.93] * 3).any()
    partly = color_identities(torch.tensor([[-1, -1, 0, 0, 0, 7, 7]]))  # ignored pixels are no object either
    assert partly[0, 0].tolist() == partly[0, 3].tolist() == [0.93] * 3


# ---------------------------------------------------------------------------------------------------------------- GIF


def test_the_gif_shows_the_figures_own_colours_and_lingers_on_the_last_layer():
    maps = painted((40, 56), 3)
    frames = draw_frames(maps)
    with Image.open(io.BytesIO(gif_bytes(maps))) as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        times = []
        for index in range(3):
            show_frame(frames, index)
            gif.seek(index)
            times.append(gif.info["duration"])
            true, seen = (np.asarray(p.convert("RGB")).astype(int) for p in (figure_pixels(frames.figure, 110), gif))
            place = frames.panels[0][0].get_window_extent()
            middle = (slice(int(true.shape[0] - place.y1) + 9, int(true.shape[0] - place.y1) + 30), int(place.x1) - 20)
            assert np.abs(true - seen)[middle].max() < 6  # the map
            anchor = (np.array(matplotlib.colors.to_rgb(RED)) * 255).round()
            marked = (true == anchor).all(-1)
            assert marked.sum() > 20 and (seen[marked] == anchor).all()
            objects = frames.figure.axes[1].get_window_extent()
            rows = slice(int(true.shape[0] - objects.y1), int(true.shape[0] - objects.y0))
            inside = (rows, slice(int(objects.x0), int(objects.x1)))
            assert np.abs(true - seen)[inside].mean() < 2  # the objects' colours are none of the scale's
    assert times == [500, 500, 1500]


def test_a_pixel_takes_the_nearest_colour():
    rng = np.random.default_rng(0)
    palette, picture = rng.integers(0, 256, (40, 3)).astype(np.uint8), rng.integers(0, 256, (2, 6, 7, 3)).astype(np.uint8)
    distance = np.square(picture[..., None, :].astype(int) - palette.astype(int)).sum(-1)
    chosen = nearest_colors(picture, palette)
    assert np.array_equal(np.take_along_axis(distance, chosen[..., None].astype(int), -1)[..., 0], distance.min(-1))


def test_a_frame_stands_upright_or_lies_as_the_image_does():
    wide, tall = (draw_frames(painted(shape, 2)).figure for shape in ((32, 128), (128, 32)))
    assert [axes.get_title() for axes in wide.axes[:3]] == ["image", "true objects", "embed"]
    assert wide.axes[0].get_position().y0 > wide.axes[2].get_position().y1  # one above the other
    assert tall.axes[0].get_position().x1 < tall.axes[2].get_position().x0  # side by side


def test_figures_need_no_display(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it, the way to a window system, now fails
    monkeypatch.delenv("DISPLAY", raising=False)
    assert gif_bytes(painted((32, 32), 1))[:3] == b"GIF"
