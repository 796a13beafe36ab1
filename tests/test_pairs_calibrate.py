"""mode=calibrate: planted worlds whose truth is known, and faults of the statistics that it has to bring to light.

The worlds of most tests are contrary: in half of the images patches of one object score high, in the other half low, by a coin
for every image. So the true AUROC is .5 while every image is far from it, and images are what chance works on.
"""

from dataclasses import replace
from types import SimpleNamespace

import program
import pytest
import torch

import pairs.scores
import trainer
from activation import PatchSample
from controls import Subject
from metrics.bootstrap import Estimate, difference, interval, resample
from pairs.calibrate import CLAIM, ClaimTask, at_layer, auroc, claimed_at, judge, truth_of
from pairs.calibrate_summary import by_effect, rate, wilson
from pairs.worlds import PLANTED, WorldOptions, as_sample, draw_mixing, draw_scenes, draw_tokens, stream
from probes import build_probe
from show.claims import above_every_control

# Colours say nothing of the object here: in a null world every similarity of two features has the AUROC .5 among matched pairs.
WORLD = WorldOptions(n_test=80, patches=16, n_population=1200, population_patches=8, own_color=0.0, texture=0.0)
GROUPS, WORLDS = 20, 6
COUNTS = resample(WORLD.n_test, 400)


def score(subject, mode, split, subset, batch_images=64):
    """Scores of a form that nobody fitted: the dot product, or that of the first half of the channels with the second."""
    sample, task = subject.samples[split], ClaimTask([0])
    probe = build_probe({"mode": mode}, seeds=[0], layers=sample.tokens.layers, dim=sample.tokens.shape[-1])
    if mode == "quadratic":
        with torch.no_grad():
            probe.weight.copy_(torch.eye(probe.dim).roll(probe.dim // 2, 1).triu())
    task.subsets, options = (subset,), SimpleNamespace(batch_images=batch_images, device=torch.device("cpu"))
    return trainer.evaluate(task, [probe], subject, options, split=split, detail=False)


def scored(name, tokens, scenes, split, mode="dot_product", subset=CLAIM, control=""):
    sample = as_sample(scenes, tokens, list(range(len(tokens))))
    return score(Subject(name, control, {}, {split: sample}, [0]), mode, split, subset), sample


def contrary(scenes):
    tokens = []
    for world in range(WORLDS):
        rng = stream(scenes.name, "contrary", world)
        coin = torch.randint(0, 2, (len(scenes.identity), 1, 1), generator=rng) * 2.0 - 1
        own = torch.randn(len(coin), WORLD.objects[1] + 1, 4, generator=rng)
        own = own.gather(1, scenes.identity[..., None].expand(-1, -1, 4))
        half = own + 0.3 * torch.randn(own.shape, generator=rng)
        tokens.append(torch.cat([coin * own, half], -1))
    return torch.stack(tokens)


@pytest.fixture(scope="module")
def null():
    """Per set of scenes: the worlds, the position control and the sample, scored on test images."""
    groups = []
    for group in range(GROUPS):
        scenes = draw_scenes("test", WORLD, f"null-{group}")
        probe, sample = scored(f"null-{group}", contrary(scenes), scenes, "test", "quadratic")
        control, _ = scored(f"null-{group}", scenes.place[None] - 5.5, scenes, "test", control="position")
        groups.append((probe, control, sample))
    return groups


def covers(estimate, truth, counts=COUNTS):
    low, high = interval(estimate, counts, bounds=(-1.0, 1.0))
    return ((low <= truth) & (truth <= high)).tolist()


def share(hits):
    return sum(hits) / len(hits)


def one(estimate, world):
    """The estimate of one world; that of a control of one layer serves all."""
    return Estimate(*(x[world if len(x) > 1 else 0][None] for x in estimate))


def judged(probe, control, world=0, counts=COUNTS):
    estimates = {"": one(auroc(probe, CLAIM), world), "position": one(auroc(control, CLAIM), world)}
    return judge(estimates, estimates, counts)


def claims_of(null, chosen):
    """Whether the claim is made, of the worlds that `chosen` picks from the scores of a set of scenes."""
    return [
        judged(probe, control, world)["claimed"]
        for probe, control, _ in null
        for world in chosen(auroc(probe, CLAIM).value)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ honest worlds


def test_null_worlds_have_the_truth_they_are_said_to_have():
    """Similarities of features without an object's vector, and of places, are worth .5 among matched pairs."""
    scenes = draw_scenes("population", WORLD, "truth")
    for tokens in (draw_tokens(scenes, [0.0] * 3, WORLD), scenes.place[None] - 5.5):
        estimate = auroc(scored("truth", tokens, scenes, "population")[0], CLAIM)
        error = estimate.influence.square().sum(1).sqrt()
        assert ((estimate.value - 0.5).abs() < 4 * error).all() and (error < 0.02).all()


def test_null_worlds_are_claimed_rarely_and_covered_as_promised(null):
    assert share(claims_of(null, lambda values: range(WORLDS))) <= 0.08
    assert 0.88 <= share([hit for probe, _, _ in null for hit in covers(auroc(probe, CLAIM), 0.5)]) <= 0.99


def test_a_planted_object_is_claimed():
    world = replace(WORLD, n_test=100, field=0.0, noise=0.05)
    scenes = draw_scenes("test", world, "planted")
    result, _ = scored("planted", draw_tokens(scenes, [2.0], world), scenes, "test")
    control, _ = scored("planted", scenes.place[None] - 5.5, scenes, "test", control="position")
    row = judged(result, control, counts=resample(100, 400))
    assert row["claimed"] and row["effect"] > 0.2 and list(row["gains"]) == ["position"]


def test_the_claim_needs_every_control_and_at_least_one():
    assert above_every_control([(0.1, 0.05, 0.2), (0.2, 0.01, 0.3)])
    assert not above_every_control([(0.1, 0.05, 0.2), (0.2, -0.01, 0.3)])
    assert not above_every_control([(0.1, 0.0, 0.2)]) and not above_every_control([])


def test_power_counts_a_world_by_its_own_truth():
    def row(strength, effect, claimed):
        return {"strength": strength, "effect": effect, "claimed": claimed, "scenes": "a", "claimed_at": {100: not claimed}}

    rows = [row(0.0, 0.03, True), row(0.5, 0.026, True), row(0.5, 0.034, False), row(0.4, 0.036, True)]
    null, three, four = by_effect(rows)
    assert (null["null"], null["claimed"].n, null["claimed"].hits) == (True, 1, 1)
    assert (three["bin"], three["claimed"].n, three["claimed"].hits) == (3, 2, 1) and three["effect"] == pytest.approx(0.03)
    assert (four["bin"], four["claimed"].n, four["claimed"].hits) == (4, 1, 1) and four["at"] == {100: 0.0}


def test_rates_know_that_worlds_on_one_set_of_scenes_are_alike():
    """Hits that come set by set count as sets; hits that are spread evenly count one by one, as Wilson has it."""
    scenes = [f"scenes-{i // 10}" for i in range(200)]
    alike = rate([i // 10 < 15 for i in range(200)], scenes)
    assert (alike.hits, alike.n) == (150, 200)
    assert (alike.low, alike.high) == pytest.approx(wilson(15, 20), abs=0.02)
    spread = rate([i % 4 > 0 for i in range(200)], scenes)
    assert (spread.low, spread.high) == pytest.approx(wilson(150, 200))
    assert rate([False] * 200, scenes)[2:] == pytest.approx(wilson(0, 200))
    assert str(rate([], [])) == "–" and str(spread).startswith("75.0 % [68")


def test_a_claim_on_fewer_images_is_that_of_their_scores(null):
    """First order in the weights of images, against the first images scored alone."""
    (probe, control, sample), n = null[0], 60
    values = []
    for result, tokens in ((probe, sample.tokens), (control, None)):
        cut = sample._replace(**{key: getattr(sample, key)[:n] for key in ("position", "keys", "grids")})
        cut = cut._replace(labels={name: value[:n] for name, value in sample.labels.items()})
        held = sample.labels["place"][None] - 5.5 if tokens is None else tokens.gather(torch.arange(WORLD.n_test))
        cut = cut._replace(tokens=type(sample.tokens).from_tensor(held[:, :n], list(range(len(held)))))
        mode = "quadratic" if tokens is not None else "dot_product"
        alone = auroc(score(Subject("cut", "", {}, {"test": cut}, [0]), mode, "test", CLAIM), CLAIM)
        whole = auroc(result, CLAIM)
        scale = WORLD.n_test / n
        first_order = whole.value + scale * whole.influence[:, :n].sum(1)
        assert torch.allclose(first_order, alone.value, atol=0.01)
        values.append((one(whole, 0), one(alone, 0)))
    (whole, alone), (control_whole, control_alone) = values
    for shift in (-0.5, 0.5):
        moved = lambda e, by=shift: Estimate(e.value + by, e.influence)
        assert claimed_at([difference(moved(whole), control_whole)], n) is (shift > 0)


def test_worlds_share_the_training_scenes_and_no_test_scene():
    """Own test scenes have contents of their own; what is mixed how is the same as in training, so a fit reads it."""
    world = replace(WORLD, noise=0.0, n_train=30)
    train, first, second = (draw_scenes(split, world, "own") for split in ("train", "test-0", "test-1"))
    assert not torch.equal(first.identity, second.identity)
    for number, scenes in ((0, first), (1, second)):
        mixing = draw_mixing("own", number, world)
        for of_split in (train, scenes):
            content = draw_tokens(of_split, {number: 1.0}, world)[0] @ mixing.T
            planted = content[..., PLANTED]  # [M, T, 4]
            same = of_split.identity[:, :, None] == of_split.identity[:, None]
            apart = (planted[:, :, None] - planted[:, None]).abs().amax(-1)
            assert float(apart[same].max()) < 1e-4 and float(apart[~same].min()) > 1e-4
    every = draw_tokens(train, [0.0, 1.0], world)
    assert torch.equal(every[1], draw_tokens(train, {1: 1.0}, world)[0])


@pytest.mark.parametrize("mode", ["quadratic", "cosine"])
def test_one_layer_of_a_stack_answers_as_it_does_in_the_stack(mode):
    probe = build_probe(
        {"mode": mode, "linear_term": True, "learn_scale": True, "standardize": True}, seeds=[0], layers=[0, 3, 5], dim=4
    )
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.normal_()
    probe.set_statistics(torch.randn(3, 4), torch.rand(3, 4) + 0.5)
    x = torch.randn(3, 2, 6, 4)
    for row, layer in enumerate(probe.layers):
        alone = at_layer([probe], layer)
        assert alone.layers == [layer] and torch.allclose(alone(x[row : row + 1]), probe(x)[:, row : row + 1], atol=1e-6)


def test_the_truth_allows_for_the_error_of_the_large_sample():
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=rng)
    n, influence = 4000, torch.zeros(1, 2, dtype=torch.float64)
    influence[0, 0] = 0.02
    estimates, large = 0.6 + 0.02 * draw(n), 0.6 + 0.01 * draw(n)
    make = lambda values, scale: Estimate(values, (scale * influence).expand(n, -1))
    distance = estimates - truth_of(make(estimates, 1.0), make(large, 0.5))
    assert float(distance.std()) == pytest.approx(0.02, rel=0.04)  # of the estimate alone, not of the difference


# ---------------------------------------------------------------------------------------- faults that it has to bring to light


def as_pairs(sample, both_orders):
    """Every pair of patches as an image of its own: what a bootstrap over pairs takes for independent."""
    n_images, n_tokens = sample.position.shape[:2]
    first, second = torch.triu_indices(n_tokens, n_tokens, 1)
    if both_orders:
        first, second = torch.cat([first, second]), torch.cat([second, first])
    both = torch.stack([first, second], -1)  # [P, 2]
    cut = lambda x: x[:, both].flatten(0, 1)
    labels = {name: cut(value) for name, value in sample.labels.items()}
    tokens = sample.tokens.gather(torch.arange(len(sample.keys)))
    held = type(sample.tokens).from_tensor(tokens[:, :, both].flatten(1, 2), sample.tokens.layers)  # [L, M P, 2, D]
    keys = list(range(n_images * len(both)))
    return PatchSample(held, cut(sample.position), labels, {}, keys, torch.tensor([[1, 1]]), sample.meta), both


def pair_influences(group, both_orders):
    """AUROC of the worlds on some scenes and the influence of every pair, [L, M P]."""
    probe, _, sample = group
    single, both = as_pairs(sample, both_orders)
    result = score(Subject(probe.row, "", {}, {"test": single}, [0]), "quadratic", "test", CLAIM, batch_images=8192)
    estimate = auroc(result, CLAIM)
    assert torch.allclose(estimate.value, auroc(probe, CLAIM).value, atol=1e-6)  # the same number, another interval
    return estimate, both


def test_both_orders_as_independent_pairs_break_the_cover(null):
    hits = []
    for group in null[:6]:
        estimate, _ = pair_influences(group, both_orders=True)
        half = 1.96 * estimate.influence.square().sum(1).sqrt()  # of a bootstrap over these pairs
        hits += ((estimate.value - 0.5).abs() <= half).tolist()
    assert share(hits) < 0.75


def test_a_bootstrap_over_patches_breaks_the_cover(null):
    hits = []
    for group in null[:6]:
        estimate, both = pair_influences(group, both_orders=False)
        of_pair = estimate.influence.unflatten(1, (WORLD.n_test, -1))  # [L, M, P]
        of_patch = torch.zeros(*of_pair.shape[:2], WORLD.patches, dtype=torch.float64)
        for side in both.unbind(1):
            of_patch.index_add_(2, side, of_pair)
        hits += covers(Estimate(estimate.value, of_patch.flatten(1)), 0.5, resample(WORLD.n_test * WORLD.patches, 200))
    assert share(hits) < 0.85


def test_self_pairs_break_the_cover(monkeypatch):
    """Seen among all pairs on objects: matched by distance, a patch has nothing to be compared with at distance 0."""

    def of_foreground(split, name):
        scenes = draw_scenes(split, WORLD, name)
        result, _ = scored(name, draw_tokens(scenes, [0.0] * 3, WORLD), scenes, split, subset="foreground")
        return auroc(result, "foreground")

    def cover():
        estimates = [of_foreground("test", f"self-{i}") for i in range(8)]
        return share([hit for estimate in estimates for hit in covers(estimate, truth_of(estimate, truth))])

    truth = of_foreground("population", "self")
    honest = cover()
    monkeypatch.setattr(pairs.scores, "upper_pairs", lambda n: torch.triu_indices(n, n, 0).unbind())
    assert honest >= 0.8 > 0.5 > cover()


def test_unmatched_distances_break_the_cover():
    scenes = draw_scenes("test", WORLD, "unmatched")
    tokens = draw_tokens(scenes, [0.0] * 16, replace(WORLD, smooth=2.5))
    cover = {
        subset: share(covers(auroc(scored("unmatched", tokens, scenes, "test", subset=subset)[0], subset), 0.5))
        for subset in (CLAIM, "same_class")
    }
    assert cover[CLAIM] >= 0.8 > 0.3 > cover["same_class"]


def test_a_layer_chosen_on_test_breaks_the_rate_of_claims(null):
    on_test = claims_of(null, lambda values: [int(values.argmax())])
    elsewhere = claims_of(null, lambda values: range(WORLDS))  # a layer chosen without these images is any of them
    assert share(elsewhere) <= 0.08 < share(on_test)


# ------------------------------------------------------------------------------------------------------------- end to end

SMALL = [
    "mode=calibrate", "wandb.mode=disabled", "trainer.n_boot=50", "trainer.epochs=1", "calibrate.groups=1",
    "calibrate.strengths=[0.0,1.0]", "calibrate.worlds=[2,1]", "calibrate.n_train=16", "calibrate.n_val=4",
    "calibrate.n_test=12", "calibrate.patches=12", "calibrate.n_population=40", "calibrate.population_patches=8",
]  # fmt: skip


def test_the_mode_prints_its_two_numbers_and_repeats_them(tmp_path, capsys):
    done = program.run(tmp_path, *SMALL)
    said = capsys.readouterr().out
    assert "false claims: " in said and "power: " in said and "true gain of +0.025 to +0.035" in said
    worlds = [record for record in done.records() if record["kind"] == "world"]
    assert [record["strength"] for record in worlds] == [0.0, 0.0, 1.0]
    for record in worlds:
        assert record["claimed"] == above_every_control(gain[:3] for gain in record["gains"].values())
        assert list(record["gains"]) == [
            "position", "pixels", "pixels_position", "random", "class_oracle", "cosine", "dot_product"
        ]  # fmt: skip
    assert (done.dir / "calibration.png").stat().st_size > 10_000 and (done.dir / "calibration.csv").exists()
    again = program.run(tmp_path, *SMALL)
    assert again.dir == done.dir and again.records() == done.records()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibrate.worlds=[2]"], "two lists of one length"),
        (["calibrate.strengths=[0.5,1.0]"], "with 0, the null worlds"),
        (["calibrate.patches=200"], "144 patches"),
    ],
)
def test_worlds_that_cannot_be_are_refused(tmp_path, overrides, message):
    with pytest.raises(SystemExit, match=message):
        program.run(tmp_path, *SMALL, *overrides)
