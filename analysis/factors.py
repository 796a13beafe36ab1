"""Reading the probe: eigenvalues and ranks of its form, accuracy against kept rank, binding coordinates, attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from activation import PatchSample
from errors import UserError
from forms import factorise
from pairs.maps import auroc
from pairs.pair_form import PairForm

ENERGY = (0.9, 0.95, 0.99)  # shares of sum lambda^2 whose rank is reported
LEAST_LOSS = 0.005  # the binding subspace keeps the smallest rank whose accuracy lies at most this below the whole probe's


def form_of(form: PairForm) -> Tensor:
    """The symmetric forms [S, D, D] of one layer, for tokens as the probe standardises them.

    Raises:
        UserError: a probe without a form of the tokens.
    """
    if form.form is None or form.features != "tokens" or form.link != "sigmoid":
        raise UserError("mode=analyze reads the quadratic form of a probe; name a run of probe.mode=quadratic with run=…")
    return (form.form + form.form.mT) / 2


def rank_rows(form: PairForm, layer: int | str) -> list[dict[str, Any]]:
    """Per seed: effective rank exp(entropy of |lambda|), participation ratio, stable rank, and the rank of shares of energy."""
    factors, rows = factorise(form_of(form)), []
    energy = factors.values.square()
    cumulative = energy.cumsum(-1) / energy.sum(-1, keepdim=True)
    for seed in range(len(factors.values)):
        row = {"layer": layer, "seed": seed, "largest": float(factors.values[seed, 0])}
        row |= {name: float(getattr(factors, name)[seed]) for name in ("effective_rank", "participation_ratio", "stable_rank")}
        row |= {f"rank_{share:.0%}": int((cumulative[seed] < share).sum()) + 1 for share in ENERGY}
        rows.append(row)
    return rows


def truncated(form: PairForm, rank: int) -> PairForm:
    """The same probe with the `rank` largest eigenvalues of its form, by magnitude; offset and linear term stay."""
    factors = factorise(form_of(form))
    left, signs = factors.coordinates(rank)
    return form._replace(form=(left.mT * signs.unsqueeze(-2) @ left).float())


def pair_accuracy(form: PairForm, tokens: Tensor, identity: Tensor, valid: Tensor) -> dict[str, float | None]:
    """Accuracy and AUROC of IsSameObject over the pairs i < j of all images, and AUROC of those inside the foreground.

    A pair is called one object where the mean probability over seeds is above one half. Shapes: tokens [M, T, D], identity
    and valid [M, T].
    """
    first, second = torch.triu_indices(tokens.shape[1], tokens.shape[1], 1)
    scores, same, inside = [], [], []
    for x, ids, used in zip(tokens, identity, valid, strict=True):
        both = used[first] & used[second]
        a, b = ids[first][both], ids[second][both]
        scores.append(form.scores(x, x)[first, second][both])
        same.append(a == b)
        inside.append((a > 0) & (b > 0))
    scores, same, inside = torch.cat(scores), torch.cat(same), torch.cat(inside)
    return {
        "accuracy": float(((scores > 0.5) == same).float().mean()), "auroc": auroc(scores.numpy(), same.numpy()),
        "foreground_auroc": auroc(scores[inside].numpy(), same[inside].numpy()),
    }  # fmt: skip


def kept_pairs(sample: PatchSample, at: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [M, T, D], identities and validity [M, T] of one layer of a sample, of at most some images.

    Raises:
        UserError: images without identities.
    """
    if "identity" not in sample.labels:
        raise UserError(f"mode=analyze needs identity maps and {sample.meta['dataset']} has none; name another dataset")
    images = torch.arange(min(most, len(sample.keys)))
    tokens = sample.tokens.gather(images, [at])[0].float()
    return tokens, sample.labels["identity"][images], sample.labels["identity_valid"][images]


def kept_rank_rows(
    form: PairForm, layer: int | str, tokens: Tensor, identity: Tensor, valid: Tensor, ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """`pair_accuracy` of the probe truncated to every rank, the whole one last."""
    dim = tokens.shape[-1]
    rows = []
    for rank in [*(rank for rank in ranks if rank < dim), dim]:
        kept = form if rank == dim else truncated(form, rank)
        rows.append({"layer": layer, "rank": rank, "how": "truncated", **pair_accuracy(kept, tokens, identity, valid)})
    return rows


def smallest_rank(rows: Sequence[dict[str, Any]]) -> int:
    """The smallest rank of `kept_rank_rows` whose accuracy is at most LEAST_LOSS below that of the whole probe."""
    return next(row["rank"] for row in rows if row["accuracy"] >= rows[-1]["accuracy"] - LEAST_LOSS)


def binding_basis(form: PairForm, rank: int) -> Tensor:
    """An orthonormal basis [D, k] of what the probe reads of a token as the backbone gives it, mean form over seeds.

    A standardised token is x * scale + shift, so the form of plain tokens is diag(scale) M diag(scale); its eigenvectors of
    largest magnitude span the subspace.
    """
    matrix = form_of(form).mean(0)
    if form.scale is not None:
        matrix = form.scale[:, None] * matrix * form.scale
    return factorise(matrix).vectors[:, :rank].float()


def binding_coordinates(form: PairForm, tokens: Tensor, rank: int) -> Tensor:
    """Coordinates z = |Lambda|^(1/2) V' x [..., k] of tokens [..., D] under the mean form over seeds; logit = z' S z."""
    factors = factorise(form_of(form).mean(0))
    x = tokens if form.scale is None else tokens * form.scale + form.shift
    return x @ factors.coordinates(rank)[0].float().mT


def principal_components(z: Tensor, n: int = 3) -> tuple[Tensor, Tensor]:
    """The first n principal components [N, n] of coordinates [N, k], and their shares of the variance [n]."""
    centred = z - z.mean(0)
    u, values, _ = torch.linalg.svd(centred, full_matrices=False)
    return (u * values)[:, :n], (values.square() / values.square().sum())[:n]


def attention_correlation(weights: Tensor, scores: Tensor) -> Tensor:
    """Pearson r of attention [heads, N, N] with scores [N, N] over ordered pairs of patches, self pairs left out; [heads]."""
    n = scores.shape[-1]
    other = ~torch.eye(n, dtype=torch.bool)
    x, y = weights[:, other].double(), scores[other].double()
    x, y = x - x.mean(1, keepdim=True), y - y.mean()
    return (x @ y) / (x.norm(dim=1) * y.norm()).clamp_min(1e-12)
