"""When a fit had converged: laws of the verdict on made-up validation curves."""

import math

import pytest
import torch
from torch import Tensor

from metrics.convergence import FARTHEST, NOISE, SHORTEST, TOLERANCE, judge, judge_curve, solved


def verdict(curve: Tensor, constant: float = 2.0) -> tuple[bool, int]:
    found = judge(curve[:, None, None], torch.tensor([constant]))
    return bool(found.still_falling), int(found.epochs)


def epochs(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64)


@pytest.mark.parametrize("n", [SHORTEST, 6, 8, 24, 100])
def test_a_flat_curve_has_converged(n: int) -> None:
    assert verdict(torch.ones(n)) == (False, n)


@pytest.mark.parametrize("n", [6, 8, 24, 100])
def test_an_exponentially_falling_curve_has_not_until_it_is_down(n: int) -> None:
    assert verdict(1 + torch.exp(-epochs(n) / n))[0]
    assert not verdict(1 + torch.exp(-8 * epochs(n) / n))[0] or n < 8


@pytest.mark.parametrize("n", [8, 12, 24, 60])
@pytest.mark.parametrize("noise", [0.003, 0.1])
def test_noise_around_a_level_is_rarely_a_fall(n: int, noise: float) -> None:
    rng = torch.Generator().manual_seed(n)
    flagged = [verdict(1 + noise * torch.randn(n, generator=rng, dtype=torch.float64))[0] for _ in range(400)]
    assert sum(flagged) <= 0.08 * 400


@pytest.mark.parametrize("n", [8, 24])
def test_a_fall_larger_than_the_noise_is_seen_through_it(n: int) -> None:
    rng = torch.Generator().manual_seed(n)
    flagged = [verdict(2 - epochs(n) / n + 0.02 * torch.randn(n, generator=rng))[0] for _ in range(100)]
    assert sum(flagged) >= 90


def test_a_curve_that_rises_again_has_converged() -> None:
    assert not verdict(1 + (epochs(20) - 8).square() / 100)[0]
    falling_far_above_its_best = torch.cat([torch.tensor([0.1]), 1.5 - 0.001 * epochs(20)])
    assert not verdict(falling_far_above_its_best)[0]


def test_no_more_epochs_are_named_than_a_curve_can_tell_of() -> None:
    assert verdict(10 - epochs(12) / 2) == (True, FARTHEST * 12)


@pytest.mark.parametrize("start", [10, 30])
def test_the_epochs_that_would_do_are_those_of_a_curve_that_falls_like_one_over_the_epochs(start: int) -> None:
    curve = lambda n: 1 + 3 / epochs(n)
    falling, needed = verdict(curve(start), constant=4.0)
    assert falling and needed > start
    assert not verdict(curve(int(1.1 * needed)), constant=4.0)[0]
    assert 3 / (2 * needed) == pytest.approx(TOLERANCE * 4, rel=0.1)  # what twice as many would still gain


def test_a_fall_that_hardly_matters_is_none() -> None:
    slow = 1 - 2e-4 * epochs(20)  # twenty epochs more bring .0014 of a nat
    assert not verdict(slow, constant=2.0)[0]
    assert verdict(slow, constant=0.1)[0]


def test_too_few_epochs_show_nothing() -> None:
    assert verdict(torch.ones(SHORTEST - 1)) == (True, 0)
    assert math.isnan(judge_curve(torch.ones(1), 0.1)[2])


def test_a_probe_that_loses_to_a_constant_answer_is_named() -> None:
    curves = torch.tensor([[0.9, 3.0, 2.0], [0.8, 2.5, 1.005], [0.8, 2.4, 1.005], [0.8, 2.4, 1.005]])[:, None]  # [E, 1, L]
    assert judge(curves, torch.tensor([1.0])).worse_than_constant.tolist() == [[False, True, False]]  # a hair is none


def test_epochs_after_the_stop_do_not_count() -> None:
    curve = torch.cat([1 + 1 / epochs(6), torch.full((10,), torch.nan)])
    assert verdict(curve) == verdict(curve[:6])


def test_fits_are_judged_by_themselves() -> None:
    both = torch.stack([torch.ones(12), 2 - epochs(12).float() / 12], 1)[:, None]  # [E, 1, L]
    assert judge(both, torch.tensor([2.0])).still_falling.tolist() == [[False, True]]


def test_what_was_solved_for_has_converged_by_construction() -> None:
    found = solved(torch.tensor([[True, False]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.4]))
    assert found.still_falling.tolist() == [[False, True]] and found.worse_than_constant.tolist() == [[True, True]]
    assert NOISE > 0
