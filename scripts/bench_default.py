"""How fast the fits of the default run are, beside the machine's matrix products: where a step spends its time.

    python scripts/bench_default.py                # one line per fit: quadratic, position, class_linear, cosine
    python scripts/bench_default.py --threads 1

The shapes are those of `python main.py`: 16 images a step, 64 tokens an image, tokens stored as float16.

    quadratic     D 128, 9 layers x 3 seeds x 2 variants, the probe of mode=train
    position      D 96, 1 layer x 1 seed x 2 variants, its control on positions
    class_linear  D 128, 9 layers x 3 seeds, 11 classes, the probe of mode=train_class
    cosine        D 128, 9 layers x 2 variants: offset and factor by Newton's method, the whole fit on 800 images

Products and square matrices of 2048, whose rate is the machine's matmul rate, are timed in turn with the steps, and shares
are medians over rounds, so that a busy machine slows all sides alike. Products count as in the published form, 4 B T D (D +
T) a fit and step for the quadratic probe and 4 B T D K for the class read-out. Data is the reading of tokens.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from forms import fold_form, form_cuts, form_gradient, turn_tokens
from machine import cpu_name, even_parts, keep_freed_memory, share_threads
from pairs.form_loss import form_bce, pair_terms
from pairs.losses import class_loss
from pairs.newton import PairBatch, solve
from probes import Probe, build_probe
from store.shards import StackedTokens

N_IMAGES, BATCH, N_TOKENS, N_CLASSES = 800, 16, 64, 11
SIDE = 2048  # of the square matrices


class Row(NamedTuple):
    """One fit: calls that are timed in turn, and the multiply-adds x 2 of one step."""

    name: str
    calls: dict[str, Callable[[], object]]
    work: float


def planted(n_layers: int, dim: int) -> tuple[StackedTokens, Tensor]:
    """Random tokens [L, M, T, D] as a cache holds them, and identities int64 [M, T]."""
    tokens = torch.randn(n_layers, N_IMAGES, N_TOKENS, dim, dtype=torch.float16)
    return StackedTokens.from_tensor(tokens, list(range(n_layers))), torch.randint(0, 6, (N_IMAGES, N_TOKENS))


def used_tokens(identity: Tensor) -> Tensor:
    """Tokens that count for the two variants, all and foreground: bool [2, B, T]."""
    return torch.stack([torch.ones_like(identity, dtype=torch.bool), identity > 0])


def step_calls(probe: Probe, tokens: StackedTokens, loss: Callable[[Tensor], Tensor]) -> dict[str, Callable[[], object]]:
    """Reading a batch, a whole step on it, and the optimiser alone."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, fused=True)
    images = torch.randperm(N_IMAGES)[:BATCH]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(tokens.gather(images)).sum().backward()
        optimizer.step()

    return {"step": step, "data": lambda: tokens.gather(images), "optimizer": optimizer.step}


def pair_row(name: str, dim: int, n_layers: int, n_seeds: int) -> Row:
    """The quadratic probe of two variants."""
    tokens, identity = planted(n_layers, dim)
    cfg = {"mode": "quadratic", "linear_term": True, "standardize": True, "matmul_dtype": "float32"}
    probe = build_probe(cfg, seeds=[*range(n_seeds)] * 2, layers=range(n_layers), dim=dim)
    identity = identity[:BATCH]
    calls = step_calls(
        probe, tokens, lambda x: form_bce(*probe.form_parts(x), pair_terms(identity, used_tokens(identity), "upper"))
    )
    cuts = form_cuts(torch.empty(n_layers, BATCH, N_TOKENS, dim))
    x, weight = torch.randn(cuts.n_layers, BATCH, N_TOKENS, dim), torch.randn(cuts.n_layers, dim, dim)
    grad = torch.randn(cuts.n_layers, BATCH, N_TOKENS, N_TOKENS)

    def products(share: Sequence) -> None:
        n = len(share)
        z, out = torch.empty_like(x[:n]), torch.empty(n, dim, dim)
        turn_tokens(x[:n], fold_form(weight[:n], cuts.blocks, x.dtype), cuts.blocks, z)
        torch.matmul(z, x[:n].mT)
        form_gradient(x[:n], grad[:n], cuts.blocks, out, z, first=True)

    n_fits = 2 * n_seeds * n_layers
    calls["products"] = lambda: share_threads(products, even_parts(range(n_fits), cuts.n_layers))
    return Row(name, calls, 4 * BATCH * N_TOKENS * dim * (dim + N_TOKENS) * n_fits)


def class_row(dim: int, n_layers: int, n_seeds: int) -> Row:
    """The linear class read-out."""
    tokens, label = planted(n_layers, dim)
    cfg = {"mode": "class_linear", "standardize": True, "matmul_dtype": "float32"}
    probe = build_probe(cfg, seeds=range(n_seeds), layers=range(n_layers), dim=dim, n_classes=N_CLASSES)
    label = label[:BATCH]
    calls = step_calls(probe, tokens, lambda x: class_loss(probe(x), label))
    x, columns = torch.randn(n_layers, BATCH * N_TOKENS, dim), torch.randn(n_layers, n_seeds * N_CLASSES, dim)
    grad = torch.randn(n_layers, BATCH * N_TOKENS, n_seeds * N_CLASSES)
    calls["products"] = lambda: (torch.bmm(x, columns.mT), torch.bmm(grad.mT, x))
    return Row("class_linear", calls, 4 * BATCH * N_TOKENS * dim * N_CLASSES * n_seeds * n_layers)


def solve_cosine(dim: int, n_layers: int) -> tuple[float, int]:
    """Seconds of the whole fit of offset and factor for two variants, and its passes over the pairs."""
    tokens, identity = planted(n_layers, dim)
    probe = build_probe({"mode": "cosine", "learn_scale": True}, seeds=[0, 0], layers=range(n_layers), dim=dim)
    first, second = torch.triu_indices(N_TOKENS, N_TOKENS, 1)

    def batches() -> Iterator[PairBatch]:
        for images in torch.arange(N_IMAGES).split(BATCH):
            x, ids = tokens.gather(images), identity[images]
            scores = probe.similarity(x, x).flatten(2).index_select(2, first * N_TOKENS + second)  # [L, B, P]
            used = used_tokens(ids).float()
            counted = used[..., first] * used[..., second]  # [V, B, P]
            yield PairBatch(scores, counted, counted * (ids[:, first] == ids[:, second]))

    started = time.perf_counter()
    solution = solve(batches)
    return time.perf_counter() - started, solution.passes


def measure(row: Row, rounds: int) -> str:
    """Time the calls of a row in turn with square products; the first round does not count."""
    square = torch.randn(SIDE, SIDE)
    calls = {**row.calls, "square": lambda: square @ square}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                times[name].append(time.perf_counter() - started)
    share = median(s / t for s, t in zip(times["square"], times["step"], strict=True)) * row.work / (2 * SIDE**3)
    ms = {name: 1e3 * median(values) for name, values in times.items()}
    rest = ms["step"] - ms["products"] - ms["optimizer"] - ms["data"]
    return (
        f"{row.name:13} step {ms['step']:7.2f} ms (min {1e3 * min(times['step']):7.2f}) = {share:4.2f} of the matmul rate "
        f"{2 * SIDE**3 / ms['square'] / 1e6:.0f} GFLOP/s | products {ms['products']:6.2f}, loss and rest {rest:6.2f}, "
        f"optimiser {ms['optimizer']:5.2f}, data {ms['data']:5.2f} ms"
    )


def main(arguments: list[str] | None = None) -> None:
    """Print a line per fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0 = what torch chooses")
    parser.add_argument("--dim", type=int, default=128, help="width D of a token (position: 96)")
    parser.add_argument("--layers", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)
    print(f"{cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, Python {platform.python_version()}")
    rows = (
        lambda: pair_row("quadratic", options.dim, options.layers, 3),
        lambda: pair_row("position", 96, 1, 1),
        lambda: class_row(options.dim, options.layers, 3),
    )
    for build in rows:
        print(measure(build(), options.rounds), flush=True)
    seconds, passes = solve_cosine(options.dim, options.layers)
    print(f"cosine        the whole fit {seconds:.2f} s, {passes} passes over {N_IMAGES} images")


if __name__ == "__main__":
    main()
