"""What tests of processes and signals share."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator

from runs.signals import raise_stopped


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something another process or thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def handled(number: int) -> Iterator[None]:
    """A signal raises `Stopped` inside the block."""
    before = signal.getsignal(number)
    raise_stopped(number)
    try:
        yield
    finally:
        signal.signal(number, before)
