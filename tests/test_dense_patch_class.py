"""The class of a patch: the published rule, selection, purity."""

import pytest
import torch
from torch.nn import functional as F

from dense.contract import Grids, LabelMaps
from dense.heads import Heads
from dense.patch_class import PatchRule, patch_class
from errors import UserError


def planted(n_images=16, grid=6, patch=4, seed=0):
    """Two layers (noise, code of the class of the patch), 3 classes with background, a column of void."""
    rng = torch.Generator().manual_seed(seed)
    named = torch.randint(0, 3, (n_images, grid, grid), generator=rng)
    noise = torch.randn(2, n_images, grid, grid, 6, generator=rng)
    tokens = torch.stack([noise[0], torch.eye(3, 6)[named] * 4 + noise[1]])
    maps = named.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    maps[:, :, 0] = 255
    return Grids.from_tensor(tokens, patch=patch, layers=[2, 7]), LabelMaps.from_tensor(maps, ["background", "a", "b"])


def both():
    (a, b), (c, d) = planted(), planted(n_images=6, seed=1)
    return {"train": a, "test": c}, {"train": b, "test": d}


def test_the_published_vote():
    maps = torch.tensor([[[255, 255, 1, 2], [255, 2, 1, 2], [0, 0, 2, 2], [1, 1, 1, 1]]])
    published = PatchRule(fill=True, drop=True, n_classes=3)
    filled = published.filled(LabelMaps.from_tensor(maps, 3)).at(torch.tensor([0]), (4, 4))
    named, purity = published.votes(filled, (2, 2))
    blocks = filled.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3)
    assert torch.equal(named, blocks.mode(-1).values - 1)  # torch's mode is what the published program calls
    assert named.tolist() == [[[-1, 0], [-1, 0]]] and purity.tolist() == [[[0.75, 0.5], [0.5, 0.5]]]
    clean = PatchRule(fill=False, drop=False, n_classes=3)
    assert clean.votes(maps, (2, 2))[0].tolist() == [[[2, 1], [0, 1]]]
    assert clean.target(maps, (2, 2)).sum(-1).tolist() == [[[1, 1], [1, 1]]]
    assert published.target(filled, (2, 2)).sum(-1).tolist() == [[[0, 1], [0, 1]]]


def test_probeit_scores_foreground_patches_only():
    features, labels = both()
    options = {"lrs": [5e-2], "normalize": ["none"], "seeds": 1, "selection": "none", "score_sizes": [], "epochs": 12}
    results = patch_class(features, labels, **options, void="background", background="drop")
    assert [r.setting["layer"] for r in results] == [2, 7] and len(results[0].classes.value) == 2
    assert 0 < int(results[1].confusion.sum()) < 6 * 36
    assert int(results[1].confusion.sum()) == int((labels["test"].at(torch.arange(6), (24, 24))[:, 1::4, 1::4] % 255 > 0).sum())
    assert float(results[1].metrics["accuracy"].value) > 0.9 > float(results[0].metrics["accuracy"].value)


def test_the_clean_variant_has_both_normalizations_and_purity():
    features, labels = both()
    results = patch_class(features, labels, lrs=[1e-6, 5e-2], seeds=2, epochs=4, batch_size=4)
    assert {(r.setting["normalize"], r.setting["size"]) for r in results} == {
        (kind, size) for kind in ("standardize", "none") for size in ("patches", "full")
    }
    best = [r for r in results if r.setting["layer"] == 7 and r.setting["size"] == "patches"]
    assert all(r.notes["lr"] == 5e-2 and r.notes["selected_on"] == "train_part" for r in best)
    for r in best:
        counts = {k: float(v.value) for k, v in r.metrics.items() if k.startswith("accuracy")}
        assert counts["accuracy"] > 0.9 and counts["accuracy_purity_1"] > 0.9 and counts["accuracy_purity_0.75"] > 0.5
        assert counts["accuracy_purity_0"] != counts["accuracy_purity_0"]  # no patch is that mixed


def test_every_learning_rate_is_reported_without_selection():
    features, labels = both()
    options = {"seeds": [3], "normalize": ["none"], "selection": "none", "score_sizes": []}
    results = patch_class(features, labels, lrs=[1e-2, 5e-2], **options)
    assert [(r.setting["layer"], r.setting["lr"]) for r in results] == [(2, 1e-2), (7, 1e-2), (2, 5e-2), (7, 5e-2)]
    alone = patch_class(features, labels, lrs=[5e-2], **options)
    assert torch.equal(alone[1].confusion, results[3].confusion)


def test_a_head_equals_a_plain_linear_layer():
    features, labels = both()
    options = {"seeds": [0], "normalize": ["none"], "selection": "none", "score_sizes": [], "epochs": 2, "batch_size": 5}
    (_, result) = patch_class(features, labels, lrs=[1e-2], **options)
    start = Heads(1, [0], [2, 7], 6, 3)
    layer = torch.nn.Linear(6, 3)
    layer.weight.data, layer.bias.data = start.weights[0][1, :, 0].T.clone(), start.offsets[0][1, 0].clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    rule, maps = PatchRule(False, False, 3), labels["train"].at(torch.arange(16), (24, 24))
    named, _ = rule.votes(maps, (6, 6))
    x = features["train"].read(torch.arange(16))[1]
    for epoch in range(2):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch))
        for part in order.split(5):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[part]).flatten(0, 2), named[part].flatten(), ignore_index=-1).backward()
            optimizer.step()
    called = layer(features["test"].read(torch.arange(6))[1]).argmax(-1)
    wanted, _ = rule.votes(labels["test"].at(torch.arange(6), (24, 24)), (6, 6))
    hits = (called == wanted)[wanted >= 0].float().mean()
    assert float(result.metrics["accuracy"].value) == pytest.approx(float(hits))


def test_what_is_asked_is_checked():
    features, labels = both()
    for wrong, message in (
        ({"void": "keep"}, "patch_class.void"),
        ({"background": "x"}, "patch_class.background"),
        ({"normalize": ["x"]}, "patch_class.normalize"),
        ({"selection": "best"}, "patch_class.selection"),
        ({"optimizer": "x"}, "patch_class.optimizer"),
    ):
        with pytest.raises(UserError, match=message):
            patch_class(features, labels, **wrong)
