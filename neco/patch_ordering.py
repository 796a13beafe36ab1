"""The NeCo loss: student and teacher must order the same reference patches alike, cell by cell of every crop overlap.

For each ordered pair (i, v) of a global crop i and another crop v, the teacher's map of i and the student's map of v are
sampled on the same K x K cells of their common image region (ROI-align). Each cell's similarities to the reference patches
are sorted by a relaxed network, and the loss is the cross-entropy between the two networks' weights (arXiv 2408.11054).

Choices the paper leaves open are named where they are made; the reference program and the paper disagree about who makes the
reference patches (program: the teacher; paper: the student), which is therefore an option.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from neco.networks import Sorter
from neco.sorting import order_cross_entropy


def _distance(cells: Tensor, patches: Tensor) -> Tensor:
    """Euclidean; the root has no gradient at 0, which is how far a patch is from itself."""
    return (cells[..., :, None, :] - patches[..., None, :, :]).square().sum(-1).clamp_min(1e-12).sqrt()


# Of cells [..., N, D] and reference patches [..., R, D], [..., N, R], sorted ascending: by cosine the nearest patch comes last,
# by distance first. The loss does not care.
SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda cells, patches: F.normalize(cells, dim=-1) @ F.normalize(patches, dim=-1).mT,
    "euclidean": _distance,
}
LOSS_MASKS = ("all", "fg", "bg")
REFERENCE_NETWORKS = ("teacher", "student")
REFERENCE_PLACES = ("batch", "queue")


class Ordering(NamedTuple):
    """What is ordered, and how.

    grid: K, cells per side of an overlap; student, teacher: how their similarities are sorted.
    similarity: of `SIMILARITIES`; assign: the global crops whose teacher maps are the target.
    """

    grid: int = 7
    student: Sorter = Sorter()
    teacher: Sorter = Sorter()
    similarity: str = "cosine"
    assign: tuple[int, ...] = (0, 1)


class World(NamedTuple):
    """The processes that share a batch: equal parts of it, in the order of their ranks."""

    rank: int = 0
    size: int = 1

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all ranks one after the other, without gradient."""
        if self.size == 1:
            return part.detach()
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.detach().contiguous())
        return torch.cat(parts)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks of equally large parts."""
        if self.size == 1:
            return value
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.size

    def part(self, joint: Tensor) -> Tensor:
        """This rank's part of a joint batch."""
        return joint.chunk(self.size)[self.rank] if self.size > 1 else joint


class Pairs(NamedTuple):
    """The aligned cells of every pair.

    names: (i, v) of each pair; targets: [pairs, B, N, D] of the teacher; cells: [pairs, B, N, D] of the student.
    """

    names: list[tuple[int, int]]
    targets: Tensor
    cells: Tensor


def align(maps: Tensor, boxes: Tensor, patch_size: int, grid: int) -> Tensor:
    """Sample maps on grid x grid cells of boxes (torchvision's ROI-align, adaptive sampling, aligned).

    Args:
        maps: [B, D, h, w]; boxes: [B, V, 4], x1, y1, x2, y2 in pixels of the crop that the map is of.

    Returns:
        [B, V, grid², D], cells by row; not normalised again.
    """
    batch, n_boxes, _ = boxes.shape
    image = torch.arange(batch, device=boxes.device).repeat_interleave(n_boxes)
    rois = torch.cat([image[:, None].to(boxes), boxes.flatten(0, 1) / patch_size], dim=1).to(maps)  # [B V, 5]
    sampled = roi_align(maps, rois, (grid, grid), spatial_scale=1.0, sampling_ratio=-1, aligned=True)
    return sampled.flatten(2).mT.unflatten(0, (batch, n_boxes))


def align_pairs(
    student: Sequence[Tensor], teacher: Sequence[Tensor], in_global: Tensor, in_all: Tensor, patch_size: int, options: Ordering
) -> Pairs:
    """Align the maps of both networks for all pairs (i, v), i in `options.assign`, v any other crop.

    Args:
        student: maps [B, D, h, w] of all V crops, globals first; teacher: of the G global ones.
        in_global: [B, G, V, 4], the overlap of crops i and v in pixels of global crop i.
        in_all: [B, V, G, 4], the same in pixels of crop v.
    """
    student, teacher = [_wide(m) for m in student], [_wide(m) for m in teacher]
    names = [(i, v) for i in options.assign for v in range(len(student)) if v != i]
    targets = {i: align(teacher[i], in_global[:, i], patch_size, options.grid) for i in options.assign}  # [B, V, N, D]
    cells = [align(maps, in_all[:, v], patch_size, options.grid) for v, maps in enumerate(student)]  # [B, G, N, D]
    return Pairs(names, torch.stack([targets[i][:, v] for i, v in names]), torch.stack([cells[v][:, i] for i, v in names]))


def ordering_loss(
    pairs: Pairs,
    references: Tensor,
    options: Ordering,
    mask: Tensor | None = None,
    world: World | None = None,
    teacher_references: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy between the orders of the teacher (no gradient) and of the student.

    Args:
        pairs: of `align_pairs`; references: [pairs, B, R, D], the patches an image's cells are compared with.
        mask: [pairs, B, N], cells that count; None: all. A pair without any is 0.
        teacher_references: others for the teacher's order (a control); None: the same.

    Returns:
        The loss: mean over i of the mean over v; and that of each pair [pairs], both in nats per cell and reference.
    """
    similarity = SIMILARITIES[options.similarity]
    references = references.detach()
    by_student = similarity(pairs.cells, references)  # [pairs, B, N, R]
    others = references if teacher_references is None else teacher_references.detach()
    by_teacher = similarity(pairs.targets.detach(), others)
    rows = by_student.shape[:-1]
    losses = order_cross_entropy(by_student.flatten(0, -2), by_teacher.flatten(0, -2), options.student, options.teacher)
    losses = losses.unflatten(0, rows).flatten(1)  # [pairs, B N]
    if mask is None:
        by_pair = losses.mean(1)
    else:
        counted = mask.flatten(1).to(losses)
        number = (world or World()).mean(counted.sum(1))  # of the joint batch, so that ranks add up to one process
        by_pair = (losses * counted).sum(1) / number.clamp_min(1 / counted.shape[1])
    return by_pair.mean(), by_pair


# ---------------------------------------------------------------------------------------------------- references


def references_of_batch(patches: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Give every image N reference patches drawn from the cells of the whole batch.

    As in the reference program the cells are repeated round(B N / n) + 1 times, cut to B N and shuffled, so without a
    mask each cell is drawn once, by some image, and an image may be compared with its own cells.

    Args:
        patches: [B, N, D]; mask: [B, N], cells that may be drawn (all, where it is empty); generator: on the CPU; None
            leaves the order as it is.
    """
    batch, n, dim = patches.shape
    pool = patches.detach().reshape(-1, dim)
    if mask is not None and mask.any():
        pool = pool[mask.reshape(-1)]
    pool = pool.repeat(round(batch * n / len(pool)) + 1, 1)[: batch * n]
    if generator is not None:
        pool = pool[torch.randperm(len(pool), generator=generator).to(pool.device)]
    return pool.view(batch, n, dim)


# ---------------------------------------------------------------------------------------------------- foreground


def mask_pairs(
    masks: Sequence[Tensor], in_global: Tensor, names: Sequence[tuple[int, int]], patch_size: int, grid: int
) -> Tensor:
    """Cells [pairs, B, N] that lie wholly inside the masks [B, h, w] of the global crops."""
    cells = {i: align(masks[i][:, None].float(), in_global[:, i], patch_size, grid)[..., 0] for i in {i for i, _ in names}}
    return torch.stack([cells[i][:, v] >= 1 - 1e-6 for i, v in names])  # the reference asks for >= 1.0, rounding or not


def _wide(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()
