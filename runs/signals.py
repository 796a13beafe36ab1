"""Signals that end a run in order: Ctrl-C, and SIGTERM, which Slurm and other schedulers send before they kill.

leave        both end the process at once, in one sentence: before a run is opened there is nothing to save
begin, end   from here on both raise `Stopped` wherever the program is; no longer (of a process that called `leave`)
stop_behind  the `Stopped` behind an error that broken-off code of others raised in its place
stop_later   until the end of the block they are only noted: what is half done is finished or saved first
ignored      they do nothing any more: the last writes of a run, and what comes after success
skip_teardown, succeeded   the way out after success
"""

import atexit
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM)
ONE_REQUEST = 1.0  # seconds: signals so soon after one another are one request, said by a scheduler and by its shell
_ignoring = False
_raised_at = -math.inf
_succeeded = False


class Stopped(KeyboardInterrupt):
    """A signal asked the program to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def exit_status(stop: KeyboardInterrupt) -> int:
    """The status a shell expects: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + getattr(stop, "number", signal.SIGINT)


def farewell(status: int) -> str:
    """The sentence a stopped program ends with."""
    return f"\n{'terminated' if status == 143 else 'interrupted'}: nothing finished is lost, the same command resumes here"


def stop_behind(error: BaseException | None) -> "Stopped | None":
    """The `Stopped` that an error is or was raised while handling: omegaconf, broken off anywhere, raises errors of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def leave() -> None:
    """Let both signals end the process at once: imports and Hydra, broken off by an exception, end in traces or worse."""
    for number in _heard():
        signal.signal(number, _leave)


def skip_teardown() -> None:
    """End a process that has `succeeded` once its threads, exit handlers and output are through.

    What is left then is that Python takes down a few thousand modules one by one, more than a second in which nothing is
    written. To be called before other modules are imported: the first handler that is registered is the last one to run.
    """
    atexit.register(_end_process)


def succeeded() -> None:
    """All is done and the exit status is 0."""
    global _succeeded
    _succeeded = True


def _end_process() -> None:
    if _succeeded:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except (OSError, ValueError):  # a closed pipe: Python says so, in its own way and with its own exit status
                return
        os._exit(0)


def begin() -> None:
    """Let both signals raise `Stopped` in a process that has called `leave`; one that is ignored already stays so."""
    global _raised_at
    _raised_at = -math.inf
    _exchange(_leave, _stop)


def raise_stopped(number: int) -> None:
    """Let a signal raise `Stopped`, whatever it did before: in a process forked from this one."""
    global _ignoring, _raised_at
    _ignoring, _raised_at = False, -math.inf
    signal.signal(number, _stop)


def end() -> None:
    """Let both signals end the process at once again: between the jobs of a sweep."""
    _exchange(_stop, _leave)


def ignore() -> None:
    """Let both signals do nothing for the rest of a process that has called `begin`."""
    _exchange(_stop, _nothing)


def _exchange(before: Callable, after: Callable) -> None:
    """Put one handler in the place of another, where that one is."""
    for number in _heard():
        if signal.getsignal(number) is before:
            signal.signal(number, after)


@contextlib.contextmanager
def stop_later() -> Iterator[Callable[[], bool]]:
    """Note the signals until the end of the block; yields a function that tells whether one has come.

    Raises:
        Stopped: at the end of the block, if one has come.
    """
    noted: list[int] = []
    with _handled(lambda number, frame: noted.append(number)):
        yield lambda: bool(noted)
    if noted:
        _raise(noted[0])


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Let both signals do nothing inside the block, and inside every `stop_later` in it."""
    global _ignoring
    before = _ignoring
    with _handled(_nothing):
        _ignoring = True
        try:
            yield
        finally:
            _ignoring = before


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Both signals go to a handler inside the block; outside the main thread, which alone hears signals, nothing changes."""
    before = {} if _ignoring else {number: signal.signal(number, handler) for number in _heard()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _heard() -> list[signal.Signals]:
    if threading.current_thread() is not threading.main_thread():
        return []
    # None: a handler set outside Python, which could not be put back.
    return [number for number in STOPPING if signal.getsignal(number) not in (signal.SIG_IGN, None)]


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{farewell(128 + number)}\n".encode())
    os._exit(128 + number)


def _stop(number: int, frame: FrameType | None) -> None:
    if time.monotonic() - _raised_at >= ONE_REQUEST:  # else the first one is being obeyed: a second would break that off
        _raise(number)


def _raise(number: int) -> NoReturn:
    global _raised_at
    _raised_at = time.monotonic()
    raise Stopped(number)


def _nothing(number: int, frame: FrameType | None) -> None:
    pass
