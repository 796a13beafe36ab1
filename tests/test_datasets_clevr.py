import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from datasets.clevr import VALUES, Clevr
from datasets.scene import UnreadableScene, build
from errors import UserError

ROOT = Path(__file__).parent.parent
CASE = json.loads((ROOT / "tests/golden/binding/clevr.json").read_text())["fixture"]
KNOBS = {"num_total": 8, "second_root_start": 4, "n_train": 4, "n_val": 1, "n_test": 2}


@pytest.fixture
def root(tmp_path):
    """The tree of the golden file: scenes 0-3 below clevr, 4-7 below clevr2."""
    for scene_id, objects in CASE["scenes"].items():
        folder = tmp_path / ("clevr2" if int(scene_id) >= 4 else "clevr")
        for name in ("scenes_6obj", "images_6obj"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        stem = f"CLEVR_6obj_{int(scene_id):06d}"
        (folder / "scenes_6obj" / f"{stem}.json").write_text(json.dumps({"objects": objects, "directions": {}}))
        Image.new("RGBA", (12, 8), (int(scene_id), 2, 3, 255)).save(folder / "images_6obj" / f"{stem}.png")
    return tmp_path / "clevr"


def scene_file(root, scene_id=2):
    return root / "scenes_6obj" / f"CLEVR_6obj_{scene_id:06d}.json"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_golden_codes(root, split):
    data, expected = Clevr(split, root=str(root) + "/", **KNOBS), CASE["splits"][split]
    assert data.ids == expected["image_ids"] and len(data) == len(expected["image_ids"])
    assert [np.flatnonzero(y).tolist() for y in data.object_code] == expected["Y_active"]
    assert ["".join(map(str, f)) for f in data.feature_code] == expected["F"]
    assert np.allclose(data.entropy, expected["H_bits_float32"], atol=1e-5)
    assert data.info()["H_Y_given_F"] == pytest.approx(expected["mean_H"], abs=1e-5)
    image, labels, key = data[-1]
    assert image.shape == (3, 8, 12) and image.dtype == torch.uint8 and image[0, 0, 0] == data.ids[-1]
    assert key == f"CLEVR_6obj_{data.ids[-1]:06d}" and labels["object_code"].shape == (96,)
    assert data.classes == list(VALUES.values())
    json.dumps([data.fingerprint(), data.report(), data.info(), data.details(0)])


def test_laws_of_the_objects(root):
    entropies = {}
    for prior in ("uniform<=M", "fixed_k", "independent_draws", "empirical"):
        data = Clevr("test", root=root, prior=prior, **KNOBS)
        entropies[data.prior_name] = data.entropy
        info = data.info()
        assert info["H_Y"] == pytest.approx(info["H_F"] + info["E_H_Y_given_F"], abs=1e-6)
        assert data.report()["prior"] == data.prior_name and data.fingerprint()["prior"] == data.prior_name
    assert set(entropies) == {"uniform<=6", "fixed_6", "independent_draws_6", "empirical"}
    assert not np.allclose(entropies["uniform<=6"], entropies["fixed_6"])
    # The worked example: three colours, everything else present, 17.05 bits against 16.69 at exactly six objects.
    data = Clevr("test", root=root, prior="fixed_k", **KNOBS)
    assert data.prior.entropy_of_counts((3, 2, 2, 2)) == pytest.approx(16.69, abs=5e-3)


def test_second_root_falls_back_to_the_first(root):
    source = root.parent / "clevr2"
    for path in source.rglob("*_00000[4-7].*"):
        path.rename(root / path.relative_to(source))
    assert Clevr("test", root=root, **KNOBS)[0].image.shape == (3, 8, 12)


def test_environment_and_default_folders(root, monkeypatch):
    monkeypatch.setenv("CLEVR_DATA_DIR", str(root))
    assert Clevr("val", **KNOBS).ids == [4]
    monkeypatch.delenv("CLEVR_DATA_DIR")
    monkeypatch.setenv("BINDING_PROJECT_ROOT", str(root.parent))
    with pytest.raises(UserError, match="data/datasets/clevr: no such folder.*CLEVR_DATA_DIR"):
        Clevr("val", **KNOBS)


def test_ranges_are_clipped_or_refused(root):
    data = Clevr("test", root=root, **KNOBS | {"n_test": 9})
    assert (
        data.report()["warnings"] == ["only 3 of 9 scenes exist"] and not Clevr("val", root=root, **KNOBS).report()["warnings"]
    )
    assert data.ids == [5, 6, 7] and data.report()["requested"] == 9
    with pytest.raises(UserError, match="8 to 10 .* none of the 8"):
        Clevr("test", root=root, **KNOBS | {"n_val": 4})
    with pytest.raises(UserError, match="none of the 8"):
        Clevr("val", root=root, **KNOBS | {"n_val": 0})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda objects: objects[2].pop("color"), r"CLEVR_6obj_000002\.json: objects\[2\]\.color missing"),
        (lambda objects: objects[1].update(color="pink"), r"objects\[1\]\.color: got 'pink', expected one of blue, red"),
        (lambda objects: objects[0].update(size=3), r"objects\[0\]\.size: got 3"),
        (lambda objects: objects.__setitem__(4, "cube"), r"objects\[4\]\.color missing"),
    ],
)
def test_a_wrong_scene_names_file_object_and_field(root, change, word):
    scene = json.loads(scene_file(root).read_text())
    change(scene["objects"])
    scene_file(root).write_text(json.dumps(scene))
    with pytest.raises(UserError, match=word):
        Clevr("train", root=root, **KNOBS)
    data = Clevr("train", root=root, on_error="skip", **KNOBS)
    assert data.ids == [0, 1, 3] and data.report()["skipped"][0][0] == "CLEVR_6obj_000002"


def test_too_small_a_law_is_a_mistake_of_the_configuration(root):
    for on_error in ("raise", "skip"):  # never a reason to leave scenes out
        with pytest.raises(UserError, match=r"000000\.json: 5 different objects, more than dataset.max_objects=3; raise it"):
            Clevr("train", root=root, on_error=on_error, max_objects=3, **KNOBS)


def test_damaged_and_missing_files_are_named(root):
    scene_file(root).write_text('{"objects": [')
    with pytest.raises(UserError, match=r"000002\.json: is not JSON .*; fix it, or leave it out with"):
        Clevr("train", root=root, **KNOBS)
    scene_file(root).write_text("[]")
    with pytest.raises(UserError, match=r"000002\.json: objects missing"):
        Clevr("train", root=root, **KNOBS)
    scene_file(root).unlink()
    with pytest.raises(UserError, match=r"scene file .*000002\.json is missing"):
        Clevr("train", root=root, **KNOBS)
    with pytest.raises(UserError, match="none of the 1 scene files"):
        scene_file(root.parent / "clevr2", 4).write_text("")
        Clevr("val", root=root, on_error="skip", **KNOBS)
    data = Clevr("test", root=root, **KNOBS)
    image = root.parent / "clevr2/images_6obj/CLEVR_6obj_000005.png"
    before = data.fingerprint()
    image.write_bytes(image.read_bytes()[:40])
    assert data.fingerprint() != before
    with pytest.raises(UnreadableScene, match="CLEVR_6obj_000005"):
        data[0]
    image.unlink()
    with pytest.raises(UnreadableScene, match=r"CLEVR_6obj_000005\.png is missing"):
        data[0]


def test_knobs(root):
    with pytest.raises(UserError, match=r"different objects, more than dataset\.max_objects=5"):
        Clevr("train", root=root, **KNOBS | {"max_objects": 5})
    with pytest.raises(UserError, match="prior"):
        Clevr("train", root=root, prior="flat", **KNOBS)
    config = OmegaConf.load(ROOT / "cfgs/dataset/clevr.yaml")
    assert set(config) - {"_target_"} == set(inspect.signature(Clevr.__init__).parameters) - {"self", "split"}
    data = build(OmegaConf.merge(config, KNOBS, {"root": str(root)}), "train")
    assert data.fingerprint() == Clevr("train", root=root, **KNOBS).fingerprint()
