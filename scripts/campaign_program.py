"""The program as `campaign.py` runs it: as a process of its own, forked from one that has imported everything."""

import functools
import importlib
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from campaign_commands import TINY
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from errors import UserError
from runs.records import read_records

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 180  # of a busy machine, after which an answer counts as none


class Done(NamedTuple):
    """What a process left: exit status (None: it did not end in time), standard output and error."""

    status: int | None
    out: str
    err: str


def sentence(done: Done) -> str | None:
    """The one sentence a process ended in; None if it ended in anything else."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    if done.status != 1 or len(errors) != 1 or "Traceback" in done.err or "defect of the program" in done.err:
        return None
    return errors[0]


def judge(done: Done, found: Any, expected: Any, names: tuple[str, ...] = ()) -> str:
    """The column of an answer, before its way out was tried.

    Args:
        found: the numbers the process left; expected: those of the undisturbed run.
        names: a sentence has to name one of them; () if it need not.
    """
    if done.status is None:
        return "no answer"
    if done.status == 0:
        return "same numbers" if expected and found == expected else "other numbers"
    text = sentence(done)
    if text is None:
        return "defect"
    return "sentence" if not names or any(name in text for name in names) else "vague"


def numbers(folder: Path, mode: str) -> dict[str, Any]:
    """The scores of the newest run of a mode, by what they are of."""
    runs = sorted((folder / "outputs" / mode).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    keys = ("name", "layer", "seed", "question", "readout", "subset")
    try:
        found = read_records(runs[-1], lambda text: None) if runs else []
    except UserError:  # a folder in its place, which is for the program to name
        found = []
    return {str([r[key] for key in keys]): [r["metrics"], r.get("interval")] for r in found if r["kind"] == "score"}


def warm_up() -> None:
    """Import here what the program imports, and read its configuration once, so that processes forked from here start fast."""
    for name in ("timm", "datasets.procedural", "main", "pairs.layer_curve", "pairs.score_maps", "pairs.task"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    composed(*TINY)


def composed(*arguments: str) -> DictConfig:
    """The configuration of a command, for `program`: to compose and check it takes longer than a tiny run."""
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        cfg = compose("config", list(arguments), return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    return cfg


def program(
    folder: Path,
    *arguments: str,
    disturb: Callable[[int], None] | None = None,
    limit: int | None = None,
    fresh: bool = False,
    ready: DictConfig | None = None,
) -> Done:
    """`python main.py arguments` with cache and outputs below a folder.

    Args:
        disturb: gets the process id while it runs; limit: bytes a file may have.
        fresh: a new interpreter that imports everything itself, instead of a process forked from this one.
        ready: what Hydra would compose of the arguments (but for the paths and `run=…`), where only data are damaged.
    """
    files = [folder.with_name(f"{folder.name}.{end}") for end in ("out", "err")]  # beside it: its disk may be full
    command = [str(ROOT / "main.py"), f"cache.dir={folder / 'cache'}", f"output_dir={folder / 'outputs'}", *arguments]
    if fresh:
        with open(files[0], "w") as out, open(files[1], "w") as err:
            child = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err).pid
    elif (child := os.fork()) == 0:
        _become(command, files, limit, ready)
    if disturb is not None:
        disturb(child)
    end = time.monotonic() + SECONDS
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Done(None, "", "")
        time.sleep(0.01)
    return Done(os.waitstatus_to_exitcode(ended[1]), *(file.read_text(errors="replace") for file in files))


def _become(command: list[str], files: list[Path], limit: int | None, ready: DictConfig | None) -> None:
    """Be the program, in a process that was just forked; it never comes back."""
    status = 1
    try:
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = command
        if ready is None:
            runpy.run_path(command[0], run_name="__main__")
        else:
            _enter(ready, command)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def _enter(cfg: DictConfig, command: list[str]) -> None:
    """What main.py does once Hydra has composed its configuration; the same command was checked when the base was made."""
    import main
    import options
    import pairs.layer_curve

    HydraConfig.instance().set_config(cfg)
    del cfg["hydra"]
    for key, value in (argument.split("=", 1) for argument in command[1:]):
        if key in ("cache.dir", "output_dir", "run"):
            OmegaConf.update(cfg, key, value)
    OmegaConf.set_struct(cfg, True)
    options.check = lambda cfg: None
    pairs.layer_curve.write_layer_curve = lambda *_: None  # the figure takes half of a tiny run, and nobody looks at it
    main.main = functools.partial(main.main, cfg)
    main.cli()
