"""What every stacked probe is made of: its base, and the products of tokens with the weights of many fits.

    Probe, FitAxes         the base of a stack: one fit per (seed, layer), each with generators of its own
    resolve_matmul_dtype   which number format the products take
    project, pair_scores   tokens through linear maps; dot products within an image
    SymmetricForm          x_i' (W + W') x_j for all pairs, the product everything waits for
    factorise              eigenvalues and ranks of a fitted form

Shapes: S seeds, L layers, B images, T tokens, U tokens of a second set, D width, K outputs.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from machine import multiplies_bfloat16
from runs.states import save_state

Layer = int | str  # "embed" or a block index
BFLOAT16_FROM = 192  # channels from which the casts pay (measured by scripts/bench_fit.py)


def resolve_matmul_dtype(name: str, device: torch.device, dim: int, bfloat16_from: int = BFLOAT16_FROM) -> torch.dtype:
    """Number format of the matrix products; weights, sums over fits and the optimiser stay float32.

    `auto` is bfloat16 where the processor multiplies it natively (AMX or AVX512-BF16, CUDA from compute capability 8)
    and the tokens have at least `bfloat16_from` channels, enough for the casts to pay, else float32.

    Raises:
        UserError: unknown name.
    """
    if name in ("float32", "bfloat16"):
        return getattr(torch, name)
    if name != "auto":
        raise UserError(f"unknown probe.matmul_dtype '{name}'; valid: auto, float32, bfloat16")
    return torch.bfloat16 if dim >= bfloat16_from and multiplies_bfloat16(device) else torch.float32


class FitAxes(NamedTuple):
    """The two leading axes of a stack: one fit per (seed, layer)."""

    seeds: Sequence[int]
    layers: Sequence[Layer]  # "embed" or a block index; only a name here


def fit_generator(seed: int, layer: Layer, number: int) -> torch.Generator:
    """The generator of the n-th parameter of one fit: it depends on nothing but (seed, layer, n), stacked or alone."""
    digest = hashlib.sha256(f"{seed}/{layer}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Probe(nn.Module):
    """Base of every stacked probe.

    Args:
        fits: seeds and layers; every parameter has shape [S, L, ...].
        dim: width D of a token.
        standardize: subtract a mean and divide by a deviation per layer and channel, given by `set_statistics`.
        matmul_dtype: auto | float32 | bfloat16, see `resolve_matmul_dtype`.
    """

    bfloat16_from: ClassVar[int] = BFLOAT16_FROM
    arity: ClassVar[str]  # "pairwise" reads two tokens, "pointwise" one, "codes" all tokens of an image
    recipe: dict[str, Any]  # settings it was built from, written into checkpoints
    facts: dict[str, Any]  # what a loaded checkpoint holds beside its parameters

    def __init__(self, fits: FitAxes, dim: int, *, standardize: bool = False, matmul_dtype: str = "auto") -> None:
        super().__init__()
        self.seeds, self.layers, self.dim = list(fits.seeds), list(fits.layers), int(dim)
        self.needs_statistics, self.matmul_dtype = bool(standardize), matmul_dtype
        resolve_matmul_dtype(matmul_dtype, torch.device("cpu"), dim)  # a wrong name fails here, not in the first batch
        self.facts = {}
        self._drawn = 0
        if standardize:
            self.register_buffer("token_shift", torch.zeros(len(self.layers), dim))
            self.register_buffer("token_scale", torch.ones(len(self.layers), dim))

    @property
    def trained(self) -> bool:
        """Whether there is anything to fit."""
        return any(p.requires_grad for p in self.parameters())

    @property
    def solver(self) -> str:
        """How it is fitted: "descent" by the optimiser, "newton" to the optimum of its loss (`Task.solve`)."""
        return "descent"

    @property
    def needs_correlation(self) -> bool:
        """Whether it also takes the correlation of the channels of its training tokens (`set_correlation`)."""
        return False

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters of the whole stack."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def draw(self, *shape: int, bound: float | None = None, std: float | None = None) -> nn.Parameter:
        """A parameter [S, L, *shape]: uniform in +-bound, normal of deviation std, or zero; every fit draws for itself.

        The n-th call draws from the fit's n-th generator, so the order of the calls is part of what a seed means.
        """
        value = torch.zeros(len(self.seeds), len(self.layers), *shape)
        for (s, seed), (i, layer) in itertools.product(enumerate(self.seeds), enumerate(self.layers)):
            generator = fit_generator(seed, layer, self._drawn)
            if bound is not None:
                value[s, i].uniform_(-bound, bound, generator=generator)
            elif std is not None:
                value[s, i].normal_(0.0, std, generator=generator)
        self._drawn += 1
        return nn.Parameter(value)

    def outputs_per_token(self, n_tokens: int) -> int:
        """Numbers a stack holds per fit, layer and token when it answers, for the estimate of its memory."""
        return n_tokens

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Store the channel statistics [L, D] of the training tokens (standardize=True only)."""
        if not self.needs_statistics:
            raise ValueError("this probe was built with standardize=False")
        self.token_scale.copy_(1 / std)
        self.token_shift.copy_(-mean / std)

    def prepare(self, x: Tensor, layers: slice = slice(None)) -> Tensor:
        """Tokens [L, B, T, D] of these layers as the products read them: standardised in float32, then cast."""
        if self.needs_statistics:
            x = torch.addcmul(self.token_shift[layers, None, None], x.float(), self.token_scale[layers, None, None])
        return x.to(resolve_matmul_dtype(self.matmul_dtype, x.device, self.dim, self.bfloat16_from)).contiguous()

    def save(self, path: Path, **facts: Any) -> None:
        """Write parameters, buffers, recipe and any JSON-able facts into one file, whole or not at all (`runs.states`).

        Raises:
            UserError: a weight is not finite, or the file cannot be written.
        """
        save_state(Path(path), self.state_dict(), {**self.recipe, "facts": facts})


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


class FormCuts(NamedTuple):
    """How the products of a symmetric form are cut so that a processor's cache holds what they work on."""

    blocks: list[tuple[int, int]]  # [start, stop) of the channels
    n_images: int  # at a time
    n_layers: int  # at a time; more than one only where all images are taken at once


def form_cuts(x: Tensor) -> FormCuts:
    """Cuts for tokens x [L, B, T, D].

    On a CPU two blocks from D = 128 on (float32), four from D = 512 on; 4 M channels of tokens and 256 k pairs at a time (all
    measured by scripts/bench_fit.py). Where the images of a batch are fewer than that, several layers share every call: a
    small call costs more than its arithmetic. A GPU prefers one product a layer.
    """
    n_layers, n_images, n_tokens, dim = x.shape
    if x.device.type != "cpu":
        return FormCuts([(0, dim)], n_images, 1)
    size = -(-dim // (4 if dim >= 512 else 2 if dim >= 128 and x.dtype != torch.bfloat16 else 1))
    blocks = [(start, min(start + size, dim)) for start in range(0, dim, size)]
    at_once = min(max(1, 2**22 // (n_tokens * dim)), max(1, 2**18 // n_tokens**2))
    return FormCuts(blocks, min(n_images, at_once), min(n_layers, max(1, at_once // max(1, n_images))))


def fold_form(weight: Tensor, blocks: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    """The columns of U [K, D, D], block by block, with x'Uy + y'Ux = x'(W + W')y / (2 sqrt D), for K matrices W [K, D, D].

    Only W + W' matters in a symmetric form, so the part of W below its block diagonal is added to the part above and
    nothing is lost: every block reads the channels up to its own end.
    """
    scale = 0.5 * weight.shape[-1] ** -0.5
    folded = []
    for start, stop in blocks:
        columns = weight[:, :stop, start:stop] * scale
        columns[:, :start].add_(weight[:, start:stop, :start].mT, alpha=scale)
        folded.append(columns.to(dtype))
    return folded


def turn_tokens(tokens: Tensor, folded: Sequence[Tensor], blocks: Sequence[tuple[int, int]], z: Tensor) -> None:
    """Write U'x_i of the folded U of `fold_form` into z [K, B, T, D] like the tokens x [K, B, T, D]."""
    flat, z = tokens.flatten(1, 2), z.flatten(1, 2)  # [K, BT, D]
    for (start, stop), columns in zip(blocks, folded, strict=True):
        torch.bmm(flat[..., :stop], columns, out=z[..., start:stop])


def form_gradient(
    tokens: Tensor, gradient: Tensor, blocks: Sequence[tuple[int, int]], out: Tensor, z: Tensor, *, first: bool
) -> None:
    """Add X' G X / (2 sqrt D) to the blocks of `out` [K, D, D] on and above the diagonal; the first part of a batch overwrites.

    Args:
        tokens: X [K, B, T, D].
        gradient: symmetric G [K, B, T, T], in the number format of the tokens.
        z: work space of as many numbers as the tokens; X' G is left there, [D, K, B T].
    """
    n_layers, _, _, dim = tokens.shape
    scale = 0.5 * dim**-0.5
    # Channels lead in z, tokens of all images follow: the large product then reads both its sides in order.
    of_images = z.view(dim, -1, tokens.shape[2])  # [D, KB, T]
    torch.bmm(tokens.flatten(0, 1).mT, gradient.flatten(0, 1), out=of_images.transpose(0, 1))
    turned, flat = z.view(dim, n_layers, -1).transpose(0, 1), tokens.flatten(1, 2)  # [K, D, BT], [K, BT, D]
    for start, stop in blocks:
        product = torch.bmm(turned[:, start:stop], flat[..., start:])
        block = out[:, start:stop, start:]
        block.copy_(product).mul_(scale) if first else block.add_(product, alpha=scale)


def mirror_blocks(out: Tensor, blocks: Sequence[tuple[int, int]]) -> None:
    """Copy what lies above the block diagonal of `out` [K, D, D] below it."""
    for start, stop in blocks:
        out[:, stop:, start:stop] = out[:, start:stop, stop:].mT


class SymmetricForm(torch.autograd.Function):
    """x_i' (W + W') x_j / (2 sqrt D) for every pair of tokens of an image, without ever forming W + W'.

    The transpose is taken of the [T, T] scores instead, and because only W + W' matters, the part of W below its block
    diagonal is folded onto the part above: wide tokens need 5/8 of the multiplications, forward and backward. Fits go
    one after the other, some images and layers at a time, through one buffer that a processor's cache can hold, so working
    memory does not grow with the stack.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Tokens x [L, B, T, D] (float32 or bfloat16), weight float32 [S, L, D, D] -> float32 [S, L, B, T, T]."""
        n_layers, n_images, n_tokens, _ = x.shape
        cuts = form_cuts(x)
        half = weight.new_empty(len(weight), n_layers, n_images, n_tokens, n_tokens)
        for tokens, of_fits, images, s in _parts(x, cuts, len(weight)):
            z = torch.empty_like(tokens)
            if images.start == 0:
                folded = fold_form(weight[s, of_fits], cuts.blocks, x.dtype)
            turn_tokens(tokens, folded, cuts.blocks, z)
            half[s, of_fits, images] = torch.matmul(z, tokens.mT)
        ctx.save_for_backward(x)
        return half + half.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Gradient of the weights alone, [S, L, D, D]: tokens are data. It is symmetric, so half of it is computed."""
        if ctx.needs_input_grad[0]:
            raise NotImplementedError("the symmetric form has no gradient for its tokens")
        (x,) = ctx.saved_tensors
        dim = x.shape[-1]
        cuts = form_cuts(x)
        half = (grad + grad.mT).to(x.dtype)  # [S, L, B, T, T]
        out = grad.new_empty(*grad.shape[:2], dim, dim)
        for tokens, of_fits, images, s in _parts(x, cuts, len(grad)):
            z = torch.empty_like(tokens)
            form_gradient(tokens, half[s, of_fits, images], cuts.blocks, out[s, of_fits], z, first=images.start == 0)
        mirror_blocks(out.flatten(0, 1), cuts.blocks)
        return None, out


def _parts(x: Tensor, cuts: FormCuts, n_fits: int) -> Iterator[tuple[Tensor, slice, slice, int]]:
    """The cuts of tokens x [L, B, T, D], for every fit of a layer: tokens [K, b, T, D], their layers and images, the fit."""
    for first, s in itertools.product(range(0, len(x), cuts.n_layers), range(n_fits)):
        layers = slice(first, first + cuts.n_layers)
        for start in range(0, x.shape[1], cuts.n_images):
            images = slice(start, start + cuts.n_images)
            yield x[layers, images], layers, images, s


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
