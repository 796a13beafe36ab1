"""The formula the explorer page computes is every probe's own score."""

import pytest
import torch

from pairs.losses import agreement
from pairs.pair_form import pair_forms
from probes import PROBES, Projections, build_probe

LAYERS = ["embed", 2]
OPTIONS = {"linear_term": True, "learn_scale": True, "rank": 5, "hidden": 7, "n_queries": 6}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("mode", list(PROBES))
def test_the_formula_is_the_score_of_every_probe(mode, standardize, symmetric):
    rng = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=rng)
    projections = {layer: Projections(draw(12, 12), draw(12), draw(12, 12), draw(12)) for layer in LAYERS}
    probe = build_probe(
        {"mode": mode, "standardize": standardize, "symmetric": symmetric, "matmul_dtype": "float32", **OPTIONS},
        seeds=[0, 1, 2, 3], layers=LAYERS, dim=12, n_classes=4, projections=projections,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.add_(0.1 * draw(*parameter.shape))
    if probe.needs_statistics:
        probe.set_statistics(draw(2, 12), draw(2, 12).abs() + 0.5)
    x = draw(2, 1, 9, 12)  # [L, B, T, D]
    with torch.no_grad():
        logits = probe(x)[1:3]  # the fits of seeds 1 and 2
    expected = logits.sigmoid() if probe.arity == "pairwise" else agreement(logits, "inner")
    for at, form in enumerate(pair_forms(probe, slice(1, 3))):
        torch.testing.assert_close(form.scores(x[at, 0], x[at, 0]), expected.mean(0)[at, 0], atol=2e-5, rtol=1e-4)
