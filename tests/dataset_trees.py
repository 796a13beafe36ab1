"""A small tree in the real format of every data set of cfgs/dataset, and the options that make the program read it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ade20k_tree import write_ade20k_tree
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as coco_mask

from datasets.coco_masks import read_categories
from datasets.export import export
from datasets.in_memory import collect, hand_over
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


OBJECTS = [0, 1, 2, 255, 3, 0, 4, 5]
VOC_LISTS = {"train": [f"2007_{i:06d}" for i in range(8)], "val": ["2008_000001", "2008_000003"]}


def voc(folder: Path, layout: str = "official") -> dict:
    """VOC 2012 as given, or as NeCo rearranges it: palette PNGs, void border 255, one image of background alone."""
    place = folder / ("VOCdevkit/VOC2012" if layout == "official" else "VOCSegmentation")
    images, lists = ("JPEGImages", "ImageSets/Segmentation") if layout == "official" else ("images", "sets")
    masks = {"train": "SegmentationClass" if layout == "official" else "SegmentationClassAug", "val": "SegmentationClass"}
    for part, names in VOC_LISTS.items():
        (place / lists).mkdir(parents=True, exist_ok=True)
        (place / lists / f"{part}.txt").write_text("\n".join(reversed(names)) + "\n")
        for k, name in enumerate(names):
            save(place / images / f"{name}.jpg", colour(k))
            plain = k == 1
            save(place / masks[part] / f"{name}.png", stripes([0, 0] if plain else [0, 15, 15, 255, 20, 0, 12, 3]), "P")
            if layout == "official":
                save(place / "SegmentationObject" / f"{name}.png", stripes([0, 0] if plain else OBJECTS), "P")
    return {"root": str(folder), "val_fraction": 0.4}


def ade20k_challenge(folder: Path) -> dict:
    for part, stem, n in (("training", "train", 12), ("validation", "val", 2)):
        for k in range(1, n + 1):
            name = f"ADE_{stem}_{k:08d}"
            save(folder / "ADEChallengeData2016" / "images" / part / f"{name}.jpg", colour(k))
            save(folder / "ADEChallengeData2016" / "annotations" / part / f"{name}.png", stripes([0, 1, 150, k]))
    return {"root": str(folder), "val_fraction": 0.4}


def cityscapes(folder: Path) -> dict:
    """Road, two cars, a group of persons, own car, a caravan (not evaluated), sky, licence plate."""
    label, instance = [7, 26, 26, 24, 1, 29, 23, 255], [7, 26001, 26000, 24, 1, 29000, 23, 255]
    for part, cities, n in (("train", ("aachen", "bochum"), 6), ("val", ("lindau",), 2)):
        for city in cities:
            for k in range(n):
                name = f"{city}/{city}_{k:06d}_000019"
                save(folder / "leftImg8bit" / part / f"{name}_leftImg8bit.png", colour(k))
                save(folder / "gtFine" / part / f"{name}_gtFine_labelIds.png", stripes(label))
                save(folder / "gtFine" / part / f"{name}_gtFine_instanceIds.png", stripes(instance, dtype=np.uint16))
    return {"root": str(folder), "val_fraction": 0.4}


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask down its columns, zeros first."""
    flat, runs, value = mask.ravel(order="F"), [0], 0
    for pixel in flat.tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


COCO_SIZE = (12, 16)


def coco_annotations(image: int) -> list[dict]:
    """A large dog (polygon) under a small cat (two polygons), a crowd of persons (list of runs), a kite (compressed runs)."""
    crowd, kite = np.zeros((2, *COCO_SIZE), np.uint8)
    crowd[0:3], kite[9:11, 12:15] = 1, 1
    packed = coco_mask.encode(np.asfortranarray(kite))
    base = 10 * image
    return [
        {"id": base + 4, "category_id": 18, "iscrowd": 0, "segmentation": [[0, 2, 8, 2, 8, 10, 0, 10]]},
        {"id": base + 2, "category_id": 17, "iscrowd": 0, "segmentation": [[2, 4, 4, 4, 4, 6, 2, 6], [5, 4, 7, 4, 7, 6, 5, 6]]},
        {"id": base + 3, "category_id": 1, "iscrowd": 1, "segmentation": {"size": list(COCO_SIZE), "counts": runs_of(crowd)}},
        {"id": base + 1, "category_id": 38, "iscrowd": 0,
         "segmentation": {"size": list(COCO_SIZE), "counts": packed["counts"].decode()}},
    ]  # fmt: skip


def coco(folder: Path) -> dict:
    """Both parts: instances, stuff pixel maps, things as pixel maps; the last image of a part has no objects."""
    categories = [c._asdict() for c in read_categories() if c.kind == "thing"]
    for part, n in (("train", 12), ("val", 2)):
        images, annotations = [], []
        for k in range(1, n + 1):
            name = f"{k:012d}"
            images.append({"id": k, "file_name": f"{name}.jpg", "height": COCO_SIZE[0], "width": COCO_SIZE[1]})
            annotations += [{**entry, "image_id": k} for entry in coco_annotations(k)] if k < n else []
            save(folder / "images" / f"{part}2017" / f"{name}.jpg", colour(k, COCO_SIZE))
            stuff = stripes([0, 92, 183, 182])
            save(folder / "annotations" / "stuff_annotations" / f"stuff_{part}2017_pixelmaps" / f"{name}.png", stuff)
            save(folder / "annotations" / f"{part}2017" / f"{name}.png", stripes([0, 1, 90, 100, 200, 255, 62, 3]))
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{part}2017.json").write_text(json.dumps(content))
    return {"root": str(folder), "val_fraction": 0.4}


def handed(folder: Path) -> dict[str, Any]:
    """Images handed over from Python."""
    images = [np.full((8, 8, 3), shade, np.uint8) for shade in range(8)]
    return {"handle": hand_over(collect(images, [np.eye(8, dtype=np.int64)] * 8))}


TREES: dict[str, Callable[[Path], dict]] = {
    "scenes": scenes,
    "in_memory": handed,
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
    "voc12": voc,
    "ade20k_challenge": ade20k_challenge,
    "cityscapes": cityscapes,
    "coco_things": coco,
    "coco_stuff": coco,
    "coco_all": coco,
}
