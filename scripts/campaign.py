"""Damages what the program reads and interrupts what it does, at random, and counts how it answers.

    python scripts/campaign.py                              # 3 trials of every kind: a look at what it does
    python scripts/campaign.py --goal --jobs 2              # 50 kills, 1000 flips, 200 commands, 5000 mutations, …
    python scripts/campaign.py --flips 1000 --commands 200  # these kinds alone
    python scripts/campaign.py --only flips:123             # one trial again, with all that it answered
    python scripts/campaign.py --goal --again bad           # the trials that went wrong again, after the cause was fixed

A tiny run (a two-block random ViT, generated scenes) is made once. A trial works on a copy of it and on the program as a
process of its own, forked from one that has imported what the program imports. A trial is its kind, its number and
`--seed`: it draws the same damage whenever and in whichever job it runs. Every trial is a line of `trials.jsonl` in
`--folder`, written at once, so that a campaign that was stopped goes on with the trials it lacks; the table counts the last
line of every trial and says which code they ran.

The columns, and what each kind does, stand in `campaign_trials.py`. The last six are bad; the status is then 1.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg", TQDM_DISABLE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

from campaign_program import warm_up  # noqa: E402
from campaign_trials import BAD, COLUMNS, KINDS, Base  # noqa: E402

from runs.provenance import provenance  # noqa: E402

GOAL = {
    "kills": 50, "signals": 30, "flips": 1000, "structure": 90, "hostile": 40, "commands": 210, "disks": 20, "mutations": 5000,
}  # fmt: skip
QUICK = 3


def scheduled(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The trials in an order that advances all kinds alike, so that a stopped campaign has some of each."""
    trials = ((((number + 0.5) / count), kind, number) for kind, count in counts.items() for number in range(count))
    return [(kind, number) for _, kind, number in sorted(trials)]


def read_trials(file: Path) -> dict[tuple[int, str, int], dict[str, Any]]:
    """The last line of every trial, by seed, kind and number; a line that was cut off is left out."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            trial = json.loads(line)
        except ValueError:
            continue
        found[trial["seed"], trial["kind"], trial["number"]] = trial
    return found


def table(trials: Sequence[Mapping[str, Any]]) -> str:
    """Counts of answers by kind, as Markdown, with the code that gave them."""
    lines = ["| kind | trials | " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) + 1) + "|"]
    for kind in KINDS:
        answers = Counter(trial["answer"] for trial in trials if trial["kind"] == kind)
        cells = [f"{KINDS[kind].title} (`{kind}`)", answers.total(), *(answers[column] for column in COLUMNS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    ran = Counter((str(trial["commit"])[:9] + "+" * bool(trial["dirty"]), trial["cpu"]) for trial in trials)
    lines += ["", *(f"{n} trials with {commit} on {cpu}" for (commit, cpu), n in sorted(ran.items()))]
    return "\n".join(lines)


def work(base: Base, trials: Sequence[tuple[str, int]], file: Path, facts: Mapping[str, Any], keep: Path) -> None:
    """Run trials one after the other; every one is a line of the file as soon as it is done."""
    for kind, number in trials:
        begun = time.monotonic()
        answer = base.trial(kind, number)
        line = {"kind": kind, "number": number, "seed": base.seed, **answer._asdict(), **facts}
        line["seconds"] = round(time.monotonic() - begun, 2)
        with open(file, "a", encoding="utf-8") as lines:  # one write of one line: those of several jobs do not mix
            lines.write(json.dumps(line) + "\n")
        if answer.answer in BAD:
            print(f"  {kind}:{number} {answer.answer}: {answer.about}\n    {answer.text}", file=sys.stderr, flush=True)
            base.keep(keep / f"{kind}-{number}")


def share(base: Base, todo: Sequence[tuple[str, int]], jobs: int, file: Path, facts: Mapping[str, Any]) -> None:
    """Let jobs work on the trials side by side; say every half minute how far they are."""
    children = []
    for job in range(jobs):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(base.at(f"job-{job}"), todo[job::jobs], file, facts, file.parent / "kept")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    try:
        failed = sum(os.waitstatus_to_exitcode(status) != 0 for status in _ends(children, file))
    except BaseException:
        for child in children:
            os.kill(child, signal.SIGKILL)
        raise
    if failed:
        sys.exit(f"{failed} jobs failed; the same command goes on with the trials that are left")


def _ends(children: list[int], file: Path) -> Iterator[int]:
    """The status of each child as it ends; prints counts in the meantime."""
    said = time.monotonic()
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            yield status
            continue
        time.sleep(0.2)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            trials = read_trials(file).values()
            kinds = Counter(trial["kind"] for trial in trials)
            answers = Counter(trial["answer"] for trial in trials)
            counts = [", ".join(f"{n} {name}" for name, n in counted.items()) for counted in (kinds, answers)]
            print(f"{time.strftime('%H:%M:%S')}  {counts[0]}  →  {counts[1]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials that are lacking; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for kind, goal in GOAL.items():
        parser.add_argument(f"--{kind}", type=int, help=f"trials of {KINDS[kind].title}; {goal} with --goal")
    parser.add_argument("--goal", action="store_true", help="as many trials of every kind as docs/results.md reports")
    parser.add_argument("--again", choices=["bad", *KINDS], help="repeat those of the trials done that went wrong, or a kind")
    parser.add_argument("--only", help="one trial, such as flips:123; prints all that it answered, writes nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "campaign", help="of trials.jsonl and table.md")
    options = parser.parse_args(arguments)
    chosen = {kind: getattr(options, kind) for kind in GOAL if getattr(options, kind) is not None}
    counts = chosen or (GOAL if options.goal else dict.fromkeys(GOAL, QUICK))
    facts = {key: provenance()[key] for key in ("commit", "dirty", "cpu")}
    file = options.folder / "trials.jsonl"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background, and a child would ignore it too
    warm_up()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        if options.only:
            kind, _, number = options.only.partition(":")
            print(json.dumps(Base(Path(folder), options.seed).trial(kind, int(number))._asdict(), indent=1))
            return 0
        options.folder.mkdir(parents=True, exist_ok=True)
        done = read_trials(file)
        again = {key for key, trial in done.items() if options.again in (trial["kind"], "bad" * (trial["answer"] in BAD))}
        todo = [(k, n) for k, n in scheduled(counts) if (options.seed, k, n) not in done or (options.seed, k, n) in again]
        if file.is_file() and not file.read_bytes().endswith(b"\n"):
            file.write_text(file.read_text(encoding="utf-8") + "\n", encoding="utf-8")  # of a campaign that was killed
        if todo:
            share(Base(Path(folder), options.seed), todo, options.jobs, file, facts)
    trials = [trial for trial in read_trials(file).values() if trial["seed"] == options.seed]
    text = table(trials)
    (options.folder / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(trial["answer"] in BAD for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
