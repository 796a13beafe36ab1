"""A small tree in the real format of every data set of cfgs/dataset, and the options that make the program read it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ade20k_tree import write_ade20k_tree
from omegaconf import OmegaConf
from PIL import Image

from datasets.export import export
from datasets.occlusion_clevr import OcclusionClevr
from datasets.scene import build

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "cfgs" / "dataset"
GOLDEN = ROOT / "tests" / "golden" / "binding"
SPLITS = ("train", "val", "test")
COUNTS = {"n_train": 4, "n_val": 3, "n_test": 3}


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    """Write an array as a picture: [H, W, 3] colour, [H, W] uint8 grey or (mode P) palette, [H, W] uint16 16-bit grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture = Image.new("P", pixels.shape[::-1])
        picture.putdata(pixels.ravel().tolist())
        picture.putpalette([(37 * i + c * 11) % 256 for i in range(256) for c in range(3)])
    picture.save(path)
    return path


def colour(seed: int, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def stripes(values: list[int], size: tuple[int, int] = (12, 16), dtype: type = np.uint8) -> np.ndarray:
    """A map of equal vertical stripes of the given values."""
    return np.repeat(np.array(values, dtype), size[1] // len(values))[None].repeat(size[0], 0)


def scenes(folder: Path) -> dict:
    return {"size": 32, **COUNTS}


def colorshape(folder: Path) -> dict:
    return {"image_size": 64, "obj_size": 8, **COUNTS}


def exported(folder: Path) -> dict:
    for split in SPLITS:
        cfg = OmegaConf.merge(OmegaConf.load(CONFIGS / "colorshape.yaml"), colorshape(folder))
        export(build(cfg, split), folder)
    return {"root": str(folder / "colorshape")}


def ade20k(folder: Path) -> dict:
    write_ade20k_tree(folder, 3, 2, 2)
    return {"root": str(folder)}


def identities(folder: Path) -> dict:
    for split in SPLITS:
        for k in range(2):
            save(folder / "images" / split / f"{k}.png", colour(k))
            save(folder / "identity" / split / f"{k}.png", stripes([0, 1, 2, 3]))
    return {"root": str(folder)}


def clevr(folder: Path) -> dict:
    case = json.loads((GOLDEN / "clevr.json").read_text())["fixture"]
    for number, objects in case["scenes"].items():
        stem = f"CLEVR_6obj_{int(number):06d}"
        path = folder / "clevr" / "scenes_6obj" / f"{stem}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"objects": objects}))
        save(folder / "clevr" / "images_6obj" / f"{stem}.png", colour(int(number)))
    return {"root": str(folder / "clevr"), "num_total": 8, "n_train": 4, "n_val": 2, "n_test": 2}


def occlusionclevr(folder: Path) -> dict:
    options = {"root": str(folder), "image_size": 16, "render_size": 16, "use_cache_only": True, **COUNTS}
    for split in SPLITS:
        data = OcclusionClevr.__new__(OcclusionClevr)
        try:
            data.__init__(split, **options)
        except Exception:  # no list yet: this is how far a cache goes without Blender
            data.directory.mkdir(parents=True)
            lines = data._sample()
            (data.directory / "spec.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            for line in lines:
                save(data.directory / "images" / line["image_filename"], colour(line["image_index"], (16, 16)))
    return options


def visual_genome(folder: Path, kind: str) -> dict:
    fixture = json.loads((GOLDEN / "vg.json").read_text())["dataset_fixture"]
    text = json.dumps([fixture["stats_file"], fixture["metadata_file"]])
    if kind == "topattr":
        text = text.replace("attributes_color", "attributes_topattr").replace("selected_color", "selected_topattr")
        text = text.replace("object_to_color", "object_to_topk")
    stats, records = json.loads(text)
    place = folder / "deprecated" / f"meta_filtered_{kind}_coco"
    place.mkdir(parents=True)
    (place / f"vg_stats_filtered_{kind}.json").write_text(json.dumps(stats))
    (place / f"attributes_filtered_{kind}.json").write_text(json.dumps(records))
    for record in records:
        save(folder / "VG_100K_2" / f"{record['image_id']}.jpg", colour(record["image_id"]))
    return {"root": str(folder), "n_train": 8, "n_val": 2, "n_test": 4}


TREES: dict[str, Callable[[Path], dict]] = {
    "scenes": scenes,
    "folder": identities,
    "ade20k": ade20k,
    "colorshape": colorshape,
    "balancedcolorshape": lambda folder: COUNTS,
    "balancedcolorshape_small": lambda folder: COUNTS,
    "clevr": clevr,
    "occlusionclevr": occlusionclevr,
    "vgcolor": lambda folder: visual_genome(folder, "color"),
    "vgtopattr": lambda folder: visual_genome(folder, "topattr"),
    "exported": exported,
}
