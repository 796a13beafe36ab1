"""Every probe as one stacked module: parameters lead with the axes [S seeds, L layers], a batch is [L, B, T, D].

    PROBES (below the classes)
      pairwise, do two patches belong together       -> logits [S, L, B, T, T]
        linear                 w.x + w.y + 2b
        diag_quadratic         x' diag(w) y + b
        quadratic              x' M y + b,  M = (W + W') / (2 sqrt D)
        quadratic_fixed_rank   the same with M = (W1' W2 + W2' W1) / (2 sqrt D)
        mlp                    the quadratic form of a shared hidden layer
        attention              frozen query and key projections of the next block: only an offset is learnt
        attention_low_rank     trained query and key projections of r channels
        cosine, dot_product    training-free but for an offset
      pointwise, what one patch shows                -> logits [S, L, B, T, K]
        class_linear           one logit per class
        identity_linear        one logit per mask query

Bare classes are the published forms (arXiv 2510.24709); `linear_term`, `standardize`, `learn_scale` and `symmetric` are
ours. Adding a probe: a class and one line in PROBES; its laws are then tested. Shapes: S seeds, L layers, B images,
T tokens, U tokens of a second set, D width, K outputs, r rank, h hidden.
"""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from errors import UserError
from forms import FitAxes, Layer, Probe, SymmetricForm, pair_scores, project, sum_scores
from runs.states import load_state


class Projections(NamedTuple):
    """Query and key projections of one attention block, all heads side by side: weights [D, D], biases [D]."""

    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor


# ---------------------------------------------------------------------------------------------------------- pairwise


class Pairwise(Probe):
    """Base of the probes of two tokens: `scores` plus a bias per fit."""

    arity = "pairwise"
    symmetric = True  # score(i, j) == score(j, i); an instance may differ (attention)
    bias: nn.Parameter  # [S, L]

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Prepared tokens x [L, B, T, D] against y [L, B, U, D] (None: x itself) -> float32 [S, L, B, T, U]."""
        raise NotImplementedError

    def form_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:
        """What `pairs.form_loss` needs of a probe that scores x_i' (W + W') x_j / (2 sqrt D) + w.(x_i + x_j) + b.

        Returns:
            prepared tokens [L, B, T, D], W [S, L, D, D], w [S, L, D] (None: zero) and b [S, L]; None for a probe of another
            form.
        """
        return None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Tokens x [L, B, T, D] against y [L, B, U, D] (default: x itself) -> logits float32 [S, L, B, T, U]."""
        scores = self.scores(self.prepare(x), None if y is None else self.prepare(y))
        return scores + self.bias[..., None, None, None]


class Linear(Pairwise):
    """w.x + w.y + 2b (the bias enters twice, as published): how object-like each patch is, not yet sameness."""

    def __init__(self, fits: FitAxes, dim: int, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.weight = self.draw(dim, bound=dim**-0.5)
        self.bias = self.draw(bound=dim**-0.5)

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """See `Pairwise`; carries one of the two biases."""
        return sum_scores(x, y, self.weight) + self.bias[..., None, None, None]


class DiagQuadratic(Pairwise):
    """sum_k w_k x_k y_k + b: sameness along the given axes of the feature space."""

    def __init__(self, fits: FitAxes, dim: int, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.weight = self.draw(dim, bound=dim**-0.5)
        self.bias = self.draw(bound=dim**-0.5)

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """See `Pairwise`."""
        z = x * self.weight.to(x.dtype)[:, :, None, None]  # [S, L, B, T, D]
        return pair_scores(z, x if y is None else y)


class Quadratic(Pairwise):
    """x' M y + b with M = (W + W') / (2 sqrt D).

    Args:
        linear_term: add w.x + w.y, so that the form contains the linear probe (ours; w starts at zero).

    The published bias is a D-vector of which only the first entry is read: here it is that entry.
    """

    bfloat16_from = 128  # its loss casts less than others do (measured by scripts/bench_default.py)

    def __init__(self, fits: FitAxes, dim: int, *, linear_term: bool = False, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.weight = self.draw(dim, dim, bound=dim**-0.5)
        self.bias = self.draw(bound=dim**-0.5)
        self.linear = self.draw(dim) if linear_term else None

    def form(self) -> Tensor:
        """The symmetric matrices M [S, L, D, D], for analysis (`forms.factorise`)."""
        return (self.weight + self.weight.mT) * (0.5 * self.dim**-0.5)

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """See `Pairwise`."""
        scores = SymmetricForm.apply(x, self.weight) if y is None else pair_scores(project(x, self.form()), y)
        return scores if self.linear is None else scores + sum_scores(x, y, self.linear)

    def form_parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """See `Pairwise`."""
        return self.prepare(x), self.weight, self.linear, self.bias


class QuadraticFixedRank(Pairwise):
    """x' M y + b with M = (W1' W2 + W2' W1) / (2 sqrt D), of rank at most 2r.

    Args:
        rank: r, number of rows of W1 and W2 (published default 100).
        linear_term: add w.x + w.y (ours; w starts at zero).
    """

    def __init__(self, fits: FitAxes, dim: int, *, rank: int = 100, linear_term: bool = False, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.left = self.draw(rank, dim, bound=dim**-0.5)
        self.right = self.draw(rank, dim, bound=dim**-0.5)
        self.bias = self.draw(bound=dim**-0.5)
        self.linear = self.draw(dim) if linear_term else None

    def form(self) -> Tensor:
        """The symmetric matrices M [S, L, D, D], for analysis (`forms.factorise`)."""
        half = self.left.mT @ self.right
        return (half + half.mT) * (0.5 * self.dim**-0.5)

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """See `Pairwise`."""
        both = torch.cat([self.left, self.right], dim=2)  # [S, L, 2r, D]
        z = project(x, both)
        other = z if y is None else project(y, both)
        swapped = other.roll(other.shape[-1] // 2, dims=-1)
        scores = pair_scores(z, swapped) * (0.5 * self.dim**-0.5)
        return scores if self.linear is None else scores + sum_scores(x, y, self.linear)


class MLP(Pairwise):
    """Quadratic form of a shared hidden layer: g = GELU(A x + a), then g_x' R g_y + v.(g_x + g_y) + b, R symmetric.

    No source fixes an MLP probe of pairs; this one is ours. It is symmetric by construction and never forms a
    [T, T, h] tensor, and sums of products of hidden units approximate any continuous symmetric function of two tokens.

    Args:
        hidden: number h of hidden units.
    """

    def __init__(self, fits: FitAxes, dim: int, *, hidden: int = 64, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.encoder = self.draw(hidden, dim, bound=dim**-0.5)
        self.encoder_bias = self.draw(hidden, bound=dim**-0.5)
        self.weight = self.draw(hidden, hidden, bound=hidden**-0.5)
        self.linear = self.draw(hidden, bound=hidden**-0.5)
        self.bias = self.draw(bound=hidden**-0.5)

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """See `Pairwise`."""
        g, other = (
            nn.functional.gelu(project(t, self.encoder).float() + self.encoder_bias[:, :, None, None])
            for t in (x, x if y is None else y)
        )  # [S, L, B, T, h]
        form = (self.weight + self.weight.mT) * (0.5 * self.weight.shape[-1] ** -0.5)
        rows, columns = (t @ self.linear[:, :, None, :, None] for t in (g, other))  # [S, L, B, T, 1]
        return pair_scores(g @ form[:, :, None], other) + rows + columns.mT


class Similarity(Pairwise):
    """Base of the training-free similarities: a fixed score, a learnt offset and, if asked, a learnt factor.

    Args:
        learn_scale: also learn one factor per fit, starting at 1 (ours; the published forms learn the offset alone).

    The offset starts at zero; how it starts is not published.
    """

    def __init__(self, fits: FitAxes, dim: int, *, learn_scale: bool = False, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.bias = self.draw()
        self.scale = nn.Parameter(torch.ones_like(self.bias)) if learn_scale else None

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Fixed score of prepared tokens x [L, B, T, D], y [L, B, U, D] -> [L, B, T, U]."""
        raise NotImplementedError

    @property
    def solver(self) -> str:
        """Offset and factor have one optimum; the published offset alone is learnt by descent, as published."""
        return "descent" if self.scale is None else "newton"

    def fixed_scores(self, x: Tensor) -> Tensor:
        """What offset and factor are learnt for: the similarity of tokens x [L, B, T, D] -> float32 [L, B, T, T]."""
        x = self.prepare(x)
        return self.similarity(x, x).float()

    @torch.no_grad()
    def set_solution(self, offset: Tensor, factor: Tensor) -> None:
        """Take over offset and factor [S, L]."""
        self.bias.copy_(offset)
        self.scale.copy_(factor)

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """See `Pairwise`."""
        scores = self.similarity(x, x if y is None else y)[None].float()
        return scores if self.scale is None else scores * self.scale[..., None, None, None]


class Cosine(Similarity):
    """x.y / max(|x| |y|, 1e-8) + b."""

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Cosine of every pair, 0 where a token is zero."""
        norms = x.float().norm(dim=-1).unsqueeze(-1) * y.float().norm(dim=-1).unsqueeze(-2)
        return (x @ y.mT).float() / norms.clamp_min(1e-8)


class DotProduct(Similarity):
    """x.y + b."""

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Dot product of every pair."""
        return x @ y.mT


class Attention(Similarity):
    """(Wq x + bq).(Wk y + bk) / sqrt(D) + b with the frozen projections of the block that reads this layer.

    As published, all heads are summed under one scale and the block's input LayerNorm is left out; the score is not
    symmetric and the last layer has none. Tokens are never standardised: the projections expect them as they are.

    Args:
        projections: {layer: Projections} of the next block, for every layer of the stack.
        symmetric: score with the mean of both directions (ours).
    """

    def __init__(
        self,
        fits: FitAxes,
        dim: int,
        *,
        projections: Mapping[Layer, Projections],
        symmetric: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(fits, dim, **{**options, "standardize": False})
        self.symmetric = symmetric
        missing = [layer for layer in self.layers if layer not in projections]
        if missing:
            raise UserError(
                f"probe.mode=attention needs the attention block after each layer, got none after {missing}; "
                "leave these layers out of model.layers or take another probe"
            )
        for name in Projections._fields:
            stacked = torch.stack([getattr(projections[layer], name).float() for layer in self.layers])
            self.register_buffer(name, stacked)

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Attention score before the softmax, all heads summed."""

        def directed(x: Tensor, y: Tensor) -> Tensor:
            queries = project(x, self.query[None])[0] + self.query_bias[:, None, None].to(x.dtype)
            keys = project(y, self.key[None])[0] + self.key_bias[:, None, None].to(x.dtype)
            return (queries @ keys.mT).float() * self.dim**-0.5

        return 0.5 * (directed(x, y) + directed(y, x).mT) if self.symmetric else directed(x, y)


class AttentionLowRank(Pairwise):
    """(Q x + p).(K y + q) / sqrt(r) + b with trained Q, K of r rows: one attention head as a probe.

    Args:
        rank: r; the scale is that of an attention head of r channels.
        symmetric: score with the mean of both directions.
    """

    def __init__(self, fits: FitAxes, dim: int, *, rank: int = 64, symmetric: bool = False, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.symmetric = symmetric
        self.query = self.draw(rank, dim, bound=dim**-0.5)
        self.query_bias = self.draw(rank, bound=dim**-0.5)
        self.key = self.draw(rank, dim, bound=dim**-0.5)
        self.key_bias = self.draw(rank, bound=dim**-0.5)
        self.bias = self.draw()

    def scores(self, x: Tensor, y: Tensor | None) -> Tensor:
        """See `Pairwise`."""
        both = torch.cat([self.query, self.key], dim=2)  # [S, L, 2r, D]
        offset = torch.cat([self.query_bias, self.key_bias], dim=2)[:, :, None, None].to(x.dtype)
        z = project(x, both) + offset
        other = z if y is None else project(y, both) + offset
        (query, key), (other_query, other_key) = z.chunk(2, -1), other.chunk(2, -1)
        scores = pair_scores(query, other_key)
        if self.symmetric:
            scores = 0.5 * (scores + pair_scores(key, other_query))
        return scores * query.shape[-1] ** -0.5


# --------------------------------------------------------------------------------------------------------- pointwise


class _TokenLinear(Probe):
    """A x + a for every token."""

    arity = "pointwise"

    def __init__(self, fits: FitAxes, dim: int, n_out: int, **options: Any) -> None:
        super().__init__(fits, dim, **options)
        self.weight = self.draw(n_out, dim, bound=dim**-0.5)
        self.bias = self.draw(n_out, bound=dim**-0.5)

    def outputs_per_token(self, n_tokens: int) -> int:
        """One logit per output, and the pairs that two read-outs of it are compared on."""
        return 2 * n_tokens + self.weight.shape[-2]

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [L, B, T, D] -> logits [S, L, B, T, K]."""
        return project(self.prepare(x), self.weight).float() + self.bias[:, :, None, None]


class ClassLinear(_TokenLinear):
    """One logit per class, n_classes of them (index 0 = background)."""

    def __init__(self, fits: FitAxes, dim: int, *, n_classes: int, **options: Any) -> None:
        super().__init__(fits, dim, n_classes, **options)


class IdentityLinear(_TokenLinear):
    """One logit per mask query: column q over the tokens of an image is the mask of query q (published: 100)."""

    def __init__(self, fits: FitAxes, dim: int, *, n_queries: int = 100, **options: Any) -> None:
        super().__init__(fits, dim, n_queries, **options)


PROBES: dict[str, type[Probe]] = {
    "linear": Linear,
    "diag_quadratic": DiagQuadratic,
    "quadratic": Quadratic,
    "quadratic_fixed_rank": QuadraticFixedRank,
    "mlp": MLP,
    "attention": Attention,
    "attention_low_rank": AttentionLowRank,
    "cosine": Cosine,
    "dot_product": DotProduct,
    "class_linear": ClassLinear,
    "identity_linear": IdentityLinear,
}


def options_of(cls: type[Probe]) -> dict[str, inspect.Parameter]:
    """Every keyword a probe takes, those of its base classes included."""
    parameters_by_name: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()
            parameters_by_name = {**{p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}, **parameters_by_name}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return parameters_by_name


def build_probe(
    probe_cfg: Mapping[str, Any],
    *,
    seeds: Sequence[int],
    layers: Sequence[Layer],
    dim: int,
    table: Mapping[str, type[Probe]] = PROBES,
    **known_here: Any,
) -> Probe:
    """The probe a config names: `mode`, and whichever options that probe takes.

    Args:
        probe_cfg: {"mode": name in the table, option: value, ...}; options of other probes are passed over.
        seeds, layers, dim: axes of the stack and width of a token.
        known_here: what the task knows and no config says (n_classes, projections, ...); passed over if not taken.

    Raises:
        UserError: unknown probe, or one that needs something the task does not give.
    """
    mode = probe_cfg["mode"]
    if mode not in table:
        raise UserError(f"unknown probe.mode '{mode}'; valid here: {', '.join(table)}")
    taken, known = options_of(table[mode]), {**probe_cfg, **known_here}
    knobs = {name: known[name] for name in taken if name in known}
    missing = [name for name, p in taken.items() if p.default is p.empty and knobs.get(name) is None]
    if missing:
        raise UserError(f"probe.mode={mode} needs {', '.join(missing)}, which this task has not; take another probe")
    probe = table[mode](FitAxes(seeds, layers), dim, **knobs)
    plain = {k: v for k, v in knobs.items() if k != "projections"}  # those are buffers, kept with the parameters
    probe.recipe = {"mode": mode, "seeds": list(seeds), "layers": list(layers), "dim": dim, "knobs": plain}
    return probe


def load_probe(path: Path, table: Mapping[str, type[Probe]] = PROBES, expected: Mapping[str, Any] | None = None) -> Probe:
    """The probe a checkpoint holds (`Probe.save`), on the CPU; what was saved beside it is in `.facts`.

    Args:
        expected: facts the checkpoint must have (`runs.states.load_state`).

    Raises:
        UserError: the file is missing, damaged, or holds something else.
    """
    state = load_state(path, {"facts": expected or {}})
    recipe, known_here = {key: value for key, value in state.recipe.items() if key != "facts"}, {}
    try:
        if recipe["mode"] == "attention":
            columns = zip(*(state.tensors[name] for name in Projections._fields), strict=True)
            known_here["projections"] = dict(zip(recipe["layers"], itertools.starmap(Projections, columns), strict=True))
        axes = {key: recipe[key] for key in ("seeds", "layers", "dim")}
        probe = build_probe({"mode": recipe["mode"], **recipe["knobs"]}, **axes, table=table, **known_here)
        probe.load_state_dict(state.tensors)
    except Exception as error:  # whatever a whole file that holds something else leads to
        raise UserError(f"{path} holds no probe this version knows ({error}); name another or repeat the fit") from error
    probe.facts = state.recipe["facts"]
    return probe
