"""Figures by what they plot, not by pixels; score maps of every image shape; files of mode=vis."""

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from toys import toy_config

from backbones.load import load_backbone
from datasets.scene import Scene
from errors import UserError
from pairs.layer_curve import LINES, _apart, draw_layer_curve, write_layer_curve
from pairs.losses import agreement
from pairs.score_maps import ScoreMaps, _gif, color_identities, draw_layer_frame, draw_score_maps, score_maps
from pairs.score_maps import run as run_vis
from patches.anchor import anchor_at, default_anchor, patch_box
from patches.geometry import plan_geometry
from patches.labels import patch_labels
from patches.selection import owned_patches
from patches.windows import cut_windows
from probes import build_probe
from show.style import figure_pixels
from store.index import build_dataset

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
                common = {**KEYS, "block": block, "metric": metric, "low": value - 0.02, "high": value + 0.01}
                rows.append({**common, "name": "probe", "layer": layer, "layer_index": index, "value": value})
                rows.append({**common, "name": "random", "layer": layer, "layer_index": index, "value": 0.58})
            common = {**KEYS, "block": block, "metric": metric, "layer_index": 0, "low": 0.61, "high": 0.65}
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
        assert lines["probe"] == ([0, 1, 2, 3], [0.6, 0.65, 0.7, 0.75])
        assert lines["random"] == ([0, 1, 2, 3], [0.58] * 4)
        assert lines["position"] == ([0, 3], [0.63, 0.63])  # one layer of its own: a level line
        assert "pixels" not in lines  # undefined
        assert lines["base"][1] == ([0.5, 0.5] if column[3] == "auroc" else [0.6, 0.6])  # chance or majority
        assert [t.get_text() for t in axes.get_xticklabels()] == ["embed", "0", "1", "5"]
        ribbons = [np.asarray(c.get_paths()[0].vertices) for c in axes.collections]
        assert any(np.isclose(r, [0, 0.58]).all(1).any() and np.isclose(r, [3, 0.76]).all(1).any() for r in ribbons)
        assert {t.get_text() for t in axes.texts} == {
            "probe", "random weights", "position only", "chance" if column[3] == "auroc" else "majority",
        }  # fmt: skip


def test_the_curve_without_columns_has_a_panel_per_auroc():
    bare = [{k: v for k, v in row.items() if k not in KEYS} for row in curve_rows()]
    titles = [axes.get_title(loc="left") for axes in draw_layer_curve(bare).axes]
    assert titles == ["all AUROC", "foreground AUROC", "same class matched AUROC"]


def test_a_single_layer_is_a_point_with_its_interval_and_missing_blocks_say_so():
    rows = [row for row in curve_rows() if row["layer"] in (5, "position") and row["block"] == "all"]
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
    _gif([draw_layer_frame(painted((32, 32), 1), 0)])
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


def scene_of(shape: tuple[int, int]) -> Scene:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8)
    identity = torch.zeros(shape, dtype=torch.int32)
    identity[shape[0] // 4 : shape[0] // 2, shape[1] // 3 : shape[1]] = 2
    identity[shape[0] // 2 :, : shape[1] // 2] = 5
    return Scene(image, {"identity": identity, "class": (identity > 0).int()}, f"toy {shape}")


def stack(mode: str, layers: list, dim: int, seeds: int = 2, variants: int = 2, **given):
    probe = build_probe({"mode": mode}, seeds=list(range(seeds)) * variants, layers=layers, dim=dim, **given)
    return probe.eval()


def config(tmp_path: Path, *overrides: str):
    return toy_config(tmp_path, *overrides)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_own_score_of_the_anchor_is_the_value_of_the_map_in_its_box(shape, tmp_path):
    # On raw pixels the dot product of a bright patch with itself is by far the highest: the map must peak in the box.
    cfg = config(tmp_path, "model.source=pixels", "model.layers=[embed]")
    scene = scene_of(shape)
    geometry = geometry_of(shape)
    scene.image[:] = 128
    anchor = owned_patches(geometry).nonzero()[-2].tolist()
    top, left, bottom, right = (round(v) for v in patch_box(anchor, geometry, shape))
    scene.image[:, top:bottom, left:right] = 255
    probe = stack("dot_product", ["embed"], 192, variants=2)
    with torch.no_grad():
        probe.bias.fill_(-60.0)
    pixel = [(top + bottom) // 2, (left + right) // 2]
    maps = score_maps(cfg, [probe], scene, pixel)
    assert maps.anchor == tuple(anchor)
    assert maps.maps.shape == (1, *shape) and maps.patch_scores.shape == (1, len(geometry.starts), *geometry.grid)
    own = float(maps.patch_scores[0][maps.anchor])
    assert own > 0.9 and own == float(maps.patch_scores.max())
    y, x = divmod(int(maps.maps[0].argmax()), shape[1])
    assert top <= y < bottom and left <= x < right
    assert float(maps.maps[0][pixel[0], pixel[1]]) == pytest.approx(own, abs=0.15)
    outside = maps.maps[0].clone()
    outside[max(top - 8, 0) : bottom + 8, max(left - 8, 0) : right + 8] = 0
    assert float(outside.max()) < 0.05


def test_scores_equal_one_pair_at_a_time_across_windows_seeds_and_cuts(tmp_path):
    cfg = config(tmp_path, "model.norm=true")
    scene = scene_of((32, 80))
    cuts = [stack("quadratic", ["embed", 0], 16), stack("quadratic", [1], 16)]
    maps = score_maps(cfg, cuts, scene, None)
    geometry = geometry_of((32, 80))
    assert maps.layers == ["embed", 0, 1] and len(geometry.starts) > 1
    backbone = load_backbone(cfg.model, torch.device("cpu"))
    facts = backbone.facts
    windows = cut_windows(
        scene.image, geometry, mean=facts.mean, std=facts.std, interpolation=facts.interpolation, antialias=True
    )
    tokens = [t.patch for t in backbone(windows, ["embed", 0, 1])]
    window, row, column = maps.anchor
    for index, (cut, layer) in enumerate([(0, 0), (0, 1), (1, 0)]):
        probe, x = cuts[cut], tokens[index].view(len(windows), 4, 4, 16)
        for w in range(len(windows)):
            for r, c in [(0, 0), (2, 3)]:
                total = 0.0
                for seed in (0, 1):  # the first two of four entries were fitted on all pairs
                    form = (probe.weight + probe.weight.mT)[seed, layer] / (2 * 16**0.5)
                    logit = x[window, row, column] @ form @ x[w, r, c] + probe.bias[seed, layer]
                    total += float(torch.sigmoid(logit.detach())) / 2
                assert float(maps.patch_scores[index, w, r, c]) == pytest.approx(total, abs=1e-5)


def test_a_pointwise_probe_scores_pairs_by_the_inner_product_of_its_distributions(tmp_path):
    cfg = config(tmp_path)
    probe = stack("class_linear", [1], 16, variants=1, n_classes=5)
    maps = score_maps(cfg, [probe], scene_of((32, 32)), [1, 1])
    backbone = load_backbone(cfg.model, torch.device("cpu"))
    facts, image = backbone.facts, scene_of((32, 32)).image
    pixels = cut_windows(
        image, geometry_of((32, 32)), mean=facts.mean, std=facts.std, interpolation=facts.interpolation, antialias=True
    )
    with torch.no_grad():
        share = probe(backbone(pixels, [1])[0].patch[None]).softmax(-1)[:, 0, 0]  # [S, N, K]
    expected = torch.stack([agreement(s.log(), "inner")[0] for s in share]).mean(0)
    torch.testing.assert_close(maps.patch_scores[0, 0].flatten(), expected)
    assert maps.object_id == 0 and maps.anchor == (0, 0, 0)


def test_scenes_that_cannot_be_shown_are_named(tmp_path):
    cfg, probe = config(tmp_path), stack("dot_product", [1], 16)
    codes = Scene(torch.zeros(3, 32, 32, dtype=torch.uint8), {"object_code": torch.zeros(4)}, "codes-7")
    with pytest.raises(UserError, match="codes-7 has no identity map"):
        score_maps(cfg, [probe], codes, None)
    cfg.protocol = OmegaConf.load(ROOT / "cfgs/protocol/object_binding_2025.yaml").protocol
    cfg.model.kwargs.patch_size, cfg.model.image_size = 14, 518
    with pytest.raises(UserError, match="object_binding_2025 leaves out toy"):
        score_maps(cfg, [probe], scene_of((512, 512)), None)


# -------------------------------------------------------------------------------------------------- figures and files


def painted(shape: tuple[int, int], n_layers: int, object_id: int = 5) -> ScoreMaps:
    scene = scene_of(shape)
    geometry = geometry_of(shape)
    layers = ["embed", *range(n_layers - 1)]
    maps = torch.linspace(0, 1, n_layers)[:, None, None].expand(-1, *shape)
    anchor = anchor_at([shape[0] - 1, 0], geometry, shape)
    scores = torch.rand(n_layers, len(geometry.starts), *geometry.grid)
    box = patch_box(anchor, geometry, shape)
    return ScoreMaps(scene.key, scene.image, scene.labels["identity"], layers, scores, maps, anchor, box, object_id)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_layers", [1, 9, 25])
def test_the_strip_shows_image_objects_and_every_layer_on_one_scale(shape, n_layers):
    maps = painted(shape, n_layers)
    figure = draw_score_maps(maps)
    *panels, bar = figure.axes
    titles = [axes.get_title() for axes in panels]
    assert titles == ["image", "true objects", "embed", *(f"layer {i}" for i in range(n_layers - 1))]
    assert bar.get_ylabel() == "P(same object)"
    for index, axes in enumerate(panels):
        shown = axes.images[0]
        assert shown.get_extent() == [0, shape[1], shape[0], 0]
        if index > 1:
            assert shown.get_clim() == (0, 1)
            assert np.array_equal(np.asarray(shown.get_array()), maps.maps[index - 2].numpy())
        box = axes.patches[0]
        top, left, bottom, right = maps.box
        assert box.get_bbox().extents.tolist() == pytest.approx([left, top, right, bottom])
        place = axes.get_position()
        assert place.width * figure.get_figwidth() / (place.height * figure.get_figheight()) == pytest.approx(
            shape[1] / shape[0], rel=1e-6
        )
        assert 0 <= place.x0 < place.x1 <= bar.get_position().x0 and 0 <= place.y0 < place.y1 <= 1
    assert figure.get_figwidth() <= 10 and figure.get_figheight() <= 5.6 + 1e-9


def test_the_outline_follows_the_anchors_object_and_background_has_none():
    axes = draw_score_maps(painted((40, 56), 1)).axes[2]
    vertices = np.concatenate([p.vertices for p in axes.collections[0].get_paths()])
    assert vertices[:, 0].min() == pytest.approx(0, abs=0.5) and vertices[:, 0].max() == pytest.approx(28, abs=0.5)
    assert vertices[:, 1].min() == pytest.approx(20, abs=0.5) and vertices[:, 1].max() == pytest.approx(40, abs=0.5)
    assert not draw_score_maps(painted((40, 56), 1, object_id=0)).axes[2].collections


def test_objects_have_colours_of_their_own_and_background_is_grey():
    identity = torch.arange(20).repeat_interleave(3)[None].repeat(4, 1) * 100
    colors = color_identities(identity)
    inside = colors[2, 1::3]
    assert len(np.unique(inside.round(6), axis=0)) == 20
    assert inside[0].tolist() == [0.93] * 3
    assert (color_identities(torch.full((2, 2), 4))[0, 0] != [0.93] * 3).any()
    partly = color_identities(torch.tensor([[-1, -1, 0, 0, 0, 7, 7]]))  # ignored pixels are no object either
    assert partly[0, 1].tolist() == partly[0, 3].tolist() == [0.93] * 3 != partly[0, 6].tolist()


class FakeRun:
    def __init__(self, directory: Path, source: Path):
        self.dir, self.source, self.said = directory, source, []
        directory.mkdir(parents=True)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def finished(tmp_path: Path) -> SimpleNamespace:
    """A finished training run as the trainer leaves it, in two cuts."""
    cfg = config(tmp_path, "dataset.n=3", "dataset.widths=[32,80]")
    cfg.output_dir = str(tmp_path / "outputs")
    cfg.update(mode="train", probe={"mode": "quadratic"}, trainer={"n_boot": 10})
    directory = tmp_path / "outputs/train/toy-1"
    (directory / "checkpoints/probe").mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (directory / "run.json").write_text(json.dumps({"status": "finished"}))
    stack("quadratic", ["embed", 0], 16).save(directory / "checkpoints/probe/best.00.safetensors")
    stack("quadratic", [1], 16).save(directory / "checkpoints/probe/best.01.safetensors")
    cfg.vis = {"split": "test", "image": 1, "pixel": None, "gif": True, "out": None}
    return SimpleNamespace(cfg=cfg, directory=directory)


def test_mode_vis_writes_strip_gif_numbers_and_facts_with_fixed_names(finished, tmp_path):
    first, second = (FakeRun(tmp_path / name, finished.directory) for name in ("vis1", "vis2"))
    result = run_vis(finished.cfg, first)
    run_vis(finished.cfg, second)
    names = sorted(path.name for path in first.dir.iterdir())
    assert [Path(name).suffix for name in names] == [".gif", ".json", ".png", ".safetensors"]
    assert len({Path(name).stem for name in names}) == 1 and names[0].startswith("test-001_w")
    for name in names:
        assert (first.dir / name).read_bytes() == (second.dir / name).read_bytes()
    told = json.loads((first.dir / names[1]).read_text())
    numbers = load_file(first.dir / names[3])
    assert told["layers"] == ["embed", 0, 1] and told["image_hw"] == [32, 80]
    at = tuple(told["anchor"][k] for k in ("window", "row", "column"))
    assert [float(s[at]) for s in numbers["patch_scores"]] == told["own_score"] == result["own_score"]
    assert numbers["maps"].shape == (3, 32, 80)
    scene = build_dataset(finished.cfg, "test")[1]
    assert torch.equal(numbers["identity"], scene.labels["identity"])
    with Image.open(first.dir / names[0]) as gif:
        assert gif.n_frames == 3 and gif.info["duration"] == 500 and gif.info["loop"] == 0


def test_mode_vis_takes_a_named_run_an_anchor_and_a_folder(finished, tmp_path):
    finished.cfg.vis.update(pixel=[17, 60], gif=False, out=str(tmp_path / "here"))
    run = FakeRun(tmp_path / "vis", finished.directory)
    run_vis(finished.cfg, run)
    files = list((tmp_path / "here").iterdir())
    assert len(files) == 3 and not list(run.dir.iterdir())
    told = json.loads(next(p for p in files if p.suffix == ".json").read_text())
    top, left, bottom, right = told["box"]
    assert top <= 17 < bottom and left <= 60 < right
    assert sorted(run.said) == sorted(str(p) for p in files)


def test_mode_vis_names_what_is_missing(finished, tmp_path):
    run = FakeRun(tmp_path / "vis", finished.directory)
    finished.cfg.vis.image = 3
    with pytest.raises(UserError, match=r"vis.image=3, expected 0 … 2"):
        run_vis(finished.cfg, run)
    finished.cfg.update(device="nonsense")
    finished.cfg.vis.update(image=0)
    with pytest.raises(UserError, match=r"device=nonsense is unknown, expected auto"):
        run_vis(finished.cfg, run)
    finished.cfg.update(device="cpu")
    for file in (finished.directory / "checkpoints/probe").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="holds no best checkpoint of probe"):
        run_vis(finished.cfg, run)


def test_a_colour_of_the_gif_means_the_same_in_every_frame():
    figures = [draw_layer_frame(painted((40, 56), 3), index) for index in range(3)]
    with Image.open(io.BytesIO(_gif(figures))) as gif:
        for index, figure in enumerate(figures):
            gif.seek(index)
            true, seen = (np.asarray(p.convert("RGB")).astype(int) for p in (figure_pixels(figure, 110), gif))
            place = figure.axes[2].get_window_extent()
            middle = (slice(int(true.shape[0] - place.y1) + 9, int(true.shape[0] - place.y1) + 30), int(place.x1) - 20)
            assert np.abs(true - seen)[middle].max() < 6  # the map
            bar = int(figure.axes[3].get_window_extent().x0) + 4
            assert np.abs(true - seen)[30:-12, bar].max() < 8


def test_a_frame_stands_upright_or_lies_as_the_image_does():
    wide = draw_layer_frame(painted((32, 128), 2), 1)
    tall = draw_layer_frame(painted((128, 32), 2), 0)
    assert [axes.get_title() for axes in wide.axes[:3]] == ["image", "true objects", "layer 0"]
    assert wide.axes[0].get_position().y0 > wide.axes[2].get_position().y1  # one above the other
    assert tall.axes[0].get_position().x1 < tall.axes[2].get_position().x0  # side by side
