"""Fits made side by side are those made in turn: checkpoints, records, mistakes, a restart."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import handled
from program import TINY, run
from samples import planted_sample
from test_trainer import configure, make_task, open_test_run

import trainer
from controls import Subject
from errors import UserError
from runs.records import read_records
from runs.run import Run
from runs.signals import Stopped
from tasks import Task

KNOBS = ("threads=1", "device=cpu", "trainer.seeds=[0,1]", "trainer.epochs=4")
NAMES = ("probe", "first", "second")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch):
    """In both ways: how a product is cut into threads can change its last bit. And the smallest fits are worth it here."""
    before = torch.get_num_threads()
    monkeypatch.setattr("runs.fit_ahead.LEAST", 0.0)
    yield
    torch.set_num_threads(before)


def subjects(cfg) -> list[tuple[Task, Subject]]:
    """Three fits of one size on planted tokens of different scenes."""
    fits = []
    for number, name in enumerate(NAMES):
        samples = {split: planted_sample(seed=10 * number + i) for i, split in enumerate(("train", "val", "test"))}
        task = make_task(cfg)
        fits.append((task, Subject("probe", name if number else "", cfg.probe, samples, task.seeds)))
    return fits


def fit_all(folder: Path, *knobs: str, before: Callable[[Run], None] = lambda run: None) -> Run:
    cfg, run = configure(*KNOBS, *knobs), open_test_run(folder)
    options, fits = trainer.FitOptions.read(cfg), subjects(cfg)
    with trainer.ahead(run, fits, options):
        before(run)
        for task, subject in fits:
            trainer.fit_stack(run, task, subject, options)
    return run


def files(run: Run) -> dict[str, bytes]:
    return {str(p.relative_to(run.dir)): p.read_bytes() for p in (run.dir / "checkpoints").rglob("*.safetensors")}


def lines(run: Run) -> list[str]:
    return sorted(map(str, read_records(run.dir / "history.jsonl")))


def forks(run: Run) -> None:
    assert run.ahead is not None


def test_fits_side_by_side_are_those_in_turn_to_the_last_bit(tmp_path: Path) -> None:
    def stays(run: Run) -> None:
        assert run.ahead is None

    turn = fit_all(tmp_path / "turn", "processes=1", before=stays)
    beside = fit_all(tmp_path / "beside", "processes=3", before=forks)
    assert files(beside) == files(turn) and len(files(turn)) == 9  # best, last and state of each
    assert lines(beside) == lines(turn)
    again = fit_all(tmp_path / "beside", "processes=3", before=stays)  # nothing is left to fit
    assert lines(again) == lines(turn)


@pytest.mark.parametrize("size", [1, 2])
def test_one_fit_that_outweighs_the_others_keeps_all_threads(tmp_path: Path, size: int) -> None:
    cfg, run = configure(*KNOBS, "processes=2", "trainer.seeds=1"), open_test_run(tmp_path)
    fits = subjects(cfg)[:size]
    cfg.trainer.seeds = 4
    fits[0] = make_task(cfg), fits[0][1]
    with trainer.ahead(run, fits, trainer.FitOptions.read(cfg)):
        assert run.ahead is None


def test_a_stack_of_several_chunks_is_fitted_beside_itself(tmp_path: Path) -> None:
    cfg = configure(*KNOBS, "processes=2", "trainer.seeds=8")
    task, subject = subjects(cfg)[0]
    layers = []
    for name, processes in (("beside", 2), ("turn", 1)):
        run = open_test_run(tmp_path / name)
        options = dataclasses.replace(trainer.FitOptions.read(cfg), processes=processes)
        with trainer.ahead(run, [(task, subject)], options):
            assert (run.ahead is None) == (processes == 1)
            layers.append([probe.layers for probe in trainer.fit_stack(run, task, subject, options)])
    assert layers[0] == layers[1] and len(layers[0]) == 2
    assert files(run) == {name: (tmp_path / "beside" / name).read_bytes() for name in files(run)}


def test_a_moment_of_work_is_not_worth_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cfg, run = configure(*KNOBS, "processes=3"), open_test_run(tmp_path)
    with trainer.ahead(run, subjects(cfg), trainer.FitOptions.read(cfg)):
        assert run.ahead is None


def test_short_memory_means_fits_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.fit_ahead.free_memory", lambda: 1)
    cfg, run = configure(*KNOBS, "processes=3"), open_test_run(tmp_path)
    with trainer.ahead(run, subjects(cfg), trainer.FitOptions.read(cfg)):
        assert run.ahead is None


def test_a_loss_that_is_not_finite_is_refused_in_the_same_sentence(tmp_path: Path) -> None:
    texts = []
    for processes in (1, 3):
        with pytest.raises(UserError) as refused:
            fit_all(tmp_path / str(processes), f"processes={processes}", "trainer.lr=1e38", "trainer.averaging=null")
        texts.append(str(refused.value))
    assert texts[0] == texts[1] and "fit probe" in texts[0]


def test_a_fit_whose_process_dies_is_made_in_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first, said = fit_all(tmp_path / "whole", "processes=1"), os.getpid(), []
    fit = trainer.fit

    def dying(probe, task, subject, *rest, **more):
        if os.getpid() != first and subject.name == "first":
            os.kill(os.getpid(), signal.SIGKILL)
        return fit(probe, task, subject, *rest, **more)

    monkeypatch.setattr(trainer, "fit", dying)
    monkeypatch.setattr(Run, "note", lambda self, text: None)
    done = fit_all(tmp_path / "dying", "processes=3", before=lambda run: setattr(run, "say", said.append))
    assert files(done) == files(whole) and lines(done) == lines(whole)
    assert len(said) == 1 and "first: its process was killed by signal 9" in said[0] and "goes on in this process" in said[0]


def test_a_stopped_run_goes_on_where_its_processes_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, first = fit_all(tmp_path / "whole", "processes=1"), os.getpid()
    fit_epoch = trainer._fit_epoch

    def stop_in_the_second_epoch(*args):
        if os.getpid() != first and args[6].epoch == 1:
            os.kill(first, signal.SIGTERM)
        return fit_epoch(*args)

    monkeypatch.setattr(trainer, "_fit_epoch", stop_in_the_second_epoch)
    with pytest.raises(Stopped), handled(signal.SIGTERM):
        fit_all(tmp_path / "stopped", "processes=3")
    monkeypatch.setattr(trainer, "_fit_epoch", fit_epoch)
    assert list((tmp_path / "stopped" / "checkpoints").rglob("state*"))
    again = fit_all(tmp_path / "stopped", "processes=3")
    assert files(again) == files(whole) and lines(again) == lines(whole)


@pytest.mark.parametrize("more", [["trainer.folds=3"], ["mode=train_class", "trainer.stack_gb=1e-9"]])
def test_a_run_side_by_side_writes_the_records_of_one_in_turn(tmp_path: Path, more: list[str]) -> None:
    asked = [*TINY, "controls=[position,random]", "trainer.epochs=2", "threads=1", "model.layers=[0,1]", *more]
    turn = run(tmp_path / "turn", *asked, "processes=1")
    beside = run(tmp_path / "beside", *asked, "processes=2")
    for file in ("metrics.jsonl", "history.jsonl"):
        one, other = (sorted(map(str, done.records(file))) for done in (turn, beside))
        assert one == other and len(one) > 5
    assert beside.objective == turn.objective
