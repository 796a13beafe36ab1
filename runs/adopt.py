"""The stored configuration of a finished run, made fit for this release and for looking at the run again."""

import re
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from errors import UserError
from options import ALSO, CONFIGS, NAMES, NUMBER_OR_LIST, RENAMED, TEXTS, kind_of, leaves, named

# Options of data sets that name or start programs, and write: of a finished run's file they are not believed.
FROM_COMMAND_LINE = {"blender_path": None, "clevr_gen_dir": None, "use_cache_only": True}


def with_new_names(stored: DictConfig) -> DictConfig:
    """The configuration of a finished run with the keys of this release; changed in place."""
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        if name in (OmegaConf.select(stored, section) or {}):
            OmegaConf.update(stored, new, stored[section].pop(name), force_add=True)
    return stored


def complete(stored: DictConfig, path: Path) -> DictConfig:
    """The configuration of a finished run with the options added since then, at their defaults; changed in place.

    Raises:
        UserError: a section or an option that the run's mode had is missing or of another kind: the file is damaged.
    """
    before = set(stored)  # sections of the run; those added since are filled from their defaults as a whole
    protocol = f"protocol/{stored.protocol.name.partition(',')[0]}"  # without what was changed
    choices = {"config": "", "model/_defaults": "model.", protocol: ""}
    for name, prefix in (choices | {f"mode/{stored.mode}": ""}).items():
        file = CONFIGS / f"{name}.yaml"
        if not (re.fullmatch(r"[\w/-]+", name) and file.is_file()):
            continue  # a protocol or mode of the user's own
        for key, default in leaves(OmegaConf.to_container(OmegaConf.load(file)), prefix):
            section, _, option = key.rpartition(".")
            inside = OmegaConf.select(stored, section) if section else stored
            if not isinstance(inside, DictConfig) and (inside is not None or section.partition(".")[0] in before):
                raise UserError(f"{path} is damaged (it has no section {section}); name another run with run=…")
            if inside is None or option not in inside:  # added since then
                OmegaConf.update(stored, key, default, force_add=True)
            if key in TEXTS:  # or null
                default = "???" if OmegaConf.select(stored, key) is not None else None
            kind, fits = kind_of(default, least=0)
            value = OmegaConf.select(stored, key)
            if not (_is_special(key, value) or value in ALSO.get(key, ()) or fits(value)):
                raise UserError(f"{path} is damaged ({key} is {value!r}, expected {kind}); name another run with run=…")
    return stored


def _is_special(key: str, value: object) -> bool:
    """Whether a value is one of the options whose default does not say their kind."""
    if key in NAMES:
        return not isinstance(value, DictConfig)
    return key in NUMBER_OR_LIST and isinstance(value, ListConfig) and all(type(item) is int for item in value)


def adopt(fitted: DictConfig, cfg: DictConfig, directory: Path) -> DictConfig:
    """The configuration of a finished run, for looking at it again: what the command line names of the data is put in.

    A data set named takes the place of the run's own; single options of it (`dataset.noise=0.5`) are set on top.

    Args:
        fitted: configuration of the run; changed in place.
        cfg: the present one.
        directory: of the run, for the error.

    Raises:
        UserError: the command line names something that was settled when the run was fitted.
    """
    complete(with_new_names(fitted), directory / "config.yaml")
    if fitted.trainer.folds > 1:
        raise UserError(
            f"{directory} was fitted in {fitted.trainer.folds} folds and has no one probe to look at; its scores are there, "
            "fit one without trainer.folds"
        )
    for key, value in FROM_COMMAND_LINE.items():
        if key in fitted.dataset:
            fitted.dataset[key] = value
    for key in named():
        head, value = key.split(".")[0], OmegaConf.select(cfg, key)
        if head == "dataset" or key in ("trainer.batch_images", "trainer.n_boot"):
            OmegaConf.update(fitted, key, value, merge=False)
        elif head in ("model", "protocol", "probe", "trainer", "seed") and value != OmegaConf.select(fitted, key):
            raise UserError(
                f"{directory} was fitted with another {key} than the one named on the command line; leave {key} out, or fit "
                "a probe with it first"
            )
    fitted.cache = OmegaConf.merge(cfg.cache, {"dtype": fitted.cache.dtype})
    fitted.device, fitted.threads = cfg.device, cfg.threads
    return fitted
