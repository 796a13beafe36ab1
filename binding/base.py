"""What every probe of a code is made of: its base, the bits it may see, how its tokens are prepared.

Shapes: S seeds, L layers, B images, T tokens, D width, Z = T D, K bits, r rank.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from forms import resolve_matmul_dtype
from probes import FitAxes, Probe


def seen_bits(n_bits: int, device: torch.device) -> Tensor:
    """mask[i, k] = 1.0 where bit k may see bit i, that is i < k; float32 [K, K]."""
    return torch.ones(n_bits, n_bits, device=device).triu(1)


def widen(x: Tensor) -> Tensor:
    """Products of reduced precision as float32."""
    return x if x.dtype == torch.float64 else x.float()


class BindingProbe(Probe):
    """Base of the probes of a code.

    Args:
        fits, dim: axes of the stack and width of one token.
        n_bits: K, length of the code.
        n_tokens: T, tokens per image.
        condition_readout: let each bit see the bits before it (False: marginals given z). The published program has one
            switch, `use_conditioned_query`, that means this one except for the attention probe.
        init_std: deviation of the normal initial weights, published 0.02; None = 1/sqrt of the number of inputs.
        whiten: s of the map (R + s)^(-1/2) that standardised tokens pass first, R being the correlation of their channels
            over training tokens (`set_correlation`); None = no map. What a probe can express stays the same: descent only
            gets along faster, because the channels of a transformer are far from independent (ours).

    Raises:
        UserError: whitening without standardised channels.
    """

    arity = "codes"
    units_per_bit = 2  # numbers held per bit while answering: hidden units, or two factors of rank r

    def __init__(
        self,
        fits: FitAxes,
        dim: int,
        *,
        n_bits: int,
        n_tokens: int = 1,
        condition_readout: bool = True,
        init_std: float | None = 0.02,
        whiten: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(fits, dim, **options)
        self.n_bits, self.n_tokens, self.condition_readout, self.init_std = n_bits, n_tokens, condition_readout, init_std
        self.n_inputs = dim * n_tokens + (n_bits if condition_readout else 0)
        self.whiten = whiten
        if whiten is not None:
            if not self.needs_statistics:
                raise UserError(f"probe.whiten={whiten} needs standardised channels; set probe.standardize=true or whiten=null")
            self.register_buffer("token_map", torch.eye(dim).repeat(len(self.layers), 1, 1))  # [L, D, D] symmetric

    @property
    def needs_correlation(self) -> bool:
        """See `Probe`."""
        return self.whiten is not None

    def set_correlation(self, correlation: Tensor) -> None:
        """Take the correlation [L, D, D] of the channels of the training tokens (whiten only)."""
        size, axes = torch.linalg.eigh(correlation.double())  # [L, D], [L, D, D]
        scale = (size.clamp_min(0) + self.whiten).rsqrt()
        self.token_map.copy_((axes * scale[:, None]) @ axes.mT)

    def outputs_per_token(self, n_tokens: int) -> int:
        """Hidden units or factors of all bits, spread over the tokens."""
        return math.ceil(self.units_per_bit * self.n_bits / n_tokens)

    def standardised(self, x: Tensor, layers: slice = slice(None)) -> Tensor:
        """Tokens [L, B, T, D] of these layers with standardised channels, as precise as the parameters."""
        x = x.to(next(self.parameters()).dtype)  # float64 after `double()`
        return x * self.token_scale[layers, None, None] + self.token_shift[layers, None, None] if self.needs_statistics else x

    def cast(self, x: Tensor) -> Tensor:
        """Tokens as the products read them; a probe in float64 computes in float64 throughout."""
        dtype = x.dtype if x.dtype == torch.float64 else resolve_matmul_dtype(self.matmul_dtype, x.device, self.dim)
        return x.to(dtype).contiguous()

    def prepare(self, x: Tensor, layers: slice = slice(None)) -> Tensor:
        """Tokens [L, B, T, D] of these layers as the products read them: standardised, whitened, cast."""
        x = self.standardised(x, layers)
        return self.cast(x if self.whiten is None else x @ self.token_map[layers, None])

    def matrix(self, *shape: int, n_inputs: int | None = None) -> nn.Parameter:
        """A normal parameter [S, L, *shape]."""
        return self.draw(*shape, std=(n_inputs or self.n_inputs) ** -0.5 if self.init_std is None else self.init_std)

    def constant(self, *shape: int) -> nn.Parameter:
        """What a constant input 1 adds to the factors of a form: with it the form contains the linear probe (ours)."""
        return self.draw(*shape, std=1.0 if self.init_std is None else self.init_std)

    def from_image(self, x: Tensor, weight: Tensor) -> Tensor:
        """Prepared tokens [L, B, T, D] through weight [S, L, Z, ...] -> float32 [S, L, B, ...]."""
        z = x.flatten(2)  # [L, B, Z]
        return widen(torch.matmul(z, weight.flatten(3).to(x.dtype))).unflatten(-1, weight.shape[3:])

    def from_factors(self, factors: Tensor, code: Tensor) -> Tensor:
        """Logits [S, L, B, K] of a quadratic form: what the image adds to its factors [S, L, B, 2, r, K], and the bits seen."""
        if self.weight_bits is not None:
            factors = factors + self.from_bits(code, self.weight_bits)
        if self.factor_bias is not None:
            factors = factors + self.factor_bias[:, :, None]
        first, second = factors.unbind(3)
        return (first * second).sum(3) * self.n_inputs**-0.5 + self.bias[:, :, None]

    def from_bits(self, code: Tensor, weight: Tensor, head_axis: int = -1) -> Tensor:
        """Bits [B, K] through weight [S, L, K, ...], of which head k reads the rows i < k -> float32 [S, L, B, ...].

        Args:
            code: zeros and ones of any type.
            weight: rows are bits seen.
            head_axis: the (negative) axis of the weight that counts heads.
        """
        mask = seen_bits(self.n_bits, weight.device)
        shape = [self.n_bits] + [1] * (weight.ndim - 3)
        shape[head_axis] = self.n_bits
        bits = code.to(weight.dtype) - 0.5
        return torch.matmul(bits, (weight * mask.view(shape)).flatten(3)).unflatten(-1, weight.shape[3:])
