"""Mutations of the metadata of data sets for `campaign.py`, on the small trees that the tests write in every format."""

import copy
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from dataset_trees import CONFIGS, TREES
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from datasets.scene import build
from errors import UserError

STRANGE = [None, True, -1, 0, 3, 1.5, 1e400, 10**400, "", "x", "a\0b", "\ud800", "../../x", "/etc/passwd", [], [[]], [None],
           {}, {"a": {}}, "x" * 300, -(2**70)]  # fmt: skip
HOWS = ("value", "value", "value", "gone", "twice", "half")
PLACES = {  # data set: its JSON files below the root
    "exported": "dataset_train*/*.json*",
    "vgcolor": "**/*.json",
    "vgtopattr": "**/*.json",
    "coco_things": "annotations/*train2017.json",
    "occlusionclevr": "train_*/spec.jsonl",
    "clevr": "**/*.json",
}
_sound: dict[tuple[Path, str], list] = {}


def items(cfg: Any) -> list:
    """All that a program reads of a data set."""
    data = build(cfg, "train")
    facts = json.dumps([data.fingerprint(), data.report(), data.info()])
    return [facts, *(data[i] for i in range(len(data)))]


def mutation(folder: Path, draw: random.Random, number: int) -> tuple[str, str, str]:
    """Change one value, read the data set, put the value back: the column of the answer, what was done, what was said."""
    name = list(PLACES)[number % len(PLACES)]
    root = folder / name
    if (folder, name) not in _sound:
        options = TREES[name](root)
        cfg = OmegaConf.merge(_config(name), options)
        _sound[folder, name] = [cfg, items(cfg)]
    cfg, sound = _sound[folder, name]
    file = draw.choice(sorted(path for path in Path(cfg.root).glob(PLACES[name])))
    before, time = file.read_bytes(), file.stat()
    lines = file.suffix == ".jsonl"
    content = [json.loads(line) for line in before.splitlines()] if lines else json.loads(before)
    place, how, value = draw.choice(list(_walk(content))[lines:]), draw.choice(HOWS), draw.choice(STRANGE)
    content = _mutated(content, place, value, how)
    about = f"{name}: {file.name} {list(place)} {how} {repr(value)[:40] if how == 'value' else ''}"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in content) if lines else json.dumps(content))
    try:
        found = items(cfg)
        return "same numbers" if _equal(found[1:], sound[1:]) else "accepted", about, ""
    except UserError as error:
        text = str(error)
        named = str(file) in text or file.name in text or any(part in text for part in ("dataset.", str(cfg.root)))
        plain = "\n" not in text and "\0" not in text and len(text) < 1000 and text.isprintable()
        return "sentence" if named and plain else "vague" if plain else "defect", about, text
    except Exception as error:
        return "defect", about, f"{type(error).__name__}: {error}"[:500]
    finally:
        file.write_bytes(before)
        os.utime(file, ns=(time.st_atime_ns, time.st_mtime_ns))


def _config(name: str) -> Any:
    with initialize_config_dir(str(CONFIGS.parent), version_base="1.3"):
        return compose("config", [f"dataset={name}"]).dataset


def _walk(value: Any, path: tuple = ()) -> list[tuple]:
    """Places of all values of a JSON content, the content itself first."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for step, inner in pairs for place in _walk(inner, (*path, step)))]


def _mutated(content: Any, place: tuple, value: Any, how: str) -> Any:
    """A copy in which the value at a place is another, or is gone, or a list there is half or twice as long."""
    if not place:
        return value
    content = parent = copy.deepcopy(content)
    for step in place[:-1]:
        parent = parent[step]
    target = parent[place[-1]]
    if how == "gone":
        del parent[place[-1]]
    elif how in ("twice", "half") and isinstance(target, list):
        parent[place[-1]] = target * 2 if how == "twice" else target[: len(target) // 2]
    else:
        parent[place[-1]] = value
    return content


def _equal(a: Any, b: Any) -> bool:
    """Whether two lists of scenes are the same to the last bit."""
    if len(a) != len(b):
        return False
    for one, other in zip(a, b, strict=True):
        if one.key != other.key or one.labels.keys() != other.labels.keys() or not torch.equal(one.image, other.image):
            return False
        if not all(torch.equal(value, other.labels[name]) for name, value in one.labels.items()):
            return False
    return True
