"""The benchmark compares like with like: its dense-matrix way gives the same losses, and it counts what autograd holds."""

import importlib.util
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from neco.networks import Sorter
from neco.sorting import order_cross_entropy

SPEC = importlib.util.spec_from_file_location("bench_neco", Path(__file__).parent.parent / "scripts/bench_neco.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.mark.parametrize("network", ["bitonic", "odd_even"])
def test_both_ways_give_the_same_loss(network: str) -> None:
    student, teacher = torch.rand(5, 12, requires_grad=True), torch.rand(5, 12)
    sorter = Sorter(network, 30.0)
    losses = [way(student, teacher) for way in (lambda s, t: order_cross_entropy(s, t, sorter, sorter),
                                                lambda s, t: bench.dense_loss(s, t, sorter))]  # fmt: skip
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_bytes_kept_are_those_of_live_storages() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    assert bench.bytes_kept(lambda: x * 2.0) == 0
    assert bench.bytes_kept(lambda: (x * 2.0).exp().sum()) == 400
    values = torch.rand(49, 49, requires_grad=True)
    kept = bench.bytes_kept(lambda: order_cross_entropy(values * 1.0, torch.rand(49, 49), Sorter(), Sorter()))
    assert kept == 49 * 49 * 4


def test_every_published_recipe_fits_into_40_gb(capsys: pytest.CaptureFixture[str]) -> None:
    bench.memory("vit_small_patch14_dinov2", 64, 518, 98)
    kept, checkpointed = (float(line.split("(")[-1].split(" GB")[0]) for line in capsys.readouterr().out.splitlines()[-2:])
    assert checkpointed < 40 < kept
    for file in (Path(__file__).parent.parent / "cfgs/experiment").glob("neco_*_small.yaml"):
        recipe = OmegaConf.load(file).neco
        assert recipe.checkpoint_activations if recipe.crops.sizes[0] == 518 else recipe.crops.sizes[0] == 224
