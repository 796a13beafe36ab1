"""Every mode from its command to its files, on a two-block backbone; what one mode leaves is what the next one reads."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from ade20k_tree import write_ade20k_tree
from omegaconf import OmegaConf
from PIL import Image
from program import FIT, MODEL, ROOT, SCENES, TINY, Finished, configured, run

import main
import options
from backbones.timm_vit import TimmViT
from datasets.scene import build
from errors import UserError
from pairs.layer_curve import write_layer_curve
from runs.adopt import adopt
from runs.run import Run, read_config

SHORT = [*TINY, "model.layers=[embed,0]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache and one folder of outputs for all tests of this file."""
    return tmp_path_factory.mktemp("program")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Finished:
    """The default mode with all its controls."""
    return run(folder, *TINY, "controls=all")


def scores(finished: Finished) -> list[dict[str, Any]]:
    """The records of a probe's scores, without the mode they were made in."""
    found = [r for r in finished.records() if r["kind"] == "score" and r["name"] == "probe"]
    return [{k: v for k, v in r.items() if k != "mode"} for r in found]


@pytest.mark.parametrize("path", sorted((ROOT / "cfgs" / "mode").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_mode_composes_and_names_an_entry(path: Path) -> None:
    with configured(f"mode={path.stem}") as cfg:
        options.check(cfg)
        assert cfg.mode == path.stem and callable(main.find_entry(cfg))


def test_the_default_run_leaves_records_curve_checkpoints_and_provenance(trained: Finished) -> None:
    records = trained.records()
    # The backbone is random already, so there is no control of that name.
    controls = {"position", "pixels", "pixels_position", "class_oracle", "cosine", "dot_product", "shuffled"}
    assert {r["name"] for r in records} == {"probe"} | controls
    assert {r["kind"] for r in records} == {"score", "validation", "choice", "gain"}
    assert {(r["protocol"], r["model"], r["dataset"], r["probe"]) for r in records} == {
        ("clean", "demo_vit", "scenes", "quadratic")
    }
    seeds = {r["seed"] for r in records if (r["kind"], r["name"]) == ("score", "probe")}
    assert seeds == {0, 1, "mean"} and {r["layer"] for r in records if r["name"] == "probe"} == {"embed", 0, 1}
    of_probe = [r for r in records if (r["name"], r.get("seed"), r["subset"]) == ("probe", "mean", "all")]
    assert trained.objective == max(r["metrics"]["auroc"] for r in of_probe if r["kind"] == "validation")
    means = [r for r in of_probe if r["kind"] == "score"]
    for record in means:
        low, high = record["interval"]["auroc"]
        assert low <= record["metrics"]["auroc"] <= high
    facts = json.loads((trained.dir / "run.json").read_text())
    assert facts["status"] == "finished" and facts["inputs"]["probe"]["train"]["activations"]
    assert read_config(trained.dir).trainer.seeds == 2
    names = {path.name for path in trained.dir.iterdir()}
    assert {"layers.csv", "layers.png", "history.jsonl", "checkpoints", "config.yaml", "log.txt"} <= names
    assert (trained.dir / "layers.csv").read_text().count("\n") > 50


def test_a_finished_run_is_shown_again_without_a_backbone_or_a_new_record(
    folder: Path, trained: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a cached run built a backbone")

    monkeypatch.setattr("store.extract.load_backbone", refuse)
    monkeypatch.setattr(TimmViT, "load", refuse)
    before = (trained.dir / "metrics.jsonl").read_bytes(), (trained.dir / "history.jsonl").read_bytes()
    assert run(folder, *TINY, "controls=all") == trained
    assert before == ((trained.dir / "metrics.jsonl").read_bytes(), (trained.dir / "history.jsonl").read_bytes())


def test_the_embedded_backbone_is_found_from_any_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished = run(folder, *SCENES, *FIT, "model.layers=[7]", "controls=[random]")
    records = {r["name"]: r for r in finished.records() if (r["kind"], r.get("seed"), r["subset"]) == ("score", "mean", "all")}
    assert records.keys() == {"probe", "random"} and records["probe"]["metrics"] != records["random"]["metrics"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "probe", ["linear", "diag_quadratic", "quadratic_fixed_rank", "mlp", "attention", "attention_low_rank", "cosine"]
)
def test_every_pairwise_probe_runs(folder: Path, probe: str) -> None:
    finished = run(folder, *SHORT, f"probe.mode={probe}", "probe.rank=4", "probe.hidden=8")
    assert 0 <= finished.objective <= 1
    assert {r["probe"] for r in finished.records()} == {probe}


@pytest.mark.parametrize(("mode", "questions"), [
    ("train_class", {"is_same_object", "same_class", "class"}), ("train_identity", {"is_same_object", "same_class"}),
])  # fmt: skip
def test_class_and_identity_are_scored_on_both_questions(folder: Path, mode: str, questions: set[str]) -> None:
    finished = run(folder, *SHORT, f"mode={mode}", "controls=[position,class_oracle]", "probe.n_queries=8")
    records = finished.records()
    assert {r["question"] for r in records if r["name"] == "probe"} == questions
    assert {r["name"] for r in records} == {"probe", "position", "class_oracle"}
    again = run(folder, "mode=eval", f"run={finished.dir}", "wandb.mode=disabled")
    assert scores(again) == scores(finished)


def test_extract_fills_the_cache_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    written = []
    for _ in range(2):
        finished = run(tmp_path, *SHORT, "mode=extract", "resume=false")
        written.append(sum(p.stat().st_size for p in (tmp_path / "cache" / "tokens").rglob("*.safetensors")))
    assert written[0] == written[1] > 0
    assert [r["split"] for r in finished.records()] == ["train", "val", "test"]
    assert capsys.readouterr().out.count("extracting") == 3  # all by the first one


# ------------------------------------------------------------------------------------------------------- looking again


def test_eval_reproduces_the_recorded_numbers(folder: Path, trained: Finished) -> None:
    with mock.patch("pairs.layer_curve.write_layer_curve", wraps=write_layer_curve) as drawn:
        again = run(folder, "mode=eval", f"run={trained.dir}", "wandb.mode=disabled")
    assert again.dir != trained.dir and again.objective == trained.objective
    rows = [row for row in drawn.call_args.args[0] if row["metric"] == "auroc"]  # the figure shows the run and its controls too
    assert {row["name"] for row in rows} == {"probe", "source"} | {r["name"] for r in trained.records() if r.get("control")}
    values = {name: [row["value"] or float("nan") for row in rows if row["name"] == name] for name in ("probe", "source")}
    assert values["probe"] == pytest.approx(values["source"], nan_ok=True)
    with open(again.dir / "layers.csv", newline="") as file:
        first = next(csv.DictReader(file))
    assert (first["model"], first["data"], first["probe"], first["n"]) == ("demo_vit", "scenes", "quadratic", "8")
    assert scores(again) == scores(trained)  # names, values, intervals, distance bins: equal to the last digit
    assert {r["mode"] for r in again.records()} == {"eval"}


def test_eval_takes_another_split_checkpoint_or_data_set(folder: Path, trained: Finished) -> None:
    base = ["mode=eval", f"run={trained.dir}", "wandb.mode=disabled"]
    of = lambda finished: [r["metrics"]["auroc"] for r in scores(finished) if (r["subset"], r["seed"]) == ("all", "mean")]
    val = run(folder, *base, "eval.split=val")
    noisy = run(folder, *base, "dataset.noise=1")  # the rest of the run's own data set stays
    with pytest.raises(SystemExit, match="unknown eval.checkpoint 'nonsense'; valid: best, last"):
        run(folder, *base, "eval.checkpoint=nonsense")
    last = run(folder, *base, "eval.checkpoint=last")
    assert {r["split"] for r in val.records()} == {"val"} and val.objective == trained.objective and of(val) != of(trained)
    assert of(noisy) != of(trained) and noisy.records()[0]["n_images"] == 8
    assert scores(last) == scores(trained)  # one epoch: the best is the last
    assert len({val.dir, noisy.dir, last.dir}) == 3


def test_eval_of_the_newest_run_never_repeats_an_older_one(tmp_path: Path) -> None:
    found = []
    for probe in ("cosine", "dot_product"):
        fitted = run(tmp_path, *SHORT, f"probe.mode={probe}")
        found.append(run(tmp_path, "mode=eval", "wandb.mode=disabled"))
        assert scores(found[-1]) == scores(fitted) and found[-1].records()[0]["probe"] == probe
    assert found[0].dir != found[1].dir


@pytest.mark.parametrize(
    "other", ["model=dinov2_base", "model.layers=[0]", "probe.mode=linear", "protocol=object_binding_2025", "trainer.lr=5"]
)
@pytest.mark.parametrize("mode", ["eval", "vis"])
def test_looking_at_a_run_with_something_else_than_it_was_fitted_with_is_refused(
    folder: Path, trained: Finished, mode: str, other: str
) -> None:
    with pytest.raises(SystemExit, match=r"error: .* was fitted with another .* leave .* out"):
        run(folder, f"mode={mode}", f"run={trained.dir}", "wandb.mode=disabled", other)


def test_eval_refuses_a_probe_of_other_weights(folder: Path, trained: Finished, tmp_path: Path) -> None:
    altered = shutil.copytree(trained.dir, tmp_path / "altered")
    config = altered / "config.yaml"
    text = config.read_text()
    assert "\n  seed: 0\n" in text.partition("model:")[2]
    head, _, tail = text.partition("model:")
    config.write_text(head + "model:" + tail.replace("\n  seed: 0\n", "\n  seed: 1\n", 1))
    with pytest.raises(SystemExit, match="was fitted on the backbone weights random:0, those at hand are random:1"):
        run(folder, "mode=eval", f"run={altered}", "wandb.mode=disabled")


def test_eval_refuses_a_checkpoint_of_another_probe_and_names_what_is_missing(
    folder: Path, trained: Finished, tmp_path: Path
) -> None:
    mixed = shutil.copytree(trained.dir, tmp_path / "mixed")
    linear = run(folder, *TINY, "probe.mode=linear")
    shutil.rmtree(mixed / "checkpoints")
    asked = ["mode=eval", f"run={mixed}", "wandb.mode=disabled"]
    with pytest.raises(SystemExit, match="holds no best checkpoint of probe"):
        run(folder, *asked)
    shutil.copytree(linear.dir / "checkpoints", mixed / "checkpoints")
    with pytest.raises(SystemExit, match=r"was fitted with another probe.mode than .*config.yaml says; one of the two"):
        run(folder, *asked)
    file = next((mixed / "checkpoints" / "probe").glob("best*"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SystemExit, match=rf"{file} is damaged .*; delete it and repeat the command that wrote it"):
        run(folder, *asked)


def test_a_class_read_out_is_not_asked_for_other_classes(folder: Path, tmp_path: Path) -> None:
    fitted = run(folder, *SHORT, "mode=train_class")
    root = tmp_path / "mine"
    write_folder(root)
    (root / "classes.txt").write_text("".join(f"thing {i}\n" for i in range(20)))
    asked = ["mode=eval", f"run={fitted.dir}", "wandb.mode=disabled", "dataset=folder", f"dataset.root={root}"]
    with pytest.raises(SystemExit, match=r"the checkpoint names 8 classes .* these images have 20 \(thing 0, thing 1"):
        run(tmp_path, *asked, "dataset.test_fraction=0.5")


def test_a_run_of_the_version_before_is_scored_and_shown(tmp_path: Path) -> None:
    """The run directory as that version left it: other names of keys and classes, checkpoints without a digest."""
    stored = ROOT / "tests" / "golden" / "runs" / "last_version"
    recorded = [json.loads(line) for line in (stored / "metrics.jsonl").read_text().splitlines()]
    before = {(r["layer"], r["block"]): r["metrics"]["auroc"] for r in recorded if r["metrics"].get("auroc") is not None}
    again = run(tmp_path, "mode=eval", f"run={stored}", "wandb.mode=disabled")
    subset = lambda r: r.get("subset", r.get("block"))
    now = {(r["layer"], subset(r)): r["metrics"]["auroc"] for r in again.records() if r.get("seed") == "mean"}
    assert len(before) >= 4
    assert {key: now[key] for key in before} == pytest.approx(before, abs=1e-5)
    shown = run(tmp_path, "mode=vis", f"run={stored}", "vis.gif=false", "wandb.mode=disabled")
    assert list(shown.dir.rglob("*.png"))


HOSTILE = {  # changes of config.yaml that would call, load, write or read something if they were believed
    "dataset.size": {"_target_": "torch.load", "f": "MARK.pt", "weights_only": False},
    "dataset.n_val": {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": ["MARK"]}]},
    "dataset._target_": "os.mkdir",
    "dataset._partial_": True,
    "dataset._args_": ["MARK"],
    "dataset": {"_target_": "shutil.copyfile", "allow": "shutil"},
    "task": "os.system",
    "model.source": "os.system",
    "model.kwargs": {"checkpoint_path": "MARK.pt"},
    "probe.mode": {"_target_": "os.mkdir", "path": "MARK"},
    "protocol.name": "${oc.create:MARK}",
}


@pytest.mark.parametrize("mode", ["eval", "vis"])
@pytest.mark.parametrize("key", HOSTILE)
def test_a_run_directory_of_somebody_else_runs_no_code(
    folder: Path, trained: Finished, tmp_path: Path, mode: str, key: str
) -> None:
    mark = tmp_path / "mark"
    torch.save({"a": Bomb(str(mark))}, f"{mark}.pt")
    hostile = shutil.copytree(trained.dir, tmp_path / "hostile")
    text = json.dumps(HOSTILE[key]).replace("MARK", str(mark))
    config = OmegaConf.load(hostile / "config.yaml")
    OmegaConf.update(config, key, json.loads(text), force_add=True, merge=False)
    (hostile / "config.yaml").write_text(OmegaConf.to_yaml(config))
    with pytest.raises(SystemExit, match="^error: ") as caught:
        run(folder, f"mode={mode}", f"run={hostile}", "wandb.mode=disabled")
    assert "\n" not in str(caught.value)
    assert not mark.exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def test_programs_that_a_stored_configuration_names_are_not_started() -> None:
    with configured("dataset=occlusionclevr", "mode=eval") as cfg:
        stored = OmegaConf.create(OmegaConf.to_container(cfg))
        stored.dataset.update(blender_path="/tmp/evil", clevr_gen_dir="/tmp/evil", use_cache_only=False)
    with configured("mode=eval", "dataset.on_error=skip") as cfg:
        adopted = adopt(stored, cfg, Path("run"))
    assert (adopted.dataset.blender_path, adopted.dataset.clevr_gen_dir) == (None, None)
    assert adopted.dataset.use_cache_only is True and adopted.dataset.on_error == "skip"


def test_vis_shows_the_run(folder: Path, trained: Finished) -> None:
    finished = run(folder, "mode=vis", f"run={trained.dir}", "vis.image=1", "wandb.mode=disabled")
    endings = sorted(p.suffix for p in finished.dir.glob("test-0-0000001_*"))
    assert endings == [".gif", ".json", ".png", ".safetensors"]
    facts = json.loads(next(finished.dir.glob("test-*.json")).read_text())
    assert facts["layers"] == ["embed", 0, 1] and facts["run"] == str(trained.dir)


# ----------------------------------------------------------------------------------------------------- data, protocols


def test_check_data_counts(folder: Path) -> None:
    finished = run(folder, *TINY, "mode=check_data")
    assert [(r["split"], r["images"]) for r in finished.records()] == [("train", 16), ("val", 8), ("test", 8)]
    assert (finished.dir / "check_data.json").exists()


@pytest.fixture(scope="module")
def ade20k(folder: Path) -> list[str]:
    """A tiny tree of the full release."""
    write_ade20k_tree(folder / "ade", n_train=2, n_val=2, n_test=2, size=(96, 128))
    return [*MODEL, *FIT, "dataset=ade20k", f"dataset.root={folder}/ade", "model.layers=[0]"]


@pytest.mark.parametrize("protocol", ["clean", "object_binding_2025", "object_binding_2026"])
def test_ade20k_under_every_protocol(folder: Path, ade20k: list[str], protocol: str) -> None:
    finished = run(folder, *ade20k, f"protocol={protocol}", "protocol.selection.patches=64")
    (name,) = {r["protocol"] for r in finished.records()}
    changed = name.removeprefix(protocol)  # the published ones set the optimiser too, which these tests cut short
    assert (changed == "") == (protocol == "clean") and changed.startswith(", changed: " if changed else "")
    assert finished.objective is not None
    fits = {"clean": 4}.get(protocol, 2)  # seeds × pairs seen
    assert len(finished.records("history.jsonl")[0]["val_loss"]) == fits


def write_folder(root: Path) -> list[str]:
    """Twelve scenes as a user's own folder of images."""
    with configured("dataset.n_train=12") as cfg:
        scenes = build(cfg.dataset, "train")
    for kind in ("images", "identity", "class"):
        (root / kind).mkdir(parents=True)
    for i in range(12):
        scene = scenes[i]
        Image.fromarray(scene.image.permute(1, 2, 0).numpy()).save(root / "images" / f"{i:02d}.png")
        for kind in ("identity", "class"):
            Image.fromarray(scene.labels[kind].to(torch.uint8).numpy()).save(root / kind / f"{i:02d}.png")
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in scenes.classes[1:]))
    splits = ["dataset.val_fraction=0.34", "dataset.test_fraction=0.34"]
    return [*MODEL, *FIT, "dataset=folder", f"dataset.root={root}", *splits, "model.layers=[0]"]


def test_a_folder_of_ones_own_images(tmp_path: Path) -> None:
    asked = write_folder(tmp_path / "mine")
    checked = run(tmp_path, *asked, "mode=check_data")
    assert sum(r["readable"] for r in checked.records()) == 12
    first = run(tmp_path, *asked)
    assert {r["dataset"] for r in first.records()} == {"folder"} and first.objective is not None

    # Another picture in its place: nothing of the first run may be taken for a result on it.
    old = (first.dir / "metrics.jsonl").read_bytes()
    for path in sorted((tmp_path / "mine" / "images").iterdir()):
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    second = run(tmp_path, *asked)
    assert second.dir == first.dir and (first.dir / "superseded-1" / "metrics.jsonl").read_bytes() == old
    assert (second.dir / "metrics.jsonl").read_bytes() != old
    assert "were moved to superseded-1" in (second.dir / "log.txt").read_text()

    # A file cut short is named; on request it is left out and counted.
    broken = tmp_path / "mine" / "images" / "03.png"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(SystemExit, match=r"error: .*03.*dataset\.on_error=skip"):
        run(tmp_path, *asked)
    with pytest.raises(SystemExit, match=r"error: 1 unreadable scenes, first 03"):
        run(tmp_path, *asked, "mode=check_data")
    run(tmp_path, *asked, "dataset.on_error=skip")
    Image.new("L", (7, 5)).save(tmp_path / "mine" / "identity" / "05.png")
    with pytest.raises(SystemExit, match=r"error: 2 unreadable scenes"):
        run(tmp_path, *asked, "mode=check_data")
    assert "05.png is 7x5 pixels, its image 96x96" in (checked.dir / "log.txt").read_text()


# -------------------------------------------------------------------------------------------------------- the mirror


class Mirror:
    """Stands for a W&B run."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.artifacts, self.exit_code, self.id = given, [], [], None, given["id"] or "new"

    def define_metric(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(sorted(artifact.manifest.entries))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def mirrors(monkeypatch: pytest.MonkeyPatch) -> list[Mirror]:
    import wandb

    opened: list[Mirror] = []

    def init(**given: Any) -> Mirror:
        opened.append(Mirror(**given))
        return opened[-1]

    monkeypatch.setattr(wandb, "init", init)
    return opened


def test_the_mirror_gets_the_curve_and_is_closed(folder: Path, mirrors: list[Mirror]) -> None:
    finished = run(folder, *SHORT, "wandb.mode=offline", "wandb.project=mine", "seed=7")
    (mirror,) = mirrors
    assert mirror.exit_code == 0 and mirror.given["project"] == "mine" and mirror.given["dir"] == finished.dir
    curve = [row for row in mirror.logged if "layer_index" in row]
    assert [row["layer_index"] for row in curve] == [0, 1] and max(map(len, mirror.logged)) <= 13  # the columns of the table
    of_all = {r["layer_index"]: r for r in scores(finished) if (r["seed"], r["subset"]) == ("mean", "all")}
    for row in curve:
        record = of_all[row["layer_index"]]
        assert row["all pairs AUROC/probe"] == record["metrics"]["auroc"]
        assert [row[f"all pairs AUROC/probe {end}"] for end in ("low", "high")] == record["interval"]["auroc"]
    epochs = [record for record in finished.records("history.jsonl") if record["kind"] == "epoch"]
    (losses,) = [row for row in mirror.logged if "epoch" in row]  # of the one epoch there is
    assert losses["loss/probe/val"] == pytest.approx(float(torch.tensor(epochs[0]["val_loss"]).mean()))
    (table,) = [row["losses"] for row in mirror.logged if "losses" in row]
    assert len(table.data) == sum(len(record["fits"]) * 2 for record in epochs)  # a row per fit and layer
    assert any("figures/layers" in row for row in mirror.logged) and any("layers" in row for row in mirror.logged)
    assert {"metrics.jsonl", "layers.csv", "table.txt", "config.yaml"} <= set(mirror.artifacts[0])
    again = run(folder, "mode=eval", f"run={finished.dir}", "wandb.mode=offline")  # which fits nothing: no history.jsonl
    assert len(mirrors[1].artifacts) == 1 and "not mirrored" not in (log := (again.dir / "log.txt").read_text())
    stages = [line for line in log.splitlines() if line.startswith("[")]
    assert stages == ["[1 of 3] activations", "[2 of 3] scores", "[3 of 3] table and figure"]


def test_nothing_is_mirrored_where_there_is_nothing_new(folder: Path, mirrors: list[Mirror]) -> None:
    with pytest.raises(SystemExit, match="there is no layer 9"):
        run(folder, *TINY, "model.layers=[9]", "wandb.mode=offline")
    assert mirrors == []
    for _ in range(2):
        run(folder, *SHORT, "wandb.mode=offline", "seed=8")
        assert [mirror.exit_code for mirror in mirrors] == [0]  # the second one shows what is there


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), UserError("a mistake")], ids=lambda stop: type(stop).__name__)
def test_a_failed_run_is_marked_as_such(
    folder: Path, mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch, stop: BaseException
) -> None:

    def fail(cfg: object, run: Run) -> None:
        run.write({"kind": "epoch", "name": type(stop).__name__})
        raise stop

    monkeypatch.setattr("pairs.task.run", fail)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(folder, *TINY, "wandb.mode=offline")
    assert [mirror.exit_code for mirror in mirrors] == [1]


def test_only_extraction_is_shared_by_ranks_and_only_the_first_is_mirrored(
    folder: Path, mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="error: mode=train runs in one process; torchrun shares the work of mode=extract"):
        run(folder, *TINY, "wandb.mode=offline")
    assert mirrors == []
