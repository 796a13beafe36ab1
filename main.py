"""Entry point: compose the configuration, open the run, call the mode's entry function, return the objective.

    python main.py mode=train probe.mode=quadratic

A mode is a file in `cfgs/mode`; it names its entry function (`entry: pairs.task.run`), so this file never grows.
"""

from runs import signals

if __name__ == "__main__":
    signals.leave()  # before the imports, which take seconds on a busy machine
    signals.skip_teardown()
    import machine

    machine.let_waiting_threads_sleep()

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import options
from errors import UserError
from files import ROOT
from runs.run import open_run


def find_entry(cfg: DictConfig) -> Callable:
    """The entry function of the chosen mode, as the mode's file names it and nothing else does.

    Modes are files of `cfgs/mode`, and of a folder of the user's own that the command line adds (`--config-dir mine`);
    `cfgs/mode_and_protocol` holds modes that a protocol asks in another way.

    Raises:
        UserError: `entry` was set to something else, or what the mode's file names is not there.
    """
    choices = HydraConfig.get().runtime.choices
    mode = choices.get("mode")
    names = (f"mode_and_protocol/{mode}-{choices.get('protocol')}.yaml", f"mode/{mode}.yaml")
    folders = [source.path for source in HydraConfig.get().runtime.config_sources if source.schema == "file"]
    files = [file for name in names for folder in folders if (file := Path(folder) / name).is_file()]
    entry = OmegaConf.load(files[0]).get("entry") if files else None
    if entry is None or cfg.entry != entry:
        raise UserError(f"entry={cfg.entry} is not the entry of mode={mode} ({entry}); leave entry=… out, choose with mode=…")
    module, _, function = str(entry).rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        ours = isinstance(error, ImportError) and error.name != module
        if ours or (ROOT / f"{module.replace('.', '/')}.py").is_file():
            raise  # a defect inside of a module that is there
        raise UserError(f"{files[0]}: entry {entry} cannot be imported ({error}); put its folder on PYTHONPATH") from error


def carry_out(cfg: DictConfig) -> tuple[Path, dict]:
    """Run one job in the surroundings of Hydra: the run directory, and what the mode's entry returned.

    Raises:
        UserError: a mistake in command, data or weights.
    """
    options.check(cfg)
    options.name_protocol(cfg)
    signals.begin()  # from here on something may be half done
    with open_run(cfg) as run:
        with signals.stop_later():  # an import of torch that is broken off half-way kills the process
            entry = find_entry(cfg)
        return run.dir, entry(cfg, run)


@hydra.main(version_base="1.3", config_path="cfgs", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run one Hydra job; the returned objective lets a Hydra sweeper optimise over jobs."""
    sweeping = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        _, found = carry_out(cfg)
        if not sweeping:
            signals.ignore()  # what is left is the way out: it does not turn success into anything else
        return found.get("objective")
    except UserError as error:
        if sweeping:  # the other jobs go on; Hydra raises the first failure at the end
            print(f"job {HydraConfig.get().job.num} failed: {error}", file=sys.stderr)
        if cfg.debug or sweeping:
            raise
        sys.exit(f"error: {error}")
    finally:
        if sweeping:
            signals.end()


def cli() -> None:
    """Turn every failure into one sentence and an exit status; `debug=true` shows the full trace."""
    debug = any(argument.lstrip("+").lower() in ("debug=true", "debug=1") for argument in sys.argv[1:])
    # Hydra would print its own trace and exit; with this set it hands the exception over, which becomes one sentence.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main()
        signals.succeeded()
    except KeyboardInterrupt as stop:
        _stopped(stop)
    except Exception as error:
        if (stop := signals.stop_behind(error)) is not None:
            _stopped(stop)
        if debug:
            traceback.print_exc()
            sys.exit(1)
        if isinstance(error, UserError):
            sys.exit(f"error: {error}")
        if options.explains(error):
            sys.exit(f"error: {options.explain(error)}")
        if isinstance(error, OSError) and error.filename is not None:  # the file system's, not the program's fault
            sys.exit(f"error: {os.fsdecode(error.filename)}: {error.strerror}; look at this path, then repeat the command")
        where = traceback.extract_tb(error.__traceback__)[-1]
        if "submitit" in where.filename:
            sys.exit(f"error: the launcher cannot start the jobs: {error}")
        sys.exit(
            f"error: unexpected {type(error).__name__} at {os.path.basename(where.filename)}:{where.lineno}: {error}; "
            "this looks like a defect of the program, repeat the command with debug=true for the full trace"
        )


def _stopped(stop: KeyboardInterrupt) -> NoReturn:
    signals.ignore()
    status = signals.exit_status(stop)
    print(signals.farewell(status), file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    cli()
