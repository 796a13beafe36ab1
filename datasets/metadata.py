"""Metadata in JSON files, checked while they are read: every complaint names file, entry and key."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError


class Entry:
    """A value of a metadata file and where it stands; asked for a kind, it returns the plain value or raises UserError."""

    __slots__ = ("_above", "_step", "value")

    def __init__(self, value: Any, above: Entry | None, step: str | int) -> None:
        self.value, self._above, self._step = value, above, step

    @property
    def place(self) -> str:
        """Such as "/data/x.json: [3].attributes[0].name"."""
        steps, entry = [], self
        while entry._above is not None:
            steps.append(f"[{entry._step}]" if isinstance(entry._step, int) else f".{_clean(entry._step)}")
            entry = entry._above
        return f"{entry._step}: {''.join(reversed(steps)).lstrip('.')}".removesuffix(": ")

    def wrong(self, expected: str) -> UserError:
        """The error that this value is not what was expected."""
        return UserError(f"{self.place}: got {_clean(repr(self.value))}, expected {expected}")

    def key(self, *names: str) -> Entry:
        """The value of the first of these keys that a table has."""
        if not isinstance(self.value, dict):
            raise self.wrong("a table")
        for name in names:
            if name in self.value:
                return Entry(self.value[name], self, name)
        raise UserError(f"{Entry(None, self, names[0]).place} missing" + (f" (or {', '.join(names[1:])})" if names[1:] else ""))

    def has(self, name: str) -> bool:
        """Whether a table has a key."""
        return isinstance(self.value, dict) and name in self.value

    def different(self) -> list[str]:
        """A list of texts, at least one and none twice, such as the values of a feature group."""
        names = [entry.text() for entry in self.each()]
        if not names or len(set(names)) != len(names):
            raise self.wrong("at least one name and none twice")
        return names

    def each(self, length: int | None = None) -> list[Entry]:
        """The values of a list, of a certain length if one is given."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        if length is not None and len(self.value) != length:
            raise UserError(f"{self.place}: got a list of {len(self.value)}, expected {length} values")
        return [Entry(value, self, i) for i, value in enumerate(self.value)]

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Keys and values of a table."""
        if not isinstance(self.value, dict):
            raise self.wrong("a table")
        return ((name, Entry(value, self, name)) for name, value in self.value.items())

    def text(self) -> str:
        """A text without null bytes and halves of surrogate pairs, which no file name and no terminal takes."""
        if not isinstance(self.value, str) or "\0" in self.value or _clean(self.value, None) != self.value:
            raise self.wrong("a text")
        return self.value

    def number(self, least: float = -math.inf) -> float:
        """A finite number of at least `least`."""
        value = self.value
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < 1e300:
            raise self.wrong("a number" if least == -math.inf else f"a number of at least {least:g}")
        return value

    def whole(self, least: int = 0, most: int = 2**53) -> int:
        """A whole number of the range."""
        value = self.value
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            span = f"of at least {least}" if most == 2**53 else f"from {least} to {most}" if least < most else f"{least}"
            raise self.wrong(f"the whole number {span}" if least == most else f"a whole number {span}")
        return value


def read_json(path: Path, missing: str = "put it there", damaged: str = "put a sound copy there") -> Entry:
    """The content of a JSON file.

    Args:
        path: the file.
        missing, damaged: what the user can do about it, for the error.

    Raises:
        UserError: the file is missing, unreadable or no JSON.
    """
    try:
        return Entry(json.loads(path.read_text(encoding="utf-8-sig")), None, str(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {missing}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be metadata; {damaged}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {damaged}") from None


def _clean(text: str, most: int | None = 60) -> str:
    """A text as it can be printed anywhere, shortened."""
    text = text.encode(errors="replace").decode()
    return text if most is None or len(text) <= most else f"{text[:most]}…"
