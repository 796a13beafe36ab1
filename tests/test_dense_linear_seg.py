"""The stack of linear heads, its losses, selection, and logistic regression."""

import pytest
import torch
from torch.nn import functional as F

from dense.contract import Grids, LabelMaps, soft_labels
from dense.heads import Heads, Normalization, Recipe, add_patch_gradients, patch_loss, pixel_loss, share_target
from dense.linear_seg import HeadFit, linear_seg, split_images
from dense.logistic import Patches, fit_logistic, logistic_seg
from errors import UserError


def planted(n_images=20, n_classes=3, grid=5, patch=3, seed=0):
    """Two layers: the first is noise, the second the code of the class."""
    rng = torch.Generator().manual_seed(seed)
    named = torch.randint(0, n_classes, (n_images, grid, grid), generator=rng)
    noise = torch.randn(2, n_images, grid, grid, 6, generator=rng)
    codes = torch.eye(n_classes, 6)[named]
    tokens = torch.stack([noise[0], codes * 2 + 0.5 * noise[1]]) * 10
    maps = named.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    maps[:, 0, 0] = 255
    return Grids.from_tensor(tokens, patch=patch, layers=["embed", 3]), LabelMaps.from_tensor(maps, n_classes)


def both(seed=0):
    train, test = planted(seed=seed), planted(n_images=6, seed=seed + 1)
    return {"train": train[0], "test": test[0]}, {"train": train[1], "test": test[1]}


QUICK = {"epochs": 3, "batch_size": 8, "lrs": [0.01, 0.1], "weight_decays": [0.0, 1e-2], "seeds": 2}


@pytest.mark.parametrize("options", [{}, {"loss": "pixels", "loss_size": 9, "optimizer": "sgd", "normalize": "batch_norm"}])
def test_a_head_alone_and_in_a_stack_are_the_same(options):
    features, labels = both()
    stack = linear_seg(features, labels, **{**QUICK, **options, "lrs": [0.1, 1e-9], "weight_decays": [1e-2]})
    chosen = next(r for r in stack if r.setting["layer"] == 3 and r.setting["seed"] == 1)
    assert chosen.notes["lr"] == 0.1
    alone = linear_seg(
        {name: grids.at(3) for name, grids in features.items()},
        labels,
        **{**QUICK, **options, "lrs": [0.1], "weight_decays": [1e-2], "seeds": [1]},
    )
    assert torch.equal(alone[0].confusion, chosen.confusion)


def test_memory_changes_no_number():
    features, labels = both()
    a = linear_seg(features, labels, **QUICK)
    b = linear_seg(features, labels, **QUICK, max_gb=1e-9)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.metrics["miou"].value, y.metrics["miou"].value, atol=1e-3, rtol=0)


def test_the_layer_that_knows_the_classes_is_seen():
    features, labels = both()
    results = linear_seg(features, labels, **QUICK, score_sizes=["full", "input", 30])
    assert len(results) == 2 * 2 * 3
    score = {(r.setting["layer"], r.setting["seed"], r.setting["size"]): float(r.metrics["miou"].value) for r in results}
    assert all(score[3, s, "full"] > 0.6 and score["embed", s, "full"] < 0.5 for s in (0, 1))
    assert score[3, 0, "full"] == score[3, 0, "input"]
    assert {r.notes["selected_on"] for r in results} == {"train_part"}


def test_selection_on_the_reported_split_is_said():
    features, labels = both()
    results = linear_seg(features, labels, **QUICK, selection="reported", loss="pixels", loss_size=15, score_sizes=[15])
    assert {r.notes["selected_on"] for r in results} == {"reported"}
    mean = [float(r.metrics["miou"].value) for r in results if r.setting["layer"] == 3]
    assert sum(mean) / 2 == pytest.approx(results[-1].notes["selection_score"])


@pytest.mark.parametrize("loss", ["patches", "pixels"])
def test_images_kept_apart_show_how_a_fit_ended(loss):
    features, labels = both()
    known = {"batch_size": 8, "weight_decays": [0.0], "seeds": 2, "schedule": "constant", "loss": loss, "loss_size": 15}
    last = lambda **options: [r.notes for r in linear_seg(features, labels, **known, **options) if r.setting["layer"] == 3][0]
    slow, quick, wild = last(lrs=[1e-3], epochs=8), last(lrs=[0.1], epochs=24), last(lrs=[1e4], epochs=4)
    assert slow["still_falling"] and slow["epochs_needed"] > slow["epochs"] == 8
    assert not quick["still_falling"] and not quick["worse_than_constant"]
    assert wild["worse_than_constant"]
    published = linear_seg(features, labels, **known, lrs=[0.1], epochs=2, selection="reported")
    assert all("still_falling" not in r.notes for r in published)  # no image is kept apart


def test_the_held_out_loss_is_that_of_the_heads_and_of_the_class_shares():
    grids, maps = planted()
    recipe = Recipe([0.1], [0.0], 1, 8, "adam", 0.0, "constant", 1, 1.0, 0.0, 1.0)
    fit = HeadFit(grids, maps, recipe, [0, 1], "standardize", 0.25, order_seed=0)
    target = share_target(3)
    tokens = grids.subset(fit.kept_apart).read(torch.arange(5))  # [L, B, h, w, D]
    shares = soft_labels(maps.subset(fit.kept_apart).at(torch.arange(5), (15, 15)), (5, 5), 3)
    expected = patch_loss(fit.heads(fit.norm(tokens)), shares) / shares.sum()
    torch.testing.assert_close(fit.held_out_loss(target)[:, 0].float(), expected.detach())
    fitted = soft_labels(maps.subset(fit.fitted_on).at(torch.arange(15), (15, 15)), (5, 5), 3).sum((0, 1, 2)) + 0.5
    constant = -(shares.sum((0, 1, 2)) * (fitted / fitted.sum()).log()).sum() / shares.sum()
    torch.testing.assert_close(fit.held_out_loss(target, constant=True).float(), constant.expand(2, 1, 2))


def test_losses_equal_their_definitions():
    logits = torch.randn(2, 3, 4, 4, 5, 3)  # [L, B, h, w, G, C]
    maps = torch.randint(0, 3, (3, 8, 8))
    maps[0, :3] = 255
    shares = soft_labels(maps, (4, 4), 3)
    expected = -(logits.log_softmax(-1) * shares[None, ..., None, :]).sum((1, 2, 3, 5))
    torch.testing.assert_close(patch_loss(logits, shares), expected)
    target = torch.where(maps == 255, -1, maps)
    found = pixel_loss(logits, target)
    one = F.interpolate(logits[1, :, :, :, 2].permute(0, 3, 1, 2), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[1, 2], F.cross_entropy(one, target, ignore_index=-1, reduction="sum"))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_gradients_of_all_heads_are_those_of_autograd(dtype, atol, monkeypatch):
    monkeypatch.setattr("dense.heads.ROWS", 7)
    heads = Heads(2, [0, 1, 2], ["embed", 0], 6, 3)
    x, maps = torch.randn(2, 3, 4, 4, 6), torch.randint(0, 3, (3, 8, 8))
    maps[0, :3] = 255
    shares = soft_labels(maps, (4, 4), 3)
    count = shares.sum()
    (patch_loss(heads(x), shares) / count).sum().backward()
    expected = [p.grad.clone() for p in heads.parameters()]
    assert add_patch_gradients(heads, x, shares, count, dtype)
    for parameter, gradient in zip(heads.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=atol, rtol=0)
    x[0, 0, 0, 0] = torch.inf
    assert not add_patch_gradients(heads, x, shares, count, dtype)


def test_heads_are_convolutions():
    heads = Heads(2, [0, 1], ["embed", 0], 6, 3)
    x = torch.randn(2, 4, 5, 5, 6)
    logits = heads(x)
    weight, offset = heads.weights[1][0, :, 1], heads.offsets[1][0, 1]
    expected = F.conv2d(x[0].permute(0, 3, 1, 2), weight.T[..., None, None], offset)
    torch.testing.assert_close(logits[0, ..., 3, :].permute(0, 3, 1, 2), expected)
    assert torch.equal(heads.weights[0], heads.weights[1])  # recipes start from the same weights


def test_batch_norm_is_that_of_torch():
    norm, x = Normalization("batch_norm", 2, 6), torch.randn(2, 4, 5, 5, 6) * 3 + 1
    reference = torch.nn.BatchNorm2d(6, affine=False)
    torch.testing.assert_close(norm(x)[1].permute(0, 3, 1, 2), reference(x[1].permute(0, 3, 1, 2)))
    norm.eval()
    reference.eval()
    torch.testing.assert_close(norm(x)[1].permute(0, 3, 1, 2), reference(x[1].permute(0, 3, 1, 2)))


def test_what_is_asked_is_checked():
    features, labels = both()
    with pytest.raises(UserError, match="linear_seg.optimizer=lamb; valid: adamw, adam, sgd"):
        linear_seg(features, labels, optimizer="lamb")
    with pytest.raises(UserError, match="leaves 0 to choose on"):
        split_images(3, 0.1, 0)
    with pytest.raises(UserError, match="not finite in epoch 1"):
        linear_seg(features, labels, **{**QUICK, "lrs": [1e30]}, optimizer="sgd")


def test_logistic_regression_is_at_its_minimum():
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(200, 4, generator=rng) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    labels = (tokens[:, 0] + tokens[:, 3] > 6).long() + (tokens[:, 1] > 5).long()
    head = fit_logistic(Patches(tokens, labels), 3, 0.5)
    mean, std = tokens.mean(0), tokens.std(0, correction=0)
    z = ((tokens - mean) / std).double()
    weight = (head.weight * std[:, None]).double().requires_grad_()
    offset = (head.offset + mean @ head.weight).double().requires_grad_()
    loss = F.cross_entropy(z @ weight + offset, labels, reduction="sum") + weight.square().sum() / (2 * 0.5)
    loss.backward()
    assert float(weight.grad.abs().max()) < 1e-2 and float(offset.grad.abs().max()) < 1e-2
    assert head.converged


def test_logistic_segmentation_reads_the_classes():
    features, labels = both()
    results = logistic_seg(features, labels, cs=[1e-3, 10.0], upsample="nearest", iterations=15)
    assert [r.setting["layer"] for r in results] == ["embed", 3]
    assert float(results[1].metrics["miou"].value) > 0.9 > 0.5 > float(results[0].metrics["miou"].value)
    without = logistic_seg(features, labels, cs=[1.0], ignore=[0], iterations=5)
    assert without[1].confusion[0].sum() == 0 and without[1].confusion[:, 0].sum() == 0
    with pytest.raises(UserError, match="upsample"):
        logistic_seg(features, labels, upsample="cubic")
