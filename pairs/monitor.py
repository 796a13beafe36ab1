"""A callback that scores a model while it trains: does it tell objects apart yet?

    monitor = Monitor(model, images, identity_maps, every=250, patch_size=8, mean=0.5, std=0.25)
    for step in range(steps):
        train_one_step()
        monitor(step)                  # {"step": 250, "all_auroc": 0.81, "foreground_auroc": 0.64, …} at some steps, else None

It asks a quadratic probe, fitted anew each time on half of the images and scored on the other half, and takes at most a share
of the time (`most`): a score that would take more is put off. Nothing of the training changes: the model is asked in
evaluation mode without gradients and put back, and no random number is drawn from the global generators.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

import trainer
from activation import PatchSample
from backbones import module as modules
from backbones.contract import Options
from backbones.statement import Statement
from controls import PROBE_ROW, Subject
from datasets.in_memory import Collection, InMemory, collect, hand_over
from errors import UserError
from files import plain
from metrics.bootstrap import interval, resample
from options import CONFIGS
from pairs.task import Pairwise
from runs.fit_state import build_optimizer
from store.chunks import WindowItems
from store.labelled import LabelledItems
from store.reading import ImageItems
from store.shards import StackedTokens

SHOWN = ("all", "foreground", "same_class_matched")


class Monitor:
    """Scores a training model every few steps; call it after each.

    Args:
        module: as of `vit_probing.probe`: normalised images [B, 3, H, W] -> patch tokens.
        images, identity_maps, class_maps: a few dozen images with their maps, half of them to fit on.
        every: steps between scores.
        most: largest share of the time between the first step and now that scores may take.
        probe, steps, patches: of the probe and its fit; patches per image.
        say: hears one line per score; None: nobody.
        stated: of the module (`backbones.statement.Statement`).

    Attributes:
        scores: what was found so far. spent: seconds that took, without the one before the first step.

    Raises:
        UserError: the tokens are not those of the patches, or images and maps do not fit together.
    """

    def __init__(
        self,
        module: Callable[[Tensor], Any],
        images: Sequence[Any],
        identity_maps: Sequence[Any],
        class_maps: Sequence[Any] | None = None,
        *,
        every: int = 100,
        most: float = 0.05,
        probe: str = "quadratic",
        steps: int = 60,
        patches: int = 32,
        say: Callable[[str], None] | None = print,
        **stated: Any,
    ) -> None:
        if every < 1 or not 0 < most <= 1:
            raise UserError(f"every={every}, most={most}: expected a number of steps and a share of the time")
        self.every, self.most, self.steps, self.say, self.call = every, most, steps, say, module
        name = modules.hand_over(module, Statement(**stated))
        options = Options.read({"source": "module", "name": name})
        self.facts, self.size = modules.ModuleBackbone.describe(options), modules.built(options).size
        settings = OmegaConf.load(CONFIGS / "config.yaml")
        self.protocol = plain(OmegaConf.load(CONFIGS / "protocol" / "clean.yaml").protocol)
        self.protocol["selection"]["patches"] = patches
        self.probe_cfg = OmegaConf.to_container(settings.probe) | {"mode": probe}
        fit = settings.trainer
        self.options = trainer.FitOptions(
            epochs=1, batch_images=min(8, len(images) // 2), optimizer=fit.optimizer, lr=float(fit.lr),
            lr_width=int(fit.lr_width),
            weight_decay=float(fit.weight_decay), schedule=fit.schedule, step_size=1, gamma=1.0, stack_gb=float(fit.stack_gb),
            checkpoint_seconds=60.0, seed=0, device=torch.device("cpu"), patience=None, averaging=None, beta2=float(fit.beta2),
            processes=1,
        )  # fmt: skip
        handle = hand_over(_halves(collect(images, identity_maps, class_maps, splits=_alternating(len(images)))))
        self._parts = {split: _Part(handle, split, self.protocol, self.facts) for split in ("train", "test")}
        self.task = Pairwise([0], ["all", "foreground"])
        self.scores: list[dict[str, Any]] = []
        self.spent, self._started, self._cost = 0.0, None, 0.0
        self._score(-1)
        self._cost = self.spent
        self.spent = 0.0

    @property
    def share(self) -> float:
        """Share of the time since the first step that scores took."""
        return self.spent / max(time.perf_counter() - self._started, 1e-9) if self._started is not None else 0.0

    def __call__(self, step: int) -> dict[str, Any] | None:
        """After a step: its score, if one is due and takes no more than its share of the time."""
        now = time.perf_counter()
        self._started = now if self._started is None else self._started
        if not self._due(step) or self.spent + self._cost > self.most * (now - self._started):
            return None
        return self._score(step)

    def _due(self, step: int) -> bool:
        """Whether `every` steps have passed since the last score; one that was put off is due until it is made."""
        return step - max(self.scores[-1]["step"], 0) >= self.every

    def _score(self, step: int) -> dict[str, Any]:
        """Fit and score now."""
        started = time.perf_counter()
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            samples = {split: part.sample(self._tokens(part)) for split, part in self._parts.items()}
            with torch.enable_grad():
                fitted = self._fit(samples["train"])
            subject = Subject(PROBE_ROW, "", self.probe_cfg, samples, self.task.seeds)
            result = trainer.evaluate(self.task, [fitted], subject, self.options, split="test")
        found: dict[str, Any] = {"step": step}
        for subset in result.subsets:
            estimate = subset.metrics["auroc"]  # [L]
            low, high = interval(estimate, resample(estimate.influence.shape[1], 200))
            best = int(estimate.value.nan_to_num(-1).argmax())
            found[f"{subset.subset}_auroc"], found[f"{subset.subset}_layer"] = float(estimate.value[best]), result.layers[best]
            found[f"{subset.subset}_half_width"] = float(high[best] - low[best]) / 2
        self.scores.append(found)
        self._cost = time.perf_counter() - started
        self.spent += self._cost
        if self.say is not None:
            numbers = ", ".join(f"{name} {found[f'{name}_auroc']:.3f} ± {found[f'{name}_half_width']:.3f}" for name in SHOWN)
            when = f"step {step}" if step >= 0 else "before the first step"
            self.say(f"{when}: same object AUROC {numbers} ({self.share:.1%} of the time)")
        return found

    def _tokens(self, part: "_Part") -> Tensor:
        """The kept tokens [L, M, T, D] of a part, on the CPU."""
        layers = []
        for windows in part.windows.split(64):
            found = modules.answer(self.call, windows, self.size)
            layers.append(torch.stack([x[:, self.size.prefix :].float().cpu() for x in found]))  # [L, b, N, D]
        tokens = torch.cat(layers, 1).flatten(1, 2)  # [L, W N, D]
        return tokens[:, part.rows]

    def _fit(self, sample: PatchSample) -> Any:
        """A probe of every layer, fitted for some steps."""
        fitted = self.task.build_probe(self.probe_cfg, sample, sample.tokens.layers)
        if fitted.needs_statistics:
            fitted.set_statistics(*trainer.token_statistics(sample, sample.tokens.layers, self.options.batch_images))
        options, rows = self.options, range(len(sample.tokens.layers))
        optimizer = build_optimizer(fitted, options.optimizer, options.lr, options.beta2, options.weight_decay)
        order = torch.Generator().manual_seed(0)
        batches = (b for _ in itertools.count() for b in self.task.batches(sample, self.options.batch_images, order))
        for number, batch in enumerate(itertools.islice(batches, self.steps)):
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate(number / self.steps, fitted.dim)
            optimizer.zero_grad(set_to_none=True)
            self.task.loss(fitted, batch.tokens(sample, rows, self.options.device), batch).sum().backward()
            optimizer.step()
        return fitted.eval()


class _Part:
    """Half of the images: windows [W, 3, H, W], which of their patches are kept, and the labels of these."""

    def __init__(self, handle: str, split: str, protocol: dict[str, Any], facts: Any) -> None:
        dataset = InMemory(split, handle=handle)
        labelled = LabelledItems(dataset, protocol, facts, whole_images=False)
        cut = WindowItems(
            ImageItems(dataset, {"dataset": handle, "fingerprint": handle, "split": split}, 0), protocol["geometry"], facts
        )
        columns: dict[str, list[Tensor]] = {}
        windows, rows, self.keys, grid = [], [], [], None
        for i in range(len(dataset)):
            item = labelled[i]
            if fault := item.get("fatal") or item.get("fault") or item.get("dropped"):
                raise UserError(f"image {i}: {fault if isinstance(fault, str) else fault[1]}")
            grid = torch.from_numpy(item["grids"]).long()
            position = torch.from_numpy(item["position"]).long()  # [T, 3]
            first = sum(map(len, windows))
            rows.append(((first + position[:, 0]) * int(grid[0]) + position[:, 1]) * int(grid[1]) + position[:, 2])
            windows.append(cut[i][0])
            self.keys.append(item["key"])
            for name, value in item.items():
                if name.startswith("label.") or name == "position":
                    columns.setdefault(name.removeprefix("label."), []).append(torch.from_numpy(value))
        self.windows, self.rows = torch.cat(windows), torch.stack(rows)  # [W, 3, H, W], [M, T]
        self.labels = {name: torch.stack(values) for name, values in columns.items()}
        self.position = self.labels.pop("position").long()
        self.labels |= {name: self.labels[name].long() for name in ("identity", "class")}
        self.grids = grid.expand(len(self.keys), 2)
        self.meta = {"classes": dataset.classes, "selected_by": "identity"}

    def sample(self, tokens: Tensor) -> PatchSample:
        """The activations at this moment."""
        stacked = StackedTokens.from_tensor(tokens, list(range(len(tokens))))
        return PatchSample(stacked, self.position, self.labels, {}, self.keys, self.grids, self.meta)


def _alternating(n_images: int) -> list[str]:
    """Every second image is fitted on; one stands for the split nobody asks for."""
    if n_images < 8:
        raise UserError(f"a monitor needs at least 8 images, half of them to fit on, got {n_images}")
    return ["train" if i % 2 else "test" for i in range(n_images - 1)] + ["val"]


def _halves(collection: Collection) -> Collection:
    """The image that was set aside is fitted on as well."""
    splits = dict(collection.splits)
    splits["train"], splits["val"] = splits["train"] + splits["val"], []
    return collection._replace(splits=splits)
