"""Metadata that a stranger wrote: whatever stands in them, the answer is one sentence or the data set as it is."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_trees import TREES, colour, save
from safetensors.numpy import load_file, save_file
from test_datasets_scene import config

from datasets.listings import inside
from datasets.metadata import Entry, read_json
from datasets.scene import build
from errors import UserError

STRANGE = [None, True, -1, 0, 3, 1.5, float("nan"), float("inf"), 10**400, "", "x", "a\0b", "\ud800", "../../x", "/etc/passwd",
           [], [[]], [None], {}, {"a": {}}, "x" * 300, -(2**70)]  # fmt: skip
PLACES = {  # data set: its JSON files below the root, by pattern
    "exported": "dataset_train*/metadata.json",
    "vgcolor": "deprecated/*/*.json",
    "coco_things": "annotations/instances_train2017.json",
    "occlusionclevr": "train_*/spec.jsonl",
}


def walk(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Places of all values of a JSON content."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in pairs:
        yield from walk(inner, (*path, step))


def mutate(content: Any, path: tuple, value: Any, how: str) -> Any:
    """A copy in which the value at a place is another, or is gone, or a list there is shorter or longer."""
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for step in path[:-1]:
        parent = parent[step]
    target = parent[path[-1]]
    if how == "drop":
        del parent[path[-1]]
    elif how == "twice" and isinstance(target, list):
        parent[path[-1]] = target * 2
    elif how == "half" and isinstance(target, list):
        parent[path[-1]] = target[: len(target) // 2]
    else:
        parent[path[-1]] = value
    return content


@pytest.mark.parametrize("name", PLACES)
def test_no_metadata_ends_in_anything_but_a_sentence(name: str, tmp_path: Path) -> None:
    options = TREES[name](tmp_path)
    cfg, rng, refused = config(name, **options), np.random.default_rng(0), 0
    files = sorted(Path(options["root"]).glob(PLACES[name]))
    assert files
    for number in range(int(os.environ.get("FUZZ", 100))):
        file = files[number % len(files)]
        text = file.read_text()
        lines = file.suffix == ".jsonl"
        content = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
        places = list(walk(content))
        place = places[int(rng.integers(1 if lines else 0, len(places)))]
        how = ("value", "value", "value", "drop", "twice", "half")[int(rng.integers(6))]
        other = mutate(content, place, STRANGE[int(rng.integers(len(STRANGE)))], how)
        file.write_text("".join(f"{json.dumps(line)}\n" for line in other) if lines else json.dumps(other))
        try:
            data = build(cfg, "train")
            scene = data[0]
            assert scene.image.shape[0] == 3 and isinstance(scene.key, str)
            json.dumps([data.fingerprint(), data.report(), data.info()])
        except UserError as error:
            refused += 1
            message = str(error)
            assert message.encode() and "\n" not in message and "\0" not in message and len(message) < 1000, message
        finally:
            file.write_text(text)
    assert refused > 20
    assert len(build(cfg, "train")) > 0


NO_METADATA = [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b"5", b"[]", b'"x"', b'{"a": 1' + b"0" * 5000 + b"}"]
OUTSIDE = ["../outside.png", "/etc/hostname", "link.png", "", ".", "a\0b", "\ud800.png", "x/../../outside.png"]


@pytest.mark.parametrize("data", NO_METADATA, ids=range(len(NO_METADATA)))
@pytest.mark.parametrize("name", ["exported", "vgcolor"])
def test_files_that_are_no_metadata_are_named(name: str, data: bytes, tmp_path: Path) -> None:
    options = TREES[name](tmp_path)
    for file in sorted(Path(options["root"]).glob(PLACES[name])):
        sound = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(UserError, match=file.name):
            build(config(name, **options), "train")
        file.write_bytes(sound)
        file.unlink()
        file.mkdir()
        with pytest.raises(UserError, match=file.name):
            build(config(name, **options), "train")
        file.rmdir()
        file.write_bytes(sound)


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_names_in_metadata_stay_inside_the_data_set(name: str, tmp_path: Path) -> None:
    options = TREES["exported"](tmp_path / "data")
    save(tmp_path / "outside.png", colour(0))
    (file,) = Path(options["root"]).glob("dataset_train*/metadata.json")
    (file.parent / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    content = json.loads(file.read_text())
    content["files"][2] = name
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"metadata.json: files\[2\]: got"):
        build(config("exported", **options), "train")
    records = TREES["vgcolor"](tmp_path / "vg")
    (file,) = (tmp_path / "vg").glob("deprecated/*/attributes*.json")
    content = json.loads(file.read_text())
    content[1]["image_url"] = f"https://host/{name}" if name not in ("", ".", "link.png", "/etc/hostname") else "../.."
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"attributes_filtered_color.json: \[1\].image_url: got"):
        build(config("vgcolor", **records), "train")


def test_a_folder_may_be_a_link_itself(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").write_bytes(b"")
    (tmp_path / "images").symlink_to(tmp_path / "disk")
    assert inside(tmp_path / "images", "a.png", "x") == tmp_path / "images" / "a.png"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("object_code", lambda a: a[:-1], r"object_code of 0 and 1, \[4, 49\] uint8"),
        ("object_code", lambda a: a * 2, "object_code of 0 and 1"),
        ("feature_code", lambda a: 1 - a, "feature_code does not follow"),
        ("feature_code", lambda a: a.astype(np.int64), "feature_code of 0 and 1"),
        ("H_Y_given_F", lambda a: a * np.float32("nan"), "H_Y_given_F of finite numbers"),
        ("H_Y_given_F", lambda a: a[:, None], "H_Y_given_F of finite numbers"),
    ],
)
def test_codes_that_do_not_fit_their_metadata(name: str, change: Any, reason: str, tmp_path: Path) -> None:
    options = TREES["exported"](tmp_path)
    (file,) = Path(options["root"]).glob("dataset_train*/codes.safetensors")
    codes = load_file(file)
    save_file({**codes, name: np.ascontiguousarray(change(codes[name]))}, file)
    with pytest.raises(UserError, match=f"codes.safetensors: .*{reason}"):
        build(config("exported", **options), "train")


def test_an_entry_says_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('[{"a": [1, {"b": "x"}]}]')
    entry = read_json(tmp_path / "m.json").each()[0].key("a").each()[1].key("b")
    assert entry.place == f"{tmp_path}/m.json: [0].a[1].b" and entry.text() == "x"
    with pytest.raises(UserError, match=r"\[0\].a\[1\].b: got 'x', expected a whole number of at least 0$"):
        entry.whole()
    with pytest.raises(UserError, match=r"^top: a: got True, expected a number$"):
        Entry({"a": True}, None, "top").key("a").number()


@pytest.mark.parametrize("group", [[], ["red", "red"]])
def test_feature_groups_that_are_none_are_named(group: list[str], tmp_path: Path) -> None:
    options = TREES["exported"](tmp_path)
    (file,) = Path(options["root"]).glob("dataset_train*/metadata.json")
    content = json.loads(file.read_text())
    content["groups"][1] = group
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"metadata.json: groups\[1\]: got .*, expected at least one name and none twice"):
        build(config("exported", **options), "train")
    options = TREES["vgcolor"](tmp_path / "vg")
    (file,) = Path(options["root"]).glob("**/vg_stats*.json")
    content = json.loads(file.read_text())
    content["selected_object_classes"] = group
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"vg_stats.*.json: selected_object_classes: got .*, expected at least one name"):
        build(config("vgcolor", **options), "train")
