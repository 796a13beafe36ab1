"""Runs and their files: nothing torn, nothing twice, the end of a run is recorded truly."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from errors import UserError
from files import write_atomically
from runs.adopt import complete
from runs.records import read_records
from runs.run import newest_run, open_run, read_config, read_facts, run_directory, source_run
from runs.signals import stop_later
from show.text import format_table

ROOT = Path(__file__).parent.parent


def configure(tmp_path: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        return compose("config", [f"output_dir={tmp_path}", "wandb.mode=disabled", *overrides])


def test_the_same_configuration_finds_its_directory_again(tmp_path: Path) -> None:
    cfg = configure(tmp_path)
    assert run_directory(cfg) == run_directory(configure(tmp_path, "debug=true", "cache.dir=elsewhere"))
    assert run_directory(cfg) != run_directory(configure(tmp_path, "trainer.lr=1"))
    assert run_directory(cfg) != run_directory(configure(tmp_path, "cache.dtype=float32"))


def test_resume_false_starts_a_new_directory(tmp_path: Path) -> None:
    with open_run(configure(tmp_path)) as first:
        pass
    with open_run(configure(tmp_path, "resume=false")) as second:
        assert second.dir != first.dir
    with open_run(configure(tmp_path)) as third:
        assert third.dir == first.dir and third.before["status"] == "finished"


def test_a_run_tells_how_it_ended(tmp_path: Path) -> None:
    def status() -> str:
        return json.loads((run.dir / "run.json").read_text())["status"]

    with open_run(configure(tmp_path)) as run:
        assert status() == "running"
    assert status() == "finished"
    with pytest.raises(RuntimeError), open_run(configure(tmp_path)) as run:
        raise RuntimeError
    assert status() == "failed"
    with pytest.raises(UserError), open_run(configure(tmp_path)) as run:
        raise UserError("a mistake")
    assert not run.dir.exists()  # nothing was computed
    with pytest.raises(UserError), open_run(configure(tmp_path)) as run:
        run.write({"kind": "score", "name": "probe"})
        raise UserError("a mistake")
    assert status() == "failed"
    with pytest.raises(KeyboardInterrupt), open_run(configure(tmp_path)) as run:
        raise KeyboardInterrupt
    assert status() == "interrupted"


def test_provenance_is_complete(tmp_path: Path) -> None:
    with open_run(configure(tmp_path)) as run:
        pass
    facts = json.loads((run.dir / "run.json").read_text())
    assert {"commit", "dirty", "code", "torch", "timm", "cpu", "command", "seconds"} <= facts.keys()


def test_records_are_whole_unique_and_survive_a_torn_line(tmp_path: Path) -> None:
    def record(layer: int) -> dict:
        return {"kind": "score", "layer": layer, "value": float("nan")}

    with open_run(configure(tmp_path)) as run:
        run.write(record(1))
    path = run.dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "sco')
    with open_run(configure(tmp_path)) as run:
        run.write(record(1))
        run.write(record(2))
        assert [r["layer"] for r in read_records(path)] == [1, 2]  # flushed as they come
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [None, None]


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with open_run(configure(tmp_path)), pytest.raises(UserError, match="another process is working in"):
        with open_run(configure(tmp_path)):
            pass


def test_newest_run_is_the_last_finished_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run of mode train"):
        newest_run(tmp_path)
    with open_run(configure(tmp_path)) as finished:
        pass
    with pytest.raises(RuntimeError), open_run(configure(tmp_path, "seed=1")):
        raise RuntimeError
    assert newest_run(tmp_path) == finished.dir


def test_score_maps_are_those_of_the_newest_run_about_patches(tmp_path: Path) -> None:
    with open_run(configure(tmp_path)) as patches:
        pass
    with open_run(configure(tmp_path, "mode=train_binding")) as codes:
        pass
    assert source_run(configure(tmp_path, "mode=vis")) == patches.dir
    assert source_run(configure(tmp_path, "mode=eval")) == codes.dir


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full, writing .*file failed"):
        write_atomically(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"the disk is full, writing {tmp_path}.* failed; free some space"):
            with open_run(configure(tmp_path)):
                raise AssertionError("entered")
    with pytest.raises(UserError, match="the disk is full"), open_run(configure(tmp_path)) as run:
        run.write({"kind": "score", "layer": 1})
        monkeypatch.setattr(os, "fsync", full)  # the facts cannot be written either
        full(0)
    monkeypatch.undo()
    with open_run(configure(tmp_path)) as run:
        run.write({"kind": "score", "layer": 2})
    assert [r["layer"] for r in read_records(run.dir / "metrics.jsonl")] == [1, 2]


def test_ctrl_c_waits_for_an_import() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with stop_later():
            signal.raise_signal(signal.SIGINT)
            steps.append("imported")
        steps.append("went on")
    assert steps == ["imported"]
    with stop_later():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_the_mirror_never_costs_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    with open_run(configure(tmp_path, "wandb.mode=offline")) as run:
        run.write({"kind": "score"})
        run.mirror.curve([], [])
        run.mirror.log({"a": 1})
    assert "W&B is not mirrored" in (run.dir / "log.txt").read_text()


def test_warnings_are_wrapped_and_tables_are_not(tmp_path: Path) -> None:
    with open_run(configure(tmp_path, "report.width=40")) as run:
        run.say("warning: " + "word " * 20 + "/a/path/that/is/longer/than/forty/characters/in/all")
        run.say("of what was measured " * 4)
        run.say("to send it: wandb sync /a/path to copy")
        run.say("x" * 90)
    lines = (run.dir / "log.txt").read_text().splitlines()
    warning = lines[lines.index(next(line for line in lines if line.startswith("warning"))) : -5]
    assert lines[-5:-1] == [
        "of what was measured of what was",
        "  measured of what was measured of what",
        "  was measured",
        "to send it: wandb sync /a/path to copy",
    ]
    assert all(len(line) <= 40 for line in warning[:-1]) and warning[-1].strip().startswith("/a/path") and lines[-1] == "x" * 90


def test_wide_tables_stand_in_blocks() -> None:
    rows = [["a", "1" * 10, "2" * 10, "3" * 10]]
    text = format_table(["name", *"xyz"], rows, width=30)
    assert max(map(len, text.splitlines())) <= 30 and text.count("name") == 2 and text.count("1" * 10) == 1
    assert format_table(["name", *"xyz"], rows, width=60).count("name") == 1
    assert format_table(["name", "x"], [["a", "1" * 50]], width=20).splitlines()[-1].endswith("1" * 50)  # nothing is cut
    name = "a name of many words that is too long"
    folded = format_table(["run", "x"], [[name, "1" * 9], [f"  {name}", "2"]], width=40).splitlines()
    assert folded[2:] == ["a name of many words that is", "  too long                    111111111",
                          "  a name of many words that", "    is too long                       2"]  # fmt: skip


def test_tables_are_flush() -> None:
    text = format_table(["layer", "score"], [["embed", ".5"], ["0", ".75"]])
    assert text.splitlines() == ["layer  score", "-----  -----", "embed     .5", "0        .75"]


# ------------------------------------------------------------------------------------------- damaged and hostile files


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"[" * 100_000, None])
def test_a_damaged_run_json_stops_nobody_else(tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture) -> None:
    with open_run(configure(tmp_path)) as finished:
        pass
    other = tmp_path / "train" / "other" / "run.json"
    other.parent.mkdir()
    other.mkdir() if content is None else other.write_bytes(content)
    assert newest_run(tmp_path) == finished.dir
    assert f"{other} is " in (said := capsys.readouterr().err) and "this run is passed over" in said


def test_a_damaged_run_json_of_its_own_is_named_and_can_be_deleted(tmp_path: Path) -> None:
    with open_run(configure(tmp_path)) as run:
        run.rest_on({"activations": "a"})
        run.write({"kind": "score", "layer": 1})
    (run.dir / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is damaged \(.*\); delete it: .*the rest stays"):
        with open_run(configure(tmp_path)):
            pass
    (run.dir / "run.json").unlink()
    with open_run(configure(tmp_path)) as run:  # nobody knows any more what these records rest on
        run.rest_on({"activations": "a"})
    assert (run.dir / "superseded-1" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: [", "is damaged"), (b"\xff\xfea", "not UTF-8"), (b"", "no section model"), (b"text", "no section model"),
        (b"- 1", "is damaged"), (b"a: &a [1]\nb: *a", "YAML alias"), (b"a: ${oc.env:HOME}", "interpolation"),
        (b"a: " + b"[" * 3_000 + b"]" * 3_000, "nested too deeply"), (b"a: \x00", "is damaged"),
        (b"a: !!python/object/apply:os.getcwd []", "is damaged"),
        (None, "is a folder where a file belongs"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_named_with_what_to_do(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "run" / "config.yaml"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} .*{reason}.*; name another run with run=") as caught:
        source_run(configure(tmp_path, "mode=eval", f"run={path.parent}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", [1]), ("protocol.name", {"a": 1}), ("protocol.name", 5), ("model.weights", ["x"]), ("trainer.seeds", {"a": 1}),
        ("trainer.seeds", ["a"]), ("controls", {"_target_": "os.mkdir"}), ("protocol.geometry.kind", [1]), ("seed", "text"),
        ("vis.out", 5), ("cache.ram_gb", "much"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_in_a_stored_configuration_is_named(tmp_path: Path, key: str, value: Any) -> None:
    cfg = configure(tmp_path)
    cfg.protocol.name = "clean, changed: geometry.kind=stretch"
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(cfg))
    assert complete(read_config(tmp_path), path).protocol.name.startswith("clean")
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    path.write_text(OmegaConf.to_yaml(cfg))
    with pytest.raises(UserError, match=rf"config.yaml is damaged \({key} is .*, expected .*\); name another run with run="):
        complete(read_config(tmp_path), path)


@pytest.mark.parametrize("facts", [{"identity": 5}, {"inputs": [1]}, {"status": {}}])
def test_facts_of_another_kind_are_named(tmp_path: Path, facts: dict) -> None:
    (tmp_path / "run.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=rf"run.json is damaged \({next(iter(facts))} is .*\); delete it: "):
        read_facts(tmp_path)


def test_a_mode_that_looks_at_no_run_refuses_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mode=train looks at no finished run, got run=here; leave run=… out"):
        source_run(configure(tmp_path, "run=here"))
