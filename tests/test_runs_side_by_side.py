"""Jobs in forked processes: each is done once, what goes wrong is said, none outlives its parent."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import handled, until

from errors import UserError
from runs.side_by_side import Broken, SideBySide
from runs.signals import Stopped, stop_later


def beside(jobs: dict[str, Callable], n_processes: int = 2, heard: Callable | None = None) -> SideBySide:
    return SideBySide(jobs, n_processes, heard or (lambda *values: None))


def append(path: Path, text: str) -> None:
    with open(path, "a", buffering=1 << 16) as file:
        file.write(text + "\n")


def test_every_job_is_done_once_and_its_messages_arrive_in_order(tmp_path: Path) -> None:
    heard = []

    def job(name: str) -> Callable:
        def work(tell: Callable) -> None:
            append(tmp_path / "done", f"{name} {os.getpid()}")
            for number in range(3):
                tell(number, "ä" * 40_000)  # longer than a pipe takes at once

        return work

    names = [f"job {number}" for number in range(7)]
    with beside({name: job(name) for name in names}, heard=lambda *values: heard.append(values)) as jobs:
        for name in [*names, names[0], "unknown"]:
            jobs.finish(name)
    done = [line.rpartition(" ") for line in (tmp_path / "done").read_text().splitlines()]
    assert sorted(name for name, _, _ in done) == names
    assert len({pid for *_, pid in done}) == 2 and str(os.getpid()) not in {pid for *_, pid in done}
    for name in names:
        assert [(number, len(text)) for who, number, text in heard if who == name] == [(n, 40_000) for n in range(3)]


def test_the_first_jobs_begin_first(tmp_path: Path) -> None:
    jobs = {str(number): lambda tell, number=number: append(tmp_path / "order", str(number)) for number in range(9)}
    with beside(jobs, 1) as alone:
        alone.finish("8")
    assert (tmp_path / "order").read_text().split() == [str(number) for number in range(9)]


def test_a_mistake_is_raised_where_its_job_is_waited_for() -> None:
    def refuse(tell: Callable) -> None:
        raise UserError("the loss is not finite; lower trainer.lr")

    def defect(tell: Callable) -> None:
        raise ZeroDivisionError("by zero")

    with beside({"refused": refuse, "defect": defect, "fine": lambda tell: None}, 1) as jobs:
        jobs.finish("fine")
        with pytest.raises(UserError, match="^the loss is not finite; lower trainer.lr$"):
            jobs.finish("refused")
        with pytest.raises(Broken, match="unexpected ZeroDivisionError: by zero"):
            jobs.finish("defect")
        jobs.finish("defect")  # said once


def test_a_killed_process_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    die = lambda tell: os.kill(os.getpid(), signal.SIGKILL)
    jobs = {"dead": die, **{str(number): lambda tell: time.sleep(0.01) for number in range(4)}}
    with beside(jobs) as some:
        for number in range(4):
            some.finish(str(number))
        with pytest.raises(Broken, match="killed by signal 9"):
            some.finish("dead")
    with beside({"dead": die, "also dead": die, "waiting": die}) as none:
        with pytest.raises(Broken, match="no process is left"):
            none.finish("waiting")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_every_job_save_what_it_is_in(
    tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, hear = threading.Event(), SideBySide._hear
    monkeypatch.setattr(SideBySide, "_hear", lambda self, seconds: waits.set() or hear(self, seconds))

    def save_late(tell: Callable) -> None:
        with stop_later() as stopping:
            append(tmp_path / "begun", "x")
            until(stopping)
            append(tmp_path / "saved", "x")

    def send() -> None:
        waits.wait(120)
        until(lambda: (tmp_path / "begun").exists() and len((tmp_path / "begun").read_text()) == 4)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    with pytest.raises(Stopped) as stopped, handled(number):
        with beside({"a": save_late, "b": save_late, "never": save_late}) as jobs:
            thread.start()
            jobs.finish("b")
    thread.join()
    assert stopped.value.number == number
    assert len((tmp_path / "saved").read_text().split()) == 2 and jobs.at == {}


def test_signals_while_processes_are_forked_lose_none_of_them(tmp_path: Path) -> None:
    def stop(tell: Callable) -> None:
        append(tmp_path / "pid", str(os.getpid()))
        os.kill(first, signal.SIGTERM)
        time.sleep(60)

    first, ended = os.getpid(), threading.Event()
    other = threading.Thread(target=ended.wait)  # takes the signals that the main thread blocks
    other.start()
    for _ in range(3):
        with pytest.raises(Stopped), handled(signal.SIGTERM), beside({str(n): stop for n in range(4)}, 4) as jobs:
            jobs.finish("3")
        for worker in (tmp_path / "pid").read_text().split():
            with pytest.raises(ProcessLookupError):
                os.kill(int(worker), 0)
    ended.set()
    other.join()


def test_a_process_that_hangs_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.side_by_side.STILL", 2)
    with beside({"hangs": lambda tell: time.sleep(60), "fine": lambda tell: None}) as jobs:
        with pytest.raises(Broken, match="its process hung: it used no processor for 2 s"):
            jobs.finish("hangs")
        jobs.finish("fine")


def test_where_no_process_can_be_made_none_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with beside({"a": lambda tell: None}) as jobs, pytest.raises(Broken, match="no process is left"):
        jobs.finish("a")


def test_an_error_of_the_first_process_ends_the_others(tmp_path: Path) -> None:
    def work(tell: Callable) -> None:
        append(tmp_path / "pid", str(os.getpid()))
        time.sleep(60)

    with pytest.raises(KeyError), beside({"a": work}, 1):
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
        raise KeyError
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def _first(folder: Path) -> None:
    def work(tell: Callable) -> None:
        append(folder / "pid", str(os.getpid()))
        time.sleep(60)

    with beside({"a": work}, 1) as jobs:
        jobs.finish("a")


def test_no_process_outlives_the_one_that_forked_it(tmp_path: Path) -> None:
    first = multiprocessing.get_context("fork").Process(target=_first, args=(tmp_path,))
    first.start()
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    worker = int((tmp_path / "pid").read_text())
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    until(lambda: not Path(f"/proc/{worker}").exists() or "State:\tZ" in Path(f"/proc/{worker}/status").read_text())
