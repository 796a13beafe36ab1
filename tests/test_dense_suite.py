"""The dense evaluations as the program runs them: one extraction, every evaluation, a restart, bad input."""

import csv
import inspect
import json

import program
import pytest
import torch

from dense import suite
from dense.contract import LabelMaps
from dense.features import change_background, dense_config, open_split

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
def done(tmp_path_factory):
    return program.run(tmp_path_factory.mktemp("dense"), *SUITE, "model.seed=1")


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
    assert {p.name for p in done.dir.glob("*.png")} >= {"evaluations.png", "classes.png"}


def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(tmp_path, done, monkeypatch):
    evaluate, jobs = suite.evaluate, []

    def stop(*arguments):
        if len(jobs) == 5:
            raise KeyboardInterrupt
        jobs.append(arguments[2:5])
        return evaluate(*arguments)

    monkeypatch.setattr(suite, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        program.run(tmp_path, *SUITE, "model.seed=1")
    monkeypatch.setattr(suite, "evaluate", evaluate)
    again = program.run(tmp_path, *SUITE, "model.seed=1")
    assert (again.dir / "log.txt").read_text().count("patch_class on backbone") == 1
    strip = lambda records: sorted(json.dumps(r, sort_keys=True) for r in records)
    assert strip(again.records()) == strip(done.records())
    assert (again.dir / "dense.csv").read_text() == (done.dir / "dense.csv").read_text()


def test_windows_of_a_long_image_make_one_grid(tmp_path):
    overrides = [*SMALL, "mode=linear_seg", "dataset.size=[96,160]", *program.places(tmp_path)]
    with program.configured(*overrides) as cfg:
        cfg = dense_config(cfg)
        split = open_split(cfg, "test", print)
    assert split.grids.shapes.tolist() == [[6, 10]] * 6
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
        from activation import build_dataset

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


@pytest.mark.parametrize("overrides", BAD, ids=lambda text: text.split(" ", 1)[0] + " " + text.rsplit(" ", 1)[-1])
def test_bad_input_is_one_sentence_before_any_extraction(tmp_path, overrides):
    with pytest.raises(SystemExit) as stopped:
        program.run(tmp_path, *SMALL, *overrides.split())
    assert BAD[overrides] in str(stopped.value) and "\n" not in str(stopped.value)
    assert not list((tmp_path / "cache").glob("tokens/*"))


def test_augmented_protocols_run_and_differ_from_stored_tokens(tmp_path):
    quick = [
        "linear_seg.epochs=1",
        "linear_seg.batch_size=4",
        "linear_seg.seeds=1",
        "dense.input_size=96",
        "dense.figures=false",
    ]
    done = program.run(tmp_path, *SMALL, "mode=linear_seg", "protocol=neco_linear", *quick, "dense.evaluations=[linear_seg]")
    plain = program.run(
        tmp_path, *SMALL, "mode=linear_seg", "protocol=neco_linear", *quick, "dense.evaluations=[linear_seg]",
        "linear_seg.live=false",
    )  # fmt: skip
    pick = lambda run: next(r for r in run.records() if r["question"] == "linear_seg" and r["seed"] == "mean")
    assert pick(done)["notes"]["selected_on"] == "reported" and pick(done)["protocol"].startswith("neco_linear, changed: ")
    assert pick(done)["metrics"] != pick(plain)["metrics"]


def test_published_patch_classes(tmp_path):
    own = ["dense.grid=6", "+dense.published.demo_vit=0.5", "dense.figures=false"]
    done = program.run(tmp_path, *SMALL, "mode=patch_class", "protocol=probeit", *own)
    record = next(r for r in done.records() if r["question"] == "patch_class" and r["seed"] == "mean")
    said = f"published .500, ours {record['metrics']['accuracy']:.3f}, difference".replace(" 0.", " .")
    assert said in (done.dir / "log.txt").read_text()
    assert len(record["iou"]) == 8 and "background" not in record["iou"] and record["protocol"].startswith("probeit, changed: ")


def test_published_retrieval_runs(tmp_path):
    quick = ["dense.input_size=96", "dense.figures=false", "dense.controls=[]"]
    done = program.run(tmp_path, *SMALL, "mode=dense_retrieval", "protocol=hummingbird", *quick)
    record = next(r for r in done.records() if r["question"] == "dense_retrieval")
    assert record["notes"]["bank"] == 2 * 12 * 36 and record["setting"]["size"] == "input"


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
