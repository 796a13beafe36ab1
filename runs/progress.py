"""What a run shows while it works: which stage of how many, how far it is, how long it still takes.

    shown     the display of a run: one bar for the whole run in a terminal, plain lines where output goes to a file
    stages    what the run will do, in order        stage    the next of them begins
    track     an iterable whose items count         count    the same by hand, for steps of many items

In a terminal the bar is redrawn twice a second by a thread of its own, so that a long step is seen to be alive. In a file a
stage gets one line when it begins and one every 30 s. Outside of a run nothing is shown: tests and callers from Python hear
nothing. Time left assumes that stages take the time their weights say.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
REDRAW = 0.5  # seconds between two drawings of the bar
EVERY = 30.0  # seconds between two lines of a stage in a file
STEPS = 1000  # of the bar
BAR = 16  # characters


class Step:
    """A part of a stage that is counted: `done` of `total` items."""

    def __init__(self, title: str, total: int | None, unit: str, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done, self.note = title, total, unit, done, ""
        self.began, self.first = time.monotonic(), done

    def update(self, n: int = 1, note: str = "") -> None:
        """So many more items are done; `note` is shown behind the count."""
        self.done, self.note = self.done + n, note

    @property
    def share(self) -> float:
        """Of its items that are done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def text(self) -> str:
        """Title, count, note and time left in one line."""
        of = f"{self.done} of {self.total}" if self.total else str(self.done)
        parts = [f"{self.title}, {self.unit} {of}", *([self.note] if self.note else [])]
        new, spent = self.done - self.first, time.monotonic() - self.began
        if self.total and new and spent > 2 and self.done < self.total:
            parts.append(f"{clock(spent / new * (self.total - self.done))} left")
        return ", ".join(parts)


class Display:
    """Where a run is: its stages, the one it is in, the steps that are under way.

    Args:
        log: writes a line where no terminal is (and into the run's log.txt).
        terminal: whether the error stream is one.
    """

    def __init__(self, log: Callable[[str], None], terminal: bool) -> None:
        self.log, self.terminal = log, terminal
        self.names: list[str] = []
        self.weights: list[float] = []
        self.at, self.parts, self.done_parts = -1, 1, 0
        self.steps: list[Step] = []
        self.began = self.stage_began = self.logged = time.monotonic()
        self.title = "starting"
        self.lock = threading.RLock()
        self.ended = threading.Event()
        begun = f"{self.title}   0 %|{{bar:{BAR}}}| 0:00"  # until the first second has passed
        self.bar = tqdm(
            total=STEPS, leave=False, dynamic_ncols=True, file=sys.stderr, disable=not terminal, bar_format=begun
        )
        self.thread = threading.Thread(target=self._keep_alive, name="progress", daemon=True)
        self.thread.start()

    def plan(self, stages: Sequence[str | tuple[str, float]]) -> None:
        """The stages from here on, names or (name, weight); those that were planned and not begun are dropped."""
        with self.lock:
            del self.names[self.at + 1 :], self.weights[self.at + 1 :]
            for stage in stages:
                name, weight = (stage, 1.0) if isinstance(stage, str) else stage
                self.names.append(name)
                self.weights.append(weight)

    def begin(self, name: str, parts: int) -> None:
        """The stage of this name begins; one that was not planned is put behind the present one."""
        with self.lock:
            later = [i for i in range(self.at + 1, len(self.names)) if self.names[i] == name]
            if not later:
                self.names.insert(self.at + 1, name)
                self.weights.insert(self.at + 1, 1.0)
            self.at = later[0] if later else self.at + 1
            self.parts, self.done_parts, self.title = parts, 0, name
            self.stage_began = self.logged = time.monotonic()
            self.log(f"[{self.place()}] {name}")
        self.draw()

    def place(self) -> str:
        """Which stage of how many."""
        return f"{self.at + 1} of {len(self.names)}"

    def share(self) -> float:
        """Of the whole run that is done, 0 to 1."""
        total = sum(self.weights)
        if self.at < 0 or not total:  # of a mode without stages: of its first step
            return self.steps[0].share if self.steps else 0.0
        inner = (self.done_parts + (self.steps[0].share if self.steps else 0.0)) / self.parts
        return (sum(self.weights[: self.at]) + self.weights[self.at] * min(inner, 1.0)) / total

    def text(self) -> str:
        """Where the run is, in words."""
        place = f"[{self.place()}] " if self.at >= 0 else ""
        steps = self.steps[-1].text() if self.steps else ""
        return f"{place}{self.title}" + (f": {steps}" if steps else "")

    def timing(self) -> str:
        """Seconds so far and, when there is something to judge by, those left."""
        spent, share = time.monotonic() - self.began, self.share()
        left = f", about {clock(spent / share * (1 - share))} left" if share > 0.05 and spent > 3 else ""
        return clock(spent) + left

    def draw(self) -> None:
        """Redraw the bar."""
        with self.lock:
            if self.terminal and not self.ended.is_set():
                text, timing = _cut(self.text(), len(self.timing())), self.timing()
                plain = text.replace("{", "(").replace("}", ")")  # braces are fields of the bar
                self.bar.bar_format = f"{plain} {{percentage:3.0f}} %|{{bar:{BAR}}}| {timing}"
                self.bar.n = int(STEPS * self.share())
                self.bar.refresh()

    def _keep_alive(self) -> None:
        while not self.ended.wait(REDRAW):
            self.draw()
            if not self.terminal and time.monotonic() - self.logged >= EVERY:
                self.logged = time.monotonic()
                self.log(f"{self.text()}; {clock(time.monotonic() - self.began)} so far")

    def close(self) -> None:
        """Take the bar away, for good."""
        with self.lock:
            self.ended.set()
            self.bar.close()
        self.thread.join()


_current: Display | None = None


@contextlib.contextmanager
def shown(log: Callable[[str], None]) -> Iterator[Display]:
    """Show the progress of a run inside the block; a run inside a run is shown by the outer one.

    Args:
        log: writes a line where output goes to a file.
    """
    global _current
    if _current is not None:
        yield _current
        return
    _current = Display(log, terminal=sys.stderr.isatty())
    try:
        yield _current
    finally:
        display, _current = _current, None
        display.close()


def stages(*names: str | tuple[str, float]) -> None:
    """Announce what the run will do from here on, in order: names, or (name, weight) where the times differ much."""
    if _current is not None:
        _current.plan(names)


def stage(name: str, parts: int = 1) -> None:
    """The stage of this name begins; it has so many counted steps one after the other."""
    if _current is not None:
        _current.begin(name, parts)


@contextlib.contextmanager
def count(title: str, total: int | None, unit: str, done: int = 0) -> Iterator[Step]:
    """Count items by hand: `step.update(n)`.

    Args:
        total: None where it is not known.
        done: items of an earlier process.
    """
    step, display = Step(title, total, unit, done), _current
    if display is None:
        yield step
        return
    display.steps.append(step)
    try:
        yield step
    finally:
        with display.lock:
            display.steps.remove(step)
            display.done_parts += not display.steps


def track(items: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items, counted as they are used."""
    with count(title, len(items) if total is None and hasattr(items, "__len__") else total, unit) as step:
        for item in items:
            yield item
            step.update()


def hide() -> None:
    """Show nothing from here on: in a process forked from the one that shows."""
    global _current
    _current = None


def end() -> None:
    """All is done but for what is printed: the bar goes away."""
    if _current is not None:
        _current.close()


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Take the bar away while something is printed."""
    if _current is None or not _current.terminal or _current.ended.is_set():
        yield
        return
    with _current.lock, tqdm.external_write_mode(file=sys.stdout):
        yield


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 0:07, 12:30, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _cut(text: str, others: int) -> str:
    """Text that leaves room for the bar and for as many other characters on a line of the terminal."""
    room = max(20, shutil.get_terminal_size().columns - others - BAR - 12)
    return text if len(text) <= room else text[: room - 1] + "…"
