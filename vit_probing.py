"""The program from Python: the same entries, records and run directories as on the command line.

    import vit_probing as vp
    run = vp.run("mode=train", "dataset=folder", "dataset.root=mine")       the command, as a call
    result = vp.probe(module, images, identity_maps, patch_size=16, …)      any torch module or function of patch tokens
    result.table, result.curve(), result.image_scores, result.form(layer=7)

It works in a clone and in a notebook: nothing of Hydra, of signals or of the working directory is left changed, a mistake
raises `UserError`, and calls of several threads wait for each other. docs/python.md shows more.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from torch import Tensor

import activation
import main
import options
from activation import SPLITS, PatchSample, open_samples
from backbones import module as modules
from backbones.load import backbone_facts
from backbones.statement import Statement
from datasets import in_memory
from errors import UserError
from files import plain
from pairs.finished import TrainedProbe, curve_of, image_scores_of, open_trained, rows_of, table_of
from pairs.monitor import Monitor
from pairs.pair_form import PairForm
from probes import PROBES
from runs.finished import read_config, read_facts
from runs.records import read_records

__all__ = [
    "IMAGENET", "Monitor", "Result", "TrainedProbe", "UserError", "compose", "load_run", "made_by",
    "open_activations", "probe", "run",
]  # fmt: skip
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # the normalisation most models are trained with
MODES = {"pairwise": "train", "class_linear": "train_class", "identity_linear": "train_identity"}
_one_at_a_time = threading.RLock()  # Hydra keeps one configuration per process


class Result:
    """A finished run, read from its directory.

    Attributes:
        dir: the run directory. objective: the headline score on validation, of a run of this process.
    """

    def __init__(self, directory: str | Path, objective: float | None = None) -> None:
        self.dir, self.objective = Path(directory), objective
        self.config = read_config(self.dir)

    def __repr__(self) -> str:
        return f"Result({str(self.dir)!r}, {read_facts(self.dir).get('status', 'unfinished')})"

    @property
    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds: a record per layer, seed and subset."""
        return read_records(self.dir / "metrics.jsonl")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What layers.csv holds: a row per probe or control, layer, subset and metric, with "value", "low" and "high"."""
        return rows_of(self.dir)

    @property
    def table(self) -> str:
        """The text the run ended with: layers, controls, gains, with 95 % intervals over images; `print` it."""
        return table_of(self.dir)

    def curve(self) -> Any:
        """The layer curve, a new matplotlib figure."""
        return curve_of(self.dir)

    @property
    def image_scores(self) -> list[dict[str, Any]]:
        """What scores.csv holds: AUROC and influence of every scored image, by layer and subset."""
        return image_scores_of(self.dir)

    @cached_property
    def trained(self) -> TrainedProbe:
        """The probe, to be asked about further tokens; it knows what it is valid for."""
        return open_trained(self.dir)

    def form(self, layer: int | str, pairs: str = "all") -> PairForm:
        """The formula of the probe at a layer; `pairs`: of the fit on "all" pairs or on those of the "foreground"."""
        return self.trained.form(layer, pairs)


def run(*overrides: str) -> Result:
    """What `python main.py overrides…` does, in this process.

    Raises:
        UserError: a mistake in overrides, data or weights, in one sentence.
    """
    with _job(overrides) as cfg:
        directory, found = main.carry_out(cfg)
    return Result(directory, found.get("objective"))


def probe(
    module: Callable[[Tensor], Any],
    images: Sequence[Any],
    identity_maps: Sequence[Any] | None = None,
    *overrides: str,
    probe: str = "quadratic",
    class_maps: Sequence[Any] | None = None,
    class_names: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    random: Callable[[Tensor], Any] | None = None,
    **stated: Any,
) -> Result:
    """Fit and score a probe of a model of your own on images in memory, with controls and intervals.

    Args:
        module: normalised images [B, 3, H, W] float32 -> patch tokens [B, N, D], a map [B, D, h, w], or a list of these, one
            per layer. It is asked in evaluation mode, without gradients, and left as it was.
        images: M images [H, W, 3] uint8; identity_maps, class_maps: M maps [H, W], see `datasets.in_memory.collect`.
        overrides: further options, as on the command line.
        probe: a name of `probes.PROBES`.
        splits: "train", "val", "test" of every image; None: drawn with a fixed seed.
        random: the same architecture with random weights, for that control.
        stated: patch_size, image_size, prefix_tokens, class_token, mean, std (`backbones.statement.Statement`).

    Raises:
        UserError: the tokens are not those of the patches, or what was handed over does not fit together.
    """
    if unknown := sorted(stated.keys() - set(Statement._fields)):
        raise UserError(f"unknown argument {unknown[0]}; what can be stated of a module is {', '.join(Statement._fields)}")
    if probe not in PROBES:
        raise UserError(f"unknown probe '{probe}'; valid: {', '.join(PROBES)}")
    with _one_at_a_time:
        name = modules.hand_over(module, Statement(**stated), random)
        handle = in_memory.hand_over(in_memory.collect(images, identity_maps, class_maps, class_names, splits))
        mode = MODES.get(probe) or MODES[PROBES[probe].arity]
        chosen = [f"mode={mode}", "model=module", f"model.name='{name}'", "dataset=in_memory", f"dataset.handle='{handle}'"]
        return run(*chosen, f"probe.mode={probe}", "wandb.mode=disabled", *overrides)


def load_run(path: str | Path) -> Result:
    """A finished run, by its directory.

    Raises:
        UserError: it is no run directory, or a file in it is damaged.
    """
    return Result(path)


def open_activations(*overrides: str, splits: Sequence[str] = SPLITS) -> dict[str, PatchSample]:
    """Tokens and labels of each split, as every mode reads them; what is not in the cache is extracted first."""
    with _job(overrides) as cfg:
        options.check(cfg)
        return open_samples(cfg, print, splits)


def made_by(tokens: PatchSample | Callable[[Tensor], Any], *overrides: str, **stated: Any) -> dict[str, Any]:
    """What tokens are made with, for `TrainedProbe.scores`: those of a split, or those a module gives.

    Args:
        overrides: the protocol of the windows, of a module. stated: of a module, as for `probe`.
    """
    if isinstance(tokens, PatchSample):
        return activation.made_by(tokens.meta)
    name = modules.hand_over(tokens, Statement(**stated))
    with _job(["model=module", f"model.name='{name}'", *overrides]) as cfg:
        meta = {"facts": backbone_facts(cfg.model).as_dict(), "norm": bool(cfg.model.norm)}
        return activation.made_by(meta | {"output_mode": cfg.model.output_mode, "geometry": plain(cfg.protocol.geometry)})


def compose(*overrides: str) -> DictConfig:
    """The checked configuration that overrides lead to."""
    with _job(overrides) as cfg:
        options.check(cfg)
        options.name_protocol(cfg)
        return cfg


@contextlib.contextmanager
def _job(overrides: Sequence[str]) -> Iterator[DictConfig]:
    """The composed configuration in the surroundings of a Hydra job; all of them are put back afterwards."""
    with _one_at_a_time:
        before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg, sys.argv, torch.get_num_threads()
        sys.argv = ["main.py", *overrides]  # what run.json names as the command, and messages read
        try:
            with initialize_config_dir(str(options.CONFIGS), version_base="1.3"):
                cfg = hydra_compose("config", list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            with torch.random.fork_rng(devices=[]):
                yield cfg
        except Exception as error:
            if options.explains(error):
                raise UserError(options.explain(error)) from error
            raise
        finally:
            GlobalHydra.instance().hydra, HydraConfig.instance().cfg, sys.argv, n_threads = before
            torch.set_num_threads(n_threads)
