"""Binding information: published numbers, identities that prove the estimator, one run end to end, refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

import trainer
from activation import PatchSample
from backbones.contract import Tokens
from binding import task as binding_task
from binding.examples import decode
from binding.information import binding_estimates, combine, suspicions
from binding.probes import BINDING_PROBES
from binding.tables import row_label
from binding.task import (
    Code,
    CodeCollector,
    check_loaded,
    check_probe,
    check_samples,
    ladder_rows,
    notes_of,
    parts_of,
    report_splits,
)
from controls import Opened, Subject, blind, pixels
from datasets.clevr import VALUES
from datasets.codes import Groups
from datasets.priors import uniform_up_to
from errors import UserError
from metrics.bootstrap import Estimate, interval_over_seeds, mean_estimate, resample
from patches.geometry import plan_geometry
from patches.windows import cut_windows
from probes import FitAxes
from runs.records import read_records
from runs.run import Run, open_run
from show.across_runs import EVERYTHING, open_tables
from show.board import control_text
from show.text import score_text
from store.shards import StackedTokens
from store.writing import kept_tokens
from tasks import Batch, ProbeResult, SubsetResult, read_seeds

ROOT = Path(__file__).parent.parent
GOLDEN = {name: json.loads((ROOT / f"tests/golden/binding/{name}.json").read_text()) for name in ("metrics", "tokens")}
CPU = torch.device("cpu")


def configure(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        return compose("config", ["mode=train_binding", "wandb.mode=disabled", "trainer.n_boot=100", *overrides])


def constant(value: float, n_images: int = 4) -> Estimate:
    return mean_estimate(torch.full((1, n_images), value, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("case", GOLDEN["metrics"]["binding"])
def test_published_information_and_ratio(case: dict) -> None:
    loss = {"Y": constant(case["loss_Y_bits"]), "F": constant(case["loss_F_bits"])}
    found = binding_estimates(loss, torch.full((4,), case["mean_H_Y_given_F"], dtype=torch.float64), {"H_Y": 40.0, "H_F": 7.0})
    assert float(found["binding_information"].value) == pytest.approx(case["binding_info_bits"], abs=1e-9)
    assert float(found["ratio"].value) == pytest.approx(case["binding_ratio"], abs=1e-9)
    assert float(found["information_Y"].value) == pytest.approx(40 - case["loss_Y_bits"])
    assert float(found["information_F"].value) == pytest.approx(7 - case["loss_F_bits"])


@pytest.mark.parametrize("case", GOLDEN["metrics"]["evaluation"])
def test_published_evaluation_over_uneven_batches(case: dict) -> None:
    found = {}
    for code, label in (("Y", "object_code"), ("F", "feature_code")):
        logits, bits, first = torch.tensor(case[f"logits_{code}"]), torch.tensor(case[code]), 0
        collector = CodeCollector(label)
        for size in case["batch_sizes"]:
            part = slice(first, first + size)
            collector.add(Batch(torch.arange(first, first + size), None, {label: bits[part]}), logits[None, None, part])
            first += size
        found[code] = ProbeResult("probe", "", "probe", [0], [0], collector.results())
    labels = {"H_Y_given_F": torch.full((5, 1), case["mean_H_Y_given_F"])}
    sample = toy_sample(torch.zeros(5, 2), np.zeros((5, 4)))._replace(labels=labels)
    metrics = combine(found, sample, {}).subsets[0].metrics
    for name, expected in (
        ("loss_Y", "lossY"), ("loss_F", "lossF"), ("accuracy_Y", "accY"), ("accuracy_F", "accF"),
        ("binding_information", "binding_info"), ("ratio", "binding_ratio"),
    ):  # fmt: skip
        assert float(metrics[name].value) == pytest.approx(case["result"][f"val_{expected}"], abs=1e-5), name


@pytest.mark.parametrize("case", GOLDEN["metrics"]["schedules"])
def test_published_schedule(case: dict) -> None:
    knobs = {"epochs": 40, "schedule": "step", **{key: case[key] for key in ("lr", "step_size", "gamma")}}
    options = trainer.FitOptions.read(configure(*(f"trainer.{key}={value}" for key, value in knobs.items())))
    rates = [options.learning_rate(epoch + within, 128) for epoch in range(40) for within in (0.0, 0.9)]
    assert rates[::2] == pytest.approx(case["lr_used_in_epoch"]) and rates[1::2] == rates[::2]


@pytest.mark.parametrize("case", GOLDEN["metrics"]["one_epoch_training"])
def test_published_epoch_of_adam(case: dict) -> None:
    """Accumulation as published by hand: the loop has none, since one batch of both sizes has the same gradient."""
    probe = BINDING_PROBES["linear"](FitAxes([0], [0]), 3, n_bits=2, matmul_dtype="float32").double()
    names = {"bias": "bias", "weight_image": "Wz.weight", "weight_bits": "Wy.weight"}
    with torch.no_grad():
        for ours, theirs in names.items():
            value = torch.tensor(case["init"][theirs], dtype=torch.float64)
            getattr(probe, ours).copy_(value if ours == "bias" else value.mT)
    knobs = ["optimizer=adam", f"lr={case['lr']}", f"weight_decay={case['weight_decay']}", "beta2=0.999", "lr_width=null"]
    options = trainer.FitOptions.read(configure(*(f"trainer.{knob}" for knob in knobs)))
    optimizer = trainer.build_optimizer(probe, options.optimizer, options.lr, options.beta2, options.weight_decay)
    part = Code([0], "Y")
    for number, batch in enumerate(case["batches"], start=1):
        code = torch.tensor(batch["y"])
        asked = Batch(torch.arange(len(code)), None, {"object_code": code})
        x = torch.tensor(batch["z"], dtype=torch.float64)[None, :, None]
        (part.loss(probe, x, asked).sum() / case["grad_accum_steps"]).backward()
        if number % case["grad_accum_steps"] == 0 or number == len(case["batches"]):
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in names.items():
        found = getattr(probe, ours)[0, 0]
        expected = torch.tensor(case["after_one_epoch"][theirs], dtype=torch.float64)
        torch.testing.assert_close(found if ours == "bias" else found.mT, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", GOLDEN["tokens"]["modes"])
def test_published_output_modes(case: dict) -> None:
    tokens = torch.tensor(case["tokens"])  # [B, T, D], class token first
    n = len(tokens)
    split = Tokens(tokens[:, :1], tokens[:, 1:], (1, tokens.shape[1] - 1))
    everything = kept_tokens(split, None, "all", torch.float32)[0]
    torch.testing.assert_close(everything.view(n, -1), torch.tensor(case["all"]), atol=1e-6, rtol=0)
    if tokens.shape[1] > 1:  # an image always has patches here; the published program pools the class token if not
        cls, mean = kept_tokens(split, None, "pooled", torch.float32)[0].view(n, 2, -1).unbind(1)
        for found, name in ((cls, "cls"), (mean, "mean_spatial"), (torch.cat([cls, mean], 1), "cls_mean")):
            torch.testing.assert_close(found, torch.tensor(case[name]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", GOLDEN["tokens"]["preprocess"])
def test_published_resize_and_normalisation(case: dict) -> None:
    """With the geometry the published experiments name; pixels are scaled in 8 bits here, so they enter as numbers."""
    image, size = torch.tensor(case["image_chw"]) * 255, case["target"]
    rules = configure("experiment=binding_grid").protocol.geometry
    geometry = plan_geometry(image.shape[1:], geometry=rules, patch_size=2, image_size=[size, size])
    options = {"mean": case["mean"], "std": case["std"], "interpolation": "bicubic", "antialias": rules.antialias}
    (found,) = cut_windows(image, geometry, **options)
    torch.testing.assert_close(found, torch.tensor(case["normalized"]), atol=2e-6, rtol=0)


# ------------------------------------------------------------------------------------------------------- the estimator


GRID = Groups([["red", "blue"], ["circle", "square"]])
LAW = uniform_up_to(GRID.sizes)  # every one of the 16 object codes equally likely
EXACT = LAW.population()
TOY_FACTS = {
    "name": "toy", "source": "timm", "weights": "none", "depth": 1, "dim": 4, "patch_size": 1, "image_size": [1, 1],
    "num_prefix_tokens": 1, "has_class_token": True, "mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic",
}  # fmt: skip
TOY_MEANING = {"norm": True, "output_mode": "cls", "geometry": {"kind": "stretch"}}


def toy_sample(z: Tensor, code: np.ndarray) -> PatchSample:
    """Images of object codes [M, 4] seen as one token z [M, D]."""
    feature = GRID.feature_code(code)
    entropy = LAW.entropy(GRID.counts(feature))
    return PatchSample(
        tokens=StackedTokens.from_tensor(z.float()[None, :, None], [0]),
        position=torch.full((len(z), 1, 3), -1),
        labels={
            "object_code": torch.from_numpy(np.asarray(code, np.uint8)),
            "feature_code": torch.from_numpy(feature),
            "H_Y_given_F": torch.from_numpy(entropy).float()[:, None],
        },
        info={"H_Y": EXACT["H_Y"], "H_F": EXACT["H_F"], "H_Y_given_F": float(entropy.mean())},
        keys=[f"image{i}" for i in range(len(z))],
        grids=torch.ones(len(z), 2, dtype=torch.long),
        meta={"classes": GRID.names, "facts": dict(TOY_FACTS), **TOY_MEANING,
              "report": {"prior": LAW.name}},
    )  # fmt: skip


def grid_samples(kind: str, repeats: int = 32) -> dict[str, PatchSample]:
    """Every object code equally often, and a representation that holds Y, F or nothing."""
    every = np.array([[int(b) for b in f"{i:04b}"] for i in range(16)], np.uint8)
    samples = {}
    for number, split in enumerate(("train", "val", "test")):
        code = np.tile(every, (repeats, 1))
        rng = torch.Generator().manual_seed(number)
        z = {
            "Y": torch.from_numpy(code),
            "F": torch.from_numpy(GRID.feature_code(code)),
            "noise": torch.randn(len(code), 1, generator=rng),
        }[kind]
        samples[split] = toy_sample(z, code)
    return samples


def measure(samples: dict[str, PatchSample], folder: Path, *overrides: str) -> dict[str, float]:
    cfg = configure("trainer.seeds=1", "trainer.batch_images=64", "trainer.lr=1e-2", *overrides)
    check_samples(samples, cfg)
    run, options, answers = open_test_run(folder), trainer.FitOptions.read(cfg), {}
    for part in parts_of(cfg):
        subject = Subject("probe", "", cfg.probe, samples, read_seeds(cfg.trainer.seeds), part=part)
        answers[part] = trainer.probe(run, Code(subject.seeds, part), subject, options)
    result = combine(answers, samples["test"], notes_of(cfg, samples["test"]))
    return {key: float(e.value) for key, e in result.subsets[0].metrics.items()}


def open_test_run(folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, {"mode": "train_binding"})


EASY = ("probe.mode=dnn", "trainer.epochs=15", "binding.conditional=true")


def test_a_representation_that_is_y_has_ratio_one(tmp_path: Path) -> None:
    found = measure(grid_samples("Y"), tmp_path, *EASY)
    assert found["loss_Y"] < 0.05 and found["loss_F"] < 0.05
    assert found["ratio"] == pytest.approx(1, abs=0.03) and found["ratio_lower"] == pytest.approx(1, abs=0.03)
    assert found["information_Y"] == pytest.approx(4, abs=0.05)


def test_a_representation_that_is_f_has_ratio_zero(tmp_path: Path) -> None:
    found = measure(grid_samples("F"), tmp_path, *EASY)
    assert found["loss_Y"] == pytest.approx(EXACT["E_H_Y_given_F"], abs=0.05) and found["loss_F"] < 0.05
    assert found["ratio"] == pytest.approx(0, abs=0.04) and found["ratio_lower"] == pytest.approx(0, abs=0.04)


def test_noise_has_ratio_zero_and_no_information(tmp_path: Path) -> None:
    found = measure(grid_samples("noise", 128), tmp_path, "probe.mode=dnn", "trainer.epochs=16", "trainer.lr=3e-3")
    assert found["loss_Y"] == pytest.approx(4, abs=0.03) and found["loss_F"] == pytest.approx(EXACT["H_F"], abs=0.03)
    assert found["ratio"] == pytest.approx(0, abs=0.03)
    assert found["information_Y"] == pytest.approx(0, abs=0.03) and found["information_F"] == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("mode", ["linear", "quadratic_concat", "quadratic_concat_reuse"])
def test_every_simple_probe_reads_y_from_y(tmp_path: Path, mode: str) -> None:
    knobs = [f"trainer.{knob}" for knob in ("epochs=60", "lr=2e-2", "schedule=linear", "averaging=null")]
    found = measure(grid_samples("Y"), tmp_path, f"probe.mode={mode}", *knobs)
    assert found["ratio"] == pytest.approx(1, abs=0.05)


def test_influence_is_the_derivative_by_the_weight_of_an_image() -> None:
    rng = torch.Generator().manual_seed(0)
    y, f, entropy = (torch.rand(30, generator=rng, dtype=torch.float64) for _ in range(3))
    found = binding_estimates({"Y": mean_estimate(y[None]), "F": mean_estimate(f[None])}, entropy, {"H_Y": 4.0, "H_F": 2.0})

    def again(weight: Tensor) -> dict[str, Tensor]:
        mean = lambda x: (weight * x).sum() / weight.sum()
        bits = mean(entropy) - mean(y) + mean(f)
        return {"information_Y": 4 - mean(y), "binding_information": bits, "ratio": bits / mean(entropy)}

    for name in ("information_Y", "binding_information", "ratio"):
        weight = torch.ones(30, dtype=torch.float64, requires_grad=True)
        value = again(weight)[name]
        value.backward()
        assert found[name].value.item() == pytest.approx(value.item())
        torch.testing.assert_close(found[name].influence[0], weight.grad)


def test_an_interval_over_seeds_is_wider_where_seeds_differ() -> None:
    rng = torch.Generator().manual_seed(0)
    same = torch.rand(1, 200, generator=rng).expand(3, -1)
    apart = same + torch.tensor([[-0.2], [0.0], [0.2]])
    counts = resample(200, 500)
    widths = []
    for x in (same, apart):
        low, high = interval_over_seeds(mean_estimate(x), 3, counts, (-math.inf, math.inf))
        assert low.shape == (1,) and float(low) < float(same.mean()) < float(high)
        widths.append(float(high - low))
    assert widths[1] > 2 * widths[0]


def test_what_is_doubtful_is_flagged_and_not_clipped() -> None:
    above = suspicions({"ratio": 1.06, "information_F": 6.0}, 7.0)
    weak = suspicions({"ratio": 0.5, "information_F": 1.0}, 7.0)
    assert len(above) == len(weak) == 1 and "above 1" in above[0] and "weak F probe" in weak[0]
    below = {"ratio": -0.1, "information_F": 6.5}
    nothing, (implied,) = (suspicions(below | {"information_Y": bits}, None) for bits in (-0.4, 0.2))
    assert len(nothing) == 1 and "no information about the objects found" in nothing[0] and "ratio below 0" in implied
    assert suspicions({"ratio": -0.1, "information_F": 6.5}, None) and not suspicions({"ratio": 0.9, "information_F": 6.5}, 7.0)


# ---------------------------------------------------------------------------------------------------------- end to end

TINY = [
    "model.kwargs={img_size: 48, patch_size: 16, embed_dim: 16, depth: 2, num_heads: 2}", "model.pretrained=false",
    "model.layers=[embed,-1]",
    "dataset.image_size=48", "dataset.obj_size=8", "dataset.n_train=48", "dataset.n_val=16", "dataset.n_test=24",
    "trainer.epochs=2", "trainer.batch_images=16", "trainer.checkpoint_seconds=0", "threads=1", "controls=[blind]",
]  # fmt: skip


def run_tiny(folder: Path, *overrides: str) -> Run:
    """A whole run, or a second one on the same cache."""
    cfg = configure(*TINY, f"output_dir={folder}", f"cache.dir={folder.parent / 'cache'}", *overrides)
    with open_run(cfg) as run:
        binding_task.run(cfg, run)
    return run


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_tiny(tmp_path_factory.mktemp("binding") / "outputs")


def test_every_row_of_the_ladder_is_a_row_of_a_report(default_run: Run) -> None:
    (table,) = open_tables([default_run.dir], EVERYTHING)
    records = [r for r in read_records(default_run.dir / "metrics.jsonl") if r["kind"] == "score" and r["seed"] == "mean"]
    assert {row.name: row.identity["probe"] for row in table.rows} == {r["row"]: r["probe"] for r in records}
    for row in table.rows:
        of_row = {r["layer"]: r["metrics"]["ratio"] for r in records if (r["row"], r["control"]) == (row.name, "")}
        cells = row.curves["binding", "", "images", "ratio"]
        assert {cell.layer: cell.value for cell in cells} == of_row and set(row.controls) == {"blind"}
    assert "ladder" not in " ".join(table.labels)
    least = min(cell.value for cell in table.rows[0].controls["blind"]["binding", "", "images", "loss_Y"])
    assert control_text(table.rows[0], ("binding", "", "images", "loss_Y")) == f"{score_text(least)} blind"


def test_the_default_run_compares_class_token_and_all_tokens(default_run: Run) -> None:
    records = read_records(default_run.dir / "metrics.jsonl")
    scores = [r for r in records if r["kind"] == "score"]
    assert {(r["name"], r["layer"], r["seed"]) for r in scores} >= {
        ("cls-quadratic_concat", "embed", "mean"), ("all-attention_quadratic", 1, "mean"), ("all-attention_quadratic", 1, 0),
    }  # fmt: skip
    for record in scores:
        assert record["prior"] == "balanced_5" and record["H_Y_given_F"] == pytest.approx(6.49, abs=0.01)
        metrics = record["metrics"]
        assert metrics["ratio"] * record["H_Y_given_F"] == pytest.approx(metrics["binding_information"], rel=1e-5)
        assert metrics["information_Y"] == pytest.approx(record["H_Y"] - metrics["loss_Y"])
        assert {"accuracy_Y", "accuracy_F", "information_Y_all_splits", "information_Y_ratio"} <= metrics.keys()
        if record["seed"] == "mean":
            assert all(low <= metrics[key] <= high for key, (low, high) in record["interval"].items())
    log = (default_run.dir / "log.txt").read_text()
    assert " of 240 " in log  # feature codes seen, of those the training split may hold
    assert "all attention_quadratic" in log and "prior balanced_5" in log and "pooling 48 of 48" in log
    for file in ("layers.png", "layers.csv", "learning.png", "decoded-all-attention_quadratic.png"):
        assert (default_run.dir / file).stat().st_size > 0


def test_splits_are_reported_before_any_score(default_run: Run) -> None:
    records = read_records(default_run.dir / "metrics.jsonl")
    splits = {r["split"]: r for r in records if r["kind"] == "split"}
    assert list(splits) == ["train", "val", "test"] and [r["n"] for r in splits.values()] == [48, 16, 24]
    assert splits["test"]["H_F"] == pytest.approx(math.log2(100)) and splits["test"]["prior"] == "balanced_5"
    overlap = next(r for r in records if r["kind"] == "splits")
    assert overlap["overlap"]["test in train"] == {"F": 0.0, "Y": 0.0}


def test_images_of_two_splits_at_once_are_a_warning(tmp_path: Path) -> None:
    run, samples = open_test_run(tmp_path), grid_samples("Y", 1)
    for split in ("train", "val"):
        samples[split] = samples[split]._replace(keys=[f"{split}{i}" for i in range(15)] + ["both"])
    report_splits(samples, run)
    (warnings,) = (r["warnings"] for r in read_records(tmp_path / "metrics.jsonl") if r["kind"] == "splits")
    assert [w for w in warnings if "share" in w] == ["train and val share 1 images, such as both; scores on val flatter"]


def test_decoded_objects_are_named(default_run: Run) -> None:
    examples = json.loads((default_run.dir / "decoded-cls-quadratic_concat.json").read_text())
    assert len(examples) == 4 and all(len(e["true"]) == 5 for e in examples)
    names = {f"{c} {s}" for c in ("red", "blue", "green", "yellow", "purple", "orange")
             for s in ("circle", "square", "triangle", "diamond", "pentagon", "hexagon")}  # fmt: skip
    assert {name for e in examples for name in (*e["true"], *e["predicted"])} <= names


def test_eval_scores_the_run_again(default_run: Run, tmp_path: Path) -> None:
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        cfg = compose("config", ["mode=eval", f"run={default_run.dir}", f"output_dir={tmp_path}", "wandb.mode=disabled",
                                 f"cache.dir={default_run.dir.parents[2] / 'cache'}"])  # fmt: skip
    with open_run(cfg) as run:
        trainer.run_eval(cfg, run)
    key = lambda r: (r["name"], r["layer"], r["seed"])
    before, after = (
        {key(r): r["metrics"] for r in read_records(folder / "metrics.jsonl") if r["kind"] == "score"}
        for folder in (default_run.dir, run.dir)
    )
    before = {name: metrics for name, metrics in before.items() if not name[0].endswith("/blind")}
    assert before.keys() == after.keys()
    for name in before:
        assert after[name] == pytest.approx(before[name], abs=1e-6)


def test_a_probe_that_reads_nothing_stands_beside_every_row(default_run: Run) -> None:
    scores = [r for r in read_records(default_run.dir / "metrics.jsonl") if r["kind"] == "score" and r["control"] == "blind"]
    found = {(r["name"], r["layer"]): r["metrics"] for r in scores if r["seed"] == "mean"}
    names = [f"{row}/blind" for row in ("cls-quadratic_concat", "mean_spatial-quadratic_concat", "all-attention_quadratic")]
    assert list(found) == [(name, "none") for name in names]
    assert found[names[0], "none"] == found[names[1], "none"]  # zeros are zeros, of whatever tokens
    table = (default_run.dir / "log.txt").read_text()
    assert "cls quadratic_concat, nothing to read" in table and "∅ no information found" in table


def test_tokens_of_the_blind_control_say_nothing() -> None:
    samples = grid_samples("Y", 2)
    subject = blind(Opened(configure("probe.mode=quadratic_concat"), samples))
    tokens = subject.samples["train"].tokens
    assert tokens.layers == ["none"] and not tokens.gather(torch.arange(3)).any() and len(subject.seeds) == 1
    plain = {split: sample._replace(labels={}) for split, sample in samples.items()}
    assert blind(Opened(configure("probe.mode=quadratic_concat"), plain)) is None  # objects are not read bit by bit


def test_rows_of_a_ladder_have_labels_of_their_own() -> None:
    notes = {"output_mode": "cls", "probe": "quadratic_concat"}
    subset = SubsetResult("binding", "", "images", {}, {}, [], notes)
    labels = {
        ("probe", ""): "cls quadratic_concat", ("probe", "random"): "cls quadratic_concat, random weights",
        ("cls-quadratic_concat", ""): "cls quadratic_concat",
        ("cls-quadratic_concat", "pixels"): "cls quadratic_concat, raw pixels",
        ("rank 4", ""): "rank 4", ("rank 4", "random"): "rank 4, random weights",
    }  # fmt: skip
    for (row, control), label in labels.items():
        assert row_label(ProbeResult(row, control, Subject(row, control, {}, {}, []).title, [0], [0], [subset])) == label


class Stop(Exception):
    """Stands for a kill."""


def test_a_killed_run_resumes_to_identical_records(default_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = trainer.mean_loss, []

    def kill_later(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the second epoch of the F probe of the first row
            raise Stop
        return real(*args, **kwargs)

    folder = default_run.dir.parents[2]
    monkeypatch.setattr(trainer, "mean_loss", kill_later)
    with pytest.raises(Stop):
        run_tiny(folder / "again")
    monkeypatch.setattr(trainer, "mean_loss", real)
    resumed = run_tiny(folder / "again")
    assert resumed.before["status"] == "failed"
    for file in ("metrics.jsonl", "history.jsonl"):
        assert read_records(resumed.dir / file) == read_records(default_run.dir / file)


@pytest.mark.parametrize(
    "overrides",
    [
        ["probe.mode=quadratic_concat_reuse", "model.output_mode=cls_mean"],
        ["probe.mode=dnn_concat", "model.output_mode=mean_spatial", "probe.F.mode=linear", "probe.dnn_dropout=0.1"],
        ["probe.mode=multilinear_concat_reuse", "binding.conditional=true"],
        ["dataset=colorshape", "dataset.n_colors=3", "dataset.n_shapes=2", "dataset.max_objects=4", "probe.mode=linear"],
    ],
)
def test_other_probes_and_data_run_too(default_run: Run, overrides: list[str]) -> None:
    run = run_tiny(default_run.dir.parents[1], *overrides)
    record = next(r for r in read_records(run.dir / "metrics.jsonl") if r["kind"] == "score")
    assert record["name"] == "probe" and record["prior"] in ("balanced_5", "uniform<=4")
    mode = record["probe"]
    assert record["probe_F"] == ("quadratic_concat" if mode.endswith("_reuse") else "linear")
    assert ("lower_bound" in record["metrics"]) == ("binding.conditional=true" in overrides)


def test_photographs_of_any_shape_are_seen_whole(tmp_path: Path) -> None:
    """CLEVR's pictures are 480 x 320, those of Visual Genome as they come; F probe and control of pixels included."""
    root, rng = tmp_path / "clevr", np.random.default_rng(0)
    for folder in ("scenes_6obj", "images_6obj"):
        (root / folder).mkdir(parents=True)
    for number in range(24):
        objects = [{name: values[rng.integers(len(values))] for name, values in VALUES.items()} for _ in range(6)]
        (root / f"scenes_6obj/CLEVR_6obj_{number:06d}.json").write_text(json.dumps({"objects": objects}))
        pixels = rng.integers(0, 256, (32 + number, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images_6obj/CLEVR_6obj_{number:06d}.png")
    counts = ["dataset.num_total=24", "dataset.n_train=12", "dataset.n_val=4", "dataset.n_test=9"]
    tiny = [knob for knob in TINY if not knob.startswith(("dataset.", "controls"))]
    knobs = [
        *tiny,
        *counts,
        "dataset=clevr",
        f"dataset.root={root}",
        "probe.mode=multilinear_concat_reuse",
        "controls=[pixels]",
    ]
    knobs += [f"output_dir={tmp_path}/out", f"cache.dir={tmp_path}/cache", "model.output_mode=mean_spatial"]
    cfg = configure(*knobs, "protocol.geometry.kind=stretch")
    with open_run(cfg) as run:
        binding_task.run(cfg, run)
    scores = [r for r in read_records(run.dir / "metrics.jsonl") if r["kind"] == "score"]
    assert {r["name"] for r in scores} == {"probe", "pixels"} and scores[0]["prior"] == "uniform<=6"
    log = (run.dir / "log.txt").read_text()
    assert "warning: test: only 8 of 9 scenes exist" in log and "F is read by quadratic_concat" in log
    cover = configure(*knobs, "protocol.geometry.kind=cover")
    with open_run(cover) as run, pytest.raises(UserError, match=r"2 windows.*set protocol.geometry.kind=stretch$"):
        binding_task.run(cover, run)


def test_a_code_is_decoded_bit_after_bit() -> None:
    probe = BINDING_PROBES["linear"](FitAxes([0], [0]), 1, n_bits=3, matmul_dtype="float32")
    with torch.no_grad():  # the first bit copies z, the others copy the bit before
        probe.weight_image.zero_(), probe.weight_bits.zero_(), probe.bias.zero_()
        probe.weight_image[0, 0, 0, 0] = 1.0
        probe.weight_bits[0, 0, 0, 1] = probe.weight_bits[0, 0, 1, 2] = 1.0
    found = decode(probe, torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), 0, 0)
    assert found.tolist() == [[1, 1, 1], [0, 0, 0]]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset=colorshape", "model=dinov2_large", "model.output_mode=cls", "probe.mode=quadratic_concat"],
        ["model.output_mode=all", "probe.mode=attention_quadratic"],
        ["probe.mode=quadratic_concat_reuse", "model.layers=all"],
        ["experiment=binding_probe_ladder"],
        ["experiment=binding_grid"],
    ],
)
def test_what_the_command_line_says_wins(overrides: list[str]) -> None:
    cfg = configure(*overrides)
    rows = ladder_rows(cfg)
    for override in overrides:
        key, _, value = override.partition("=")
        if "." in key:
            assert OmegaConf.select(rows[0][1], key) == value and len(rows) == 1
    for _, of_row in rows:
        check_probe(of_row)
    if "dataset=colorshape" in overrides:
        assert cfg.dataset.n_train == 39200 and cfg.dataset._target_.endswith("ColorShape")
    if overrides == ["experiment=binding_probe_ladder"]:
        assert cfg.dataset.image_size == 256 and cfg.model.name.startswith("vit_large_patch14_dinov2")
        assert [name for name, _ in rows] == ["cls-linear", "cls-quadratic_concat", "cls-dnn", "all-attention_quadratic"]


def test_entries_that_an_override_makes_the_same_are_one_row() -> None:
    rows = lambda *overrides: [name for name, _ in ladder_rows(configure("probe.mode=ladder", *overrides))]
    every = ["cls-quadratic_concat", "mean_spatial-quadratic_concat", "all-attention_quadratic"]
    assert rows() == every and rows("model.output_mode=mean_spatial") == every[1:]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["probe.mode=attention_quadratic"], "attends to patch tokens.*set model.output_mode=all"),
        (["probe.mode=linear", "probe.F.mode=attention_quadratic"], r"for F\) attends"),
        (["probe.mode=linear", "probe.F.mode=quadratic_concat_reuse"], "probe.F asks for quadratic_concat_reuse.*of linear"),
        (["probe.mode=quadratic"], "unknown probe.mode 'quadratic'; valid: ladder, linear"),
        (["probe.mode=linear", "probe.F.mode=nonsense"], "unknown probe.F.mode 'nonsense'"),
        (["probe.mode=linear", "probe.rank=0"], "probe.rank: got 0, expected a whole number of at least 1"),
        (["probe.mode=linear", "probe.F.rank=-3"], "probe.F.rank: got -3, expected a whole number"),
        (["probe.mode=dnn", "probe.dnn_dropout=1.0"], "probe.dnn_dropout: got 1.0, expected a number from 0 to below 1"),
        (["probe.mode=dnn", "probe.F.dnn_num_layers=0"], "probe.F.dnn_num_layers: got 0, .*output layer"),
        (["probe.mode=dnn", "probe.dnn_hidden_dim=0"], "probe.dnn_hidden_dim: got 0"),
        (["probe.mode=linear", "probe.init_std=0"], "probe.init_std: got 0, expected a number above 0"),
        (["probe.mode=linear", "probe.condition_readout=maybe"], "condition_readout: got 'maybe', expected true or false"),
        (["probe.readout=notes"], "probe.readout: got 'notes', expected program or paper"),
        (["binding.ladder=[{probe: {mode: linear, rank: x}}]"], "probe.rank: got 'x'"),
        (["binding.ladder=[]"], "binding.ladder is empty"),
        (["binding.ladder=[{probe: {mode: linear, ranc: 3}}]"], "binding.ladder, entry 1: .*ranc"),
        (["binding.ladder=[{probe: {mode: linear}}, {probe: {mode: linear, rank: 3}}]"], "entry 2: 'cls-linear' is there"),
        (["binding.ladder=[{name: a/b, probe: {mode: linear}}]"], "entry 1: got name 'a/b', expected letters"),
        (["binding.ladder=[{name: random, probe: {mode: linear}}]"], "got name 'random'"),
        (["trainer.seeds=[]"], "trainer.seeds"),
    ],
)
def test_settings_that_cannot_be_met(overrides: list[str], said: str) -> None:
    cfg = configure(*overrides)
    with pytest.raises(UserError, match=said):
        binding_task.check(cfg)


def test_the_grid_is_one_command() -> None:
    """49 pairs of numbers of colours and shapes, named on the command line the file shows; the published probe."""
    text = (ROOT / "cfgs" / "experiment" / "binding_grid.yaml").read_text()
    sweep = " ".join(f"dataset.n_{kind}=1,2,3,4,5,6,7" for kind in ("colors", "shapes"))
    assert f"python main.py -m experiment=binding_grid {sweep}" in text
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        cfg = compose("config", ["experiment=binding_grid"], return_hydra_config=True)
    assert not cfg.hydra.sweeper.params and cfg.mode == "train_binding"
    assert (cfg.dataset.n_colors, cfg.dataset.n_shapes) == (7, 7)
    assert cfg.probe.rank == 16 and cfg.probe.init_std == 0.02 and not cfg.protocol.geometry.antialias


@pytest.mark.parametrize("knob", ["probe.mode", "probe.F.mode"])
def test_pixels_have_no_class_token_to_attend_beside(knob: str) -> None:
    cfg = configure("model.output_mode=all", "probe.mode=linear", f"{knob}=attention_quadratic")
    assert pixels(Opened(cfg, {})) is None


def test_data_without_codes_and_models_without_class_token_are_refused() -> None:
    sample = toy_sample(torch.zeros(4, 2), np.zeros((4, 4)))
    bare = sample._replace(labels={"identity": torch.zeros(4, 1)})
    with pytest.raises(UserError, match="split val carries no object and feature codes"):
        check_samples({"val": bare}, configure("probe.mode=linear"))
    sample.meta["facts"]["has_class_token"] = False
    check_samples({"val": sample}, configure("probe.mode=linear"))
    with pytest.raises(UserError, match="reads the class token and toy has none"):
        check_samples({"val": sample}, configure("probe.mode=attention_quadratic", "model.output_mode=all"))


def test_a_checkpoint_of_another_code_is_refused() -> None:
    probe = BINDING_PROBES["linear"](FitAxes([0], [0]), 2, n_bits=9, matmul_dtype="float32")
    with pytest.raises(UserError, match="reads Y as 9 bits from 1 tokens, these images have 4 bits"):
        check_loaded(probe, Code([0], "Y"), toy_sample(torch.zeros(4, 2), np.zeros((4, 4))))
