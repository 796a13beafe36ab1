import hashlib
import inspect
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from datasets.balanced_color_shape import IDLE, BalancedColorShape
from datasets.color_shape import COLORS, SHAPES, Board, ColorShape, draw_shape
from datasets.export import Exported, export
from datasets.procedural import Scenes
from datasets.scene import build
from datasets.splits import split_report
from errors import UserError
from store.index import build_dataset

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "binding"
SMALL = {"n_train": 8, "n_val": 3, "n_test": 3, "image_size": 96, "obj_size": 10, "max_objects": 6}
TINY = {  # a small balanced set: 3 of 4 colours, 3 of 4 shapes, 5 objects; 16 feature codes
    "n_colors": 4,
    "n_shapes": 4,
    "candidate_colors_per_sample": 3,
    "candidate_shapes_per_sample": 3,
    "num_objects": 5,
    "f_split_train_count": 10,
    "f_split_val_count": 3,
    "f_split_test_count": 3,
    "n_train": 12,
    "n_val": 5,
    "n_test": 6,
}


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def config(name: str, **knobs):
    return OmegaConf.merge(OmegaConf.load(ROOT / "cfgs" / "dataset" / f"{name}.yaml"), knobs)


# --------------------------------------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("case", golden("rendering")["single"][0]["objects"], ids=lambda c: c["shape"])
def test_shapes_are_the_published_pixels(case):
    picture = Image.new("RGB", (48, 48), "white")
    draw_shape(ImageDraw.Draw(picture), case["shape"], tuple(case["box"]), COLORS["blue"])
    pixels = np.asarray(picture)
    mask = (pixels != 255).any(-1)
    assert (pixels[mask] == COLORS["blue"]).all() and mask.sum() == case["pixels"]
    x0, y0, x1, y1 = case["bbox_inclusive"]
    rows = ["".join("#" if on else "." for on in row) for row in mask[y0 : y1 + 1, x0 : x1 + 1]]
    assert rows == case["mask_rows"]


@pytest.mark.parametrize(("shape", "pixels"), [("triangle", 278), ("pentagon", 507), ("hexagon", 552)])
def test_corners_are_the_published_ones_to_the_last_bit(shape, pixels):
    # Reference: corners at -pi/2 + 2 pi k / n in float64. Degrees turned into radians gave 297 and 560 for 3 and 6 corners.
    picture = Image.new("L", (48, 48))
    draw_shape(ImageDraw.Draw(picture), shape, (6, 9, 34, 37), 1)
    assert int(np.asarray(picture).sum()) == pixels
    n, reference = {"triangle": 3, "pentagon": 5, "hexagon": 6}[shape], Image.new("L", (48, 48))
    turns = [-math.pi / 2 + 2 * math.pi * k / n for k in range(n)]
    ImageDraw.Draw(reference).polygon([(20 + 14 * math.cos(t), 23 + 14 * math.sin(t)) for t in turns], fill=1)
    assert np.array_equal(np.asarray(picture), np.asarray(reference))


@pytest.mark.parametrize("case", golden("rendering")["scenes"])
def test_scenes_are_the_published_pixels(case):
    assert {name: list(rgb) for name, rgb in COLORS.items()} == golden("rendering")["colors_rgb"]
    board = Board(case["image_size"], case["obj_size"], case["margin"], 2000, True, (255, 255, 255))
    rng, low, high = random.Random(case["python_random_seed"]), case["margin"], case["image_size"] - 20
    boxes = board.place(len(case["Y_active"]), lambda: (rng.randint(low, high), rng.randint(low, high)), "scene")
    assert [list(box) for box in boxes] == case["boxes"]
    objects = [(list(COLORS)[k // 8], SHAPES[k % 8]) for k in case["Y_active"]]
    image = board.paint(objects, boxes)
    assert image.dtype == torch.uint8 and image.shape == (3, 256, 256)
    assert hashlib.sha256(image.permute(1, 2, 0).numpy().tobytes()).hexdigest() == case["sha256_rgb_hwc_uint8"]


# ---------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("case", golden("sampling")["cases"], ids=lambda c: c["class"])
def test_published_sampling_gives_the_published_scenes(case):
    cls = {"colorshape": ColorShape, "balanced": BalancedColorShape}[case["class"]]
    data = cls(case["split"], **case["config"], seed=case["seed"], n_train=case["n"], sampling="published")
    assert [np.flatnonzero(y).tolist() for y in data.object_code] == case["Y_active"]
    assert ["".join(map(str, f)) for f in data.feature_code] == case["F"]
    assert [[list(box) for box in data.boxes(i)] for i in range(case["n"])] == case["boxes"]
    assert np.allclose(data.entropy, case["H_float32"], atol=1e-5)
    assert data.attempts == case["num_sampling_attempts"]
    assert data.report()["rejections"] == case["num_sampling_rejections"]


@pytest.mark.parametrize("cls", [ColorShape, BalancedColorShape])
def test_items_keep_the_contract(cls):
    data = cls("val", n_val=6)
    image, labels, key = data[3]
    assert image.dtype == torch.uint8 and image.shape == (3, 256, 256)
    groups = data.groups
    assert labels["object_code"].shape == (groups.n_objects,) and labels["object_code"].dtype == torch.uint8
    assert labels["feature_code"].shape == (groups.n_features,) and labels["feature_code"].dtype == torch.uint8
    assert labels["H_Y_given_F"].shape == (1,) and labels["H_Y_given_F"].dtype == torch.float32
    assert torch.equal(
        torch.from_numpy(groups.feature_code(labels["object_code"].numpy())), labels["feature_code"]
    ) and torch.equal(data[-3].image, image)
    assert len({data[i].key for i in range(6)}) == 6 and key.startswith("val-0-")
    assert data.classes == groups.names and data.split == "val" and data.on_error == "raise"
    painted = {tuple(rgb) for rgb in image.permute(1, 2, 0).reshape(-1, 3).tolist()} - {(255, 255, 255)}
    assert painted == {COLORS[name] for name in groups.decode_features(labels["feature_code"])[0]}
    json.dumps([data.fingerprint(), data.info(), data.report(), data.details(0)])
    with pytest.raises(IndexError):
        data[6]


@pytest.mark.parametrize("cls", [ColorShape, BalancedColorShape])
def test_a_scene_depends_on_seed_split_and_index_alone(cls):
    data, longer = cls("train", n_train=5), cls("train", n_train=50)
    assert np.array_equal(data.object_code, longer.object_code[:5])
    assert torch.equal(data[4].image, longer[4].image) and data.boxes(2) == longer.boxes(2)
    other = cls("train", n_train=5, seed=1)
    assert not np.array_equal(data.object_code, other.object_code)
    assert data.fingerprint() != other.fingerprint() != longer.fingerprint()
    if cls is ColorShape:  # splits of the same feature codes are different scenes
        assert not np.array_equal(data.object_code, cls("val", n_val=5).object_code)


def test_boxes_lie_inside_and_apart():
    data = ColorShape("train", n_train=20)
    for i in range(20):
        boxes = data.boxes(i)
        assert len(boxes) == data.object_code[i].sum()
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            assert 4 <= x0 and x1 == x0 + 16 <= 252 and 4 <= y0 and y1 == y0 + 16 <= 252
            assert all(x1 <= a or c <= x0 or y1 <= b or d <= y0 for a, b, c, d in boxes[:k])
    corners = np.array([box[:2] for box in ColorShape("train", n_train=400, n_colors=1, n_shapes=1).boxes(0)])
    assert corners.shape[0] in (0, 1)


def test_positions_are_uniform():
    data = ColorShape("train", n_train=3000, n_colors=1, n_shapes=1, split_mode="independent")
    first = np.array([data.boxes(i)[0][:2] for i in range(3000) if data.object_code[i].any()])
    assert abs(len(first) / 3000 - 0.5) < 4 * math.sqrt(0.25 / 3000)  # the empty scene and the one object
    assert first.min() >= 4 and first.max() <= 236
    spread = 233 / math.sqrt(12) / math.sqrt(len(first))
    assert np.abs(first.mean(0) - 120).max() < 4 * spread and abs(np.corrcoef(first.T)[0, 1]) < 0.1


def test_hash_split_has_the_published_acceptance():
    for split, chance in (("train", 0.4556208860326977), ("test", 0.5443791139673023)):
        data = ColorShape(split, n_train=9000, n_test=9000)
        p = len(data) / data.attempts
        assert abs(p - chance) < 4 * math.sqrt(chance * (1 - chance) / data.attempts)
        info = data.info()
        assert info["H_Y"] == pytest.approx(info["H_F"] + info["E_H_Y_given_F"], abs=1e-9)
        assert info["H_Y_given_F"] == pytest.approx(info["E_H_Y_given_F"], abs=0.2)
        assert data.report()["support_mass"] == pytest.approx(chance, abs=1e-9)


def test_balanced_scenes_are_balanced():
    data = BalancedColorShape("train", n_train=20000)
    assert (data.object_code.sum(1) == 18).all() and (data.groups.counts(data.feature_code) == 6).all()
    assert np.allclose(data.entropy, 32.90786873057828, atol=1e-5)
    rejected = 1 - len(data) / data.attempts
    assert abs(rejected - 0.1120) < 4 * math.sqrt(0.112 * 0.888 / data.attempts) + 1e-4
    _, times = np.unique(data.feature_code, axis=0, return_counts=True)
    assert len(times) == 522
    chi2 = ((times - 20000 / 522) ** 2 / (20000 / 522)).sum()
    assert abs(chi2 - 521) < 4 * math.sqrt(2 * 521)
    info = data.info()
    assert info["H_Y"] == pytest.approx(41.935774727148164, abs=1e-9)
    assert info["H_Y_all_splits"] == pytest.approx(42.52257857469348, abs=1e-9)
    assert data.report()["support_mass"] == pytest.approx(522 / 784)


def test_balanced_splits_share_no_feature_code():
    parts = {split: BalancedColorShape(split, n_train=4000, n_val=900, n_test=900) for split in ("train", "val", "test")}
    report = split_report({
        split: {"object_code": d.object_code, "feature_code": d.feature_code, "H_Y_given_F": d.entropy}
        for split, d in parts.items()
    })  # fmt: skip
    assert all(share == {"F": 0.0, "Y": 0.0} for share in report["overlap"].values())
    assert report["warnings"] == []


def test_balanced_tiny_and_other_split_modes():
    data = BalancedColorShape("train", **TINY)
    assert data.entropy[0] == pytest.approx(6.491853096329675, abs=1e-5) and len(data.support) == 10
    hashed = TINY | {"split_mode": "f_disjoint_hash", "f_split_salt": "s"}
    codes = [len(BalancedColorShape(split, **hashed).support) for split in ("train", "test")]
    assert sum(codes) == 16 and min(codes) > 0
    full = TINY | {"num_objects": 9}
    assert BalancedColorShape("test", **full).object_code.sum(1).tolist() == [9] * 6
    with pytest.raises(UserError, match="object_sample_max_attempts"):
        six = {"candidate_colors_per_sample": 6, "candidate_shapes_per_sample": 6, "num_objects": 6, "max_objects": 6}
        BalancedColorShape("train", **six, object_sample_max_attempts=1, n_train=5)


def test_small_grids_of_the_sweep():
    for n_colors, n_shapes in ((1, 1), (1, 3), (2, 2)):
        data = ColorShape("train", n_colors=n_colors, n_shapes=n_shapes, n_train=40, split_mode="independent")
        assert data.prior_name == f"uniform<={n_colors * n_shapes}"
        assert data[0].image.shape == (3, 256, 256)


# ------------------------------------------------------------------------------------------------------------ export


def test_export_and_read_back(tmp_path):
    for cls, knobs in ((ColorShape, SMALL), (BalancedColorShape, TINY)):
        data = cls("train", **knobs)
        directory = export(data, tmp_path)
        assert directory == tmp_path / cls.name / "dataset_train_seed0"
        again = Exported("train", root=str(tmp_path / cls.name))
        assert len(again) == len(data) and again.classes == data.classes and again.info() == data.info()
        for one, two in zip(data, again, strict=True):
            assert torch.equal(one.image, two.image) and one.key == two.key
            assert all(torch.equal(one.labels[name], two.labels[name]) for name in one.labels)
        rows = [json.loads(line) for line in (directory / "image_metadata.jsonl").read_text().splitlines()]
        assert rows[2]["boxes"] == [list(box) for box in data.boxes(2)] and rows[2]["Y"] == data.object_code[2].tolist()
        assert rows[2]["num_objects"] == sum(rows[2]["Y"]) and rows[2]["index"] == 2
    assert rows[0]["selected_colors"] == data.groups.decode_features(data.feature_code[0])[0]


def test_export_writes_only_what_is_missing_and_refuses_another_data_set(tmp_path):
    data = ColorShape("val", **SMALL)
    directory = export(data, tmp_path)
    images = sorted((directory / "images").iterdir())
    assert [path.name for path in images] == ["sample_000000.png", "sample_000001.png", "sample_000002.png"]
    before = images[0].stat().st_mtime_ns
    old = images[1].read_bytes()
    images[1].unlink()
    fingerprint = Exported("val", root=str(tmp_path / "colorshape")).fingerprint()
    with pytest.raises(UserError, match=r"sample_000001\.png is missing"):
        Exported("val", root=str(tmp_path / "colorshape"))[1]
    export(data, tmp_path, workers=2)
    assert images[0].stat().st_mtime_ns == before and images[1].read_bytes() == old
    assert Exported("val", root=str(tmp_path / "colorshape")).fingerprint() != fingerprint
    with pytest.raises(UserError, match="other settings"):
        export(ColorShape("val", **SMALL | {"n_colors": 5}), tmp_path)


def test_export_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="got Scenes"):
        export(Scenes("train", n_train=2), tmp_path)
    with pytest.raises(UserError, match="mode=export_data"):
        Exported("train", root=str(tmp_path))
    directory = export(ColorShape("test", **SMALL), tmp_path)
    meta = json.loads((directory / "metadata.json").read_text())
    (directory / "metadata.json").write_text(json.dumps(meta | {"complete": False}))
    with pytest.raises(UserError, match="not complete"):
        Exported("test", root=str(directory.parent))
    (directory / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Exported("test", root=str(directory.parent))
    (directory / "metadata.json").write_text(json.dumps(meta))
    (directory / "codes.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="damaged"):
        Exported("test", root=str(directory.parent))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"export\.dir"):
        export(ColorShape("test", **SMALL), tmp_path / "file")


def test_export_mode(tmp_path, capsys):
    from datasets.export import run

    class Run:
        records = []
        say = staticmethod(print)
        write = staticmethod(records.append)

    cfg = OmegaConf.merge(
        OmegaConf.load(ROOT / "cfgs/mode/export_data.yaml"),
        {"dataset": config("colorshape", n_train=3, n_val=2, n_test=2), "export": {"dir": str(tmp_path)}},
    )
    run(cfg, Run)
    assert [record["n"] for record in Run.records] == [3, 2, 2]
    assert len(build(config("exported", root=f"{tmp_path}/colorshape"), "test")) == 2
    assert "test: 2 images" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- knobs


def test_config_files_state_the_defaults():
    for cls in (ColorShape, BalancedColorShape):
        assert build(config(cls.name), "val").fingerprint() == cls("val").fingerprint()
        knobs = set(inspect.signature(cls.__init__).parameters)
        if "others" in knobs:
            knobs |= set(inspect.signature(ColorShape.__init__).parameters) - IDLE
        assert set(config(cls.name)) - {"_target_"} == knobs - {"self", "split", "others"}


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"split": "dev"}, "train, val, test"),
        ({"n_colors": 9}, "dataset.n_colors: got 9, expected a whole number from 1 to 8"),
        ({"n_train": 0}, "dataset.n_train"),
        ({"n_train": 2.5}, "whole number"),
        ({"distribution_mode": "zipf"}, "expected uniform"),
        ({"split_mode": "hash"}, "dataset.split_mode"),
        ({"sampling": "fast"}, "sampling"),
        ({"f_split_val_buckets": [1]}, "one split"),
        ({"obj_size": 300}, "cannot be placed"),
        ({"obj_size": 64}, "at most 9 fit"),
        ({"background": [0, 0]}, "dataset.background"),
        ({"exclude_all_ones_f": True, "n_colors": 1, "n_shapes": 1, "f_split_test_buckets": [3]}, "no feature code is left"),
        ({"on_error": "ignore"}, "on_error"),
        ({"seed": -1}, "dataset.seed"),
    ],
)
def test_mistakes_are_named(knobs, word):
    if knobs.get("exclude_all_ones_f"):  # the empty scene alone is left, and lies in one bucket
        knobs = knobs | {"f_split_hash_mod": 2, "f_split_test_buckets": [0, 1]}
    with pytest.raises(UserError, match=word):
        ColorShape(**{"split": "train", "n_train": 5, **knobs})


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"max_objects": 17}, "dataset.max_objects: got 17, expected at least num_objects = 18"),
        ({"num_objects": 40, "max_objects": 40}, "expected 6 to 36"),
        ({"num_objects": 5}, "expected 6 to 36"),
        ({"candidate_colors_per_sample": 9}, "candidate_colors_per_sample"),
        ({"f_split_test_count": 130}, "sum to the 784"),
        ({"n_colors": 5.5}, "dataset.n_colors: got 5.5, expected a whole number"),
        ({"f_split_max_attempt_factor": 3}, "dataset.f_split_max_attempt_factor means nothing here"),
    ],
)
def test_balanced_mistakes_are_named(knobs, word):
    with pytest.raises(UserError, match=word):
        BalancedColorShape("train", n_train=3, **knobs)


def test_the_kind_of_an_inherited_knob_is_checked():
    cfg = OmegaConf.create({"dataset": config("balancedcolorshape", exclude_all_ones_f="maybe")})
    with pytest.raises(UserError, match="dataset.exclude_all_ones_f: got 'maybe', expected true or false"):
        build_dataset(cfg, "train")


def test_placement_that_fails_names_the_scene(tmp_path):
    jammed = ColorShape("train", n_train=20, image_size=128, obj_size=16, max_place_tries=3, split_mode="independent")
    with pytest.raises(UserError, match=r"train-0-\d+: object \d+ of \d+ .* no free place in 3 tries"):
        for _ in jammed:
            pass
    with pytest.raises(UserError, match=r"train-0-\d+: object \d+ of \d+ .* no free place in 3 tries"):
        export(jammed, tmp_path, workers=1)
    jammed.on_error = "skip"
    directory = export(jammed, tmp_path)
    meta = json.loads((directory / "metadata.json").read_text())
    assert 0 < len(meta["files"]) == 20 - len(meta["unreadable"]) < 20
    again = Exported("train", root=str(directory.parent))
    index = int(again.files[-1][7:13])
    assert again[-1].key == jammed.key(index) and np.array_equal(again.object_code[-1], jammed.object_code[index])
    free = ColorShape("train", n_train=3, image_size=40, non_overlapping=False, split_mode="independent")
    assert free[0].image.shape == (3, 40, 40)
