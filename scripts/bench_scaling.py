"""Cost against size: extraction and fitting at 1×, 4× and 16× the images, and at 1×, 2× and 4× the layers.

    python scripts/bench_scaling.py [--images 250] [--model demo_vit]

Every row is a process of its own, so that peak memory is that row's; seconds are those of the step itself without start-up,
and the last columns are ratios to the first row of the same run (machines differ, ratios less so). Linear cost shows
as time ratios equal to size ratios, flat memory as a memory ratio of 1.

Memory is the process's own (anonymous) memory, sampled every 10 ms. "Mapped" is the most that pages of files came to: the
shards of the cache are memory-mapped, so the system lends their pages while there is room and takes them back when there
is none; `store.shards.MAP_BYTES` bounds them.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The measured process: run one mode with the given overrides, print seconds of the entry function and peak memories.
CHILD = """
import importlib, json, re, sys, threading, time
from hydra import compose, initialize_config_dir
sys.path.insert(0, sys.argv[1])
from runs.run import open_run
peak, done = [0, 0], threading.Event()
def sample():
    while not done.wait(0.01):
        found = re.findall(r"Rss(?:Anon|File):\\s+(\\d+)", open("/proc/self/status").read())
        peak[:] = [max(a, int(b) / 1024) for a, b in zip(peak, found)]
with initialize_config_dir(sys.argv[1] + "/cfgs", version_base="1.3"):
    cfg = compose("config", sys.argv[2:])
with open_run(cfg) as run:
    module, _, function = cfg.entry.rpartition(".")
    entry = getattr(importlib.import_module(module), function)
    threading.Thread(target=sample, daemon=True).start()
    start = time.perf_counter()
    entry(cfg, run)
    seconds = time.perf_counter() - start
done.set()
print(json.dumps([seconds, *peak]))
"""


def measure(folder: str, *overrides: str) -> tuple[float, float, float]:
    """Seconds, peak MiB of own memory and of mapped files of one mode in a fresh process (Linux)."""
    fixed = [f"cache.dir={folder}/cache", f"output_dir={folder}/outputs", "wandb.mode=disabled", "controls=none"]
    command = [sys.executable, "-c", CHILD, str(ROOT), *fixed, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, own, mapped = json.loads(done.stdout.splitlines()[-1])
    return seconds, own, mapped


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250, help="training images of the first row")
    parser.add_argument("--model", default="demo_vit")
    arguments = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} CPUs, {time.strftime('%Y-%m-%d')}, {arguments.model}")
    # Nothing is held in memory that could be read from disk, one epoch, and the same few images for validation and test.
    common = [f"model={arguments.model}", "cache.ram_gb=0", "trainer.epochs=1", "trainer.seeds=1", "trainer.n_boot=100",
              "dataset.n_val=50", "dataset.n_test=50"]  # fmt: skip
    rows = [(f"{factor}× images", [f"dataset.n_train={arguments.images * factor}"]) for factor in (1, 4, 16)]
    rows += [(f"{n} layers", [f"dataset.n_train={arguments.images * 4}", f"model.layers=[{','.join(map(str, range(n)))}]"])
             for n in (2, 4, 8)]  # fmt: skip
    head = "".join(f"{step + ' s':>11}{'own MiB':>10}{'mapped MiB':>12}" for step in ("extract", "fit"))
    print(f"{'':12}{head}   ratios: seconds and own memory of both")
    first: list[float] = []
    for name, overrides in rows:
        with tempfile.TemporaryDirectory() as folder:
            found = [measure(folder, f"mode={mode}", *common, *overrides) for mode in ("extract", "train")]
        kept = [value for seconds, own, _ in found for value in (seconds, own)]
        if name.startswith(("1×", "2 layers")):
            first = kept
            print()
        cells = "".join(f"{seconds:11.1f}{own:10.0f}{mapped:12.0f}" for seconds, own, mapped in found)
        ratios = "  ".join(f"{value / base:5.2f}" for value, base in zip(kept, first, strict=True))
        print(f"{name:12}{cells}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
