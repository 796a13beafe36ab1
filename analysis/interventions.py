"""Causing: change the binding part of the tokens after a block, run the remaining blocks, read what has become of it.

The binding part of a token h is b = P h with P = V V', V an orthonormal basis [D, k] of what the probe reads. Every edit
takes patch tokens alone (class and register tokens stay) and a dose from 0, nothing, to 1, all:

    remove    h - dose b
    shuffle   b of a share `dose` of the patches permuted among them, none keeps its own
    inject    b towards the mean b of the object, dose of the way (published alpha is 1 - dose); background stays
    swap      b exchanged between two patches of different objects, dose of the way
    noise     a random vector in place of b: same basis, same variance per direction

A dose of 0 returns the very same tensor. Source: arXiv 2510.24709 (third-party notes of its appendix); no code is public, so
the orthogonal projection, patch tokens alone and the derangement are choices of ours.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backbones.attention import RecordAttention
from backbones.contract import Backbone, Layer
from errors import UserError

Edit = Callable[[Tensor], Tensor]  # patch tokens [B, N, D] -> the same shape


# -------------------------------------------------------------------------------------------------------------- edits


def remove(h: Tensor, basis: Tensor, dose: float) -> Tensor:
    """Tokens [..., D] without a share of what lies in the span of basis [D, k]."""
    return h if dose == 0 else h - dose * (h @ basis @ basis.mT)


def replace_part(h: Tensor, basis: Tensor, other: Tensor) -> Tensor:
    """Tokens h [..., D] with the coordinates `other` [..., k] in the span of basis [D, k] and their own elsewhere."""
    return h + (other - h @ basis) @ basis.mT


def shuffle(h: Tensor, basis: Tensor, order: Tensor) -> Tensor:
    """Tokens [N, D] whose binding parts are permuted: patch i gets that of patch order[i]."""
    return replace_part(h, basis, (h @ basis)[order])


def inject(h: Tensor, basis: Tensor, identity: Tensor, dose: float) -> Tensor:
    """Tokens [N, D] whose binding part moves to the mean of their object; identity [N], 0 (background) is left alone."""
    if dose == 0:
        return h
    z = h @ basis
    target = z.clone()
    for number in identity[identity > 0].unique():
        target[identity == number] = z[identity == number].mean(0)
    return replace_part(h, basis, z + dose * (target - z))


def swap(h: Tensor, basis: Tensor, first: Tensor, second: Tensor, dose: float) -> Tensor:
    """Tokens [N, D] where patches first[i] and second[i] exchange their binding parts; no patch may occur twice."""
    if dose == 0:
        return h
    z = h @ basis
    other = z.clone()
    other[first], other[second] = z[second], z[first]
    return replace_part(h, basis, z + dose * (other - z))


def noise(h: Tensor, basis: Tensor, dose: float, generator: torch.Generator) -> Tensor:
    """Tokens [N, D] whose binding part moves to a random one of the same mean and variance in every direction of the basis."""
    if dose == 0:
        return h
    z = h @ basis
    drawn = torch.randn(z.shape, generator=generator).to(z) * z.std(0) + z.mean(0)
    return replace_part(h, basis, z + dose * (drawn - z))


def derangement(n: int, share: float, generator: torch.Generator, groups: Tensor | None = None) -> Tensor:
    """An order [n] that moves round(share n) of n places along one random cycle and leaves the others.

    Args:
        groups: [n]; with it places move inside their group alone, round(share size) of each; a group of one stays.
    """
    order = torch.arange(n)
    members = [order] if groups is None else [torch.nonzero(groups == g)[:, 0] for g in groups.unique()]
    for places in members:
        moved = places[torch.randperm(len(places), generator=generator)[: round(share * len(places))]]
        if len(moved) > 1:
            order[moved] = moved.roll(1)
    return order


def random_basis(dim: int, rank: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis [D, k] of a random subspace."""
    return torch.linalg.qr(torch.randn(dim, rank, generator=generator))[0]


def variance_basis(tokens: Tensor, rank: int) -> Tensor:
    """The directions [D, k] in which tokens [n, D] vary most."""
    centred = tokens - tokens.mean(0)
    return torch.linalg.eigh(centred.mT @ centred)[1].flip(-1)[:, :rank]


def per_image(edit: Callable[[Tensor, int], Tensor]) -> Edit:
    """An edit of a batch from an edit (tokens [N, D], number of the image in the batch); unchanged images stay as they are."""

    def edited(h: Tensor) -> Tensor:
        before = list(h)
        after = [edit(tokens, number) for number, tokens in enumerate(before)]
        return h if all(a is b for a, b in zip(after, before, strict=True)) else torch.stack(after)

    return edited


# ------------------------------------------------------------------------------------------------------ running blocks


@contextlib.contextmanager
def edited_after(backbone: Backbone, layer: Layer, edit: Edit) -> Iterator[None]:
    """Inside the block, the patch tokens that leave a layer are edited before the next block reads them.

    Raises:
        UserError: a backbone whose blocks are not a list of modules on one sequence of tokens.
    """
    blocks, prefix = _blocks(backbone), backbone.facts.num_prefix_tokens

    def changed(x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise UserError(f"{backbone.facts.name} keeps its tokens as maps between blocks, interventions take sequences")
        patches = x[:, prefix:]
        after = edit(patches)
        return x if after is patches else torch.cat([x[:, :prefix], after.to(x.dtype)], 1)

    if layer == "embed":
        handle = blocks[0].register_forward_pre_hook(lambda _, inputs: (changed(inputs[0]), *inputs[1:]))
    else:
        handle = blocks[int(layer)].register_forward_hook(lambda _, inputs, output: changed(output))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def without_heads(backbone: Backbone, heads: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Inside the block, what these heads of these blocks would add to the tokens is zero."""
    handles = []
    for block, numbers in heads.items():
        attention = getattr(_blocks(backbone)[block], "attn", None)
        if getattr(attention, "proj", None) is None or not getattr(attention, "num_heads", 0):
            raise UserError(f"block {block} of {backbone.facts.name} has no attention heads that can be taken out one by one")
        size = attention.proj.in_features // attention.num_heads
        keep = torch.ones(attention.proj.in_features)
        for number in numbers:
            keep[number * size : (number + 1) * size] = 0
        hook = lambda _, inputs, keep=keep: (inputs[0] * keep.to(inputs[0]),)
        handles.append(attention.proj.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(backbone: Backbone) -> Any:
    blocks = getattr(getattr(backbone, "model", None), "blocks", None)
    if blocks is None:
        raise UserError(f"{backbone.facts.name} has no blocks to intervene in")
    return blocks


@torch.inference_mode()
def run_blocks(
    backbone: Backbone, windows: Tensor, layers: Sequence[Layer], change: Any = None, keep: Callable | None = None
) -> tuple[list[Tensor], list[Any]]:
    """Patch tokens [B, N, D] of the layers, float32 on the CPU, and what `keep` takes of the attention of every block.

    Args:
        change: a context such as `edited_after` or `without_heads`, entered around the pass.
        keep: of attention weights [B, heads, P + N, P + N]; None: nothing is recorded.
    """
    recorder = RecordAttention(keep) if keep is not None else None
    with change or contextlib.nullcontext(), recorder or contextlib.nullcontext():
        tokens = [layer.patch.float().cpu() for layer in backbone(windows, list(layers))]
    return tokens, recorder.weights if recorder is not None else []


# ---------------------------------------------------------------------------------------------------------- read-outs


def flip_rate(before: Tensor, after: Tensor, first: Tensor, second: Tensor, identity: Tensor) -> tuple[int, int]:
    """How many right answers about exchanged patches turn over: (flipped, asked).

    Args:
        before, after: logits [N, N] of one image. first, second: the patches [n] that exchanged their binding parts.
        identity: [N]. Asked are pairs of an exchanged patch with unexchanged patches of either of the two objects whose
            answer was right before; they flip when the answer becomes that of the object the binding part came from.
    """
    flipped = asked = 0
    moved = torch.zeros(len(identity), dtype=torch.bool)
    moved[first], moved[second] = True, True
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        for place, own, new in ((i, identity[i], identity[j]), (j, identity[j], identity[i])):
            others = ~moved & ((identity == own) | (identity == new))
            same = identity[others] == own
            right = (before[place, others] > 0) == same
            asked += int(right.sum())
            flipped += int(((after[place, others] > 0) != same)[right].sum())
    return flipped, asked


def attention_on_object(weights: Tensor, identity: Tensor) -> Tensor:
    """Share of the patch-to-patch attention that stays on the object, per head: weights [B, heads, N, N], identity [B, N].

    Over patches of objects (identity above 0), itself left out; [heads], NaN where no object has two patches.
    """
    n = identity.shape[1]
    other = ~torch.eye(n, dtype=torch.bool)
    same = (identity[:, :, None] == identity[:, None]) & (identity > 0)[:, :, None] & other  # [B, N, N]
    weights = weights * other
    share = (weights * same[:, None]).sum(-1) / weights.sum(-1).clamp_min(1e-12)  # [B, heads, N]
    counted = same.any(-1)[:, None].float()
    return (share * counted).sum((0, 2)) / counted.sum((0, 2))


def ridge_classes(tokens: Tensor, classes: Tensor, n_classes: int, penalty: float = 1e-3) -> Tensor:
    """A linear class read-out [D + 1, C] of tokens [n, D] by least squares to one-hot classes; last row: the offset.

    `penalty` times the mean variance of a channel is added to the covariance. In closed form, so that every layer has one.
    """
    x = torch.cat([tokens, torch.ones(len(tokens), 1)], 1).double()
    covariance = x.mT @ x / len(x)
    covariance += penalty * covariance.diagonal()[:-1].mean() * torch.eye(len(covariance))
    target = torch.nn.functional.one_hot(classes.long(), n_classes).double()
    return torch.linalg.solve(covariance, x.mT @ target / len(x)).float()


def class_accuracy(tokens: Tensor, classes: Tensor, readout: Tensor) -> float:
    """Share of tokens [n, D] whose class the read-out names."""
    return float(((tokens @ readout[:-1] + readout[-1]).argmax(-1) == classes).float().mean())
