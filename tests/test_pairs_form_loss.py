"""The loss in one pass is the plain loss of the plain scores, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F

import forms
from pairs.form_loss import form_bce, pair_terms
from pairs.losses import pair_bce, pair_mask
from probes import build_probe


def plain_loss(x: torch.Tensor, weight: torch.Tensor, linear: torch.Tensor, bias: torch.Tensor, same: torch.Tensor, counted):
    """[S, L] by the definition: x [L, B, T, D], counted bool [S, B, T, T]."""
    rows = torch.einsum("lbtd,sld->slbt", x, linear) + 0.5 * bias[:, :, None, None]
    form = (weight + weight.mT) * (0.5 * x.shape[-1] ** -0.5)
    scores = torch.einsum("lbtd,slde,lbue->slbtu", x, form, x) + rows.unsqueeze(-1) + rows.unsqueeze(-2)
    target = same.to(x.dtype).expand_as(scores)
    losses = F.binary_cross_entropy_with_logits(scores, target, reduction="none") * counted[:, None]
    return losses.sum((2, 3, 4)) / counted.sum((1, 2, 3)).clamp_min(1)[:, None]


@pytest.mark.parametrize("pairs", ["upper", "upper_diagonal", "all"])
@pytest.mark.parametrize(("n_tokens", "dim"), [(7, 5), (6, 129), (5, 514)])
def test_one_pass_equals_the_definition(monkeypatch: pytest.MonkeyPatch, pairs: str, n_tokens: int, dim: int) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        generator = torch.Generator().manual_seed(dim)
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        x, linear, bias = draw(2, 9, n_tokens, dim), draw(4, 2, dim) * dim**-0.5, draw(4, 2)
        weight = draw(4, 2, dim, dim) * dim**-0.5  # no score above 20, from where on softplus is the identity
        identity = torch.randint(0, 3, (9, n_tokens), generator=generator)
        valid = torch.rand(9, n_tokens, generator=generator) > 0.2
        used = torch.stack([valid, valid & (identity > 0)])  # two variants of two seeds
        counted = pair_mask(n_tokens, pairs) & used[:, :, :, None] & used[:, :, None]
        leaves = weight.requires_grad_(), linear.requires_grad_(), bias.requires_grad_()
        same = identity[:, :, None] == identity[:, None]
        expected = plain_loss(x, *leaves, same, counted.repeat_interleave(2, 0))
        factor = draw(4, 2)
        want = torch.autograd.grad((expected * factor).sum(), leaves)
        # Cut into some images at a time, too.
        for n_images in (9, 2):
            cuts = forms.form_cuts(x)._replace(n_images=n_images)
            monkeypatch.setattr("pairs.form_loss.form_cuts", lambda x, cuts=cuts: cuts)
            ours = form_bce(x, *leaves, pair_terms(identity, used, pairs))
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
            found = torch.autograd.grad((ours * factor).sum(), leaves)
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("matmul_dtype", ["float32", "bfloat16"])
def test_one_pass_is_the_loss_of_the_scores_a_reader_sees(matmul_dtype: str) -> None:
    cfg = {"mode": "quadratic", "linear_term": True, "standardize": True, "matmul_dtype": matmul_dtype}
    probe = build_probe(cfg, seeds=[0, 1], layers=[0, 1, 2], dim=24)
    torch.nn.init.normal_(probe.linear, std=0.1)
    x, identity = torch.randn(3, 5, 9, 24), torch.randint(0, 4, (5, 9))
    valid = torch.rand(5, 9) > 0.2
    loss = pair_bce(probe(x), identity[:, :, None] == identity[:, None], pairs="upper", valid=valid)
    ours = form_bce(*probe.form_parts(x), pair_terms(identity, valid[None], "upper"))
    tolerance = 1e-6 if matmul_dtype == "float32" else 1e-3
    torch.testing.assert_close(ours, loss, atol=tolerance, rtol=0)
    want, found = (torch.autograd.grad(value.sum(), list(probe.parameters())) for value in (loss, ours))
    torch.testing.assert_close(found, want, atol=tolerance, rtol=0)


def test_only_running_fits_have_a_loss_and_a_gradient() -> None:
    draw = torch.Generator().manual_seed(2)
    x, identity = torch.randn(2, 4, 6, 5, generator=draw), torch.randint(0, 3, (4, 6), generator=draw)
    leaves = [torch.randn(*shape, generator=draw, requires_grad=True) for shape in ((2, 2, 5, 5), (2, 2, 5), (2, 2))]
    terms = pair_terms(identity, torch.stack([identity >= 0, identity > 0]), "upper")
    running = torch.tensor([[True, False], [False, True]])
    every, some = form_bce(x, *leaves, terms), form_bce(x, *leaves, terms, running)
    assert torch.equal(some, every.detach() * running)
    for whole, part in zip(*(torch.autograd.grad(value.sum(), leaves) for value in (every, some)), strict=True):
        assert torch.equal(part, whole * running.view(2, 2, *[1] * (part.ndim - 2))) and float(part.abs().sum()) > 0


def test_images_without_a_counted_token_and_images_with_all_of_them_share_a_batch() -> None:
    x, identity = torch.randn(1, 5, 7, 4), torch.randint(1, 3, (5, 7))
    used = torch.zeros(1, 5, 7, dtype=torch.bool)
    used[0, 1], used[0, 3, [0, 6]] = True, True
    parameters = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4), torch.randn(1, 1)
    terms = pair_terms(identity, used, "upper")
    assert [len(group.weight) for group in terms.groups[0]] == [3, 2]
    counted = pair_mask(7, "upper") & used[:, :, :, None] & used[:, :, None]
    want = plain_loss(x, *parameters, identity[:, :, None] == identity[:, None], counted)
    torch.testing.assert_close(form_bce(x, *parameters, terms), want)


def test_a_batch_without_a_pair_costs_nothing() -> None:
    x, identity = torch.randn(1, 2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((1, 1, 4, 4), (1, 1, 4), (1, 1))]
    loss = form_bce(x, *leaves, pair_terms(identity, torch.zeros(1, 2, 3, dtype=torch.bool), "all"))
    loss.sum().backward()
    assert float(loss.detach()) == 0 and all(float(leaf.grad.abs().sum()) == 0 for leaf in leaves)


def test_without_gradients_only_the_loss_is_computed() -> None:
    x, identity = torch.randn(1, 2, 3, 4), torch.tensor([[1, 1, 2], [0, 3, 3]])
    weight, bias = torch.randn(1, 1, 4, 4, requires_grad=True), torch.randn(1, 1)
    terms = pair_terms(identity, torch.ones(1, 2, 3, dtype=torch.bool), "upper")
    with torch.no_grad():
        loss = form_bce(x, weight, None, bias, terms)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, form_bce(x, weight, None, bias, terms).detach())
