"""The W&B mirror of a run, offline by default; the run's JSON records are the truth.

A run sends its losses epoch by epoch while it fits, and at its end the layer curve with intervals, the figures, the tables
and its small files as an artifact. Nothing that fails here costs a result: it is said once, then the mirror is silent.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from runs.records import read_records

WANDB_MODES = ("online", "offline", "disabled")
FILES = ("config.yaml", "run.json", "metrics.jsonl", "history.jsonl", "layers.csv", "table.txt", "log.txt")  # of the artifact
ENDS = (("value", ""), ("low", " low"), ("high", " high"))
LOSSES = ("train_loss", "val_loss")


class Mirror:
    """A run on W&B, begun at its first new record.

    Args:
        cfg: sections `wandb` and `mode`; the whole is sent as the configuration.
        say: hears once why there is no mirror.
        identity: id of the W&B run, so that a run that is taken up again stays one run; None: a new one.
    """

    def __init__(self, cfg: DictConfig, directory: Path, say: Callable[[str], None], identity: str | None) -> None:
        self.cfg, self.directory, self.say, self.identity = cfg, directory, say, identity
        self.begun = cfg.wandb.mode == "disabled"  # or there is nothing to begin
        self.run: Any = None

    def begin(self) -> None:
        """Open the W&B run, once."""
        if self.begun:
            return
        self.begun = True
        cfg, group = self.cfg, self.cfg.wandb.group
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DATA_DIR", str(self.directory.resolve()))  # else artifacts are staged in the home folder
        if group is None and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            group = Path(HydraConfig.get().sweep.dir).name
        try:
            import wandb

            self.run = wandb.init(
                mode=cfg.wandb.mode, project=cfg.wandb.project, entity=cfg.wandb.entity, group=group, job_type=cfg.mode,
                name=self.directory.name, tags=list(cfg.wandb.tags), dir=self.directory, reinit="finish_previous",
                id=self.identity, resume="allow" if self.identity else None,
                config=OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True),
                settings=wandb.Settings(console="off", x_disable_stats=True, x_disable_meta=True),
            )  # fmt: skip
            self.identity = getattr(self.run, "id", None)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        self.say(f"note: W&B is not mirrored ({type(error).__name__}: {error}); the run's own files are complete")

    def _send(self, send: Callable[[Any], None]) -> None:
        """Do something with the W&B run, if there is one."""
        if self.run is not None:
            try:
                send(self.run)
            except Exception as error:
                self._give_up(error)

    def log(self, values: Mapping[str, Any]) -> None:
        """One row of numbers."""
        self._send(lambda run: run.log(dict(values)))

    def epoch(self, record: Mapping[str, Any]) -> None:
        """The losses of an epoch of a stack, means over its fits and layers: `loss/<name>/train` and `…/val` by epoch."""
        series = {name: f"loss/{record['name']}/{name.removesuffix('_loss')}" for name in LOSSES}
        if record["epoch"] == 1:
            self._send(lambda run: [run.define_metric(name, step_metric="epoch") for name in ("epoch", *series.values())])
        means = {series[name]: _mean(record[name]) for name in LOSSES}
        self.log({"epoch": record["epoch"], **{name: mean for name, mean in means.items() if mean is not None}})

    def curve(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[Sequence[str]]) -> None:
        """The columns of the table by layer, with both ends of their intervals: a row per probe or control and layer."""
        titles = {tuple(column[:4]): column[4] for column in columns}
        steps: dict[tuple[str, int], dict[str, float]] = {}
        for row in rows:
            title = titles.get((row["question"], row["readout"], row["subset"], row["metric"]))
            if title is not None:
                ends = {f"{title}/{row['name']}{end}": row[key] for key, end in ENDS}
                steps.setdefault((row["name"], row["layer_index"]), {}).update(ends)
        self._send(lambda run: run.define_metric("layer_index"))
        for series in dict.fromkeys(series for step in steps.values() for series in step):
            self._send(lambda run, series=series: run.define_metric(series, step_metric="layer_index"))
        for (_, index), values in steps.items():
            self.log({"layer_index": index, **values})
        if rows:
            self._send(lambda run: run.log({"layers": _table(rows)}))

    def finish(self, complete: bool) -> str | None:
        """Send the figures and files of a complete run, close; the line that says how to send an offline run."""
        if self.run is None:
            return None
        if complete:
            self._send(self._send_files)
        copies = sorted((self.directory / "wandb").glob("offline-run-*"))
        self._send(lambda run: run.finish(exit_code=0 if complete else 1))
        self.run = None
        offline = copies and self.cfg.wandb.mode == "offline"
        return f"W&B: offline copy, to send it: wandb sync {copies[-1]}" if offline else None

    def _send_files(self, run: Any) -> None:
        import wandb

        history = self.directory / "history.jsonl"  # of modes that fit something
        records = read_records(history, self.say) if history.exists() else []
        losses = [row for record in records for row in _losses(record)]
        if losses:
            run.log({"losses": wandb.Table(columns=["name", "variant", "seed", "layer", "epoch", *LOSSES], data=losses)})
        figures = sorted(self.directory.glob("*.png"))
        if figures:
            run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})
        artifact = wandb.Artifact(f"run-{self.identity or self.directory.name}"[:128], type="run")
        for path in (self.directory / name for name in FILES):
            if path.is_file():
                artifact.add_file(str(path), name=path.name)
        run.log_artifact(artifact)


def _losses(record: Mapping[str, Any]) -> list[list[Any]]:
    """The losses of an epoch, a row per fit and layer; none of records of another kind."""
    if record.get("kind") != "epoch" or "fits" not in record:
        return []
    layers = re.findall(r"[\w-]+", record["layer"])
    return [
        [record["name"], str(variant), seed, layer, record["epoch"], *(record[name][s][i] for name in LOSSES)]
        for s, (variant, seed) in enumerate(record["fits"])
        for i, layer in enumerate(layers)
    ]


def _mean(losses: Sequence[Sequence[float | None]]) -> float | None:
    """Mean over fits and layers [S][L] of what is defined."""
    known = [value for row in losses for value in row if value is not None]
    return sum(known) / len(known) if known else None


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """layers.csv as a W&B table."""
    import wandb

    columns = list(rows[0])
    data = [[str(row[name]) if name == "layer" else row[name] for name in columns] for row in rows]
    return wandb.Table(columns=columns, data=data)
