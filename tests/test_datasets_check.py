import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ade20k_tree import write_ade20k_tree
from omegaconf import OmegaConf
from PIL import Image

from datasets import check
from datasets.scene import Scene, UnreadableScene, allow
from errors import UserError
from show.text import format_table

CFGS = Path(__file__).parent.parent / "cfgs" / "dataset"


class Recorder:
    """Stands for a run."""

    def __init__(self, directory: Path) -> None:
        self.dir, self.said, self.records = directory, [], []

    def say(self, text: str) -> None:
        self.said.append(text)

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(json.loads(json.dumps(record)))


def check_data(tmp_path: Path, dataset: dict[str, Any], workers: int = 0) -> tuple[Recorder, dict, Exception | None]:
    """Run the mode; returns the run, the file it wrote and the error it ended with."""
    run, error = Recorder(tmp_path), None
    cfg = OmegaConf.create({"dataset": dataset, "cache": {"workers": workers}})
    try:
        check.run(cfg, run, format_table)
    except UserError as caught:
        error = caught
    path = tmp_path / "check_data.json"
    return run, json.loads(path.read_text()) if path.exists() else {}, error


def config(name: str, **knobs) -> dict[str, Any]:
    return {**OmegaConf.to_container(OmegaConf.load(CFGS / f"{name}.yaml")), **knobs}


def test_sound_ade20k_tree(tmp_path: Path) -> None:
    tree = write_ade20k_tree(tmp_path, 3, 2, 2, n_objects=5)
    run, found, error = check_data(tmp_path, config("ade20k", root=str(tmp_path)))
    assert error is None
    for split, n in (("train", 3), ("val", 2), ("test", 2)):
        facts = found["splits"][split]
        assert facts["images"] == facts["readable"] == n and facts["unreadable"] == facts["remarks"] == []
        assert facts["report"]["release"] == "ADE20K_2021_17_01" and not facts["report"]["complete"]
        assert facts["sizes"]["most_common"] == {"size": [48, 64], "images": n}
        assert facts["names_in_conflict"] == {} and facts["classes"]["known"] == 150
    written = [w for stem, w in tree.items() if stem.startswith("ADE_train_000000")]
    train = found["splits"]["train"]
    assert train["objects"]["total"] == sum(len(np.unique(w.order[w.order > 0])) for w in written)
    labelled = sum(int((w.raw > 0).sum()) for w in written)
    unmapped = sum(int((w.raw == 461).sum()) for w in written)  # the one name that none of the 150 has
    assert unmapped > 0 and train["unmapped_share"] == pytest.approx(unmapped / labelled)
    assert train["largest_unmapped"][0]["name"] == "central reservation"
    assert found["keys_in_two_splits"] == {}
    assert [(r["kind"], r["split"], r["images"]) for r in run.records] == [
        ("check_data", "train", 3), ("check_data", "val", 2), ("check_data", "test", 2)
    ]  # fmt: skip
    assert any("unmapped" in line for line in run.said) and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_every_bad_file_is_found(tmp_path: Path, on_error: str) -> None:
    tree = write_ade20k_tree(tmp_path, 4, 2, 2)
    stems = list(tree)
    tree[stems[0]].file(".json").unlink()
    tree[stems[1]].file("_seg.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 8)).save(tree[stems[2]].file("_seg.png"))
    tree[stems[3]].file("_parts_1.png").write_bytes(b"no picture")
    tree["ADE_val_00000001"].file(".jpg").unlink()
    run, found, error = check_data(tmp_path, config("ade20k", root=str(tmp_path), on_error=on_error))
    train = found["splits"]["train"]
    assert [key for key, _ in train["unreadable"]] == stems[:3] and train["readable"] == 1
    assert [reason.split()[0].rpartition("/")[2] for _, reason in train["unreadable"]] == [
        "ADE_train_00000001.json", "ADE_train_00000002_seg.png", "ADE_train_00000003_seg.png"
    ]  # fmt: skip
    assert train["remarks"][0][0] == stems[3] and "_parts_1.png" in train["remarks"][0][1]
    assert len(found["splits"]["test"]["unreadable"]) == 1 and found["splits"]["val"]["readable"] == 2
    assert run.records[0]["unreadable"] == 3
    if on_error == "skip":
        assert error is None
    else:
        assert str(error).startswith("4 unreadable scenes, first ADE_train_00000001: ")


def test_worker_processes_find_the_same(tmp_path: Path) -> None:
    tree = write_ade20k_tree(tmp_path, 3, 1, 1)
    tree["ADE_train_00000002"].file(".json").write_text("{")
    alone = check_data(tmp_path, config("ade20k", root=str(tmp_path)))
    helped = check_data(tmp_path, config("ade20k", root=str(tmp_path)), workers=1)
    assert alone[1] == helped[1] and str(alone[2]) == str(helped[2])


def test_folder_and_split_that_cannot_be_opened(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("images", "identity"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("L", (8, 6), 3 if kind == "identity" else 0).save(tmp_path / kind / split / "a.png")
    run, found, error = check_data(tmp_path, config("folder", root=str(tmp_path)))
    assert found["splits"]["train"]["objects"] == {"total": 1, "min": 1, "mean": 1.0, "max": 1, "images_without": 0}
    assert found["splits"]["train"]["unmapped_share"] == 0
    assert "split test: none" in found["splits"]["test"]["cannot_be_opened"]
    assert str(error).startswith("split test cannot be opened")
    assert check_data(tmp_path, config("folder", root=str(tmp_path), on_error="skip"))[2] is None


def test_nothing_to_open_says_why_once(tmp_path: Path) -> None:
    run, found, error = check_data(tmp_path, config("ade20k", root=str(tmp_path / "nowhere")))
    assert "which is no folder" in str(error) and not found and not run.records
    _, _, error = check_data(tmp_path, config("folder", root=str(tmp_path), colour="red"))
    assert "colour" in str(error)


def test_procedural_scenes(tmp_path: Path) -> None:
    dataset = config("scenes", n_train=3, n_val=2, n_test=2, size=32)
    _, found, error = check_data(tmp_path, dataset)
    assert error is None and [f["readable"] for f in found["splits"].values()] == [3, 2, 2]
    assert found["splits"]["train"]["objects"]["min"] >= 1 and found["splits"]["train"]["unmapped_share"] == 0


class Codes:
    """A data set of codes whose second training item breaks in an unforeseen way."""

    classes: list[str] = []
    on_error = "raise"

    def __init__(self, split: str, on_error: str = "raise") -> None:
        self.split = split

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> Scene:
        if self.split == "train" and i == 1:
            raise ZeroDivisionError("unforeseen")
        if self.split == "val" and i == 0:
            raise UnreadableScene("v0", "gone")
        labels = {
            "object_code": torch.tensor([1, 0, 1], dtype=torch.uint8),
            "feature_code": torch.ones(4, dtype=torch.uint8),
            "H_Y_given_F": torch.tensor([2.0]),
        }
        return Scene(torch.zeros(3, 4, 4, dtype=torch.uint8), labels, f"item {i // 2}")

    def fingerprint(self) -> dict[str, Any]:
        return {}

    info = report = fingerprint


def test_codes_and_unforeseen_errors(tmp_path: Path) -> None:
    allow("test_datasets_check")
    run, found, error = check_data(tmp_path, {"_target_": "test_datasets_check.Codes"})
    codes = found["splits"]["test"]["codes"]
    assert codes["object_code"] == {"min": 2, "mean": 2.0, "max": 2} and codes["mean_H_Y_given_F_bits"] == 2.0
    assert found["splits"]["train"]["unreadable"] == [["item 1", "ZeroDivisionError: unforeseen"]]
    assert found["splits"]["val"]["unreadable"] == [["v0", "gone"]]
    assert str(error).startswith("2 unreadable scenes")
    assert found["splits"]["test"]["repeated_keys"] == ["item 0"]
    assert found["keys_in_two_splits"]["train and test"] == ["item 0", "item 1"]


def test_count_values() -> None:
    for values in ([0, 3, 3, 7], [-1, 3, 3, 2**30], []):
        counted = check.count_values(torch.tensor(values, dtype=torch.int32))
        assert counted == {v: values.count(v) for v in values}
