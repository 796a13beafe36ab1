"""The IsSameObject loss of symmetric forms: scores, loss and gradient in one pass that keeps to a processor's cache.

    pair_terms   how much every unordered pair of a batch weighs in the loss of each variant
    form_bce     sum of the weighted binary cross-entropies of s_ij = x_i' (W + W') x_j / (2 sqrt D) + r_i + r_j

The scores of a stack, [S, L, B, T, T], are never stored. A fit scores some images, each unordered pair once; the gradient is
written where the scores stood and goes through the second pair of products while all of it is still in the cache.
The numbers are those of `losses.pair_bce` of `forms.SymmetricForm`, up to the order of sums.

Shapes: S fits of the first axis (variants × seeds), V variants, L layers, B images, T tokens, D width,
P = T (T - 1) / 2 pairs i < j of an image, T more where a token is paired with itself.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from forms import add_form_gradient, fold_form, form_cuts, form_products, mirror_blocks
from machine import share_threads
from pairs.losses import PAIR_SETS

WIDE = 512  # from this width on the products of one fit keep all threads busy


class Triangle(NamedTuple):
    """The unordered pairs of T tokens: their tokens, their places in a flat [T * T] matrix, and the way back."""

    first: Tensor  # int64 [P], i
    second: Tensor  # int64 [P], j >= i
    upper: Tensor  # int64 [P], place of (i, j)
    lower: Tensor  # int64 [P], place of (j, i)
    pair: Tensor  # int64 [T * T], number of the pair at a place, P where none counts


class PairTerms(NamedTuple):
    """Weights of the pairs of a batch: the loss of a fit is sum_p w_p softplus(s_p) - (w y)_p s_p.

    weight, weight_same: [V, B, P], w and w * y with y = 1 for pairs of one object; w sums to 1 over the batch.
    where: the pairs.
    """

    weight: Tensor
    weight_same: Tensor
    where: Triangle

    @property
    def diagonal(self) -> bool:
        """Whether a token is paired with itself."""
        return bool(self.where.upper[0] == 0)


@functools.lru_cache(maxsize=8)
def triangle(n_tokens: int, diagonal: bool, device: torch.device) -> Triangle:
    """The unordered pairs of T tokens, with or without those of a token with itself."""
    first, second = torch.triu_indices(n_tokens, n_tokens, 0 if diagonal else 1, device=device)
    upper, lower = first * n_tokens + second, second * n_tokens + first
    pair = torch.full((n_tokens**2,), len(upper), device=device)
    pair[upper] = pair[lower] = torch.arange(len(upper), device=device)
    return Triangle(first, second, upper, lower, pair)


def pair_terms(identity: Tensor, used: Tensor, pairs: str) -> PairTerms:
    """The weights of a mean over the counted pairs of the batch.

    Args:
        identity: int64 [B, T].
        used: bool [V, B, T], tokens that count for each variant.
        pairs: "upper", "upper_diagonal" or "all" (`losses.pair_mask`). A symmetric score takes both orders of "all" as one
            pair that counts twice.
    """
    if pairs not in PAIR_SETS:
        raise ValueError(f"unknown pair set '{pairs}'; valid: {', '.join(PAIR_SETS)}")
    where = triangle(identity.shape[-1], pairs != "upper", identity.device)
    used = used.to(torch.get_default_dtype())
    weight = used.index_select(2, where.first) * used.index_select(2, where.second)  # [V, B, P]
    if pairs == "all":
        weight *= torch.where(where.first == where.second, 1.0, 2.0)
    weight /= weight.sum((1, 2), keepdim=True).clamp_min(1)
    same = identity.index_select(1, where.first) == identity.index_select(1, where.second)  # [B, P]
    return PairTerms(weight, weight * same, where)


def form_bce(x: Tensor, weight: Tensor, rows: Tensor, terms: PairTerms) -> Tensor:
    """Loss of every fit over the pairs of a batch, differentiable by `weight` and `rows`.

    Args:
        x: tokens [L, B, T, D], float32 or bfloat16; data, not differentiated.
        weight: W, float32 [S, L, D, D].
        rows: r, float32 [S, L, B, T]: what a token adds to each of its pairs.
        terms: of the batch; S is a multiple of its V variants, variant first.

    Returns:
        [S, L] in nats.
    """
    return _FormBCE.apply(x, weight, rows, terms, torch.is_grad_enabled() and weight.requires_grad)


class _FormBCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor, terms: PairTerms, differentiate: bool) -> Tensor:
        loss = weight.new_zeros(weight.shape[:2])
        gradients = tuple(t.new_empty(t.shape) if differentiate else None for t in (weight, rows))
        work = functools.partial(_fit_losses, x, weight.detach(), rows.detach(), terms, loss, *gradients)
        fits = list(itertools.product(range(x.shape[0]), range(len(weight))))
        if x.device.type == "cpu" and x.shape[-1] < WIDE:
            share_threads(work, fits)
        else:  # products of wide tokens, and a GPU, spread one fit over all there is
            work(fits)
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        weight_grad, rows_grad = ctx.gradients
        ctx.gradients = None  # they are scaled in place, so they serve once
        if weight_grad is None:
            raise RuntimeError("the loss of a form was computed without gradients and cannot be differentiated")
        scaled = weight_grad.mul_(grad[..., None, None]), rows_grad.mul_(grad[..., None, None])
        return None, *scaled, None, None


@torch.no_grad()
def _fit_losses(
    x: Tensor, weight: Tensor, rows: Tensor, terms: PairTerms, loss: Tensor,
    weight_grad: Tensor | None, rows_grad: Tensor | None, fits: Sequence[tuple[int, int]],
) -> None:  # fmt: skip
    """Write loss and gradients of some (layer, fit) of a stack into `loss` [S, L] and the like of `weight` and `rows`."""
    _, n_images, n_tokens, dim = x.shape
    n_seeds, scale, cuts, where = len(weight) // len(terms.weight), 0.5 * dim**-0.5, form_cuts(x), terms.where
    n_pairs, diagonal = len(where.upper), terms.diagonal
    z = x.new_empty(cuts.n_images, n_tokens, dim)
    packed = weight.new_zeros(cuts.n_images, n_pairs + 1)  # the last column stays 0: places that do not count
    for (layer, s), first in itertools.product(fits, range(0, n_images, cuts.n_images)):
        part, variant = slice(first, first + cuts.n_images), s // n_seeds
        if first == 0:
            folded = fold_form(weight[s, layer], cuts, x.dtype)
        tokens, w, w_same = x[layer, part], terms.weight[variant, part], terms.weight_same[variant, part]
        half = form_products(tokens, folded, cuts, z).to(weight.dtype)  # [b, T, T]
        half = torch.add(rows[s, layer, part, :, None], half, alpha=scale, out=half).view(len(tokens), -1)
        scores = half.index_select(1, where.upper).add_(half.index_select(1, where.lower))  # [b, P]
        loss[s, layer] += F.softplus(scores).view(-1) @ w.view(-1) - scores.view(-1) @ w_same.view(-1)
        if weight_grad is None:
            continue
        torch.sub(scores.sigmoid_().mul_(w), w_same, out=packed[: len(tokens), :n_pairs])
        grad = torch.index_select(packed[: len(tokens)], 1, where.pair, out=half).view(-1, n_tokens, n_tokens)
        if diagonal:  # a token's score with itself holds both of its halves
            grad.diagonal(dim1=1, dim2=2).mul_(2)
        torch.sum(grad, -1, out=rows_grad[s, layer, part])
        add_form_gradient(weight_grad[s, layer], tokens, grad.mul_(scale).to(x.dtype), cuts, z, first=first == 0)
        if part.stop >= n_images:
            mirror_blocks(weight_grad[s, layer], cuts)
