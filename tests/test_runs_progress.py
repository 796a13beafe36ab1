"""What is seen of a run while it works: stages, counts, time left; and that tests and callers from Python see nothing."""

import io
import re
import time

import pytest

from runs import progress


class Screen(io.StringIO):
    """An error stream that is a terminal, or a file."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_a_file_gets_a_line_per_stage_and_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, lines = Screen(terminal=False), []
    monkeypatch.setattr("sys.stderr", screen)
    with progress.shown(lines.append):
        progress.stages("labels", ("fit", 3))
        progress.stage("labels")
        assert list(progress.track(range(3), "train", "image")) == [0, 1, 2]
        progress.stage("fit", parts=2)
        progress.stage("unplanned")
    assert lines == ["[1 of 2] labels", "[2 of 2] fit", "[3 of 3] unplanned"]
    assert not screen.getvalue()


def test_a_file_gets_a_line_while_a_stage_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.03)
    monkeypatch.setattr("sys.stderr", Screen(terminal=False))
    lines: list[str] = []
    with progress.shown(lines.append):
        progress.stage("fit")
        with progress.count("fitting", 8, "epoch", done=3) as step:
            step.update(note="loss .5")
            limit = time.monotonic() + 60
            while len(lines) < 3 and time.monotonic() < limit:
                time.sleep(0.01)
    assert re.fullmatch(r"\[1 of 1\] fit: fitting, epoch 4 of 8, loss \.5; 0:\d\d so far", lines[1])


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(terminal=True)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    with progress.shown(lambda text: None) as display:
        progress.stages("fit {odd}", "table")
        progress.stage("fit {odd}", parts=2)
        with progress.count("fitting", 4, "epoch") as step:
            step.update(2)
            display.draw()
            assert display.share() == pytest.approx(0.5 / 2 / 2)
        assert display.share() == pytest.approx(1 / 2 / 2)  # the first of two parts is done
        progress.end()
        shown = screen.getvalue()
        progress.stage("table")
        assert screen.getvalue() == shown  # nothing is drawn any more
    assert "[1 of 2] fit (odd): fitting, epoch 2 of 4" in shown


def test_the_share_never_falls_and_ends_at_one() -> None:
    display = progress.Display(lambda text: None, terminal=False)
    display.plan([("a", 2), "b"])
    seen = []
    for name, parts in (("a", 3), ("b", 1)):
        display.begin(name, parts)
        for _ in range(parts + 1):  # one step more than was announced does no harm
            step = progress.Step("x", 2, "item")
            display.steps.append(step)
            for _ in range(2):
                step.update()
                seen.append(display.share())
            display.steps.remove(step)
            display.done_parts += 1
    display.close()
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1)


def test_outside_of_a_run_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    progress.stages("a")
    progress.stage("a")
    assert list(progress.track(iter("xy"), "t", "letter")) == ["x", "y"]
    progress.end()
    captured = capsys.readouterr()
    assert not captured.out and not captured.err


def test_times_read_as_a_clock() -> None:
    assert [progress.clock(s) for s in (0.4, 59.6, 754, 11100)] == ["0:00", "1:00", "12:34", "3:05:00"]
