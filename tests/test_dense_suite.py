"""The dense evaluations as the program runs them: one extraction, every evaluation, a restart, bad input."""

import csv
import inspect
import json
from unittest import mock

import program
import pytest
import torch

import main
import options
from activation import build_dataset
from backbones.attention import class_attention
from backbones.load import load_backbone
from dense import figures, suite
from dense.contract import LabelMaps
from dense.features import change_background, dense_config, open_split, seen_windows
from dense.report import gain_over_best
from metrics.bootstrap import Estimate, interval, resample
from show.style import png_bytes

SMALL = [
    *program.MODEL,
    "dataset.n_train=12", "dataset.n_val=2", "dataset.n_test=6", "trainer.n_boot=20", "wandb.mode=disabled",
    "patch_class.seeds=1", "patch_class.epochs=1", "linear_seg.seeds=2", "linear_seg.epochs=2", "linear_seg.lrs=[1e-2]",
    "logistic_seg.iterations=3", "logistic_seg.cs=[1.0]", "overcluster.n_clusters=[classes,12]", "overcluster.seeds=1",
    "overcluster.pca=8", "overcluster.iterations=3", "cbfe_cd.foreground_clusters=12", "cbfe_cd.community_clusters=6",
    "cbfe_cd.pca=8", "cbfe_cd.seeds=1", "cbfe_cd.iterations=3", "cbfe_cd.weight_thresholds=[0.05]",
    "cbfe_cd.resolutions=[1.0]", "cbfe_cd.size=32",
]  # fmt: skip
SUITE = [*SMALL, "mode=dense_suite", "model.layers=[0,-1]"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder whose cache the runs of this file fill once."""
    return tmp_path_factory.mktemp("dense")


@pytest.fixture(scope="module")
def done(shared):
    few = lambda figure: png_bytes(figure) if len(figure.axes) < 4 else b"drawn"  # to render many panels takes seconds
    with mock.patch("dense.figures.png_bytes", few):
        return program.run(shared, *SUITE, "model.seed=1")


def test_every_evaluation_is_in_the_records_with_intervals_and_classes(done):
    records = done.records()
    means = [r for r in records if r["seed"] == "mean" and r["question"] != "reference"]
    assert {r["question"] for r in means} == set(suite.EVALUATIONS)
    assert {r["name"] for r in means} == {"backbone", "pixels", "position"}  # the backbone is random itself
    for record in means:
        assert set(record["interval"]) == set(record["metrics"]) and record["protocol"] == "clean"
        low, high = record["interval"].get("miou") or record["interval"]["jaccard"]
        assert 0 <= low <= high <= 1
    layers = {r["layer"] for r in means if r["question"] == "overcluster" and r["name"] == "backbone"}
    assert layers == {0, 1}
    linear = next(r for r in means if r["question"] == "linear_seg")
    assert list(linear["iou"])[0] == "background" and len(linear["iou"]) == 9
    assert len({json.dumps([r[k] for k in ("name", "question", "layer", "seed", "subset")]) for r in records}) == len(records)


def test_influences_of_images_give_the_intervals_and_no_test_score_goes_to_a_sweeper(done):
    rows = list(csv.DictReader((done.dir / "scores.csv").open()))
    keys = ("evaluation", "subject", "layer", "metric")
    mine = [r for r in rows if tuple(r[k] for k in keys) == ("linear_seg", "backbone", "1", "miou")]
    record = next(
        r for r in done.records()
        if (r["question"], r["name"], r["layer"], r["seed"]) == ("linear_seg", "backbone", 1, "mean")
    )  # fmt: skip
    assert len(mine) == 6 and len({r["image"] for r in mine}) == 6
    influence = torch.tensor([[float(r["influence"]) for r in mine]], dtype=torch.float64)
    estimate = Estimate(torch.tensor([record["metrics"]["miou"]], dtype=torch.float64), influence)
    low, high = interval(estimate, resample(6, 20, 0))
    assert record["interval"]["miou"] == pytest.approx([float(low), float(high)], abs=1e-6)
    assert done.objective is None


def test_the_best_control_is_asked_for_in_every_resample():
    rng, counts = torch.Generator().manual_seed(0), resample(30, 200, 0)
    noise = [0.01 * torch.randn(1, 30, generator=rng, dtype=torch.float64) for _ in range(3)]
    ours, *theirs = (Estimate(torch.tensor([0.5], dtype=torch.float64), x - x.mean()) for x in noise)
    draws = [float(e.value[0] + e.influence[0] @ c) for c in counts for e in (ours, *theirs)]
    by_hand = sorted(a - max(b, c) for a, b, c in zip(draws[::3], draws[1::3], draws[2::3], strict=True))
    low, high = (float(x) for x in torch.quantile(torch.tensor(by_hand), torch.tensor([0.025, 0.975])))
    shown = [f"{x:+.3f}".replace("0.", ".", 1) for x in (0.0, low, high)]
    assert gain_over_best(ours, theirs, counts) == f"{shown[0]} [{shown[1]}, {shown[2]}]"
    undefined = Estimate(torch.tensor([torch.nan], dtype=torch.float64), torch.zeros(1, 30, dtype=torch.float64))
    assert gain_over_best(undefined, theirs, counts) == "–"


def test_tables_hold_what_the_records_hold(done):
    rows = list(csv.DictReader((done.dir / "dense.csv").open()))
    record = next(r for r in done.records() if r["question"] == "linear_seg" and r["seed"] == "mean" and r["layer"] == 1)
    row = next(
        r for r in rows
        if (r["evaluation"], r["subject"], r["layer"], r["metric"]) == ("linear_seg", record["name"], "1", "miou")
    )  # fmt: skip
    assert float(row["value"]) == pytest.approx(record["metrics"]["miou"])
    assert [float(row["low"]), float(row["high"])] == pytest.approx(record["interval"]["miou"])
    classes = list(csv.DictReader((done.dir / "classes.csv").open()))
    assert {r["class"] for r in classes} >= {"background", "beetle"}
    assert "gain over the best" in (done.dir / "log.txt").read_text()
    drawn = {p.stem for p in done.dir.glob("*.png")}
    assert drawn >= {"evaluations", "layers", "classes", "confusion", "examples"}


def test_a_figure_of_the_last_layer_has_one_row_per_subject():
    row = lambda subject, layer: {"evaluation": "linear_seg", "subject": subject, "layer": layer}
    rows = [row("backbone", "embed"), row("backbone", 3), row("pixels", "embed"), row("position", "position")]
    found = [(r["subject"], r["layer"]) for r in figures.at_last_layer(rows, ["embed", 3])]
    assert found == [("backbone", 3), ("pixels", "embed"), ("position", "position")]


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(shared, done, monkeypatch):
    evaluate, jobs = suite.evaluate, []
    part = ["dense.evaluations=[patch_class,overcluster]", "dense.controls=[pixels]", "dense.figures=false"]

    def stop(*arguments):
        if len(jobs) == 3:
            raise KeyboardInterrupt
        jobs.append(arguments[2:5])
        return evaluate(*arguments)

    monkeypatch.setattr(suite, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        program.run(shared, *SUITE, *part, "model.seed=1")
    monkeypatch.setattr(suite, "evaluate", evaluate)
    again = program.run(shared, *SUITE, *part, "model.seed=1")
    assert (again.dir / "log.txt").read_text().count("patch_class on backbone") == 1
    asked = lambda r: r["question"] in ("patch_class", "overcluster", "reference") and r["name"] != "position"
    strip = lambda records: sorted(json.dumps(r, sort_keys=True) for r in records if asked(r))
    assert strip(again.records()) == strip(done.records()) and len(strip(done.records())) > 20


def test_windows_of_a_long_image_make_one_grid(tmp_path):
    overrides = [*SMALL, "mode=linear_seg", "dataset.size=[96,160]", *program.places(tmp_path)]
    with program.configured(*overrides) as cfg:
        cfg = dense_config(cfg)
        split = open_split(cfg, "test", print, attention=True)
        backbone = load_backbone(cfg.model, "cpu")
        image = build_dataset(cfg, "test")[int(split.sample.meta["numbers"][1])].image
        windows = class_attention(backbone, seen_windows(image, cfg, backbone.facts))  # [n, heads, 6, 6]
    assert split.grids.shapes.tolist() == [[6, 10]] * 6 and len(windows) == 2
    attention = split.grids.attention(torch.tensor([1]))[0]  # [heads, 6, 10]
    torch.testing.assert_close(attention[:, :, 0], windows[0, :, :, 0], atol=1e-4, rtol=1e-2)
    torch.testing.assert_close(attention[:, :, 9], windows[1, :, :, 5], atol=1e-4, rtol=1e-2)
    x = split.grids.read(torch.tensor([0, 1]))
    assert x.shape == (1, 2, 6, 10, 32)
    place = split.sample.labels["place"][0]
    token = int((place == torch.tensor([2.0, 9.0])).all(1).nonzero()[0])
    assert torch.equal(x[0, 0, 2, 9], split.sample.tokens.gather(torch.tensor([0]))[0, 0, token])
    assert split.maps.read(0).shape == (96, 160)


def test_maps_are_those_of_the_data_set_and_are_read_again(tmp_path):
    with program.configured(*SMALL, "mode=linear_seg", *program.places(tmp_path)) as cfg:
        cfg = dense_config(cfg)
        first = open_split(cfg, "train", print)
        dataset = build_dataset(cfg, "train")
        cfg.cache.ram_gb = 1e-9
        again = open_split(cfg, "train", print)
    for image in (0, 7, 11):
        assert torch.equal(first.maps.read(image).int(), dataset[image].labels["class"].int())
        assert torch.equal(first.maps.read(image), again.maps.read(image))


def test_the_background_is_a_class_ignored_or_no_class():
    maps = LabelMaps.from_tensor(torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8), ["background", "a", "b"])
    read = lambda kind: change_background(maps, kind)
    assert read("class").read(0).tolist() == [[0, 1, 2, 255]]
    assert read("ignore").read(0).tolist() == [[-1, 1, 2, 255]] and read("ignore").n_classes == 3
    assert read("drop").read(0).tolist() == [[-1, 0, 1, -1]] and read("drop").classes == ["a", "b"]


BAD = {
    "mode=linear_seg dataset.n_train=4": "leaves 0 to choose on",
    "mode=overcluster overcluster.pca=50": "pca=50 components of tokens with 32 channels",
    "mode=linear_seg linear_seg.score_sizes=[big]": "a score size is a number of pixels, input or full",
    "mode=linear_seg linear_seg.slide=2": "linear_seg.slide=2",
    "mode=linear_seg dense.grid=abc": "dense.grid: got 'abc'",
    "mode=dense_retrieval protocol=hummingbird": "set dense.input_size=512",
    "mode=overcluster overcluster.n_clusters=[9999]": "9999 clusters of 216 tokens",
    "mode=dense_retrieval dense_retrieval.fraction=1/128": "leaves none",
    "mode=cbfe_cd model.source=pixels model.layers=[embed] model.norm=false": "pixels has no class token",
    "mode=linear_seg dense.input_size=100": "do not divide; choose another model, or set dense.input_size=96",
    "mode=linear_seg dense.test_split=tset": "tset",
    "mode=dense_suite dense.evaluations=[lienar_seg]": "expected some of patch_class",
    "mode=dense_suite dense.controls=[noise]": "unknown control noise",
    "mode=linear_seg linear_seg.optimizer=lamb": "linear_seg.optimizer=lamb",
    "mode=linear_seg +linear_seg.nonsense=1": "nonsense",
    "mode=linear_seg dense.background=void": "dense.background=void",
    "mode=linear_seg protocol.geometry.kind=uniform_crops": "windows that overlap",
    "mode=linear_seg dense.grid=6 dense.input_size=96": "set one of them",
}


@pytest.mark.parametrize("name", ["voc12", "ade20k_challenge", "coco_things", "coco_stuff", "cityscapes", "folder"])
def test_a_root_without_the_expected_files_is_one_sentence(tmp_path, name):
    with pytest.raises(SystemExit) as stopped:
        program.run(tmp_path, *program.MODEL, "mode=linear_seg", f"dataset={name}", f"dataset.root={tmp_path}")
    assert str(tmp_path) in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.parametrize("overrides", BAD, ids=lambda text: text.split(" ", 1)[0] + " " + text.rsplit(" ", 1)[-1])
def test_bad_input_is_one_sentence_before_any_extraction(tmp_path, overrides):
    with pytest.raises(SystemExit) as stopped:
        program.run(tmp_path, *SMALL, *overrides.split())
    assert BAD[overrides] in str(stopped.value) and "\n" not in str(stopped.value)
    assert not list((tmp_path / "cache").glob("tokens/*"))


def test_augmented_protocols_run_and_differ_from_stored_tokens(shared):
    quick = [
        *SMALL, "mode=linear_seg", "protocol=neco_linear", "linear_seg.epochs=1", "linear_seg.batch_size=4",
        "linear_seg.seeds=1", "dense.input_size=96", "dense.figures=false", "dense.evaluations=[linear_seg]",
        "dense.controls=[]",
    ]  # fmt: skip
    done = program.run(shared, *quick)
    plain = program.run(shared, *quick, "linear_seg.live=false")
    pick = lambda run: next(r for r in run.records() if r["question"] == "linear_seg" and r["seed"] == "mean")
    assert pick(done)["notes"]["selected_on"] == "reported" and pick(done)["protocol"].startswith("neco_linear, changed: ")
    assert pick(done)["metrics"] != pick(plain)["metrics"]


def test_published_patch_classes(shared):
    own = ["dense.grid=6", "+dense.published.demo_vit=0.5", "dense.figures=false", "dense.controls=[]"]
    done = program.run(shared, *SMALL, "mode=train_class", "protocol=probeit", *own)
    assert done.dir.parent.name == "patch_class"
    record = next(r for r in done.records() if r["question"] == "patch_class" and r["seed"] == "mean")
    said = f"published .500, ours {record['metrics']['accuracy']:.3f}, difference".replace(" 0.", " .")
    assert said in (done.dir / "log.txt").read_text()
    assert len(record["iou"]) == 8 and "background" not in record["iou"] and record["protocol"].startswith("probeit, changed: ")


def test_published_retrieval_runs(shared):
    quick = ["dense.input_size=96", "dense.figures=false", "dense.controls=[]"]
    done = program.run(shared, *SMALL, "mode=dense_retrieval", "protocol=hummingbird", *quick)
    record = next(r for r in done.records() if r["question"] == "dense_retrieval")
    assert record["notes"]["bank"] == 2 * 12 * 36 and record["setting"]["size"] == "input"


def test_the_class_of_a_patch_is_asked_as_published_by_either_mode():
    published = ["protocol=probeit", "dataset=voc12", "dataset.root=/data", "model=dinov2_small_reg"]
    with program.configured("mode=train_class", *published) as cfg:
        options.check(cfg)
        assert main.find_entry(cfg) is suite.run and cfg.mode == "patch_class" and cfg.dense.evaluations == ["patch_class"]
        assert cfg.dense.grid == 32 and cfg.model.norm and cfg.model.layers == -1
    with program.configured("mode=train_class") as cfg:
        assert main.find_entry(cfg) is not suite.run and cfg.task == "class"


@pytest.mark.parametrize("experiment", ["probeit_table", "probeit_learning_rates"])
def test_experiments_compose(experiment):
    with program.configured(f"experiment={experiment}", "dataset.root=/data") as cfg:
        assert cfg.protocol.name == "probeit" and cfg.entry == "dense.suite.run" and cfg.dataset.validation == "published"
        assert cfg.patch_class.background == "drop" and cfg.model.norm and cfg.dense.grid == 32


def test_the_configuration_holds_the_defaults_of_the_functions():
    with program.configured() as cfg:
        for name, evaluation in suite.EVALUATIONS.items():
            given = suite.options_of(cfg, name)
            for key, parameter in inspect.signature(evaluation.function).parameters.items():
                if key in given:
                    default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                    assert given[key] == default, f"{name}.{key}"
