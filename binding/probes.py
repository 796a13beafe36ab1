"""Probes of binding: which conjunctions (or features) an image holds, bit by bit, each given the true bits before it.

    BINDING_PROBES (below the classes), every one forward(tokens [L, B, T, D], code [B, K]) -> log-odds [S, L, B, K]
      linear                     z.w_k + bits.v_k + b_k
      dnn, dnn_concat            an independent MLP per bit
      quadratic_concat           a form of rank r per bit
      quadratic_concat_reuse     the same, its weights on z shared between conjunctions with a feature in common
      multilinear_concat_reuse   a product of one factor per feature group
      attention_quadratic        one query per bit pools the patch tokens; a form of rank r reads the pool

z is the image's tokens end to end (`model.output_mode`: cls and mean_spatial T = 1, cls_mean T = 2, all T = N + 1 with CLS
first). Bit k sees the bits i < k as +-0.5 and the others as 0. The published program repeats z for every bit; here the
part of every product that reads z is taken once and the part that reads bits has its weights masked, so memory beyond the
parameters is O(B r K). Forms and initial values: the program behind "Formalizing the Binding Problem" (specification in
the README's references); names end in what they read.

Shapes: S seeds, L layers, B images, T tokens, D width, Z = T D, K bits, G feature groups, r rank, h hidden.
"""

import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from binding.base import BindingProbe, seen_bits, widen
from errors import UserError
from probes import FitAxes

POOL_ELEMENTS = 2**21  # of pools taken at once by the attention probe (measured: they fit a processor's cache)
KEPT_ELEMENTS = 2**24  # of all pools and scores of a step that are kept for the gradient; beyond, they are computed again


class BindingLinear(BindingProbe):
    """z.w_k + sum_{i<k} (y_i - 0.5) v_ik + b_k. Unlike the published one it has no v at all when unconditioned."""

    def __init__(self, fits: FitAxes, dim: int, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        n_image = dim * self.n_tokens
        self.weight_image = self.draw(n_image, self.n_bits, bound=n_image**-0.5)
        self.weight_bits = self.draw(self.n_bits, self.n_bits, bound=self.n_bits**-0.5) if self.condition_readout else None
        self.bias = self.draw(self.n_bits)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """See the module."""
        scores = self.from_image(self.prepare(x), self.weight_image)
        if self.weight_bits is not None:
            scores = scores + self.from_bits(code, self.weight_bits)
        return scores + self.bias[:, :, None]


class DNN(BindingProbe):
    """An independent MLP per bit on (z, bits seen): hidden layers with GELU and dropout, one linear output.

    Args:
        dnn_hidden_dim: h; None = max(128, min(1024, number of inputs)).
        dnn_num_layers: layers with the output; 1 = a linear head.
        dnn_dropout: share of hidden units dropped while training. Which ones depends on the fit and the batch alone, so
            a fit is the same alone and in a stack, and after a restart.
    """

    def __init__(
        self,
        fits: FitAxes,
        dim: int,
        *,
        n_bits: int,
        dnn_hidden_dim: int | None = None,
        dnn_num_layers: int = 3,
        dnn_dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(fits, dim, n_bits=n_bits, **options)
        if dnn_num_layers < 1:
            raise UserError(f"probe.dnn_num_layers is {dnn_num_layers}; it counts the output layer, so at least 1")
        self.dropout = dnn_dropout
        hidden = max(128, min(1024, self.n_inputs)) if dnn_hidden_dim is None else dnn_hidden_dim
        self.units_per_bit = hidden * dnn_num_layers
        first = hidden if dnn_num_layers > 1 else 1
        self.first_image = self.matrix(dim * self.n_tokens, n_bits, first)
        self.first_bits = self.matrix(n_bits, n_bits, first) if self.condition_readout else None
        self.first_bias = self.draw(n_bits, first)
        widths = [hidden] * (dnn_num_layers - 1) + [1]
        pairs = list(itertools.pairwise(widths))
        self.weights = nn.ParameterList([self.matrix(n_bits, a, b, n_inputs=a) for a, b in pairs])
        self.biases = nn.ParameterList([self.draw(n_bits, b) for _, b in pairs])  # "biases" keeps them free of decay

    def keep(self, shape: torch.Size, x: Tensor, code: Tensor, depth: int) -> Tensor:
        """Which hidden units [S, L, K, B, h] stay, scaled so that the mean stays too."""
        out = torch.empty(shape)
        for s, layer in itertools.product(range(shape[0]), range(shape[1])):
            batch = code.to(torch.uint8).cpu().numpy().tobytes() + x[layer, :, 0, 0].float().cpu().numpy().tobytes()
            text = f"{self.seeds[s]}/{self.layers[layer]}/{depth}/".encode()
            generator = torch.Generator().manual_seed(zlib.crc32(text + batch))
            out[s, layer] = torch.rand(shape[2:], generator=generator)
        return (out >= self.dropout).to(x.device) / (1 - self.dropout)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """See the module."""
        tokens = self.prepare(x)
        out = self.from_image(tokens, self.first_image)  # [S, L, B, K, h]
        if self.first_bits is not None:
            out = out + self.from_bits(code, self.first_bits, head_axis=-2)
        out = out.transpose(2, 3) + self.first_bias[:, :, :, None]  # [S, L, K, B, h]: heads are a batch axis from here
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            out = nn.functional.gelu(out)
            if self.training and self.dropout:
                out = out * self.keep(out.shape, x.detach(), code, depth)
            out = widen(torch.matmul(out.to(tokens.dtype), weight.to(tokens.dtype))) + bias[:, :, :, None]
        return out.squeeze(-1).transpose(2, 3)


class QuadraticConcat(BindingProbe):
    """(1/sqrt d) sum_r (x_k.W1_rk) (x_k.W2_rk) + b_k with x_k = (z, bits seen by k) of length d.

    Args:
        rank: r.
        linear_term: x_k ends in a constant 1. Without it, as published, the form is even: it takes x for -x, and of
            standardised tokens it reads little.
    """

    def __init__(
        self, fits: FitAxes, dim: int, *, n_bits: int, rank: int = 16, linear_term: bool = False, **options: Any
    ) -> None:
        super().__init__(fits, dim, n_bits=n_bits, **options)
        self.weight_image = self.matrix(dim * self.n_tokens, 2, rank, n_bits)
        self.weight_bits = self.matrix(n_bits, 2, rank, n_bits) if self.condition_readout else None
        self.bias, self.units_per_bit = self.draw(n_bits), 2 * rank
        self.factor_bias = self.constant(2, rank, n_bits) if linear_term else None

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """See the module."""
        factors = self.from_image(self.prepare(x), self.weight_image)  # [S, L, B, 2, r, K]
        return self.from_factors(factors, code)


class MultilinearConcatReuse(BindingProbe):
    """(1/sqrt d) sum_r prod_g (z.Wz_g[r, v_g(k)] + bits seen by k.Wy_g[r, k]) + b_k, v_g(k) the value of bit k in group g.

    Args:
        groups: number of values of every feature group; K is their product, the last group varies fastest.
        rank: r.
        linear_term: every factor also sees a constant 1, see `QuadraticConcat`.

    Raises:
        UserError: no groups (the feature code has none), or groups that do not make K conjunctions.
    """

    mode = "multilinear_concat_reuse"

    def __init__(
        self,
        fits: FitAxes,
        dim: int,
        *,
        n_bits: int,
        groups: Sequence[int] | None = None,
        rank: int = 16,
        linear_term: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(fits, dim, n_bits=n_bits, **options)
        if groups is None:
            raise UserError(
                f"probe.mode={self.mode} shares weights between conjunctions and cannot be asked for the feature code; "
                "take linear, dnn, quadratic_concat or attention_quadratic for it"
            )
        self.groups = [int(n) for n in groups]
        if len(self.groups) < 2 or math.prod(self.groups) != n_bits:
            raise UserError(
                f"probe.mode={self.mode} needs at least two feature groups whose sizes multiply to the {n_bits} "
                f"conjunctions, got {self.groups}"
            )
        self.rank = rank
        self.units_per_bit = 2 * rank
        self.weight_image = self.matrix(dim * self.n_tokens, rank * sum(self.groups))  # group by group, [r, N_g] each
        self.weight_bits = self.matrix(n_bits, len(self.groups), rank, n_bits) if self.condition_readout else None
        self.bias = self.draw(n_bits)
        self.factor_bias = self.constant(rank * sum(self.groups)) if linear_term else None

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """See the module."""
        image = self.from_image(self.prepare(x), self.weight_image)
        if self.factor_bias is not None:
            image = image + self.factor_bias[:, :, None]
        image = image.split([self.rank * n for n in self.groups], dim=-1)
        bits = None if self.weight_bits is None else self.from_bits(code, self.weight_bits)  # [S, L, B, G, r, K]
        product: Tensor | None = None
        for g, n_values in enumerate(self.groups):
            shape = [n_values if h == g else 1 for h in range(len(self.groups))]
            factor = image[g].unflatten(-1, (self.rank, *shape))  # [S, L, B, r, 1.., N_g, ..1]
            if bits is not None:
                factor = factor + bits[:, :, :, g].unflatten(-1, self.groups)
            product = factor if product is None else product * factor
        return product.sum(3).flatten(3) * self.n_inputs**-0.5 + self.bias[:, :, None]


class QuadraticConcatReuse(MultilinearConcatReuse):
    """The multilinear form of exactly two groups: W1 reads the value of the first, W2 of the second."""

    mode = "quadratic_concat_reuse"

    def __init__(
        self, fits: FitAxes, dim: int, *, n_bits: int, groups: Sequence[int] | None = None, rank: int = 16, **options: Any
    ) -> None:
        super().__init__(fits, dim, n_bits=n_bits, groups=groups, rank=rank, **options)
        if len(self.groups) != 2:
            raise UserError(
                f"probe.mode={self.mode} needs exactly two feature groups, got {len(self.groups)} ({self.groups}); "
                "take multilinear_concat_reuse"
            )


class AttentionQuadratic(BindingProbe):
    """Query k pools the patch tokens by softmax attention; a form of rank r reads (CLS, pool, bits seen by k).

    program: q_k = Wq (base_k + sum_{i<k} (y_i - 0.5) e_i), weights softmax(q_k.t_n / sqrt D) over the patch tokens,
        x_k = (CLS, pool_k, bits), logit = (1/sqrt d) sum_r (x_k.W1_rk) (x_k.W2_rk) + b_k, d = 2D + K.
    paper: no Wq, no 1/sqrt D in the attention and x_k = pool_k alone (as its notes describe it; they leave the scale of
        the form open, 1/sqrt D is kept). `condition_readout` has nothing to act on.

    Args:
        rank: r.
        condition_query: let the query of bit k see the bits before it (published switch `use_conditioned_query`).
        readout: "program" or "paper".
        linear_term: x_k ends in a constant 1, see `QuadraticConcat`.

    Raises:
        UserError: tokens without patches.
    """

    def __init__(
        self,
        fits: FitAxes,
        dim: int,
        *,
        n_bits: int,
        n_tokens: int,
        rank: int = 16,
        condition_query: bool = True,
        condition_readout: bool = True,
        readout: str = "program",
        linear_term: bool = False,
        **options: Any,
    ) -> None:
        if n_tokens < 3:
            raise UserError(
                f"probe.mode=attention_quadratic attends to patch tokens, got {n_tokens} token(s) per image; "
                "set model.output_mode=all"
            )
        if readout not in ("program", "paper"):
            raise UserError(f"unknown probe.readout '{readout}'; valid: program, paper")
        program = readout == "program"
        options.update(n_bits=n_bits, n_tokens=n_tokens, condition_readout=condition_readout and program)
        super().__init__(fits, dim, **options)
        self.rank, self.temperature = rank, dim**-0.5 if program else 1.0
        self.units_per_bit = 2 * rank
        self.n_inputs = (2 * dim if program else dim) + (n_bits if self.condition_readout else 0)
        self.query_base = self.matrix(n_bits, dim, n_inputs=dim)
        self.query_bits = self.matrix(n_bits, dim, n_inputs=dim) if condition_query else None
        self.query_map = self.draw(dim, dim, bound=dim**-0.5) if program else None
        self.weight_class = self.matrix(dim, 2, rank, n_bits) if program else None
        self.weight_pool = self.matrix(n_bits, dim, 2, rank)
        self.weight_bits = self.matrix(n_bits, 2, rank, n_bits) if self.condition_readout else None
        self.bias = self.draw(n_bits)
        self.factor_bias = self.constant(2, rank, n_bits) if linear_term else None

    def pooled_factors(
        self, tokens: Tensor, code: Tensor, base: Tensor, offsets: Tensor | None, weight: Tensor
    ) -> Tensor:
        """What the pools of some images of one fit give to the two factors of the form.

        A query is the sum of a base and of what each known bit adds: one product of all images with the K additions.

        Args:
            tokens: standardised [b, T, D] of one layer, CLS first, which is no patch.
            code: [b, K].
            base: [K, D] queries before any bit is known.
            offsets: [K, D] what a known bit adds to the queries of the bits after it.
            weight: [K, D, 2 r].

        Returns:
            float32 [b, K, 2 r].
        """
        patches, queries = tokens[:, 1:], base.expand(len(tokens), *base.shape)  # [b, N, D], [b, K, D]
        if offsets is not None:
            seen = seen_bits(self.n_bits, code.device).to(offsets.dtype)
            known = seen.mT * (code.to(offsets.dtype) - 0.5).unsqueeze(1)  # [b, K, K]: row k holds the bits i < k
            queries = queries + (known.flatten(0, 1) @ offsets).view_as(queries)
        queries = (queries * self.temperature).to(tokens.dtype)
        attention = widen(torch.bmm(queries, patches.mT)).softmax(-1).to(tokens.dtype)  # [b, K, N]
        pools = torch.bmm(attention, patches)  # [b, K, D]
        return widen(torch.bmm(pools.transpose(0, 1), weight.to(tokens.dtype)).transpose(0, 1))

    def pooled_again(self, *inputs: Any) -> Tensor:
        """`pooled_factors` that keeps nothing for the gradient and is computed again for it."""
        return checkpoint(self.pooled_factors, *inputs, use_reentrant=False, preserve_rng_state=False)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """See the module. Large pools are taken over some images at a time, and taken again for the gradient.

        The whitening map acts on the few weights that meet the patches, not on the many patches.
        """
        n_layers, n_images, n_tokens, dim = x.shape
        base, offsets, pool = self.query_base, self.query_bits, self.weight_pool.flatten(-2)  # pool: [S, L, K, D, 2 r]
        if self.query_map is not None:
            base = base @ self.query_map.mT
            offsets = None if offsets is None else offsets @ self.query_map.mT
        if self.whiten is not None:
            base, offsets = (q if q is None else q @ self.token_map for q in (base, offsets))
            pool = torch.einsum("lde,slker->slkdr", self.token_map, pool)
        # unbind, not indexing: its gradient stacks the parts instead of adding S L zero-padded ones.
        bases, weights = base.flatten(0, 1).unbind(), pool.flatten(0, 1).unbind()
        all_offsets = [None] * len(bases) if offsets is None else offsets.flatten(0, 1).unbind()
        size = max(1, POOL_ELEMENTS // (self.n_bits * dim))
        small = len(bases) * n_images * self.n_bits * (dim + 4 * n_tokens) <= KEPT_ELEMENTS
        pooled = self.pooled_factors if small else self.pooled_again
        parts: list[list[Tensor]] = [[] for _ in bases]  # of every fit, seed first
        for layer in range(n_layers):
            for some, known in zip(x[layer : layer + 1].split(size, dim=1), code.split(size), strict=True):
                tokens = self.cast(self.standardised(some, slice(layer, layer + 1)))[0]  # [b, T, D], once for all seeds
                for fit in range(layer, len(bases), n_layers):
                    parts[fit].append(pooled(tokens, known, bases[fit], all_offsets[fit], weights[fit]))
        fits = [torch.cat(of_fit) for of_fit in parts]  # [B, K, 2 r] each
        factors = torch.stack(fits).unflatten(0, (-1, n_layers)).transpose(3, 4).unflatten(3, (2, self.rank))
        if self.weight_class is not None:
            factors = factors + self.from_image(self.prepare(x[:, :, :1]), self.weight_class)  # [S, L, B, 2, r, K]
        return self.from_factors(factors, code)


BINDING_PROBES: dict[str, type[BindingProbe]] = {
    "linear": BindingLinear,
    "dnn": DNN,
    "dnn_concat": DNN,
    "quadratic_concat": QuadraticConcat,
    "quadratic_concat_reuse": QuadraticConcatReuse,
    "multilinear_concat_reuse": MultilinearConcatReuse,
    "attention_quadratic": AttentionQuadratic,
}
