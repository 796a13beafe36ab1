"""Signals end a run in order, and do nothing to one that is complete."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from runs import signals
from runs.run import open_run

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def installed():
    before = {number: signal.getsignal(number) for number in signals.STOPPING}
    signals.leave()
    signals.begin()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def opened(tmp_path: Path):
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        return open_run(compose("config", [f"output_dir={tmp_path}", "wandb.mode=disabled"]))


def status(run) -> str:
    return json.loads((run.dir / "run.json").read_text())["status"]


@BOTH
def test_a_signal_stops_and_says_which_it_was(number: int) -> None:
    with pytest.raises(signals.Stopped) as stop:
        signal.raise_signal(number)
    assert signals.exit_status(stop.value) == 128 + number


@BOTH
def test_what_is_half_done_is_finished_first(number: int) -> None:
    done = []
    with pytest.raises(signals.Stopped), signals.stop_later() as stopping:
        assert not stopping()
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGINT)  # an impatient second one
        done.append(stopping())
    assert done == [True]


def test_a_second_signal_during_the_last_writes_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def press_again(handle: int) -> None:
        calls.append(handle)
        if stopping:
            signal.raise_signal(signal.SIGTERM)
        real(handle)

    stopping = False
    monkeypatch.setattr(os, "fsync", press_again)
    with pytest.raises(signals.Stopped) as stop, opened(tmp_path) as run:
        stopping = True
        signal.raise_signal(signal.SIGINT)
    assert status(run) == "interrupted" and stop.value.number == signal.SIGINT
    monkeypatch.setattr(signals, "ONE_REQUEST", 0.0)
    with pytest.raises(signals.Stopped):  # and afterwards signals are heard again
        signal.raise_signal(signal.SIGTERM)


def test_two_signals_at_once_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler and the shell send them: the second must not break off what the first one set going."""
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with pytest.raises(signals.Stopped), signals.stop_later():
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    clock[0] += 1.0
    with pytest.raises(signals.Stopped):
        signal.raise_signal(signal.SIGINT)


@BOTH
def test_a_signal_after_the_results_are_written_leaves_a_finished_run(tmp_path: Path, number: int) -> None:
    with opened(tmp_path) as run:
        run.finishing()
        signal.raise_signal(number)
        with signals.stop_later() as stopping:
            signal.raise_signal(number)
            assert not stopping()
    assert status(run) == "finished"


def test_a_process_that_is_on_its_way_out_ignores_signals() -> None:
    signals.ignore()
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)


def test_a_job_in_the_background_keeps_ignoring_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.leave()
    signals.begin()
    with signals.stop_later():
        signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


@BOTH
def test_a_process_that_has_begun_nothing_leaves_at_once(tmp_path: Path, number: int) -> None:
    # A module of the name of one that main.py imports: the signal comes in the middle of the imports.
    (tmp_path / "hydra.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(5)\n")
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert done.returncode == 128 + number and not done.stdout
    assert done.stderr == f"\n{word}: nothing finished is lost, the same command resumes here\n"


def test_an_error_that_was_raised_in_the_place_of_a_signal_is_a_signal(tmp_path: Path) -> None:
    def broken_off() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise AttributeError("'NoneType' object has no attribute '_invalidate_flags_cache'")  # as omegaconf does

    with pytest.raises(AttributeError) as error, opened(tmp_path) as run:
        broken_off()
    stop = signals.stop_behind(error.value)
    assert stop is not None and signals.exit_status(stop) == 143 and status(run) == "interrupted"
    assert signals.stop_behind(ValueError()) is None


def test_signals_are_raised_only_while_a_job_is_under_way() -> None:
    signals.leave()
    handlers = [signal.getsignal(number) for number in signals.STOPPING]
    signals.begin()
    with pytest.raises(signals.Stopped):
        signal.raise_signal(signal.SIGINT)
    signals.end()
    assert [signal.getsignal(number) for number in signals.STOPPING] == handlers


WAY_OUT = """
from runs import signals
signals.skip_teardown()
import atexit, sys, threading, time
class Left:
    def __del__(self): print("taken down")
left = Left()
atexit.register(print, "handler")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
"""


def way_out(end: str, stdout: int | None = subprocess.PIPE) -> subprocess.CompletedProcess:
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", WAY_OUT + end], cwd=ROOT, env=buffered, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("end", "status", "out"),
    [("signals.succeeded()", 0, "thread\nhandler\n"), ("sys.exit(3)", 3, "thread\nhandler\ntaken down\n")],
)
def test_the_way_out_waits_for_threads_handlers_and_output(end: str, status: int, out: str) -> None:
    done = way_out(end)
    assert (done.returncode, done.stdout.decode(), done.stderr) == (status, out, b"")


def test_output_that_cannot_be_written_is_a_failure_on_the_way_out_too() -> None:
    with open("/dev/full", "w") as full:
        assert way_out("signals.succeeded()", full.fileno()).returncode == 120
