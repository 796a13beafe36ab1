"""Damages what the program reads and interrupts what it does, at random, and counts how it answers.

    python scripts/campaign.py --minutes 5            # as many trials of every kind as fit
    python scripts/campaign.py --minutes 300 --seed 1 # about 50 kills, 1000 flips, 200 commands, 5000 mutations

A tiny run (a two-block random ViT, generated scenes) is made once. Every trial works on a copy of it and on the program as
a process of its own; only mutations of metadata call the data set in this process, because there are so many.

An answer is good if the numbers are those of the undisturbed run, or if it is one sentence on the error stream, and what
the sentence says (delete a file) or the same command again leads back to these numbers. It is bad if it is silently other
numbers, looks like a defect, does not come within a minute, or loses what was done. A full disk is a limit of the size of
files; where a small tmpfs may be mounted (as root), it is one.
"""

import argparse
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", MPLBACKEND="Agg", TQDM_DISABLE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timm  # noqa: E402, F401  (imported once here, so that every process starts with it)
import torch  # noqa: E402

import pairs.layer_curve  # noqa: E402
import pairs.task  # noqa: E402, F401
from datasets.scene import build  # noqa: E402
from errors import UserError  # noqa: E402
from runs.records import read_records  # noqa: E402

TINY = [
    "model.pretrained=false", "model.weights=null", "model.digest=null", "model.layers=[embed,0]", "controls=[position,cosine]",
    "model.kwargs={img_size: 96, patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}", "wandb.mode=disabled", "threads=1",
    "dataset.n_train=16", "dataset.n_val=8", "dataset.n_test=8", "cache.shard_images=4", "trainer.epochs=4", "trainer.seeds=2",
    "trainer.n_boot=20", "trainer.lr=1e-2", "trainer.checkpoint_seconds=0",
]  # fmt: skip
COMMANDS = [
    "controls=5", "controls=[position,position]", "controls=nonsense", "protocol.pairs.fit=[]", "model.kwargs=5", "task=foo",
    "task=null", "entry=os.system", "entry=foo.bar", "entry=nodots", "entry=", "mode=null", "mode=nonsense", "=5", "run=here",
    "dataset._target_=os.system", "dataset._target_=foo.bar", "dataset._target_=datasets.procedural.Nope",
    "+dataset._partial_=true", "cache.dir=", "output_dir=a=b", "output_dir=a,b", "probe.mode=nonsense", "probe.rank=text",
    "trainer.seeds=0", "trainer.seeds=[1,1]", "trainer.epochs=-1", "trainer.lr=nan", "trainer.schedule=nonsense", "device=tpu",
    "model.layers=[9]", "model.layers=[]", "model.name=nonsense", "model.output_mode=cls", "protocol=nonsense",
    "dataset=folder", "dataset.n_train=text", "dataset.nonsense=1", "cache.dtype=float8", "cache.disk_gb=1e-9",
    "cache.workers=-1",
    "~probe",
    "+nonsense=1", "eval.run=x", "cache.max_gb=1", "model.weights=/nonexistent", "mode=eval run=/nonexistent",
    "mode=vis vis.image=99",
    "mode=train_binding dataset=scenes", "threads=20000", "trainer.batch_images=0", "debug=maybe", "seed=text", "probe=5",
]  # fmt: skip
SECONDS = 60  # after which an answer counts as none
BAD = ("other numbers", "defect", "no answer", "lost")


class Done(NamedTuple):
    """What a process left: exit status (None: it did not end in time), standard output and error."""

    status: int | None
    out: str
    err: str


def program(
    folder: Path,
    *arguments: str,
    disturb: Callable[[int], None] | None = None,
    limit: int | None = None,
    cache: Path | None = None,
) -> Done:
    """`python main.py arguments` with cache and outputs below a folder.

    Args:
        disturb: gets the process id while it runs; limit: bytes a file may have; cache: another place of the cache.
    """
    files = [folder / "out.txt", folder / "err.txt"]
    places = [f"cache.dir={cache or folder / 'cache'}", f"output_dir={folder / 'outputs'}"]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            sys.argv = [str(ROOT / "main.py"), *places, *arguments]
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    if disturb is not None:
        disturb(child)
    end = time.monotonic() + SECONDS
    while (found := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Done(None, "", "")
        time.sleep(0.01)
    return Done(os.waitstatus_to_exitcode(found[1]), *(file.read_text(errors="replace") for file in files))


def sentence(done: Done) -> str | None:
    """The one sentence a process ended in; None if it ended in anything else."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.status != 1 or len(errors) != 1 or "Traceback" in done.err or "defect of the program" in done.err:
        return None
    return errors[0]


def numbers(folder: Path, mode: str, names: set[str] | None = None) -> dict[str, Any]:
    """The scores of the newest run of a mode, by what they are of."""
    runs = sorted((folder / "outputs" / mode).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    keys = ("name", "layer", "seed", "question", "readout", "subset")
    found = read_records(runs[-1], lambda text: None) if runs else []
    scores = [r for r in found if r["kind"] == "score" and (names is None or r["name"] in names)]
    return {str([r[key] for key in keys]): r["metrics"] for r in scores}


class Campaign:
    """An undisturbed run, and what its numbers are."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.base, self.counts = folder / "base", {}
        self.base.mkdir(parents=True)
        done = program(self.base, *TINY)
        assert done.status == 0, done.err
        few = [f"dataset.n_{split}=4" for split in ("train", "val", "test")]
        export = ["mode=export_data", "dataset=colorshape", f"export.dir={self.base / 'exported'}", "wandb.mode=disabled"]
        done = program(self.base, *export, *few)
        assert done.status == 0, done.err
        self.exported = self.base / "exported" / "colorshape"
        self.train = numbers(self.base, "train")
        self.evaluated = {key: value for key, value in self.train.items() if key.startswith("['probe'")}
        (self.run,) = (self.base / "outputs" / "train").iterdir()

    def copy(self) -> Path:
        """A copy of the undisturbed run to work on."""
        shutil.rmtree(self.folder / "trial", ignore_errors=True)
        return shutil.copytree(self.base, self.folder / "trial")

    # Each kind of trial yields what the answers were.

    def kill(self) -> Iterator[str]:
        """Killed at a random moment; the same command then ends with the same numbers."""
        yield from self.stopped(signal.SIGKILL, -signal.SIGKILL)

    def signals(self) -> Iterator[str]:
        """Ctrl-C or SIGTERM at a random moment."""
        number = self.draw.choice([signal.SIGINT, signal.SIGTERM])
        yield from self.stopped(number, 128 + number)

    def stopped(self, number: int, status: int) -> Iterator[str]:
        """Stopped by a signal, and resumed."""
        work = self.folder / "trial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        wait = self.draw.uniform(0.3, 3.0)

        def disturb(process: int) -> None:
            end = time.monotonic() + wait
            while time.monotonic() < end and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.01)
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(process, number)

        done = program(work, *TINY, disturb=disturb)
        if done.status not in (0, status, -number):
            yield "no answer" if done.status is None else "defect"
            return
        again = program(work, *TINY)
        yield ("same numbers" if done.status == 0 else "sentence") if self.same(again, work, "train") else "lost"

    def flip(self) -> Iterator[str]:
        """A random bit of a random file of cache and run directory."""
        work = self.copy()
        file = self.pick(work)
        data = bytearray(file.read_bytes())
        if not data:
            return
        data[self.draw.randrange(len(data))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(data)
        yield self.answer(work, file)

    def structure(self) -> Iterator[str]:
        """A random file emptied, cut, replaced by a folder, a loop, or text of another kind."""
        work = self.copy()
        file = self.pick(work)
        data = file.read_bytes()
        file.unlink()
        damage = self.draw.choice(["empty", "cut", "folder", "loop", "list", "deep", "null bytes", "absent"])
        if damage == "folder":
            file.mkdir()
        elif damage == "loop":
            file.symlink_to(file)
        elif damage != "absent":
            cut = data[: self.draw.randrange(len(data) or 1)]
            texts = {"empty": b"", "cut": cut, "list": b"[]", "deep": b'{"a":' * 30_000, "null bytes": bytes(64)}
            file.write_bytes(texts[damage])
        yield self.answer(work, file, gone=damage == "absent")

    def pick(self, work: Path) -> Path:
        """A file the program reads back: of the cache, the checkpoints, or the run directory."""
        run = work / "outputs" / "train" / self.run.name
        beside = [run / name for name in ("config.yaml", "run.json", "metrics.jsonl", "history.jsonl")]
        cached = [path for path in (work / "cache").rglob("*") if path.is_file() and "lock" not in path.name]
        return self.draw.choice(sorted(self.draw.choice([cached, list(run.rglob("*.safetensors")), beside])))

    def answer(self, work: Path, file: Path, gone: bool = False) -> str:
        """How the program that reads a damaged file answers, and whether the way out that it names works."""
        run = work / "outputs" / "train" / self.run.name
        looks = file.name in ("config.yaml", "run.json") or file.name.startswith("best")
        if looks:
            command, mode = ["mode=eval", f"run={run}", "wandb.mode=disabled"], "eval"
        else:
            command, mode = TINY, "train"
            if "cache" in file.relative_to(work).parts[0]:
                shutil.rmtree(work / "outputs")  # every split is read
            elif file.name.startswith(("state", "last")):
                for best in run.rglob("best.*"):
                    best.unlink()
        done = program(work, *command)
        if self.same(done, work, mode):
            return "same numbers"
        if done.status == 0:
            return "other numbers"
        text = sentence(done)
        if text is None:
            return "no answer" if done.status is None else "defect"
        if looks and not file.name.startswith("best") or gone:  # of a run that is shown, there is nothing to repeat
            return "sentence"
        named = re.search(r"delete (/\S+)", text)
        target = Path(named[1].rstrip(",;")) if named else file
        shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)
        return "sentence" if self.same(program(work, *TINY), work, "train") else "lost"

    def same(self, done: Done, work: Path, mode: str) -> bool:
        """Whether a process ended well and with the numbers of the undisturbed run."""
        expected = self.train if mode == "train" else self.evaluated
        return done.status == 0 and numbers(work, mode) == expected

    def command(self) -> Iterator[str]:
        """A careless command: one sentence, status 1."""
        done = program(self.copy(), *TINY, *self.draw.choice(COMMANDS).split())
        if done.status is None:
            yield "no answer"
        elif done.status == 0:
            yield "same numbers" if "note" in done.out or "error" not in done.err else "other numbers"
        else:
            yield "sentence" if sentence(done) else "defect"

    def disk(self) -> Iterator[str]:
        """Files may not grow beyond a limit, or the disk is full; with room the same command goes on."""
        work = self.folder / "trial"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        small = self.folder / "small"
        small.mkdir(exist_ok=True)
        kib, mounted = self.draw.randrange(8, 400), False
        if self.draw.random() < 0.5 and os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(small)]
            mounted = subprocess.run(mount, capture_output=True).returncode == 0
        try:
            done = program(work, *TINY, cache=small / "cache") if mounted else program(work, *TINY, limit=kib * 256)
        finally:
            if mounted:
                subprocess.run(["umount", small], check=True)
        if done.status != 0 and sentence(done) is None:
            yield "no answer" if done.status is None else "defect"
            return
        again = program(work, *TINY)
        yield ("same numbers" if done.status == 0 else "sentence") if self.same(again, work, "train") else "lost"

    def metadata(self) -> Iterator[str]:
        """Fifty mutations of an exported data set's metadata; each is read through the data set."""
        name = self.draw.choice(["metadata.json", "image_metadata.jsonl"])
        (file,) = self.exported.glob(f"*_train_*/{name}")
        text = file.read_text()
        for _ in range(50):
            lines = [json.loads(line) for line in (text.splitlines() if name.endswith("l") else [text])]
            self.mutate(self.draw.choice(lines))
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            try:
                data = build({"_target_": "datasets.export.Exported", "root": str(self.exported)}, "train")
                data.fingerprint(), data.report(), data.info()
                for i in range(len(data)):
                    data[i]
                yield "same numbers"  # what was changed is not read, or as good
            except UserError as error:
                yield "defect" if "\n" in str(error) else "sentence"
            except Exception as error:
                print(f"  metadata: {type(error).__name__}: {error}", file=sys.stderr)
                yield "defect"
        file.write_text(text)

    def mutate(self, node: Any) -> None:
        """Change one value at a random depth into something of another kind."""
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = self.draw.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and self.draw.random() < 0.7:
                node = node[key]
                continue
            if isinstance(node, dict) and self.draw.random() < 0.2:
                del node[key]
            else:
                others = [None, -1, 10**20, 0.5, "", "../up", "/abs", "\x00", "\ud800", [], {}, [[]], True, "text"]
                node[key] = self.draw.choice(others)
            return


KINDS = {
    "kills": (Campaign.kill, 50), "signals": (Campaign.signals, 50), "byte flips": (Campaign.flip, 1000),
    "structural damage": (Campaign.structure, 300), "careless commands": (Campaign.command, 200),
    "full disks": (Campaign.disk, 50), "mutations of metadata": (Campaign.metadata, 5000),
}  # fmt: skip


def main() -> int:
    """Run until the time is over; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="length; every kind also has a largest number of trials")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    end, counts = time.monotonic() + 60 * options.minutes, {kind: Counter() for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        while time.monotonic() < end and any(sum(counts[kind].values()) < most for kind, (_, most) in KINDS.items()):
            for kind, (trial, most) in KINDS.items():
                if time.monotonic() < end and sum(counts[kind].values()) < most:
                    answers = list(trial(campaign))
                    counts[kind].update(answers)
                    if set(answers) & set(BAD):
                        keep = Path(tempfile.mkdtemp(prefix="campaign-")) / "trial"
                        shutil.copytree(Path(folder) / "trial", keep, symlinks=True)
                        print(f"  {kind}: {dict(Counter(answers))}, kept in {keep}", file=sys.stderr)
    columns = ("same numbers", "sentence", *BAD)
    print("| kind | trials | " + " | ".join(columns) + " |\n|---" + "|---:" * (len(columns) + 1) + "|")
    for kind, counted in counts.items():
        print(f"| {kind} | {sum(counted.values())} | " + " | ".join(str(counted[column]) for column in columns) + " |")
    return int(any(counted[bad] for counted in counts.values() for bad in BAD))


if __name__ == "__main__":
    sys.exit(main())
