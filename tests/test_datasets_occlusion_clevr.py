import importlib.util
import inspect
import itertools
import json
import math
import os
import pickle
import random
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from datasets.occlusion_cache import RenderCache
from datasets.occlusion_clevr import OcclusionClevr
from datasets.scene import UnreadableScene
from errors import UserError

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/binding/occlusion.json").read_text())["cases"][0]
SMALL = {"image_size": 16, "render_size": 16, "n_train": 4, "n_val": 3, "n_test": 3, "show_tqdm": False}

# A stand-in for the executable: runs the real script with a stage that paints flat colours instead of Blender's.
STUB = """#!{python}
import importlib.util, json, os, sys
from PIL import Image
argv = sys.argv
assert argv[1:4] == ["--background", "--python-exit-code", "1"] and argv[4] == "--python", argv
spec = importlib.util.spec_from_file_location("generate", argv[5])
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
orders = json.loads(os.environ.get("STUB", "{{}}"))
with open({log!r}, "a") as log:
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    log.write(json.dumps([argv[argv.index("--") + 1:], seen, os.environ.get("CUDA_DEVICE_ORDER")]) + "\\n")
if orders.get("fail"):
    print("Error: the cube is missing")
    print("Blender quit")
    sys.exit(orders["fail"])

class Stage:
    def __init__(self, args):
        self.args, self.things, self.count = args, 0, 0
    def reset(self, rng, jitter, elevation, pitch):
        assert self.things == 0
        return script.ground_directions((1, 0, 0), (0, -0.8, 0.6))
    def add(self, shape, material, color, scale, location, angle):
        self.things += 1
        return 1, 2, 3.0
    def render(self, path):
        self.count += 1
        if self.count == orders.get("die"):
            path.write_bytes(b"half")
            os._exit(9)
        Image.new("RGB", (self.args.width, self.args.height), (self.things, 0, 0)).save(path)
    def clear(self):
        self.things = 0

draw = script.draw_scene
def refusing(stage, scene, properties, args):
    if scene.get("attempt", 0) < orders.get("unplaced", {{}}).get(str(scene["image_index"]), 0):
        raise script.PlacementError("no room")
    draw(stage, scene, properties, args)
script.draw_scene = refusing
sys.exit(script.main(argv[argv.index("--") + 1:], Stage))
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "scripts" / "generate_occlusion_clevr.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def blender(tmp_path, monkeypatch):
    """The stub, a checkout with the asset table, and a function that returns the calls made so far."""
    assets = tmp_path / "clevr-dataset-gen" / "image_generation" / "data"
    assets.mkdir(parents=True)
    (assets / "base_scene.blend").write_bytes(b"")
    properties = {
        "shapes": {"cube": "SmoothCube_v2", "sphere": "Sphere", "cylinder": "SmoothCylinder"},
        "colors": {name: [0, 0, 0] for name in ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")},
        "materials": {"rubber": "Rubber", "metal": "MyMetal"},
        "sizes": {"large": 0.7, "small": 0.35},
    }
    (assets / "properties.json").write_text(json.dumps(properties))
    log, stub = tmp_path / "calls.jsonl", tmp_path / "blender"
    stub.write_text(STUB.format(python=sys.executable, log=str(log)))
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    for name in ("OCCLUSION_CLEVR_GEN_ROOT", "CLEVR_GEN_ROOT", "STUB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BLENDER_PATH", str(stub))
    monkeypatch.setenv("CLEVR_GEN_DIR", str(tmp_path / "clevr-dataset-gen"))

    def calls():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return calls


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A machine without Blender."""
    monkeypatch.setenv("BLENDER_PATH", str(tmp_path / "no-blender"))
    monkeypatch.delenv("CLEVR_GEN_DIR", raising=False)


def build(root, split="train", **knobs):
    return OcclusionClevr(split, root=str(root), **{**SMALL, **knobs})


def lines(data):
    return [json.loads(line) for line in (data.directory / "spec.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- what is asked for


def test_published_sampling_writes_the_published_list(tmp_path, blender):
    knobs = {"n_train": GOLDEN["n"], "seed": GOLDEN["seed"], "sampling": "published", **GOLDEN["config"]}
    data = build(tmp_path, GOLDEN["split"], **knobs)
    assert data.directory.name == GOLDEN["run_directory_name"]
    assert lines(data) == GOLDEN["spec"]
    first = (data.directory / "spec.jsonl").read_text().splitlines()[0]
    assert first == json.dumps(GOLDEN["spec"][0], sort_keys=True)
    assert ["".join(map(str, f)) for f in data.feature_code] == GOLDEN["F"]
    assert np.allclose(data.entropy, GOLDEN["H_bits_float32"], atol=1e-5)


def test_hashed_scenes_have_seeds_of_their_own(tmp_path, blender):
    train, val = build(tmp_path), build(tmp_path, "val")
    seeds = [line["seed"] for data in (train, val) for line in lines(data)]
    assert len(set(seeds)) == 7
    longer = build(tmp_path, n_train=5)
    assert lines(longer)[:4] == lines(train)
    assert "_seed123224_" in val.directory.name and longer.directory != train.directory


def test_items(tmp_path, blender):
    data = build(tmp_path, "test", image_size=12)
    image, labels, key = data[2]
    assert image.dtype == torch.uint8 and image.shape == (3, 12, 12)  # drawn at 16, resized
    assert int(image[0, 0, 0]) == int(labels["object_code"].sum()) and key == "CLEVRGEN_test_000002"
    assert labels["object_code"].shape == (12,) and labels["feature_code"].shape == (7,)
    info = data.info()
    assert info["H_Y"] == 12 and info["E_H_Y_given_F"] == pytest.approx(8.888852304562219, abs=1e-9)
    json.dumps([data.fingerprint(), info, data.report(), data.details(0)])
    named = build(tmp_path, "test", colors=["yellow", "red"], n_colors=2, shapes=["cone", "cube"][1:], n_shapes=1)
    assert named.classes == [["yellow", "red"], ["cube"]] and "_M2_Cyellow-red_Scube_" in named.directory.name


# ------------------------------------------------------------------------------------------------------------- drawing


def test_draws_once_then_needs_no_blender(tmp_path, blender, monkeypatch):
    data = build(tmp_path)
    assert len(blender()) == 1 and len(data) == 4
    assert sorted(p.name for p in data.directory.iterdir() if not p.name.startswith(".")) == [
        "images",
        "meta.json",
        "spec.jsonl",
    ]
    arguments = blender()[0][0]
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert options["--width"] == "16" and options["--camera_elevation"] == "3.2" and options["--margin"] == "0.4"
    monkeypatch.setenv("BLENDER_PATH", "/nowhere")
    monkeypatch.delenv("CLEVR_GEN_DIR")
    again = build(tmp_path)
    assert again.fingerprint() == data.fingerprint() and len(blender()) == 1
    assert build(tmp_path, use_cache_only=True).fingerprint() == data.fingerprint()


def test_several_processes_each_with_a_gpu(tmp_path, blender):
    data = build(tmp_path, n_train=7, gpu_device_indices=[2, 5])
    calls = sorted(blender(), key=lambda call: call[1])
    assert [call[1:] for call in calls] == [["2", "PCI_BUS_ID"], ["5", "PCI_BUS_ID"]]
    assert len(data) == 7 and not (data.directory / "spec_parts").exists()
    parts = [call[0][call[0].index("--spec_jsonl") + 1] for call in calls]
    assert [Path(part).name for part in parts] == ["spec.part0.jsonl", "spec.part1.jsonl"]


def test_missing_and_damaged_images_are_repaired(tmp_path, blender):
    data = build(tmp_path)
    images = sorted((data.directory / "images").glob("*.png"))
    before = [path.read_bytes() for path in images]
    images[1].unlink()
    build(tmp_path, repair_missing_passes=1)
    assert len(blender()) == 2 and images[1].read_bytes() == before[1]
    images[2].write_bytes(before[2][:30])
    images[3].unlink()
    build(tmp_path)
    assert [path.read_bytes() for path in images] == before
    images[0].unlink()
    with pytest.raises(UserError, match=r"1 of 4 images are missing .*CLEVRGEN_train_000000\.png"):
        build(tmp_path, repair_missing=False)


def test_scenes_that_cannot_be_placed_get_further_passes(tmp_path, blender, monkeypatch):
    monkeypatch.setenv("STUB", json.dumps({"unplaced": {"1": 2, "3": 1}}))
    assert len(build(tmp_path)) == 4 and len(blender()) == 3
    monkeypatch.setenv("STUB", json.dumps({"unplaced": {"1": 99}}))
    with pytest.raises(UserError, match="1 of 3 images are missing .*missing_policy=drop"):
        build(tmp_path, "val", repair_missing_passes=2)
    data = build(tmp_path, "val", repair_missing_passes=0, missing_policy="drop")
    assert len(data) == 2 and data.requested == 3 and data.ids == [0, 2]
    assert data.report()["dropped"] == ["CLEVRGEN_val_000001.png"]
    meta = json.loads((data.directory / "meta.json").read_text())
    assert meta["requested"] == 3 and meta["dropped"] == [1]
    made = len(blender())
    assert build(tmp_path, "val", missing_policy="filter").fingerprint() == data.fingerprint()
    assert build(tmp_path, "val", missing_policy="drop", use_cache_only=True).ids == [0, 2]
    assert len(blender()) == made  # what was dropped stays dropped and is not drawn again
    monkeypatch.setenv("STUB", "{}")
    assert len(build(tmp_path, "val")) == 3  # one that may not drop tries again
    with pytest.raises(UserError, match="could not be placed"):
        monkeypatch.setenv("STUB", json.dumps({"unplaced": {str(i): 99 for i in range(3)}}))
        build(tmp_path, "test", repair_missing_passes=0, missing_policy="drop")


def test_a_killed_blender_loses_nothing(tmp_path, blender, monkeypatch):
    monkeypatch.setenv("STUB", json.dumps({"die": 3}))
    with pytest.raises(UserError, match="Blender ended with status 9.*kept"):
        build(tmp_path)
    directory = next(tmp_path.glob("train_N4*"))
    whole = {path.name: path.stat().st_mtime_ns for path in (directory / "images").glob("CLEVRGEN*.png")}
    assert len(whole) == 2 and list((directory / "images").glob(".*part*"))
    monkeypatch.setenv("STUB", "{}")
    data = build(tmp_path)
    assert len(data) == 4 and not list((directory / "images").glob(".*part*"))
    assert {name: (directory / "images" / name).stat().st_mtime_ns for name in whole} == whole


def test_blender_that_fails_or_is_not_there(tmp_path, blender, monkeypatch):
    monkeypatch.setenv("STUB", json.dumps({"fail": 1}))
    with pytest.raises(UserError, match="Blender ended with status 1: Error: the cube is missing"):
        build(tmp_path)
    not_executable = tmp_path / "text"
    not_executable.write_text("no program")
    with pytest.raises(UserError, match="cannot be started"):
        build(tmp_path, blender_path=str(not_executable))
    with pytest.raises(UserError, match=r"4 of 4 images are missing and to render them needs Blender \(BLENDER_PATH"):
        build(tmp_path, blender_path="/nowhere/blender")
    with pytest.raises(UserError, match="needs a checkout of clevr-dataset-gen"):
        build(tmp_path, clevr_gen_dir="/nowhere")


def test_without_blender_one_sentence_says_what_is_missing(tmp_path, alone):
    with pytest.raises(UserError, match=r"needs Blender .* and a checkout of clevr-dataset-gen \(CLEVR_GEN_DIR"):
        build(tmp_path)
    with pytest.raises(UserError, match=r"spec\.jsonl is missing and dataset\.use_cache_only=true"):
        build(tmp_path, "val", use_cache_only=True)


# --------------------------------------------------------------------------------------------------------- other caches


def test_a_cache_of_the_published_program_is_adopted(tmp_path, alone):
    knobs = {"n_train": 4, "seed": GOLDEN["seed"], **GOLDEN["config"]}
    directory = tmp_path / GOLDEN["run_directory_name"]
    (directory / "images").mkdir(parents=True)
    (directory / "meta.pt").write_bytes(b"a pickle nobody reads")
    (directory / "spec.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in GOLDEN["spec"]))
    for line in GOLDEN["spec"]:
        Image.new("RGB", (16, 16), (len(line["objects"]), 0, 0)).save(directory / "images" / line["image_filename"])
    frozen = build(tmp_path, use_cache_only=True, **knobs)
    assert not (directory / "meta.json").exists() and len(frozen) == 4
    data = build(tmp_path, **knobs)  # sampling=hashed: the list on disk is the truth, not what would be drawn now
    assert [int(y.sum()) for y in data.object_code] == [int(data[i].image[0, 0, 0]) for i in range(4)]
    assert ["".join(map(str, f)) for f in data.feature_code] == GOLDEN["F"]
    (directory / "images" / "CLEVRGEN_train_000002.png").unlink()
    with pytest.raises(UserError, match="1 of 4 images are missing and to render them needs"):
        build(tmp_path, **knobs)
    with pytest.raises(UserError, match="1 of 4 images are missing .*use_cache_only=false"):
        build(tmp_path, use_cache_only=True, **knobs)
    dropped = build(tmp_path, use_cache_only=True, missing_policy="drop", **knobs)
    assert dropped.ids == [0, 1, 3] and len(dropped) == 3
    assert dropped.report()["warnings"] == ["1 of 4 images are missing and left out"]


def test_other_settings_never_use_old_images(tmp_path, blender):
    data = build(tmp_path)
    with pytest.raises(UserError, match=r"rendered with dataset\.min_dist=0\.25, got 0\.3"):
        build(tmp_path, min_dist=0.3)
    with pytest.raises(UserError, match=r"objects\[\d\]\.size is 'small', dataset\.default_size 'large'"):
        build(tmp_path, default_size="large")
    (data.directory / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta\.json cannot be read"):
        build(tmp_path)
    (data.directory / "meta.json").unlink()
    spec = lines(data)
    spec[1]["seed"] += 1  # the list changed under an image: it is drawn anew
    (data.directory / "spec.jsonl").write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in spec))
    stamps = [path.stat().st_mtime_ns for path in sorted((data.directory / "images").glob("*.png"))]
    build(tmp_path)
    now = [path.stat().st_mtime_ns for path in sorted((data.directory / "images").glob("*.png"))]
    assert [a != b for a, b in zip(stamps, now, strict=True)] == [False, True, False, False]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            lambda spec: spec[1]["objects"].append({"color": "pink", "shape": "cube"}),
            r"line 2: objects\[\d+\]\.color: got 'pink'",
        ),
        (lambda spec: spec[2]["objects"].append({"color": "red"}), r"line 3: objects\[\d+\]\.shape missing"),
        (lambda spec: spec[0].pop("objects"), "line 1: (objects missing|image_index: got 3, expected the whole number 0)"),
        (lambda spec: spec.reverse(), "line 1: (objects missing|image_index: got 3, expected the whole number 0)"),
    ],
)
def test_a_wrong_list_is_named(tmp_path, blender, change, word):
    data = build(tmp_path)
    spec = lines(data)
    change(spec)
    (data.directory / "spec.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spec))
    with pytest.raises(UserError, match=word):
        build(tmp_path)


def test_a_half_written_list(tmp_path, blender):
    data = build(tmp_path)
    text = (data.directory / "spec.jsonl").read_text()
    (data.directory / "spec.jsonl").write_text(text[: len(text) // 2])
    assert len(build(tmp_path)) == 4 and (data.directory / "spec.jsonl").read_text() == text and len(blender()) == 1
    (data.directory / "spec.jsonl").write_text('{"objects": []}\n{"obj')
    with pytest.raises(UserError, match="damaged .line 2 is not JSON, expected 4 scenes"):
        build(tmp_path)


def test_unreadable_image(tmp_path, blender):
    data = build(tmp_path)
    (data.directory / "images" / "CLEVRGEN_train_000001.png").write_bytes(b"x" * 50)
    with pytest.raises(UnreadableScene, match="CLEVRGEN_train_000001"):
        data[1]


def test_knobs(tmp_path, blender, monkeypatch):
    for knobs, word in (
        ({"missing_policy": "ignore"}, "raise, drop, filter"),
        ({"colors": ["pink"], "n_colors": 1}, "expected one of gray"),
        ({"n_colors": 9}, "from 1 to 8"),
        ({"gpu_backend": "METAL"}, "CUDA"),
        ({"split": "dev"}, "train, val, test"),
    ):
        with pytest.raises(UserError, match=word):
            build(tmp_path, **knobs)
    config = OmegaConf.load(ROOT / "cfgs/dataset/occlusionclevr.yaml")
    parameters = dict(inspect.signature(RenderCache.__init__).parameters)
    parameters |= inspect.signature(OcclusionClevr.__init__).parameters
    assert set(config) - {"_target_"} == set(parameters) - {"self", "split", "rendering"}
    assert all(config[key] == parameters[key].default for key in config if key != "_target_")
    monkeypatch.setenv("CLEVR_GEN_ROOT", str(tmp_path / "two"))
    assert OcclusionClevr("val", **SMALL).root == tmp_path / "two"
    monkeypatch.setenv("OCCLUSION_CLEVR_GEN_ROOT", str(tmp_path / "one"))
    assert OcclusionClevr("val", **SMALL).root == tmp_path / "one"


# ----------------------------------------------------------------------------------------------------------- the script


def test_placement_keeps_objects_apart(script):
    directions = script.ground_directions((0.8, 0.6, 0.0), (0.3, -0.4, 0.5))
    for name, other in (("left", "right"), ("front", "behind")):
        assert directions[name][:2] == pytest.approx([-x for x in directions[other][:2]])
        assert math.hypot(*directions[name]) == pytest.approx(1)
    knobs = {"min_dist": 0.25, "margin": 0.4, "max_retries": 50}
    for seed in range(10):
        poses = script.place([0.35] * 6, directions, random.Random(seed), **knobs)
        for (i, (x, y, _)), (_, (a, b, _)) in itertools.combinations(enumerate(poses), 2):
            assert math.hypot(x - a, y - b) - 0.7 >= 0.25 and abs(x) <= 3, i
            for name in ("left", "right", "front", "behind"):
                along = (a - x) * directions[name][0] + (b - y) * directions[name][1]
                assert not 0 < along < 0.4
    assert script.place([], directions, random.Random(0), **knobs) == []
    with pytest.raises(script.PlacementError, match="12 objects found no places in 2 x 3 tries"):
        script.place([2.0] * 12, directions, random.Random(0), min_dist=0.25, margin=0.4, max_retries=3, restarts=2)


def test_a_further_attempt_is_another_stream(script):
    assert script.stream(5, 0).random() == random.Random(5).random() == script.stream(5, 0).random()
    assert len({script.stream(5, attempt).random() for attempt in range(4)}) == 4


def test_script_writes_scene_files_and_an_explicit_status(script, tmp_path, blender):
    class Stage:
        log = []

        def __init__(self, args):
            self.args = args

        def reset(self, rng, jitter, elevation, pitch):
            self.log.append((elevation, pitch, jitter["key"]))
            return script.ground_directions((1, 0, 0), (0, -1, 0))

        def add(self, *pose):
            self.log.append(pose)
            return 5, 6, 7.0

        def render(self, path):
            Image.new("RGB", (self.args.width, self.args.height)).save(path)

        def clear(self):
            self.log.append("clear")

    red = {"color": "red", "shape": "sphere", "size": "large", "material": "metal"}
    scene = {"image_filename": "a.png", "image_index": 0, "split": "train", "seed": 1, "objects": [red]}
    crowd = {**scene, "image_filename": "b.png", "image_index": 1, "objects": [red] * 80}
    empty = {**scene, "image_filename": "c.png", "image_index": 2, "objects": []}
    (tmp_path / "spec.jsonl").write_text("\n".join(json.dumps(s) for s in (scene, crowd, empty)))
    argv = ["--clevr_gen_dir", os.environ["CLEVR_GEN_DIR"], "--spec_jsonl", str(tmp_path / "spec.jsonl")]
    argv += ["--output_image_dir", str(tmp_path / "out"), "--output_scene_dir", str(tmp_path / "scenes")]
    argv += ["--camera_elevation", "1.5", "--max_retries", "2"]
    assert script.main(argv, Stage) == script.UNPLACED
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]
    assert Stage.log[0] == (1.5, None, 1.0) and Stage.log.count("clear") == 2
    dump = json.loads((tmp_path / "scenes" / "a.json").read_text())
    assert set(dump) == {"split", "image_index", "image_filename", "objects", "directions"}
    thing = dump["objects"][0]
    assert thing["shape"] == "sphere" and thing["pixel_coords"] == [5, 6, 7.0] and thing["3d_coords"][2] == 0.7
    assert set(dump["directions"]) == {"behind", "front", "left", "right", "above", "below"}
    with pytest.raises(SystemExit):
        script.main(["--spec_jsonl", "x"], Stage)


def test_what_was_just_rendered_can_be_sent_to_a_worker(tmp_path, blender):
    data = build(tmp_path / "root", "val")
    assert torch.equal(pickle.loads(pickle.dumps(data))[0].image, data[0].image)
