"""How fast a probe is fitted, beside the machine's matrix products and the published way, all in one run.

    python scripts/bench_fit.py                                      # quadratic probe, float32 and bfloat16
    python scripts/bench_fit.py --layers 12 --seeds 3 --dtype auto   # a stack, in the format the trainer would choose
    python scripts/bench_fit.py --probe quadratic_concat             # a binding probe against its expanded form
    python scripts/bench_fit.py --default --threads 2                # the fits of `python main.py`, as bench_default.py

A step is forward, loss, backward and optimiser. Everything that is compared is timed in turn, round after round, and
ratios are medians over rounds, so that a busy machine slows all sides alike.

FLOP/s of the quadratic probe count the plain products of the published form, 4 B T D (D + T) per fit and step (two
products forward, two backward); the program needs fewer, because the form is symmetric. The machine's matmul rate is that
of two square matrices of 2048; the rate of one product of the same tokens with a D x D matrix is printed beside it (in
bfloat16 the kindest shape there is: nothing is transposed, and one side stays in the cache).
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from binding.base import seen_bits
from binding.probes import BINDING_PROBES
from forms import resolve_matmul_dtype
from pairs.losses import pair_bce
from probes import Probe, build_probe
from scripts import bench_default

FORMS = ("quadratic_concat", "quadratic_concat_reuse", "multilinear_concat_reuse", "attention_quadratic")


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--probe", choices=("quadratic", *FORMS), default="quadratic")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dim", type=int, default=1024, help="width D of a token")
    parser.add_argument("--tokens", type=int, help="tokens per image (64; attention_quadratic 65, CLS included)")
    parser.add_argument("--batch", type=int, help="images (128; binding probes 512)")
    parser.add_argument("--dtype", default="both", choices=("both", "auto", "float32", "bfloat16"))
    parser.add_argument("--linear-term", action="store_true", help="as protocol=clean: the form contains the linear probe")
    parser.add_argument("--standardize", action="store_true", help="as protocol=clean: channels are standardised")
    parser.add_argument("--bits", type=int, default=64, help="length K of the code (binding probes; a square)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the binding probes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0 = what torch chooses")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--score-steps", type=int, default=40, help="steps of the fit that compares scores; 0 = none")
    parser.add_argument("--memory-of", choices=("program", "expanded"), help=argparse.SUPPRESS)  # asked of a subprocess
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or {"quadratic": 64, "attention_quadratic": 65}.get(options.probe, 1)
    options.batch = options.batch or (128 if options.probe == "quadratic" else 512)
    return options


def clock(call: Callable[[], object], device: str) -> float:
    """Seconds one call takes, the device's queue included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Times of every call in every round, one after the other; the first round is thrown away."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = clock(call, device)
            if number:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times longer one call takes than another, median over rounds."""
    return median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def stepper(probe: Probe, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One training step of a stack: forward, loss, backward, AdamW."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        loss().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# ---------------------------------------------------------------------------------------------------- quadratic probe


def build_quadratic(options: argparse.Namespace, dtype: str, layers: int, seeds: int) -> Probe:
    """The stacked quadratic probe on the device."""
    cfg = {
        "mode": "quadratic",
        "matmul_dtype": dtype,
        "linear_term": options.linear_term,
        "standardize": options.standardize,
    }
    return build_probe(cfg, seeds=range(seeds), layers=range(layers), dim=options.dim).to(options.device)


def published_stepper(x: Tensor, same: Tensor, *, form_per_image: bool = True) -> Callable[[], None]:
    """The published way for one layer: a loop over images that builds the symmetric matrix in every call, then Adam.

    Args:
        x: tokens float32 [B, T, D].
        same: bool [B, T, T].
        form_per_image: False builds the matrix once a step, to show what that alone would have saved.
    """
    dim = x.shape[-1]
    linear = torch.nn.Linear(dim, dim).to(x.device)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3)
    target = same.float()

    def build_form() -> Tensor:
        return (linear.weight + linear.weight.mT) / (2 * dim**0.5)

    def step() -> None:
        optimizer.zero_grad()
        once = None if form_per_image else build_form()
        scores = [tokens @ (build_form() if once is None else once) @ tokens.mT + linear.bias[0] for tokens in x]
        F.binary_cross_entropy_with_logits(torch.stack(scores), target).backward()
        optimizer.step()

    return step


def bench_quadratic(options: argparse.Namespace) -> None:
    """Step time and FLOP/s of the stacked quadratic probe beside matrix products and the published way."""
    n_images, n_tokens, dim = options.batch, options.tokens, options.dim
    n_fits = options.layers * options.seeds
    x = torch.randn(options.layers, n_images, n_tokens, dim, device=options.device)
    label = torch.randint(0, 6, (n_images, n_tokens), device=options.device)
    same = label[:, :, None] == label[:, None]
    for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
        probe = build_quadratic(options, dtype, options.layers, options.seeds)
        number = resolve_matmul_dtype(dtype, x.device, dim)
        rows, matrix = x[0].reshape(-1, dim).to(number), torch.randn(dim, dim, device=x.device).to(number)
        square = torch.randn(2048, 2048, device=x.device).to(number)

        def loss(probe: Probe = probe) -> Tensor:
            return pair_bce(probe(x), same, pairs="all")

        calls = {
            "product": lambda rows=rows, matrix=matrix: rows @ matrix,
            "square": lambda square=square: square @ square,
            "step": stepper(probe, loss),
            "published": published_stepper(x[0], same),
            "hoisted": published_stepper(x[0], same, form_per_image=False),
        }
        times = interleave(calls, options.rounds, options.device)
        work = 4 * n_images * n_tokens * dim * (dim + n_tokens) * n_fits
        product, plain = 2 * n_images * n_tokens * dim * dim, 2 * 2048**3
        print(
            f"{number!s:15} step {1e3 * median(times['step']):8.1f} ms for {n_fits} fit(s)"
            f" | {work / median(times['step']) / 1e9:7.0f} GFLOP/s"
            f" = {ratio(times, 'square', 'step') * work / plain:.2f} of the matmul rate"
            f" {plain / median(times['square']) / 1e9:.0f}"
            f" ({ratio(times, 'product', 'step') * work / product:.2f} of the rate of this shape,"
            f" {product / median(times['product']) / 1e9:.0f})"
            f" | published way {1e3 * median(times['published']):.0f} ms a layer"
            f" = {ratio(times, 'published', 'step') * n_fits:.1f} x"
            f" (its form built once a step: {1e3 * median(times['hoisted']):.0f} ms"
            f" = {ratio(times, 'hoisted', 'step') * n_fits:.1f} x)",
            flush=True,
        )
    if options.score_steps:
        compare_scores(options)


def compare_scores(options: argparse.Namespace) -> None:
    """Fit the same planted tokens with either format and compare held-out accuracy and AUROC."""
    n_images, n_tokens, dim = 2 * options.batch, options.tokens, options.dim
    generator = torch.Generator().manual_seed(0)
    # Ten weak object codes in as many random directions, strong common noise: scores end between chance and perfect.
    code = torch.randn(10, dim, generator=generator) * 0.25
    label = torch.randint(0, 10, (n_images, n_tokens), generator=generator)
    x = (code[label] + torch.randn(n_images, n_tokens, dim, generator=generator))[None].to(options.device)
    same = (label[:, :, None] == label[:, None]).to(options.device)
    train, test = slice(0, options.batch), slice(options.batch, None)
    pairs = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=options.device).triu(1)
    found = {}
    for dtype in ("float32", "bfloat16"):
        probe = build_quadratic(options, dtype, 1, 1)
        step = stepper(probe, lambda probe=probe: pair_bce(probe(x[:, train]), same[train], pairs="upper"))
        for _ in range(options.score_steps):
            step()
        with torch.no_grad():
            scores, truth = probe(x[:, test])[0, 0][:, pairs].flatten(), same[test][:, pairs].flatten()
        rank = torch.empty(len(scores), dtype=torch.float64, device=scores.device)
        rank[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
        positive, negative = truth.sum().double(), (~truth).sum().double()
        auroc = (rank[truth].sum() - positive * (positive + 1) / 2) / (positive * negative)
        found[dtype] = (100 * ((scores > 0) == truth).double().mean().item(), 100 * auroc.item())
    (exact_accuracy, exact_auroc), (accuracy, auroc) = found.values()
    print(
        f"scores after {options.score_steps} steps on planted tokens, float32 / bfloat16: accuracy {exact_accuracy:.2f} /"
        f" {accuracy:.2f} %, AUROC {exact_auroc:.2f} / {auroc:.2f} %"
        f" (apart by {abs(exact_accuracy - accuracy):.2f} and {abs(exact_auroc - auroc):.2f} points)"
    )


# ----------------------------------------------------------------------------------------------------- binding probes


def expanded(probe: Probe, x: Tensor, code: Tensor) -> Tensor:
    """The published computation of a form probe: every bit gets its own copy of z and of the bits it sees.

    Args:
        probe: one of FORMS, of one fit, with its own parameters.
        x: tokens float32 [1, B, T, D].
        code: [B, K].

    Returns:
        log-odds [1, 1, B, K].
    """
    x, n_bits = x[0], probe.n_bits
    seen = (code.float() - 0.5).unsqueeze(-1) * seen_bits(n_bits, x.device)  # [B, K seen, K]
    own = {name: p[0, 0] for name, p in probe.named_parameters()}
    if isinstance(probe, BINDING_PROBES["attention_quadratic"]):
        queries = own["query_base"] + torch.einsum("bik,id->bkd", seen, own["query_bits"])
        queries = queries @ own["query_map"].mT  # [B, K, D]
        attention = torch.softmax(queries @ x[:, 1:].mT * probe.dim**-0.5, dim=-1)
        pools = attention @ x[:, 1:]  # [B, K, D]
        first = x[:, 0].unsqueeze(-1).expand(-1, -1, n_bits)
        inputs = torch.cat([first, pools.mT, seen], dim=1)  # [B, 2D + K, K]
        weight = torch.cat([own["weight_class"], own["weight_pool"].permute(1, 2, 3, 0), own["weight_bits"]])
    else:
        inputs = torch.cat([x.flatten(1).unsqueeze(-1).expand(-1, -1, n_bits), seen], dim=1)  # [B, Z + K, K]
        if "weight_image" in own and hasattr(probe, "groups"):
            values = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in probe.groups)).mT  # [G, K]
            image = own["weight_image"].split([probe.rank * n for n in probe.groups], dim=1)
            shared = [w.unflatten(1, (probe.rank, -1))[..., v] for w, v in zip(image, values, strict=True)]
            weight = torch.cat([torch.stack(shared, dim=1), own["weight_bits"]])
        else:
            weight = torch.cat([own["weight_image"], own["weight_bits"]])
    factors = [torch.einsum("bdk,drk->brk", inputs, weight[:, f]) for f in range(weight.shape[1])]
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return (product.sum(1) * inputs.shape[1] ** -0.5 + own["bias"])[None, None]


def binding_calls(options: argparse.Namespace, dtype: str) -> dict[str, Callable[[], None]]:
    """Training steps of one fit, factorised and expanded, on the same tokens and codes."""
    side = int(options.bits**0.5)
    if side * side != options.bits:
        raise SystemExit(f"--bits is {options.bits}; expected a square number, the conjunctions of two equal groups")
    cfg = {"mode": options.probe, "rank": options.rank, "matmul_dtype": dtype, "standardize": False}
    given = {"n_bits": options.bits, "n_tokens": options.tokens, "groups": [side, side]}
    build = lambda layers, seeds: build_probe(
        cfg, seeds=range(seeds), layers=range(layers), dim=options.dim, table=BINDING_PROBES, **given
    ).to(options.device)
    x = torch.randn(options.layers, options.batch, options.tokens, options.dim, device=options.device)
    code = torch.randint(0, 2, (options.batch, options.bits), device=options.device)
    ours, theirs = build(options.layers, options.seeds), build(1, 1)
    bce = lambda scores: F.binary_cross_entropy_with_logits(scores, code.float().expand_as(scores), reduction="none")
    return {
        "program": stepper(ours, lambda: bce(ours(x, code)).mean((2, 3))),
        "expanded": stepper(theirs, lambda: bce(expanded(theirs, x[:1], code)).mean((2, 3))),
    }


def peak_memory(options: argparse.Namespace, name: str, dtype: str) -> float:
    """Bytes a step needs beyond tokens, parameters and optimiser: own process on a CPU, the allocator's peak on a GPU."""
    if options.device.startswith("cuda"):
        call = binding_calls(options, dtype)[name]
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    arguments = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in ("probe", "dim", "tokens", "batch", "bits")]
    arguments += [f"--rank={options.rank}", f"--threads={options.threads}", f"--dtype={dtype}", f"--memory-of={name}"]
    # Every block of 64 kB or more goes back to the system when it is freed, so that resident memory is memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, *arguments]
    return float(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)


def bench_binding(options: argparse.Namespace) -> None:
    """Step time and peak memory of a binding probe beside its expanded form."""
    for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
        times = interleave(binding_calls(options, dtype), options.rounds, options.device)
        memory = {name: peak_memory(options, name, dtype) for name in times}
        n_fits = options.layers * options.seeds
        number = resolve_matmul_dtype(dtype, torch.device(options.device), options.dim)
        print(
            f"{options.probe} {number!s:15} step {1e3 * median(times['program']):8.1f} ms for {n_fits} fit(s)"
            f" | expanded, float32 {1e3 * median(times['expanded']):8.1f} ms a fit"
            f" = {ratio(times, 'expanded', 'program') * n_fits:.1f} x"
            f" | peak memory of one fit {memory['program'] / 1e6:.0f} MB against {memory['expanded'] / 1e6:.0f} MB"
            f" = {memory['expanded'] / max(memory['program'], 1):.1f} x less",
            flush=True,
        )


def print_peak_memory(options: argparse.Namespace) -> None:
    """Answer `peak_memory`: how far the resident memory of this process rises above its level before a step (Linux)."""
    call = binding_calls(options, options.dtype)[options.memory_of]
    call()  # the optimiser's moments and torch's own buffers exist from here on
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is held now
    held = resident("VmRSS")
    call()
    print(resident("VmHWM") - held)


def resident(what: str) -> int:
    """A line of this process's status in bytes: VmRSS is held now, VmHWM was held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--default"]:  # what follows are options of that script
        bench_default.main(arguments[1:])
        return
    options = read_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.memory_of:
        print_peak_memory(options)
        return
    machine = torch.cuda.get_device_name() if options.device.startswith("cuda") else cpu_name()
    print(f"{machine}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"probe {options.probe}: {options.layers} layer(s) x {options.seeds} seed(s), D={options.dim}, "
        f"{options.tokens} token(s), {options.batch} images a step, {options.rounds} rounds"
    )
    (bench_quadratic if options.probe == "quadratic" else bench_binding)(options)


def cpu_name() -> str:
    """The processor as the system names it, with the matrix units torch sees."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    units = [u for u in ("amx_tile", "avx512_bf16", "avx512") if getattr(torch.cpu, f"_is_{u}_supported", bool)()]
    return f"{name} ({', '.join(units) or 'no matrix units'})"


if __name__ == "__main__":
    main()
