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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from forms import add_form_gradient, fold_form, form_cuts, form_products, mirror_blocks
from pairs.losses import pair_mask


class Triangle(NamedTuple):
    """Places of the unordered pairs in a flat [T * T] matrix, and the way back."""

    upper: Tensor  # int64 [P], place of (i, j)
    lower: Tensor  # int64 [P], place of (j, i)
    pair: Tensor  # int64 [T * T], number of the pair at a place, P where none counts


class PairTerms(NamedTuple):
    """Weights of the pairs of a batch: the loss of a fit is sum_p w_p softplus(s_p) - (w y)_p s_p.

    weight, weight_same: [V, B, P], w and w * y with y = 1 for pairs of one object; w sums to 1 over the batch.
    pairs: "upper", "upper_diagonal" or "all" (`losses.pair_mask`), which ordered pairs the weights stand for.
    """

    weight: Tensor
    weight_same: Tensor
    pairs: str


@functools.lru_cache(maxsize=8)
def triangle(n_tokens: int, diagonal: bool, device: torch.device) -> Triangle:
    """The unordered pairs of T tokens, with or without those of a token with itself."""
    first, second = torch.triu_indices(n_tokens, n_tokens, 0 if diagonal else 1, device=device)
    upper, lower = first * n_tokens + second, second * n_tokens + first
    pair = torch.full((n_tokens**2,), len(upper), device=device)
    pair[upper] = pair[lower] = torch.arange(len(upper), device=device)
    return Triangle(upper, lower, pair)


def pair_terms(identity: Tensor, used: Tensor, pairs: str) -> PairTerms:
    """The weights of a mean over the counted pairs of the batch.

    Args:
        identity: int64 [B, T].
        used: bool [V, B, T], tokens that count for each variant.
        pairs: "upper", "upper_diagonal" or "all". A symmetric score takes both orders of "all" as one pair that counts
            twice.
    """
    n_tokens = identity.shape[-1]
    places = pair_mask(n_tokens, "upper" if pairs == "upper" else "upper_diagonal", identity.device).nonzero()
    first, second = places.unbind(1)
    weight = (used[..., first] & used[..., second]).to(torch.get_default_dtype())  # [V, B, P]
    if pairs == "all":
        weight *= torch.where(first == second, 1.0, 2.0)
    weight /= weight.sum((1, 2), keepdim=True).clamp_min(1)
    return PairTerms(weight, weight * (identity[:, first] == identity[:, second]), pairs)


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
        n_layers, _, n_tokens, dim = x.shape
        n_seeds, scale, cuts = len(weight) // len(terms.weight), 0.5 * dim**-0.5, form_cuts(x)
        diagonal = terms.pairs != "upper"
        where = triangle(n_tokens, diagonal, x.device)
        n_pairs = len(where.upper)
        z = x.new_empty(cuts.n_images, n_tokens, dim)
        packed = weight.new_zeros(cuts.n_images, n_pairs + 1)  # the last column stays 0: places that do not count
        loss = weight.new_zeros(weight.shape[:2])
        weight_grad, rows_grad = (t.new_empty(t.shape) if differentiate else None for t in (weight, rows))
        parts = [slice(first, first + cuts.n_images) for first in range(0, x.shape[1], cuts.n_images)]
        for layer, s in itertools.product(range(n_layers), range(len(weight))):
            folded, variant = fold_form(weight[s, layer], cuts, x.dtype), s // n_seeds
            for part in parts:
                tokens = x[layer, part]
                half = form_products(tokens, folded, cuts, z).to(weight.dtype)  # [b, T, T]
                torch.add(rows[s, layer, part, :, None], half, alpha=scale, out=half)
                half = half.view(len(tokens), -1)
                scores = half.index_select(1, where.upper).add_(half.index_select(1, where.lower))  # [b, P]
                w, w_same = terms.weight[variant, part], terms.weight_same[variant, part]
                loss[s, layer] += F.softplus(scores).view(-1) @ w.view(-1) - scores.view(-1) @ w_same.view(-1)
                if differentiate:
                    torch.sub(scores.sigmoid_().mul_(w), w_same, out=packed[: len(tokens), :n_pairs])
                    grad = torch.index_select(packed[: len(tokens)], 1, where.pair, out=half).view(-1, n_tokens, n_tokens)
                    if diagonal:  # a token's score with itself holds both of its halves
                        grad.diagonal(dim1=1, dim2=2).mul_(2)
                    torch.sum(grad, -1, out=rows_grad[s, layer, part])
                    out, grad = weight_grad[s, layer], grad.mul_(scale).to(x.dtype)
                    add_form_gradient(out, tokens, grad, cuts, z, first=part.start == 0)
            if differentiate:
                mirror_blocks(weight_grad[s, layer], cuts)
        ctx.gradients = (weight_grad, rows_grad)
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
