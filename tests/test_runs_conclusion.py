"""A finished run is shown again from what it left, and computes again what was changed."""

from pathlib import Path
from unittest import mock

import pytest
from program import TINY, Finished, run

import trainer
from runs.finished import read_facts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Finished, str]:
    done = run(folder, *TINY)
    return done, capsys.readouterr().out


def files(directory: Path) -> dict[str, bytes]:
    """All files but those that tell of this process."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name not in ("run.json", "log.txt")]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def test_nothing_is_computed_again(folder: Path, finished: tuple[Finished, str], capsys: pytest.CaptureFixture[str]) -> None:
    first, text = finished
    before = files(first.dir)
    never = mock.Mock(side_effect=AssertionError)
    with mock.patch.object(trainer, "probe", never), mock.patch("activation.open_tokens", never):
        again = run(folder, *TINY)
    shown = capsys.readouterr().out
    assert again == first and files(again.dir) == before
    table = (first.dir / "table.txt").read_text()
    assert table in text and table in shown
    facts = read_facts(first.dir)
    assert facts["status"] == "finished" and facts["conclusion"]["objective"] == first.objective


@pytest.mark.parametrize("name", ["layers.csv", "table.txt", "scores.safetensors", "layers.png"])
def test_what_is_missing_is_written_again(name: str, folder: Path, finished: tuple[Finished, str]) -> None:
    before = files(finished[0].dir)
    (finished[0].dir / name).unlink()
    run(folder, *TINY)
    assert files(finished[0].dir) == before


def test_an_edited_file_is_not_shown(folder: Path, finished: tuple[Finished, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = files(finished[0].dir)
    path = finished[0].dir / "table.txt"
    path.write_text(path.read_text().replace("AUROC", "AUPRC"))
    run(folder, *TINY)
    assert "AUPRC" not in capsys.readouterr().out and files(finished[0].dir) == before
