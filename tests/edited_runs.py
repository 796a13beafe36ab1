"""Runs whose files were edited, in ways that leave them readable or not: for tests of what is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from runs.records import line_of, read_records


def change_config(directory: Path, key: str, value: Any) -> None:
    """A run that was really made with another setting."""
    cfg = yaml.safe_load((directory / "config.yaml").read_text())
    *sections, name = key.split(".")
    inner = cfg
    for section in sections:
        inner = inner[section]
    assert inner.get(name) != value
    inner[name] = value
    text = yaml.safe_dump(cfg)
    (directory / "config.yaml").write_text(text)
    change_facts(directory, config_sha256=hashlib.sha256(text.encode()).hexdigest())


def change_facts(directory: Path, **facts: Any) -> None:
    path = directory / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def change_records(directory: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    """Records that are whole, each by itself."""
    path = directory / "metrics.jsonl"
    path.write_text("".join(line_of(record) + "\n" for record in change(read_records(path))))


def flip(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(bytes(data))


def facts_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
