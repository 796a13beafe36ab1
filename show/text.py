"""Plain text for a terminal and for Markdown."""

import re
import textwrap
from collections.abc import Sequence

from machine import table_width

FOLDED = 24  # characters; shorter names are not folded


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """A plain text table: first column flush left, the others flush right.

    Columns that do not fit beside each other stand in blocks under each other, each with the first column; where even one
    does not fit beside the first, the names in it are folded.

    Args:
        width: characters of a line; None: `report.width`.
    """
    limit = table_width() if width is None else width
    widest = max((len(str(row[i])) for row in (header, *rows) for i in range(1, len(header))), default=0)
    rows = [line for row in rows for line in _folded(row, max(limit - 2 - widest, FOLDED))]
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    blocks = _blocks(widths, limit)

    def line(row: Sequence[str], columns: Sequence[int]) -> str:
        cells = [str(row[i]).ljust(widths[i]) if i == 0 else str(row[i]).rjust(widths[i]) for i in columns]
        return "  ".join(cells).rstrip()

    rule = ["-" * w for w in widths]
    return "\n\n".join("\n".join(line(row, columns) for row in (header, rule, *rows)) for columns in blocks)


def _folded(row: Sequence[str], room: int) -> list[Sequence[str]]:
    """A row whose first cell has more than `room` characters, in several; the values stand in the last."""
    if len(str(row[0])) <= room:
        return [row]
    start = str(row[0])[: len(str(row[0])) - len(str(row[0]).lstrip())]
    parts = textwrap.wrap(str(row[0]).strip(), room - len(start), subsequent_indent="  ", break_on_hyphens=False)
    return [[start + part, *[""] * (len(row) - 1)] for part in parts[:-1]] + [[start + parts[-1], *row[1:]]]


def _blocks(widths: Sequence[int], limit: int) -> list[list[int]]:
    """Columns that stand side by side: the first, and as many of the others as fit in a line (at least one)."""
    blocks, length = [[0]], widths[0]
    for i, width in enumerate(widths[1:], start=1):
        if len(blocks[-1]) > 1 and length + 2 + width > limit:
            blocks.append([0])
            length = widths[0]
        blocks[-1].append(i)
        length += 2 + width
    return blocks


def score_text(value: float, sign: str = "") -> str:
    """A score with three digits and without the zero before the point: .753, 10.258; with sign="+": +.012."""
    return re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.3f}")


def interval_text(value: float, low: float, high: float, sign: str = "") -> str:
    """A score with the ends of its interval, .753 [.738, .768]; a dash where it is undefined."""
    if value != value:
        return "–"
    return f"{score_text(value, sign)} [{score_text(low, sign)}, {score_text(high, sign)}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table, numbers flush right."""
    line = lambda row: "| " + " | ".join(str(cell).strip().replace("|", "\\|") for cell in row) + " |"
    rule = "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
