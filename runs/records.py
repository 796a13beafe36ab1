"""Records: one JSON line each, appended and flushed; a line torn by a kill is left out when they are read."""

import contextlib
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from files import write_atomically

_RECORD_KEY = ("kind", "name", "split", "layer", "seed", "question", "readout", "block", "epoch", "fingerprint")


def record_key(record: Mapping[str, Any]) -> str:
    """What tells a record from all others of its file."""
    return json.dumps([record.get(key) for key in _RECORD_KEY])


def jsonable(value: Any) -> Any:
    """A value as JSON takes it: numbers of numpy and torch as Python's, what is not finite as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line torn by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def drop_torn_line(path: Path) -> None:
    """Cut a half-written last line, so that the next record starts on a line of its own."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        write_atomically(path, data[: data.rfind(b"\n") + 1])


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows (equal keys) as CSV."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
