"""One optimiser step of NeCo, and everything a stopped run needs to take the next one.

A step knows its number and draws nothing from a generator that lives longer than it: order of images, crops, references and
stochastic depth follow from (seed, step), so a run that is continued from any saved state ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.contract import BackboneFacts
from backbones.load import load_backbone
from backbones.speed import compile_blocks
from dense.foreground import attention_foreground
from errors import UserError
from machine import resolve_dtype
from neco.crops import CropBatch
from neco.patch_ordering import (
    Pairs,
    World,
    align_pairs,
    mask_pairs,
    ordering_loss,
    references_of_batch,
)
from neco.recipe import Recipe
from neco.student_teacher import (
    PatchEncoder,
    ProjectionHead,
    ReferenceQueue,
    cosine,
    encode,
    freeze_but,
    move_average,
    parameter_groups,
    set_schedule,
    trained_blocks,
)


class Step(NamedTuple):
    """What a step came to: loss and that of each pair [pairs] in nats, norm of all gradients, learning rates, momentum."""

    loss: float
    by_pair: Tensor
    gradient_norm: float
    lr_backbone: float
    lr_head: float
    weight_decay: float
    momentum: float


def load_vit(model_cfg: Mapping[str, Any], registers: str, say: Callable[[str], None]) -> nn.Module:
    """The ViT of a configuration with its weights, float32, on the CPU, without its registers where they are dropped.

    Raises:
        UserError: as `load_backbone`; there are no registers to drop.
    """
    plain = {**model_cfg, "dtype": "float32", "compile": False, "attention": "sdpa"}
    backbone = load_backbone(plain, "cpu", say)
    if not hasattr(backbone, "model"):
        raise UserError(f"{backbone.facts.name} has nothing to train, choose a ViT")
    vit = backbone.model
    return drop_registers(vit) if registers == "drop" else vit


def drop_registers(vit: nn.Module) -> nn.Module:
    """Turn timm's ViT with registers into its twin without, in place: other tokens keep their weights and positions.

    timm adds the class token's position to the token itself where there are registers; the twin gets a position of 0 for it.
    """
    if getattr(vit, "reg_token", None) is None or not getattr(vit, "no_embed_class", False):
        raise UserError("neco.registers=drop and this model has no register tokens, set neco.registers=keep")
    position = vit.pos_embed.detach()
    vit.pos_embed = nn.Parameter(torch.cat([torch.zeros_like(position[:, :1]), position], dim=1), requires_grad=False)
    vit.num_prefix_tokens -= vit.num_reg_tokens
    vit.reg_token, vit.num_reg_tokens, vit.no_embed_class = None, 0, False
    return vit


def with_drop_path(vit: nn.Module, rate: float) -> nn.Module:
    """Give the blocks stochastic depth, per image, rising evenly from 0 to `rate`; in place."""
    depth = len(vit.blocks)
    for index, block in enumerate(vit.blocks):
        share = rate * index / max(1, depth - 1)
        if share and not hasattr(block, "drop_path1"):
            raise UserError(f"neco.drop_path={rate}: this architecture has no stochastic depth, set neco.drop_path=0")
        if share:
            block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)
    return vit


class Training:
    """Student, teacher, queue and optimiser, and how far they are.

    Attributes:
        student, teacher: `PatchEncoder`s; without a teacher (`use_teacher: false`) the second is None.
        done: optimiser steps taken; total: of all epochs.
    """

    def __init__(
        self,
        vit: nn.Module,
        facts: BackboneFacts,
        recipe: Recipe,
        *,
        total: int,
        device: torch.device,
        world: World | None = None,
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        self.recipe, self.facts, self.device, self.seed, self.total, self.done = recipe, facts, device, seed, total, 0
        self.world = world or World()
        heads = []
        for number in (0, 0) if recipe.same_heads else (0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed * 2 + number)
                heads.append(ProjectionHead(facts.dim, recipe.head_hidden, recipe.head_out, recipe.head_layers))
        learning = with_drop_path(copy.deepcopy(vit), recipe.drop_path)
        freeze_but(learning, trained_blocks(recipe.trainable_blocks, facts.depth))
        self.student = PatchEncoder(learning, heads[0]).to(device).train()
        self.teacher = PatchEncoder(vit, heads[1]).requires_grad_(False).to(device).eval() if recipe.use_teacher else None
        if recipe.checkpoint_activations:
            learning.set_grad_checkpointing(True)
        if compiled:
            for encoder in filter(None, (self.student, self.teacher)):
                compile_blocks(encoder.vit)
        self.queue = None
        if recipe.reference_from == "queue":
            self.queue = ReferenceQueue(recipe.crops.numbers[0], recipe.queue_length, recipe.head_out).to(device)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.student, recipe.lr_backbone, recipe.lr_head))
        self.learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        dtype = resolve_dtype(recipe.dtype, device)
        self.products = lambda: (
            torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
        )

    # ------------------------------------------------------------------------------------------------ a step

    def step(self, parts: Sequence[CropBatch]) -> Step:
        """Take one optimiser step over the parts of a batch.

        Raises:
            UserError: the loss is not finite.
        """
        recipe, number = self.recipe, self.done
        set_schedule(self.optimizer, number, self.total, recipe.final_lr, recipe.weight_decay)
        loss, by_pair = 0.0, 0.0
        for index, part in enumerate(parts):
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) * 1009 + index)
            torch.manual_seed(((self.seed * 1_000_003 + number) * 1009 + index) * 4099 + self.world.rank)  # stochastic depth
            one, pairs = self._loss(_to(part, self.device), generator)
            (one / len(parts)).backward()
            loss, by_pair = loss + one.detach() / len(parts), by_pair + pairs.detach() / len(parts)
        value = float(self.world.mean(loss))
        if not math.isfinite(value):
            raise UserError(
                f"the loss of step {number} is not finite ({value}), nothing of this step is kept; lower neco.lr_backbone and "
                "neco.lr_head, or set neco.clip"
            )
        momentum = cosine(number, self.total, *recipe.momentum)
        norm = self._average_gradients()
        if value != 0:  # no cell was inside any mask; the reference program skips such a step too
            if self.teacher is not None:
                move_average(self.teacher, self.student, momentum)  # before the student moves, as in the reference program
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        decay = cosine(number, self.total, *recipe.weight_decay)
        lrs = [cosine(number, self.total, peak, recipe.final_lr) for peak in (recipe.lr_backbone, recipe.lr_head)]
        return Step(value, self.world.mean(by_pair).cpu(), norm, *lrs, decay, momentum)

    def _loss(self, batch: CropBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        recipe, options = self.recipe, self.recipe.ordering
        n_global, patch = recipe.crops.numbers[0], self.facts.patch_size
        with self.products():
            maps = encode(self.student, batch.crops)
            if self.teacher is not None:
                with torch.no_grad():
                    targets = encode(self.teacher, batch.crops[:n_global])
            else:
                targets = [m.detach() for m in maps[:n_global]]
            masks = self._masks(batch.crops[:n_global]) if recipe.loss_mask != "all" else None
        pairs = align_pairs(maps, targets, *batch.overlaps, patch, options)
        inside = None
        if masks is not None:
            inside = mask_pairs(masks, batch.overlaps.in_global, pairs.names, patch, recipe.grid)
        sources = targets if recipe.reference_by == "teacher" else [m.detach().float() for m in maps[:n_global]]
        references = self._references(pairs, sources, masks, inside, generator)
        shuffled = None
        if recipe.shuffle_references:
            shuffled = references[:, :, torch.randperm(references.shape[2], generator=generator).to(references.device)]
        return ordering_loss(pairs, references, options, inside, self.world, shuffled)

    def _masks(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Patches [B, h, w] that count, of each global crop, by the attention of the target's network."""
        network = self.student if self.teacher is None else self.teacher
        share = self.recipe.mask_threshold
        masks = [attention_foreground(network.class_attention(crop).cpu(), share).to(crop.device) for crop in crops]
        return [~mask for mask in masks] if self.recipe.loss_mask == "bg" else masks

    def _references(
        self,
        pairs: Pairs,
        maps: Sequence[Tensor],
        masks: list[Tensor] | None,
        inside: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Reference patches [pairs, B, N, D], drawn from the joint batch of all processes or from the queue."""
        world, recipe = self.world, self.recipe
        if self.queue is None:
            sources = pairs.targets if recipe.reference_by == "teacher" else pairs.cells
            drawn = []
            for index, source in enumerate(sources):
                usable = None if inside is None else world.gather(inside[index].to(torch.uint8)).bool()
                drawn.append(world.part(references_of_batch(world.gather(source), usable, generator)))
            return torch.stack(drawn)
        for crop in recipe.assign:
            tokens = world.gather(maps[crop].flatten(2).mT.contiguous())  # [B of all ranks, N, D]
            pool = tokens.flatten(0, 1)
            if masks is not None:
                usable = world.gather(masks[crop].to(torch.uint8)).bool().flatten()
                pool = pool[usable] if usable.any() else pool
            # Published: 10 patches per image and step, at most the queue.
            chosen = torch.randperm(len(pool), generator=generator)[: min(10 * len(tokens), recipe.queue_length)]
            self.queue.push(crop, pool[chosen.to(pool.device)])
        batch, n = pairs.cells.shape[1:3]
        drawn = [self.queue.draw(i, batch * world.size * n, generator).view(batch * world.size, n, -1) for i, _ in pairs.names]
        return torch.stack([world.part(patches) for patches in drawn])

    def _average_gradients(self) -> float:
        """Mean of the gradients over processes, then clipping; returns their norm before it."""
        for p in self.learning:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.learning]
        if self.world.size > 1:
            flat = torch._utils._flatten_dense_tensors(gradients)
            dist.all_reduce(flat)
            flat /= self.world.size
            for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(mean)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.learning, self.recipe.clip, norm)
        return float(norm)

    # ------------------------------------------------------------------------------------------------ what is saved

    def tensors(self) -> dict[str, Tensor]:
        """Everything the next step depends on, beside the configuration and `done`."""
        found = {f"student.{key}": value for key, value in self.student.state_dict().items()}
        if self.teacher is not None:
            found |= {f"teacher.{key}": value for key, value in self.teacher.state_dict().items()}
        if self.queue is not None:
            found |= {f"queue.{key}": value for key, value in self.queue.state_dict().items()}
        for number, p in enumerate(self.learning):
            for key, value in self.optimizer.state.get(p, {}).items():
                found[f"optimizer.{number}.{key}"] = value
        return found

    def load(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Put back what `tensors` gave after `done` steps."""
        parts: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "queue": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.student.load_state_dict(parts["student"])
        if self.teacher is not None:
            self.teacher.load_state_dict(parts["teacher"])
        if self.queue is not None:
            self.queue.load_state_dict(parts["queue"])
        for name, value in parts["optimizer"].items():
            number, _, key = name.partition(".")
            p = self.learning[int(number)]
            self.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
        self.done = done

    def networks(self) -> dict[str, PatchEncoder]:
        """The networks by role."""
        return {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})

    @property
    def result(self) -> PatchEncoder:
        """The network that is evaluated: the teacher, or the student where there is none."""
        return self.student if self.teacher is None else self.teacher


def _to(batch: CropBatch, device: torch.device) -> CropBatch:
    move = lambda x: x.to(device, non_blocking=True)
    return CropBatch([move(crop) for crop in batch.crops], type(batch.overlaps)(*(move(boxes) for boxes in batch.overlaps)))
