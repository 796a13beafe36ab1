"""A finished run and its cache in folders that nobody may write, such as a colleague's: scored and shown elsewhere."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import program
import pytest
from program import MODEL, SCENES, finish, start

from runs.records import read_records

RUN = [*MODEL, *SCENES, "trainer.epochs=1", "trainer.seeds=1", "trainer.n_boot=20", "trainer.lr=1e-2", "controls=none"]
LOOK = ["wandb.mode=disabled", "threads=1"]


def bound_by_permissions(*arguments: Any) -> None:
    """`main.py` in a process for which permissions count: of root, all privileges are dropped first."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this process
        if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
            raise OSError(ctypes.get_errno(), "capset")
    real(*arguments)


real = program._main


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Cache and outputs of a finished run, which nobody may write."""
    folder = tmp_path_factory.mktemp("colleague")
    assert finish(start(folder, *RUN, *LOOK)).status == 0
    places = [folder, *folder.rglob("*")]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    yield folder
    for place in places:
        place.chmod(0o755 if place.is_dir() else 0o644)


def scores(folder: Path, mode: str) -> list:
    (file,) = (folder / "outputs" / mode).glob("*/metrics.jsonl")
    return [(r["layer"], r["seed"], r["subset"], r["metrics"]) for r in read_records(file) if r["kind"] == "score"]


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> program.Done:
    monkeypatch.setattr(program, "_main", bound_by_permissions)
    return finish(start(folder, *arguments, *LOOK))


def test_it_is_scored_and_shown(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = (finished / "outputs" / "train").iterdir()
    there = [f"run={run}", f"cache.dir={finished}/cache"]
    done = answer(tmp_path, monkeypatch, "mode=eval", *there)
    assert done.status == 0, done.err
    assert scores(tmp_path, "eval") == scores(finished, "train")
    done = answer(tmp_path, monkeypatch, "mode=vis", *there, "vis.gif=false", "vis.page=false")
    assert done.status == 0, done.err
    assert list(tmp_path.glob("outputs/vis/*/*.png"))


@pytest.mark.parametrize("place", ["cache.dir={}/cache", "output_dir={}/outputs"])
def test_what_has_to_be_written_there_is_refused_in_one_sentence(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    place = place.format(finished)
    done = answer(tmp_path, monkeypatch, *RUN, "dataset.n_train=17", place)
    assert done.status == 1 and done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert f"{finished}/{'cache' if 'cache' in place else 'outputs'}" in done.err.splitlines()[-1]
    assert place.partition("=")[0] in done.err and "defect" not in done.err


def test_a_run_there_is_not_continued(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = answer(tmp_path, monkeypatch, *RUN, f"cache.dir={finished}/cache", f"output_dir={finished}/outputs")
    assert done.status == 1 and "set cache.dir or output_dir to a folder of your own" in done.err.splitlines()[-1]
