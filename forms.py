"""Arithmetic of stacked probes: products of tokens with the weights of many fits, and forms of pairs of tokens.

    resolve_matmul_dtype   which number format the products take
    project, pair_scores   tokens through linear maps; dot products within an image
    SymmetricForm          x_i' (W + W') x_j for all pairs, the product everything waits for
    factorise              eigenvalues and ranks of a fitted form

Shapes: S seeds, L layers, B images, T tokens, U tokens of a second set, D width, K outputs.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errors import UserError
from machine import multiplies_bfloat16


def resolve_matmul_dtype(name: str, device: torch.device, dim: int) -> torch.dtype:
    """Number format of the matrix products; weights, sums over fits and the optimiser stay float32.

    `auto` is bfloat16 where the processor multiplies it natively (AMX or AVX512-BF16, CUDA from compute capability 8)
    and the tokens are wide enough for the casts to pay (D >= 192, measured by scripts/bench_fit.py), else float32.

    Raises:
        UserError: unknown name.
    """
    if name in ("float32", "bfloat16"):
        return getattr(torch, name)
    if name != "auto":
        raise UserError(f"unknown probe.matmul_dtype '{name}'; valid: auto, float32, bfloat16")
    return torch.bfloat16 if dim >= 192 and multiplies_bfloat16(device) else torch.float32


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Tokens through the linear maps of their layer: x [L, B, T, D], weight [S, L, K, D] -> [S, L, B, T, K] like x."""
    n_layers, n_images, n_tokens, dim = x.shape
    n_seeds, _, n_out, _ = weight.shape
    # Seeds are columns of one product per layer, so the tokens are read once and never copied per seed.
    columns = weight.transpose(0, 1).reshape(n_layers, n_seeds * n_out, dim).to(x.dtype)
    out = torch.bmm(x.reshape(n_layers, n_images * n_tokens, dim), columns.mT)  # [L, BT, SK]
    return out.view(n_layers, n_images, n_tokens, n_seeds, n_out).permute(3, 0, 1, 2, 4)


def token_scores(x: Tensor, weight: Tensor) -> Tensor:
    """w.x for every token: x [L, B, T, D], weight [S, L, D] -> float32 [S, L, B, T]."""
    return project(x, weight.unsqueeze(2)).squeeze(-1).float()


def sum_scores(x: Tensor, y: Tensor | None, weight: Tensor) -> Tensor:
    """w.x_i + w.y_j -> float32 [S, L, B, T, U]."""
    rows = token_scores(x, weight)
    columns = rows if y is None else token_scores(y, weight)
    return rows.unsqueeze(-1) + columns.unsqueeze(-2)


def pair_scores(z: Tensor, y: Tensor) -> Tensor:
    """z_i . y_j in every image: z [S, L, B, T, D], y [L, B, U, D] or [S, L, B, U, D] -> float32 [S, L, B, T, U]."""
    if y.ndim == z.ndim:
        return torch.matmul(z, y.mT).float()
    n_seeds, n_layers, n_images, n_tokens, dim = z.shape
    # Seeds are rows of one product per image: [L B, T S, D] x [L B, D, U].
    rows = z.permute(1, 2, 3, 0, 4).reshape(n_layers * n_images, n_tokens * n_seeds, dim)
    out = torch.bmm(rows, y.reshape(n_layers * n_images, -1, dim).mT)
    return out.view(n_layers, n_images, n_tokens, n_seeds, -1).permute(3, 0, 1, 2, 4).float()


class SymmetricForm(torch.autograd.Function):
    """x_i' (W + W') x_j / (2 sqrt D) for every pair of tokens of an image, without ever forming W + W'.

    The transpose is taken of the [T, T] scores instead, and because only W + W' matters, the part of W below its block
    diagonal is folded onto the part above: wide tokens need 5/8 of the multiplications, forward and backward. Fits go
    one after the other, some images at a time, through one buffer that a processor's cache can hold, so working memory
    does not grow with the stack.
    """

    @staticmethod
    def cuts(x: Tensor) -> tuple[list[tuple[int, int]], int]:
        """Blocks [start, stop) of the channels and number of images at a time for tokens x [L, B, T, D].

        On a CPU four blocks from D = 512 on, and 4 M elements at a time (both measured); a GPU prefers one product.
        """
        _, n_images, n_tokens, dim = x.shape
        if x.device.type != "cpu":
            return [(0, dim)], n_images
        size = -(-dim // 4) if dim >= 512 else dim
        blocks = [(start, min(start + size, dim)) for start in range(0, dim, size)]
        return blocks, min(n_images, max(1, 2**22 // (n_tokens * dim)))

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Tokens x [L, B, T, D] (float32 or bfloat16), weight float32 [S, L, D, D] -> float32 [S, L, B, T, T]."""
        n_layers, n_images, n_tokens, dim = x.shape
        blocks, n_part = SymmetricForm.cuts(x)
        half = torch.empty(len(weight), n_layers, n_images, n_tokens, n_tokens, device=x.device)
        buffer = x.new_empty(n_part, n_tokens, dim)
        for layer, s in itertools.product(range(n_layers), range(len(weight))):
            w, folded = weight[s, layer], []
            for start, stop in blocks:
                columns = w[:stop, start:stop].clone()
                columns[:start] += w[start:stop, :start].mT.contiguous()
                folded.append(columns.to(x.dtype))
            for part, scores in zip(x[layer].split(n_part), half[s, layer].split(n_part), strict=True):
                z = buffer[: len(part)]
                for (start, stop), columns in zip(blocks, folded, strict=True):
                    torch.mm(part.view(-1, dim)[:, :stop], columns, out=z.view(-1, dim)[:, start:stop])
                scores.copy_(torch.bmm(z, part.mT))
        ctx.save_for_backward(x)
        return (half + half.mT).mul_(0.5 * dim**-0.5)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Gradient of the weights alone, [S, L, D, D]: tokens are data. It is symmetric, so half of it is computed."""
        if ctx.needs_input_grad[0]:
            raise NotImplementedError("the symmetric form has no gradient for its tokens")
        (x,) = ctx.saved_tensors
        n_layers, n_images, n_tokens, dim = x.shape
        blocks, n_part = SymmetricForm.cuts(x)
        half = (grad + grad.mT).mul_(0.5 * dim**-0.5).to(x.dtype)  # [S, L, B, T, T]
        out = torch.empty(len(grad), n_layers, dim, dim, device=x.device)
        buffer = x.new_empty(dim * n_part * n_tokens)
        for layer, s in itertools.product(range(n_layers), range(len(grad))):
            parts = zip(x[layer].split(n_part), half[s, layer].split(n_part), strict=True)
            for number, (part, scores) in enumerate(parts):
                # Channels lead in z, tokens of all images follow: the large product then reads both its sides in order.
                z = buffer[: part.numel()].view(dim, len(part), n_tokens)
                torch.bmm(part.mT, scores, out=z.transpose(0, 1))
                for start, stop in blocks:
                    product = torch.mm(z.view(dim, -1)[start:stop], part.view(-1, dim)[:, start:])
                    block = out[s, layer, start:stop, start:]
                    block.add_(product) if number else block.copy_(product)
            for start, stop in blocks:
                out[s, layer, stop:, start:stop] = out[s, layer, start:stop, stop:].mT.contiguous()
        return None, out


class Factors(NamedTuple):
    """Eigenvalues of symmetric forms by falling magnitude, and how many of them matter. Leading axes as given."""

    values: Tensor  # [..., D]
    vectors: Tensor  # [..., D, D], columns
    effective_rank: Tensor  # [...], exp(entropy of |lambda| / sum)
    participation_ratio: Tensor  # [...], (sum lambda^2)^2 / sum lambda^4
    stable_rank: Tensor  # [...], sum lambda^2 / max lambda^2

    def coordinates(self, rank: int) -> tuple[Tensor, Tensor]:
        """W1 = |Lambda|^(1/2) V' [..., rank, D] and its signs [..., rank]: x' M y ~ (W1 x)' diag(sign) (W1 y)."""
        values = self.values[..., :rank]
        return values.abs().sqrt().unsqueeze(-1) * self.vectors[..., :rank].mT, values.sign()


def factorise(form: Tensor) -> Factors:
    """Eigendecomposition of symmetric matrices [..., D, D], in float64 (arXiv 2510.24709: W2 = S W1)."""
    values, vectors = torch.linalg.eigh(form.double())
    order = values.abs().argsort(dim=-1, descending=True)
    values = values.gather(-1, order)
    vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    share = values.abs() / values.abs().sum(-1, keepdim=True)
    square = values.square()
    return Factors(
        values,
        vectors,
        torch.special.entr(share).sum(-1).exp(),
        square.sum(-1).square() / square.square().sum(-1),
        square.sum(-1) / square.amax(-1),
    )
