"""Layers are chosen on validation and scored once; gains are paired; maxima and p-values count what was looked at."""

import math
import re

import pytest
import torch

from metrics.bootstrap import Estimate, holm, interval, p_value, percentiles, resample
from runs.records import line_of
from show.choice import best_layer, choice_records, chosen, gains, objective, read_validation, regret
from show.records import VALIDATION, Column, Resampling, validation_records
from show.tables import table
from tasks import ProbeResult, SubsetResult

COLUMN = Column("is_same_object", "logit", "all", "auroc", "all pairs AUROC")
LOSS = Column("binding", "", "images", "loss_Y", "L_Y")
KEY = tuple(COLUMN[:4])
RESAMPLING = Resampling(400, 0)


def estimates(values: list[float], n_images: int = 40, seed: int = 0, spread: float = 0.2) -> Estimate:
    """Estimates of fits whose scores per image are the values plus noise: value [F], influence [F, M]."""
    noise = spread * torch.randn(len(values), n_images, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise -= noise.mean(1, keepdim=True)
    return Estimate(torch.tensor(values, dtype=torch.float64), noise / n_images)


def result(
    values: list[float], validation: list[float] | None, *, control: str = "", n_seeds: int = 1, column: Column = COLUMN,
    over_seeds: bool = False, seed: int = 0,
) -> ProbeResult:  # fmt: skip
    n_layers = len(values) // n_seeds
    subset = SubsetResult(
        *column[:3], {column.metric: estimates(values, seed=seed)}, {"n_images": 40, "n_pairs": 80}, [], over_seeds=over_seeds
    )
    kept = None if validation is None else {tuple(column[:4]): validation}
    layers = ["embed", *range(n_layers - 1)] if n_layers > 1 else ["position"]
    return ProbeResult("probe", control, control or "probe", layers, list(range(n_seeds)), [subset], kept, 100)


def test_the_layer_is_the_best_of_validation_never_of_test() -> None:
    """The test split prefers layer 1, validation layer 0: nothing of test may move the choice."""
    found = result([0.6, 0.7, 0.9], [0.5, 0.8, 0.7])
    assert best_layer(found, COLUMN) == 1
    assert objective(found, COLUMN, "test") == 0.8 and objective(found, COLUMN, "val") == 0.7
    counts = RESAMPLING.counts(found)
    here, cost = chosen(found, COLUMN, counts), regret(found, COLUMN, counts)
    assert (here.layer, here.score[0]) == (0, 0.7)
    low, high = interval(found.subsets[0].metrics["auroc"], counts)
    assert here.score[1:] == (float(low[1]), float(high[1]))
    assert cost.layer == 1 and cost.regret[0] == pytest.approx(0.2)


def test_of_losses_the_lowest_is_the_best() -> None:
    found = result([3.0, 2.0, 1.0], [2.0, 1.0, 1.5], column=LOSS)
    assert best_layer(found, LOSS) == 1
    assert regret(found, LOSS, RESAMPLING.counts(found)).regret[0] == 1.0


@pytest.mark.parametrize("validation", [None, [math.nan] * 3])
def test_without_validation_scores_no_layer_is_chosen(validation: list[float] | None) -> None:
    found = result([0.6, 0.7, 0.9], validation)
    assert best_layer(found, COLUMN) is None and objective(found, COLUMN, "test") is None
    assert not list(choice_records([found], [COLUMN], RESAMPLING, "test"))
    assert re.search(r"chosen on val +–", table([found], [COLUMN], RESAMPLING))


def test_a_layer_that_is_undefined_on_validation_is_not_chosen() -> None:
    assert best_layer(result([0.6, 0.7, 0.9], [0.5, 0.6, math.nan]), COLUMN) == 1


@pytest.mark.parametrize(("n_seeds", "over_seeds"), [(1, False), (3, False), (3, True)])
def test_the_interval_of_a_maximum_takes_the_maximum_inside_every_resample(n_seeds: int, over_seeds: bool) -> None:
    found = result([0.7, 0.71, 0.72] * n_seeds, [0.9, 0.8, 0.7], n_seeds=n_seeds, over_seeds=over_seeds)
    counts = RESAMPLING.counts(found)
    value, influence = (x.unflatten(0, (n_seeds, 3)) for x in found.subsets[0].metrics["auroc"])
    weight = resample(n_seeds, 400, 1) / n_seeds if over_seeds else torch.full((400, n_seeds), 1 / n_seeds)
    by_hand, lacking = [], []
    for draw, of_seeds in zip(counts, weight.double(), strict=True):
        scores = [
            sum(float(of_seeds[s] * (value[s, layer] + influence[s, layer] @ draw)) for s in range(n_seeds))
            for layer in range(3)
        ]
        by_hand.append(max(scores))
        lacking.append(max(scores) - scores[0])
    cost = regret(found, COLUMN, counts)
    low, high = torch.quantile(torch.tensor(by_hand, dtype=torch.float64), torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert cost.score[1:] == pytest.approx((float(low), float(high)))
    low, high = torch.quantile(torch.tensor(lacking, dtype=torch.float64), torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert cost.regret[1:] == pytest.approx((float(low), float(high)))
    assert cost.score[2] > 0.72 and cost.regret[1] >= 0


def test_gains_are_paired_over_images() -> None:
    """Probe and control that err on the same images: the gain is certain though both scores are not."""
    probe, control = result([0.8, 0.82], [0.8, 0.9]), result([0.7], None, control="position")
    probe.subsets[0].metrics["auroc"].influence[:] = control.subsets[0].metrics["auroc"].influence
    counts = RESAMPLING.counts(probe)
    found = gains(probe, control, COLUMN, counts)
    assert found.value.tolist() == pytest.approx([0.1, 0.12]) and found.chosen[0] == pytest.approx(0.12)
    assert torch.allclose(found.low, found.value) and torch.allclose(found.high, found.value)
    wide = chosen(probe, COLUMN, counts).score
    assert wide[2] - wide[1] > 0.05
    records = [r for r in choice_records([probe, control], [COLUMN], RESAMPLING, "test") if r["kind"] == "gain"]
    assert [(r["layer"], r["chosen"]) for r in records] == [("embed", False), (0, True)]
    assert {r["over_layer"] for r in records} == {"position"}
    assert [r["p_holm"] for r in records] == pytest.approx([4 / 401] * 2)


def test_a_gain_is_taken_over_the_layer_chosen_for_the_control() -> None:
    probe, control = result([0.8, 0.9], [0.8, 0.9]), result([0.5, 0.7], [0.9, 0.1], control="random", seed=1)
    found = gains(probe, control, COLUMN, RESAMPLING.counts(probe))
    assert (found.over, found.chosen[0]) == ("embed", pytest.approx(0.4))


def test_a_gain_that_may_be_chance_is_marked() -> None:
    control = result([0.7], None, control="position", seed=1)
    shown = lambda values: table([result(values, [0.1, 0.2]), control], [COLUMN], RESAMPLING)
    assert "°" in shown([0.7, 0.71]) and "corrected over 2 layers (Holm)" in shown([0.7, 0.71])
    assert "°" not in shown([0.7, 0.99])


def test_p_values_agree_with_percentile_intervals() -> None:
    """A 95 % interval reaches 0 where p is above .05, up to the 1 that keeps p above 0."""
    rng = torch.Generator().manual_seed(3)
    draws = torch.randn(200, 999, generator=rng, dtype=torch.float64) + torch.linspace(-3, 3, 200, dtype=torch.float64)[:, None]
    p, (low, high) = p_value(draws), percentiles(draws, (-9.0, 9.0))
    clear = (p - 0.05).abs() > 0.005
    assert torch.equal(((low > 0) | (high < 0))[clear], (p < 0.05)[clear])
    assert float(p_value(torch.zeros(1, 99, dtype=torch.float64))) == 1.0
    assert float(p_value(torch.ones(1, 99, dtype=torch.float64))) == 0.02
    assert p_value(torch.full((1, 9), torch.nan)).isnan().all()


def test_holm_by_the_textbook() -> None:
    """Holm's steps, one after the other: p_(i) times the number of questions left, never below the one before."""
    p = torch.tensor([0.01, 0.04, 0.03, 0.005], dtype=torch.float64)
    assert holm(p).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(torch.tensor([0.5, 0.6], dtype=torch.float64)).tolist() == [1.0, 1.0]
    with_gap = holm(torch.tensor([0.02, torch.nan], dtype=torch.float64))
    assert float(with_gap[0]) == 0.02 and bool(with_gap[1].isnan())


def test_validation_scores_come_back_from_the_records(tmp_path) -> None:
    found = result([0.6, 0.7, 0.9], [0.5, math.nan, 0.7])
    lines = [line_of(record) for record in validation_records(found)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    again = read_validation(tmp_path, "probe")[KEY]
    assert [again[0], again[2]] == [0.5, 0.7] and math.isnan(again[1])
    assert read_validation(tmp_path, "position") is None
    assert {r["kind"] for r in validation_records(found)} == {VALIDATION}
