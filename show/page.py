"""The page of mode=report: one self-contained HTML file with sortable tables, figures, score maps and every command."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from string import Template

from PIL import Image

from show.board import Table, cell_text, control_text, difference_text, footnotes, layer_cells, main_cells
from show.comparison import RunRow

TEMPLATE = Path(__file__).with_name("page.html")
MAPPED = ("train", "train_class", "train_identity", "train_binding")  # modes whose runs have score maps
MAP_WIDTH = 900  # pixels of a score map on the page


def html_page(tables: Sequence[Table], figures: Sequence[bytes]) -> str:
    """The page; nothing in it is fetched from anywhere.

    Args:
        figures: the PNG of each table, empty where it has none.
    """
    sections = [_section(table, picture) for table, picture in zip(tables, figures, strict=True)]
    links = "".join(f'<a href="#t{n}">{_text(table.title)}</a>' for n, table in enumerate(tables, start=1))
    body = "\n".join(f'<section id="t{n}">{section}</section>' for n, section in enumerate(sections, start=1))
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(links=links, body=body)


def _section(table: Table, picture: bytes) -> str:
    parts = [f"<h2>{_text(table.title)}</h2>", _main(table)]
    parts.append("<ul>" + "".join(f"<li>{_text(line)}</li>" for line in footnotes(table)) + "</ul>")
    if picture:
        parts.append(f'<div class="scroll"><img class="curves" alt="score by depth" src="{_data("png", picture)}"></div>')
    for key in table.columns:
        header, body = layer_cells(table, key)
        inner = _table(header, [[_cell(cell, table.rows[i], j) for j, cell in enumerate(row)] for i, row in enumerate(body)])
        parts.append(f"<details><summary>{_text(table.titles[key])} by layer († {table.layer_rule})</summary>{inner}</details>")
    commands = "".join(
        f"<dt>{_text(label)}</dt><dd><code>{_text(row.command)}</code><br><small>{_text(row.directory.as_posix())}</small></dd>"
        for label, row in zip(table.labels, table.rows, strict=True)
    )
    parts.append(f"<details><summary>Commands</summary><dl>{commands}</dl></details>")
    maps = [(label, found) for label, row in zip(table.labels, table.rows, strict=True) if (found := score_map(row.directory))]
    if maps:
        shown = "".join(
            f'<figure><img alt="score map" src="{_data("png", data)}"><figcaption>{_text(name)}</figcaption></figure>'
            for name, data in maps
        )
        parts.append(f"<details><summary>Score maps</summary>{shown}</details>")
    elif any(row.curves and row.identity["mode"] in MAPPED for row in table.rows):
        command = f"python main.py mode=vis run={next(row.directory for row in table.rows if row.curves).as_posix()}"
        parts.append(f"<p><small>No score maps were drawn of these runs: <code>{_text(command)}</code> draws them.</small></p>")
    return "\n".join(parts)


def _main(table: Table) -> str:
    """Scores at chosen layers; the best control and the difference from the reference stand under each."""
    rows = []
    for index, (row, label) in enumerate(zip(table.rows, table.labels, strict=True)):
        name = _name(label) + (" <em>reference</em>" if index == table.reference and len(table.rows) > 1 else "")
        cells = [f"<td>{name}</td>"]
        for key in table.columns:
            moved = difference_text(table.difference(index, key))
            lines = [f"best control {beside}" if (beside := control_text(row, key)) else "", moved]
            under = "".join(f"<br><small>{_text(line)}</small>" for line in lines if line)
            cells.append(_cell(cell_text(row, key), row, 1, under, row.cell(key).value if row.cell(key) else None))
        rows.append(cells)
    return _table(main_cells(table)[0], rows)


def _cell(text: str, row: RunRow, column: int, under: str = "", value: float | None = None) -> str:
    """A cell; a score carries its command, and the number it is sorted by."""
    if column == 0:
        return f"<td>{_name(text)}</td>"
    sort = "" if value is None else f' data-value="{value!r}"'
    return f'<td title="{_text(row.command)}"{sort}>{_text(text)}{under}</td>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th><button type="button">{_text(name)}</button></th>' for name in header)
    body = "".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def score_map(directory: Path) -> bytes | None:
    """The first score map that mode=vis drew of a run, as a PNG no wider than the page; None where it drew none."""
    folder = directory.parent.parent / "vis"
    found = sorted(path for path in folder.glob(f"{directory.name}-*/*.png") if path.name != "sheet.png")
    if not found:
        return None
    with Image.open(found[0]) as picture:
        height = round(picture.height * MAP_WIDTH / picture.width)
        small = picture.convert("RGB").resize((MAP_WIDTH, height)) if picture.width > MAP_WIDTH else picture.convert("RGB")
    data = io.BytesIO()
    small.save(data, "png", optimize=True)
    return data.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _name(text: str) -> str:
    """A name that may be broken after an underscore."""
    return _text(text).replace("_", "_<wbr>")


def _text(text: str) -> str:
    return html.escape(text, quote=True)
