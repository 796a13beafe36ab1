"""The scenes of pretraining: rendered clips, which of their patches moved, and the pool that batches are drawn from."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context

import torch
from pretraining_model import Recipe
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from datasets.procedural import Scenes

MOVED = 0.01  # mean change of a patch, in [0, 1] grey levels, above which it has moved; scenes are free of sensor noise


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
