"""The state of a fit: what is saved comes back to the last bit, and nothing that cannot be is taken up."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from errors import UserError
from runs.fit_state import Progress, load_fit, save_fit
from runs.states import load_state, save_state

OF = {"name": "probe/00", "layers": ["embed", 3], "configuration": {"trainer": {"lr": 0.1}}}


class Stack(nn.Module):
    """Two parameters of two fits and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 2, 3)), nn.Parameter(torch.randn(2, 2))


def stepped() -> tuple[Stack, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    probe = Stack()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (probe.weight.square().sum() + probe.bias.square().sum()).backward()
        optimizer.step()
    return probe, optimizer, {name: p.detach() + 1 for name, p in probe.named_parameters()}


def progress(**changes: Any) -> Progress:
    val_loss = torch.tensor([[0.1, 1 / 3], [torch.nan, 1e-30]])
    return Progress.start(2, 2).after_epoch(val_loss).after_batch(torch.rand(2, 2), 5)._replace(**changes)


def test_what_is_saved_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    probe, optimizer, best = stepped()
    save_fit(tmp_path / "state", probe, optimizer, best, progress(), OF)
    again, fresh = Stack(), {name: p.detach() for name, p in Stack().named_parameters()}
    its = torch.optim.AdamW(again.parameters(), lr=0.1)
    read = load_fit(tmp_path / "state", again, its, fresh, OF, epochs=3)
    saved = progress()
    for field in ("best", "best_epoch"):
        assert torch.equal(getattr(read, field), getattr(saved, field))
    assert read.best[1, 0] == torch.inf  # no epoch yet
    assert (read.epoch, read.step, read.n_images) == (1, 1, 5)
    for (name, a), b in zip(probe.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(fresh[name], best[name])
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], its.state[b][key])


def test_equal_states_are_equal_bytes(tmp_path: Path) -> None:
    probe, optimizer, best = stepped()
    reached = progress()
    for name in ("a", "b"):
        save_fit(tmp_path / name, probe, optimizer, best, reached, OF)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 9}, "cannot have"), ({"epoch": -1}, "cannot have"), ({"epoch": True}, "cannot have"),
        ({"step": "1"}, "cannot have"), ({"best": [[0.1]]}, "cannot have"), ({"best": "text"}, "cannot have"),
        ({"best_epoch": [[7, 0], [0, 0]]}, "cannot have"), ({"total": None}, "cannot have"), (None, "cannot have"),
    ],
)  # fmt: skip
def test_a_progress_no_fit_can_have_is_refused(tmp_path: Path, changes: dict | None, reason: str) -> None:
    probe, optimizer, best = stepped()
    path = tmp_path / "state"
    save_fit(path, probe, optimizer, best, progress(), OF)
    tensors, recipe, _ = load_state(path)
    recipe["progress"] = {**recipe["progress"], **changes} if changes is not None else None
    save_state(path, tensors, recipe)  # by somebody who knows how a digest is made
    with pytest.raises(UserError, match=f"state claims a progress .*{reason}; delete it and repeat"):
        load_fit(path, probe, optimizer, best, OF, epochs=3)


def test_a_state_of_another_fit_is_refused_by_name(tmp_path: Path) -> None:
    probe, optimizer, best = stepped()
    path = tmp_path / "state"
    save_fit(path, probe, optimizer, best, progress(), OF)
    with pytest.raises(UserError, match=r'state is of something else \(name: "probe/00", expected "cosine/00"\)'):
        load_fit(path, probe, optimizer, best, OF | {"name": "cosine/00"}, epochs=3)
    with pytest.raises(UserError, match=r"\(lr: 0.1, expected 0.2\)"):
        load_fit(path, probe, optimizer, best, OF | {"configuration": {"trainer": {"lr": 0.2}}}, epochs=3)
    wide = Stack()
    wide.bias = nn.Parameter(torch.zeros(2, 2, 7))
    with pytest.raises(UserError, match=r"state holds no last/bias of shape \[2, 2, 7\]"):
        load_fit(path, wide, optimizer, best, OF, epochs=3)
