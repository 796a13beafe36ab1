"""The campaign of damage: its judgement, its bookkeeping, and a few trials of every kind."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from program import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import campaign
import campaign_trials
from campaign_commands import COMMANDS
from campaign_program import Done, judge, numbers, warm_up
from campaign_trials import BAD, COLUMNS, KINDS, Answer, Base

import runs.states

SENTENCE = "error: /cache/a.json is damaged; delete it"
EXPECTED = {"probe": [{"auroc": 0.75}, None]}


# --------------------------------------------------------------------------------------------------------- judgement


@pytest.mark.parametrize(
    ("status", "err", "found", "answer"),
    [
        (0, "", EXPECTED, "same numbers"),
        (0, "", {"probe": [{"auroc": 0.7500000000000001}, None]}, "other numbers"),  # the next float
        (0, SENTENCE, {"probe": [{"auroc": 0.5}, None]}, "other numbers"),  # whatever it says: status 0 is a claim
        (0, "", {}, "other numbers"),
        (1, SENTENCE, {}, "sentence"),
        (1, f"note\n{SENTENCE}\n", EXPECTED, "sentence"),
        (1, "error: something is wrong", {}, "vague"),
        (1, "", EXPECTED, "defect"),
        (1, f"{SENTENCE}\n{SENTENCE}", {}, "defect"),
        (1, f"Traceback (most recent call last):\n{SENTENCE}", {}, "defect"),
        (1, f"{SENTENCE}; this looks like a defect of the program", {}, "defect"),
        (-11, SENTENCE, EXPECTED, "defect"),
        (2, SENTENCE, EXPECTED, "defect"),
        (None, "", EXPECTED, "no answer"),
    ],
)
def test_an_answer_is_judged(status: int | None, err: str, found: Any, answer: str) -> None:
    assert judge(Done(status, "", err), found, EXPECTED, ("a.json",)) == answer
    assert (answer in BAD) == (answer not in ("same numbers", "sentence"))


def test_no_numbers_to_compare_with_is_no_agreement() -> None:
    assert judge(Done(0, "", ""), {}, {}) == "other numbers"


def test_a_folder_in_the_place_of_the_numbers_is_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "outputs" / "train" / "run" / "metrics.jsonl").mkdir(parents=True)
    assert numbers(tmp_path, "train") == {}


# ------------------------------------------------------------------------------------------------------------ trials


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    threads = torch.get_num_threads()
    warm_up()
    yield Base(tmp_path_factory.mktemp("campaign"), 0)
    torch.set_num_threads(threads)


def test_silently_other_numbers_are_seen(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that believes a damaged checkpoint is caught; the program as it is refuses it and its way out leads back."""

    class Anything(str):
        __hash__ = None

        def __ne__(self, other: object) -> bool:
            return False

    def damaged() -> Answer:
        shutil.rmtree(base.work, ignore_errors=True)
        run = base.copy()
        file = run / "checkpoints" / "probe" / "best.00.safetensors"
        data = bytearray(file.read_bytes())
        data[-2] ^= 1 << 5  # of the mantissa of a weight
        file.write_bytes(data)
        return base.read_back(run, file, random.Random(1), "one weight")

    assert damaged().answer == "sentence"
    monkeypatch.setattr(runs.states, "digest_of", lambda *_: Anything("any"))
    answer = damaged()
    assert answer.answer == "other numbers", answer


@pytest.mark.parametrize(
    ("kind", "trials"),
    [("kills", [0]), ("signals", [1]), ("flips", [0, 1, 2]), ("structure", [0]), ("hostile", [0]), ("commands", [0, 200]),
     ("disks", [1]), ("mutations", range(12))],
)  # fmt: skip
def test_trials_end_well(base: Base, kind: str, trials: list[int]) -> None:
    answers = [base.trial(kind, number) for number in trials]
    assert not [answer for answer in answers if answer.answer not in COLUMNS or answer.answer in BAD], answers


def test_a_trial_is_its_kind_number_and_seed(base: Base) -> None:
    first, again, other = (base.trial("mutations", number) for number in (7, 7, 13))
    assert first == again and first.about != other.about


def test_there_are_enough_careless_commands(base: Base) -> None:
    generated = [tuple(arguments) for arguments, _ in base.commands]
    assert len(COMMANDS) == len(set(COMMANDS)) > 100 and len(generated) == len(set(generated)) > 1000
    assert {"trainer.epochs=text", "~cache.dir", "probe.rank_=32"} <= {arguments[-1] for arguments in generated}


# ------------------------------------------------------------------------------------------------------- bookkeeping


class Fake:
    """A base whose flip number 3 goes wrong."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed

    def at(self, name: str) -> "Fake":
        return self

    def keep(self, folder: Path) -> None:
        pass

    def trial(self, kind: str, number: int) -> Answer:
        return Answer("lost" if (kind, number) == ("flips", 3) and self.goes_wrong else "sentence", f"{kind} {number}")

    goes_wrong = True


def test_a_stopped_campaign_goes_on_and_what_went_wrong_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(campaign, "Base", Fake)
    monkeypatch.setattr(campaign, "warm_up", lambda: None)
    file = tmp_path / "trials.jsonl"

    def trials() -> list[tuple[str, int]]:
        return [(t["kind"], t["number"]) for t in map(json.loads, file.read_text().splitlines())]

    asked = ["--folder", str(tmp_path), "--jobs", "2"]
    assert campaign.main([*asked, "--flips", "5", "--kills", "1"]) == 1
    assert sorted(trials()) == [*(("flips", n) for n in range(5)), ("kills", 0)][:6]
    assert "| flipped bits (`flips`) | 5 | 0 | 4 | 0 | 0 | 0 | 0 | 0 | 1 | 0 |" in capsys.readouterr().out
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:10])  # stopped in the middle of a line
    campaign.main([*asked, "--flips", "5", "--kills", "1"])
    assert len(trials_without_torn(file)) == 6
    monkeypatch.setattr(Fake, "goes_wrong", False)
    campaign.main([*asked, "--flips", "5", "--kills", "1", "--again", "bad"])
    assert trials_without_torn(file)[6:] == [("flips", 3)]
    out = capsys.readouterr().out
    assert "| flipped bits (`flips`) | 5 | 0 | 5 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |" in out and "6 trials with " in out
    assert (tmp_path / "table.md").read_text().strip() in out


def trials_without_torn(file: Path) -> list[tuple[str, int]]:
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [(trial["kind"], trial["number"]) for trial in found]


def test_all_kinds_advance_alike() -> None:
    order = campaign.scheduled(campaign.GOAL)
    assert len(order) == len(set(order)) == sum(campaign.GOAL.values()) and campaign.GOAL.keys() == KINDS.keys()
    half = [kind for kind, _ in order[: len(order) // 2]]
    assert all(abs(half.count(kind) - n / 2) <= 1 for kind, n in campaign.GOAL.items())
    assert campaign_trials.KINDS["flips"].run is Base.flip
