"""Differentiable sorting: reference values, doubly stochastic weights, gradients, no NaN at any steepness, little memory."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errors import UserError
from neco.networks import NETWORKS, SWAPS, Sorter, comparators
from neco.sorting import log_weights, order_cross_entropy, relaxed_sort

GOLDEN = json.loads((Path(__file__).parent / "golden/neco/diffsort.json").read_text())


def dense(values: Tensor, sorter: Sorter) -> Tensor:
    """P [R, n, n] by full products of one matrix per layer, straight from the definition (Cauchy only)."""
    n, x = values.shape[-1], values
    weights = torch.eye(n, dtype=values.dtype).expand(len(values), n, n)
    for layer in comparators(sorter.network, n):
        mixing = torch.eye(n, dtype=values.dtype).repeat(len(values), 1, 1)
        for low, high in layer:
            p = 0.5 + torch.atan(sorter.steepness * (x[:, high] - x[:, low])) / torch.pi
            mixing[:, low, low], mixing[:, high, low] = p, 1 - p
            mixing[:, low, high], mixing[:, high, high] = 1 - p, p
        x, weights = (x[:, None] @ mixing)[:, 0], weights @ mixing
    return weights


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-4)])
def test_reference_values(dtype: torch.dtype, tolerance: float) -> None:
    for case in GOLDEN["cases"]:
        sorter = Sorter(case["network"], case["steepness"], case["distribution"])
        ranked, weights = relaxed_sort(torch.tensor(case["input"], dtype=dtype), sorter)
        limit = 2e-3 if dtype == torch.float32 and case["steepness"] >= 100 else tolerance
        torch.testing.assert_close(ranked, torch.tensor(case["sorted"], dtype=dtype), atol=limit, rtol=0)
        torch.testing.assert_close(weights, torch.tensor(case["perm"], dtype=dtype), atol=limit, rtol=0)


def test_reference_values_of_49() -> None:
    for case in GOLDEN["n49"]:
        x = torch.tensor([[case["scale"] * (((k * case["mul"]) % 49) / 48 - 0.5) for k in range(49)]], dtype=torch.float64)
        ranked, weights = relaxed_sort(x, Sorter(case["network"], case["steepness"], case["distribution"]))
        torch.testing.assert_close(ranked[0], torch.tensor(case["sorted"], dtype=torch.float64), atol=1e-8, rtol=0)
        for row, values in case["perm_rows"].items():
            torch.testing.assert_close(weights[0, int(row)], torch.tensor(values, dtype=torch.float64), atol=1e-8, rtol=0)
        assert weights.min().item() == pytest.approx(case["perm_min"], rel=1e-6)
        assert weights.max().item() == pytest.approx(case["perm_max"], rel=1e-12)


def test_networks_are_the_published_ones() -> None:
    for name, layers in GOLDEN["structure"].items():
        network, n = name.rsplit("_", 1)
        expected = [{(c["min_to"], c["max_to"]) for c in layer if "in" in c} for layer in layers]
        assert [set(layer) for layer in comparators(network, int(n))] == expected
    for name, counts in GOLDEN["counts"].items():
        layers = comparators(*(name.rsplit("_", 1)[0], int(name.rsplit("_", 1)[1])))
        assert (len(layers), sum(map(len, layers))) == (counts["layers"], counts["comparators"])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 7, 12, 17, 49])
def test_any_size_sorts_and_is_doubly_stochastic(network: str, n: int) -> None:
    values = torch.stack([torch.randperm(n).double() for _ in range(5)])
    ranked, weights = relaxed_sort(values, Sorter(network, 1e9, rows=2))
    torch.testing.assert_close(ranked, values.sort().values, atol=1e-5, rtol=0)
    soft, mixed = relaxed_sort(values, Sorter(network, 0.7, rows=2))
    ones = torch.ones(5, n, dtype=torch.float64)
    torch.testing.assert_close(mixed.sum(1), ones, atol=1e-13, rtol=0)
    torch.testing.assert_close(mixed.sum(2), ones, atol=1e-13, rtol=0)
    torch.testing.assert_close(soft, (values[:, None] @ mixed)[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("swap", SWAPS)
def test_gradients_in_float64(network: str, swap: str) -> None:
    sorter = Sorter(network, 3.0, swap, rows=2)
    values = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: relaxed_sort(x, sorter), values)
    assert torch.autograd.gradcheck(lambda x: log_weights(x, sorter), values)
    target = torch.randn(3, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: order_cross_entropy(x, target, sorter, Sorter(network, 5.0)), values)


@pytest.mark.parametrize("network", NETWORKS)
def test_loss_and_gradient_are_those_of_dense_matrices(network: str) -> None:
    student, teacher = torch.rand(4, 49, dtype=torch.float64, requires_grad=True), torch.rand(4, 49, dtype=torch.float64)
    soft, hard = Sorter(network, 10.0, rows=3), Sorter(network, 50.0, rows=3)
    expected = -(dense(teacher, hard) * dense(student, soft).log()).sum((1, 2)) / 49
    loss = order_cross_entropy(student, teacher, soft, hard)
    torch.testing.assert_close(loss, expected)
    (wanted,), (found,) = (torch.autograd.grad(x @ torch.arange(4.0).double(), student) for x in (expected, loss))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("steepness", [1e-6, 1.0, 1e3, 1e6, 1e12])
def test_no_steepness_gives_nan(network: str, swap: str, steepness: float) -> None:
    student = (2 * torch.rand(3, 17) - 1).requires_grad_()
    sorter = Sorter(network, steepness, swap)
    for target in (2 * torch.rand(3, 17) - 1, student.detach()):
        loss = order_cross_entropy(student, target, sorter, sorter)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all() and gradient.isfinite().all()
    assert not log_weights(student, sorter).isnan().any()


@pytest.mark.parametrize("swap", ["cauchy", "logistic", "gaussian"])
def test_underflow_is_computed_by_logarithms(swap: str) -> None:
    """In float32 most weights are 0 here; their logarithms and gradients are those float64 gives."""
    values = (2 * torch.rand(4, 25) - 1).requires_grad_()
    wide = values.detach().double().requires_grad_()
    sorter = Sorter("odd_even", 1000.0 if swap == "cauchy" else 50.0, swap)
    assert (relaxed_sort(values, sorter)[1] < 1e-30).any()
    narrow, exact = log_weights(values, sorter), log_weights(wide, sorter)
    torch.testing.assert_close(narrow.double(), exact, rtol=2e-4, atol=2e-4)
    other = torch.rand(4, 25, 25)
    (found,), (wanted,) = (torch.autograd.grad((x * other.to(x)).sum(), y) for x, y in ((narrow, values), (exact, wide)))
    torch.testing.assert_close(found.double(), wanted, rtol=5e-3, atol=5e-3 * wanted.abs().max().item())


def test_half_precision_is_computed_in_float32() -> None:
    values = torch.rand(2, 9)
    for dtype in (torch.bfloat16, torch.float16):
        ranked, weights = relaxed_sort(values.to(dtype), Sorter())
        assert ranked.dtype == weights.dtype == dtype
        torch.testing.assert_close(weights.float(), relaxed_sort(values.to(dtype).float(), Sorter())[1], atol=4e-3, rtol=0)
        assert order_cross_entropy(values.to(dtype), values, Sorter(), Sorter()).dtype == torch.float32


def test_same_order_costs_the_entropy_of_the_target() -> None:
    values = torch.rand(3, 9, dtype=torch.float64)
    weights = relaxed_sort(values, Sorter())[1]
    entropy = -(weights * weights.log()).sum((1, 2)) / 9
    torch.testing.assert_close(order_cross_entropy(values, values, Sorter(), Sorter()), entropy)


def test_target_gets_no_gradient_and_nothing_but_the_input_is_kept() -> None:
    student, teacher = torch.rand(98, 49, requires_grad=True), torch.rand(98, 49, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel() * x.element_size()), x)[1], lambda x: x):
        order_cross_entropy(student, teacher, Sorter(), Sorter()).sum().backward()
        relaxed_sort(student, Sorter())[0].sum().backward()
    assert teacher.grad is None and student.grad is not None
    # One image and pair (49 rows) keeps 9.4 KiB and not 11 MiB.
    assert max(saved) == 98 * 49 * 4


def test_pieces_change_nothing() -> None:
    student, teacher = torch.rand(50, 9, dtype=torch.float64), torch.rand(50, 9, dtype=torch.float64)
    together = order_cross_entropy(student, teacher, Sorter(), Sorter())
    for rows in (1, 3, 7):
        torch.testing.assert_close(order_cross_entropy(student, teacher, Sorter(rows=rows), Sorter(rows=rows)), together)


@pytest.mark.parametrize("sorter", [Sorter("quick"), Sorter(swap="tanh"), Sorter(steepness=0.0), Sorter(steepness=torch.nan)])
def test_what_cannot_be_sorted_is_refused(sorter: Sorter) -> None:
    with pytest.raises(UserError, match="expected"):
        relaxed_sort(torch.rand(1, 3), sorter)
