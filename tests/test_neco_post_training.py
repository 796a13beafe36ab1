"""mode=neco as a program: its files and table, exact continuation, weights every mode can load, mistakes in a sentence."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from program import ROOT, Finished, configured, run
from safetensors.torch import load_file

import files
import options
from backbones.load import backbone_facts, load_backbone
from errors import UserError
from neco.recipe import read_recipe
from neco.training import Step, Training
from runs.states import load_state

VIT = "{img_size: 32, patch_size: 8, embed_dim: 16, depth: 2, num_heads: 2}"
TINY = [
    "mode=neco", "wandb.mode=disabled", "trainer.n_boot=20", "threads=1",
    "model.pretrained=false", "model.weights=null", "model.digest=null", f"model.kwargs={VIT}",
    "dataset.size=32", "dataset.n_train=12", "dataset.n_val=4", "dataset.n_test=4",
    "neco.crops.sizes=[32,16]", "neco.crops.numbers=[2,1]", "neco.images.workers=0", "neco.batch_images=4", "neco.epochs=2",
    "neco.grid=3", "neco.queue_length=64", "neco.head_hidden=16", "neco.head_out=8", "neco.drop_path=0.2",
    "neco.lr_backbone=1e-3", "neco.images.limit=9", "neco.evaluate.memory_images=12",
    "neco.evaluate.n_clusters=10", "neco.evaluate.seeds=1", "neco.evaluate.linear_epochs=1",
]  # fmt: skip
QUICK = [*TINY, "neco.evaluate.every=0", "neco.evaluate.final=false"]


class Killed(BaseException):
    """What a kill leaves: nothing after it runs."""


def stopped_after(step: int, how: Any) -> Any:
    """Let the training be hit after so many steps of one process."""
    take, taken = Training.step, []

    def hit(self: Training, parts: list) -> Step:
        found = take(self, parts)
        taken.append(found)
        if len(taken) == step:
            how()
        return found

    return mock.patch.object(Training, "step", hit)


def kill() -> None:
    raise Killed


MIRROR = mock.MagicMock(id="neco")  # stands for a run on W&B


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    with mock.patch("wandb.init", lambda **_: MIRROR):
        yield run(tmp_path_factory.mktemp("whole"), *TINY, "wandb.mode=offline")


def test_files_and_records(whole: Finished) -> None:
    steps = whole.records("history.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]  # 9 images, batches of 4: the rest of an epoch is left out
    assert all(row["loss"] > 0 and len(row["by_pair"]) == 4 for row in steps)
    scores = [row for row in whole.records() if row["kind"] == "neco_scores"]
    assert [row["epoch"] for row in scores] == [0, 1, 2] and {row["split"] for row in scores} == {"val"}
    results = {row["name"]: row for row in whole.records() if row["kind"] == "neco_result"}
    assert {"retrieval miou", "overcluster K=9 miou", "overcluster K=10 miou", "linear miou"} <= results.keys()
    for row in results.values():
        assert row["split"] == "test" and row["gain"] == pytest.approx(row["after"] - row["before"])
        assert row["gain_low"] <= row["gain"] + 1e-9 and row["gain"] - 1e-9 <= row["gain_high"]
    assert whole.objective == max(row["selected"] for row in scores[1:])
    for name in ("training", "scores", "nearest_patches", "sorted_references"):
        assert (whole.dir / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (whole.dir / "log.txt").read_text()
    assert "before" in text and "gain" in text and "linear miou" in text


def test_checkpoints_say_what_they_are_and_load_as_a_backbone(whole: Finished) -> None:
    for role in ("student", "teacher"):
        state = load_state(whole.dir / f"{role}.safetensors", {"kind": "neco", "role": role, "step": 4})
        assert state.checked and state.recipe["recipe"]["network"] == "bitonic" and state.recipe["provenance"]["code"]
        assert {"cls_token", "blocks.1.mlp.fc2.weight", "projection_head.4.weight"} <= state.tensors.keys()
    with configured(f"model.kwargs={VIT}", f"model.weights={whole.dir}/teacher.safetensors", "model.digest=null") as cfg:
        backbone = load_backbone(cfg.model, "cpu", lambda text: None)
    expected = load_file(whole.dir / "teacher.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in backbone.model.state_dict().items())


def test_the_mirror_gets_losses_and_scores(whole: Finished) -> None:
    sent = [call.args[0] for call in MIRROR.log.call_args_list]
    losses = {row["step"]: row["loss"] for row in sent if "loss" in row}
    assert losses == {row["step"]: row["loss"] for row in whole.records("history.jsonl")}
    scores = [row for row in sent if "val/retrieval miou" in row]
    assert [row["step"] for row in scores] == [0, 2, 4]
    assert max(row["val/retrieval miou"] for row in scores[1:]) == whole.objective
    gains = {row["name"]: row["gain"] for row in whole.records() if row["kind"] == "neco_result"}
    assert [row["test/linear miou/gain"] for row in sent if "test/linear miou/gain" in row] == [gains["linear miou"]]
    MIRROR.finish.assert_called_once_with(exit_code=0)


@pytest.fixture(scope="module")
def places(whole: Finished) -> tuple[Path, dict[str, Finished]]:
    """Where runs on the trained networks go, with a probe of each role, which later modes look at."""
    folder = whole.dir.parent.parent.parent
    return folder, {role: run(folder, *on(whole, role), "probe.mode=quadratic") for role in ("student", "teacher")}


def on(whole: Finished, role: str) -> list[str]:
    """Settings of a tiny run on a trained network."""
    model = [f"model.kwargs={VIT}", f"model.weights={whole.dir}/{role}.safetensors", "model.digest=null"]
    fits = ["trainer.epochs=1", "trainer.seeds=1", "trainer.n_boot=10", "controls=none", "wandb.mode=disabled", "threads=1"]
    return [*model, *fits, "dataset.n_train=8", "dataset.n_val=4", "dataset.n_test=4"]


def test_probes_of_student_and_teacher_rest_on_different_weights(places: tuple[Path, dict[str, Finished]]) -> None:
    read = [json.loads((done.dir / "run.json").read_text())["inputs"] for done in places[1].values()]
    assert read[0] != read[1] and all(done.objective is not None for done in places[1].values())


@pytest.mark.parametrize(
    ("role", "mode"),
    [
        ("teacher", ["mode=extract", "dataset.size=32"]),
        ("student", ["mode=train_binding", "probe.mode=quadratic_concat", "model.output_mode=mean_spatial",
                     "model.layers=[0,-1]", "dataset.image_size=48", "dataset.obj_size=8"]),
        ("teacher", ["mode=dense_suite", "dataset.size=32", "model.layers=[-1]", "overcluster.n_clusters=[4]",
                     "dense.evaluations=[overcluster,dense_retrieval]", "overcluster.seeds=1", "overcluster.pca=null"]),
        ("student", ["mode=vis", "run={probe}", "vis.gif=false", "vis.page=false"]),
        ("teacher", ["mode=analyze", "run={probe}", "analyze.images=2", "analyze.pair_images=2", "analyze.ranks=[2]",
                     "analyze.refit=false"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)  # fmt: skip
def test_every_mode_reads_the_trained_networks(
    whole: Finished, places: tuple[Path, dict[str, Finished]], role: str, mode: list[str]
) -> None:
    folder, probes = places
    settings = [setting.format(probe=probes[role].dir) for setting in mode]
    done = run(folder, *([] if "run=" in settings[1] else on(whole, role)), *settings, "wandb.mode=disabled")
    assert json.loads((done.dir / "run.json").read_text())["status"] == "finished"


@pytest.fixture(scope="module", params=["0.0", "1000.0"])  # a state after every step, or at the end of an epoch only
def through(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Finished]:
    """Settings, and a run that was never stopped."""
    settings = [*QUICK, f"neco.save_seconds={request.param}"]
    return settings, run(tmp_path_factory.mktemp("through"), *settings)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_killed_at_any_step_and_started_again_gives_the_same_bytes(
    whole: Finished, through: tuple[list[str], Finished], tmp_path: Path, step: int
) -> None:
    settings, undisturbed = through
    with pytest.raises(Killed), stopped_after(step, kill):
        run(tmp_path, *settings)
    hit = run(tmp_path, *settings)
    for name in ("student.safetensors", "teacher.safetensors", "checkpoints/state.safetensors"):
        assert (hit.dir / name).read_bytes() == (undisturbed.dir / name).read_bytes()
    assert [row["step"] for row in hit.records("history.jsonl")] == [1, 2, 3, 4]
    weights = load_file(undisturbed.dir / "teacher.safetensors")
    for key, value in load_file(whole.dir / "teacher.safetensors").items():  # evaluations draw nothing of the training's
        assert torch.equal(value, weights[key])


def test_ctrl_c_ends_after_the_step_with_its_state_saved(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stopped_after(3, lambda: signal.raise_signal(signal.SIGINT)):
        run(tmp_path, *QUICK, "neco.save_seconds=1000.0")
    (state,) = tmp_path.glob("outputs/neco/*/checkpoints/state.safetensors")
    assert load_state(state).recipe["done"] == 3
    with stopped_after(2, kill):  # one step is left, so it is never hit
        run(tmp_path, *QUICK, "neco.save_seconds=1000.0")


def test_every_nth_epoch_is_kept_and_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    done = run(tmp_path, *QUICK, "neco.keep_every=1")
    kept = sorted(path.name for path in (done.dir / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["epoch-0001", "epoch-0002"]
    assert load_state(done.dir / "checkpoints/epoch-0001/teacher.safetensors").recipe["step"] == 2
    with stopped_after(1, kill):
        run(tmp_path, *QUICK, "neco.keep_every=1")


def test_without_a_teacher_the_student_is_the_result(tmp_path: Path) -> None:
    done = run(tmp_path, *QUICK, "neco.use_teacher=false", "neco.images.limit=4", "neco.epochs=1")
    assert (done.dir / "student.safetensors").exists() and not (done.dir / "teacher.safetensors").exists()


def test_a_plain_folder_of_images_is_enough(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(5):
        (tmp_path / "pictures/deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 50), (40 * number, 10, 200)).save(tmp_path / f"pictures/deep/{number}.png")
    done = run(tmp_path, *QUICK, f"neco.images.folder={tmp_path}/pictures", "neco.epochs=1")
    assert len(done.records("history.jsonl")) == 1


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    first = run(tmp_path, *QUICK)
    state = (first.dir / "checkpoints/state.safetensors").read_bytes()
    with pytest.raises(Killed), stopped_after(1, kill):
        run(tmp_path, *QUICK, "neco.swap=logistic")
    (other,) = [path for path in first.dir.parent.iterdir() if path != first.dir]
    files.write_atomically(other / "checkpoints/state.safetensors", state)
    with pytest.raises(SystemExit, match="state.safetensors is of something else .*swap: \"cauchy\", expected \"logistic\""):
        run(tmp_path, *QUICK, "neco.swap=logistic")


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with stopped_after(1, lambda: setattr(files.os, "fsync", full)):
        sync = files.os.fsync
        try:
            with pytest.raises((SystemExit, OSError), match="disk is full"):
                run(tmp_path, *QUICK, "neco.save_seconds=0.0")
        finally:
            files.os.fsync = sync


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        (["neco.crops.sizes=[32,4]"], "a crop of 4 px is smaller than a patch of 8 px"),
        (["neco.crops.sizes=[36,16]"], "patches of 8 px do not divide crops of 36 px"),
        (["neco.queue_length=20"], "neco.queue_length=20 is smaller than a batch"),
        (["neco.expects=[384,14]"], "this recipe is for a ViT of width 384"),
        (["neco.batch_images=16", "neco.queue_length=200"], "9 images are fewer than a batch"),
        (["neco.images.folder=/nowhere"], "neco.images.folder=/nowhere is no folder"),
        (["neco.registers=drop"], "no register tokens"),
        (["neco.epochs=2.5"], "neco.epochs: got 2.5, expected a whole number"),
        (["neco.evaluate.select=linear", "neco.evaluate.every=1"], "neco.evaluate.select=linear; valid: retrieval"),
        (["neco.evaluate.size=30", "neco.evaluate.every=1"], "neco.evaluate.size=30 is no multiple of the patch size 8"),
        (["neco.trainable_blocks=7"], "neco.trainable_blocks: got 7"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(tmp_path: Path, setting: list[str], sentence: str) -> None:
    with pytest.raises(SystemExit, match=sentence):
        run(tmp_path, *QUICK, *setting)


def test_an_empty_folder_of_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="holds no image"):
        run(tmp_path, *QUICK, f"neco.images.folder={tmp_path}/empty")


def test_provenance_names_where_the_weights_came_from(whole: Finished) -> None:
    facts = json.loads((whole.dir / "run.json").read_text())
    assert facts["inputs"]["weights"] == "random:0" and facts["status"] == "finished"


EXPERIMENTS = sorted(path.stem for path in (ROOT / "cfgs/experiment").glob("neco_*.yaml"))


def test_all_published_rows_are_there() -> None:
    small = {f"neco_{init}_small" for init in ("dinov2", "dinov2r", "dinov2r_xr", "dino", "timetuning", "leopart")}
    base = {f"neco_{init}_base" for init in ("dinov2", "dinov2r", "dinov2r_xr")}
    assert set(EXPERIMENTS) == small | base | {"neco_224", "neco_518"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_published_row_composes_fits_its_architecture_and_says_what_to_expect(name: str) -> None:
    text = (ROOT / f"cfgs/experiment/{name}.yaml").read_text()
    for word in ("Published", "Command", "Cost", "Memory", "Ambiguous"):
        assert f"# {word}" in text
    with configured(f"experiment={name}", "dataset.root=/data/coco", "model.pretrained=false", "model.weights=null") as cfg:
        options.check(cfg)
        recipe = read_recipe(cfg.neco).check(backbone_facts(cfg.model), 1)
        assert cfg.mode == "neco" and cfg.seed == 400
    steps = 118_287 // recipe.batch_images
    assert f"{steps} steps an epoch, {steps * recipe.epochs} in all" in text
    assert (recipe.lr_head, recipe.final_lr, recipe.weight_decay, recipe.drop_path) == (1e-4, 0.0, (0.04, 0.5), 0.1)
    assert (recipe.head_hidden, recipe.head_out, recipe.head_layers) == (2048, 256, 3)
    with (
        configured(f"experiment={name}", "model=demo_vit", "dataset=scenes", "model.weights=null", "model.digest=null",
                   "model.pretrained=false") as cfg,
        pytest.raises(UserError, match="this recipe is for a ViT of width"),
    ):  # fmt: skip
        read_recipe(cfg.neco).check(backbone_facts(cfg.model), 1)
