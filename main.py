"""Entry point: compose the configuration, open the run, call the mode's entry function, return the objective.

    python main.py mode=train probe.mode=quadratic

A mode is a file in `cfgs/mode`; it names its entry function (`entry: trainer.run`), so this file never grows.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import options
from errors import UserError
from runs.run import interrupt_later, open_run

# Hydra would print its own trace and exit; with this set it hands the exception to `cli`, which prints one sentence.
os.environ["HYDRA_FULL_ERROR"] = "1"


def resolve_entry(name: str) -> Callable:
    """The function behind a dotted name such as `trainer.run`."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module), function)


@hydra.main(version_base="1.3", config_path="cfgs", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run one Hydra job; the returned objective lets a Hydra sweeper optimise over jobs."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        options.check(cfg)
        with open_run(cfg) as run:
            with interrupt_later():
                entry = resolve_entry(cfg.entry)
            return entry(cfg, run).get("objective")
    except UserError as error:
        if sweeping:  # the other jobs go on; Hydra raises the first failure at the end
            print(f"job {HydraConfig.get().job.num} failed: {error}", file=sys.stderr)
        if cfg.debug or sweeping:
            raise
        sys.exit(f"error: {error}")


def cli() -> None:
    """Turn every failure into one sentence and an exit status; `debug=true` shows the full trace."""
    debug = any(argument.lstrip("+").lower() in ("debug=true", "debug=1") for argument in sys.argv[1:])
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: nothing finished is lost, the same command resumes here", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
            sys.exit(1)
        if isinstance(error, UserError):
            sys.exit(f"error: {error}")
        if isinstance(error, HydraException | OmegaConfBaseException):
            sys.exit(f"error: {options.explain(error)}")
        where = traceback.extract_tb(error.__traceback__)[-1]
        if "submitit" in where.filename:
            sys.exit(f"error: the launcher cannot start the jobs: {error}")
        sys.exit(
            f"error: unexpected {type(error).__name__} at {os.path.basename(where.filename)}:{where.lineno}: {error}; "
            "this looks like a defect of the program, repeat the command with debug=true for the full trace"
        )


if __name__ == "__main__":
    cli()
