"""Records: one JSON object per line, appended and flushed, each with a digest of its own.

A line ends in `"check": "<16 hexadecimal digits>"}`, the digest of what precedes it. Lines of the version before this one
have none and are taken as they are.
"""

import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from files import unreadable, write_atomically, write_if_changed

_RECORD_KEY = (
    "kind", "name", "part", "variant", "split", "layer", "seed", "question", "readout", "subset", "metric", "epoch",
    "fingerprint",
)  # fmt: skip
_CHECKED = re.compile(r'^(\{.*), "check": "([0-9a-f]{16})"\}$', re.DOTALL)


class Lines(NamedTuple):
    """What a file of records holds: whole lines as bytes, the records in them, and what is wrong with the others.

    torn: the file ends in a line that a kill cut off (whole or not, it has no newline).
    """

    whole: list[bytes]
    records: list[dict[str, Any]]
    damaged: list[str]
    torn: bool


def record_key(record: Mapping[str, Any]) -> str:
    """What tells a record from all others of its file."""
    return json.dumps([record.get(key) for key in _RECORD_KEY])


def jsonable(value: Any) -> Any:
    """A value as JSON takes it: numbers of numpy and torch as Python's, what is not finite as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [jsonable(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return str(value) if isinstance(value, Path) else value


def line_of(record: Mapping[str, Any]) -> str:
    """A record as its line, without the newline; an undefined number (NaN, which JSON has not) is null."""
    text = json.dumps(jsonable(record), allow_nan=False)
    return f'{text[:-1]}, "check": "{_check(text[:-1])}"}}'


def read_records(path: Path, report: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The records of a .jsonl file; a last line that a kill cut off is left out.

    Args:
        report: hears of every damaged line, which is left out too; None writes to the error stream.

    Raises:
        UserError: the file cannot be read.
    """
    lines = read_lines(path)
    for text in lines.damaged:
        (report or _warn)(f"warning: {text}")
    return lines.records


def read_lines(path: Path) -> Lines:
    """The lines of a .jsonl file, sorted into whole and damaged ones.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{unreadable(path, error)}; name another run, or delete it and repeat the run") from error
    found = Lines([], [], [], bool(data) and not data.endswith(b"\n"))
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = _record(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines):  # the last one was cut off by a kill, which is no damage
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                found.damaged.append(f"{path}: line {number} is damaged ({reason}) and is left out")
            continue
        found.whole.append(line)
        found.records.append(record)
    return found


def open_records(path: Path, report: Callable[[str], None]) -> set[str]:
    """Make a file ready to be appended to, without damaged and cut-off lines; the keys of the records that it holds."""
    if not path.exists():
        return set()
    lines = read_lines(path)
    for text in lines.damaged:
        report(f"warning: {text}; what this run computes again is written again")
    if lines.damaged or lines.torn:
        write_atomically(path, b"".join(line + b"\n" for line in lines.whole))
    return {record_key(record) for record in lines.records}


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Write rows (equal keys) as CSV; whether that changed the file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return write_if_changed(path, text.getvalue().encode())


def _record(line: bytes) -> dict[str, Any]:
    """The record of a line; ValueError says what is wrong."""
    text = line.decode()
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    checked = _CHECKED.match(text)
    if checked and checked[2] == _check(checked[1]):
        record.pop("check")
        return record
    # A line of the version before has no digest; one whose last value looks like a digest had one.
    if "check" in record or re.search(r'"[0-9a-f]{16}"\}$', text):
        raise ValueError("its checksum differs")
    return record


def _check(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _warn(text: str) -> None:
    print(text, file=sys.stderr)
