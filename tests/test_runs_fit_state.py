"""The state of a fit: what is saved comes back to the last bit, and nothing that cannot be is taken up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from errors import UserError
from runs.fit_state import Progress, Weights, load_fit, save_fit
from runs.states import load_state, save_state

OF = {"name": "probe/00", "layers": ["embed", 3], "configuration": {"trainer": {"lr": 0.1}}}


class Stack(nn.Module):
    """Two parameters of two fits and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 2, 3)), nn.Parameter(torch.randn(2, 2))


def stepped(averaging: float | None = None) -> tuple[Weights, torch.optim.Optimizer]:
    probe = Stack()
    weights = Weights(probe, averaging)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        (probe.weight.square().sum() + probe.bias.square().sum()).backward()
        optimizer.step()
        weights.after_step(step)
    weights.best = {name: p.detach() + 1 for name, p in probe.named_parameters()}
    return weights, optimizer


def progress(**changes: Any) -> Progress:
    val_loss = torch.tensor([[0.1, 1 / 3], [torch.nan, 1e-30]])
    return Progress.start(2, 2).after_epoch(val_loss).after_batch(torch.rand(2, 2), 5)._replace(**changes)


@pytest.mark.parametrize("averaging", [None, 4.0])
def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path, averaging: float | None) -> None:
    weights, optimizer = stepped(averaging)
    save_fit(tmp_path / "state", weights, optimizer, progress(), OF)
    again = Weights(Stack(), averaging)
    its = torch.optim.AdamW(again.probe.parameters(), lr=0.1)
    read = load_fit(tmp_path / "state", again, its, OF, epochs=3)
    saved = progress()
    for field in ("best", "best_epoch", "level", "since", "stopped"):
        assert torch.equal(getattr(read, field), getattr(saved, field))
    assert torch.equal(read.curve.nan_to_num(-1), saved.curve.nan_to_num(-1))
    assert read.best[1, 0] == torch.inf  # no epoch yet
    assert (read.epoch, read.step, read.n_images) == (1, 1, 5)
    assert again.average.keys() == weights.average.keys()
    for (name, a), b in zip(weights.probe.named_parameters(), again.probe.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(again.best[name], weights.best[name])
        assert averaging is None or torch.equal(again.average[name], weights.average[name])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], its.state[b][key])


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    weights, optimizer = stepped()
    reached = progress()
    for name in ("a", "b"):
        save_fit(tmp_path / name, weights, optimizer, reached, OF)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 9}, "cannot have"), ({"epoch": -1}, "cannot have"), ({"epoch": True}, "cannot have"),
        ({"step": "1"}, "cannot have"), ({"best": [[0.1]]}, "cannot have"), ({"best": "text"}, "cannot have"),
        ({"best_epoch": [[7, 0], [0, 0]]}, "cannot have"), ({"total": None}, "cannot have"),
        ({"curve": []}, "cannot have"), ({"since": [[2, 0], [0, 0]]}, "cannot have"),
        ({"stopped": [[0, 0], [0, 0]]}, "cannot have"),
        (None, "cannot have"),
    ],
)  # fmt: skip
def test_a_progress_no_fit_can_have_is_refused(tmp_path: Path, changes: dict | None, reason: str) -> None:
    weights, optimizer = stepped()
    path = tmp_path / "state"
    save_fit(path, weights, optimizer, progress(), OF)
    tensors, recipe, _ = load_state(path)
    recipe["progress"] = {**recipe["progress"], **changes} if changes is not None else None
    save_state(path, tensors, recipe)  # by somebody who knows how a digest is made
    with pytest.raises(UserError, match=f"state claims a progress .*{reason}; delete it and repeat"):
        load_fit(path, weights, optimizer, OF, epochs=3)


def test_a_state_of_another_fit_is_refused_by_name(tmp_path: Path) -> None:
    weights, optimizer = stepped()
    path = tmp_path / "state"
    save_fit(path, weights, optimizer, progress(), OF)
    with pytest.raises(UserError, match=r'state is of something else \(name: "probe/00", expected "cosine/00"\)'):
        load_fit(path, weights, optimizer, OF | {"name": "cosine/00"}, epochs=3)
    with pytest.raises(UserError, match=r"\(lr: 0.1, expected 0.2\)"):
        load_fit(path, weights, optimizer, OF | {"configuration": {"trainer": {"lr": 0.2}}}, epochs=3)
    wide = Stack()
    wide.bias = nn.Parameter(torch.zeros(2, 2, 7))
    with pytest.raises(UserError, match=r"state holds no last/bias of shape \[2, 2, 7\]"):
        load_fit(path, Weights(wide, None), optimizer, OF, epochs=3)


def test_a_fit_without_a_gain_is_stopped_and_later_losses_are_not_its_own() -> None:
    reached = Progress.start(1, 2)
    for losses in ([1.0, 1.0], [0.9999, 0.5], [0.9998, 0.25], [0.1, 0.125]):
        reached = reached.after_epoch(torch.tensor([losses]), patience=2)
    assert reached.stopped.tolist() == [[True, False]]  # gains below a thousandth are none
    assert reached.best.tolist() == [[pytest.approx(0.9998), 0.125]] and reached.best_epoch.tolist() == [[3, 4]]
    assert reached.curve[:, 0, 0].isnan().tolist() == [False, False, False, True]
    never = Progress.start(1, 1)
    for _ in range(9):
        never = never.after_epoch(torch.ones(1, 1))
    assert not never.stopped.any()


def test_the_average_is_that_of_the_last_steps_and_answers_only_where_it_is_asked_for() -> None:
    weights, n = Weights(Stack(), 0.0), 5
    taken = []
    for step in range(1, n + 1):
        with torch.no_grad():
            weights.probe.weight.fill_(float(step))
        taken.append(weights.probe.weight.clone())
        weights.after_step(step)
    torch.testing.assert_close(weights.average["weight"], torch.stack(taken).mean(0))  # 0: of all steps alike
    with weights.averaged():
        assert torch.equal(weights.probe.weight, weights.average["weight"])
    assert torch.equal(weights.probe.weight, taken[-1])
    weights.keep_better(torch.tensor([[True, False], [False, False]]))
    weights.rest(torch.tensor([[True, False], [False, False]]))
    assert torch.equal(weights.probe.weight[0, 0], weights.average["weight"][0, 0])
    assert torch.equal(weights.probe.weight[0, 1], taken[-1][0, 1])
