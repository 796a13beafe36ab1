"""Runs and their files: the only module that knows file names inside a run directory.

    outputs/<mode>/<timm name or weights file>-<dataset>-<protocol>-<probe>-<hash>/
        config.yaml     the composed configuration            run.json       provenance and status
        metrics.jsonl   a record per layer, seed and subset   history.jsonl  losses per epoch and fit
        layers.csv      the layer curve, means over seeds     learning.png   the learning curves, checkpoints/ probes
        scores.csv, scores.safetensors   the same per image       predictions…   of mode=eval, on request
        log.txt         what the terminal showed              wandb/         the mirror (offline by default)

The hash covers the configuration and the program's own code: the same command continues or reuses its directory, and a
number is never taken over from other code. W&B is a mirror; these files are the truth.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from errors import UserError
from files import cannot_write, write_atomically
from machine import set_table_width, table_width, torch_facts
from runs import progress
from runs.finished import newest_run, read_config, read_facts, source_run
from runs.mirror import WANDB_MODES, Mirror
from runs.provenance import code_digest, provenance
from runs.records import jsonable, line_of, open_records, record_key
from runs.signals import ignored, stop_behind

if TYPE_CHECKING:
    from runs.fit_ahead import Ahead

__all__ = [
    "Run", "checkpoint_files", "checkpoint_path", "deciding", "identify", "newest_run", "open_run", "read_config",
    "read_facts", "run_directory", "source_run",
]  # fmt: skip
# Settings that change where or how a run is carried out, never its numbers.
_NOT_IN_HASH = ("debug", "resume", "output_dir", "wandb", "threads", "processes", "run", "looks_at", "report")
# What of a configuration says nothing about a single fit.
_NOT_OF_A_FIT = ("mode", "entry", "controls", "device", "eval", "vis", "export")
# Of these a restart takes over what is there.
RESULT_FILES = (
    "metrics.jsonl", "history.jsonl", "layers.csv", "layers.png", "learning.png", "scores.csv", "scores.safetensors",
    "predictions.safetensors", "predictions", "checkpoints", "table.txt",
)  # fmt: skip
DATA_MODES = ("check_data", "export_data")  # which know no backbone
OPENING_FILES = {"config.yaml", "run.json", "log.txt", ".lock"}  # of a run that has not computed anything yet
SHARED_MODES = ("extract", "neco")  # whose work torchrun shares between processes


@contextlib.contextmanager
def one_sentence(directory: Path) -> Iterator[None]:
    """Say it in one sentence when a file of the run cannot be written or read; what was written before is continued."""
    try:
        yield
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else directory
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not (full or (error.filename is not None and path.is_relative_to(directory))):
            raise
        raise cannot_write(path, error) from error


class Run:
    """One execution: its directory, its records, its mirror.

    Attributes:
        dir: the run directory.
        facts: what `run.json` holds; entries may add to it, it is written when the run ends.
        before: what `run.json` held when this process opened the directory.
        source: the directory of the run this one looks at (mode=eval, vis), else None.
        shares: whether fits of other runs that are equal to one of its own are taken over (`runs.equal_fits`).
        configuration: what of the configuration decides the numbers, as plain values; written into checkpoints.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any], source: Path | None = None) -> None:
        self.dir = directory
        self.identity = dict(identity)
        self.facts: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        self.source = source
        self.shares = False
        self.configuration: dict[str, Any] = {}
        self.mirror: Mirror | None = None  # of the first rank only; begun at the first new record: it takes seconds
        self.ahead: Ahead | None = None  # fits that run in processes of their own
        self.tell: Callable[..., None] | None = None  # in such a process: to the first one
        self.opened = time.monotonic()
        self.ending = contextlib.ExitStack()
        self._log: IO[str] = open(directory / "log.txt", "a", encoding="utf-8")
        self._files: dict[str, IO[str]] = {}
        self._seen: dict[str, set[str]] = {}

    def say(self, text: str) -> None:
        """Print a line and keep it in log.txt; long warnings and notes are wrapped."""
        if self.tell is not None:
            return self.tell("say", text)
        text = wrapped(text)
        with progress.aside():
            print(text, flush=True)
        self._keep(text)

    def note(self, text: str) -> None:
        """Keep a line of progress in log.txt; print it where output goes to a file, since no bar is seen there."""
        if not sys.stdout.isatty():
            print(text, flush=True)
        self._keep(text)

    def _keep(self, text: str) -> None:
        self._log.write(text + "\n")
        self._log.flush()

    def write(self, record: Mapping[str, Any], file: str = "metrics.jsonl") -> None:
        """Append a record (one JSON line, flushed); a record already there from before a restart is not repeated."""
        self.open_records(file)
        key = record_key(record)
        if key in self._seen[file]:
            return
        self._files[file].write(line_of({**self.identity, **record}) + "\n")
        self._files[file].flush()
        if self.tell is not None:
            self.tell("record", file, jsonable(record))
        self.heard(file, record)

    def open_records(self, file: str) -> None:
        """Open a file of records, which takes away what a kill has left of a last line: before others write there too."""
        if file not in self._files:
            path = self.dir / file
            self._seen[file] = open_records(path, self.say)
            # The buffer takes any line whole: lines of several processes never mix.
            self._files[file] = open(path, "a", encoding="utf-8", buffering=1 << 20)

    def heard(self, file: str, record: Mapping[str, Any]) -> None:
        """A record was written, here or by a process that fits ahead."""
        self._seen[file].add(record_key(record))
        if self.mirror is not None:
            self.mirror.begin()
            if record.get("kind") == "epoch" and "train_loss" in record:
                self.mirror.epoch(record)

    def rest_on(self, inputs: Mapping[str, Any]) -> None:
        """Say what the numbers rest on beside configuration and code (the activations, the run that is scored).

        Goes into run.json. Where this directory holds results that rest on something else, they are set aside: a record
        or a checkpoint of other data is never taken over.
        """
        inputs, before = jsonable(inputs), self.facts.get("inputs")
        if before != inputs and any((self.dir / name).exists() for name in RESULT_FILES):
            number = 1 + len(list(self.dir.glob("superseded-*")))
            aside = self.dir / f"superseded-{number}"
            aside.mkdir()
            for name in RESULT_FILES:
                if (self.dir / name).exists():
                    os.replace(self.dir / name, aside / name)
            self.say(f"note: the data or weights are not those of the results in {self.dir}; these were moved to {aside.name}")
        self.facts["inputs"] = inputs
        _write_facts(self)

    def finishing(self) -> None:
        """All results are written: from here to the end of the run Ctrl-C and SIGTERM no longer make it an unfinished one."""
        self.ending.enter_context(ignored())
        progress.end()

    def close_mirror(self, complete: bool) -> None:
        """Send what is left to W&B and close it there; a line says how to send an offline copy."""
        line = self.mirror.finish(complete) if self.mirror is not None else None
        if line is not None:
            self.say(line)

    def close(self) -> None:
        """Close the files."""
        for file in (*self._files.values(), self._log):
            with contextlib.suppress(OSError):  # every line was flushed, so what fails here has failed before
                file.close()


def _choice(group: str, fallback: str) -> str:
    """Name of the file chosen for a config group; outside a Hydra job the fallback."""
    if HydraConfig.initialized():
        return str(HydraConfig.get().runtime.choices.get(group) or fallback)
    return fallback


def identify(cfg: DictConfig) -> dict[str, str]:
    """The names every record of a run carries."""
    return {
        "mode": cfg.mode,
        "task": cfg.task or "",
        "protocol": cfg.protocol.name,
        "model": str(cfg.model.name) if _choice("model", "timm") == "timm" else _choice("model", ""),
        "dataset": _choice("dataset", str(cfg.dataset._target_).rpartition(".")[0].rpartition(".")[2]),
        "probe": cfg.probe.mode,
    }


def first_line(cfg: DictConfig, source: Path | None = None) -> str:
    """What a run will do, from its configuration alone: said at once, before anything that takes time."""
    if source is not None:
        return f"{cfg.mode} of {source}"
    names = identify(cfg)
    sizes = [f"{cfg.dataset[f'n_{s}']} {s}" for s in ("train", "val", "test") if isinstance(cfg.dataset.get(f"n_{s}"), int)]
    parts = [f"{cfg.mode}: {names['model']} on {names['dataset']}" + (f" ({', '.join(sizes)})" if sizes else "")]
    parts.append(f"protocol {cfg.protocol.name}")
    if cfg.task is not None:
        seeds = cfg.trainer.seeds if isinstance(cfg.trainer.seeds, int) else len(cfg.trainer.seeds)
        layers = cfg.model.layers if isinstance(cfg.model.layers, str | int) else ",".join(map(str, cfg.model.layers))
        controls = cfg.controls if isinstance(cfg.controls, str) else ",".join(cfg.controls)
        parts += [f"probe {cfg.probe.mode} × {seeds} seed{'s' * (seeds != 1)}", f"layers {layers}", f"controls {controls}"]
    return "; ".join(parts)


def run_directory(cfg: DictConfig, source: Path | None = None) -> Path:
    """Where a configuration's results live: readable names and a hash of configuration and code."""
    numbers = deciding(cfg) if source is None else {**deciding(cfg), "run": str(source.resolve())}
    fingerprint = hashlib.sha256((json.dumps(numbers, sort_keys=True, default=str) + code_digest()).encode()).hexdigest()
    label = source.name if source is not None else "-".join(re.sub(r"[^\w.]+", "_", name)[:60] for name in label_parts(cfg))
    directory = Path(cfg.output_dir) / cfg.mode / f"{label}-{fingerprint[:8]}"
    if cfg.resume:
        return directory
    number = 2
    while directory.exists():
        directory = directory.with_name(f"{label}-{fingerprint[:8]}-{number}")
        number += 1
    return directory


def label_parts(cfg: DictConfig) -> list[str]:
    """What a run directory is called: backbone, data, protocol and probe, as far as the mode has them."""
    names, weights = identify(cfg), cfg.model.weights
    if not cfg.model.pretrained:
        backbone = f"{cfg.model.name}_random"
    elif weights is None:
        backbone = str(cfg.model.name)
    else:
        file = Path(str(weights))
        general = file.stem in ("student", "teacher", "model", "checkpoint", "pytorch_model")  # the folder says more
        backbone = f"{file.parent.name}_{file.stem}" if general else file.stem
    if cfg.mode in DATA_MODES:
        return [names["dataset"]]
    parts = [backbone, names["dataset"], names["protocol"]]
    return parts if cfg.task is None else [*parts, names["probe"]]


def deciding(cfg: DictConfig) -> dict[str, Any]:
    """What of a configuration decides the numbers of a run, as plain values."""
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    plain = {key: value for key, value in plain.items() if key not in _NOT_IN_HASH}
    plain["cache"] = {"dtype": plain["cache"]["dtype"]}  # the rest says where and how fast, not what
    return plain


@contextlib.contextmanager
def open_run(cfg: DictConfig) -> Iterator[Run]:
    """Open the run directory of a configuration, mark how the run ended, close everything.

    Raises:
        UserError: a value is missing, the run to look at is, or another process works in the same directory.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise UserError(f"{missing[0]} has no value; give it one on the command line: {missing[0]}=…")
    if cfg.wandb.mode not in WANDB_MODES:
        raise UserError(f"unknown wandb.mode '{cfg.wandb.mode}'; valid: {', '.join(WANDB_MODES)}")
    rank = int(os.environ.get("RANK", 0))
    if rank and cfg.mode not in SHARED_MODES:
        shared = " and ".join(f"mode={mode}" for mode in SHARED_MODES)
        raise UserError(f"mode={cfg.mode} runs in one process; torchrun shares the work of {shared}, then run it alone")
    source = source_run(cfg)
    directory = run_directory(cfg, source) / (f"rank{rank}" if rank else "")  # what other ranks log is beside, not in, the run
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the run directory {directory}: {error.strerror}; set output_dir=…") from error
    set_table_width(cfg.report.width)
    with one_sentence(directory), open(directory / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process is working in {directory}; wait for it, or start a second copy with resume=false"
            ) from error
        configuration = OmegaConf.to_yaml(cfg, resolve=True)
        write_atomically(directory / "config.yaml", configuration)
        run = Run(directory, identify(cfg), source)
        run.configuration = {k: v for k, v in jsonable(deciding(cfg)).items() if k not in _NOT_OF_A_FIT}
        run.shares = bool(cfg.resume)
        if source is not None:  # its numbers belong to what was fitted there
            run.identity |= {**read_facts(source).get("identity", {}), "mode": cfg.mode}
        run.before = read_facts(directory)
        run.facts.update(provenance(), identity=run.identity, inputs=run.before.get("inputs"))
        run.facts.update(command=command_line(), started=time.strftime("%Y-%m-%dT%H:%M:%S%z"), status="running")
        run.facts["config_sha256"] = hashlib.sha256(configuration.encode()).hexdigest()
        _write_facts(run)
        _note_in_sweep(directory)
        run.mirror = None if rank else Mirror(cfg, run.dir, run.say, run.before.get("wandb_id"))
        status = "failed"
        with progress.shown(run.note) if not rank else contextlib.nullcontext(), run.ending:
            try:
                if not rank:
                    run.say(first_line(cfg, source))
                yield run
                run.finishing()
                status = "finished"
            except BaseException as error:
                stopped = stop_behind(error) is not None or isinstance(error, KeyboardInterrupt)
                status = "interrupted" if stopped else "refused" if isinstance(error, UserError) else "failed"
                raise
            finally:
                run.finishing()  # a second signal finds the last writes under way, and does no harm
                run.facts |= {"status": "failed" if status == "refused" else status, **torch_facts()}
                if run.mirror is not None and run.mirror.identity is not None:
                    run.facts["wandb_id"] = run.mirror.identity
                try:
                    _write_facts(run)
                finally:
                    run.close_mirror(complete=status == "finished")
                    run.close()
                    if status == "refused" and {path.name for path in directory.iterdir()} <= OPENING_FILES:
                        shutil.rmtree(directory)  # nothing was computed: it would only be in the way


def command_line() -> list[str]:
    """The command as it was typed; of a job of a sweep the one that repeats it alone."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return sys.argv
    name = lambda override: override.partition("=")[0].lstrip("+~")
    of_job = {name(override): override for override in HydraConfig.get().overrides.task}
    typed = [argument for argument in sys.argv if argument not in ("-m", "--multirun")]
    alone = [of_job.pop(name(argument), argument) if "=" in argument and argument[0] != "-" else argument for argument in typed]
    return [*alone, *of_job.values()]


def wrapped(text: str) -> str:
    """Text with its sentences in lines of `report.width` characters; rows of tables and lines that name a path stay whole."""
    whole = {"break_long_words": False, "break_on_hyphens": False}
    fill = lambda line: textwrap.fill(line, table_width(), subsequent_indent="  ", **whole)
    return "\n".join(fill(line) if is_sentence(line) else line for line in text.split("\n"))


def is_sentence(line: str) -> bool:
    """Whether a line may be wrapped: a warning, a note, or one with neither the gaps of a table nor a path to be copied."""
    fixed = "  " in line.strip() or any("/" in word[1:] for word in line.split())
    return not fixed or line.startswith(("warning: ", "note: "))


def _note_in_sweep(directory: Path) -> None:
    """A job of a sweep leaves its directory in the sweep's folder, for the report at the end."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir) / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{int(hydra.job.num):04d}.json", json.dumps({"directory": directory.as_posix()}) + "\n")


def _write_facts(run: Run) -> None:
    run.facts["seconds"] = round(time.monotonic() - run.opened, 2)
    write_atomically(run.dir / "run.json", json.dumps(jsonable(run.facts), indent=2) + "\n")


def checkpoint_path(directory: str | Path, name: str, which: str) -> Path:
    """File of a probe's checkpoint: `which` is best, last or state (everything a restart needs)."""
    return Path(directory) / "checkpoints" / name / f"{which}.safetensors"


def checkpoint_files(directory: str | Path, name: str, which: str) -> list[Path]:
    """The files of a fitted stack, in the cuts by layers it was fitted in; `which` is best or last.

    Raises:
        UserError: the run holds none.
    """
    files = sorted(checkpoint_path(directory, name, which).parent.glob(f"{which}.*.safetensors"))
    if not files:
        raise UserError(f"{directory} holds no {which} checkpoint of {name}; name the directory of a finished mode=train… run")
    return files
