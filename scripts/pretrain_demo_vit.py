"""Pretrain the backbone that ships with the project, on generated scenes and without a single label.

    python scripts/pretrain_demo_vit.py                                        # one process
    torchrun --nproc-per-node=2 scripts/pretrain_demo_vit.py                   # two CPU processes share every batch
    python scripts/pretrain_demo_vit.py --batch-size 1024 --fresh 128 --workers 14     # the same program on a GPU
    python scripts/pretrain_demo_vit.py --evaluate                             # score the written file, add it to the JSON

Writes `weights/demo_vit.safetensors` (a plain timm VisionTransformer state dict, float16) and `weights/demo_vit.json`
(architecture, recipe, images seen, time, machine, digest, evaluation). An interrupted run goes on from its last saved state
and ends with the weights of an uninterrupted one: what is random at step k is drawn from (seed, rank, k), and the scenes at
hand at step k are a function of k. One machine, one number of processes and one of threads give one result.

Two objectives, both from pixels alone, share one forward pass over a random part of the patches:

masked prediction   The pixels of hidden patches, by a light decoder whose queries (position only) attend to the encoded
    visible patches: a masked autoencoder (He et al. 2022, arXiv:2111.06377) with the cross-attention decoder of CrossMAE
    (Fu et al. 2024, arXiv:2401.14391). The decoder adds no positions to the encoded patches (our choice): where a patch lies
    must then be kept by the encoder, and position is what tells instances of one class apart.
common fate         A still camera watches each scene during a few episodes, in each of which every object rests or is pushed
    through its place. The network sees one picture. Patches whose pixels differ both from the moment before and from the
    moment after (three-frame differencing) have moved in that episode. A bilinear form of two encoded patches predicts how
    often they share their fate: both moved or both rested. Learning affinities from what moves together is the idea of EISEN
    (Chen et al. 2022, arXiv:2205.08515) and of Pathak et al. (2017, arXiv:1612.06370). Only pixels are compared; identity and
    class maps are never used.

`weights/README.md` holds the table of what was tried, the masked prediction alone included (`--fate 0`).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic matrix products on CUDA

import timm
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from datasets.procedural import Scenes  # noqa: E402
from errors import UserError  # noqa: E402
from runs.run import newest_run  # noqa: E402

MEAN, STD = 0.5, 0.25  # of the pixels, every channel; the model config says the same
MOVED = 0.01  # mean change of a patch, in [0, 1] grey levels, above which it has moved; scenes are free of sensor noise
MOST_BYTES = 8_000_000  # of the published file


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; each field is an option of the command line."""

    seed: int = 0
    steps: int = 4000  # of the published file: under an hour of one busy core
    batch_size: int = 64  # scenes per step, over all processes
    image_size: int = 96
    patch_size: int = 8
    dim: int = 128
    depth: int = 8
    heads: int = 4
    visible: float = 0.5  # share of the patches that is encoded
    queries: int = 48  # hidden patches predicted per scene
    decoder_dim: int = 96
    decoder_depth: int = 2
    decoder_heads: int = 4
    fate: float = 2.0  # weight of the common-fate loss; 0: masked prediction alone
    fate_rank: int = 32
    episodes: int = 4  # of motion per scene
    lr: float = 1.5e-3  # AdamW: embeddings, norms, biases, first and last linear maps
    muon_lr: float = 0.02  # Muon (Jordan et al. 2024): matrices inside the blocks, scaled to the size of AdamW's updates
    weight_decay: float = 0.05
    warmup: int = 200  # steps
    decay: float = 0.5  # share of the steps, at the end, over which the rates fall linearly to zero
    clip: float = 1.0  # largest norm of the gradient
    pool: int = 4096  # scenes at hand at any time, over all processes
    fresh: int = 4  # new scenes per step, over all processes; each replaces the oldest
    dtype: str = "auto"  # of the products: float32 | bfloat16 | auto (bfloat16 where the machine multiplies it natively)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def architecture(self) -> dict[str, int]:
        """Keyword arguments of timm's VisionTransformer."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": self.dim,
            "depth": self.depth,
            "num_heads": self.heads,
            "num_classes": 0,
        }

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step: warm-up, constant, linear decay.

        Until the decay begins it does not depend on `steps`, so a run may be resumed with another budget.
        """
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / max(self.steps - self.decay_start, 1))

    @property
    def decay_start(self) -> int:
        """First step of the decay."""
        return int(self.steps * (1 - self.decay))

    def check(self, world: int) -> None:
        """Raise UserError for values that do not fit together."""
        for name in ("steps", "batch_size", "warmup", "pool", "queries", "depth", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected at least 1")
        if self.image_size % self.patch_size or self.dim % (4 * self.heads) or self.decoder_dim % (4 * self.decoder_heads):
            raise UserError(
                f"--image-size {self.image_size} must be a multiple of --patch-size {self.patch_size}, and --dim "
                f"{self.dim} and --decoder-dim {self.decoder_dim} multiples of 4 x their heads"
            )
        kept = int(self.grid**2 * self.visible)
        if not 1 <= kept <= self.grid**2 - self.queries:
            raise UserError(
                f"--visible {self.visible} leaves {self.grid**2 - kept} hidden of {self.grid**2} patches, expected at least "
                f"--queries ({self.queries}) and one visible"
            )
        for name in ("batch_size", "pool", "fresh"):
            if getattr(self, name) % world:
                value, option = getattr(self, name), name.replace("_", "-")
                raise UserError(f"--{option}: got {value}, expected a multiple of {world} processes")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"--dtype: got {self.dtype}, expected auto, float32 or bfloat16")


# ---------------------------------------------------------------------------------------------------------------- model


def position_code(dim: int, grid: int) -> Tensor:
    """Sine and cosine code of the patch positions (Vaswani et al. 2017, in 2-D), raster order. [grid * grid, dim] float32."""
    rate = 1 / 10_000 ** (torch.arange(dim // 4) / (dim / 4))
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    return torch.cat([wave(along.reshape(-1, 1) * rate) for along in (x, y) for wave in (torch.sin, torch.cos)], 1)


def build_backbone(recipe: Recipe) -> VisionTransformer:
    """The network that is published; its learned positions start from 0.3 x the sine code, which trains faster than noise."""
    model = VisionTransformer(**recipe.architecture)
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.3 * position_code(recipe.dim, recipe.grid)
    return model


class CrossBlock(nn.Module):
    """Queries attend to encoded patches, then an MLP; no attention among queries, so each is predicted by itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_context, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """X [B, Q, D], context [B, T, D] → [B, Q, D]."""
        b, n, d = x.shape
        q = self.query(self.norm_query(x)).view(b, n, self.heads, -1).transpose(1, 2)  # [B, h, Q, D/h]
        k, v = self.key_value(self.norm_context(context)).view(b, -1, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weight = (q * (d // self.heads) ** -0.5 @ k.mT).softmax(-1)  # [B, h, Q, T]
        x = x + self.out((weight @ v).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm_mlp(x))


class Pretraining(nn.Module):
    """The backbone with the two read-outs that are thrown away afterwards."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.backbone = build_backbone(recipe)
        dim, pixels = recipe.decoder_dim, 3 * recipe.patch_size**2
        self.context = nn.Linear(recipe.dim, dim)
        self.mask = nn.Parameter(0.02 * torch.randn(dim))
        self.register_buffer("position", position_code(dim, recipe.grid), persistent=False)
        self.decoder = nn.ModuleList([CrossBlock(dim, recipe.decoder_heads) for _ in range(recipe.decoder_depth)])
        self.pixels = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, pixels))
        self.fate = nn.Linear(recipe.dim, 2 * recipe.fate_rank) if recipe.fate else None
        self.fate_bias = nn.Parameter(torch.zeros(())) if recipe.fate else None

    def forward(self, images: Tensor, moved: Tensor, order: Tensor) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            images: [B, 3, H, W] uint8.
            moved: [B, N, E] bool, raster: in each of E episodes.
            order: [B, N] int64, the patches of each image in random order.
        """
        recipe = self.recipe
        patches = patchify((images.float() / 255 - MEAN) / STD, recipe.patch_size)  # [B, N, 3pp]
        kept = int(order.shape[1] * recipe.visible)
        visible, hidden = order[:, :kept], order[:, kept : kept + recipe.queries]
        encoded = self.encode(take(patches, visible), visible)  # [B, T, D]
        losses = {"pixels": self.pixel_loss(encoded, hidden, take(patches, hidden))}
        if self.fate is not None:
            losses["fate"] = self.fate_loss(encoded, take(moved, visible))
        return losses

    def encode(self, patches: Tensor, where: Tensor) -> Tensor:
        """Pixels of some patches [B, T, 3pp] and their positions [B, T] → tokens after the last norm [B, T, D]."""
        vit = self.backbone
        x = F.linear(patches, vit.patch_embed.proj.weight.flatten(1), vit.patch_embed.proj.bias)
        x = x + vit.pos_embed[0, 1:][where]
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        return vit.norm(vit.blocks(torch.cat([cls.to(x.dtype), x], 1)))[:, 1:]

    def pixel_loss(self, encoded: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of normalised pixels of the hidden patches [B, Q]."""
        context = self.context(encoded)
        x = self.mask + self.position[hidden]  # [B, Q, D]
        for block in self.decoder:
            x = block(x, context)
        return (self.pixels(x).float() - target).square().mean()

    def fate_loss(self, encoded: Tensor, moved: Tensor) -> Tensor:
        """Cross-entropy of "these two patches share their fate", mean over pairs of encoded patches and episodes.

        Two weights are our choice. An episode in which neither patch moved tells little and is the common case: 1/4. Two
        patches that both moved at some time are two places on things, the pairs in which one thing differs from another and
        no more than a tenth of all: x 4.

        Args:
            encoded: [B, T, D].
            moved: [B, T, E] bool.
        """
        left, right = self.fate(encoded).chunk(2, -1)  # [B, T, r]
        logit = (left @ right.mT).float() / (2 * self.recipe.fate_rank**0.5)
        logit = logit + logit.mT + self.fate_bias  # [B, T, T]
        both = moved.float() @ moved.float().mT  # episodes in which both moved
        neither = (~moved).float() @ (~moved).float().mT
        weight = moved.shape[-1] - 0.75 * neither
        shared = both + 0.25 * neither
        thing = moved.any(-1)
        focus = torch.where(thing[:, :, None] & thing[:, None], 4.0, 1.0)
        return (focus * (weight * F.softplus(logit) - shared * logit)).sum() / (focus * weight).sum()


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] → [B, N, C * patch * patch], raster; within a patch in the order of a convolution's weight."""
    b, c, height, width = images.shape
    x = images.view(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def take(x: Tensor, where: Tensor) -> Tensor:
    """Rows `where` [B, T] of x [B, N, D] → [B, T, D]."""
    return x.gather(1, where[..., None].expand(-1, -1, x.shape[-1]))


# ----------------------------------------------------------------------------------------------------------------- data


def moved_patches(clips: Tensor, patch: int) -> Tensor:
    """Patches that differ from the moment before and from the moment after (three-frame differencing).

    Args:
        clips: [B, 1 + 2 * E, 3, H, W] uint8: the picture, then before and after for each episode.

    Returns:
        [B, h, w, E] bool. A patch that an object is about to cover differs from only one of the two and has not moved.
    """
    now, before, after = (clips[:, part].to(torch.int16) for part in (slice(0, 1), slice(1, None, 2), slice(2, None, 2)))
    change = torch.minimum((now - before).abs(), (now - after).abs()).float().mean(2)  # [B, E, H, W]
    return (F.avg_pool2d(change, patch) > 255 * MOVED).movedim(1, -1)


def render(recipe: Recipe, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, H, W] uint8 and moved patches [n, h, w, E] bool of scenes of the pretraining stream."""
    torch.set_num_threads(1)
    scenes = Scenes("pretrain", size=recipe.image_size, seed=recipe.seed)
    clips = scenes.render_clip(numbers, recipe.episodes)
    return clips[:, 0].contiguous(), moved_patches(clips, recipe.patch_size)


class Pool:
    """The scenes at hand: at step k those with numbers k * fresh to k * fresh + size, each in slot number % size."""

    def __init__(self, recipe: Recipe, rank: int, world: int, device: torch.device, workers: int) -> None:
        self.recipe, self.rank, self.world = recipe, rank, world
        self.size, self.fresh = recipe.pool // world, recipe.fresh // world
        side = recipe.image_size
        self.images = torch.empty(self.size, 3, side, side, dtype=torch.uint8, device=device)
        self.moved = torch.empty(self.size, recipe.grid, recipe.grid, recipe.episodes, dtype=torch.bool, device=device)
        # Rendering processes only compute; pictures come back through their pipes in the order they were asked for.
        self.workers = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else None
        self.depth = 4 * workers
        self.coming: deque[tuple[range, Future]] = deque()
        self.end = 0  # number after the newest scene in the pool

    def fill(self, step: int) -> None:
        """Render every scene at hand at a step, with a progress bar; called at the start and after a resume."""
        first = step * self.fresh
        self.end = first + self.size
        chunk = 64
        parts = [range(at, min(at + chunk, self.end)) for at in range(first, self.end, chunk)]
        with tqdm(total=self.size, desc="rendering scenes", unit="scene", disable=self.rank > 0, mininterval=1) as bar:
            for part, (images, moved) in zip(parts, self._map(parts), strict=True):
                self._put(part, images, moved)
                bar.update(len(part))

    def advance(self) -> None:
        """Replace the oldest scenes by fresh ones: from the pool of step k to that of step k + 1."""
        if not self.fresh:
            return
        if self.workers is None:
            part = range(self.end, self.end + self.fresh)
            self._put(part, *self._render(part))
        else:
            ahead = self.coming[-1][0].stop if self.coming else self.end
            while len(self.coming) < self.depth:
                part = range(ahead, ahead + self.fresh)
                self.coming.append((part, self._submit(part)))
                ahead = part.stop
            part, job = self.coming.popleft()
            self._put(part, *job.result())
        self.end += self.fresh

    def close(self) -> None:
        """End the rendering processes."""
        if self.workers is not None:
            self.workers.shutdown(cancel_futures=True)

    def _numbers(self, part: range) -> list[int]:
        return [number * self.world + self.rank for number in part]

    def _render(self, part: range) -> tuple[Tensor, Tensor]:
        return render(self.recipe, self._numbers(part))

    def _submit(self, part: range) -> Future:
        return self.workers.submit(render, self.recipe, self._numbers(part))

    def _map(self, parts: list[range]):
        if self.workers is None:
            yield from map(self._render, parts)
        else:
            yield from (job.result() for job in [self._submit(part) for part in parts])

    def _put(self, part: range, images: Tensor, moved: Tensor) -> None:
        slots = torch.tensor([number % self.size for number in part])
        self.images[slots.to(self.images.device)] = images.to(self.images.device)
        self.moved[slots.to(self.moved.device)] = moved.to(self.moved.device)


def draw_batch(pool: Pool, recipe: Recipe, step: int, rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 3, H, W] uint8, moved [B, N, E] and patch order [B, N] of one step: a function of (seed, rank, step)."""
    generator = torch.Generator().manual_seed(((recipe.seed * 1_000_003 + rank) << 32) + step)
    device, b, n = pool.images.device, recipe.batch_size // world, recipe.grid**2
    slots = torch.randint(pool.size, (b,), generator=generator).to(device)
    turn = int(torch.randint(8, (), generator=generator))
    order = torch.rand(b, n, generator=generator).argsort(1).to(device)
    images, moved = pool.images[slots], pool.moved[slots]
    # One of the eight flips and transpositions of a square, the same for the batch.
    flips = [axis for axis, bit in ((0, 1), (1, 2)) if turn & bit]
    images, moved = images.flip([axis + 2 for axis in flips]), moved.flip([axis + 1 for axis in flips])
    if turn & 4:
        images, moved = images.mT, moved.transpose(1, 2)
    return images.contiguous(), moved.flatten(1, 2), order


# ------------------------------------------------------------------------------------------------------------- training


def build_optimizers(model: Pretraining, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; weight decay on matrices only."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = name.startswith(("backbone.blocks.", "decoder."))
        (matrices if inner and parameter.ndim == 2 else others).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.muon_lr,
        weight_decay=recipe.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adamw]


def average_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Mean of the gradients over the processes, in one message."""
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


def train(
    recipe: Recipe, state: Path, *, device: torch.device, save_every: int, workers: int, stop_at: int | None = None
) -> dict:
    """Train until the last step, or until `stop_at`, from the saved state if there is one.

    Returns:
        {"model": Pretraining, "step": steps done, "seconds": of training, all sittings together, "losses": running means,
        "sittings": where each sitting began and what it ran on}

    Raises:
        UserError: the saved state belongs to another recipe, is damaged, or a loss is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    recipe.check(world)
    torch.manual_seed(recipe.seed)
    model = Pretraining(recipe).to(device)
    parameters = list(model.parameters())
    optimizers = build_optimizers(model, recipe)
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    done = {"step": 0, "seconds": 0.0, "losses": {}, "sittings": []}
    if state.exists():
        done = load_state(state, recipe, model, optimizers)
    step, seconds, losses = done["step"], done["seconds"], done["losses"]
    sittings = [*done["sittings"], {"from_step": step, **describe_machine(world, device)}]
    last = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    pool = Pool(recipe, rank, world, device, workers)
    bfloat16 = choose_dtype(recipe.dtype, device) is torch.bfloat16
    try:
        if step < last:
            pool.fill(step)
        started = time.perf_counter() - seconds
        bar = tqdm(total=recipe.steps, initial=step, desc="pretraining", unit="step", disable=rank > 0, mininterval=1)
        while step < last:
            for optimizer, rates in zip(optimizers, base, strict=True):
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr * recipe.rate(step)
            batch = draw_batch(pool, recipe, step, rank, world)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                parts = model(*batch)
            loss = parts["pixels"] + recipe.fate * parts.get("fate", 0.0)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            average_gradients(parameters, world)
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
            pool.advance()
            step += 1
            bar.update()
            if step % 10 == 0 or step == last:
                if not bool(torch.isfinite(norm)):
                    raise UserError(f"the loss is no longer finite at step {step}: lower --lr or --muon-lr and start again")
                now = {name: value.item() for name, value in parts.items()}
                losses = {name: 0.9 * losses.get(name, value) + 0.1 * value for name, value in now.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
            seconds = time.perf_counter() - started
            if rank == 0 and (step % save_every == 0 or step == last):
                done = {"step": step, "seconds": seconds, "losses": losses, "sittings": sittings}
                save_state(state, recipe, model, optimizers, done)
        bar.close()
    finally:
        pool.close()
    return {"model": model, "step": step, "seconds": seconds, "losses": losses, "sittings": sittings}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 only where it is faster: on CUDA, and on CPUs that multiply it natively."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16
    can = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32


def save_state(path: Path, recipe: Recipe, model: nn.Module, optimizers: list, done: dict) -> None:
    """Model, optimisers and progress in one file, so that they can never disagree; written aside, then renamed."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{o}.{i}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    about = json.dumps({"recipe": dataclasses.asdict(recipe), **done})
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, aside, {"about": about})
    os.replace(aside, path)


def load_state(path: Path, recipe: Recipe, model: nn.Module, optimizers: list) -> dict:
    """Put a saved state back. Another `steps` is accepted while neither budget's decay has begun.

    Returns:
        {"step", "seconds", "losses", "sittings"}
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a saved state of this script ({error}): delete it to start again") from None
    before = Recipe(**about["recipe"])
    differs = [f.name for f in dataclasses.fields(Recipe) if getattr(before, f.name) != getattr(recipe, f.name)]
    if differs == ["steps"] and about["step"] <= min(before.decay_start, recipe.decay_start):
        differs = []
    if differs:
        raise UserError(
            f"{path} was saved with another recipe (differs: {', '.join(differs)}): name another --state or delete it"
        )
    model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    for o, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, slot = name.split(".", 3)
                whole["state"].setdefault(int(i), {})[slot] = value
        optimizer.load_state_dict(whole)
    return {name: about[name] for name in ("step", "seconds", "losses", "sittings")}


# ----------------------------------------------------------------------------------------------------------- publishing


def publish(recipe: Recipe, trained: dict, path: Path) -> dict:
    """Write the backbone as float16 safetensors and its description as JSON beside it. Returns the description."""
    weights = {name: value.detach().half().cpu().contiguous() for name, value in trained["model"].backbone.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    save_file(weights, aside)
    size = aside.stat().st_size
    if size > MOST_BYTES:
        aside.unlink()
        raise UserError(f"the backbone takes {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}: lower --dim or --depth")
    scenes = Scenes("pretrain", size=recipe.image_size, seed=recipe.seed).fingerprint()
    about = {
        "name": "demo_vit",
        "digest": digest(aside),
        "bytes": size,
        "architecture": recipe.architecture,
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "script": "scripts/pretrain_demo_vit.py",
        "recipe": dataclasses.asdict(recipe),
        "scenes": scenes,
        "steps": trained["step"],
        "images_seen": trained["step"] * recipe.batch_size,
        "scenes_rendered": recipe.pool + trained["step"] * recipe.fresh,
        "seconds": round(trained["seconds"], 1),
        "losses": {name: round(value, 5) for name, value in trained["losses"].items()},
        "sittings": trained["sittings"],
        "evaluation": None,
    }
    os.replace(aside, path)
    write_json(path.with_suffix(".json"), about)
    return about


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Written aside, then renamed."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


def describe_machine(world: int, device: torch.device) -> dict:
    """What the run ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": f"{device.type}: {name}",
        "processes": world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


BLOCKS = {"all": "all pairs", "foreground": "foreground pairs", "same_class_matched": "same class, matched distance"}


def evaluate(path: Path, output_dir: Path) -> dict:
    """Score a published file with the project's own run (`main.py mode=train`) and add the outcome to its JSON.

    Returns:
        {title of a block of pairs: {"layers": AUROC per layer, "probe": best layer, each control: its best layer}} with
        AUROC and its 95 % interval over images, means over the probe seeds.

    Raises:
        UserError: there is no such file, or the run failed.
    """
    description = path.with_suffix(".json")
    if not path.exists() or not description.exists():
        raise UserError(f"{path} and {description.name} are not both there: run this script without --evaluate first")
    about = json.loads(description.read_text())
    if digest(path) != about["digest"]:
        raise UserError(f"{path} is not the file that {description.name} describes: run this script again")
    weights = [f"model.weights={path.resolve()}", f"model.digest={about['digest']}", "model.pretrained=true"]
    command = [sys.executable, str(ROOT / "main.py"), "mode=train", "model=demo_vit", *weights]
    if subprocess.run([*command, f"output_dir={output_dir.resolve()}"], cwd=ROOT, check=False).returncode:
        raise UserError("the evaluation failed, see above: " + " ".join(command))
    directory = newest_run(output_dir)
    with open(directory / "layers.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["kind"], row["metric"]) == ("score", "auroc")]
    outcome: dict = {}
    for block, title in BLOCKS.items():
        scores: dict[str, list[dict]] = {}
        best: dict[str, dict] = {}  # at the layer chosen on validation, or the only one
        for row in rows:
            if row["subset"] == block and row["value"]:
                score = {"layer": row["layer"]} | {key: round(float(row[key]), 4) for key in ("value", "low", "high")}
                scores.setdefault(row["name"], []).append(score)
                if row["chosen"] == "1" or row["name"] not in best:
                    best[row["name"]] = score
        outcome[title] = {"layers": {score["layer"]: score["value"] for score in scores.get("probe", [])}, **best}
    run = json.loads((directory / "run.json").read_text())
    about["evaluation"] = {"command": "python main.py mode=train model=demo_vit", "commit": run["commit"], "auroc": outcome}
    write_json(description, about)
    return outcome


# ---------------------------------------------------------------------------------------------------------- command line


def keep_freed_memory() -> None:
    """Ask glibc to reuse freed memory: giving megabytes back at every step costs more in page faults than the mathematics."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**28)):
            ctypes.CDLL(None).mallopt(option, value)


def parse(arguments: Sequence[str] | None = None) -> tuple[Recipe, argparse.Namespace]:
    """Options of the command line; an unknown one ends the program with the list of the known ones."""
    parser = argparse.ArgumentParser(
        description="Pretrain weights/demo_vit.safetensors on generated scenes, without labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Recipe):
        kind = {"int": int, "float": float, "str": str}[field.type]
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default, help="recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "weights/demo_vit.safetensors", help="file to write")
    parser.add_argument(
        "--state", type=Path, default=ROOT / "outputs/pretrain_demo_vit.safetensors", help="saved state, to go on from"
    )
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved states")
    parser.add_argument("--stop-at", type=int, default=None, help="stop after this step, with a saved state and no weights")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads per process; default: cores / processes")
    parser.add_argument("--workers", type=int, default=0, help="processes that render scenes; 0: between two steps")
    parser.add_argument("--evaluate", action="store_true", help="score --out with main.py instead of training")
    options = parser.parse_args(arguments)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)})
    return recipe, options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and publish, or evaluate what was published."""
    recipe, options = parse(arguments)
    if options.evaluate:
        for title, scores in evaluate(options.out, options.state.parent / "pretrain_demo_vit_evaluation").items():
            best = {name: score["value"] for name, score in scores.items() if name != "layers"}
            print(f"{title}: " + ", ".join(f"{name} {value:.3f}" for name, value in best.items()))
        return
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device: got {options.device}, expected auto, cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no CUDA device, take --device cpu")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    recipe.check(world)
    keep_freed_memory()
    torch.set_num_threads(options.threads or max((os.cpu_count() or 1) // world, 1))
    # Fused attention is slower than plain products for short sequences on a CPU (its backward took 62 % of a step), and
    # is not deterministic on CUDA.
    set_fused_attn(False)
    torch.use_deterministic_algorithms(True)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        trained = train(
            recipe,
            options.state,
            device=device,
            save_every=options.save_every,
            workers=options.workers,
            stop_at=options.stop_at,
        )
        if rank == 0 and trained["step"] == recipe.steps:
            about = publish(recipe, trained, options.out)
            print(f"{options.out}: {about['bytes'] / 1e6:.2f} MB, sha256 {about['digest']}", flush=True)
        elif rank == 0:
            print(f"stopped at step {trained['step']} of {recipe.steps}: the same command goes on from {options.state}")
    finally:
        if world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the last saved state")
