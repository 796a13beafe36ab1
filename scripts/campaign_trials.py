"""The trials of `campaign.py`: what each kind does to the program, and how its answer is judged.

    same numbers    the numbers of the undisturbed run, bit for bit (of mutations: the very same items)
    sentence        status 1 and one sentence that names the file or option; the way out it names leads back to the numbers
                    (of flips tried every third time, to save time)
    accepted        of mutations: another data set, read without complaint; of commands: it ran, with the numbers it means
    other numbers   status 0 and silently not the numbers of the undisturbed run
    vague           a sentence that names neither file nor option
    defect          a trace, "looks like a defect", several errors, a process that died
    no answer       more than three minutes
    lost            the way out did not lead back to the numbers of the undisturbed run
    code run        something that a file names was called

A full disk is a limit of the size of files; where a small tmpfs may be mounted (as root), it is one in every second trial.
"""

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from campaign_commands import COMMANDS, HARMLESS, TINY, careless
from campaign_program import SECONDS, Done, composed, judge, numbers, program

BAD = ("other numbers", "vague", "defect", "no answer", "lost", "code run")
COLUMNS = ("same numbers", "sentence", "accepted", *BAD)
LOOK = ["wandb.mode=disabled", "threads=1"]  # of modes that look at a finished run
SECTIONS = ("dataset.", "model.", "protocol.", "probe.", "trainer.")  # whose options a sentence may name
ON_DISK = "cache.ram_gb=1e-9"  # activations are read from disk, not held in memory


class Answer(NamedTuple):
    """The answer to a trial: a column of the table, what was done, what the program said."""

    answer: str
    about: str
    text: str = ""


class Base:
    """An undisturbed run, what its numbers are, and the trials on copies of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.base, self.work = folder / "base", folder / "trial"
        self.base.mkdir(parents=True)
        begun = time.monotonic()
        done = program(self.base, *TINY)
        assert done.status == 0, done.err
        self.seconds = time.monotonic() - begun
        self.expected = {"train": numbers(self.base, "train")}
        (self.run,) = (self.base / "outputs" / "train").iterdir()
        for which in ("best", "last"):
            done = program(self.base, "mode=eval", f"eval.checkpoint={which}", *LOOK)
            assert done.status == 0, done.err
            self.expected[which] = numbers(self.base, "eval")
            shutil.rmtree(self.base / "outputs" / "eval")
        self.bytes = self._bytes(self.base)
        self.commands = careless(random.Random(seed))
        looks = {which: ["mode=eval", f"eval.checkpoint={which}", *LOOK] for which in ("best", "last")}
        self.ready = {key: composed(*command) for key, command in {"train": TINY, "disk": [*TINY, ON_DISK], **looks}.items()}

    def at(self, name: str) -> "Base":
        """The same base, for trials in a folder of their own."""
        self.work = self.folder / name
        return self

    def trial(self, kind: str, number: int) -> Answer:
        """A trial, which is decided by its kind, its number and the seed."""
        shutil.rmtree(self.work, ignore_errors=True)
        return KINDS[kind].run(self, random.Random(f"{self.seed} {kind} {number}"), number)

    def keep(self, folder: Path) -> None:
        """Keep what a trial left."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.work.exists():
            shutil.copytree(self.work, folder, symlinks=True)

    def copy(self) -> Path:
        """A copy of the undisturbed run to work on; its run directory."""
        shutil.copytree(self.base, self.work)
        return self.work / self.run.relative_to(self.base)

    def fresh(self) -> Path:
        """An empty folder to work in."""
        self.work.mkdir()
        return self.work

    def same(self, done: Done, mode: str = "train", key: str | None = None) -> bool:
        """Whether a process ended well and with the numbers of the undisturbed run."""
        return judge(done, numbers(self.work, mode), self.expected[key or mode]) == "same numbers"

    def _bytes(self, folder: Path) -> dict[str, bytes]:
        """What has to be the same to the last byte after any interruption: activations, and probes that were fitted."""
        files = [*folder.glob("cache/tokens/*/layer_*/*"), *folder.glob("outputs/train/*/checkpoints/*/best.*")]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    def resumed(self, done: Done, about: str) -> Answer:
        """How a process that was disturbed is continued by the same command: to the same numbers and bytes."""
        again = program(self.work, *TINY)
        if not self.same(again) or self._bytes(self.work) != self.bytes:
            return Answer("lost", about, f"{done.err}\n---\n{again.err}")
        return Answer("same numbers" if done.status == 0 else "sentence", about, done.err[-300:])

    # ------------------------------------------------------------------------------------------------- interruptions

    def kill(self, draw: random.Random, number: int) -> Answer:
        """Killed at a random moment."""
        wait, work = draw.uniform(0, self.seconds), self.fresh()
        done = program(work, *TINY, disturb=lambda process: _after(wait, process, signal.SIGKILL))
        if done.status not in (0, -signal.SIGKILL):
            return Answer("no answer" if done.status is None else "defect", f"after {wait:.2f} s", done.err)
        return self.resumed(done, f"after {wait:.2f} s")

    def signal(self, draw: random.Random, number: int) -> Answer:
        """Ctrl-C or SIGTERM at a random moment; every fifth of a new interpreter, from its imports on."""
        which, work = draw.choice([signal.SIGINT, signal.SIGTERM]), self.fresh()
        new = number % 5 == 0
        wait = draw.uniform(0, 3 if new else self.seconds)
        about = f"{which.name} after {wait:.2f} s{' of a new interpreter' if new else ''}"
        done = program(work, *TINY, fresh=new, disturb=lambda process: _after(wait, process, which))
        word = "interrupted:" if which == signal.SIGINT else "terminated:"
        ended = done.status == 128 + which and done.err.count(word) == 1 and "Traceback" not in done.err
        if not (ended or done.status == 0):
            return Answer("no answer" if done.status is None else "defect", about, f"{done.status} {done.err}")
        return self.resumed(done, about)

    def disk(self, draw: random.Random, number: int) -> Answer:
        """Files may not grow beyond a limit, or the disk is full; with room the same command goes on."""
        work, kib = self.fresh(), draw.randrange(8, 400)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * kib}k", "none", work]
        mounted = number % 2 == 0 and os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
        about = f"disk of {2 * kib} KiB" if mounted else f"files of at most {kib // 4} KiB"
        try:
            done = program(work, *TINY, limit=None if mounted else kib * 256)
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=64m", work], check=True)
            answer = judge(done, numbers(work, "train"), self.expected["train"], ("is full", "files may be here", "GB free"))
            return Answer(answer, about, done.err[-500:]) if answer in BAD else self.resumed(done, about)
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", work], check=True)

    # -------------------------------------------------------------------------------------------------------- damage

    def flip(self, draw: random.Random, number: int) -> Answer:
        """A random bit of a file: of the cache, a checkpoint, or the run directory, in turn."""
        run = self.copy()
        file = draw.choice([f for f in self.files(run, number) if f.stat().st_size])
        data = bytearray(file.read_bytes())
        at, bit = draw.randrange(len(data)), draw.randrange(8)
        data[at] ^= 1 << bit
        file.write_bytes(data)
        about = f"bit {bit} of byte {at} of {file.relative_to(self.work)}"
        return self.read_back(run, file, draw, about, way_out=number // 3 % 3 == 0)

    def structure(self, draw: random.Random, number: int) -> Answer:
        """A random file emptied, cut, replaced by a folder, a loop, or text of another kind."""
        run = self.copy()
        file = draw.choice(self.files(run, number))
        data = file.read_bytes()
        file.unlink()
        damage = draw.choice(["empty", "cut", "folder", "loop", "list", "deep", "null bytes", "absent"])
        if damage == "folder":
            file.mkdir()
        elif damage == "loop":
            file.symlink_to(file)
        elif damage != "absent":
            cut = data[: draw.randrange(len(data) or 1)]
            texts = {"empty": b"", "cut": cut, "list": b"[]", "deep": b'{"a":' * 30_000, "null bytes": bytes(64)}
            file.write_bytes(texts[damage])
        return self.read_back(run, file, draw, f"{damage}: {file.relative_to(self.work)}")

    def files(self, run: Path, number: int) -> list[Path]:
        """The files the program reads back: of the cache, the checkpoints, or the run directory, by the trial's number."""
        beside = [run / name for name in ("config.yaml", "run.json", "metrics.jsonl", "history.jsonl", "layers.csv")]
        cached = [path for path in (self.work / "cache").rglob("*") if path.is_file() and not path.name.startswith("lock")]
        fitted = [
            path for path in run.rglob("*.safetensors") if path.parent.name == "probe" or not path.name.startswith("last")
        ]
        return sorted([cached, fitted, beside][number % 3])  # the last epochs of controls are never read

    def read_back(self, run: Path, file: Path, draw: random.Random, about: str, way_out: bool = True) -> Answer:
        """How the program that reads a damaged file answers, and whether the way out that it names works.

        Nothing is left that would save it from reading the file: records of the same numbers are taken away first.
        """
        place, key = file.relative_to(self.work).parts[0], "train"
        look = file.name in ("config.yaml", "run.json") or file.parent.name == "probe" and not file.name.startswith("state")
        command = list(TINY)
        if place == "cache":
            shutil.rmtree(self.work / "outputs")
            command += [ON_DISK] * draw.randrange(2)
        elif look and (draw.random() < 0.7 or file.name.startswith("last")):
            key = "last" if file.name.startswith("last") else "best"
            command = ["mode=eval", f"run={run}", f"eval.checkpoint={key}", *LOOK]
        elif file.suffix == ".safetensors":
            (run / "metrics.jsonl").unlink()
            for finished in run.rglob("best.*") if not file.name.startswith("best") else ():
                finished.unlink()
        mode = "train" if key == "train" else "eval"
        about += f" (mode={mode}{', from disk' if ON_DISK in command else ''})"
        done = program(self.work, *command, ready=self.ready["disk" if ON_DISK in command else key])
        names = [str(run), file.name] + [str(file.parent)] * (place == "cache")
        names += SECTIONS if file.name == "config.yaml" else ()  # its options
        answer = judge(done, numbers(self.work, mode), self.expected[key], tuple(names))
        text = done.err[-500:]
        if answer != "sentence" or not way_out or mode == "eval" and not file.name.startswith(("best", "last")):
            return Answer(answer, about, text)  # of a run that is only looked at, there is nothing to repeat
        named = re.search(r"delete (/\S+)", text)
        target = Path(named[1].rstrip(",;:")) if named else file
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        again = program(self.work, *TINY, ready=self.ready["train"])
        if not self.same(again):
            return Answer("lost", about, f"{text}\n---\n{again.err[-500:]}")
        return Answer("sentence", about, text)

    def hostile(self, draw: random.Random, number: int) -> Answer:
        """The stored configuration of a run names something to be called, at a random place."""
        run, marker = self.copy(), self.work / "marker"
        with open(self.work / "evil.pkl", "wb") as file:
            pickle.dump(_Evil(str(marker)), file)
        evil, called = str(self.work / "evil.pkl"), draw.choice(list(CALLABLES))
        node = {"_target_": called, **{k: v.format(marker=marker, evil=evil) for k, v in CALLABLES[called].items()}}
        node |= {key: value for key, value in {"_partial_": False, "_recursive_": True}.items() if draw.random() < 0.3}
        cfg = yaml.safe_load((run / "config.yaml").read_text())
        places = list(_places(cfg))
        inside, key = draw.choice([p for p in places if p[2].startswith(draw.choice(["dataset", "model", ""]))])[:2]
        if draw.random() < 0.2:
            inside, key, node = cfg["dataset"], "_target_", called
        inside[key] = node
        (run / "config.yaml").write_text(yaml.safe_dump(cfg))
        command = draw.choice([["mode=eval"], ["mode=vis", "vis.gif=false", "vis.page=false"]])
        about = f"{key}: {called} in config.yaml, {command[0]}"
        done = program(self.work, *command, f"run={run}", *LOOK, ready=self.ready["best"] if command == ["mode=eval"] else None)
        if marker.exists():
            return Answer("code run", about, done.err[-500:])
        found = numbers(self.work, "eval") if command == ["mode=eval"] else self.expected["best"]
        return Answer(judge(done, found, self.expected["best"], ("config.yaml", str(key), *SECTIONS)), about, done.err[-500:])

    # --------------------------------------------------------------------------------------------- commands, metadata

    def command(self, draw: random.Random, number: int) -> Answer:
        """A careless command: first those that people typed, then one for an option and a value that it does not take."""
        typed = number < len(COMMANDS)
        command, names = (COMMANDS[number], ()) if typed else self.commands[(number - len(COMMANDS)) % len(self.commands)]
        self.copy()
        done = program(self.work, *TINY, *(command.split() if typed else command))
        shown = command if typed else " ".join(command)
        answer = judge(done, numbers(self.work, "train"), self.expected["train"], names)
        if done.status == 0 and (answer == "same numbers" or shown in HARMLESS):
            answer = "accepted"
        return Answer(answer, shown, done.err[-500:])

    def mutation(self, draw: random.Random, number: int) -> Answer:
        """One value of a data set's metadata is another one, or is gone."""
        import campaign_metadata

        return Answer(*campaign_metadata.mutation(self.folder / f"trees-{self.work.name}", draw, number))


class _Evil:
    """What a pickle may do: it makes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


# What a file could want to be called; all of them leave `marker`.
CALLABLES = {
    "torch.load": {"f": "{evil}", "weights_only": ""},
    "torch.serialization.load": {"f": "{evil}", "weights_only": ""},
    "numpy.load": {"file": "{evil}", "allow_pickle": "1"},
    "pickle.load": {"file": "{evil}"},
    "shutil.copyfile": {"src": "{evil}", "dst": "{marker}"},
    "os.mkdir": {"path": "{marker}"},
    "os.makedirs": {"name": "{marker}"},
    "pathlib.Path.touch": {"self": "{marker}"},
    "files.write_atomically": {"path": "{marker}"},
    "os.system": {"command": "touch {marker}"},
    "subprocess.run": {"args": "touch {marker}", "shell": "1"},
    "builtins.open": {"file": "{marker}", "mode": "w"},
    "datasets.export.export": {"directory": "{marker}"},
    "hydra.utils.instantiate": {"config": "{marker}"},
}


def _places(node: Any, prefix: str = "") -> list[tuple[Any, Any, str]]:
    """Every place of a configuration: the mapping or list, the key in it, its dotted name."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    here = [(node, key, f"{prefix}{key}") for key, _ in pairs]
    return here + [place for _, key, name in here for place in _places(node[key], f"{name}.")]


def _after(wait: float, process: int, number: int) -> None:
    """Send a signal some time after the process hears signals; not if it has ended by then."""
    begun = time.monotonic()
    ended = lambda: os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    while number != signal.SIGKILL and not ended() and not _hears(process) and time.monotonic() - begun < SECONDS:
        time.sleep(0.002)  # before its first line, Python itself answers
    begun = time.monotonic()
    while not ended() and time.monotonic() - begun < wait:
        time.sleep(0.005)
    if not ended():
        os.kill(process, number)


def _hears(process: int) -> bool:
    """Whether a process handles SIGTERM, as the system says."""
    try:
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return True
    return caught is None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


class Kind(NamedTuple):
    """A kind of trials: its name in the table, and the method that runs one."""

    title: str
    run: Callable[[Base, random.Random, int], Answer]


KINDS = {
    "kills": Kind("killed at a random moment", Base.kill),
    "signals": Kind("Ctrl-C or SIGTERM", Base.signal),
    "flips": Kind("flipped bits", Base.flip),
    "structure": Kind("structural damage", Base.structure),
    "hostile": Kind("hostile run directories", Base.hostile),
    "commands": Kind("careless commands", Base.command),
    "disks": Kind("full disks", Base.disk),
    "mutations": Kind("mutations of metadata", Base.mutation),
}
