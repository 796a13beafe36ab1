"""The IsSameObject loss of symmetric forms: scores, loss and gradient in one pass that keeps to a processor's cache.

    pair_terms   how much every unordered pair of a batch weighs in the loss of each variant
    form_bce     sum of the weighted binary cross-entropies of s_ij = x_i' (W + W') x_j / (2 sqrt D) + w.(x_i + x_j) + b

The scores of a stack, [S, L, B, T, T], are never stored. A fit scores some images, each unordered pair once; the gradient is
written where the scores stood and goes through the second pair of products while all of it is still in the cache.
The numbers are those of `losses.pair_bce` of `forms.SymmetricForm`, up to the order of sums.

Shapes: S fits of the first axis (variants × seeds), V variants, L layers, B images, T tokens, D width,
P = T (T - 1) / 2 pairs i < j of an image, T more where a token is paired with itself.
"""

import functools
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
SPARSE = 0.8  # a larger share of counted tokens is not worth the gathering of them (measured by scripts/bench_default.py)
N_GROUPS = 2  # of the images of a batch whose tokens are gathered


class Triangle(NamedTuple):
    """The unordered pairs of T tokens: their tokens, their places in a flat [T * T] matrix, and the way back."""

    first: Tensor  # int64 [P], i
    second: Tensor  # int64 [P], j >= i
    upper: Tensor  # int64 [P], place of (i, j)
    lower: Tensor  # int64 [P], place of (j, i)
    pair: Tensor  # int64 [T * T], number of the pair at a place, P where none counts


class PairGroup(NamedTuple):
    """Some images of a batch, for one variant, each with the tokens that count there and perhaps some more.

    tokens: int64 [b * T'], places of their tokens in the batch's flat [B * T]; None: all tokens of all images, in order.
    weight, weight_same: [b, P'], w and w * y of the pairs, with y = 1 for pairs of one object; a pair that does not count
        has w = 0.
    where: the pairs of T' tokens.
    """

    tokens: Tensor | None
    weight: Tensor
    weight_same: Tensor
    where: Triangle

    def take(self, x: Tensor) -> Tensor:
        """Of x [B, T, ...] what the group reads, [b, T', ...]."""
        if self.tokens is None:
            return x
        return x.flatten(0, 1).index_select(0, self.tokens).view(len(self.weight), -1, *x.shape[2:])


class PairTerms(NamedTuple):
    """What the loss of a batch counts: that of a fit is sum_p w_p softplus(s_p) - (w y)_p s_p, where w sums to 1.

    groups: of every variant; a variant whose images hold tokens that do not count leaves them out.
    diagonal: whether a token is paired with itself.
    """

    groups: list[list[PairGroup]]
    diagonal: bool


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
    return PairTerms([_variant_groups(identity, of_variant, pairs) for of_variant in used], pairs != "upper")


def _variant_groups(identity: Tensor, used: Tensor, pairs: str) -> list[PairGroup]:
    """Images with few counted tokens and images with many apart, each with as many tokens as the fullest of them counts."""
    n_images, n_tokens = used.shape
    counts = used.sum(1)
    if identity.device.type != "cpu" or counts.double().mean() > SPARSE * n_tokens:
        groups = [_group(identity, used, None, pairs)]
    else:
        order = torch.sort(counts, stable=True).indices
        first = torch.sort(used.to(torch.uint8), dim=1, descending=True, stable=True).indices  # the counted tokens lead
        groups = []
        for images in order.split(-(-n_images // N_GROUPS)):
            most = max(1, int(counts[images].max()))
            groups.append(_group(identity, used, images[:, None] * n_tokens + first[images, :most], pairs))
    total = sum(group.weight.sum() for group in groups).clamp_min(1)
    for group in groups:
        group.weight.div_(total)
        group.weight_same.div_(total)
    return groups


def _group(identity: Tensor, used: Tensor, places: Tensor | None, pairs: str) -> PairGroup:
    """The pairs of the tokens at some places [b, T'] of the batch (None: of all), weighted by how often each counts."""
    if places is not None:
        identity, used = (x.flatten()[places] for x in (identity, used))
    where = triangle(used.shape[1], pairs != "upper", used.device)
    counted = used.to(torch.get_default_dtype())
    weight = counted.index_select(1, where.first) * counted.index_select(1, where.second)  # [b, P']
    if pairs == "all":
        weight *= torch.where(where.first == where.second, 1.0, 2.0)
    same = identity.index_select(1, where.first) == identity.index_select(1, where.second)  # [b, P']
    return PairGroup(None if places is None else places.flatten(), weight, weight * same, where)


def form_bce(
    x: Tensor, weight: Tensor, linear: Tensor | None, bias: Tensor, terms: PairTerms, running: Tensor | None = None
) -> Tensor:
    """Loss of every fit over the pairs of a batch, differentiable by the parameters of the form.

    Args:
        x: tokens [L, B, T, D], float32 or bfloat16; data, not differentiated.
        weight: W, float32 [S, L, D, D].
        linear, bias: w, float32 [S, L, D] (None: zero), and b, float32 [S, L]; a token adds r_i = w.x_i + b / 2 to each of its
            pairs.
        terms: of the batch; S is a multiple of its V variants, variant first.
        running: bool [S, L], the fits whose loss is wanted; that of the others is 0, and so are its gradients.

    Returns:
        [S, L] in nats.
    """
    return _FormBCE.apply(x, weight, linear, bias, terms, running, torch.is_grad_enabled() and weight.requires_grad)


class _FormBCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, linear: Tensor | None, bias: Tensor, terms: PairTerms, running: Tensor | None,
        differentiate: bool,
    ) -> Tensor:  # fmt: skip
        loss = weight.new_zeros(weight.shape[:2])
        parameters = tuple(None if p is None else p.detach() for p in (weight, linear, bias))
        gradients = tuple(None if p is None else torch.zeros_like(p) for p in parameters) if differentiate else None
        ctx.running = torch.ones_like(loss, dtype=torch.bool) if running is None else running
        work = functools.partial(_fit_losses, x, parameters, terms, loss, gradients)
        fits = ctx.running.nonzero().tolist()  # layer by layer of one fit, so that shares cost about the same
        if x.device.type == "cpu" and x.shape[-1] < WIDE:
            share_threads(work, fits)
        else:  # products of wide tokens, and a GPU, spread one fit over all there is
            work(fits)
        ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # they are scaled in place, so they serve once
        if gradients is None:
            raise RuntimeError("the loss of a form was computed without gradients and cannot be differentiated")
        if not bool(((grad == 1) | ~ctx.running).all()):
            for of_parameter in (g for g in gradients if g is not None):
                of_parameter.mul_(grad.view(*grad.shape, *[1] * (of_parameter.ndim - 2)))
        return None, *gradients, None, None, None


@torch.no_grad()
def _fit_losses(
    x: Tensor, parameters: Sequence[Tensor | None], terms: PairTerms, loss: Tensor, gradients: Sequence[Tensor | None] | None,
    fits: Sequence[tuple[int, int]],
) -> None:  # fmt: skip
    """Write the loss of some (fit, layer) of a stack into `loss` [S, L], and those of W, w and b into `gradients`."""
    weight, linear, bias = parameters
    n_seeds, dim, scale = len(weight) // len(terms.groups), x.shape[-1], 0.5 * x.shape[-1] ** -0.5
    for s, layer in fits:
        folded = fold_form(weight[s, layer], form_cuts(x).blocks, x.dtype)
        for number, group in enumerate(terms.groups[s // n_seeds]):
            tokens, where = group.take(x[layer]), group.where  # [b, T', D]
            ends = (0.5 * bias[s, layer]).expand(tokens.shape[:2])  # [b, T']
            if linear is not None:
                ends = ends + (tokens @ linear[s, layer].to(x.dtype)).to(weight.dtype)
            cuts = form_cuts(tokens[None])
            z, ends_grad = x.new_empty(cuts.n_images, *tokens.shape[1:]), weight.new_empty(ends.shape)
            packed = weight.new_zeros(cuts.n_images, len(where.upper) + 1)  # the last column stays 0: places that do not count
            for first in range(0, len(tokens), cuts.n_images):
                part = slice(first, first + cuts.n_images)
                half = form_products(tokens[part], folded, cuts, z).to(weight.dtype)  # [b, T', T']
                n_images, n_tokens = half.shape[:2]
                half = torch.add(ends[part, :, None], half, alpha=scale, out=half).view(n_images, -1)
                scores = half.index_select(1, where.upper).add_(half.index_select(1, where.lower))  # [b, P']
                w, w_same = group.weight[part], group.weight_same[part]
                loss[s, layer] += F.softplus(scores).view(-1) @ w.view(-1) - scores.view(-1) @ w_same.view(-1)
                if gradients is None:
                    continue
                torch.sub(scores.sigmoid_().mul_(w), w_same, out=packed[:n_images, :-1])
                grad = torch.index_select(packed[:n_images], 1, where.pair, out=half).view(-1, n_tokens, n_tokens)
                if terms.diagonal:  # a token's score with itself holds both of its halves
                    grad.diagonal(dim1=1, dim2=2).mul_(2)
                torch.sum(grad, -1, out=ends_grad[part])
                grad = grad.mul_(scale).to(x.dtype)
                add_form_gradient(gradients[0][s, layer], tokens[part], grad, cuts, z, first=number == first == 0)
            if gradients is not None:
                gradients[2][s, layer] += 0.5 * ends_grad.sum()
            if gradients is not None and linear is not None:
                gradients[1][s, layer] += ends_grad.view(-1).to(x.dtype) @ tokens.view(-1, dim)
        if gradients is not None:
            mirror_blocks(gradients[0][s, layer], cuts)
