"""Runs the program on a tiny configuration: its modes in this process, or `main.py` in a process of its own.

Such a process is forked from one that has imported torch once, so that it starts in a fraction of a second.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import main
from runs.records import read_records
from runs.run import Run

ROOT = Path(__file__).parent.parent
MODEL = [
    "model.pretrained=false", "model.weights=null", "model.digest=null",
    "model.kwargs={img_size: 96, patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}",
]  # fmt: skip
SCENES = ["dataset.n_train=16", "dataset.n_val=8", "dataset.n_test=8"]
FIT = ["trainer.epochs=1", "trainer.seeds=2", "trainer.n_boot=20", "trainer.lr=1e-2", "controls=none", "wandb.mode=disabled"]
TINY = [*MODEL, *SCENES, *FIT]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["main", "trainer", "pairs.score_maps", "datasets.procedural", "wandb", "timm"])


def places(folder: Path) -> list[str]:
    """Cache and outputs below a folder."""
    return [f"cache.dir={folder}/cache", f"output_dir={folder}/outputs"]


@contextmanager
def configured(*overrides: str) -> Iterator[DictConfig]:
    """The composed configuration, in the surroundings it has in a Hydra job."""
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        cfg = compose("config", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        with open_dict(cfg):
            del cfg["hydra"]
        yield cfg
    finally:
        HydraConfig.instance().cfg = None


class Finished(NamedTuple):
    """What a run in this process left: its directory and objective."""

    dir: Path
    objective: float | None

    def records(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return read_records(self.dir / file)


def run(folder: Path, *overrides: str) -> Finished:
    """What `python main.py` does, in this process; a mistake raises SystemExit with its sentence."""
    with configured(*places(folder), *overrides) as cfg:
        entered = []
        enter = Run.__init__

        def noting(self: Run, directory: Path, *rest: Any) -> None:
            entered.append(directory)
            enter(self, directory, *rest)

        with mock.patch.object(Run, "__init__", noting):
            objective = main.main(cfg)
        return Finished(entered[0], objective)


class Done(NamedTuple):
    """What a process left: exit status (negative: killed by that signal), standard output and error."""

    status: int
    out: str
    err: str


def _main(arguments: Sequence[str], files: str, environment: dict[str, str]) -> None:
    os.environ.update(environment, OMP_NUM_THREADS="1")
    sys.path += [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    for number, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{files}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    sys.argv = [str(ROOT / "main.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(folder: Path, *arguments: str, **environment: str) -> Any:
    """Begin `python main.py arguments` with cache and outputs below a folder; `finish` waits for it."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [*(a for a in arguments if a.startswith("-")), *places(folder), *(a for a in arguments if a[0] != "-")]
    files = str(folder / f"process-{len(list(folder.glob('process-*.out')))}")
    process = context.Process(target=_main, args=(arguments, files, environment))
    process.start()
    process.files = files
    return process


def finish(process: Any, seconds: float = 400) -> Done:
    """Wait for a process."""
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return Done(process.exitcode, *(Path(f"{process.files}.{end}").read_text() for end in ("out", "err")))
