"""Jobs in processes of their own, forked from this one: the fits of a run beside each other, a processor each.

Threads of one process wait for each other at every call into torch; processes do not. A worker is a copy of this process as
it was when the jobs began, so it reads the same tokens and nothing is sent to it. It takes the next job that no other has
taken, with one thread, and writes files; what it says and records reaches this process as lines of JSON.

Only where a copy works: on Linux, and without a GPU, which a copy could not use. A worker ends with the process that forked it.
"""

import contextlib
import ctypes
import gc
import json
import math
import os
import selectors
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from errors import UserError
from runs import progress
from runs.signals import Stopped, ignored, raise_stopped, stop_later

Tell = Callable[..., None]  # sends a message, some values of JSON
PR_SET_PDEATHSIG = 1  # of prctl(2)
PATIENCE = 60.0  # seconds a worker has to save what it is in
STILL = 60  # seconds that are waited for a worker which uses no processor time: it hangs
MOST_JOBS = 30_000  # their numbers of two bytes fit into the 64 KiB a pipe holds


class Broken(Exception):
    """A job did not end as it should: how."""


def possible() -> bool:
    """Whether jobs can run side by side here."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


class SideBySide:
    """Jobs under way: a context, which ends with all workers gone.

    Args:
        jobs: by name, those that should begin first in front. Each gets `tell` and must leave what it makes in files.
        n_processes: how many run at once.
        heard: gets the messages of a job: its name and the values that were sent.
    """

    def __init__(self, jobs: Mapping[str, Callable[[Tell], None]], n_processes: int, heard: Callable[..., None]) -> None:
        self.jobs, self.n_processes, self.heard = dict(jobs), n_processes, heard
        self.waiting = set(self.jobs)  # for their end
        self.at: dict[int, str | None] = {}  # by worker, the job it is in
        self.ended: dict[str, Exception] = {}  # jobs that did not end as they should
        self.rest: dict[int, bytes] = {}  # by pipe, of a line that is not whole yet
        self.used: dict[int, tuple[float, int]] = {}  # by worker, processor time and for how many looks it has been that
        self.looked = 0.0
        self.selector = selectors.DefaultSelector()
        if len(self.jobs) > MOST_JOBS:
            raise ValueError(f"{len(self.jobs)} jobs, expected at most {MOST_JOBS}")

    def __enter__(self) -> "SideBySide":
        queue, fill = os.pipe()
        for number in range(len(self.jobs)):
            os.write(fill, number.to_bytes(2, "little"))  # two bytes are read whole or not at all
        os.close(fill)
        try:
            with stop_later() as stopping:  # raised at once, it would lose a worker that nobody knows of yet
                while len(self.at) < self.n_processes and not stopping():
                    if not self._fork(queue):
                        break  # those that are there take all jobs
                os.close(queue)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the workers; what they were in is saved as after a signal."""
        with ignored():
            deadline = time.monotonic() + PATIENCE
            while self.at:
                # Again and again: before a worker has its handler, or just before a system call that waits, one is not heard.
                self._signal(signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL, *self.at)
                self._hear(1.0)
            self.selector.close()

    def finish(self, name: str) -> None:
        """Wait until a job is done; one that is unknown, or whose end was waited for before, is left alone.

        Raises:
            UserError: the job raised it.
            Broken: its process ended in another way.
        """
        with stop_later() as stopping:
            while name in self.waiting and not stopping():
                self._hear(0.1)
                self._end_still()
                if not self.at and name in self.waiting:
                    self._end(name, "no process is left for it")
        if name in self.ended:
            raise self.ended.pop(name)

    def _fork(self, queue: int) -> bool:
        """Begin one more worker; whether the system allows it."""
        (receive, send), parent = os.pipe(), os.getpid()
        try:
            with warnings.catch_warnings():  # other threads (the bar, W&B) may hold locks: none that a job uses
                warnings.simplefilter("ignore", DeprecationWarning)
                worker = os.fork()
        except OSError:
            os.close(receive)
            os.close(send)
            return False
        if worker == 0:
            self._work(queue, send, parent)
        os.close(send)
        os.set_blocking(receive, False)
        self.selector.register(receive, selectors.EVENT_READ, worker)
        self.at[worker], self.rest[receive] = None, b""
        return True

    def _signal(self, number: int, *workers: int) -> None:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, number)

    def _end_still(self) -> None:
        """Kill a worker that hangs: a fork copies locks that other threads hold, and nobody opens them in the copy."""
        if time.monotonic() - self.looked < 1.0:
            return
        self.looked = time.monotonic()
        for worker in self.at:
            now, (before, looks) = _processor_time(worker), self.used.get(worker, (-1.0, 0))
            self.used[worker] = now, looks + 1 if now == before else 0
        self._signal(signal.SIGKILL, *filter(self._hangs, self.at))

    def _hangs(self, worker: int) -> bool:
        return worker in self.used and self.used[worker][1] >= STILL

    def _hear(self, seconds: float) -> None:
        """Take in what workers have sent, waiting for it so long at most."""
        for key, _ in self.selector.select(seconds):
            pipe, worker = key.fd, key.data
            data = os.read(pipe, 1 << 16)
            *lines, self.rest[pipe] = (self.rest[pipe] + data).split(b"\n")
            for line in lines:
                self._take(worker, *json.loads(line))
            if not data:
                self.selector.unregister(pipe)
                os.close(pipe)
                _, status = os.waitpid(worker, 0)
                job = self.at.pop(worker)
                if job is not None:
                    self._end(job, f"its process {self._how(worker, os.waitstatus_to_exitcode(status))}")

    def _how(self, worker: int, code: int) -> str:
        if self._hangs(worker):
            return f"hung: it used no processor for {STILL} s"
        killed = f"was killed by signal {-code}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")
        return killed if code < 0 else f"ended with status {code}"

    def _take(self, worker: int, kind: str, *values: Any) -> None:
        if kind == "begin":
            self.at[worker] = values[0]
        elif kind == "end":
            self.at[worker] = None
            self._end(*values)
        else:
            self.heard(self.at[worker], *values)

    def _end(self, name: str, broken: str | None = None, refused: str | None = None) -> None:
        self.waiting.discard(name)
        if refused is not None:
            self.ended[name] = UserError(refused)
        elif broken is not None:
            self.ended[name] = Broken(broken)

    def _work(self, queue: int, send: int, parent: int) -> NoReturn:
        """What a worker does: job after job until none is left."""
        import torch

        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the first process hears it too and ends the others
            raise_stopped(signal.SIGTERM)
            _end_with(parent)
            progress.hide()
            gc.freeze()  # what is there already stays shared: a collector that visits it would copy all of it
            torch.set_num_threads(1)
            _map_constants()
            names = list(self.jobs)

            def tell(kind: str, *values: Any) -> None:
                line = json.dumps([kind, *values]).encode() + b"\n"
                while line:
                    line = line[os.write(send, line) :]

            while number := os.read(queue, 2):
                name = names[int.from_bytes(number, "little")]
                tell("begin", name)
                try:
                    self.jobs[name](lambda *values: tell("say", *values))
                    tell("end", name)
                except UserError as error:
                    tell("end", name, None, str(error))
                except Exception as error:
                    tell("end", name, f"its process met an unexpected {type(error).__name__}: {error}")
            status = 0
        except Stopped as stop:
            status = 128 + stop.number
        finally:
            os._exit(status)  # no handler, no buffer of the first process


def _map_constants() -> None:
    """Let log1p and expm1, of which losses are made, read their constants for special values once.

    A fork maps the pages of libraries when they are read. The vector loops of both load some constants under a mask that is
    empty for ordinary numbers. Such a load maps nothing, and where nothing is mapped the processor takes a slow way every
    time: they then take 30 and 14 times as long (measured, AVX-512). A special value makes it a real read.
    """
    import torch

    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, -1.0, 1e-40, 3e38] * 8)
    for values in (special, special.double()):
        torch.log1p(values)
        torch.expm1(values)


def _processor_time(process: int) -> float:
    """Seconds a process has computed so far; -1 where it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # of the program and of the system for it


def _end_with(parent: int) -> None:
    """Let the kernel kill this process when the one that forked it ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
