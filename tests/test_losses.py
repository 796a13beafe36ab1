"""Losses against the published values, and the laws that let them be stacked."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pairs.losses import agreement, class_loss, identity_loss, match, matching_costs, object_masks, pair_bce, pair_mask
from probes import build_probe

GOLDEN = Path(__file__).parent / "golden" / "object_binding"
INSTANCE = json.loads((GOLDEN / "instance_loss.json").read_text())["data"]
PAIRWISE = json.loads((GOLDEN / "pairwise.json").read_text())["data"]
POINTWISE = json.loads((GOLDEN / "pointwise.json").read_text())["data"]


def logits_of(case: dict) -> list[torch.Tensor]:
    """Our probe with the published parameters on every batch of a case, [1, 1, B, T, K]."""
    weight, bias = (torch.tensor(v) for v in case["state"].values())
    mode = {"class": "class_linear", "instance": "identity_linear"}.get(case.get("kind"), case.get("mode"))
    dim = weight.shape[-1]
    cfg = {"mode": mode, "n_queries": case.get("n_out"), "matmul_dtype": "float32"}
    probe = build_probe(cfg, seeds=[0], layers=[0], dim=dim, n_classes=case.get("n_out"))
    with torch.no_grad():
        probe.weight.copy_(weight.view(probe.weight.shape))
        probe.bias.copy_((bias if probe.arity == "pointwise" else bias[0]).view(probe.bias.shape))
        return [probe(torch.tensor(batch["features"])[None]) for batch in case["batches"]]


@pytest.mark.parametrize("case", PAIRWISE, ids=lambda c: c["mode"])
def test_published_pair_loss_and_accuracy(case: dict) -> None:
    total, right, seen, mean, strict = 0.0, 0, 0, 0.0, 0
    for batch, logits in zip(case["batches"], logits_of(case), strict=True):
        torch.testing.assert_close(logits[0, 0], torch.tensor(batch["logits"]), atol=2e-5, rtol=0)
        label = torch.tensor(batch["labels"])
        same = label[:, :, None] == label[:, None]
        n_images = len(label)
        total += float(pair_bce(logits, same, pairs="all")) * n_images
        mean += float(pair_bce(logits, same, pairs="upper")) * n_images
        seen += n_images
        right += ((logits[0, 0] > 0) == same)[:, pair_mask(label.shape[1], "upper_diagonal")].sum().item()
        strict += ((logits[0, 0] > 0) == same)[:, pair_mask(label.shape[1], "upper")].sum().item()
    n = len(case["batches"][0]["labels"][0])
    assert total / seen == pytest.approx(case["repo"]["bce_mean_all_NxN"], abs=1e-5)
    assert mean / seen == pytest.approx(case["extra"]["bce_nodiag"], abs=1e-5)
    assert right / (seen * n * (n + 1) / 2) == pytest.approx(case["repo"]["acc_triu_with_diag"], abs=1e-12)
    assert strict / case["extra"]["n_pairs_nodiag"] == pytest.approx(case["extra"]["acc_triu_nodiag"], abs=1e-12)


@pytest.mark.parametrize("case", POINTWISE, ids=lambda c: c["kind"])
def test_published_token_losses_and_agreement(case: dict) -> None:
    total, seen, right, counted = 0.0, 0, 0.0, 0
    for batch, logits in zip(case["batches"], logits_of(case), strict=True):
        label = torch.tensor(batch["labels"])
        assert torch.equal(logits[0, 0].argmax(-1), torch.tensor(batch["argmax"]))
        loss = class_loss(logits, label) if case["kind"] == "class" else identity_loss(logits, label)
        total, seen = total + float(loss) * len(label), seen + len(label)
        pairs = pair_mask(label.shape[1], "upper_diagonal")
        hit = agreement(logits, "argmax")[0, 0].bool() == (label[:, :, None] == label[:, None])
        right, counted = right + hit[:, pairs].sum().item(), counted + hit[:, pairs].numel()
    assert total / seen == pytest.approx(case["repo"]["loss"], abs=2e-5)
    assert right / counted == pytest.approx(case["repo"]["pairwise_acc_triu_with_diag"], abs=1e-12)


@pytest.mark.parametrize("case", INSTANCE, ids=lambda c: c["name"])
def test_published_identity_loss(case: dict) -> None:
    logits = torch.tensor(case["logits_B_N_Q"])[None, None].requires_grad_()
    targets = torch.tensor(case["targets"])
    loss = identity_loss(logits, targets)
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    loss = loss.detach()
    if case["loss"] is None:  # the published code divides zero by zero here
        assert float(loss.detach()) == 0 and float(logits.grad.abs().sum()) == 0
        return
    assert float(loss) == pytest.approx(case["loss"], abs=2e-5)
    masks, counts = object_masks(targets)
    assert int(counts.sum()) == case["num_masks"]
    bce, dice = matching_costs(logits.detach(), masks)
    problem, query, target = match((5 * bce + 5 * dice).flatten(0, 1), counts)
    for i, image in enumerate(case["per_image"]):
        n = int(counts[i])
        assert n == len(image["target_ids"])
        if n:
            torch.testing.assert_close(bce[0, 0, i, :, :n], torch.tensor(image["cost_mask"]), atol=2e-5, rtol=0)
            torch.testing.assert_close(dice[0, 0, i, :, :n], torch.tensor(image["cost_dice"]), atol=2e-5, rtol=0)
        here = problem == i
        assert query[here].tolist() == image["pred_idx"] and target[here].tolist() == image["tgt_idx"]


def test_identity_loss_is_per_fit_and_ignores_invalid_tokens() -> None:
    logits = torch.randn(2, 3, 4, 9, 5, requires_grad=True)
    identity = torch.randint(0, 4, (4, 9))
    identity[2] = 0  # an image without objects
    valid = torch.rand(4, 9) > 0.3
    loss = identity_loss(logits, identity, valid=valid)
    assert loss.shape == (2, 3)
    loss.sum().backward()
    alone = logits.detach()[1:, 2:].clone().requires_grad_()
    identity_loss(alone, identity, valid=valid).sum().backward()
    torch.testing.assert_close(alone.grad[0, 0], logits.grad[1, 2])
    moved = torch.where(valid[:, :, None], logits.detach(), 50 * torch.randn_like(logits))
    relabelled = torch.where(valid, identity, 3)
    torch.testing.assert_close(identity_loss(moved, relabelled, valid=valid), loss.detach())
    # An image of V valid tokens costs what an image of just these tokens costs.
    one = valid[0]
    torch.testing.assert_close(
        identity_loss(logits[:, :, :1], identity[:1], valid=valid[:1]), identity_loss(logits[:, :, :1, one], identity[:1, one])
    )


def test_a_query_without_an_object_pays_for_a_mask_that_is_not_empty() -> None:
    logits = torch.randn(1, 1, 1, 6, 4)
    identity, valid = torch.tensor([[1, 1, 2, 0, 0, 2]]), torch.tensor([[True, True, True, True, False, True]])
    bce, dice = matching_costs(logits, object_masks(identity, valid)[0], valid)
    cost = 5 * (bce + dice)[0, 0, 0]  # [Q, K]
    empty = 0.1 * 5 * torch.nn.functional.softplus(logits[0, 0, 0, valid[0]]).mean(0)  # [Q]
    best = min(
        float(cost[a, 0] + cost[b, 1] + sum(empty[q] for q in range(4) if q not in (a, b)))
        for a in range(4) for b in range(4) if a != b
    )  # fmt: skip
    assert float(identity_loss(logits, identity, valid=valid, unmatched_weight=0.1)) == pytest.approx(best / 2, rel=1e-5)


def test_identity_loss_with_more_objects_than_queries() -> None:
    logits = torch.randn(1, 1, 1, 6, 2)
    identity = torch.arange(1, 7)[None]
    bce, dice = matching_costs(logits, object_masks(identity)[0])
    cost = 5 * (bce + dice)[0, 0, 0]
    best = min(cost[0, a] + cost[1, b] for a in range(6) for b in range(6) if a != b)
    assert float(identity_loss(logits, identity)) == pytest.approx(float(best) / 6, rel=1e-5)


def test_a_diverged_fit_stays_visible() -> None:
    logits = torch.randn(2, 1, 2, 4, 3)
    logits[1] = torch.nan
    loss = identity_loss(logits, torch.tensor([[1, 1, 2, 0], [0, 3, 3, 0]]))
    assert loss[0].isfinite().all() and loss[1].isnan().all()


@pytest.mark.parametrize("pairs", ["upper", "upper_diagonal", "all"])
def test_pair_bce_equals_the_plain_one(pairs: str) -> None:
    logits = (torch.randn(6, 2, 3, 4, 6) * 5).permute(1, 2, 3, 0, 4).requires_grad_()  # any memory layout
    same, valid = torch.rand(4, 6, 6) > 0.5, torch.rand(4, 6) > 0.3
    counted = pair_mask(6, pairs) & valid[:, :, None] & valid[:, None]
    expected = torch.stack([
        torch.stack([F.binary_cross_entropy_with_logits(fit[counted], same[counted].float()) for fit in row]) for row in logits
    ])  # fmt: skip
    ours = pair_bce(logits, same, pairs=pairs, valid=valid)
    torch.testing.assert_close(ours, expected)
    factor = torch.rand(2, 3)
    (want,) = torch.autograd.grad((expected * factor).sum(), logits)
    (got,) = torch.autograd.grad((ours * factor).sum(), logits)
    torch.testing.assert_close(got, want)


def test_nothing_to_count_costs_nothing() -> None:
    logits = torch.randn(1, 1, 2, 3, 3, requires_grad=True)
    none = torch.zeros(2, 3, dtype=torch.bool)
    loss = pair_bce(logits, torch.ones(2, 3, 3, dtype=torch.bool), pairs="upper", valid=none)
    loss = loss + class_loss(logits, torch.zeros(2, 3, dtype=torch.int64), valid=none)
    loss.sum().backward()
    assert float(loss.detach()) == 0 and float(logits.grad.abs().sum()) == 0


def test_class_loss_ignores_invalid_tokens() -> None:
    logits, label = torch.randn(2, 2, 3, 5, 4), torch.randint(0, 4, (3, 5))
    valid = torch.rand(3, 5) > 0.4
    ours = class_loss(logits, label, valid=valid)
    plain = F.cross_entropy(logits[1, 0][valid], label[valid])
    torch.testing.assert_close(ours[1, 0], plain)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="valid: upper"):
        pair_mask(3, "lower")
    with pytest.raises(ValueError, match="valid: argmax"):
        agreement(torch.zeros(1, 2, 3), "mean")
