"""What comes out of pretraining: the weight file, its description, and its evaluation by the project's own run."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import timm
import torch
from pretraining_model import MEAN, STD, Recipe
from safetensors.torch import save_file

from datasets.procedural import Scenes
from errors import UserError
from machine import cpu_name
from runs.run import newest_run

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 8_000_000  # of the published file


def publish(recipe: Recipe, trained: dict, path: Path) -> dict:
    """Write the backbone as float16 safetensors and its description as JSON beside it. Returns the description."""
    weights = {name: value.detach().half().cpu().contiguous() for name, value in trained["model"].backbone.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    save_file(weights, aside)
    size = aside.stat().st_size
    if size > MOST_BYTES:
        aside.unlink()
        raise UserError(f"the backbone takes {size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}: lower --dim or --depth")
    scenes = Scenes("pretrain", size=recipe.image_size, seed=recipe.seed).fingerprint()
    about = {
        "name": "demo_vit",
        "digest": digest(aside),
        "bytes": size,
        "architecture": recipe.architecture,
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "script": "scripts/pretrain_demo_vit.py",
        "recipe": dataclasses.asdict(recipe),
        "scenes": scenes,
        "steps": trained["step"],
        "images_seen": trained["step"] * recipe.batch_size,
        "scenes_rendered": recipe.pool + trained["step"] * recipe.fresh,
        "seconds": round(trained["seconds"], 1),
        "losses": {name: round(value, 5) for name, value in trained["losses"].items()},
        "sittings": trained["sittings"],
        "evaluation": None,
    }
    os.replace(aside, path)
    write_json(path.with_suffix(".json"), about)
    return about


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, value: dict) -> None:
    """Written aside, then renamed."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


def describe_machine(world: int, device: torch.device) -> dict:
    """What the run ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": f"{device.type}: {name}",
        "processes": world,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


BLOCKS = {"all": "all pairs", "foreground": "foreground pairs", "same_class_matched": "same class, matched distance"}


def evaluate(path: Path, output_dir: Path) -> dict:
    """Score a published file with the project's own run (`main.py mode=train`) and add the outcome to its JSON.

    Returns:
        {title of a block of pairs: {"layers": AUROC per layer, "probe": best layer, each control: its best layer}} with
        AUROC and its 95 % interval over images, means over the probe seeds.

    Raises:
        UserError: there is no such file, or the run failed.
    """
    description = path.with_suffix(".json")
    if not path.exists() or not description.exists():
        raise UserError(f"{path} and {description.name} are not both there: run this script without --evaluate first")
    about = json.loads(description.read_text())
    if digest(path) != about["digest"]:
        raise UserError(f"{path} is not the file that {description.name} describes: run this script again")
    weights = [f"model.weights={path.resolve()}", f"model.digest={about['digest']}", "model.pretrained=true"]
    command = [sys.executable, str(ROOT / "main.py"), "mode=train", "model=demo_vit", *weights]
    if subprocess.run([*command, f"output_dir={output_dir.resolve()}"], cwd=ROOT, check=False).returncode:
        raise UserError("the evaluation failed, see above: " + " ".join(command))
    directory = newest_run(output_dir)
    with open(directory / "layers.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["kind"], row["metric"]) == ("score", "auroc")]
    outcome: dict = {}
    for block, title in BLOCKS.items():
        scores: dict[str, list[dict]] = {}
        best: dict[str, dict] = {}  # at the layer chosen on validation, or the only one
        for row in rows:
            if row["subset"] == block and row["value"]:
                score = {"layer": row["layer"]} | {key: round(float(row[key]), 4) for key in ("value", "low", "high")}
                scores.setdefault(row["name"], []).append(score)
                if row["chosen"] == "1" or row["name"] not in best:
                    best[row["name"]] = score
        outcome[title] = {"layers": {score["layer"]: score["value"] for score in scores.get("probe", [])}, **best}
    run = json.loads((directory / "run.json").read_text())
    about["evaluation"] = {"command": "python main.py mode=train model=demo_vit", "commit": run["commit"], "auroc": outcome}
    write_json(description, about)
    return outcome
