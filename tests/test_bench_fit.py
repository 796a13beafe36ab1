"""The fit benchmark: its expanded forms are the probes they are compared with, and its command lines run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from binding.probes import BINDING_PROBES
from pairs.losses import pair_bce
from probes import build_probe

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_fit.py"
spec = importlib.util.spec_from_file_location("bench_fit", SCRIPT)
bench_fit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_fit)


@pytest.mark.parametrize("mode", bench_fit.FORMS)
def test_factorised_equals_expanded(mode: str) -> None:
    """Values and the gradient of every parameter."""
    n_tokens = 5 if mode == "attention_quadratic" else 2
    groups = [2, 3, 2] if mode.startswith("multilinear") else [3, 4]
    probe = build_probe(
        {"mode": mode, "rank": 3, "matmul_dtype": "float32", "init_std": 0.3}, seeds=[0], layers=[0], dim=6,
        table=BINDING_PROBES, n_bits=12, n_tokens=n_tokens, groups=groups,
    )  # fmt: skip
    x, code = torch.randn(1, 7, n_tokens, 6), torch.randint(0, 2, (7, 12))
    ours, theirs = probe(x, code), bench_fit.expanded(probe, x, code)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(ours)
    grads = [torch.autograd.grad((s * direction).sum(), list(probe.parameters())) for s in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_published_loop_is_the_probe() -> None:
    """One step of the loop changes its weights as one Adam step changes the stacked probe's."""
    torch.manual_seed(0)
    x, same = torch.randn(3, 5, 8), torch.rand(3, 5, 5) > 0.5
    probe = build_probe({"mode": "quadratic", "matmul_dtype": "float32"}, seeds=[0], layers=[0], dim=8)
    for per_image in (True, False):
        torch.manual_seed(1)
        linear = torch.nn.Linear(8, 8)
        torch.manual_seed(1)
        step = bench_fit.published_stepper(x, same, form_per_image=per_image)
        with torch.no_grad():
            probe.weight.copy_(linear.weight)
            probe.bias.copy_(linear.bias[0])
        probe.zero_grad()
        loss = pair_bce(probe(x[None]), same, pairs="all").sum()
        loss.backward()
        seen = []
        linear_grad = lambda grad, seen=seen: seen.append(grad.clone())
        published = next(c.cell_contents for c in step.__closure__ if isinstance(c.cell_contents, torch.optim.Optimizer))
        published.param_groups[0]["params"][0].register_hook(linear_grad)
        step()
        torch.testing.assert_close(seen[0], probe.weight.grad[0, 0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        "--dim 8 --tokens 4 --batch 3 --rounds 1 --layers 2 --seeds 2 --score-steps 2",
        "--dim 8 --tokens 4 --batch 3 --rounds 1 --dtype auto --linear-term --standardize --score-steps 0",
        "--probe quadratic_concat --dim 8 --batch 3 --bits 4 --rounds 1",
        "--probe attention_quadratic --dim 8 --batch 3 --tokens 5 --bits 4 --rounds 1 --dtype float32",
    ],
)
def test_command_lines(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_fit, "peak_memory", lambda *_: 1e6)
    bench_fit.main(line.split())
    out = capsys.readouterr().out
    assert "thread(s), torch" in out and " x" in out and ("GFLOP/s" in out or "MB" in out)


def test_peak_memory_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """A step that needs 64 MB or more is seen to need it."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("resident memory is read from /proc")
    options = "--probe quadratic_concat --dim 256 --batch 512 --bits 64 --dtype float32 --memory-of expanded".split()
    # A process of its own, as in the benchmark: one that has run other tests has memory to spare and asks for none.
    done = subprocess.run([sys.executable, bench_fit.__file__, *options], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40e6
    with pytest.raises(SystemExit, match="square number"):
        bench_fit.main("--probe quadratic_concat --bits 5 --dim 4 --batch 2 --rounds 1 --memory-of program".split())


@pytest.mark.parametrize("script", [["bench_default.py"], ["bench_fit.py", "--default"]])
def test_the_bench_of_the_default_run_prints_a_line_per_fit(script: list[str]) -> None:
    options = [*script[1:], "--rounds=1", "--dim=8", "--layers=1", "--threads=1"]
    command = [sys.executable, str(SCRIPT.with_name(script[0])), *options]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["quadratic", "position", "class_linear", "cosine"]
    assert all("of the matmul rate" in line for line in lines[1:4]) and "passes over" in lines[4]
