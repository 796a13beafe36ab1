"""mode=neco: post-train a ViT by patch ordering, keep what it becomes, and measure it before and after.

The run directory holds, beside what every run writes:
student.safetensors, teacher.safetensors: the networks after the last step, with recipe, origin and digest;
checkpoints/state.safetensors: everything the next step needs, from which a stopped run goes on;
checkpoints/best and epoch-0005 …: the networks that were best on validation, and every nth;
history.jsonl: a record per step; metrics.jsonl: scores on validation, and before and after on test;
training.png, scores.png, nearest_patches.png, sorted_references.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from backbones.load import backbone_facts
from datasets.scene import build
from errors import UserError
from files import digest, plain, write_atomically
from machine import choose_device, rank, set_threads
from metrics.bootstrap import Estimate
from neco import figures
from neco.crops import CropBatch
from neco.evaluation import Scored, compare, evaluate, open_scored, read_tokens, rows_as_cells, values
from neco.images import load_batches, open_images, plan_batches
from neco.patch_ordering import World
from neco.recipe import Recipe, read_recipe
from neco.student_teacher import PatchEncoder, ProjectionHead
from neco.training import Step, Training, load_vit
from runs.progress import count, stage, stages
from runs.provenance import provenance
from runs.records import read_records
from runs.run import Run
from runs.signals import stop_later
from runs.states import load_state, save_state
from show.style import png_bytes
from show.text import format_table


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Train, save, evaluate; under torchrun every process takes its part of each batch.

    Returns:
        {"objective": the best validation score, None without evaluation}.

    Raises:
        UserError: options, data or weights that do not fit together; a loss that is not finite; a full disk.
    """
    number, processes = rank()
    device = choose_device(cfg.device)
    set_threads(cfg.threads)
    facts = backbone_facts(cfg.model)
    recipe = read_recipe(cfg.neco).check(facts, processes)
    source, numbers = open_images(cfg.dataset, recipe.images, recipe.batch_images)
    made_from = {
        "recipe": plain(dataclasses.asdict(dataclasses.replace(recipe, images=_what(recipe)))),
        "weights": facts.weights,
        "images": {"count": len(numbers), "fingerprint": digest(plain({"source": source.fingerprint()}))},
        "seed": int(cfg.seed),
    }
    say = run.say if not number else lambda text: None
    if not number:
        run.rest_on(made_from)
    with _joined(number, processes, device) as world:
        steps = len(numbers) // recipe.batch_images
        vit = load_vit(cfg.model, recipe.registers, say)
        training = Training(
            vit, facts, recipe, total=steps * recipe.epochs, device=device, world=world, seed=int(cfg.seed),
            compiled=bool(cfg.model.compile),
        )  # fmt: skip
        session = _Session(cfg, run, training, made_from, steps, say)
        session.restore()
        places = plan_batches(numbers, recipe, world, int(cfg.seed), training.done)
        session.train(_grouped(load_batches(source, places, recipe, facts, int(cfg.seed)), recipe.accumulate))
        return session.finish() if not number else {"objective": None}


def _what(recipe: Recipe) -> Any:
    """The image options without how many processes read them, which changes no number."""
    return dataclasses.replace(recipe.images, workers=0)


@contextlib.contextmanager
def _joined(number: int, processes: int, device: torch.device) -> Iterator[World]:
    """The processes of a launch, joined for as long as they train."""
    if processes == 1:
        yield World()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(number, processes)
    finally:
        dist.destroy_process_group()


def _grouped(batches: Iterable[CropBatch], size: int) -> Iterator[list[CropBatch]]:
    """The parts of one optimiser step together."""
    group: list[CropBatch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


class _Session:
    """A training with its files, records and evaluations."""

    def __init__(
        self, cfg: DictConfig, run: Run, training: Training, made_from: Mapping[str, Any], steps: int, say: Any
    ) -> None:
        self.cfg, self.run, self.training, self.made_from, self.steps, self.say = cfg, run, training, made_from, steps, say
        self.recipe, self.facts = training.recipe, training.facts
        self.leads = training.world.rank == 0
        self.dir = run.dir if self.leads else run.dir.parent
        self.state_file = self.dir / "checkpoints" / "state.safetensors"
        self.rows: list[dict[str, Any]] = []  # an evaluation each: step, epoch, scores
        self.splits: dict[str, Scored] = {}
        self.saved_at = time.monotonic()

    # ------------------------------------------------------------------------------------------------ states

    def restore(self) -> None:
        """Go on from the saved state, if there is one.

        Raises:
            UserError: it is damaged, or of another recipe.
        """
        if not self.state_file.exists():
            return
        state = load_state(self.state_file, self.made_from)
        self.training.load(state.tensors, state.recipe["done"])
        self.rows = state.recipe["rows"]
        self.say(f"going on at step {self.training.done} of {self.training.total} ({self.state_file})")

    def save(self) -> None:
        """Write the state and the networks as they are."""
        self.saved_at = time.monotonic()
        if self.leads:
            tensors = self.training.tensors()
            save_state(self.state_file, tensors, {**self.made_from, "done": self.training.done, "rows": self.rows})

    def save_networks(self, folder: Path) -> None:
        """Write student and teacher, each with what it is and where it comes from."""
        if not self.leads:
            return
        facts, kwargs = self.facts, json.loads(self.facts.kwargs)
        if self.recipe.registers == "drop":
            kwargs |= {"reg_tokens": 0, "no_embed_class": False}
        origin = {key: value for key, value in provenance().items() if key not in ("cpu", "dirty")}
        for role, network in self.training.networks().items():
            description = {
                **self.made_from, "kind": "neco", "role": role, "step": self.training.done, "model": facts.name,
                "kwargs": kwargs, "scores": self.rows[-1]["scores"] if self.rows else {}, "provenance": origin,
            }  # fmt: skip
            save_state(folder / f"{role}.safetensors", bare(network), description)

    # ------------------------------------------------------------------------------------------------ training

    def train(self, steps: Iterable[list[CropBatch]]) -> None:
        """Take all steps; Ctrl-C ends it after the step at hand, with its state saved."""
        every, epochs = self.recipe.evaluate.every, self.recipe.epochs
        stages(("training", 8), ("before and after", 2))
        stage("training")
        if every and not self.rows:
            self.score(self.training.result)
        with count("patch ordering", self.training.total, "step", self.training.done) as bar, stop_later() as stopping:
            for parts in steps:
                step = self.training.step(parts)
                self.record(step)
                done = self.training.done
                bar.update(note=f"loss {step.loss:.3f}")
                if done % self.steps == 0:
                    epoch = done // self.steps
                    if every and (epoch % every == 0 or epoch == epochs):
                        self.score(self.training.result)
                    keep = self.recipe.keep_every
                    if keep and epoch % keep == 0:
                        self.save_networks(self.dir / "checkpoints" / f"epoch-{epoch:04d}")
                    self.save()
                elif stopping() or time.monotonic() - self.saved_at >= self.recipe.save_seconds:
                    self.save()
                if stopping():
                    break  # the state is saved; the end of the block says that a signal came
        self.save_networks(self.dir)

    def record(self, step: Step) -> None:
        """Keep what a step came to."""
        if not self.leads:
            return
        row = {key: value for key, value in step._asdict().items() if key != "by_pair"}
        done = self.training.done
        row |= {"kind": "neco_step", "name": str(done), "step": done, "by_pair": step.by_pair.tolist()}
        self.run.write(row, "history.jsonl")
        if self.run.mirror is not None:
            self.run.mirror.log({key: value for key, value in row.items() if isinstance(value, int | float)})

    # ------------------------------------------------------------------------------------------------ scores

    def split(self, name: str) -> Scored:
        """A split of the data set as it is scored, read once."""
        if name not in self.splits:
            options = self.recipe.evaluate
            size = options.size or self.facts.image_size[0]
            if size % self.facts.patch_size:
                raise UserError(
                    f"neco.evaluate.size={size} is no multiple of the patch size {self.facts.patch_size} of {self.facts.name}"
                )
            limit = {"train": options.memory_images, "val": options.val_images, "test": options.test_images}[name]
            self.splits[name] = open_scored(build(self.cfg.dataset, name), limit, size)
        return self.splits[name]

    def scores(self, encoder: PatchEncoder, split: str, last: bool) -> dict[str, Estimate]:
        """Scores of a network on a split."""
        return evaluate(
            encoder, self.split("train"), self.split(split), self.recipe.evaluate, facts=self.facts,
            device=self.training.device, products=self.training.products, last=last,
        )  # fmt: skip

    def score(self, encoder: PatchEncoder) -> None:
        """Score on validation, keep the networks if they are the best so far."""
        if self.leads:
            scores = values(self.scores(encoder, "val", last=False))
            name = next((name for name in scores if name.startswith(self.recipe.evaluate.select) and "miou" in name), None)
            if name is None:
                raise UserError(f"unknown neco.evaluate.select={self.recipe.evaluate.select}; valid: retrieval, overcluster")
            done = self.training.done
            row = {"step": done, "epoch": done // self.steps, "scores": scores, "selected": scores[name]}
            self.rows.append(row)
            self.run.write({"kind": "neco_scores", "name": str(row["step"]), "split": "val", **row})
            shown = ", ".join(f"{key} {100 * value:.1f} %" for key, value in scores.items() if key.endswith("miou"))
            self.say(f"epoch {row['epoch']}: validation {shown}")
            if self.run.mirror is not None:
                self.run.mirror.log({"step": done, **{f"val/{key}": value for key, value in scores.items()}})
            if row["step"] and self.best()["step"] == row["step"]:
                self.save_networks(self.dir / "checkpoints" / "best")
        if self.training.world.size > 1:
            dist.barrier()

    def best(self) -> dict[str, Any]:
        """The best evaluation after the first step; the earliest of equals."""
        return max((row for row in self.rows if row["step"]), key=lambda row: row["selected"])

    # ------------------------------------------------------------------------------------------------ the end

    def finish(self) -> dict[str, Any]:
        """Compare on the test split, draw, print."""
        stage("before and after")
        history = [row for row in read_records(self.run.dir / "history.jsonl") if row["kind"] == "neco_step"]
        history = list({row["step"]: row for row in history}.values())
        write_atomically(self.run.dir / "training.png", png_bytes(figures.draw_training(history)))
        if self.rows:
            write_atomically(self.run.dir / "scores.png", png_bytes(figures.draw_scores(self.rows)))
        if self.recipe.evaluate.final:
            self.before_and_after()
        role = "student" if self.training.teacher is None else "teacher"
        weights = self.dir / f"{role}.safetensors"
        self.say(f"\nweights: {weights}\nmeasure: python main.py mode=train model.weights={weights} model.digest=null")
        return {"objective": self.best()["selected"] if any(row["step"] for row in self.rows) else None}

    def before_and_after(self) -> None:
        """Score the network before and the chosen one after on the test split; the table, the records, the panels."""
        role = "student" if self.training.teacher is None else "teacher"
        device = self.training.device
        after = self.training.result
        place = f"after the last step ({self.training.done})"
        if any(row["step"] for row in self.rows):  # chosen on validation, never on what is shown here
            state = load_state(self.dir / "checkpoints" / "best" / f"{role}.safetensors")
            after.load_state_dict({**after.state_dict(), **with_prefix(state.tensors)})
            place = f"best on validation, after step {state.recipe['step']}"
        head = ProjectionHead(self.facts.dim, 1, 1, 1)  # tokens are read before the head
        before = PatchEncoder(load_vit(self.cfg.model, self.recipe.registers, lambda text: None), head).to(device)
        pair = [self.scores(network, "test", last=True) for network in (before, after)]
        rows = compare(*pair, n_boot=int(self.cfg.trainer.n_boot), seed=int(self.cfg.seed))
        for row in rows:
            self.run.write({"kind": "neco_result", "name": row["metric"], "split": "test", "chosen": place, **row})
        if self.run.mirror is not None:
            ends = ("before", "after", "gain")
            self.run.mirror.log({f"test/{row['metric']}/{end}": row[end] for row in rows for end in ends})
        scored = self.split("test")
        self.say(f"\n{role}, {place}; {len(scored.images)} test images, %, [95 % over images]; gain paired over images\n")
        shown = [row for row in rows if row["metric"].endswith(("miou", "accuracy"))]
        self.say(format_table(["", "before", "after", "gain"], rows_as_cells(shown)))
        images = scored.images[:64]
        grids = [read_tokens(network, images, self.facts, device, self.training.products) for network in (before, after)]
        self.draw_panels(images, *(grid.read(torch.arange(len(images)))[0] for grid in grids))

    def draw_panels(self, images: Tensor, before: Tensor, after: Tensor) -> None:
        """Nearest patches and the order of references, for a few drawn queries, of images [M, 3, S, S] uint8."""
        shown, (m, h, w) = images.float() / 255, before.shape[:3]
        generator = torch.Generator().manual_seed(int(self.cfg.seed))
        draw = lambda n: [
            tuple(int(torch.randint(high, (1,), generator=generator)) for high in (m, h, w)) for _ in range(n)
        ]
        patch = self.facts.patch_size
        nearest = figures.draw_nearest(shown, before, after, draw(4), patch)
        write_atomically(self.run.dir / "nearest_patches.png", png_bytes(nearest))
        order = figures.draw_order(shown, before, after, draw(1)[0], draw(14), patch)
        write_atomically(self.run.dir / "sorted_references.png", png_bytes(order))


def bare(network: PatchEncoder) -> dict[str, Tensor]:
    """Weights under the names of published files: the backbone's own, and projection_head.*."""
    return {key.removeprefix("vit."): value for key, value in network.state_dict().items()}


def with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `bare`."""
    return {key if key.startswith("projection_head.") else f"vit.{key}": value for key, value in tensors.items()}
