"""The loop: stacked = alone, exact resume, per-fit selection, named failures. Samples are planted, no backbone runs."""

import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from samples import planted_sample

import pairs.task
import trainer
from activation import StackedTokens
from controls import Subject, constant_loss
from errors import UserError
from pairs.task import check_samples, task_maker
from probes import load_probe
from runs.finished import check_fit
from runs.records import read_records
from runs.run import Run, checkpoint_files
from runs.signals import Stopped
from show.convergence import sentences
from show.records import Resampling, records
from tasks import Task, read_seeds

ROOT = Path(__file__).parent.parent


def configure(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        return compose("config", ["trainer.epochs=3", "trainer.batch_images=8", "trainer.n_boot=50", *overrides])


def open_test_run(folder: Path) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, {"mode": "train"})


def fit_planted(cfg: DictConfig, folder: Path, layers: tuple = ("embed", 0)) -> tuple:
    """Fit the configured probe on planted tokens; returns task, subject, probes and the run."""
    samples = {split: planted_sample(seed=i, layers=("embed", 0)) for i, split in enumerate(("train", "val", "test"))}
    for split, sample in samples.items():
        keep = [list(sample.tokens.layers).index(layer) for layer in layers]
        x = sample.tokens.gather(torch.arange(len(sample.keys)), keep)
        samples[split] = sample._replace(tokens=type(sample.tokens).from_tensor(x, list(layers)))
    task = make_task(cfg)
    subject, run = Subject("probe", "", cfg.probe, samples, task.seeds), open_test_run(folder)
    return task, subject, trainer.fit_stack(run, task, subject, trainer.FitOptions.read(cfg)), run


def make_task(cfg: DictConfig) -> Task:
    return task_maker(cfg)(read_seeds(cfg.trainer.seeds))


@pytest.mark.parametrize("overrides", [[], ["probe.mode=mlp"], ["mode=train_class"], ["mode=train_identity"]])
def test_a_fit_in_a_stack_is_the_fit_alone(tmp_path: Path, overrides: list[str]) -> None:
    _, _, stacked, _ = fit_planted(configure("trainer.seeds=[0,1]", *overrides), tmp_path / "stack")
    _, _, alone, _ = fit_planted(configure("trainer.seeds=[1]", *overrides), tmp_path / "alone", layers=(0,))
    variants = stacked[0].seeds.index(1)
    for name, value in alone[0].named_parameters():
        other = dict(stacked[0].named_parameters())[name]
        torch.testing.assert_close(other[variants, 1], value[0, 0], atol=1e-6, rtol=0)


def test_a_fit_is_stopped_alone_where_it_is_stopped_in_a_stack(tmp_path: Path) -> None:
    """The signal of the second layer is soon learnt, the noise of the first one goes on changing."""
    knobs = [f"trainer.{knob}" for knob in ("epochs=12", "patience=1", "lr=0.1", "batch_images=24")]
    knobs.append("protocol.pairs.fit=[all]")
    _, _, (stacked,), run = fit_planted(configure("trainer.seeds=[0,1]", *knobs), tmp_path / "stack")
    epochs = torch.tensor(stacked.facts["epochs"])  # [S, L]
    assert (epochs[:, 1] < epochs[:, 0]).all()
    for i, layer in enumerate(("embed", 0)):
        _, _, (alone,), its = fit_planted(configure("trainer.seeds=[1]", *knobs), tmp_path / f"alone{i}", layers=(layer,))
        assert alone.facts["epochs"] == [[int(epochs[1, i])]] == [[len(epoch_records(its))]]
        for which in ("best", "last"):
            one, of_stack = (load_probe(checkpoint_files(r.dir, "probe", which)[0]) for r in (its, run))
            for name, value in one.named_parameters():
                torch.testing.assert_close(dict(of_stack.named_parameters())[name][1, i], value[0, 0], atol=1e-6, rtol=0)
    stopped_at = int(epochs[0, 1])
    curve = [record["val_loss"][0][1] for record in epoch_records(run)]
    assert all(value is not None for value in curve[:stopped_at]) and curve[stopped_at:] == [None] * (len(curve) - stopped_at)


def test_leaving_stopped_fits_out_changes_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = [f"trainer.{knob}" for knob in ("epochs=12", "patience=1", "lr=0.1", "batch_images=24", "seeds=2")]
    form_bce = pairs.task.form_bce
    monkeypatch.setattr("pairs.task.form_bce", lambda *args: form_bce(*args[:5], args[5] if skip else None))
    for skip in (True, False):
        _, _, (probe,), run = fit_planted(configure(*knobs), tmp_path / str(skip))
        assert len(set(torch.tensor(probe.facts["epochs"]).flatten().tolist())) > 1  # they stop one by one
        if skip:
            want, history = probe, epoch_records(run)
    for name, value in probe.named_parameters():
        assert torch.equal(value, dict(want.named_parameters())[name])
    assert epoch_records(run) == history


def epoch_records(run: Run) -> list[dict]:
    return [record for record in read_records(run.dir / "history.jsonl") if record["kind"] == "epoch"]


@pytest.mark.parametrize("task", ["train", "train_class", "train_identity"])
def test_the_constant_answer_is_the_best_one_and_noise_is_not_read_better(tmp_path: Path, task: str) -> None:
    cfg = configure(f"mode={task}", "trainer.seeds=2")
    task, subject, (probe,), _ = fit_planted(cfg, tmp_path)
    options = trainer.FitOptions.read(cfg)
    constant = constant_loss(task, subject.samples, options.batch_images)
    assert constant.shape == (len(task.fits()),)
    on_train = {**subject.samples, "val": subject.samples["train"]}
    at = lambda shift: constant_loss(moved(task, shift), on_train, options.batch_images)
    if cfg.mode != "train_identity":  # whose dice part has its optimum elsewhere, and whose matching makes use of noise
        assert (at(0.0) < at(0.2)).all() and (at(0.0) < at(-0.2)).all()
        assert (torch.tensor(probe.facts["val_loss"])[:, 0] > constant - 0.02).all()  # the noise of the first layer


def moved(task: Task, shift: float) -> Task:
    """The same task with another constant answer: its first output moved."""
    best = task.constant
    other = type(task).__new__(type(task))
    other.__dict__.update(task.__dict__)

    def constant(train):
        values = best(train).clone()
        values[(slice(None), *[0] * (values.ndim - 1))] += shift
        return values

    other.constant = constant
    return other


def test_a_learning_rate_without_sense_is_flagged_in_every_record(tmp_path: Path) -> None:
    cfg = configure("trainer.lr=1e5", "trainer.epochs=2", "probe.mode=linear", "trainer.seeds=1")
    task, subject, probes, run = fit_planted(cfg, tmp_path)
    result = trainer.evaluate(task, probes, subject, trainer.FitOptions.read(cfg), split="test")
    assert all(fit.worse_than_constant for fit in result.fits) and len(result.fits) == 4  # variants x layers
    assert all(r["worse_than_constant"] for r in records(result, Resampling.read(cfg), split="test"))
    (sentence,) = [text for text in sentences([result]) if text.startswith("!")]
    assert "validation: probe all (layer embed, 0), probe foreground (layer embed, 0)" in sentence


def test_a_short_fit_is_flagged_and_a_solved_one_is_not(tmp_path: Path) -> None:
    knobs = ("epochs=5", "lr=2e-3", "averaging=null", "seeds=1", "batch_images=2")
    cfg = configure(*(f"trainer.{knob}" for knob in knobs))
    task, subject, probes, _ = fit_planted(cfg, tmp_path / "short")
    result = trainer.evaluate(task, probes, subject, trainer.FitOptions.read(cfg), split="test")
    assert [fit.still_falling for fit in result.fits if fit.layer == 0] == [True, True]
    rows = [r for r in records(result, Resampling.read(cfg), split="test") if r["layer"] == 0]
    assert all(row["still_falling"] for row in rows)
    _, _, (solved,), _ = fit_planted(configure("probe.mode=cosine"), tmp_path / "solved")
    assert not torch.tensor(solved.facts["still_falling"]).any()


def test_cutting_the_stack_by_layers_changes_nothing(tmp_path: Path) -> None:
    task, subject, whole, run = fit_planted(configure(), tmp_path / "whole")
    _, _, cut, _ = fit_planted(configure("trainer.stack_gb=1e-9"), tmp_path / "cut")
    assert len(whole) == 1 and len(cut) == 2
    options = trainer.FitOptions.read(configure())
    results = [trainer.evaluate(task, probes, subject, options, split="test") for probes in (whole, cut)]
    assert results[0].layers == results[1].layers
    for a, b in zip(results[0].subsets, results[1].subsets, strict=True):
        for key in a.metrics:
            torch.testing.assert_close(a.metrics[key].value, b.metrics[key].value, atol=1e-6, rtol=0, equal_nan=True)


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "overrides",
    [[], ["mode=train_identity"], ["trainer.optimizer=adam", "trainer.averaging=null"], ["trainer.lr=3", "trainer.patience=1"]],
)
@pytest.mark.parametrize("killed_in_epoch", [2, 3])
def test_a_killed_fit_resumes_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], killed_in_epoch: int
) -> None:
    cfg = configure("trainer.checkpoint_seconds=0", *overrides)
    _, _, straight, run = fit_planted(cfg, tmp_path / "straight")
    real, calls = trainer.mean_loss, []

    def kill_later(*args, **kwargs):
        calls.append(1)
        if len(calls) == killed_in_epoch:
            raise Stop
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "mean_loss", kill_later)
    with pytest.raises(Stop):
        fit_planted(cfg, tmp_path / "killed")
    monkeypatch.setattr(trainer, "mean_loss", real)
    _, _, resumed, again = fit_planted(cfg, tmp_path / "killed")
    for (name, a), (_, b) in zip(straight[0].named_parameters(), resumed[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert read_records(run.dir / "history.jsonl") == read_records(again.dir / "history.jsonl")
    for which in ("best", "last"):
        files = [load_probe(checkpoint_files(folder, "probe", which)[0]) for folder in (run.dir, again.dir)]
        for a, b in zip(*(f.state_dict().values() for f in files), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stopped_at", [2, 3, 7])  # inside, at the end of and after the first epoch of 3 batches
def test_a_signal_inside_an_epoch_saves_the_fit_and_it_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, stopped_at: int
) -> None:
    cfg = configure("trainer.checkpoint_seconds=1e6")
    _, _, _, run = fit_planted(cfg, tmp_path / "straight")
    real, calls = trainer._loss, []

    def pressed(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if torch.is_grad_enabled() and sum(calls) == stopped_at:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_loss", pressed)
        with pytest.raises(Stopped) as stop:
            fit_planted(cfg, tmp_path / "stopped")
    assert stop.value.number == number and sum(calls) == stopped_at
    _, _, _, again = fit_planted(cfg, tmp_path / "stopped")
    assert read_records(run.dir / "history.jsonl") == read_records(again.dir / "history.jsonl")
    for file in run.dir.rglob("*.safetensors"):
        assert file.read_bytes() == (again.dir / file.relative_to(run.dir)).read_bytes(), file.name


@pytest.mark.parametrize("which", ["best", "last", "state"])
def test_a_damaged_checkpoint_is_refused_and_deleting_it_works(tmp_path: Path, which: str) -> None:
    cfg = configure("trainer.epochs=1")
    fit_planted(cfg, tmp_path)
    file = tmp_path / "checkpoints" / "probe" / f"{which}.00.safetensors"
    good = file.read_bytes()
    if which != "best":  # then the others are read
        (file.parent / "best.00.safetensors").unlink()
    file.write_bytes(good[:-9] + bytes([good[-9] ^ 16]) + good[-8:])
    if which != "last":  # which only eval reads
        with pytest.raises(UserError, match=f"{file} is damaged .*; delete it and repeat the command"):
            fit_planted(cfg, tmp_path)
    file.unlink()
    fit_planted(cfg, tmp_path)
    assert file.read_bytes() == good


def test_a_checkpoint_of_another_fit_is_refused_by_name(tmp_path: Path) -> None:
    cfg = configure("trainer.epochs=1")
    fit_planted(cfg, tmp_path / "a")
    with pytest.raises(UserError, match=r"best.00.safetensors is of something else \(fits: .*; delete it and repeat"):
        fit_planted(configure("trainer.epochs=1", "trainer.seeds=[5]"), tmp_path / "a")


def test_the_last_epoch_in_the_place_of_the_best_is_refused(tmp_path: Path) -> None:
    cfg = configure("trainer.epochs=1")
    _, _, probes, _ = fit_planted(cfg, tmp_path)
    best, last = (tmp_path / "checkpoints" / "probe" / f"{which}.00.safetensors" for which in ("best", "last"))
    best.write_bytes(last.read_bytes())
    with pytest.raises(UserError, match=r'best.00.safetensors is of something else \(which: "last", expected "best"\); delete'):
        fit_planted(cfg, tmp_path)
    facts = probes[0].facts | load_probe(last).facts
    with pytest.raises(UserError, match="best.00.safetensors holds the last epoch, expected the best one; put the right file"):
        check_fit(best, facts, tmp_path, "probe")


def test_every_fit_keeps_its_own_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = configure("trainer.seeds=1")
    losses = iter([torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.tensor([[2.0, 2.0], [2.0, 2.0]]), torch.full((2, 2), 2.5)])
    seen = []

    def scripted(probe, *args, **kwargs):
        seen.append({n: p.detach().clone() for n, p in probe.named_parameters()})
        return next(losses)

    monkeypatch.setattr(trainer, "mean_loss", scripted)
    _, _, (probe,), run = fit_planted(cfg, tmp_path)
    for name, value in probe.named_parameters():
        assert torch.equal(value[:, 0], seen[0][name][:, 0])
        assert torch.equal(value[:, 1], seen[1][name][:, 1])
    loaded = load_probe(checkpoint_files(run.dir, "probe", "best")[0])
    assert loaded.facts["best_epoch"] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("mode", ["cosine", "dot_product"])
def test_offset_and_factor_are_solved_for_and_no_epochs_of_adam_do_better(tmp_path: Path, mode: str) -> None:
    probe_cfg = [f"probe.mode={mode}", "trainer.seeds=2"]
    task, subject, (solved,), run = fit_planted(configure(*probe_cfg), tmp_path / "solved")
    record, *ended = read_records(run.dir / "history.jsonl")
    assert all(fit["kind"] == "fit" and not fit["still_falling"] and fit["epochs"] == 0 for fit in ended) and len(ended) == 8
    assert record["kind"] == "solution" and record["solver"] == "newton" and all(map(all, record["converged"]))
    loaded = load_probe(checkpoint_files(run.dir, "probe", "best")[0])
    assert loaded.facts["solver"] == "newton" and torch.equal(loaded.scale, solved.scale)
    assert torch.equal(solved.bias[0], solved.bias[1])  # the seeds of the variant "all": nothing is drawn
    descent = fit_epochs(task, subject, trainer.FitOptions.read(configure("trainer.lr=0.05")), n_epochs=30)
    train_loss = lambda probe: trainer.mean_loss(
        probe, task, subject.samples["train"], [0, 1], 8, torch.device("cpu")
    )[:2]  # every pair counts the same in each batch of the variant "all"
    assert (train_loss(solved) <= train_loss(descent) + 1e-6).all()


def fit_epochs(task, subject, options, n_epochs: int):
    """The same probe, fitted by some epochs of the optimiser."""
    train = subject.samples["train"]
    probe = task.build_probe(subject.probe, train, train.tokens.layers)
    probe.set_statistics(*trainer.token_statistics(train, train.tokens.layers, 8))
    optimizer = trainer.build_optimizer(probe, options.optimizer, options.lr, options.beta2, options.weight_decay)
    for _ in range(n_epochs):
        for batch in task.batches(train, 8, None):
            x = batch.tokens(train, [0, 1], torch.device("cpu"))
            optimizer.zero_grad()
            task.loss(probe, x, batch).sum().backward()
            optimizer.step()
    return probe


def test_planted_objects_are_found_and_noise_is_not(tmp_path: Path) -> None:
    cfg = configure("trainer.epochs=15", "trainer.seeds=2", "trainer.lr=2e-2")
    task, subject, probes, _ = fit_planted(cfg, tmp_path)
    result = trainer.evaluate(task, probes, subject, trainer.FitOptions.read(cfg), split="test")
    written = list(records(result, Resampling.read(cfg), split="test"))
    rows = [r for r in written if r["seed"] == "mean" and r["subset"] == "all"]
    noise, signal = rows
    assert noise["layer"] == "embed" and noise["interval"]["auroc"][0] < 0.55
    assert signal["metrics"]["auroc"] > 0.75
    assert {r["subset"] for r in written} == {"all", "foreground", "same_class", "same_class_matched"}


def test_a_loss_that_is_not_finite_names_fit_layer_seed_epoch(tmp_path: Path) -> None:
    cfg = configure("trainer.lr=1e30", "probe.standardize=false")
    with pytest.raises(UserError, match=r"loss is not finite \(fit probe, layer .*, seed 0, epoch \d, learning rate"):
        fit_planted(cfg, tmp_path)


@pytest.mark.parametrize(
    ("labels", "missing"),
    [(torch.zeros(4, 6).long(), "no pair of two"), (torch.arange(24).view(4, 6), "no pair of one object")],
)
def test_a_split_without_a_usable_pair_is_refused(labels: torch.Tensor, missing: str) -> None:
    sample = planted_sample(n_images=4, n_tokens=6)
    sample.labels["identity"] = labels
    with pytest.raises(UserError, match=f"split val has no usable pair.*{missing}"):
        check_samples({"val": sample}, "train", "pairwise")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["probe.mode=class_linear"], "needs a pairwise probe; valid: linear"),
        (["mode=train_class", "probe.mode=quadratic"], "needs a pointwise probe; valid: class_linear"),
        (["probe.mode=nonsense"], "unknown probe.mode 'nonsense'; valid: linear"),
        (["trainer.seeds=[]"], "trainer.seeds"),
    ],
)
def test_a_probe_that_does_not_fit_the_task_is_refused(overrides: list[str], said: str) -> None:
    cfg = configure(*overrides)
    with pytest.raises(UserError, match=said):
        make_task(cfg)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", 1.0), ("inverse_sqrt", 3.5**-0.5), ("linear", 0.5), ("cosine", 0.5), ("step", 0.04)],
)
def test_schedules_at_half_time(schedule: str, expected: float) -> None:
    knobs = ["epochs=10", "lr=1.0", f"schedule={schedule}", "step_size=2", "gamma=0.2"]
    options = trainer.FitOptions.read(configure(*(f"trainer.{knob}" for knob in knobs)))
    assert options.learning_rate(5.0, 128) == pytest.approx(expected)


def test_the_rate_of_wider_tokens_is_lower_unless_a_protocol_publishes_it() -> None:
    options = trainer.FitOptions.read(configure("trainer.lr=1.0", "trainer.schedule=constant"))
    assert [options.learning_rate(0.0, dim) for dim in (96, 128, 512)] == pytest.approx([1.0, 1.0, 0.5])
    published = trainer.FitOptions.read(configure("protocol=object_binding_2025"))
    assert published.learning_rate(0.0, 1024) == 1e-3


def test_statistics_are_those_of_the_valid_tokens() -> None:
    sample = planted_sample(n_images=5, n_tokens=9)
    sample.labels["identity_valid"][:, 4:] = False
    mean, std = trainer.token_statistics(sample, sample.tokens.layers, batch_size=2)
    x = sample.tokens.gather(torch.arange(5), None)[:, :, :4].flatten(1, 2)
    torch.testing.assert_close(mean, x.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std, x.std(1, correction=0), atol=1e-5, rtol=1e-5)


def test_statistics_of_channels_far_from_zero_keep_their_deviation() -> None:
    sample = planted_sample(n_images=9, n_tokens=64)
    x = sample.tokens.gather(torch.arange(9), None).float() * 0.05 + 2000
    moved = sample._replace(tokens=type(sample.tokens).from_tensor(x, sample.tokens.layers))
    mean, std = trainer.token_statistics(moved, moved.tokens.layers, batch_size=4)
    flat = x.double().flatten(1, 2)
    torch.testing.assert_close(mean.double(), flat.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(std.double(), flat.std(1, correction=0), rtol=1e-5, atol=0)


def test_correlation_is_that_of_the_channels() -> None:
    sample = planted_sample(n_images=5, n_tokens=9)
    x = sample.tokens.gather(torch.arange(5), None)  # [L, M, T, D]
    x[..., 0] = 3.0
    sample = sample._replace(tokens=StackedTokens.from_tensor(x, sample.tokens.layers))
    found = trainer.token_correlation(sample, sample.tokens.layers[::-1], batch_size=2).flip(0)
    expected = torch.stack([tokens.mT.corrcoef() for tokens in x[..., 1:].flatten(1, 2)])
    torch.testing.assert_close(found[:, 1:, 1:], expected, atol=1e-5, rtol=1e-5)
    assert not found[:, 0].any() and not found[:, :, 0].any()  # a constant channel


def test_tokens_of_a_visit_are_redrawn_in_training_and_fixed_in_evaluation() -> None:
    task, sample = make_task(configure("protocol=object_binding_2026")), planted_sample(n_tokens=100)
    order = torch.Generator().manual_seed(0)
    draws = [torch.cat([b.visited for b in task.batches(sample, 8, order)]) for _ in range(2)]
    assert draws[0].shape == (24, 64) and not torch.equal(*draws)
    fixed = [torch.cat([b.visited for b in task.batches(sample, size, None)]) for size in (8, 5)]
    assert torch.equal(*fixed)
    batch = next(task.batches(sample, 8, None))
    assert torch.equal(batch.labels["identity"], sample.labels["identity"][:8].gather(1, batch.visited))
    tokens = sample.tokens.gather(torch.arange(8), None)
    assert torch.equal(batch.tokens(sample, [0, 1], torch.device("cpu"))[1, 3], tokens[1, 3, batch.visited[3]])


def test_an_image_without_a_valid_patch_has_no_part_in_the_class_accuracy() -> None:
    sample = planted_sample(n_images=4)
    sample.labels["class_valid"][0], sample.labels["class_valid"][1, :8] = False, False
    task = make_task(configure("mode=train_class", "trainer.seeds=[0]"))
    collector = task.collector(sample, 1)
    right = torch.nn.functional.one_hot(sample.labels["class"], 3).float()[None, None]  # [S, L, M, T, K]
    right[:, :, 2] = right[:, :, 2].roll(1, -1)  # all of image 2 is wrong
    for batch in task.batches(sample, 3, None):
        collector.add(batch, right[:, :, batch.images])
    (found,) = [subset for subset in collector.results() if subset.question == "class"]
    assert float(found.metrics["accuracy"].value) == (8 + 16) / (8 + 16 + 16)
    assert found.counts == {"n_patches": 40, "n_images": 3}
