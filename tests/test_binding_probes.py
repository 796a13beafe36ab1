"""Binding probes: published logits, gradients and sizes; the mask law; the laws of a stack; factorised = expanded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from binding.base import seen_bits
from binding.information import bits_per_image
from binding.probes import BINDING_PROBES
from errors import UserError
from probes import Probe, build_probe, load_probe

GOLDEN = Path(__file__).parent / "golden" / "binding"
CASES = json.loads((GOLDEN / "probes.json").read_text())["cases"]
COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())["cases"]
SEEDS, LAYERS, DIM, K = [0, 7], ["embed", 3], 6, 6


def build(mode: str, seeds=SEEDS, layers=LAYERS, n_tokens: int | None = None, **knobs) -> Probe:
    """A small probe of the 2 x 3 conjunctions."""
    n_tokens = n_tokens or (5 if mode == "attention_quadratic" else 1)
    cfg = {"mode": mode, "rank": 3, "dnn_hidden_dim": 4, "matmul_dtype": "float32", "init_std": 0.3, **knobs}
    given = {"n_bits": K, "n_tokens": n_tokens, "groups": [2, 3]}
    return build_probe(cfg, seeds=seeds, layers=layers, dim=DIM, table=BINDING_PROBES, **given)


def batch(probe: Probe, n_images: int = 4) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(len(LAYERS), n_images, probe.n_tokens, DIM, generator=g)
    return x, torch.randint(0, 2, (n_images, K), generator=g)


def scramble(probe: Probe) -> Probe:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in probe.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return probe


every = pytest.mark.parametrize("mode", sorted(BINDING_PROBES))
conditions = [{"condition_query": q, "condition_readout": r} for q in (True, False) for r in (True, False)]


# ------------------------------------------------------------------------------------------------------------- golden


def put(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value.reshape(parameter.shape))


def stack_factors(*weights: Tensor) -> Tensor:
    """Published [in, r, K] factor by factor -> ours [in, factors, r, K]."""
    return torch.stack(weights, dim=1)


def published(case: dict, dtype: torch.dtype) -> Probe:
    """The published parameters, whose keys and axes the golden file describes, in ours."""
    hyper, conditioned = case["hyper"], case["use_conditioned_query"]
    p = {k: torch.tensor(v, dtype=dtype) for k, v in case["params"].items()}
    attention = case["type"] == "attention_quadratic"
    dim = hyper.get("token_dim", case["z_dim"])
    knobs = {"condition_query": conditioned} if attention else {"condition_readout": conditioned}
    cfg = {"mode": case["type"], **{k: v for k, v in hyper.items() if k not in ("feature_dims", "token_dim")}, **knobs}
    probe = build_probe(
        {**cfg, "matmul_dtype": "float32"}, seeds=[0], layers=[0], dim=dim, table=BINDING_PROBES,
        n_bits=case["out_dim"], n_tokens=case["z_dim"] // dim, groups=hyper.get("feature_dims"),
    ).to(dtype)  # fmt: skip
    z, k = case["z_dim"], case["out_dim"]
    if case["type"] == "linear":
        put(probe.weight_image, p["Wz.weight"].mT)
        if conditioned:
            put(probe.weight_bits, p["Wy.weight"].mT)
    elif case["type"].startswith("dnn"):
        first = p["W_in"].transpose(1, 2) if "W_in" in p else p["W_out"].unsqueeze(-1)  # [in, K, h]
        put(probe.first_image, first[:z])
        if conditioned:
            put(probe.first_bits, first[z:])
        put(probe.first_bias, p["b_in"].mT if "b_in" in p else p["b_out"])
        later = sorted(name for name in p if name.startswith("W_hidden")) + (["W_out"] if "W_in" in p else [])
        assert len(later) == len(probe.weights)
        for weight, bias, name in zip(probe.weights, probe.biases, later, strict=True):
            put(weight, p[name].permute(2, 0, 1))
            put(bias, p[name.replace("W_", "b_")].mT)
    elif case["type"] == "quadratic_concat":
        both = stack_factors(p["W1"], p["W2"])
        put(probe.weight_image, both[:z])
        if conditioned:
            put(probe.weight_bits, both[z:])
    elif case["type"].endswith("reuse"):
        quadratic = case["type"].startswith("quadratic")
        n = len(hyper["feature_dims"])
        image = [p[f"W{g + 1}_z" if quadratic else f"W_z.{g}"].flatten(1) for g in range(n)]
        put(probe.weight_image, torch.cat(image, dim=1))
        if conditioned:
            bits = [p[f"W{g + 1}_y" if quadratic else f"W_y.{g}"] for g in range(n)]
            put(probe.weight_bits, stack_factors(*bits))
    else:
        both = stack_factors(p["W1"], p["W2"])  # [2D + K, 2, r, K]
        put(probe.query_base, p["query_base"])
        put(probe.query_map, p["Wq.weight"])
        if conditioned:
            put(probe.query_bits, p["query_from_y"])
        put(probe.weight_class, both[:dim])
        put(probe.weight_pool, both[dim : 2 * dim].permute(3, 0, 1, 2))
        put(probe.weight_bits, both[2 * dim :])
    if "bias" in p:
        put(probe.bias, p["bias"])
    assert probe.n_bits == k
    return probe.eval()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_published_logits_and_gradients(case: dict, dtype: torch.dtype, rtol: float) -> None:
    probe = published(case, dtype)
    z = torch.tensor(case["z"], dtype=dtype, requires_grad=True)
    y = torch.tensor(case["y"], dtype=dtype)
    logits = probe(z.view(1, len(z), probe.n_tokens, probe.dim), y)[0, 0]
    torch.testing.assert_close(logits, torch.tensor(case["logits"], dtype=dtype), rtol=rtol, atol=0.1 * rtol)
    loss = F.binary_cross_entropy_with_logits(logits, y)
    loss.backward()
    assert loss.item() == pytest.approx(case["bce_mean_nats"], rel=0.1 * rtol)
    bits = bits_per_image(logits.double(), y.double())
    assert bits.mean().item() == pytest.approx(case["bits_per_sample"], rel=rtol)
    assert ((logits > 0) == (y > 0)).double().mean().item() == pytest.approx(case["bit_accuracy"])
    torch.testing.assert_close(z.grad, torch.tensor(case["dloss_dz"], dtype=dtype), rtol=rtol, atol=0.01 * rtol)
    # Weights that an unconditioned published probe stores but never reads do not exist here.
    conditioned, k = case["use_conditioned_query"], case["out_dim"]
    dead = 0 if conditioned else {"linear": k * k, "attention_quadratic": k * probe.dim}.get(case["type"], 0)
    assert probe.n_parameters + dead == case["num_parameters"]


@pytest.mark.parametrize("case", COUNTS, ids=lambda c: f"{c['type']}-{c['z_dim']}")
def test_published_sizes(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without allocating: the largest has 680 million parameters."""
    draw = lambda self, *shape, **_: torch.nn.Parameter(torch.empty(1, 1, *shape, device="meta"))
    monkeypatch.setattr(Probe, "draw", draw)
    conditioned = case.get("use_conditioned_query", True)
    attention = case["type"] == "attention_quadratic"
    dim = case.get("token_dim", case["z_dim"])
    cfg = {"mode": case["type"], **{k: v for k, v in case.items() if k.startswith("dnn_") or k == "rank"}}
    cfg |= {"condition_query": conditioned} if attention else {"condition_readout": conditioned}
    probe = build_probe(
        cfg, seeds=[0], layers=[0], dim=dim, table=BINDING_PROBES,
        n_bits=case["k"], n_tokens=case["z_dim"] // dim, groups=case.get("feature_dims"),
    )  # fmt: skip
    dead = case["k"] * dim if attention and not conditioned else 0
    assert probe.n_parameters + dead == case["num_parameters"]


# --------------------------------------------------------------------------------------------------------------- laws


@every
@pytest.mark.parametrize("knobs", conditions, ids=str)
def test_no_logit_reads_its_own_or_a_later_bit(mode: str, knobs: dict) -> None:
    for readout in ("program", "paper"):
        probe = scramble(build(mode, readout=readout, **knobs))
        x, code = batch(probe)
        reads = torch.stack([probe(x, code)[0, 0] != probe(x, flipped(code, i))[0, 0] for i in range(K)])  # [i, B, K]
        allowed = seen_bits(K, x.device).bool()[:, None]
        assert not (reads & ~allowed).any()
        attention = mode == "attention_quadratic"
        blind = not attention or not knobs["condition_query"]
        blind = blind and (not knobs["condition_readout"] or (attention and readout == "paper"))
        assert reads.any() == (not blind)
        if not blind:
            assert (reads | ~allowed).all()  # and every bit it may see counts


def flipped(code: Tensor, i: int) -> Tensor:
    out = code.clone()
    out[:, i] = 1 - out[:, i]
    return out


@every
def test_stacked_equals_alone(mode: str) -> None:
    """Also with dropout: what is dropped belongs to the fit and the batch."""

    def fitted(probe: Probe, x: Tensor, code: Tensor) -> Tensor:
        optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2)
        for _ in range(8):
            optimizer.zero_grad()
            scores = probe.train()(x, code)
            F.softplus(torch.where(code.bool(), -scores, scores)).mean((2, 3)).sum().backward()
            optimizer.step()
        return probe.eval()(x, code).detach()

    probe = build(mode, dnn_dropout=0.3)
    x, code = batch(probe)
    together = fitted(probe, x, code)
    for s, seed in enumerate(SEEDS):
        for i, layer in enumerate(LAYERS):
            alone = fitted(build(mode, seeds=[seed], layers=[layer], dnn_dropout=0.3), x[i : i + 1], code)
            torch.testing.assert_close(together[s, i], alone[0, 0], atol=1e-6, rtol=1e-6)


@every
def test_gradient_reaches_every_parameter_of_every_fit(mode: str) -> None:
    for readout in ("program", "paper"):
        probe = scramble(build(mode, readout=readout))
        probe(*batch(probe)).square().sum().backward()
        for name, p in probe.named_parameters():
            assert p.grad.flatten(2).abs().sum(-1).gt(0).all(), name


@every
def test_zeros_are_finite_and_images_are_independent(mode: str) -> None:
    probe = scramble(build(mode))
    x, code = batch(probe)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(probe(x[:, order], code[order]), probe(x, code)[:, :, order], atol=1e-6, rtol=1e-5)
    out = probe(x * 0, code)
    out.sum().backward()
    assert out.shape == (2, 2, 4, K) and out.isfinite().all()


@every
def test_checkpoint_holds_everything(mode: str, tmp_path: Path) -> None:
    probe = scramble(build(mode, standardize=True, whiten=0.3, dnn_num_layers=4))
    probe.set_statistics(torch.randn(2, DIM), torch.rand(2, DIM) + 0.5)
    probe.set_correlation(torch.full((2, DIM, DIM), 0.5) + 0.5 * torch.eye(DIM))
    probe.save(tmp_path / "p.safetensors")
    again = load_probe(tmp_path / "p.safetensors", BINDING_PROBES)
    assert torch.equal(again(*batch(probe)), probe(*batch(probe)))


@every
def test_statistics_are_those_of_each_layer(mode: str) -> None:
    plain, standardised = scramble(build(mode)), scramble(build(mode, standardize=True))
    x, code = batch(plain)
    mean, std = torch.randn(2, DIM), torch.rand(2, DIM) + 0.5
    standardised.set_statistics(mean, std)
    expected = plain((x - mean[:, None, None]) / std[:, None, None], code)
    torch.testing.assert_close(standardised(x, code), expected, atol=1e-5, rtol=1e-4)


@every
def test_whitening_is_a_map_of_standardised_tokens(mode: str) -> None:
    plain, white = scramble(build(mode)).double(), scramble(build(mode, standardize=True, whiten=0.1)).double()
    x, code = batch(plain)
    x = x.double() @ torch.randn(len(LAYERS), 1, DIM, DIM, generator=torch.Generator().manual_seed(2)).double()
    flat = x.flatten(1, 2)  # [L, B T, D]
    white.set_statistics(flat.mean(1), flat.std(1, correction=0))
    correlation = torch.stack([tokens.mT.corrcoef() for tokens in flat])  # [L, D, D]
    white.set_correlation(correlation)
    regular = correlation + 0.1 * torch.eye(DIM, dtype=torch.float64)
    torch.testing.assert_close(white.token_map @ regular @ white.token_map, torch.eye(DIM).double().expand(2, -1, -1))
    standardised = (x - flat.mean(1)[:, None, None]) / flat.std(1, correction=0)[:, None, None]
    torch.testing.assert_close(white(x, code), plain(standardised @ white.token_map[:, None], code))


@pytest.mark.parametrize("mode", ["linear", "dnn", "quadratic_concat", "quadratic_concat_reuse", "attention_quadratic"])
def test_bfloat16_products_stay_close(mode: str) -> None:
    probe = scramble(build(mode))
    exact = probe(*batch(probe)).detach()
    probe.matmul_dtype = "bfloat16"
    rough = probe(*batch(probe)).detach()
    assert rough.dtype == torch.float32 and (rough - exact).abs().max() < 0.03 * exact.abs().max()


def test_tokens_of_any_mode_are_read_end_to_end() -> None:
    probe = scramble(build("quadratic_concat", n_tokens=2))
    x, code = batch(probe)
    joined = build_probe(
        {"mode": "quadratic_concat", "rank": 3, "matmul_dtype": "float32"}, seeds=SEEDS, layers=LAYERS, dim=2 * DIM,
        table=BINDING_PROBES, n_bits=K,
    )  # fmt: skip
    joined.load_state_dict(probe.state_dict())
    torch.testing.assert_close(probe(x, code), joined(x.flatten(2).unsqueeze(2), code))


def test_pools_taken_in_parts_and_taken_again_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = scramble(build("attention_quadratic"))
    x, code = batch(probe, n_images=5)

    def run() -> tuple[Tensor, ...]:
        out = probe(x, code)
        return (out, *torch.autograd.grad(out.square().sum(), list(probe.parameters())))

    whole = run()
    monkeypatch.setattr("binding.probes.POOL_ELEMENTS", 2 * K * DIM)
    monkeypatch.setattr("binding.probes.KEPT_ELEMENTS", 0)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_initial_values() -> None:
    probe = build_probe(
        {"mode": "attention_quadratic", "init_std": 0.02}, seeds=[0], layers=[0], dim=64, table=BINDING_PROBES,
        n_bits=16, n_tokens=5,
    )  # fmt: skip
    assert probe.weight_pool.std().item() == pytest.approx(0.02, rel=0.05)
    assert probe.query_map.abs().max() <= 64**-0.5 and not probe.bias.any()
    wide = build("quadratic_concat", init_std=None)
    assert wide.weight_image.std().item() == pytest.approx((DIM + K) ** -0.5, rel=0.2)


def test_refusals() -> None:
    axes = {"seeds": [0], "layers": [0], "dim": 4, "table": BINDING_PROBES, "n_bits": 6}
    refused: list[tuple[Callable, str]] = [
        (lambda: build_probe({"mode": "quadratic_concat_reuse"}, **axes), "cannot be asked for the feature code"),
        (lambda: build_probe({"mode": "multilinear_concat_reuse"}, **axes), "cannot be asked for the feature code"),
        (lambda: build_probe({"mode": "multilinear_concat_reuse"}, groups=[2, 2], **axes), r"6 conjunctions, got \[2, 2\]"),
        (lambda: build_probe({"mode": "quadratic_concat_reuse"}, groups=[1, 2, 3], **axes), "exactly two feature groups"),
        (lambda: build_probe({"mode": "attention_quadratic"}, n_tokens=1, **axes), "set model.output_mode=all"),
        (lambda: build_probe({"mode": "attention_quadratic", "readout": "both"}, n_tokens=9, **axes), "program, paper"),
        (lambda: build_probe({"mode": "dnn", "dnn_num_layers": 0}, **axes), "at least 1"),
        (lambda: build_probe({"mode": "linear", "whiten": 0.3}, **axes), "set probe.standardize=true or whiten=null"),
        (lambda: build_probe({"mode": "quadratic"}, **axes), "valid here: linear, dnn"),
    ]
    for call, words in refused:
        with pytest.raises(UserError, match=words):
            call()
