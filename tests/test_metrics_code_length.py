"""Codes of labels: against products of probabilities, one label after the other."""

import math
from fractions import Fraction

import pytest
import torch

from metrics.code_length import DOUBLINGS, FEWEST, answer_bits, base_rate_bits, block_ends


@pytest.mark.parametrize("n_images", [8, 15, 16, 63, 100, 800, 5000])
def test_blocks_double_and_end_with_the_last_image(n_images: int) -> None:
    ends = block_ends(n_images)
    assert ends[-1] == n_images and len(ends) <= DOUBLINGS + 1
    assert all(abs(2 * first - last) <= 1 for first, last in zip(ends, ends[1:], strict=False))
    assert ends[0] >= min(FEWEST, n_images) and (len(ends) == DOUBLINGS + 1 or ends[0] <= 2 * FEWEST)


def test_the_base_rate_code_is_a_product_of_predictions() -> None:
    images = [[1, 0, 0], [], [1, 1, 1, 1], [0]]
    yes, n, bits = 0, 0, []
    for labels in images:
        probability = Fraction(1)
        for label in labels:
            share = (Fraction(yes) + Fraction(1, 2)) / (n + 1)
            probability *= share if label else 1 - share
            yes, n = yes + label, n + 1
        bits.append(-math.log2(probability))
    found = base_rate_bits(torch.tensor([sum(x) for x in images]), torch.tensor([len(x) for x in images]))
    assert found.tolist() == pytest.approx(bits, abs=1e-12)


def test_the_base_rate_code_exceeds_the_entropy_by_half_a_logarithm() -> None:
    n, p = 1_000_000, 0.3
    entropy = -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p))
    found = float(base_rate_bits(torch.tensor([int(n * p)]), torch.tensor([n])))
    assert entropy + 0.5 * math.log2(n) < found < entropy + 0.5 * math.log2(n) + 2


def test_answers_cost_the_logarithm_of_their_probability() -> None:
    logits, labels = torch.tensor([-2.0, 0.0, 3.0, 3.0]).double(), torch.tensor([0.0, 1.0, 1.0, 0.0]).double()
    share = logits.sigmoid()
    assert torch.allclose(answer_bits(logits, labels), -torch.where(labels > 0, share, 1 - share).log2())
