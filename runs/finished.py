"""Looking at finished runs: which one, its facts, its configuration. Nothing that stands in their files is ever called."""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import UserError
from files import read_json, unreadable
from runs.records import jsonable

SECTIONS = ("model", "dataset", "protocol", "probe", "trainer", "cache")  # that every configuration has


def source_run(cfg: DictConfig) -> Path | None:
    """The run a mode looks at: `run`, or the newest finished one of the modes it `looks_at`; None for all other modes.

    Raises:
        UserError: it is no run directory, there is none, or the mode looks at none and one is named.
    """
    if not cfg.looks_at:
        if cfg.run is not None:
            raise UserError(f"mode={cfg.mode} looks at no finished run, got run={cfg.run}; leave run=… out")
        return None
    directory = newest_run(cfg.output_dir, cfg.looks_at) if cfg.run is None else Path(str(cfg.run))
    read_config(directory)
    return directory


def newest_run(output_dir: str | Path, modes: Iterable[str] = ("train",), report: Callable[[str], None] | None = None) -> Path:
    """The run directory that finished last among the given modes.

    Args:
        report: hears of run directories that are passed over because they are damaged; None: the error stream.

    Raises:
        UserError: there is none.
    """
    modes = list(modes)
    finished = []
    for mode in modes:
        for path in sorted(Path(output_dir).glob(f"{mode}/*/run.json")):
            try:
                if read_facts(path.parent).get("status") == "finished":
                    finished.append((path.stat().st_mtime, path.parent))
            except UserError as error:
                text = f"warning: {error}; this run is passed over"
                report(text) if report else print(text, file=sys.stderr)
    if not finished:
        raise UserError(
            f"no finished run of mode {' or '.join(modes)} under {output_dir}; run `python main.py mode={modes[0]}` first, "
            "or name a run directory with run=…"
        )
    return max(finished)[1]


def read_facts(directory: Path) -> dict[str, Any]:
    """What run.json says; empty without one.

    Raises:
        UserError: it is damaged.
    """
    path, remedy = Path(directory) / "run.json", "delete it: where the numbers come from is lost, the rest stays"
    try:
        facts = read_json(path, remedy)
    except FileNotFoundError:
        return {}
    kinds = {"identity": dict, "inputs": dict | None, "status": str}
    if wrong := [key for key, kind in kinds.items() if key in facts and not isinstance(facts[key], kind)]:
        raise UserError(f"{path} is damaged ({wrong[0]} is {facts[wrong[0]]!r}); {remedy}")
    return facts


def read_config(directory: str | Path) -> DictConfig:
    """The composed configuration of a run, as it stands in config.yaml.

    Raises:
        UserError: the folder is no run directory; config.yaml is unreadable, damaged or lacks a section.
    """
    path = Path(directory) / "config.yaml"
    remedy = "name another run with run=…, or repeat the command that made this one"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{directory} is not a run directory: it has no config.yaml; name a folder below outputs/ with run=…"
        ) from None
    except OSError as error:
        raise UserError(f"{unreadable(path, error)}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged (not UTF-8); {remedy}") from error
    try:
        cfg = _plain_yaml(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged ({reason}); {remedy}") from error
    for section in SECTIONS:
        if not isinstance(cfg.get(section), DictConfig):
            raise UserError(f"{path} is damaged (it has no section {section}); {remedy}")
    lacking = [key for key in ("mode", "seed") if key not in cfg]
    if lacking:
        raise UserError(f"{path} is damaged (it has no {lacking[0]}); {remedy}")
    for key in ("mode", "protocol.name"):
        if not isinstance(name := OmegaConf.select(cfg, key), str):
            raise UserError(f"{path} is damaged ({key} is {name!r}, expected a text); {remedy}")
    return cfg


def check_fit(file: Path, facts: Mapping[str, Any], directory: Path, name: str) -> None:
    """Refuse a checkpoint that is of another fit than its place says, or of another configuration than its run's.

    Args:
        file: the checkpoint, `<which>.<number>.safetensors`.
        facts: what stands in it; of a file of the version before nothing can be said.
        directory: of the run.
        name: of the fit.

    Raises:
        UserError: naming the entry that differs.
    """
    fit = facts.get("fit")
    if fit is None:
        return
    which, number, _ = file.name.split(".")
    if facts.get("which", which) != which:  # of an older version nothing is known
        raise UserError(
            f"{file} holds the {facts['which']} epoch, expected the {which} one; put the right file back or repeat the fit"
        )
    expected = f"{name}/{number}"
    if fit["name"] != expected:
        raise UserError(f"{file} holds the fit {fit['name']}, expected {expected}; put the right file back or repeat the fit")
    stored = jsonable(OmegaConf.to_container(read_config(directory)))
    if (key := _difference(fit["configuration"], stored)) is not None:
        raise UserError(
            f"{file} was fitted with another {key} than {Path(directory) / 'config.yaml'} says; one of the two files is "
            "damaged or of another run: put the right one back, or repeat the fit"
        )


def _difference(fitted: Any, stored: Any, prefix: str = "") -> str | None:
    """Dotted name of the first value that is not the same in what is stored now; None if all are."""
    if not isinstance(fitted, dict) or not isinstance(stored, dict):
        return None if fitted == stored else prefix or "configuration"
    found = (_difference(value, stored.get(key), f"{prefix}.{key}".strip(".")) for key, value in fitted.items())
    more = (f"{prefix}.{key}".strip(".") for key in stored if prefix and prefix != "cache" and key not in fitted)
    return next((key for key in (*found, *more) if key is not None), None)


def _plain_yaml(text: str) -> DictConfig:
    """YAML of plain values: a configuration as it is written has no interpolations (resolved when the run began) and no
    aliases, which a hostile file could nest until memory ends.
    """
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it holds a YAML alias")
    if "${" in text:
        raise ValueError("it holds an interpolation ${…}")
    cfg = OmegaConf.create(text)
    if not isinstance(cfg, DictConfig):
        raise ValueError("no YAML mapping")
    return cfg
