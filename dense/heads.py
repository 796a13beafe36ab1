"""A stack of linear heads on grids of patch tokens and how it is trained; `linear_seg` chooses and scores them.

Why this is not `trainer`'s loop: that one fits probes on the few patches a protocol selects, with one optimiser for all
fits. Here every image is a whole grid (the loss may be taken on pixels, images may be augmented live), the learning rate
and decay are themselves an axis of the stack, and published rules ask for SGD and other schedules. What both must agree on
(start values, product dtype) comes from `forms`.

Scaling logits up is the same as scaling tokens up (both are linear), so a head works on the grid of patches and only its
C logits are scaled. A head alone and the same head in a stack give the same numbers: the loss is a sum over heads, the
optimisers are element-wise, all heads read the same batches, and each draws its weights from a generator of its own.
Shapes: L layers, G = R recipes x S seeds, B images, h x w patches, D width, C classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense.contract import resize_map, soft_labels
from errors import UserError
from forms import fit_generator, resolve_matmul_dtype
from metrics.segmentation import ABSENT

Target = Callable[[Tensor, Sequence[int]], Tensor]
Batch = tuple[Tensor, Tensor]  # tokens [L, B, h, w, D], label maps at the input resolution [B, h p, w p]
ROWS = 512  # patches of one product: logits of 45 heads x 21 classes stay in the processor's cache
CHOICES = {  # what `linear_seg` and `patch_class` have in common
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("constant", "step", "linear", "cosine"),
    "matmul_dtype": ("auto", "float32", "bfloat16"),
    "absent": ABSENT,
}


class Normalization(nn.Module):
    """What happens to the channels of each layer before the heads: nothing, fixed statistics, or those of the batch."""

    def __init__(self, kind: str, layers: int, dim: int) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(layers, dim))
        self.register_buffer("var", torch.ones(layers, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [L, B, h, w, D], normalised."""
        if self.kind == "none":
            return x
        if self.kind == "standardize":
            shape = (len(x), 1, 1, 1, -1)
            return (x - self.mean.view(shape)) * self.var.rsqrt().view(shape)
        n_layers, dim = len(x), x.shape[-1]
        flat = x.flatten(1, 3).transpose(0, 1).flatten(1)  # [n, L D]: every channel of every layer is a channel
        flat = F.batch_norm(flat, self.mean.view(-1), self.var.view(-1), training=self.training)
        return flat.view(-1, n_layers, dim).transpose(0, 1).reshape(x.shape)


class Heads(nn.Module):
    """A stack of 1 x 1 convolutions: R recipes x S seeds for each of L layers.

    Every recipe (learning rate, weight decay) has parameters of its own, so that the optimisers of torch can be used.
    """

    def __init__(self, n_recipes: int, seeds: Sequence[int], layers: Sequence[int | str], dim: int, n_classes: int) -> None:
        super().__init__()
        self.n_recipes, self.n_seeds, self.n_classes = n_recipes, len(seeds), n_classes
        start = torch.empty(len(layers), dim, len(seeds), n_classes)
        offset = torch.empty(len(layers), len(seeds), n_classes)
        bound = 1 / math.sqrt(dim)  # as torch starts a convolution
        for (i, layer), (s, seed) in itertools.product(enumerate(layers), enumerate(seeds)):
            start[i, :, s].uniform_(-bound, bound, generator=fit_generator(seed, layer, 0))
            offset[i, s].uniform_(-bound, bound, generator=fit_generator(seed, layer, 1))
        self.weights = nn.ParameterList([nn.Parameter(start.clone()) for _ in range(n_recipes)])  # R of [L, D, S, C]
        self.offsets = nn.ParameterList([nn.Parameter(offset.clone()) for _ in range(n_recipes)])  # R of [L, S, C]

    def choose(self, recipes: Tensor) -> Heads:
        """The heads of one recipe per layer, [L] of 0 … R - 1: a stack with R = 1."""
        chosen = Heads(1, range(self.n_seeds), range(len(recipes)), self.weights[0].shape[1], self.n_classes)
        with torch.no_grad():
            for i, r in enumerate(recipes.tolist()):
                chosen.weights[0][i] = self.weights[r][i]
                chosen.offsets[0][i] = self.offsets[r][i]
        return chosen

    def joined(self) -> tuple[Tensor, Tensor]:
        """The parameters of all heads beside each other, for one product: [L, D, R S C] and [L, R S C]."""
        return torch.cat(list(self.weights), 2).flatten(2), torch.cat(list(self.offsets), 1).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [L, B, h, w, R S, C] of normalised tokens [L, B, h, w, D]."""
        weight, offset = self.joined()
        logits = torch.baddbmm(offset[:, None], x.flatten(1, 3), weight)
        return logits.view(*x.shape[:4], self.n_recipes * self.n_seeds, self.n_classes)

    def add_gradients(self, weight: Tensor, offset: Tensor) -> None:
        """Take gradients of the shapes of `joined`."""
        n_layers, dim = weight.shape[:2]
        parts = weight.view(n_layers, dim, self.n_recipes, self.n_seeds, self.n_classes).unbind(2)
        offsets = offset.view(n_layers, self.n_recipes, self.n_seeds, self.n_classes).unbind(1)
        for parameter, gradient in zip([*self.weights, *self.offsets], [*parts, *offsets], strict=True):
            parameter.grad = gradient.contiguous()


@torch.no_grad()
def add_patch_gradients(heads: Heads, x: Tensor, shares: Tensor, count: Tensor, dtype: torch.dtype) -> bool:
    """The gradient of `patch_loss` / count of every head, without autograd: softmax minus shares, a few patches at a time.

    The step of the usual case, so it is worth its own arithmetic: all heads are one product, and the logits of 512 patches
    are used while they lie in the processor's cache. Softmax, sums and weights are float32 whatever `dtype` the products are.

    Args:
        x: normalised tokens [L, B, h, w, D]; shares: [B, h, w, C]; count: what the loss is divided by.

    Returns:
        whether every gradient is finite.
    """
    weight, offset = heads.joined()
    slopes = torch.zeros_like(weight), torch.zeros_like(offset)
    low, small = weight.to(dtype), offset.to(dtype)
    n_layers, tokens, wanted = len(x), x.flatten(1, 3), shares.flatten(0, 2)  # [L, n, D], [n, C]
    known = wanted.sum(-1)  # a patch weighs what is labelled of it: on the D channels of its token, not on all logits
    wanted, known = wanted / known.clamp_min(1e-9)[:, None], known / count
    for rows in torch.arange(tokens.shape[1]).split(ROWS):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        part, mass = tokens[:, here], known[here]  # [L, r, D], [r]
        logits = torch.baddbmm(small[:, None], part.to(dtype), low).float()
        slope = logits.view(n_layers, len(mass), -1, heads.n_classes).softmax(-1)
        slope = slope.sub_(wanted[here, None]).flatten(2)  # [L, r, R S C]
        slopes[1].add_(mass @ slope)
        part = (part * mass[:, None]).mT
        if dtype == torch.float32:
            slopes[0].baddbmm_(part, slope)
        else:
            slopes[0].add_(torch.bmm(part.to(dtype), slope.to(dtype)))
    heads.add_gradients(*slopes)
    return bool(torch.isfinite(slopes[0]).all() & torch.isfinite(slopes[1]).all())


def patch_loss(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy with the class shares of the patches, summed over patches, [L, G].

    Args:
        logits: [L, B, h, w, G, C]; shares: [B, h, w, C], which sum to the labelled part of a patch.
    """
    known = shares.sum(-1)
    named = torch.einsum("lbhwgc,bhwc->lg", logits, shares)
    return torch.einsum("lbhwg,bhw->lg", logits.logsumexp(-1), known) - named


def pixel_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of logits scaled up bilinearly with a label map [B, H, W], -1 ignored, summed over pixels, [L, G]."""
    n_layers, n_images, _, _, n_heads, n_classes = logits.shape
    x = logits.permute(0, 1, 4, 5, 2, 3).flatten(0, 1).flatten(1, 2)  # [L B, G C, h, w]
    x = F.interpolate(x, size=target.shape[1:], mode="bilinear", align_corners=False)
    x = x.view(n_layers, n_images, n_heads, n_classes, *target.shape[1:]).permute(0, 2, 1, 3, 4, 5)
    wanted = target.expand(n_layers, n_heads, -1, -1, -1).flatten(0, 2)
    losses = F.cross_entropy(x.flatten(0, 2), wanted, ignore_index=-1, reduction="none")
    return losses.view(n_layers, n_heads, -1).sum(-1)


def add_pixel_gradients(heads: Heads, x: Tensor, target: Tensor, count: Tensor, max_gb: float) -> bool:
    """The gradient of `pixel_loss` / count of every head, in parts of the batch that fit `max_gb`; whether all is finite."""
    floats = len(x) * target[0].numel() * heads.n_recipes * heads.n_seeds * heads.n_classes  # logits of one image
    for rows in torch.arange(x.shape[1]).split(max(1, int(max_gb * 1e9 // (16 * floats)))):
        loss = pixel_loss(heads(x[:, rows]), target[rows]).sum() / count
        if not torch.isfinite(loss):
            return False
        loss.backward()
    return True


class Recipe(NamedTuple):
    """How the heads are trained; see `linear_seg.linear_seg`."""

    lrs: Sequence[float]
    weight_decays: Sequence[float]
    epochs: int
    batch_size: int
    optimizer: str
    momentum: float
    schedule: str
    drop_at: int
    gamma: float
    warmup: float
    max_gb: float
    matmul_dtype: str = "auto"

    @property
    def grid(self) -> list[tuple[float, float]]:
        """Every learning rate with every weight decay."""
        return list(itertools.product(self.lrs, self.weight_decays))

    def rate(self, epoch: float) -> float:
        """Factor of the learning rate at a fractional epoch."""
        if epoch < self.warmup:
            return (epoch + 1e-8) / self.warmup
        share = min(epoch / self.epochs, 1.0)
        return {
            "constant": 1.0,
            "step": self.gamma ** (int(epoch) // self.drop_at),
            "linear": 1.0 - share,
            "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        }[self.schedule]

    def optimizer_for(self, heads: Heads) -> torch.optim.Optimizer:
        """One group per recipe; the decay falls on offsets too, as the optimisers of torch do by default."""
        groups = [
            {"params": [w, b], "lr": lr, "weight_decay": decay, "base": lr}
            for w, b, (lr, decay) in zip(heads.weights, heads.offsets, self.grid, strict=True)
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.1, momentum=self.momentum)
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer](groups, lr=0.1)


def train_epoch(
    heads: Heads,
    norm: Normalization,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    n_batches: int,
    epoch: int,
    recipe: Recipe,
    target: Target,
) -> None:
    """One pass over the training images; a batch is cut into parts that fit `max_gb`, which changes no number.

    Args:
        target: what the heads are compared with: class shares of patches [B, h, w, C] or label maps [B, H, W] with -1
            ignored, of label maps at the input resolution and a grid (h, w).

    Raises:
        UserError: a loss that is not finite.
    """
    heads.train()
    norm.train()
    dtype = resolve_matmul_dtype(recipe.matmul_dtype, heads.weights[0].device, heads.weights[0].shape[1])
    for step, (x, maps) in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * recipe.rate(epoch + step / n_batches)
        x, wanted = norm(x), target(maps, x.shape[2:4])
        of_patches = wanted.ndim == 4
        count = wanted.sum() if of_patches else (wanted >= 0).sum()
        if not count:
            continue
        optimizer.zero_grad(set_to_none=True)
        if of_patches:
            finite = add_patch_gradients(heads, x, wanted, count, dtype)
        else:
            finite = add_pixel_gradients(heads, x, wanted, count, recipe.max_gb)
        if not finite:
            raise UserError(
                f"the loss of the linear heads is not finite in epoch {epoch + 1} (learning rates {list(recipe.lrs)}); "
                "leave out the largest, or set normalize=standardize"
            )
        optimizer.step()


def share_target(n_classes: int) -> Target:
    """Soft labels: the shares of the classes in a patch; ignored pixels weigh nothing."""
    return lambda maps, grid: soft_labels(maps, grid, n_classes)


def pixel_target(n_classes: int, size: int) -> Target:
    """The label map at size x size."""

    def target(maps: Tensor, grid: Sequence[int]) -> Tensor:
        scaled = resize_map(maps, (size, size))
        return torch.where((scaled >= 0) & (scaled < n_classes), scaled, -1)

    return target
