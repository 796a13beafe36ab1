"""Laws of every probe in PROBES, published values, planted structure."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errors import UserError
from forms import FormCuts, SymmetricForm, factorise, fit_generator, resolve_matmul_dtype
from pairs.losses import agreement, class_loss, pair_bce
from probes import PROBES, FitAxes, Probe, Projections, build_probe, load_probe, options_of

GOLDEN = Path(__file__).parent / "golden" / "object_binding"
SEEDS, LAYERS, DIM = [0, 7], ["embed", 3, 11], 12
POINTWISE = {mode for mode, probe in PROBES.items() if probe.arity == "pointwise"}


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())["data"]


def projections(dim: int, layers: list) -> dict:
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g) * dim**-0.5
    return {layer: Projections(draw(dim, dim), draw(dim), draw(dim, dim), draw(dim)) for layer in layers}


def build(mode: str, seeds=SEEDS, layers=LAYERS, dim=DIM, **knobs) -> Probe:
    cfg = {"mode": mode, "rank": 5, "hidden": 6, "n_queries": 4, "linear_term": True, "matmul_dtype": "float32", **knobs}
    given = {"n_classes": 3, "projections": projections(dim, LAYERS)}
    return build_probe(cfg, seeds=seeds, layers=layers, dim=dim, **given)


def tokens(n_layers=3, n_images=4, n_tokens=7, dim=DIM, seed=1) -> Tensor:
    return torch.randn(n_layers, n_images, n_tokens, dim, generator=torch.Generator().manual_seed(seed))


def scramble(probe: Probe) -> Probe:
    """Give every parameter a value of its own, also those that start at zero."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in probe.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * p[0, 0].numel() ** -0.25)
    return probe


def objective(probe: Probe, x: Tensor, label: Tensor) -> Tensor:
    logits = probe(x)
    if probe.arity == "pairwise":
        return pair_bce(logits, label[:, :, None] == label[:, None], pairs="all")
    return class_loss(logits, label % logits.shape[-1])


every = pytest.mark.parametrize("mode", sorted(PROBES))


@every
def test_shape_and_type(mode: str) -> None:
    probe, x = build(mode), tokens()
    out = probe(x)
    last = probe.bias.shape[-1] if mode in POINTWISE else 7
    assert out.shape == (2, 3, 4, 7, last) and out.dtype == torch.float32
    assert probe.arity in ("pairwise", "pointwise")
    assert probe.trained and probe.n_parameters == sum(p.numel() for p in probe.parameters())
    assert all(p.shape[:2] == (2, 3) for p in probe.parameters())


@every
def test_permuting_tokens_permutes_scores(mode: str) -> None:
    probe, x = scramble(build(mode)), tokens()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    expected = probe(x)[..., order, :]
    if probe.arity == "pairwise":
        expected = expected[..., order]
    torch.testing.assert_close(probe(x[:, :, order]), expected, atol=1e-5, rtol=1e-5)


@every
def test_declared_symmetry(mode: str) -> None:
    if mode in POINTWISE:
        return
    probe = scramble(build(mode))
    out = probe(tokens())
    assert torch.allclose(out, out.mT, atol=1e-5) == probe.symmetric
    if not probe.symmetric and "symmetric" in options_of(PROBES[mode]):
        both = scramble(build(mode, symmetric=True))
        assert both.symmetric
        torch.testing.assert_close(both(tokens()), 0.5 * (out + out.mT), atol=1e-5, rtol=1e-5)


@every
def test_two_sets_of_tokens_are_a_corner_of_their_union(mode: str) -> None:
    if mode in POINTWISE:
        return
    probe, x, y = scramble(build(mode)), tokens(), tokens(n_tokens=5, seed=2)
    corner = probe(torch.cat([x, y], dim=2))[..., :7, 7:]
    torch.testing.assert_close(probe(x, y), corner, atol=1e-5, rtol=1e-5)


@every
def test_gradient_reaches_every_parameter_of_every_fit(mode: str) -> None:
    probe = build(mode, learn_scale=True)
    label = torch.randint(0, 3, (4, 7), generator=torch.Generator().manual_seed(0))
    objective(probe, tokens(), label).sum().backward()
    for name, p in probe.named_parameters():
        assert p.grad is not None, name
        assert (p.grad.flatten(2) if p.ndim > 2 else p.grad[..., None]).abs().sum(-1).gt(0).all(), name


@every
def test_stacked_equals_alone(mode: str) -> None:
    """Weights, scores and ten AdamW steps of a fit are the same in any company."""
    label = torch.randint(0, 3, (4, 7), generator=torch.Generator().manual_seed(0))

    def fitted(probe: Probe, x: Tensor) -> Tensor:
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            objective(probe, x, label).sum().backward()
            optimizer.step()
        return probe(x).detach()

    x = tokens()
    together = fitted(build(mode), x)
    for s, seed in enumerate(SEEDS):
        for i, layer in enumerate(LAYERS):
            alone = fitted(build(mode, seeds=[seed], layers=[layer]), x[i : i + 1])
            torch.testing.assert_close(together[s, i], alone[0, 0], atol=1e-6, rtol=1e-6)


@every
def test_zeros_are_finite(mode: str) -> None:
    probe = build(mode)
    loss = objective(probe, torch.zeros(3, 4, 7, DIM), torch.zeros(4, 7, dtype=torch.int64))
    loss.sum().backward()
    assert loss.isfinite().all() and all(p.grad.isfinite().all() for p in probe.parameters() if p.grad is not None)


@every
def test_standardised_probes_do_not_see_affine_changes_of_channels(mode: str) -> None:
    probe, x = scramble(build(mode, standardize=True)), tokens()
    if mode == "attention":  # frozen projections expect the tokens as they are
        assert not probe.needs_statistics
        return
    factor, offset = torch.rand(3, 1, 1, DIM) * 9 + 0.1, torch.randn(3, 1, 1, DIM) * 20

    def scored(x: Tensor) -> Tensor:
        probe.set_statistics(x.mean((1, 2)), x.std((1, 2)))
        return probe(x)

    torch.testing.assert_close(scored(x * factor + offset), scored(x), atol=1e-4, rtol=1e-4)


@every
def test_checkpoint_holds_everything(mode: str, tmp_path: Path) -> None:
    probe = scramble(build(mode, standardize=True))
    if probe.needs_statistics:
        probe.set_statistics(torch.randn(3, DIM), torch.rand(3, DIM) + 0.5)
    probe.save(tmp_path / "a" / "probe.safetensors", best_epoch=[[1, 2, 3]])
    again = load_probe(tmp_path / "a" / "probe.safetensors")
    assert type(again) is type(probe) and again.recipe == probe.recipe and again.facts == {"best_epoch": [[1, 2, 3]]}
    assert again.layers == LAYERS and again.seeds == SEEDS
    assert torch.equal(again(tokens()), probe(tokens()))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["probe.safetensors"]


@pytest.mark.parametrize("mode", ["linear", "quadratic", "quadratic_fixed_rank", "mlp", "diag_quadratic", "class_linear"])
def test_bfloat16_products_stay_close(mode: str) -> None:
    probe, x = scramble(build(mode)), tokens()
    exact = probe(x).detach()
    probe.matmul_dtype = "bfloat16"
    rough = probe(x).detach()
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.03 * exact.abs().max()
    if probe.arity == "pairwise":
        assert torch.allclose(rough, rough.mT, atol=0.02 * float(exact.abs().max()))


def test_the_fit_owns_its_generators() -> None:
    keys = itertools.product(range(3), ("embed", 0, 1), range(2))
    assert len({torch.rand(1, generator=fit_generator(*key)).item() for key in keys}) == 18


def test_matmul_dtype() -> None:
    cpu = torch.device("cpu")
    assert resolve_matmul_dtype("auto", cpu, 64) == torch.float32  # narrow tokens never pay for the casts
    assert resolve_matmul_dtype("bfloat16", cpu, 64) == torch.bfloat16
    with pytest.raises(UserError, match="valid: auto, float32, bfloat16"):
        build("linear", matmul_dtype="float8")


def test_build_probe_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match="unknown probe.mode 'cubic'; valid here: linear, "):
        build_probe({"mode": "cubic"}, seeds=[0], layers=[0], dim=4)
    with pytest.raises(UserError, match="needs n_classes"):
        build_probe({"mode": "class_linear"}, seeds=[0], layers=[0], dim=4)
    with pytest.raises(UserError, match=r"got none after \[3\]"):
        build_probe({"mode": "attention"}, seeds=[0], layers=["embed", 3], dim=4, projections=projections(4, ["embed"]))


def test_load_probe_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not a checkpoint")
    for name in ("x.safetensors", "absent.safetensors"):
        with pytest.raises(UserError, match=name):
            load_probe(tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- golden


def published(mode: str, state: dict, dim: int, **knobs) -> Probe:
    """The published state dict in our parameters: one fit, and of the quadratic form's D biases the one that is read."""
    state = {k: torch.tensor(v) for k, v in state.items()}
    name = next(iter(state)).split(".")[0]
    probe = build(mode, seeds=[0], layers=[0], dim=dim, linear_term=False, **knobs)
    bias = state[f"{name}.bias"]
    with torch.no_grad():
        probe.weight.copy_(state[f"{name}.weight"].view(probe.weight.shape))
        probe.bias.copy_((bias if probe.arity == "pointwise" else bias[0]).view(probe.bias.shape))
    return probe


@pytest.mark.parametrize("mode", ["linear", "diag_quadratic", "quadratic"])
def test_published_pair_probes(mode: str) -> None:
    for case in golden("probes")["cases"]:
        values = case["cases"][mode]
        probe = published(mode, values["state"], case["d"])
        x, y = (torch.tensor(case[k])[None, None] for k in "xy")
        close = lambda ours, key, values=values: torch.testing.assert_close(ours, torch.tensor(values[key]), atol=2e-5, rtol=0)
        close(probe(x)[0, 0, 0], "pairwise_xx")
        close(probe(x, y)[0, 0, 0], "pairwise_xy")
        close(probe(x, y)[0, 0, 0].diagonal().view(values["forward_shape"]), "forward_xy")
        close(probe(torch.cat([x, y], dim=1))[0, 0], "batch_pairwise_xx_yy")
        close(probe(x)[0, 0, 0, 2:3].sigmoid(), "issameobject_anchor2_on_x")


@pytest.mark.parametrize("name, mode", [("linear_class", "class_linear"), ("linear_instance", "identity_linear")])
def test_published_token_probes(name: str, mode: str) -> None:
    for case in golden("probes")["cases"]:
        values = case["cases"][name]
        n_out = len(values["forward_x"][0])
        knobs = {"n_queries": n_out} if mode == "identity_linear" else {}
        probe = build_probe({"mode": mode, **knobs}, seeds=[0], layers=[0], dim=case["d"], n_classes=n_out)
        with torch.no_grad():
            probe.weight.copy_(torch.tensor(values["state"]["linear.weight"]))
            probe.bias.copy_(torch.tensor(values["state"]["linear.bias"]))
        out = probe(torch.tensor(case["x"])[None, None])[0, 0, 0]
        torch.testing.assert_close(out, torch.tensor(values["forward_x"]), atol=2e-5, rtol=0)


def test_published_initial_ranges_and_sizes() -> None:
    facts = golden("probes")["init_d1024"]
    for name, mode in (("linear", "linear"), ("diag_quadratic", "diag_quadratic"), ("quadratic", "quadratic"),
                       ("linear_class", "class_linear"), ("linear_instance", "identity_linear")):  # fmt: skip
        probe = build_probe({"mode": mode, "n_queries": 100}, seeds=[0], layers=[0], dim=1024, n_classes=151)
        dead = 1023 if mode == "quadratic" else 0  # published biases nothing reads
        assert probe.n_parameters + dead == facts[name]["n_params"]
        weight = next(v for k, v in facts[name].items() if k.endswith("weight"))
        assert probe.weight.numel() == torch.tensor(weight["shape"]).prod()
        assert probe.weight.detach().abs().max() == pytest.approx(weight["max_abs"], rel=5e-3)
        assert probe.bias.detach().abs().max() <= 1024**-0.5


def test_published_variants() -> None:
    data = golden("derived")["extra_probes"]
    x, y = (torch.tensor(data[k])[None, None] for k in "xy")
    axes = FitAxes([0], [0])

    def check(probe: Probe, key: str, **state) -> None:
        with torch.no_grad():
            probe.bias.fill_(data["bias"])
            for name, value in state.items():
                getattr(probe, name).copy_(torch.tensor(value))
        expected = data[key]["pairwise"] if isinstance(data[key], dict) else data[key]
        torch.testing.assert_close(probe(x, y)[0, 0, 0], torch.tensor(expected), atol=2e-5, rtol=1e-6)

    fixed = data["fixed_rank"]
    check(PROBES["quadratic_fixed_rank"](axes, 7, rank=3), "fixed_rank", left=fixed["W1"], right=fixed["W2"])
    check(PROBES["dot_product"](axes, 7), "dot_product")
    check(PROBES["cosine"](axes, 7), "cosine")
    frozen = data["self_attention_single_scale"]
    qk = Projections(*(torch.tensor(frozen[k]) for k in ("Wq", "bq", "Wk", "bk")))
    check(PROBES["attention"](axes, 7, projections={0: qk}), "self_attention_single_scale")
    soft = data["softmax_inner"]
    logits = torch.cat([x, y], dim=2) @ torch.tensor(soft["W"]).mT + torch.tensor(soft["b"])
    inner = agreement(logits, "inner")[0, 0, :5, 5:]
    torch.testing.assert_close(inner, torch.tensor(soft["pairwise"]), atol=1e-6, rtol=0)


def test_published_factorisation() -> None:
    data = golden("derived")["extra_probes"]
    values = data["factorisation"]
    probe = PROBES["quadratic"](FitAxes([0], [0]), 7)
    with torch.no_grad():
        probe.weight.copy_(torch.tensor(values["W"]))
    factors = factorise(probe.form()[0, 0].detach())
    close = lambda ours, key: torch.testing.assert_close(
        ours, torch.tensor(values[key], dtype=torch.float64), atol=2e-6, rtol=0
    )
    close(factors.values, "eigvals_by_abs")
    close(factors.values.sign(), "sign")
    close(factors.values.square().cumsum(0) / factors.values.square().sum(), "energy_sq_cumulative")
    assert factors.effective_rank == pytest.approx(values["effective_rank_entropy_abs"], abs=1e-5)
    assert factors.participation_ratio == pytest.approx(values["participation_ratio_sq"], abs=1e-5)
    assert factors.stable_rank == pytest.approx(values["stable_rank"], abs=1e-5)
    x, y = (torch.tensor(data[k], dtype=torch.float64) for k in "xy")
    for rank, key in ((7, "full_from_factors"), (2, "rank2_pairwise"), (7 // 2, "rank_half_pairwise")):
        w1, sign = factors.coordinates(rank)
        score = (x @ w1.mT * sign) @ (y @ w1.mT).mT
        offset = torch.tensor(values[key], dtype=torch.float64) - score
        assert offset.std() < 1e-5, key  # the golden scores may carry the bias


# -------------------------------------------------------------------------------------------------- the symmetric form


@pytest.mark.parametrize("dim", [6, 513, 640])
def test_symmetric_form_equals_the_plain_one(dim: int) -> None:
    """Values and gradients, with and without column blocks."""
    x = tokens(n_layers=2, n_images=2, n_tokens=5, dim=dim)
    weight = (torch.randn(2, 2, dim, dim) * dim**-0.5).requires_grad_()
    m = (weight + weight.mT) / (2 * dim**0.5)
    plain = torch.einsum("lbtd,slde,lbue->slbtu", x, m, x)
    ours = SymmetricForm.apply(x, weight)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(plain)
    expected, got = (torch.autograd.grad((s * direction).sum(), weight)[0] for s in (plain, ours))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_cuts_of_the_symmetric_form_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(n_layers=2, n_images=5, n_tokens=4, dim=10)
    weight = torch.randn(2, 2, 10, 10, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        scores = SymmetricForm.apply(x, weight)
        return scores, torch.autograd.grad(scores.square().sum(), weight)[0]

    whole = run()
    monkeypatch.setattr("forms.form_cuts", lambda x: FormCuts([(0, 3), (3, 6), (6, 9), (9, 10)], 2, 1))
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- planted structure


def planted(n_images: int, dim: int, code: Tensor, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens = code of the instance + noise; code [K, D] -> tokens [1, B, 16, D], instance [B, 16]."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 4, (n_images, 16), generator=g)
    # Every image gives its instances other codes, so that no code means anything by itself.
    rename = torch.rand(n_images, len(code), generator=g).argsort(-1)[:, :4]
    x = code[rename.gather(1, label)] + noise * torch.randn(n_images, 16, dim, generator=g)
    return x[None], label


def accuracy(mode: str, code: Tensor, noise: float = 0.05, steps: int = 150, lr: float = 3e-2, **knobs) -> float:
    dim = code.shape[1]
    probe = build(mode, seeds=[0], layers=[0], dim=dim, **knobs)
    optimizer = torch.optim.Adam(probe.parameters(), lr=lr)
    x, label = planted(96, dim, code, noise, seed=1)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(probe, x, label).sum().backward()
        optimizer.step()
    x, label = planted(64, dim, code, noise, seed=2)
    pairs = torch.ones(16, 16).triu(1).bool()
    right = (probe(x)[0, 0] > 0) == (label[:, :, None] == label[:, None])
    return right[:, pairs].float().mean().item()


def test_planted_codes_are_read_by_the_forms_that_can() -> None:
    codes = 4 * torch.eye(8)
    axis = torch.cat([codes, torch.zeros(8, 8)], dim=1)  # eight instances on eight of sixteen axes
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    baseline = 1 - 0.25  # always "different"
    for code in (axis, axis @ turn):
        assert accuracy("quadratic", code) > 0.99
        assert accuracy("quadratic_fixed_rank", code, rank=8) > 0.99
        assert abs(accuracy("linear", code) - baseline) < 0.03
    assert accuracy("diag_quadratic", axis) > 0.99
    assert accuracy("diag_quadratic", axis * torch.tensor([1.0, -1.0]).repeat(8)) > 0.99
    assert accuracy("mlp", axis @ turn, hidden=32) > 0.97
    assert accuracy("cosine", axis @ turn, learn_scale=True, lr=1e-1) > 0.99
    assert accuracy("cosine", axis @ turn, lr=1e-1) < 0.8  # the published offset alone cannot stretch [0, 1] to logits


def test_noise_alone_stays_at_the_baseline() -> None:
    for mode in ("quadratic_fixed_rank", "linear", "diag_quadratic"):
        assert abs(accuracy(mode, torch.zeros(8, 16), noise=1.0, rank=2, steps=40) - 0.75) < 0.03


def test_a_planted_subspace_is_recovered() -> None:
    """Background on all channels, instances in a random plane: the form's leading eigenvectors are that plane."""
    g = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=g))[0]  # [D, 2]
    angle = torch.arange(8) * (2 * torch.pi / 8)
    code = 4 * torch.stack([angle.cos(), angle.sin()], dim=1) @ plane.mT
    probe = build("quadratic", seeds=[0], layers=[0], dim=16, linear_term=False)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=3e-2, weight_decay=0.1)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 400)
        x, label = planted(64, 16, code, 0.5, seed=10 + step)
        optimizer.zero_grad()
        # Self-pairs left out: they alone would teach the form that noise resembles itself.
        pair_bce(probe(x), label[:, :, None] == label[:, None], pairs="upper").sum().backward()
        optimizer.step()
    factors = factorise(probe.form()[0, 0].detach())
    found = factors.vectors[:, :2].float()
    cosines = torch.linalg.svdvals(found.mT @ plane)
    assert torch.rad2deg(torch.arccos(cosines.clamp(max=1))).max() < 5
