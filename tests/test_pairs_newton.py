"""Newton's method ends at the optimum of the loss, whatever the scale of the scores."""

import pytest
import torch
from torch.nn import functional as F

from pairs import newton
from pairs.newton import PairBatch, solve


def planted(scale: float, seed: int = 0, n_layers: int = 2) -> list[PairBatch]:
    """Three batches of scores that tell same pairs from others, but not perfectly; two variants."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for _ in range(3):
        same = (torch.rand(2, 4, 30, generator=generator) < 0.3).float()
        same[1] = same[0]
        counted = torch.ones_like(same)
        counted[1] = (torch.rand(4, 30, generator=generator) < 0.5).float()
        scores = scale * (torch.randn(n_layers, 4, 30, generator=generator) + 1.5 * same[0] - 3)
        batches.append(PairBatch(scores, counted, same * counted))
    return batches


def mean_loss(batches: list[PairBatch], offset: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[V, L] by the definition."""
    total, n = 0.0, 0.0
    for scores, counted, same, beside in batches:
        z = offset[..., None, None] + factor[..., None, None] * scores.double()  # [V, L, B, P]
        z = z if beside is None else z + beside
        loss = F.binary_cross_entropy_with_logits(z, same[:, None].double().expand_as(z), reduction="none")
        total, n = total + (loss * counted[:, None]).sum((2, 3)), n + counted.sum((1, 2))[:, None]
    return total / n


@pytest.mark.parametrize(("scale", "beside"), [(1e-3, 0.0), (1.0, 0.0), (300.0, 0.0), (1.0, 2.0)])
def test_the_solution_is_the_optimum(scale: float, beside: float) -> None:
    """Also where something of a spread `beside` is added to every logit."""
    batches = planted(scale)
    if beside:
        rng = torch.Generator().manual_seed(1)
        batches = [b._replace(beside=beside * torch.randn(b.scores.shape[1:], generator=rng)) for b in batches]
    found = solve(lambda: iter(batches))
    assert bool(found.converged.all()) and found.passes < 15
    loss = mean_loss(batches, found.offset, found.factor)
    torch.testing.assert_close(loss, found.loss, atol=1e-6, rtol=0)
    # A step along either number, in either direction, never lowers the loss.
    for d_offset, d_factor in [(0.01, 0.0), (-0.01, 0.0), (0.0, 0.01 / scale), (0.0, -0.01 / scale)]:
        assert (mean_loss(batches, found.offset + d_offset, found.factor + d_factor) > loss).all()


def test_a_split_too_large_to_keep_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, passes = planted(1.0), []

    def read():
        passes.append(1)
        return iter(batches)

    kept = solve(read)
    n_read = len(passes)
    monkeypatch.setattr(newton, "KEPT_BYTES", 0)
    again = solve(read)
    assert n_read == 1 and len(passes) - n_read == again.passes
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(kept, again, strict=True))


def test_a_layer_alone_is_the_layer_in_a_stack() -> None:
    batches = planted(1.0, n_layers=3)
    whole = solve(lambda: iter(batches))
    alone = solve(lambda: (b._replace(scores=b.scores[1:2]) for b in batches))
    torch.testing.assert_close(whole.offset[:, 1:2], alone.offset, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.factor[:, 1:2], alone.factor, atol=1e-6, rtol=0)


def test_separable_pairs_end_at_no_loss() -> None:
    same = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    batch = PairBatch(torch.tensor([[[-1.0, -2.0, 1.0, 2.0]]]), torch.ones_like(same), same)
    found = solve(lambda: iter([batch]))
    assert 0 <= float(found.loss) < 1e-6
    assert found.offset.isfinite().all() and found.factor.isfinite().all()


def test_scores_that_tell_nothing_give_the_rate_of_same_pairs() -> None:
    same = torch.tensor([[[0.0, 0.0, 0.0, 1.0]]])
    found = solve(lambda: iter([PairBatch(torch.full((1, 1, 4), 7.0), torch.ones_like(same), same)]))
    torch.testing.assert_close((found.offset + 7 * found.factor).sigmoid().item(), 0.25, atol=1e-4, rtol=0)
