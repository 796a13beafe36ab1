import ast
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ade20k_tree import NAMES, RELEASE, encode, write_ade20k_tree, write_scene
from PIL import Image

import datasets.ade20k as ade20k
import datasets.ade20k_files as ade20k_files
from datasets.ade20k import Ade20k
from datasets.ade20k_files import (
    RAW_CLASSES,
    build_class_map,
    class_of_name,
    decode_segmentation,
    number_objects,
    read_annotation,
    read_class_list,
    split_segmentation,
)
from datasets.scene import UnreadableScene
from errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "object_binding"
SHIPPED = Path(ade20k.__file__).parent / "objectInfo150.csv"
NUMBERS = {name: number for number, name in enumerate(read_class_list(SHIPPED), start=1)}
SAMPLES = os.environ.get("ADE20K_SAMPLES")
needs_samples = pytest.mark.skipif(not SAMPLES, reason="ADE20K_SAMPLES does not name a folder with the public samples")


def sha256(values: np.ndarray | torch.Tensor, dtype: str) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(values).astype(dtype)).tobytes()).hexdigest()


def training(root: Path) -> Path:
    return root / RELEASE / "images" / "ADE" / "training" / "urban" / "street"


def one_scene(root: Path, order: np.ndarray, classes: list[int], **more) -> Ade20k:
    write_scene(training(root), "ADE_train_00000001", order, classes, **more)
    return Ade20k("train", root=root)


# ---------------------------------------------------------------------------------------------------------- classes


def test_class_map_is_the_published_one() -> None:
    golden = json.loads((GOLDEN / "class_map.json").read_text())["data"]
    table = build_class_map(dict(enumerate(golden["objectnames"], start=1)), NUMBERS)
    n = len(golden["class_mapping"])
    assert table[:n].tolist() == golden["class_mapping"]
    assert not table[n:].any() and table.dtype == torch.int32 and len(table) == RAW_CLASSES


def test_sample_classes_are_the_published_ones() -> None:
    for sample in json.loads((GOLDEN / "ade_samples.json").read_text())["data"]:
        table = build_class_map({int(raw): name for raw, name in sample["name_ndx_to_name"].items()}, NUMBERS)
        assert {raw: int(table[int(raw)]) for raw in sample["name_ndx_to_class150"]} == sample["name_ndx_to_class150"]


def test_names_are_not_off_by_one(tmp_path: Path) -> None:
    """Mask value 774 is the class whose JSON entry says name_ndx 774, not the entry before or after it."""
    order = np.ones((8, 8), np.int64)
    data = one_scene(tmp_path, order, [774], names={773: "sky", 774: "door", 775: "tree"})
    scene = data[0]
    assert scene.labels["raw_class"].unique().tolist() == [774]
    assert scene.labels["class"].unique().tolist() == [15]
    assert data.classes[15] == "door;double;door"


def test_shipped_list_has_150_classes_and_the_special_cases() -> None:
    names = read_class_list(SHIPPED)
    assert len(names) == 150 and set(ade20k_files.ALIASES.values()) <= set(names)
    assert class_of_name("double door", NUMBERS) == class_of_name("door", NUMBERS) == 15
    assert class_of_name("Sky", NUMBERS) == class_of_name("", NUMBERS) == 0


def test_own_class_list_is_honoured(tmp_path: Path) -> None:
    write_ade20k_tree(tmp_path, 2, 0, 0)
    before = Ade20k("train", root=tmp_path)
    (tmp_path / RELEASE / "objectInfo150.csv").write_text("Idx,Name\n1,sky\n2,door;double;door\n")
    data = Ade20k("train", root=tmp_path)
    assert data.classes == ["background", "sky", "door;double;door"]
    scene = data[0]
    assert (scene.labels["class"] == 1).eq(scene.labels["raw_class"] == 2420).all()
    assert (scene.labels["class"] == 2).eq(scene.labels["raw_class"] == 774).all()
    assert data.report()["class_list"].endswith("objectInfo150.csv") and data.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("text", ["", "Idx,Name\n2,sky\n", "Idx,Name\n1,sky\n2,sky\n", "Idx,Name\n1\n", "a,b\n1,2\n"])
def test_class_list_of_another_form_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "objectInfo150.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="objectInfo150.csv"):
        read_class_list(path)


# --------------------------------------------------------------------------------------------------------- decoding


@needs_samples
@pytest.mark.parametrize("sample", json.loads((GOLDEN / "ade_samples.json").read_text())["data"], ids=lambda s: s["image"])
def test_real_samples_decode_as_published(sample: dict) -> None:
    data = Ade20k("train", root=SAMPLES)
    if sample["image"] not in data.keys:
        pytest.skip(f"{sample['image']} is not in {SAMPLES}")
    i = data.keys.index(sample["image"])
    raw, instance = decode_segmentation(data._picture(i, "_seg.png"))
    assert (raw.dtype, instance.dtype) == (np.int32, np.int64)
    assert sha256(raw, "<i4") == sample["class_mask"]["sha256_le_C_order"]
    assert sha256(instance, "<i8") == sample["instance_mask"]["sha256_le_C_order"]
    assert [sha256(part, "<i4") for part in data.parts(i)] == sample["parts_as_int32_sha256"]
    annotation = read_annotation(data._file(i, ".json"), sample["image"])
    assert annotation.n_objects == sample["n_json_level0"]
    assert {str(n): name for n, name in sorted(annotation.names.items())} == sample["name_ndx_to_name"]
    assert np.unique(split_segmentation(data._picture(i, "_seg.png"))[1]).tolist() == sample["B_channel_values"]

    scene = data[i]
    assert (scene.labels["raw_class"].numpy() == raw).all()
    # Nothing is hidden in the samples and B = 0 is the unlabelled ground: there both numberings agree.
    assert scene.labels["identity"].unique().tolist() == sample["instance_mask"]["ids"]
    assert (scene.labels["identity"].numpy() == instance).all()
    assert data.inspect(i)["remarks"] == []


def test_decoding_agrees_with_a_pixel_loop(tmp_path: Path) -> None:
    """The same two maps from a decoder that shares no line with ours, compared as hashes of bytes."""
    for stem, written in write_ade20k_tree(tmp_path, 3, 0, 0).items():
        pixels = np.asarray(Image.open(written.file("_seg.png"))).reshape(-1, 3).tolist()
        raw = [red // 10 * 256 + green for red, green, _ in pixels]
        ranks = {value: rank for rank, value in enumerate(sorted({blue for _, _, blue in pixels}))}
        got_raw, got_instance = decode_segmentation(Image.open(written.file("_seg.png")))
        assert sha256(got_raw, "<i4") == sha256(np.array(raw), "<i4"), stem
        assert sha256(got_instance, "<i8") == sha256(np.array([ranks[blue] for *_, blue in pixels]), "<i8"), stem


def test_scene_holds_what_was_written(tmp_path: Path) -> None:
    tree = write_ade20k_tree(tmp_path, 3, 2, 2)
    for split, expected in (("train", 3), ("val", 2), ("test", 2)):
        data = Ade20k(split, root=tmp_path)
        assert len(data) == expected
        for scene in (data[i] for i in range(len(data))):
            written = tree[scene.key]
            assert scene.image.dtype == torch.uint8 and scene.image.shape == (3, *written.order.shape)
            assert all(scene.labels[name].dtype == torch.int32 for name in ("identity", "class", "raw_class"))
            assert (scene.labels["identity"].numpy() == written.order).all()
            assert (scene.labels["raw_class"].numpy() == written.raw).all()
            expected_class = np.vectorize(lambda raw: class_of_name(NAMES.get(raw, ""), NUMBERS))(written.raw)
            assert (scene.labels["class"].numpy() == expected_class).all()
            mapped = scene.labels["class_of_raw"][scene.labels["raw_class"].long()]
            assert (mapped == scene.labels["class"]).all()
            picture = np.asarray(Image.open(written.file(".jpg")))
            assert (scene.image.permute(1, 2, 0).numpy() == picture).all()


@pytest.mark.parametrize("n_objects", [1, 2, 3, 51, 100, 127, 128, 200, 254, 255])
def test_every_code_gives_its_object_back(n_objects: int) -> None:
    order = np.arange(n_objects + 1).reshape(1, -1)
    raw = np.minimum(order, 1).astype(np.int32) * 2420
    _, blue = split_segmentation(encode(raw, order, n_objects))
    identity, rule = number_objects(raw, blue, n_objects)
    assert rule == "paint_order" and (identity == order).all() and identity.dtype == np.int32


def test_hidden_object_shifts_no_other() -> None:
    order = np.array([[0, 1, 3, 4]])  # object 2 is completely covered
    raw = np.array([[0, 401, 401, 2420]], np.int32)
    picture = encode(raw, order, 4)
    assert number_objects(*split_segmentation(picture), 4)[0].tolist() == [[0, 1, 3, 4]]
    assert decode_segmentation(picture)[1].tolist() == [[0, 1, 2, 3]]  # the authors' ranks move up


def test_completely_labelled_image_keeps_its_first_object(tmp_path: Path) -> None:
    order = np.repeat([[1, 2, 3, 4]], 8, axis=0)
    data = one_scene(tmp_path, order, [401, 401, 2420, 2855])
    assert data[0].labels["identity"].unique().tolist() == [1, 2, 3, 4]
    picture = Image.open(training(tmp_path) / "ADE_train_00000001_seg.png")
    assert np.unique(decode_segmentation(picture)[1]).tolist() == [0, 1, 2, 3]  # the authors' reader: background
    raw, blue = split_segmentation(picture)
    assert np.unique(number_objects(raw, blue, None)[0]).tolist() == [1, 2, 3, 4]  # without K as well


@pytest.mark.parametrize("n_objects", [256, 300, 600])
def test_more_than_255_objects_are_told_apart_by_class(tmp_path: Path, n_objects: int) -> None:
    order = np.zeros((16, 80), np.int64)
    order.flat[: n_objects + 1] = np.arange(n_objects + 1)  # every object one pixel, the rest unlabelled
    data = one_scene(tmp_path, order, [(401, 2420, 2855)[k % 3] for k in range(n_objects)])
    scene, raw = data[0], data[0].labels["raw_class"]
    identity = scene.labels["identity"]
    assert (identity[torch.from_numpy(order == 0)] == 0).all()
    assert (identity[torch.from_numpy(order > 0)] > 0).all()  # also object 1 of 600, whose code is that of the ground
    for number in identity.unique().tolist():
        assert len(raw[identity == number].unique()) == 1
    _, blue = split_segmentation(Image.open(training(tmp_path) / "ADE_train_00000001_seg.png"))
    pairs = len(set(zip(raw.flatten().tolist(), blue.ravel().tolist(), strict=True)))
    assert len(identity.unique()) == pairs == int(identity.max()) + 1
    assert f"{n_objects} objects share 255 codes" in data.inspect(0)["remarks"][0]


def test_codes_that_fit_no_count_are_ranked(tmp_path: Path) -> None:
    data = one_scene(tmp_path, np.repeat([[0, 1, 2, 3]], 8, axis=0), [401, 401, 2420])
    path = training(tmp_path) / "ADE_train_00000001.json"
    content = json.loads(path.read_text())
    content["annotation"]["object"] = content["annotation"]["object"][:1]  # one object, codes of three
    path.write_text(json.dumps(content))
    assert data[0].labels["identity"].unique().tolist() == [0, 1, 2, 3]
    remarks = data.inspect(0)["remarks"]
    assert "object codes do not fit 1 objects" in remarks[0] and "classes [2420]" in remarks[1]


def test_missing_maps_of_parts_are_named(tmp_path: Path) -> None:
    tree = write_ade20k_tree(tmp_path, 2, 0, 0)
    data, (first, second) = Ade20k("train", root=tmp_path), tree.values()
    assert data.inspect(0)["remarks"] == []
    first.file("_parts_1.png").unlink()
    (remark,) = data.inspect(0)["remarks"]
    assert "_parts_1.png is missing" in remark and "level 1" in remark and data.inspect(1)["remarks"] == []
    content = json.loads(second.file(".json").read_text())
    content["annotation"]["object"] = [thing for thing in content["annotation"]["object"] if thing["parts"]["part_level"] == 0]
    second.file(".json").write_text(json.dumps(content))
    second.file("_parts_1.png").unlink()
    assert data.inspect(1)["remarks"] == []  # no parts listed, none expected


def test_parts_are_whole_numbers(tmp_path: Path) -> None:
    write_ade20k_tree(tmp_path, 1, 0, 0)
    (parts,) = Ade20k("train", root=tmp_path).parts(0)
    assert parts.dtype == torch.int32 and parts.unique().tolist() == [0, 3035]


# ------------------------------------------------------------------------------------------------------------- JSON


def test_loose_json_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    lone = {"name": "sky", "name_ndx": "2420", "parts": {"part_level": "0", "hasparts": 3, "ispartof": []}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"annotation": {"object": lone}}).encode())
    assert read_annotation(path, "a") == ({2420: "sky"}, 1, [], [])
    text = json.dumps({"annotation": {"object": [lone, {"name": "x"}], "f": "caf\xe9"}}, ensure_ascii=False)
    path.write_bytes(text.encode("latin-1"))
    found = read_annotation(path, "a")
    assert found.names == {2420: "sky"} and found.n_objects is None and "object[1]" in found.remarks[0]
    path.write_text(json.dumps({"annotation": {"object": []}}))
    assert read_annotation(path, "a") == ({}, 0, [], [])
    path.write_text(json.dumps({"annotation": {"object": [lone, {**lone, "name": "Sky"}]}}))
    assert "'sky' and 'Sky'" in read_annotation(path, "a").remarks[0]


# ----------------------------------------------------------------------------------------------------------- splits


def all_stems(kind: str, n: int) -> dict[str, str]:
    return {f"ADE_{kind}_{i:08d}": f"images/ADE/x/ADE_{kind}_{i:08d}" for i in range(1, n + 1)}


@pytest.mark.parametrize(("rule", "n_test"), [("object_binding_2025", 2000), ("object_binding_2026", 1999)])
def test_complete_release_is_cut_as_published(tmp_path: Path, monkeypatch, rule: str, n_test: int) -> None:
    write_ade20k_tree(tmp_path, 1, 0, 1)
    lists = {"training": all_stems("train", 25574), "validation": all_stems("val", 2000)}
    monkeypatch.setattr(ade20k, "list_stems", lambda folder, release: lists[folder.name])
    data = {split: Ade20k(split, root=tmp_path, split_rule=rule) for split in ("train", "val", "test")}
    assert [len(d) for d in data.values()] == [20455, 5108, n_test]
    assert data["train"].removed == [f"ADE_train_{p + 1:08d}" for p in (7689, 8904, 8905, 20433)]
    assert len(data["val"].removed) == 7 and data["val"].keys[0] == "ADE_train_00020460"
    assert data["train"].keys[-1] == "ADE_train_00020459" and data["train"].complete
    assert data["test"].removed == ([] if n_test == 2000 else ["ADE_val_00000021"])


def test_partial_tree_cuts_by_file_number(tmp_path: Path) -> None:
    order = np.ones((8, 8), np.int64)
    for number in (7689, 7690, 7691, 20459, 20460, 25574):
        write_scene(training(tmp_path), f"ADE_train_{number:08d}", order, [2420])
    train, val = (Ade20k(split, root=tmp_path) for split in ("train", "val"))
    assert [int(key[-8:]) for key in train.keys] == [7689, 7691, 20459]
    assert train.removed == ["ADE_train_00007690"] and not train.report()["complete"]
    assert [int(key[-8:]) for key in val.keys] == [20460, 25574]
    assert len(Ade20k("train", root=tmp_path, removed_training=[])) == 4
    assert len(Ade20k("val", root=tmp_path, train_ratio=0.3)) == 5


def test_complete_tree_cuts_by_position(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ade20k, "N_TRAINING", 5)
    order = np.ones((8, 8), np.int64)
    for number in (3, 10, 20, 30, 40):
        write_scene(training(tmp_path), f"ADE_train_{number:08d}", order, [2420])
    train = Ade20k("train", root=tmp_path, removed_training=[1, 4])
    assert train.complete and [int(key[-8:]) for key in train.keys] == [3, 20, 30]
    with pytest.raises(UserError, match="val: none of the 5 images"):
        Ade20k("val", root=tmp_path, removed_training=[1, 4])


def test_limit_is_spread_over_the_split(tmp_path: Path) -> None:
    write_ade20k_tree(tmp_path, 6, 0, 0)
    assert [int(k[-8:]) for k in Ade20k("train", root=tmp_path, limit=3).keys] == [1, 3, 5]
    assert len(Ade20k("train", root=tmp_path, limit=60)) == 6


# -------------------------------------------------------------------------------------------------------- bad input


def test_root_may_be_the_release_or_its_parent(tmp_path: Path) -> None:
    write_ade20k_tree(tmp_path, 2, 0, 0)
    one, other = Ade20k("train", root=tmp_path), Ade20k("train", root=tmp_path / RELEASE)
    assert one.keys == other.keys and one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["images/training", "annotations/training"], "ADEChallengeData2016"),
        (["ADEChallengeData2016/images/training", "ADEChallengeData2016/annotations/training"], "ADEChallengeData2016"),
        (["ADE20K_2016_07_26/images/training/a/abbey"], "2016"),
        (["images/training/a/abbey", "images/validation/a/abbey"], "2016"),
        (["something"], "no images/ADE"),
    ],
)
def test_other_trees_are_named(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(UserError, match=message) as caught:
        Ade20k("train", root=tmp_path)
    assert RELEASE in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_knobs_are_refused(tmp_path: Path) -> None:
    write_ade20k_tree(tmp_path, 1, 0, 0)
    for knobs, message in (
        ({"split": "dev"}, "train, val, test"),
        ({"root": tmp_path / "nowhere"}, "no folder"),
        ({"split_rule": "mine"}, "object_binding_2025"),
        ({"on_error": "ignore"}, "raise or skip"),
        ({"train_ratio": 1.5}, "train_ratio"),
        ({"limit": 0}, "limit"),
        ({"split": "test"}, "validation is missing"),
        ({"split": "val"}, "partial"),
    ):
        with pytest.raises(UserError, match=message):
            Ade20k(**{"split": "train", "root": tmp_path, **knobs})


def test_one_stem_in_two_places_is_refused(tmp_path: Path) -> None:
    write_ade20k_tree(tmp_path, 1, 0, 0)
    order = np.ones((8, 8), np.int64)
    write_scene(training(tmp_path).parent / "alley", "ADE_train_00000001", order, [2420])
    with pytest.raises(UserError, match="two places"):
        Ade20k("train", root=tmp_path)


@pytest.mark.parametrize("ending", [".jpg", "_seg.png", ".json"])
@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "noise"])
def test_damaged_file_is_named(tmp_path: Path, ending: str, fault: str) -> None:
    tree = write_ade20k_tree(tmp_path, 2, 0, 0, size=(96, 128))
    written = tree["ADE_train_00000002"]
    path = written.file(ending)
    good = path.read_bytes()
    before = Ade20k("train", root=tmp_path).fingerprint()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "truncated": good[: len(good) // 2], "noise": b"\x00\xff" * 500}[fault])
    data = Ade20k("train", root=tmp_path)
    assert data.keys == list(tree) and data.fingerprint() != before
    assert data[0].key == "ADE_train_00000001"
    with pytest.raises(UnreadableScene) as caught:
        data[1]
    assert caught.value.key == "ADE_train_00000002" and str(path) in caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # worker processes send it back


def test_mask_of_another_size_or_kind_is_named(tmp_path: Path) -> None:
    written = write_ade20k_tree(tmp_path, 1, 0, 0)["ADE_train_00000001"]
    data = Ade20k("train", root=tmp_path)
    Image.open(written.file("_seg.png")).crop((0, 0, 60, 48)).save(written.file("_seg.png"))
    with pytest.raises(UnreadableScene, match="60x48 pixels, its image 64x48"):
        data[0]
    Image.new("L", (64, 48)).save(written.file("_seg.png"))
    with pytest.raises(UnreadableScene, match="mode L, expected 8-bit RGB"):
        data[0]


# ---------------------------------------------------------------------------------------------------------- unpacking


def unpack(*arguments: str | Path) -> subprocess.CompletedProcess:
    script = Path(ade20k.__file__).parent.parent / "scripts" / "download_ade20k.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", str(script), *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_script_unpacks_and_checks(tmp_path: Path) -> None:
    write_ade20k_tree(tmp_path / "made", 2, 1, 1)
    archive = shutil.make_archive(str(tmp_path / "ade"), "zip", tmp_path / "made")
    done = unpack(archive, tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "3 of 25574 training" in done.stdout and "1 of 2000 validation" in done.stdout
    assert len(Ade20k("train", root=tmp_path / "data")) == 2
    assert "request" in unpack().stdout and unpack().returncode == 2


def test_script_refuses_other_files(tmp_path: Path) -> None:
    assert "no file" in unpack(tmp_path / "nothing.zip", tmp_path / "data").stderr
    (tmp_path / "a.zip").write_bytes(b"PK broken")
    assert "is damaged or no zip" in unpack(tmp_path / "a.zip", tmp_path / "data").stderr
    (tmp_path / "other" / "x").mkdir(parents=True)
    archive = shutil.make_archive(str(tmp_path / "other"), "zip", tmp_path / "other")
    done = unpack(archive, tmp_path / "data")
    assert done.returncode == 1 and "images/ADE" in done.stderr


# ----------------------------------------------------------------------------------------------------------- safety

_opened: list[str] = []
_watching = False


def _audit(event: str, arguments: tuple) -> None:
    if _watching and event.startswith("pickle."):
        _opened.append(event)
    elif _watching and event == "open" and str(arguments[0]).endswith(".pkl"):
        _opened.append(str(arguments[0]))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    global _watching
    write_ade20k_tree(tmp_path, 1, 1, 1)
    (tmp_path / RELEASE / "index_ade20k.pkl").write_bytes(pickle.dumps({"filename": []}))
    sys.addaudithook(_audit)
    _opened.clear()
    _watching = True
    try:
        for split in ("train", "val", "test"):
            data = Ade20k(split, root=tmp_path)
            data[0], data.parts(0), data.inspect(0), data.fingerprint(), data.report()
        assert _opened == []
        pickle.loads(pickle.dumps(NamesOnly()))
        assert _opened  # the hook does see an unpickling
    finally:
        _watching = False


class NamesOnly:
    pass


def test_no_data_set_imports_pickle() -> None:
    for path in Path(ade20k.__file__).parent.glob("*.py"):
        names = {n.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for n in node.names}
        assert not names & {"pickle", "dill", "joblib"}, path
