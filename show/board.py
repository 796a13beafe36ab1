"""A comparison as text: the main table and every column by layer, for a terminal, Markdown, CSV and LaTeX."""

import csv
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

from show.comparison import Cell, Difference, Key, RunRow, apart
from show.text import format_table, interval_text, markdown_table, score_text
from tasks import CONTROL_TASK

HEADER = (
    "table", "run", "directory", "model", "dataset", "protocol", "probe", "row", "control", "split", "question", "readout",
    "subset", "metric", "layer", "chosen", "value", "low", "high", "n_images", "n_seeds", "difference", "difference_low",
    "difference_high", "difference_p", "flags",
)  # fmt: skip
TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "·": r"$\cdot$", "–": "--", "†": r"$\dagger$", "°": r"$^\circ$",
    "<": "$<$", ">": "$>$",
}  # fmt: skip


QUESTIONS = {"is_same_object": "same object"}
SUBSETS = {"all": "all pairs", "same_class_matched": "same class, matched", "images": ""}
METRICS = {"auroc": "AUROC", "miou": "mIoU"}


class Table(NamedTuple):
    """Rows that may share columns: what they have in common, their labels, and which of them is the reference."""

    title: str
    rows: list[RunRow]
    labels: list[str]
    columns: list[Key]
    reference: int

    @property
    def titles(self) -> dict[Key, str]:
        """What the columns are called."""
        return titles_of(self.columns)

    @property
    def layer_rule(self) -> str:
        """How the layers are chosen that scores stand at."""
        return next((row.layer_rule for row in self.rows if row.curves), self.rows[0].layer_rule)

    def difference(self, index: int, key: Key) -> Difference | None:
        """A row minus the reference, at the layer chosen for each."""
        return None if index == self.reference else apart(self.rows[index], self.rows[self.reference], key)


def titles_of(columns: Sequence[Key]) -> dict[Key, str]:
    """What columns are called: subset and metric, then whatever else tells them apart, the question or the read-out."""
    several = len({question for question, *_ in columns}) > 1
    titles = {}
    for key in columns:
        question, _, subset, metric = key
        words = f"{SUBSETS.get(subset, subset.replace('_', ' '))} {METRICS.get(metric, metric.replace('_', ' '))}".strip()
        asked = QUESTIONS.get(question, question.replace("_", " "))
        titles[key] = f"{asked}: {words}" if several and not words.startswith(asked) else words
    shown = list(titles.values())
    return {key: f"{title} ({key[1]})".replace("_", " ") if shown.count(title) > 1 else title for key, title in titles.items()}


def cell_text(row: RunRow, key: Key) -> str:
    """The score at the chosen layer, the layer, and a mark where the run is doubtful."""
    cell = row.cell(key)
    if cell is None:
        return row.flags[0] if not row.curves and row.flags else "–"
    return interval_text(cell.value, cell.low, cell.high) + (f" @{cell.layer}" if len(row.curves[key]) > 1 else "")


def difference_text(found: Difference | None) -> str:
    """A difference with its interval, and a star where its p-value is below .05."""
    if found is None:
        return ""
    return interval_text(found.value, found.low, found.high, "+") + (" *" if found.p < 0.05 else "")


def control_text(row: RunRow, key: Key) -> str:
    """The best score of a control at any of its layers, and its name.

    A control task is no rival, and the oracle of classes is none where classes are asked about.
    """
    no_rivals = [CONTROL_TASK, *(["class_oracle"] if "class" in key[0] else [])]
    of_rivals = {name: curves.get(key, ()) for name, curves in row.controls.items() if name not in no_rivals}
    scores = [(cell.value, name) for name, cells in of_rivals.items() for cell in cells if not math.isnan(cell.value)]
    if not scores:
        return ""
    value, name = min(scores) if key[3].startswith("loss") else max(scores)
    return f"{score_text(value)} {name.replace('_', ' ')}"


def main_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table: scores at chosen layers, under each its best control and what it has over the
    reference.
    """
    header = ["run", *table.titles.values()]
    body = []
    for index, (row, label) in enumerate(zip(table.rows, table.labels, strict=True)):
        mark = " (reference)" if index == table.reference and len(table.rows) > 1 else ""
        body.append([label + mark, *(cell_text(row, key) for key in table.columns)])
        beside = [control_text(row, key) for key in table.columns]
        if any(beside):
            body.append(["  best control", *beside])
        moved = [difference_text(table.difference(index, key)) for key in table.columns]
        if any(moved):
            body.append(["  minus reference", *moved])
    return header, body


def layer_cells(table: Table, key: Key) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one column by layer; the chosen layer's score is marked with †."""
    layers = list(dict.fromkeys(cell.layer for row in table.rows for cell in row.curves.get(key, ())))
    body = []
    for row, label in zip(table.rows, table.labels, strict=True):
        at = row.cell(key)
        cells = {cell.layer: cell for cell in row.curves.get(key, ())}
        body.append([label, *(_layer_text(cells.get(layer), at) for layer in layers)])
    return ["run", *map(str, layers)], body


def _layer_text(cell: Cell | None, chosen: Cell | None) -> str:
    if cell is None or math.isnan(cell.value):
        return "–"
    text = score_text(cell.value)
    return text + ("†" if chosen is not None and chosen.layer == cell.layer else "")


def footnotes(table: Table) -> list[str]:
    """What a table rests on, and what is doubtful in it."""
    finished = [row for row in table.rows if row.curves]
    lines = []
    if finished:
        seeds = sorted({row.n_seeds for row in finished})
        several = "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) + " seeds"
        lines.append(
            f"{finished[0].n_images} images, {several if seeds[-1] > 1 else 'one seed'}; 95 % intervals over images; "
            f"@ {table.layer_rule}; * p < .05 of the paired bootstrap, two-sided, not corrected over cells"
        )
    flagged: dict[str, list[str]] = {}
    for row, label in zip(table.rows, table.labels, strict=True):
        for flag in row.flags:
            flagged.setdefault(flag, []).append(label)
    return lines + [f"{', '.join(labels)}: {flag}" for flag, labels in flagged.items()]


def text_table(table: Table) -> str:
    """The main table for a terminal."""
    return "\n".join([format_table(*main_cells(table)), *footnotes(table)])


def markdown(tables: Sequence[Table]) -> str:
    """All tables as Markdown: scores at chosen layers, then every column by layer, then the commands."""
    parts = ["# Runs side by side"]
    for table in tables:
        parts += [f"## {table.title}", markdown_table(*main_cells(table)), "\n".join(f"- {line}" for line in footnotes(table))]
        for key in table.columns:
            parts += [f"### {table.titles[key]} by layer († {table.layer_rule})", markdown_table(*layer_cells(table, key))]
        commands = [f"- {label}: `{row.command}`" for label, row in zip(table.labels, table.rows, strict=True)]
        parts += ["### Commands", "\n".join(commands)]
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_table(tables: Sequence[Table]) -> str:
    """Every score of every run and control at every layer, one per line."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, HEADER, restval="")
    writer.writeheader()
    for table in tables:
        for index, (row, label) in enumerate(zip(table.rows, table.labels, strict=True)):
            common = {
                "table": table.title, "run": label, "directory": row.directory.as_posix(), "row": row.name,
                "split": row.ground.get("split", ""), "n_images": row.n_images, "n_seeds": row.n_seeds,
                "flags": "; ".join(row.flags), **{key: row.identity[key] for key in ("model", "dataset", "protocol", "probe")},
            }  # fmt: skip
            if not row.curves:
                writer.writerow(common)
            for control, curves in {"": row.curves, **row.controls}.items():
                for key, cells in curves.items():
                    named = dict(zip(("question", "readout", "subset", "metric"), key, strict=True))
                    for at, cell in enumerate(cells):
                        line = {**common, **named, "control": control, **cell._asdict()}
                        if not control and row.chosen.get(key) == at:
                            line["chosen"] = 1
                            if (found := table.difference(index, key)) is not None:
                                names = ("difference", "difference_low", "difference_high", "difference_p")
                                line |= dict(zip(names, found, strict=True))
                        writer.writerow(line)
    return text.getvalue()


def latex_tables(tables: Sequence[Table]) -> str:
    """The main tables for a paper (needs the package booktabs)."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        header, body = main_cells(table)
        lines = [" & ".join(map(_tex, row)) + r" \\" for row in body]
        caption = _tex(f"{table.title}. {' '.join(footnotes(table))}")
        columns = "l" + "r" * (len(header) - 1)
        parts.append("\n".join([
            r"\begin{table}", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
            " & ".join(map(_tex, header)) + r" \\", r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    """Text with every sign that LaTeX reads as something else written out."""
    return "".join(TEX.get(sign, sign) for sign in text)
