"""Speed of extraction: images per second and the share of the machine's matmul rate, all layers selected and written.

    python scripts/bench_extract.py                        # ViT-B/16, 224 px, float32
    python scripts/bench_extract.py --dtype bfloat16
    python scripts/bench_extract.py --model dinov2_large --image-size 518 --dtype bfloat16 --device cuda

The whole pass of mode=extract is timed: cutting and normalising, forward, picking patches, checksums, writing, renaming.
Left out are what is paid once (labels, building the backbone) and decoding (the images are noise held in memory; a real
data set decodes in `cache.workers` processes). Weights are random: speed does not depend on them. The matmul rate is that
of a square product of the same dtype through torch, the mean of a measurement before and one after each pass, because
machines are shared and clocks vary: only ratios within one round mean anything. Operations are counted from the sizes, a
multiplication and an addition being two: every linear layer, the patch embedding, and the two products of attention.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from activation import open_sample  # noqa: E402
from backbones.contract import Backbone  # noqa: E402
from backbones.load import load_backbone, resolve_layers  # noqa: E402
from datasets.scene import Scene, allow  # noqa: E402
from machine import choose_device, resolve_dtype  # noqa: E402


class Noise:
    """Images of noise [3, H, W] with a 4 x 4 chessboard of objects, all in memory."""

    classes = ("background", "thing")
    on_error = "raise"

    def __init__(self, split: str, *, n: int, size: list[int]) -> None:
        self.n, self.size = n, list(size)
        rows, columns = (torch.arange(side) * 4 // side for side in size)
        self.labels = {"identity": (rows[:, None] * 4 + columns).int(), "class": torch.ones(*size, dtype=torch.int32)}
        self.images = torch.randint(0, 256, (min(n, 16), 3, *size), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Scene:
        return Scene(self.images[i % len(self.images)], self.labels, str(i))

    def fingerprint(self) -> dict:
        """Nothing is kept between two processes, so the sizes are enough."""
        return {"n": self.n, "size": self.size}

    def info(self) -> dict[str, float]:
        """No constants."""
        return {}

    def report(self) -> dict:
        """Nothing to tell."""
        return {}


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mae_base", help="a file of cfgs/model (default: mae_base, ViT-B/16)")
    parser.add_argument("--image-size", type=int, nargs="+", help="pixels, one number or height and width")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16 or auto")
    parser.add_argument("--layers", default="all", help="all (default), or a list such as [0,5,11]")
    parser.add_argument("--images", type=int, help="images of a round (default: about --seconds of work)")
    parser.add_argument("--seconds", type=float, default=10, help="length of a round if --images is not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="images of a forward pass")
    parser.add_argument("--patches", type=int, default=64, help="patches kept of an image")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--attention", default="sdpa", help="sdpa or xformers")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(arguments)


def configure(options: argparse.Namespace, n_images: int, folder: str) -> DictConfig:
    """The configuration of mode=extract on noise, with an empty cache."""
    size = (options.image_size or [224]) * 2
    overrides = [
        "mode=extract",
        f"model={options.model}",
        "model.pretrained=false",
        f"model.image_size=[{size[0]},{size[1]}]",
        f"model.dtype={options.dtype}",
        f"model.layers={options.layers}",
        f"model.attention={options.attention}",
        f"model.compile={options.compile}",
        f"device={options.device}",
        f"protocol.selection.patches={options.patches}",
        f"cache.dir={folder}",
        f"cache.batch_windows={options.batch}",
        f"cache.shard_images={2 * options.batch}",
    ]
    with initialize_config_dir(str(ROOT / "cfgs"), version_base="1.3"):
        cfg = compose("config", overrides)
    allow(__name__)
    noise = {"_target_": f"{__name__}.Noise", "n": n_images, "size": size[:2]}
    return DictConfig({**{key: cfg[key] for key in cfg if key != "dataset"}, "dataset": noise})


def count_flops(backbone: Backbone, grid: tuple[int, int]) -> float:
    """Operations of one image through all blocks."""
    facts, n_patches = backbone.facts, grid[0] * grid[1]
    n_tokens = n_patches + facts.num_prefix_tokens
    linear = [module for block in backbone.model.blocks for module in block.modules() if isinstance(module, nn.Linear)]
    total = sum(2 * n_tokens * layer.in_features * layer.out_features for layer in linear)
    total += facts.depth * 4 * n_tokens**2 * facts.dim
    return total + 2 * n_patches * 3 * facts.patch_size**2 * facts.dim


def clock(call: Callable[[], object], device: torch.device) -> float:
    """Seconds one call takes, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_rate(square: Tensor, repeat: int) -> float:
    """Operations per second of repeated products of a square matrix."""

    def products() -> None:
        for _ in range(repeat):
            square @ square

    return repeat * 2 * len(square) ** 3 / clock(products, square.device)


def cpu_name() -> str:
    """The processor as the system names it, with the matrix units torch sees."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    units = [u for u in ("amx_tile", "avx512_bf16", "avx512") if getattr(torch.cpu, f"_is_{u}_supported", bool)()]
    return f"{name} ({', '.join(units) or 'no matrix units'})"


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = read_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    cfg = configure(options, 1, "")
    device = choose_device(cfg.device)
    backbone = load_backbone(cfg.model, device)
    facts, dtype = backbone.facts, resolve_dtype(options.dtype, device)
    layers = resolve_layers(cfg.model.layers, facts.depth)
    grid = tuple(side // facts.patch_size for side in facts.image_size)
    flops = count_flops(backbone, grid)
    side = 8192 if device.type == "cuda" else 2048
    square = torch.randn(side, side, device=device).to(dtype)
    images = torch.randn(options.batch, 3, *facts.image_size, device=device)

    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    busy = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{machine}, {torch.get_num_threads()} of {os.cpu_count()} CPUs{busy}, torch {torch.__version__}")
    print(
        f"{facts.name}, {facts.image_size[0]} x {facts.image_size[1]} px, {str(dtype).removeprefix('torch.')}: "
        f"{flops / 1e9:.1f} GFLOP an image, {len(layers)} layers written, {options.patches} patches of "
        f"{grid[0] * grid[1]} kept, batches of {options.batch}"
    )

    backbone(images, layers)
    forward = clock(lambda: backbone(images, layers), device)
    repeat = max(1, round(0.5 / (2 * len(square) ** 3 / matmul_rate(square, 3))))
    batches = max(2, round(options.seconds * options.batch / forward / options.batch))
    n_images = options.images or batches * options.batch
    rows = []
    print(f"{'round':>5}{'images':>8}{'images/s':>10}{'MB/s':>8}{'matmul TFLOP/s':>16}{'of it: all':>12}{'forward alone':>15}")
    for number in range(options.rounds):
        once = mock.patch("store.extract.load_backbone", lambda *_: backbone)  # it is built once, above
        with tempfile.TemporaryDirectory() as folder, once:
            cfg = configure(options, n_images, folder)
            before = matmul_rate(square, repeat)
            forward = clock(lambda: backbone(images, layers), device)
            between = matmul_rate(square, repeat)
            meta = open_sample(cfg, "train", say=lambda text: None).meta
            after = matmul_rate(square, repeat)
        speed = meta["images_per_second"]
        share, alone = 2 * flops * speed / (between + after), 2 * flops * options.batch / forward / (before + between)
        rows.append((speed, share, alone))
        print(
            f"{number:>5}{n_images:>8}{speed:>10.1f}{meta['bytes_written'] / meta['seconds'] / 1e6:>8.1f}"
            f"{(between + after) / 2e12:>16.3f}{share:>12.2f}{alone:>15.2f}"
        )
    speed, share, alone = (median(column) for column in zip(*rows, strict=True))
    print(f"median: {speed:.1f} images/s, {share:.2f} of the matmul rate (forward alone {alone:.2f})")


if __name__ == "__main__":
    main()
