"""How fast the dense evaluations are, beside the published way on the same arrays, in one run.

    python scripts/bench_dense.py                        # all parts, about two minutes on two cores, below 2 GB
    python scripts/bench_dense.py --part retrieval --bank 100000

    matching      one bincount against a pass over all pixels for every pair of cluster and class
    retrieval     nearest neighbours, against the machine's matrix products and the published search (a flat faiss index);
                  label transfer, against the published loop (neighbours gathered, cosines taken again)
    overcluster   clustering and assigning projected tokens, against bare faiss; and the whole way from tokens to clusters
    linear        a training step of 9 learning rates x 5 seeds against that of one head, and against one published step
                  (tokens scaled up to 100 x 100, then the convolution)

What is compared is timed in turn, round after round, and ratios are medians over rounds: a busy machine slows all sides
alike. With --threads 1 processor time is counted, which other programs change little. Times hold for the machine printed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dense.contract import Grids, LabelMaps
from dense.heads import Heads, Normalization, Recipe, pixel_target, share_target, train_epoch
from dense.projection import assign, cluster, fit_projection, project
from dense.retrieval import nearest, transfer
from machine import cpu_name
from metrics.segmentation import confusion_matrix, iou

PARTS = ("matching", "retrieval", "overcluster", "linear")


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="only these; may be given several times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0 = what torch chooses")
    parser.add_argument("--pixels", type=int, default=500_000, help="matching: compared pixels")
    parser.add_argument("--clusters", type=int, default=500, help="matching and overcluster")
    parser.add_argument("--bank", type=int, default=50_000, help="retrieval: patches in memory")
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=1_400_000, help="overcluster (VOC val at 448 px has 1.48 million)")
    parser.add_argument("--iterations", type=int, default=10, help="overcluster: of k-means, one restart (published 100, 5)")
    parser.add_argument("--images", type=int, default=8, help="linear: images of a step, 32 x 32 patches each")
    options = parser.parse_args(arguments)
    options.part = options.part or list(PARTS)
    return options


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, one after the other; the first round is thrown away."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if number:
                times[name].append(clock() - start)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times longer one call takes than another, median over rounds."""
    return median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def published_matching(target: Tensor, prediction: Tensor, n_classes: int, n_clusters: int) -> Tensor:
    """IoU of every pair, a pass over all pixels for each."""
    found = torch.zeros(n_classes, n_clusters)
    for k in range(n_clusters):
        called = prediction == k
        for c in range(n_classes):
            true = target == c
            found[c, k] = (called & true).sum() / (called | true).sum().clamp_min(1)
    return found


def matching(options: argparse.Namespace) -> list[str]:
    """The confusion matrix; the published way is timed on fewer clusters and scaled up (its time is linear in them)."""
    target = torch.randint(0, 21, (options.pixels,))
    prediction = torch.randint(0, options.clusters, (options.pixels,))
    few = min(4, options.clusters)
    times = interleave(
        {
            "ours": lambda: iou(confusion_matrix(target, prediction, 21, options.clusters)),
            "published": lambda: published_matching(target, prediction, 21, few),
        },
        options.rounds,
    )
    gain = ratio(times, "published", "ours") * options.clusters / few
    ours = median(times["ours"])
    return [
        f"matching      {options.pixels} pixels, {options.clusters} x 21: {1e3 * ours:.1f} ms, {gain:.0f} x the published speed"
    ]


def published_transfer(rows: Tensor, bank: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Keys and labels of the neighbours gathered, cosines taken again, softmax, sum."""
    keys = bank[rows]  # [Q, 30, D]
    cosines = (F.normalize(queries, dim=-1)[:, None] * F.normalize(keys, dim=-1)).sum(-1)
    return ((cosines / 0.02).softmax(-1)[..., None] * labels[rows]).sum(1)


def retrieval(options: argparse.Namespace) -> list[str]:
    """Search and transfer."""
    bank = F.normalize(torch.randn(options.bank, options.dim), dim=-1)
    queries = F.normalize(torch.randn(options.queries, options.dim), dim=-1)
    labels, half = torch.rand(options.bank, 21), bank.half()
    index = faiss.IndexFlatIP(options.dim)
    index.add(bank.numpy())
    square = torch.randn(2048, 2048)
    found = nearest(queries, half, 30)
    times = interleave(
        {
            "search": lambda: nearest(queries, half, 30),
            "published search": lambda: index.search(queries.numpy(), 30),
            "transfer": lambda: transfer(*found, labels),
            "published transfer": lambda: published_transfer(found[1], bank, labels, queries),
            "products": lambda: square @ square,
        },
        options.rounds,
    )
    flop = 2 * options.queries * options.bank * options.dim
    share = median(flop / a / (2 * 2048**3 / b) for a, b in zip(times["search"], times["products"], strict=True))
    for side in ("", "published "):
        times[f"{side}both"] = [a + b for a, b in zip(times[f"{side}search"], times[f"{side}transfer"], strict=True)]
    return [
        f"retrieval     {options.queries} queries, memory {options.bank} x {options.dim}: search {share:.2f} of torch's matrix "
        f"products, {ratio(times, 'published search', 'search'):.2f} x a flat faiss index; "
        f"transfer {ratio(times, 'published transfer', 'transfer'):.0f} x the published speed; "
        f"both together {ratio(times, 'published both', 'both'):.2f} x"
    ]


def overcluster(options: argparse.Namespace) -> list[str]:
    """From projected tokens, and on fewer images from tokens, to cluster numbers."""
    values = torch.randn(options.tokens, 50).numpy()
    setting = {"seed": 0, "iterations": options.iterations, "restarts": 1, "max_points": 256}

    def bare(values: np.ndarray) -> np.ndarray:
        kmeans = faiss.Kmeans(50, options.clusters, niter=options.iterations, nredo=1, seed=0, min_points_per_centroid=1)
        kmeans.train(values)
        return kmeans.index.search(values, 1)[1]

    times = interleave(
        {"ours": lambda: assign(cluster(values, options.clusters, **setting), values), "faiss": lambda: bare(values)},
        options.rounds,
    )
    n_tokens = min(options.tokens, 60_000) // 1024 * 1024
    grids = Grids.from_tensor(torch.randn(1, max(1, n_tokens // 1024), 32, 32, options.dim), patch=14)

    def whole() -> np.ndarray:
        found = project(grids, fit_projection(grids, n_components=50)).values
        return assign(cluster(found, options.clusters, **setting), found)

    few = project(grids, fit_projection(grids, n_components=50)).values
    beside = interleave({"ours": whole, "faiss": lambda: bare(few)}, options.rounds)
    return [
        f"overcluster   {len(values)} tokens x 50, K = {options.clusters}: {median(times['ours']):.1f} s, "
        f"{ratio(times, 'ours', 'faiss'):.2f} x the time of bare faiss; {len(few)} tokens x {options.dim} standardised, "
        f"projected and clustered: {ratio(beside, 'ours', 'faiss'):.2f} x the time of bare faiss on projected ones"
    ]


def linear(options: argparse.Namespace) -> list[str]:
    """A training step of a stack, of one head, and of one head the published way."""
    tokens = torch.randn(1, options.images, 32, 32, options.dim)
    maps = torch.randint(0, 21, (options.images, 448, 448))
    lrs = [10**-e for e in np.linspace(1, 5, 9)]

    def stepper(rates: list[float], seeds: int, loss: str) -> Callable[[], None]:
        recipe = Recipe(rates, [0.0], 1, options.images, "sgd", 0.9, "constant", 1, 1.0, 0.0, 2.0)
        heads, norm = Heads(len(rates), range(seeds), [0], options.dim, 21), Normalization("none", 1, options.dim)
        optimizer = recipe.optimizer_for(heads)
        target = share_target(21) if loss == "patches" else pixel_target(21, 100)
        return lambda: train_epoch(heads, norm, optimizer, [(tokens, maps)], 1, 0, recipe, target)

    head = torch.nn.Conv2d(options.dim, 21, 1)
    sgd = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
    target = LabelMaps.from_tensor(maps, 21).at(torch.arange(options.images), (100, 100))

    def published() -> None:
        x = F.interpolate(tokens[0].permute(0, 3, 1, 2), size=(100, 100), mode="bilinear", align_corners=False)
        sgd.zero_grad()
        F.cross_entropy(head(x), target).backward()
        sgd.step()

    calls = {"stack": stepper(lrs, 5, "patches"), "one": stepper(lrs[:1], 1, "patches"), "published": published}
    times = interleave({**calls, "one on pixels": stepper(lrs[:1], 1, "pixels")}, options.rounds)
    seconds = median(times["stack"])
    return [
        f"linear        a step of {options.images} images, 45 heads: {seconds:.2f} s, "
        f"{ratio(times, 'stack', 'one'):.1f} x one head of ours, "
        f"{ratio(times, 'stack', 'published'):.1f} x one published head; one head on pixels: "
        f"{ratio(times, 'published', 'one on pixels'):.1f} x the published speed"
    ]


def main() -> None:
    """Print a line per part."""
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(torch.get_num_threads())
    torch.manual_seed(0)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {options.rounds} rounds")
    for part in options.part:
        for line in {"matching": matching, "retrieval": retrieval, "overcluster": overcluster, "linear": linear}[part](options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
