"""Every fitted probe as one formula: what the explorer page computes, whatever the probe.

For tokens x, y of one layer and every seed s

    logit_s(x, y) = g(x)' M_s g(y) + u_s.g(x) + v_s.g(y) + b_s,     score = mean over s of link(logit_s)

where g standardises a token and then leaves it, divides it by its norm, or sends it through a layer with GELU or softmax.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from probes import (
    MLP,
    Attention,
    AttentionLowRank,
    Cosine,
    DiagQuadratic,
    DotProduct,
    Linear,
    Probe,
    Quadratic,
    QuadraticFixedRank,
)


class PairForm(NamedTuple):
    """One layer of a fitted probe, S seeds, H features of a token.

    features: "tokens" (H = D), "unit" (divided by its norm), "gelu" or "softmax" (of encoder x + encoder_bias).
    shift, scale: [D], of standardising x * scale + shift; None: tokens as they are.
    encoder: [S, H, D] and encoder_bias [S, H]; None for "tokens" and "unit".
    form: [S, H, H]; None: gain times the identity.
    gain: [S]. left, right: [S, H], u and v. bias: [S].
    link: "sigmoid", or "none" where the formula is already a share of 0 to 1.
    """

    features: str
    shift: Tensor | None
    scale: Tensor | None
    encoder: Tensor | None
    encoder_bias: Tensor | None
    form: Tensor | None
    gain: Tensor
    left: Tensor
    right: Tensor
    bias: Tensor
    link: str

    def encode(self, x: Tensor) -> Tensor:
        """Features g [S or 1, N, H] of tokens x [N, D] (1: the same for every seed)."""
        x = x if self.shift is None else x * self.scale + self.shift
        if self.features == "unit":
            return (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-8))[None]
        if self.encoder is None:
            return x[None]
        hidden = x @ self.encoder.mT + self.encoder_bias[:, None]
        return F.gelu(hidden) if self.features == "gelu" else hidden.softmax(-1)

    def logits(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits [S, N, M] of tokens x [N, D] against y [M, D]."""
        x, y = self.encode(x), self.encode(y)
        mixed = x * self.gain[:, None, None] if self.form is None else x @ self.form
        ends = (x @ self.left[..., None]) + (y @ self.right[..., None]).mT
        return mixed @ y.mT + ends + self.bias[:, None, None]

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores [N, M] of tokens x [N, D] against y [M, D]: mean over seeds."""
        logits = self.logits(x, y)
        return (logits.sigmoid() if self.link == "sigmoid" else logits).mean(0)


@torch.no_grad()
def pair_forms(probe: Probe, fits: slice = slice(None)) -> list[PairForm]:
    """The formula of a probe at each of its layers.

    Args:
        fits: which of the stacked seeds to take.

    Raises:
        UserError: a probe of a kind that has no such formula.
    """
    return [_pair_form(probe, fits, index) for index in range(len(probe.layers))]


def _pair_form(probe: Probe, fits: slice, at: int) -> PairForm:
    n_seeds, dim = len(probe.seeds[fits]), probe.dim
    take = lambda value: value.detach()[fits, at].float()
    features, link, encoder, encoder_bias, form = "tokens", "sigmoid", None, None, None
    gain, width = torch.zeros(n_seeds), dim
    left = right = None
    bias = take(probe.bias) if probe.arity == "pairwise" else torch.zeros(n_seeds)
    match probe:
        case Linear():
            left = right = take(probe.weight)
            bias = 2 * bias
        case DiagQuadratic():
            form = torch.diag_embed(take(probe.weight))
        case Quadratic() | QuadraticFixedRank():
            form = take(probe.form())
            left = right = None if probe.linear is None else take(probe.linear)
        case MLP():
            features, encoder, encoder_bias = "gelu", take(probe.encoder), take(probe.encoder_bias)
            weight, width = take(probe.weight), probe.encoder.shape[2]
            form = (weight + weight.mT) * (0.5 * width**-0.5)
            left = right = take(probe.linear)
        case Attention() | AttentionLowRank():
            form, left, right, offset = _attention_form(probe, fits, at)
            bias = bias + offset
        case Cosine() | DotProduct():
            features = "unit" if isinstance(probe, Cosine) else "tokens"
            gain = torch.ones(n_seeds) if probe.scale is None else take(probe.scale)
        case _ if probe.arity == "pointwise":
            features, link = "softmax", "none"
            encoder, encoder_bias = take(probe.weight), take(probe.bias)
            gain, width = torch.ones(n_seeds), encoder.shape[1]
        case _:
            raise UserError(f"a {type(probe).__name__} probe scores no pairs of patches, name a run of another probe")
    shift, scale = (probe.token_shift[at], probe.token_scale[at]) if probe.needs_statistics else (None, None)
    none = torch.zeros(n_seeds, width)
    left, right = (none if end is None else end for end in (left, right))
    return PairForm(features, shift, scale, encoder, encoder_bias, form, gain, left, right, bias, link)


def _attention_form(probe: Attention | AttentionLowRank, fits: slice, at: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Form, both ends and offset of (Wq x + bq).(Wk y + bk) times a scale, or of its mean over both directions."""
    if isinstance(probe, Attention):
        query, query_bias, key, key_bias = (
            getattr(probe, name).detach()[at].float()[None] for name in ("query", "query_bias", "key", "key_bias")
        )
        learnt = torch.ones(len(probe.seeds[fits])) if probe.scale is None else probe.scale.detach()[fits, at]
        factor = learnt * probe.dim**-0.5  # [S]
    else:
        query, query_bias, key, key_bias = (
            getattr(probe, name).detach()[fits, at].float() for name in ("query", "query_bias", "key", "key_bias")
        )
        factor = query.new_full((len(query),), query.shape[1] ** -0.5)
    form = (query.mT @ key) * factor[:, None, None]
    left = (key_bias[:, None] @ query)[:, 0] * factor[:, None]
    right = (query_bias[:, None] @ key)[:, 0] * factor[:, None]
    if probe.symmetric:
        form, left = (form + form.mT) / 2, (left + right) / 2
        right = left
    return form, left, right, (query_bias * key_bias).sum(-1) * factor
