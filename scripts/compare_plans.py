"""Compare what `mode=plan` says with what then comes out, on twenty small configurations.

    python scripts/compare_plans.py                     # all twenty: minutes
    python scripts/compare_plans.py --only 0 3 --out /tmp/plans

Each configuration is planned and run in a fresh cache. Bytes are those of the token files on disk, seconds those of run.json,
half-widths those of the records, at every layer; printed are the table of docs/results.md and how many hit: bytes exactly,
seconds within 25 %, half-widths within 20 % (the median over layers of each score).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vit_probing as vp
from runs.finished import read_facts

RANDOM = ["model.pretrained=false", "model.weights=null", "model.digest=null"]
SMALL = [*RANDOM, "model.kwargs={img_size: 96, patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}"]
# Other scenes than those that the model of growth in pairs/pilot.py was chosen on (dataset.seed=0 and 1).
SPLITS = ["dataset.n_train=120", "dataset.n_val=24", "dataset.n_test=120", "dataset.seed=2"]
BASE = [*SPLITS, "trainer.seeds=1", "trainer.epochs=4", "trainer.n_boot=400", "wandb.mode=disabled", "controls=[position]",
        "plan.images=48"]  # fmt: skip
# One thing is varied at a time: layers, patches, images, the probe, controls, the data, the model, the protocol.
CASES: dict[str, list[str]] = {
    "demo_vit, last layer": ["model.layers=7"],
    "demo_vit, two layers": ["model.layers=[embed,7]"],
    "demo_vit, middle": ["model.layers=4"],
    "16 patches": ["model.layers=7", "protocol.selection.patches=16"],
    "32 patches": ["model.layers=7", "protocol.selection.patches=32"],
    "96 patches": ["model.layers=7", "protocol.selection.patches=96"],
    "60 test images": ["model.layers=7", "dataset.n_test=60"],
    "240 test images": ["model.layers=7", "dataset.n_test=240"],
    "300 training images": ["model.layers=7", "dataset.n_train=300"],
    "linear": ["model.layers=7", "probe.mode=linear"],
    "diagonal": ["model.layers=7", "probe.mode=diag_quadratic"],
    "low rank": ["model.layers=7", "probe.mode=quadratic_fixed_rank", "probe.rank=8"],
    "cosine": ["model.layers=7", "probe.mode=cosine"],
    "all of pixels and random": ["model.layers=7", "controls=[pixels,random]"],
    "three seeds": ["model.layers=7", "trainer.seeds=3"],
    "noisy data": ["model.layers=7", "dataset.noise=0.5"],
    "few objects": ["model.layers=7", "dataset.objects=[2,3]"],
    "random weights": [*SMALL, "model.layers=2"],
    "float32 cache": ["model.layers=7", "cache.dtype=float32"],
    "only foreground": ["model.layers=7", "protocol.selection.background_share=0.0"],
}


def compare(name: str, overrides: list[str], folder: Path) -> dict:
    """One configuration, planned and run."""
    places = [f"cache.dir='{folder}/cache'", f"output_dir='{folder}/outputs'"]
    shutil.rmtree(folder, ignore_errors=True)
    plan = next(r for r in vp.run("mode=plan", *BASE, *overrides, *places).records if r["kind"] == "plan")
    done = vp.run("mode=train", *[o for o in BASE if not o.startswith("plan.")], *overrides, *places)
    n_bytes = sum(file.stat().st_size for file in (folder / "cache" / "tokens").rglob("layer_*/*.safetensors"))
    found: dict[str, list[float]] = {}
    for row in done.rows:
        if row["name"] == "probe" and row["metric"] == "auroc" and row["value"] is not None and row["low"] is not None:
            found.setdefault(row["subset"], []).append((row["high"] - row["low"]) / 2)
    titles = {"all": "all pairs AUROC", "foreground": "foreground AUROC", "same_class_matched": "same class, matched AUROC"}
    widths = {s: (plan["half_width"][t], statistics.median(found[s])) for s, t in titles.items() if t in plan["half_width"]}
    seconds = read_facts(done.dir)["seconds"]
    print(f"{name}: planned {plan['total_seconds']:.0f} s, took {seconds:.0f} s", flush=True)
    return {
        "name": name,
        "bytes": (plan["total_bytes"], n_bytes),
        "seconds": (plan["total_seconds"], seconds),
        "widths": widths,
    }


def main() -> None:
    """Compare, print the table and the rates."""
    parser = argparse.ArgumentParser(description="Compare plans with what came out.", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("outputs/compare_plans"), help="folder of caches and runs")
    parser.add_argument("--only", type=int, nargs="*", default=None, help="numbers of the configurations, from 0")
    options = parser.parse_args()
    chosen = [(i, case) for i, case in enumerate(CASES.items()) if options.only is None or i in options.only]
    found = [compare(name, overrides, options.out / str(i)) for i, (name, overrides) in chosen]
    print(
        "\n| configuration | bytes | seconds, planned | it took | half-widths, planned | they were |\n|---|---|---|---|---|---|"
    )
    for one in found:
        exact = f"{one['bytes'][1]}" + ("" if one["bytes"][0] == one["bytes"][1] else f", planned {one['bytes'][0]}")
        planned, came = (" ".join(f"{pair[i]:.4f}" for pair in one["widths"].values()) for i in (0, 1))
        print(f"| {one['name']} | {exact} | {one['seconds'][0]:.0f} | {one['seconds'][1]:.0f} | {planned} | {came} |")
    pairs = [pair for one in found for pair in one["widths"].values()]
    near = [abs(planned / came - 1) <= 0.2 for planned, came in pairs]
    in_time = [abs(one["seconds"][0] / one["seconds"][1] - 1) <= 0.25 for one in found]
    print(
        f"\nbytes exact {sum(one['bytes'][0] == one['bytes'][1] for one in found)} of {len(found)}, seconds within 25 % "
        f"{sum(in_time)} of {len(found)}, half-widths within 20 % {sum(near)} of {len(near)}"
    )


if __name__ == "__main__":
    main()
