"""mode=report: every finished run in one page, one Markdown, one CSV and one LaTeX table, made of records alone.

    python main.py mode=report runs=outputs
    python main.py mode=report runs=[outputs/train/a,outputs/train/b] report.by=[dataset]
    python main.py mode=report runs=outputs/sweeps/2026-01-31_12-00-00

A table holds runs that measure the same thing (`show.comparison.same_ground`). Its main columns are those that the mode
prints; a score stands at the layer chosen on validation. Written again from the same records, every file has the same bytes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from files import read_json, write_if_changed
from runs.finished import read_facts
from runs.progress import stage, stages, track
from runs.run import Run
from show import dense_rows
from show.board import Table, csv_table, latex_tables, markdown, text_table
from show.comparison import MEASURES, RunRow, columns_of, labels_of, read_run, same_ground
from show.page import html_page
from show.style import pdf_bytes, png_bytes

PANELS = 4
MODES = (*MEASURES, *dense_rows.MODES)
EVERYTHING = ("task", "dataset", "protocol", "split", "windows", "metric", "resamples", "images")  # a sweep: a table for each


def run(cfg: Any, run: Run) -> dict[str, Any]:
    """Entry of mode=report: report.html, report.md, report.csv, report.tex and the figures, in the run directory.

    Raises:
        UserError: no run, a damaged one, runs that may not share a table, an unknown reference.
    """
    stages("records", "differences", "figures and page")
    stage("records")
    tables = open_tables(find_runs(cfg.runs), cfg.report.by, cfg.report.reference)
    written = write_report(tables, run.dir)
    run.finishing()
    for table in tables:
        run.say(f"{table.title}\n{text_table(table)}\n")
    run.say(f"{sum(len(t.rows) for t in tables)} rows in {len(tables)} tables; " + ", ".join(path.name for path in written))
    run.say(f"page: {run.dir / 'report.html'} (open it in a browser)")
    return {"runs": sum(len(table.rows) for table in tables), "objective": None}


def find_runs(runs: Any) -> list[Path]:
    """The run directories that are named, or lie below a folder that is named (of all runs, of one mode, of a sweep).

    They are of the modes that score a frozen model (`MODES`).

    Raises:
        UserError: there is none.
    """
    named = [Path(str(name)) for name in ([runs] if isinstance(runs, str | Path) else runs)]
    found: dict[Path, None] = {}
    for path in named:
        if (path / "run.json").is_file():
            found[path] = None
            continue
        if (path / "jobs").is_dir():
            below = jobs_of(path)
        elif path.name in MODES:
            below = sorted(p.parent for p in path.glob("*/run.json"))
        else:
            below = sorted(p.parent for mode in MODES for p in path.glob(f"{mode}/*/run.json"))
        if not below:
            raise UserError(
                f"runs={path} is no run directory and has none of modes {', '.join(MODES)} below; name a folder of runs "
                "(runs=outputs) or run directories (runs=[a,b])"
            )
        found |= dict.fromkeys(below)
    return list(found)


def jobs_of(folder: Path) -> list[Path]:
    """The run directories of a sweep's jobs that are reported, in the order of the jobs."""
    notes = [read_json(note, "delete it") for note in sorted((folder / "jobs").glob("*.json"))]
    directories = dict.fromkeys(Path(str(note.get("directory"))) for note in notes)
    return [path for path in directories if path.parent.name in MODES and (path / "run.json").is_file()]


def open_tables(directories: Sequence[Path], by: Iterable[str], reference: str | None = None) -> list[Table]:
    """Read runs and put those that may share columns into tables.

    Args:
        by: fields that get a table each (`show.comparison.FIELDS`).
        reference: directory of the run that differences are taken from; None: the first finished one of each table.

    Raises:
        UserError: as `read_run` and `same_ground`; the reference is none of the runs; a run holds no scores.
    """
    if reference is not None and Path(reference) not in directories:
        raise UserError(f"report.reference={reference} is none of the {len(directories)} runs; name one of their directories")
    rows = []
    for directory in track(directories, "reading", "run"):
        rows += read_rows(directory)
    tables = []
    for group in same_ground(rows, by):
        labels = labels_of(group)
        order = sorted(range(len(group)), key=lambda i: labels[i])
        group, labels = [group[i] for i in order], [labels[i] for i in order]
        columns, finished = columns_of(group), [row for row in group if row.curves]
        if finished and not columns:
            shown = [", ".join(dict.fromkeys(key[0] for key in row.curves)) for row in finished[:2]]
            raise UserError(
                f"{finished[0].directory} and {finished[1].directory} share no column: the first has {shown[0]}, the second "
                f"{shown[1]}; name runs of the same evaluations with runs=[…]"
            )
        first = next((i for i, row in enumerate(group) if row.curves), 0)
        named = [i for i, row in enumerate(group) if reference is not None and row.directory == Path(reference)]
        ground = group[first].ground
        parts = [ground["task"], ground["dataset.name"], f"protocol {ground['protocol.name']}", ground["split"]]
        tables.append(Table(" · ".join(filter(None, parts)), group, labels, columns, (named or [first])[0]))
    return sorted(tables, key=lambda table: table.title)


def read_rows(directory: Path) -> list[RunRow]:
    """The rows of a run directory of any mode that is reported.

    Raises:
        UserError: as `read_run`.
    """
    identity = read_facts(directory).get("identity")
    dense = isinstance(identity, dict) and identity.get("mode") in dense_rows.MODES
    return dense_rows.read_dense_run(directory) if dense else read_run(directory)


def about_figure(table: Table) -> str:
    """What a figure shows, in one line."""
    n_images = next(row.n_images for row in table.rows if row.curves)
    return (
        f"{table.title} · 95 % ribbons over {n_images} images · ring: {table.layer_rule} · depth 0: input of the first block, "
        "1: last layer that was read"
    )


def write_report(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write page, tables and figures into a folder; only what changed is written."""
    from show.across_figures import draw_depth_curves  # here: nothing waits for matplotlib but the figures

    stage("differences")
    files: dict[str, bytes] = {"report.csv": csv_table(tables).encode(), "report.tex": latex_tables(tables).encode()}
    pictures = []
    stage("figures and page")
    for number, table in enumerate(tables, start=1):
        if any(len(row.curves[key]) > 1 for row in table.rows if row.curves for key in table.columns):
            columns = dict(list(table.titles.items())[:PANELS])
            figure = draw_depth_curves(table.rows, table.labels, columns, about_figure(table))
            files |= {f"depth-{number}.png": png_bytes(figure), f"depth-{number}.pdf": pdf_bytes(figure)}
            pictures.append(files[f"depth-{number}.png"])
        else:
            pictures.append(b"")
    files["report.md"] = markdown(tables).encode()
    files["report.html"] = html_page(tables, pictures).encode()
    for name, content in files.items():
        write_if_changed(folder / name, content)
    return [folder / name for name in files]


