"""The W&B mirror of a run, offline by default; the run's JSON records are the truth."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

WANDB_MODES = ("online", "offline", "disabled")


def open_mirror(cfg: DictConfig, directory: Path, say: Callable[[str], None]) -> Any:
    """A W&B run that mirrors this one; None when disabled or not to be had (said, never fatal)."""
    if cfg.wandb.mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    group = cfg.wandb.group
    if group is None and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        group = Path(HydraConfig.get().sweep.dir).name
    try:
        import wandb

        return wandb.init(
            mode=cfg.wandb.mode, project=cfg.wandb.project, entity=cfg.wandb.entity, group=group, job_type=cfg.mode,
            name=directory.name, tags=list(cfg.wandb.tags), dir=directory, reinit="finish_previous",
            config=OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True),
            settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
        )  # fmt: skip
    except Exception as error:  # the mirror must never cost a result
        say(f"note: W&B is not mirrored ({type(error).__name__}: {error}); the run's own files are complete")
        return None
