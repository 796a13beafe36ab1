"""Reading and causing: reference values, laws of the edits, and a planted transformer whose mechanism is known."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from analysis import grouping, objects
from analysis import interventions as act
from analysis.factors import (
    attention_correlation,
    binding_basis,
    kept_rank_rows,
    rank_rows,
    smallest_rank,
    truncated,
)
from analysis.subspaces import (
    angle_rows,
    angle_table,
    check_same_space,
    compare_subspaces,
    overlap,
    overlap_square,
    principal_angles,
    random_angles,
)
from backbones.contract import Backbone, BackboneFacts
from errors import UserError
from pairs.pair_form import PairForm

GOLDEN = json.loads((Path(__file__).parent / "golden/object_binding/derived.json").read_text())["data"]


def pair_form(matrix: Tensor, bias: float = 0.0) -> PairForm:
    """The formula of one seed with this form and nothing else."""
    none = torch.zeros(1, len(matrix))
    return PairForm("tokens", None, None, None, None, matrix[None], torch.zeros(1), none, none, torch.tensor([bias]), "sigmoid")


# ----------------------------------------------------------------------------------------------------- reference values


def test_edits_are_those_of_the_reference():
    golden = GOLDEN["ablation"]
    h, basis = torch.tensor(golden["h"]).double(), torch.tensor(golden["basis_columns"]).double()
    ids, order = torch.tensor(golden["instance_ids"]), torch.tensor(golden["perm"])
    close = lambda found, name: torch.testing.assert_close(found, torch.tensor(golden[name]).double(), atol=1e-6, rtol=0)
    close(act.shuffle(h, basis, order), "shuffle_full")
    close(act.remove(h, basis, 1.0), "subtract")
    for dose, name in ((1.0, "inject_alpha0"), (0.5, "inject_alpha0p5")):
        close(act.inject(h, basis, ids + 1, dose), name)  # the reference counts its id 0 as an object


def test_ranks_and_truncated_scores_are_those_of_the_reference():
    golden = GOLDEN["extra_probes"]
    factors, x, y = golden["factorisation"], torch.tensor(golden["x"]), torch.tensor(golden["y"])
    w = torch.tensor(factors["W"])
    form = pair_form((w + w.mT) / (2 * len(w) ** 0.5), golden["bias"])
    (row,) = rank_rows(form, 0)
    assert row["effective_rank"] == pytest.approx(factors["effective_rank_entropy_abs"], abs=1e-5)
    assert row["participation_ratio"] == pytest.approx(factors["participation_ratio_sq"], abs=1e-5)
    assert row["stable_rank"] == pytest.approx(factors["stable_rank"], abs=1e-5)
    assert row["rank_90%"] == 1 + sum(share < 0.9 for share in factors["energy_sq_cumulative"])
    for rank, name in ((2, "rank2_pairwise"), (7, "full_pairwise")):
        found = truncated(form, rank).logits(x, y)[0]
        torch.testing.assert_close(found, torch.tensor(factors[name]), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- laws


def test_a_dose_of_zero_is_no_intervention_to_the_bit():
    h, basis, ids = torch.randn(9, 6), act.random_basis(6, 2, torch.Generator()), torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 0])
    first, second = torch.tensor([1, 2]), torch.tensor([3, 4])
    for after in (
        act.remove(h, basis, 0), act.inject(h, basis, ids, 0), act.swap(h, basis, first, second, 0),
        act.noise(h, basis, 0, torch.Generator()),
    ):  # fmt: skip
        assert after is h
    assert act.per_image(lambda x, image: x)(batch := torch.randn(2, 3, 4)) is batch
    backbone, images = Planted(0), torch.randn(2, 24, 4, 4)
    plain, _ = act.run_blocks(backbone, images, [0, 1, 2])
    edited, _ = act.run_blocks(backbone, images, [0, 1, 2], act.edited_after(backbone, 0, lambda x: x))
    assert all(torch.equal(a, b) for a, b in zip(plain, edited, strict=True))


def test_edits_change_nothing_outside_the_subspace_and_keep_what_they_permute():
    h, basis = torch.randn(12, 8), act.random_basis(8, 3, torch.Generator().manual_seed(1))
    order = act.derangement(12, 1.0, torch.Generator().manual_seed(2))
    outside = lambda x: x - x @ basis @ basis.mT
    after = act.shuffle(h, basis, order)
    torch.testing.assert_close(outside(after), outside(h))
    torch.testing.assert_close((after @ basis), (h @ basis)[order])
    gone = act.remove(h, basis, 1.0)
    assert float((gone @ basis).abs().max()) < 1e-5
    once = act.swap(h, basis, torch.tensor([0, 3]), torch.tensor([5, 7]), 1.0)
    torch.testing.assert_close(act.swap(once, basis, torch.tensor([0, 3]), torch.tensor([5, 7]), 1.0), h)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_derangement_moves_the_share_asked_for(share):
    order = act.derangement(40, share, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(40))
    assert int((order != torch.arange(40)).sum()) == (40 * share if share != 0.025 else 0)
    groups = torch.arange(40) % 4
    inside = act.derangement(40, share, torch.Generator().manual_seed(0), groups)
    assert torch.equal(groups[inside], groups)


def test_noise_keeps_mean_and_variance_of_the_binding_part():
    h = torch.randn(4000, 6) * torch.arange(1, 7) + 2
    basis = act.random_basis(6, 2, torch.Generator().manual_seed(3))
    before, after = h @ basis, act.noise(h, basis, 1.0, torch.Generator().manual_seed(4)) @ basis
    torch.testing.assert_close(after.mean(0), before.mean(0), atol=0.4, rtol=0)
    torch.testing.assert_close(after.std(0), before.std(0), atol=0.3, rtol=0)
    assert float((after - before).abs().mean()) > 1


def test_principal_angles_and_overlap():
    basis = act.random_basis(10, 3, torch.Generator().manual_seed(0))
    turned = basis @ torch.linalg.qr(torch.randn(3, 3))[0]
    assert float(principal_angles(basis, turned).max()) < 0.1
    apart = torch.linalg.qr(torch.cat([basis, torch.randn(10, 3)], 1))[0][:, 3:6]
    torch.testing.assert_close(principal_angles(basis, apart), torch.full((3,), 90.0), atol=0.1, rtol=0)
    angles = torch.stack([principal_angles(basis, other) for other in (basis, turned, apart)])
    torch.testing.assert_close(overlap(angles), torch.tensor([1.0, 1.0, 0.0]), atol=1e-4, rtol=0)
    half = torch.eye(10)[:, [0, 1]] @ torch.diag(torch.tensor([1.0, 1.0])), torch.eye(10)[:, [1, 2]]
    torch.testing.assert_close(principal_angles(*half), torch.tensor([0.0, 90.0]), atol=0.1, rtol=0)


def test_random_subspaces_overlap_by_rank_over_width():
    angles = random_angles(24, 6, seed=1)
    assert angles.shape == (200, 6) and float(overlap(angles).mean()) == pytest.approx(6 / 24, abs=0.01)
    assert bool((angles.diff(dim=1) >= 0).all()) and torch.equal(angles, random_angles(24, 6, seed=1))


def fitted_on(backbone: str, forms: list[PairForm], layers: list, name: str) -> SimpleNamespace:
    """What the comparison of subspaces needs of a finished run."""
    facts = SimpleNamespace(name=backbone, weights="sha256:1", dim=12)
    return SimpleNamespace(
        forms=lambda: forms, layers=layers, directory=Path(name), backbone=SimpleNamespace(facts=facts)
    )  # fmt: skip


def test_subspaces_of_layers_seeds_and_runs_are_compared():
    axes = torch.eye(12)
    of = lambda *places: sum(((k + 1.0) * torch.outer(axes[p], axes[p]) for k, p in enumerate(places)), torch.zeros(12, 12))
    seeds = lambda *matrices: pair_form(matrices[0])._replace(form=torch.stack(matrices), bias=torch.zeros(len(matrices)))
    mine = [seeds(of(0, 1), of(0, 1)), seeds(of(0, 2), of(0, 2))]
    run = fitted_on("vit", mine, ["embed", 3], "mine")
    other = fitted_on("vit", [seeds(of(4, 5)), seeds(of(2, 0))], [7, 3], "other")
    check_same_space(run, [other])
    compared = compare_subspaces(run, mine, [other], 2)
    shared = {(c.between, c.layer, c.second): float(overlap(c.angles)) for c in compared}
    expected = {
        ("layers", "embed", "3"): 0.5,
        ("seeds", "embed", "seed 1"): 1,
        ("seeds", 3, "seed 1"): 1,
        ("runs", 3, "other"): 1,
    }
    assert shared == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(overlap_square(compared, run.layers), torch.tensor([[1, 0.5], [0.5, 1]]), atol=1e-5, rtol=0)
    random = random_angles(12, 2)
    rows = list(angle_rows(compared, random))
    assert [row["between"] for row in rows] == ["layers", "seeds", "seeds", "runs", "random"]
    assert rows[0]["smallest"] == pytest.approx(0, abs=0.1) and rows[0]["largest"] == pytest.approx(90, abs=0.1)
    names = [line[0] for line in angle_table(compared, random, 3)]
    assert names == ["layers embed and 3", "seeds at layer 3", "other at layer 3", "random subspaces"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (fitted_on("deit", [], [3], "b"), "b reads tokens of another backbone than a .name deit, not vit.*one backbone"),
        (fitted_on("vit", [], [9], "b"), "b has none of the layers of a"),
    ],
)
def test_runs_whose_tokens_differ_are_not_compared(other, message):
    with pytest.raises(UserError, match=message):
        check_same_space(fitted_on("vit", [], [3], "a"), [other])


def test_attention_on_the_object_and_correlation_are_what_they_say():
    ids = torch.tensor([[1, 1, 2, 2, 0]])
    weights = torch.zeros(1, 2, 5, 5)
    weights[0, 0] = ((ids[0][:, None] == ids[0]) & (ids[0] > 0)).float()
    weights[0, 1] = 1 / 5
    torch.testing.assert_close(act.attention_on_object(weights, ids), torch.tensor([1.0, 0.25]))
    scores = torch.rand(5, 5)
    found = attention_correlation(torch.stack([scores, -scores, torch.rand(5, 5)]), scores)
    assert found[:2].tolist() == pytest.approx([1, -1]) and abs(float(found[2])) < 1


# ---------------------------------------------------------------------------------------------- a planted transformer


class _Attention(nn.Module):
    """Heads of 8 channels; one of them attends within objects, because its queries and keys read the planted subspace."""

    num_heads = 3

    def __init__(self, mine: int, subspace: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        dim, r = subspace.shape
        self.query = torch.randn(3, dim, 8, generator=generator) * 0.3
        self.key = torch.randn(3, dim, 8, generator=generator) * 0.3
        self.query[mine], self.key[mine] = 0, 0
        self.query[mine][:, :r] = self.key[mine][:, :r] = 2.0 * subspace
        self.value = torch.randn(3, dim, 8, generator=generator) * 0.1
        self.proj = nn.Linear(24, dim, bias=False)
        self.proj.weight.data = torch.randn(dim, 24, generator=generator) * 0.02

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnd,hde->bhne", x, w) for w in (self.query, self.key, self.value))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, attn: _Attention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Planted(Backbone):
    """Three blocks on tokens that are given as images [B, D, h, w]; the head of block 1 that binds is known."""

    def __init__(self, seed: int, dim: int = 24, rank: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        facts = dict.fromkeys(BackboneFacts.__dataclass_fields__, "")
        facts |= {
            "patch_size": 1,
            "depth": 3,
            "dim": dim,
            "heads": 3,
            "num_prefix_tokens": 0,
            "dynamic_size": True,
            "name": "planted",
        }
        super().__init__(BackboneFacts(**facts))
        self.subspace = act.random_basis(dim, rank, generator)
        self.head = int(torch.randint(3, (1,), generator=generator))
        heads = [(self.head if block == 1 else -1, self.subspace) for block in range(3)]
        self.model = SimpleNamespace(
            blocks=nn.ModuleList(_Block(_Attention(mine, s if mine >= 0 else s * 0, generator)) for mine, s in heads)
        )

    def read(self, images: Tensor, layers: list, grid: tuple[int, int]) -> list[Tensor]:
        x, found = images.flatten(2).mT, {}
        for number, block in enumerate(self.model.blocks):
            x = found[number] = block(x)
        return [found[layer] for layer in layers]


def planted_scenes(backbone: Planted, seed: int, n: int = 12) -> tuple[Tensor, Tensor]:
    """Images [n, D, 4, 4] and identities [n, 16]: content noise, and a code of the object in the planted subspace."""
    generator = torch.Generator().manual_seed(1000 + seed)
    dim, rank = backbone.subspace.shape
    identity = torch.arange(16).repeat(n, 1) // 4 + 1
    codes = torch.linalg.qr(torch.randn(n, rank, rank, generator=generator))[0] * 3  # [n, 4, r]: a frame of its own per image
    x = 0.3 * torch.randn(n, 16, dim, generator=generator)
    x = x - x @ backbone.subspace @ backbone.subspace.mT + codes.repeat_interleave(4, 1) @ backbone.subspace.mT
    return x.mT.reshape(n, dim, 4, 4), identity


def fitted_form(tokens: Tensor, identity: Tensor) -> PairForm:
    """The form [D, D] of least squares on products of tokens, from pairs of one object (1) and of two (-1)."""
    dim = tokens.shape[-1]
    same = (identity[:, :, None] == identity[:, None]).float() * 2 - 1
    products = torch.einsum("bid,bje->bijde", tokens, tokens).reshape(-1, dim * dim).double()
    x = torch.cat([products, torch.ones(len(products), 1)], 1)
    solution = torch.linalg.solve(x.mT @ x + 1e-2 * torch.eye(x.shape[1]), x.mT @ same.reshape(-1).double())
    matrix = solution[:-1].view(dim, dim).float()
    return pair_form((matrix + matrix.mT) / 2, float(solution[-1]))


def swapped_flips(backbone: Planted, images: Tensor, identity: Tensor, form: PairForm, basis: Tensor) -> np.ndarray:
    """Flipped and asked answers when patches of two objects exchange their parts in a subspace after block 0."""
    first, second = torch.tensor([0, 1]), torch.tensor([4, 5])
    edit = act.per_image(lambda h, image: act.swap(h, basis, first, second, 1.0))
    (before,), _ = act.run_blocks(backbone, images, [0])
    (after,), _ = act.run_blocks(backbone, images, [0], act.edited_after(backbone, 0, edit))
    logits = [(form.logits(a, a)[0], form.logits(b, b)[0]) for a, b in zip(before, after, strict=True)]
    return np.sum([act.flip_rate(a, b, first, second, ids) for (a, b), ids in zip(logits, identity, strict=True)], axis=0)


def test_on_a_planted_transformer_subspace_and_head_are_found_and_swapping_flips_the_answers():
    found_subspace = found_head = 0
    flips, random_flips = np.zeros(2), np.zeros(2)
    for seed in range(20):
        backbone = Planted(seed)
        images, identity = planted_scenes(backbone, seed)
        (tokens, read), weights = act.run_blocks(backbone, images, [0, 1], keep=lambda w: w)
        form = fitted_form(tokens, identity)
        basis = binding_basis(form, 4)
        found_subspace += float(principal_angles(basis, backbone.subspace).max()) < 5
        scores = [form.scores(x, x) for x in tokens]
        r = torch.stack([attention_correlation(w, s) for w, s in zip(weights[1], scores, strict=True)]).mean(0)
        on_object = act.attention_on_object(weights[1], identity)
        found_head += int(r.argmax()) == int(on_object.argmax()) == backbone.head
        without, _ = act.run_blocks(backbone, images, [1], act.without_heads(backbone, {1: [backbone.head]}))
        assert float((without[0] - read).abs().max()) > 0
        flips += swapped_flips(backbone, images, identity, form, basis)
        other = act.random_basis(24, 4, torch.Generator().manual_seed(5000 + seed))
        random_flips += swapped_flips(backbone, images, identity, form, other)
    assert (found_subspace, found_head) == (20, 20)
    assert flips[1] > 1000 and flips[0] / flips[1] >= 0.95 and random_flips[0] / random_flips[1] <= 0.05


def test_accuracy_saturates_at_the_planted_rank():
    backbone = Planted(0)
    images, identity = planted_scenes(backbone, 0)
    (tokens,), _ = act.run_blocks(backbone, images, [0])
    rows = kept_rank_rows(
        fitted_form(tokens, identity), 0, tokens, identity, torch.ones_like(identity, dtype=torch.bool), [1, 2, 4, 8]
    )
    accuracy = {row["rank"]: row["accuracy"] for row in rows}
    assert accuracy[4] > 0.99 and accuracy[1] < 0.95 and smallest_rank(rows) <= 4


def test_what_cannot_be_intervened_in_is_named():
    backbone = Planted(0)
    bare = SimpleNamespace(facts=backbone.facts, model=None)
    with pytest.raises(UserError, match="planted has no blocks"), act.edited_after(bare, 0, lambda x: x):
        pass
    backbone.model.blocks[1].attn = nn.Identity()
    with pytest.raises(UserError, match="block 1 of planted has no attention heads"), act.without_heads(backbone, {1: [0]}):
        pass


# ------------------------------------------------------------------------------------------------- objects out of pairs


def test_the_rand_index_is_the_count_over_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, 30), rng.integers(0, 5, 30)
        table = {(x, y): 0 for x in (True, False) for y in (True, False)}
        for i, j in itertools.combinations(range(30), 2):
            table[bool(a[i] == a[j]), bool(b[i] == b[j])] += 1
        both, only_a, only_b, none = (table[k] for k in ((True, True), (True, False), (False, True), (False, False)))
        expected = (
            2 * (both * none - only_a * only_b)
            / ((both + only_a) * (only_a + none) + (both + only_b) * (only_b + none))
        )  # fmt: skip
        assert objects.adjusted_rand_index(a, b) == pytest.approx(expected, abs=1e-9)
    assert objects.adjusted_rand_index(a, a + 7) == 1.0
    assert objects.foreground_ari(np.array([0, 0, 1, 1, 2]), np.array([5, 6, 1, 1, 2])) == 1.0


def test_best_overlap_takes_a_group_for_every_object():
    true, found = np.array([0, 1, 1, 1, 2, 2, 2, 2]), np.array([1, 1, 1, 1, 1, 3, 3, 4])
    ious = [3 / 5, 2 / 4]
    assert objects.mean_best_overlap(true, found) == pytest.approx(np.mean(ious), abs=1e-9)
    assert objects.mean_matched_iou(true, found) == pytest.approx(np.mean(ious), abs=1e-9)
    assert objects.mean_best_overlap(true * 0, found) is None


@pytest.mark.parametrize("method", ["spectral", "correlation", "k-means"])
def test_planted_groups_are_found_without_their_number(method):
    generator = torch.Generator().manual_seed(0)
    true = torch.arange(40) % 5
    same = (true[:, None] == true).float()
    logits = 6 * same - 3 + 0.8 * torch.randn(40, 40, generator=generator)
    logits = (logits + logits.mT) / 2
    points = torch.nn.functional.one_hot(true, 5) + 0.05 * torch.randn(40, 5, generator=generator)
    spectrum = objects.spectrum(logits.sigmoid())
    assert objects.count_by_gap(spectrum) == objects.count_above(spectrum, 0.5) == 5
    found = {
        "spectral": lambda: objects.normalised_cut(spectrum, 5),
        "correlation": lambda: objects.correlation_clustering(logits),
        "k-means": lambda: objects.k_means(points, 5),
    }[method]()
    assert objects.adjusted_rand_index(true.numpy(), found.numpy()) == 1.0


def planted_patches(key: str, shift: float, seed: int, n: int = 4) -> grouping.Patches:
    """A scene of 36 patches of n objects and background: tokens know nothing of them, logits do, but lean by `shift`."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(36) % (n + 1)
    same = (labels[:, None] == labels).float()
    logits = 4 * same - 2 + shift + 0.5 * torch.randn(36, 36, generator=generator)
    place = torch.arange(36).view(6, 6).repeat_interleave(2, 0).repeat_interleave(2, 1)
    tokens = torch.randn(36, 8, generator=generator)
    return grouping.Patches(key, tokens, (logits + logits.mT) / 2, place, labels[place].numpy(), labels[place].numpy())


def test_the_setting_is_chosen_on_validation_scenes_and_undoes_a_lean_of_the_probe():
    val = [planted_patches(f"val {i}", -2.75, i) for i in range(3)]
    chosen, tried = grouping.choose_settings(val)
    assert chosen["correlation"].setting[1] <= -2.0 and chosen["correlation"].score == pytest.approx(1.0)
    assert {row["method"] for row in tried} == set(grouping.METHODS)
    assert max(row["fg_ari"] + row["mbo"] for row in tried if row["method"] == "k-means") / 2 == chosen["k-means"].score
    test = [planted_patches(f"test {i}", -2.75, 100 + i) for i in range(6)]
    rows, masks = grouping.group_scenes(test, chosen)
    assert len(rows) == 6 * 5 and len(masks) == 6 and masks[0]["spectral"].shape == (12, 12)
    records, gain = grouping.summary(rows, chosen, 0)
    by_method = {record["method"]: record for record in records}
    assert by_method["correlation"]["mbo"] == by_method[grouping.CEILING]["fg_ari"] == 1.0
    assert by_method["k-means"]["mbo_low"] < by_method["k-means"]["mbo"] < by_method["k-means"]["mbo_high"] < 0.8
    first, second = gain["method"].split(" minus ")
    assert gain["mbo"] == pytest.approx(by_method[first]["mbo"] - by_method[second]["mbo"]) and gain["mbo_low"] > 0
    with pytest.raises(UserError, match="none of the validation images has an object"):
        grouping.choose_settings([val[0]._replace(true=val[0].true * 0)])
    with pytest.raises(UserError, match="none of the images that are grouped has an object"):
        grouping.summary(grouping.group_scenes([val[0]._replace(true=val[0].true * 0)], chosen)[0], chosen, 0)


def test_the_group_at_the_border_is_the_background():
    mask = torch.tensor([[7, 7, 7, 2], [7, 3, 3, 7], [7, 3, 3, 7], [7, 7, 7, 7]])
    assert grouping.background_first(mask).tolist() == [[0, 0, 0, 1], [0, 2, 2, 0], [0, 2, 2, 0], [0, 0, 0, 0]]
