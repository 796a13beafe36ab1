"""The contract of a data set, held by every file of cfgs/dataset, and the door that builds it and calls nothing else."""

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_trees import CONFIGS, SPLITS, TREES
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from program import configured

from datasets.scene import METHODS, MOVED, DataSet, Scene, UnreadableScene, build, find_class
from errors import UserError

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def config(name: str, **options: Any) -> Any:
    with initialize_config_dir(str(CONFIGS.parent), version_base="1.3"):
        cfg = compose("config", [f"dataset={name}"])
    return OmegaConf.merge(cfg.dataset, options)


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, tmp_path: Path) -> None:
    cfg = config(name, **TREES[name](tmp_path))
    kinds, fingerprints = set(), []
    for split in SPLITS:
        data = build(cfg, split)
        assert len(data) > 0 and data.on_error == "raise"
        fingerprints.append(json.dumps(data.fingerprint()))
        assert fingerprints[-1] == json.dumps(build(cfg, split).fingerprint()), "it must not depend on anything but the data"
        assert all(isinstance(value, float) for value in data.info().values())
        json.dumps([data.report(), list(data.classes)])
        keys = set()
        for i, scene in ((i, data[i]) for i in range(min(len(data), 4))):
            check_scene(scene, data.classes)
            keys.add(scene.key)
            kinds.add(tuple(sorted(scene.labels)))
            again = pickle.loads(pickle.dumps(data))[i]  # what a worker process gets
            assert again.key == scene.key and torch.equal(again.image, scene.image)
            assert all(torch.equal(again.labels[label], scene.labels[label]) for label in scene.labels)
        assert len(keys) == min(len(data), 4)
    assert len(kinds) == 1, "all items have the same labels"
    assert len(set(fingerprints)) == len(SPLITS)


def check_scene(scene: Any, classes: Any) -> None:
    assert isinstance(scene, Scene) and isinstance(scene.key, str) and scene.key
    assert scene.image.dtype == torch.uint8 and scene.image.ndim == 3 and scene.image.shape[0] == 3
    labels = scene.labels
    assert set(labels) & {"identity", "class", "object_code"}
    for name in ("identity", "class", "raw_class"):
        if name in labels:
            assert labels[name].dtype == torch.int32 and labels[name].shape == scene.image.shape[1:]
            assert int(labels[name].min()) >= -1
    if "class" in labels:
        assert int(labels["class"].max()) < len(classes) and all(isinstance(entry, str) for entry in classes)
    if "object_code" in labels:
        assert {labels[name].dtype for name in ("object_code", "feature_code")} == {torch.uint8}
        assert labels["H_Y_given_F"].shape == (1,) and labels["H_Y_given_F"].dtype == torch.float32
        assert labels["feature_code"].shape == (sum(map(len, classes)),)


def test_every_config_has_a_tree() -> None:
    assert sorted(TREES) == NAMES


def test_the_contract_is_what_the_protocol_writes_down() -> None:
    written = {name for name in vars(DataSet) if inspect.isfunction(vars(DataSet)[name]) and vars(DataSet)[name].__doc__}
    assert set(METHODS) == written - {"__init__", "__subclasshook__"}
    assert set(DataSet.__annotations__) == {"classes", "on_error"}


# ------------------------------------------------------------------------------------------------------------- the door


def test_former_names_still_work() -> None:
    for former, present in MOVED.items():
        assert find_class(former) is find_class(present)
    stored = OmegaConf.load(CONFIGS / "scenes.yaml")  # as a run of an earlier version wrote it: no option allow
    stored = OmegaConf.merge(stored, {"_target_": "datasets.scenes.Scenes", "n_val": 2})
    assert len(build(stored, "val")) == 2


HOSTILE = [
    "os.system", "torch.load", "torch.serialization.load", "numpy.load", "torch.hub.load_state_dict_from_url",
    "shutil.copyfile", "timm.models.load_state_dict", "os.mkdir", "pathlib.Path.touch", "pathlib.Path.write_text",
    "files.write_atomically",
    "hydra.utils.instantiate", "builtins.eval", "subprocess.Popen", "foo.bar", "nodots", "", "datasets", "datasets.",
    "datasets.scenes.Nope",
    "datasets.procedural.Nope", "datasets.nowhere.Scenes", "datasets.procedural.np.load",
    "datasets.export.export", "datasets.export.run", "datasets.scene.Path", "datasets.scene.build",
    "datasets.codes.CodeScenes",
    "datasets.scene.DataSet", "datasets.check.Tally", "datasets..scene.Scene", "datasets.procedural.Scenes()", None, 5,
    ["datasets.procedural.Scenes"], "../datasets.procedural.Scenes", "datasets.\0.Scenes", "datasets.procedural.Scenes\n",
]  # fmt: skip


@pytest.mark.parametrize("target", HOSTILE, ids=str)
def test_no_other_target_is_called(target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^dataset\._target_"):
        build({"_target_": target, "path": "made", "f": "made", "command": "touch made", "on_error": "raise"}, "train")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"size": {"_target_": "torch.load", "f": "x", "weights_only": False}}, r"dataset\.size\._target_"),
        ({"objects": [3, {"_target_": "os.mkdir", "path": "made"}]}, r"dataset\.objects\[1\]\._target_"),
        ({"_partial_": True}, r"dataset\._partial_"),
        ({"_args_": ["train"]}, r"dataset\._args_"),
        ({"_recursive_": False}, r"dataset\._recursive_"),
        ({"_convert_": "all"}, r"dataset\._convert_"),
        ({"size": {"deep": [{"_partial_": True}]}}, r"dataset\.size\.deep\[0\]\._partial_"),
    ],
)
def test_nothing_nested_is_called(options: dict, place: str) -> None:
    with pytest.raises(UserError, match=f"^{place}: a data set is built from plain values"):
        build({"_target_": "datasets.procedural.Scenes", **options}, "train")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": "big"}, r"dataset.size: got 'big', expected a whole number or a list"),
        ({"noise": "much"}, r"dataset.noise: got 'much', expected a number"),
        ({"noise": True}, r"dataset.noise: got True, expected a number"),
        ({"seed": None}, r"dataset.seed: got None, expected a whole number"),
        ({"objects": {"fewest": 3}}, r"dataset.objects: got \{.*\}, expected a list"),
        ({"objects": [3, "six"]}, r"dataset.objects: got \[.*\], expected a list"),
        ({"on_error": 1}, r"dataset.on_error: got 1, expected a text"),
        ({"on_error": "pass"}, r"dataset.on_error: got 'pass', expected raise or skip"),
        ({"n_train": 99999999999}, r"dataset.n_train: got 99999999999, expected a number below 2147483648"),
        ({"seed": 10**400}, r"dataset.seed: got 1000.*, expected a number below"),
        ({"noise": float("inf")}, r"dataset.noise: got inf, expected a number below"),
        ({"noise": float("nan")}, r"dataset.noise: got nan, expected a number below"),
        ({"colour": 1}, r"dataset.colour: Scenes takes no such option; it takes .*n_train"),
        ({"split": "val"}, r"dataset.split: Scenes takes no such option"),
    ],
)
def test_options_are_checked_before_the_class_is_called(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        build({"_target_": "datasets.procedural.Scenes", **options}, "train")


def test_an_option_without_value_is_named() -> None:
    with pytest.raises(UserError, match=r"^dataset.root has no value; give it one on the command line: dataset.root=…$"):
        build({"_target_": "datasets.folder.Folder"}, "train")


OWN = '''
import torch
from datasets.scene import Scene

print("imported")

class Mine:
    classes, on_error = ["background", "thing"], "raise"

    def __init__(self, split, n=2):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Scene(torch.zeros(3, 8, 8, dtype=torch.uint8), {"class": torch.zeros(8, 8, dtype=torch.int32)}, str(i))

    def fingerprint(self):
        return {"n": self.n}

    def info(self):
        return {}

    def report(self):
        return {}

class Short:
    def __init__(self, split):
        print("called")
'''


def test_a_package_of_ones_own_needs_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "data.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = {"_target_": "my_package.data.Mine", "n": 3, "allow": "my_package"}  # as a file would have it
    with pytest.raises(UserError, match=r"allow a package of your own on the command line: dataset\.allow=my_package"):
        build(cfg, "train")
    assert capsys.readouterr().out == "", "nothing of it was imported"
    with configured("dataset._target_=x", "dataset.allow=other") as composed:
        assert composed.dataset.allow == "other"
        with pytest.raises(UserError, match="which is no data set of this program"):
            build(cfg, "train")
    with configured("dataset.allow=[other,my_package]"):
        assert len(build(cfg, "train")) == 3
        with pytest.raises(UserError, match=r"my_package.data.Short is no data set: it has no __len__"):
            build({"_target_": "my_package.data.Short"}, "train")
        with pytest.raises(UserError, match="which is no data set of this program"):
            build({"_target_": "os.system", "command": "true"}, "train")
    assert "called" not in capsys.readouterr().out
    assert HydraConfig.instance().cfg is None


def test_an_unreadable_scene_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(UnreadableScene("a", "torn")))
    assert (str(error), error.key, error.reason) == ("a: torn", "a", "torn")
