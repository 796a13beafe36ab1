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
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from forms import fold_form, form_cuts, form_gradient, mirror_blocks, turn_tokens
from machine import even_parts, share_threads
from pairs.losses import PAIR_SETS

WIDE = 512  # from this width on the products of one fit keep all threads busy
SPARSE = 0.8  # a larger share of counted tokens is not worth the gathering of them (measured by scripts/bench_default.py)
LINE = 16  # numbers of float32 in a line of a processor's cache
N_GROUPS = 2  # of the images of a batch whose tokens are gathered


class Triangle(NamedTuple):
    """The unordered pairs of T tokens: their places in a flat [T * T] matrix, and the way back."""

    upper: Tensor  # int64 [P], place of (i, j), j >= i
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

    @property
    def aligned(self) -> bool:
        """Whether the arrays of every layer begin at a line of the cache, however many layers lie behind each other.

        The last bits of MKL's products depend on where their arrays begin.
        """
        n_tokens = math.isqrt(len(self.where.pair))
        return n_tokens % 4 == 0 and len(self.weight) * n_tokens % LINE == 0

    def take(self, x: Tensor) -> Tensor:
        """Of tokens x [K, B, T, D] those the group reads, [K, b, T', D]."""
        if self.tokens is None:
            return x
        return x.flatten(1, 2).index_select(1, self.tokens).unflatten(1, (len(self.weight), -1))


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
    return Triangle(upper, lower, pair)


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
            most = min(n_tokens, 4 * -(-max(1, int(counts[images].max())) // 4))  # a multiple of 4: `PairGroup.aligned`
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
    counted, identity = used.to(torch.get_default_dtype()), identity.double()  # exact, and much faster to compare than integers
    weight = (counted.unsqueeze(2) * counted.unsqueeze(1)).flatten(1).index_select(1, where.upper)  # [b, P']
    if pairs == "all":
        weight *= torch.where(where.upper == where.lower, 1.0, 2.0)
    same = torch.eq(identity.unsqueeze(2), identity.unsqueeze(1), out=counted.new_empty(*used.shape, used.shape[1]))
    same = same.flatten(1).index_select(1, where.upper)  # [b, P']
    return PairGroup(None if places is None else places.flatten(), weight, same.mul_(weight), where)


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
        work = functools.partial(_layers_losses, x, parameters, terms, loss, gradients)
        # A share is some layers of one fit, so that it has one shape. How many must not change a number.
        rows = [[layer for layer, runs in enumerate(of_fit) if runs] for of_fit in ctx.running.tolist()]
        aligned = x.shape[-1] % LINE == 0 and all(group.aligned for groups in terms.groups for group in groups)
        n_layers = max(1, min(form_cuts(x).n_layers, sum(map(len, rows)) // torch.get_num_threads())) if aligned else 1
        shares = [(s, some) for s, layers in enumerate(rows) for some in even_parts(layers, n_layers)]
        if x.device.type == "cpu" and x.shape[-1] < WIDE:
            share_threads(work, shares)
        else:  # products of wide tokens, and a GPU, spread one fit over all there is
            for share in shares:
                work(share)
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
def _layers_losses(
    x: Tensor, parameters: Sequence[Tensor | None], terms: PairTerms, loss: Tensor, gradients: Sequence[Tensor | None] | None,
    share: tuple[int, Sequence[int]],
) -> None:  # fmt: skip
    """Of the s-th fit of K layers, share = (s, layers): losses into `loss` [S, L], gradients by W, w, b into `gradients`."""
    s, layers = share
    rows = slice(layers[0], layers[-1] + 1) if layers[-1] - layers[0] < len(layers) else list(layers)  # a slice copies nothing
    x, (weight, linear, bias) = x[rows], (None if p is None else p[s, rows] for p in parameters)  # [K, ...]
    form_grad, linear_grad, bias_grad = (None if g is None else g[s, rows] for g in gradients or (None, None, None))
    total, blocks = torch.zeros_like(bias), form_cuts(x).blocks
    folded = fold_form(weight, blocks, x.dtype)
    for number, group in enumerate(terms.groups[s // (len(loss) // len(terms.groups))]):
        all_tokens, where = group.take(x), group.where
        n_images = form_cuts(all_tokens).n_images
        for first in range(0, all_tokens.shape[1], n_images):
            part = slice(first, first + n_images)
            tokens, w, w_same = all_tokens[:, part], group.weight[part], group.weight_same[part]  # [K, b, T', D], [b, P']
            n_layers, n_taken, n_tokens, dim = tokens.shape
            z = torch.empty_like(tokens)
            turn_tokens(tokens, folded, blocks, z)
            if linear is not None:  # (U'x_i + w).x_j, once with i and j exchanged, holds the linear term of both
                z.add_(linear[:, None, None])
            half = torch.bmm(z.flatten(0, 1), tokens.flatten(0, 1).mT).to(weight.dtype).flatten(1)  # [K b, T' T']
            scores = half.index_select(1, where.upper).add_(half.index_select(1, where.lower))  # [K b, P']
            scores = scores.view(n_layers, -1).add_(bias[:, None])  # [K, b P']
            # Sums over a row each: a product with the weights would round differently with the number of layers.
            total += F.softplus(scores).mul_(w.flatten()).sum(1) - (scores * w_same.flatten()).sum(1)
            if gradients is None:
                continue
            packed = weight.new_zeros(n_layers, n_taken, len(where.upper) + 1)  # the last column: places that do not count
            pair_grad = packed[..., :-1]
            torch.sub(scores.sigmoid_().view_as(pair_grad).mul_(w), w_same, out=pair_grad)
            bias_grad += pair_grad.sum((1, 2))
            grad = torch.index_select(packed.flatten(0, 1), 1, where.pair, out=half).view(-1, n_taken, n_tokens, n_tokens)
            if terms.diagonal:  # a token's score with itself holds both of its halves
                grad.diagonal(dim1=-2, dim2=-1).mul_(2)
            form_gradient(tokens, grad.to(x.dtype), blocks, form_grad, z, first=number == first == 0)
            if linear is not None:
                linear_grad += z.view(dim, n_layers, -1).sum(-1, dtype=weight.dtype).mT
    loss[s, rows] = total
    if gradients is not None:
        mirror_blocks(form_grad, blocks)
        for of_all, of_share in zip(gradients, (form_grad, linear_grad, bias_grad), strict=True):
            if of_all is not None and not isinstance(rows, slice):  # else it was written in place
                of_all[s, rows] = of_share
