"""The fits of a run beside each other: begun together in processes of their own, waited for in the order of the rows.

A fit that was made ahead is one whose checkpoints are there when its row comes: the loop that fits in turn finds them and
reads them. So nothing else changes: files, records and numbers are those of fits in turn, whatever the number of processes.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from machine import free_memory
from runs.progress import Step, count
from runs.run import Run
from runs.side_by_side import Broken, SideBySide, possible

LEAST = 1e8  # of cost, about half a second: less is not worth the processes (measured)
FASTER = 1.5  # times that two threads make a stack faster (measured): one fit that outweighs the others is better made with all


class Job(NamedTuple):
    """A fit to be made.

    name: of the fit and the chunk of its layers. cost: its work, in numbers of tokens read. memory: bytes. epochs: at most.
    """

    name: str
    fit: Callable[[], object]
    cost: float
    memory: float
    epochs: int


class Ahead:
    """Fits under way in other processes."""

    def __init__(self, run: Run, jobs: Sequence[Job], n_processes: int) -> None:
        self.run, self.epochs = run, {job.name: job.epochs for job in jobs}
        self.done = dict.fromkeys(self.epochs, 0)
        self.shown: tuple[str, Step] | None = None
        # In the order of the rows: this process scores a row while the next ones are fitted.
        self.workers = SideBySide({job.name: self._alone(job) for job in jobs}, n_processes, self._heard)

    def wait(self, name: str) -> None:
        """Until a fit is made, or is to be made here because its process did not come to its end.

        Raises:
            UserError: the fit raised it.
        """
        if name in self.epochs:
            with count("fitting", self.epochs.pop(name), "epoch", self.done[name]) as step:
                self.shown = name, step
                try:
                    self.workers.finish(name)
                except Broken as how:
                    self.run.say(f"warning: {name.rpartition(' ')[0]}: {how}; the fit goes on in this process")
                finally:
                    self.shown = None

    def _alone(self, job: Job) -> Callable[[Callable[..., None]], None]:
        def work(tell: Callable[..., None]) -> None:  # in a copy of this process
            self.run.tell, self.run.ahead, self.run.mirror = tell, None, None
            job.fit()

        return work

    def _heard(self, name: str, kind: str, *values: Any) -> None:
        if kind == "say":
            self.run.say(*values)
            return
        self.run.heard(*values)
        record: Mapping[str, Any] = values[1]
        if record.get("kind") == "epoch":
            new = record["epoch"] - self.done[name]
            self.done[name] = record["epoch"]
            if self.shown is not None and self.shown[0] == name:
                self.shown[1].update(new)


def seconds_beside(costs: Sequence[float], n_processes: int) -> float | None:
    """What fits take side by side, in the unit of what each takes alone in one thread; None where that would not be faster."""
    if n_processes < 2 or len(costs) < 2 or not possible():
        return None
    beside = max(sum(costs) / min(n_processes, len(costs)), *costs)
    return None if beside * FASTER > sum(costs) else beside


@contextlib.contextmanager
def fits_ahead(run: Run, jobs: Sequence[Job], n_processes: int) -> Iterator[None]:
    """Begin fits that `Run.ahead` then waits for; none where processes are not possible or would not be faster.

    Args:
        jobs: of different names.
        n_processes: at most; fewer where memory is short.
    """
    by_memory = sorted((job.memory for job in jobs), reverse=True)
    free, n_processes, costs = free_memory(), min(n_processes, len(jobs)), [job.cost for job in jobs]
    while n_processes > 1 and sum(by_memory[:n_processes]) > free:
        n_processes -= 1
    heard = threading.current_thread() is threading.main_thread()  # no other thread hears the signals that end a run
    if sum(costs) < LEAST or seconds_beside(costs, n_processes) is None or not heard:
        yield
        return
    run.open_records("history.jsonl")
    run.ahead = Ahead(run, jobs, n_processes)
    try:
        with run.ahead.workers:
            yield
    finally:
        run.ahead = None
