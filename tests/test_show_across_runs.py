"""mode=report: what shares a table, what is refused and by which name, differences, equal bytes, the page in a browser."""

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, open_browser
from edited_runs import change_config, change_facts, change_records, edit_text, facts_of, flip
from PIL import Image
from program import TINY, finish, run, start

from errors import UserError
from metrics.bootstrap import Estimate, interval, resample
from runs.records import read_records
from runs.states import load_state, save_state
from show import board, comparison
from show.across_runs import find_runs, open_tables, write_report
from show.text import score_text

QUICK = [*TINY, "model.layers=[embed,0,1]"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of the same data with different probes, one with a control."""
    folder = tmp_path_factory.mktemp("report")
    run(folder, *QUICK, "probe.mode=linear", "controls=[position]")
    run(folder, *QUICK, "probe.mode=quadratic")
    return folder / "outputs"


@pytest.fixture
def copies(outputs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both, to be changed."""
    shutil.copytree(outputs / "train", tmp_path / "train")
    linear, quadratic = sorted((tmp_path / "train").iterdir(), key=lambda path: "quadratic" in path.name)
    return linear, quadratic


def tables(*directories: Path, by: tuple[str, ...] = ("task",)) -> list[board.Table]:
    return open_tables(list(directories), by)


# ------------------------------------------------------------------------------------------------------- what is shown


def test_a_table_shows_what_the_records_say(outputs: Path) -> None:
    (table,) = tables(*find_runs(outputs))
    assert [label.split(" · ")[1] for label in table.labels] == ["linear", "quadratic"]
    for row in table.rows:
        recorded = read_records(row.directory / "metrics.jsonl")
        for key in table.columns:
            for cell in row.curves[key]:
                (record,) = [
                    r for r in recorded
                    if r["kind"] == "score" and r["seed"] == "mean" and r["name"] == "probe" and r["layer"] == cell.layer
                    and (r["question"], r["readout"], r["subset"]) == key[:3]
                ]  # fmt: skip
                assert record["metrics"][key[3]] == pytest.approx(cell.value, nan_ok=True)
            chosen = [r["layer"] for r in recorded if r["kind"] == "choice" and r["name"] == "probe"
                      and (r["question"], r["readout"], r["subset"], r["metric"]) == key]  # fmt: skip
            assert [cell.layer for cell in [row.cell(key)] if cell is not None] == chosen


def test_numbers_keep_their_digits() -> None:
    shown = {0.7531: ".753", -0.25: "-.250", 1.0: "1.000", 10.258: "10.258", -10.4: "-10.400", 0.0: ".000", 100.05: "100.050"}
    assert {value: score_text(value) for value in shown} == shown
    assert score_text(10.0, "+") == "+10.000" and score_text(0.5, "+") == "+.500"


def test_differences_are_paired_over_images(outputs: Path) -> None:
    (table,) = tables(*find_runs(outputs))
    key = table.columns[0]
    found = table.difference(1 - table.reference, key)
    ends = []
    for row in (table.rows[1 - table.reference], table.rows[table.reference]):
        at = row.chosen[key]
        value = torch.tensor([row.curves[key][at].value], dtype=torch.float64)
        ends.append(Estimate(value, row.influence[key][at : at + 1].double()))
    paired = Estimate(ends[0].value - ends[1].value, ends[0].influence - ends[1].influence)
    low, high = interval(paired, resample(8, 20, 0), bounds=(-1.0, 1.0))
    assert found[:3] == pytest.approx((float(paired.value), float(low), float(high)), abs=1e-9)
    mirrored = comparison.apart(table.rows[table.reference], table.rows[1 - table.reference], key)
    assert mirrored.value == pytest.approx(-found.value) and mirrored.low == pytest.approx(-found.high)


def test_files_agree_and_are_equal_when_written_again(outputs: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_report(tables(*find_runs(outputs)), folder)
    assert sorted(path.name for path in first.iterdir()) == [
        "depth-1.pdf", "depth-1.png", "report.csv", "report.html", "report.md", "report.tex",
    ]  # fmt: skip
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    (table,) = tables(*find_runs(outputs))
    with open(first / "report.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["chosen"] == "1"]
    for line in lines:
        key = (line["question"], line["readout"], line["subset"], line["metric"])
        shown = board.interval_text(*(float(line[name]) for name in ("value", "low", "high")))
        assert key not in table.columns or shown in (first / "report.md").read_text()
    assert (first / "report.tex").read_text().count(r"\toprule") == 1


def test_the_command_writes_the_report(outputs: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "mode=report", f"runs={outputs}")
    assert (done.dir / "report.html").is_file() and done.dir.name.count("quadratic") == 0
    one, other = find_runs(outputs)
    listed = run(tmp_path, "mode=report", f"runs=[{one},{other}]", f"report.reference={other}")
    table = (listed.dir / "report.md").read_text()
    assert table != (done.dir / "report.md").read_text() and table.count("(reference)") == 1


def test_unfinished_runs_are_marked(copies: tuple[Path, Path]) -> None:
    facts = json.loads((copies[1] / "run.json").read_text())
    (copies[1] / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    (table,) = tables(*copies)
    text = board.text_table(table)
    assert "unfinished" in text and board.main_cells(table)[1][-1][1] == "unfinished"


def test_fields_in_by_get_a_table_each(copies: tuple[Path, Path]) -> None:
    change_config(copies[1], "dataset.noise", 0.5)
    with pytest.raises(UserError, match="dataset.noise"):
        tables(*copies)
    assert len(tables(*copies, by=("task", "dataset"))) == 2
    with pytest.raises(UserError, match="report.by=nonsense is no field"):
        tables(*copies, by=("nonsense",))


def test_rows_are_told_apart_by_what_varies(copies: tuple[Path, Path], tmp_path: Path) -> None:
    other = shutil.copytree(copies[0], tmp_path / "train/other-00000000")
    change_config(other, "trainer.lr", 0.5)
    (table,) = tables(*copies, other)
    assert sorted(label.rpartition(" · ")[2] for label in table.labels) == ["quadratic", "trainer.lr=0.01", "trainer.lr=0.5"]


# -------------------------------------------------------------------------------------------------------- what is refused


def change_scores(directory: Path, name_it: bool = True, **recipe: Any) -> None:
    """Another file of the scores of every image; `name_it`: run.json names it."""
    path = directory / "scores.safetensors"
    state = load_state(path)
    save_state(path, state.tensors, {**state.recipe, **recipe})
    if name_it:
        change_facts(directory, sha256={path.name: hashlib.sha256(path.read_bytes()).hexdigest()})


def first_score(records: list[dict], **change: Any) -> list[dict]:
    return [{**r, **change} if i == 0 else r for i, r in enumerate(records)]


MIXED = {
    "protocol.selection.patches": 32, "protocol.selection.seed": 7, "protocol.labels.min_purity": 0.9, "protocol.name": "mine",
    "protocol.pairs.accuracy": "all", "dataset.noise": 0.5, "dataset.n_test": 9, "dataset.n_train": 17, "dataset.n_val": 9,
    "dataset.seed": 5, "dataset._target_": "datasets.folder.Folder", "model.image_size": 224,
    "protocol.geometry.kind": "stretch", "protocol.geometry.antialias": "other", "task": None,
}  # fmt: skip
EDITED: dict[str, tuple[Callable[[Path], None], str]] = {
    "config edited": (
        lambda d: (d / "config.yaml").write_text((d / "config.yaml").read_text() + "\n# x\n"),
        "config.yaml is not the one",
    ),
    "config gone": (lambda d: (d / "config.yaml").unlink(), "config.yaml"),
    "config not yaml": (lambda d: (d / "config.yaml").write_text("a: [b"), "config.yaml is damaged"),
    "config lacks a section": (lambda d: (d / "config.yaml").write_text("mode: train\nseed: 0\n"), "config.yaml is damaged"),
    "facts gone": (lambda d: (d / "run.json").unlink(), "run.json"),
    "facts not json": (lambda d: (d / "run.json").write_text("{"), "run.json"),
    "facts without identity": (lambda d: change_facts(d, identity=None), "run.json"),
    "facts without command": (lambda d: change_facts(d, command=None), "run.json"),
    "facts of another model": (
        lambda d: change_facts(d, identity={**facts_of(d)["identity"], "model": "dinov2"}),
        "run.json says dinov2",
    ),
    "facts of another probe": (
        lambda d: change_facts(d, identity={**facts_of(d)["identity"], "probe": "mlp"}),
        "run.json says mlp",
    ),
    "records gone": (lambda d: (d / "metrics.jsonl").unlink(), "metrics.jsonl"),
    "records empty": (lambda d: (d / "metrics.jsonl").write_text(""), "metrics.jsonl has 0 records"),
    "a byte flipped in records": (lambda d: flip(d / "metrics.jsonl"), "metrics.jsonl: line"),
    "a number edited": (lambda d: edit_text(d / "metrics.jsonl", '"n_images": 8', '"n_images": 9'), "metrics.jsonl: line"),
    "a record of another protocol": (lambda d: change_records(d, lambda r: first_score(r, protocol="mine")), "protocol mine"),
    "a record of another data set": (lambda d: change_records(d, lambda r: first_score(r, dataset="mine")), "dataset mine"),
    "a record of another mode": (lambda d: change_records(d, lambda r: first_score(r, mode="eval")), "mode eval"),
    "a layer lost": (
        lambda d: change_records(d, lambda r: [x for x in r if x.get("layer") != 1 or x.get("seed") != "mean"]),
        "records of",
    ),
    "a layer twice": (
        lambda d: change_records(d, lambda r: r + [x for x in r if x["kind"] == "score" and x["layer"] == 0]),
        "records of",
    ),
    "a choice of no layer": (
        lambda d: change_records(d, lambda r: [{**x, "layer": 77} if x["kind"] == "choice" else x for x in r]),
        "layer 77",
    ),
    "scores gone": (lambda d: (d / "scores.safetensors").unlink(), "scores.safetensors"),
    "a byte flipped in scores": (lambda d: flip(d / "scores.safetensors", 0.9), "scores.safetensors"),
    "scores cut": (
        lambda d: (d / "scores.safetensors").write_bytes((d / "scores.safetensors").read_bytes()[:-9]),
        "scores.safetensors",
    ),
    "scores of another run": (lambda d: change_scores(d, name_it=False, seed=3), "scores.safetensors is not the file"),
    "scores without checksum": (lambda d: change_facts(d, sha256={}), "scores.safetensors is not the file"),
    "other resamples": (lambda d: change_scores(d, n_boot=21), "resamples is"),
    "another seed of resamples": (lambda d: change_scores(d, seed=3), "resamples is"),
    "another split": (lambda d: change_scores(d, split="val"), "split is"),
    "other images": (lambda d: change_scores(d, images=[f"x{i}" for i in range(8)]), "images is"),
    "images in another order": (
        lambda d: change_scores(d, images=load_state(d / "scores.safetensors").recipe["images"][::-1]),
        "images is",
    ),
}  # fmt: skip


@pytest.mark.parametrize("key", MIXED)
def test_runs_that_measure_something_else_are_refused_by_name(key: str, copies: tuple[Path, Path]) -> None:
    if key == "task":
        identity = {**facts_of(copies[1])["identity"], "task": "class"}
        change_facts(copies[1], identity=identity)
        change_records(copies[1], lambda records: [{**r, "task": "class"} for r in records])
        by, named = (), "task"
    else:
        change_config(copies[1], key, MIXED[key])
        by, named = ("task",), key.replace("model.", "windows.").replace("protocol.geometry", "windows.geometry")
    with pytest.raises(UserError) as refusal:
        tables(*copies, by=by)
    sentence = str(refusal.value)
    assert re.search(rf"may not share a table: {re.escape(named)} is .+ in the first and .+ in the second", sentence)
    assert all(directory.name in sentence for directory in copies) and "report.by=" in sentence


@pytest.mark.parametrize("case", EDITED)
def test_edited_and_damaged_runs_are_refused_by_name(case: str, copies: tuple[Path, Path]) -> None:
    change, named = EDITED[case]
    change(copies[1])
    with pytest.raises(UserError, match=re.escape(named)):
        tables(*copies)


def test_what_is_no_run_is_refused(tmp_path: Path, outputs: Path) -> None:
    with pytest.raises(UserError, match="is no run directory and has none of modes"):
        find_runs(tmp_path)
    with pytest.raises(UserError, match="report.reference=.* is none of the 2 runs"):
        open_tables(find_runs(outputs), ["task"], reference="elsewhere")


# ------------------------------------------------------------------------------------------------------- sweeps and pages


def test_a_sweep_ends_with_its_report(tmp_path: Path) -> None:
    done = finish(start(tmp_path, "-m", *QUICK, "probe.mode=linear,cosine"))
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    assert (folder / "report.html").is_file() and (folder / "depth-1.png").is_file()
    assert "minus reference" in done.out and "report of the sweep" in done.out
    commands = [row.command for directory in find_runs(folder) for row in comparison.read_run(directory)]
    assert [command.rpartition(" ")[2] for command in commands] == ["probe.mode=linear", "probe.mode=cosine"]
    assert not any(" -m " in command for command in commands)
    assert len(find_runs(tmp_path / "outputs")) == 2
    assert set(find_runs(folder)) == set(find_runs(tmp_path / "outputs/train")) == set(find_runs(tmp_path / "outputs"))


def test_the_page_holds_score_maps_or_says_how_to_draw_them(copies: tuple[Path, Path], tmp_path: Path) -> None:
    write_report(tables(*copies), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert f"mode=vis run={sorted(copies)[0].as_posix()}" in page and "<summary>Score maps" not in page
    drawn = tmp_path / "vis" / f"{copies[0].name}-01234567"
    drawn.mkdir(parents=True)
    Image.new("RGB", (1000, 10), "red").save(drawn / "maps.png")
    write_report(tables(*copies), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "mode=vis" not in page and page.count('alt="score map"') == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_sorts_and_fetches_nothing(outputs: Path, tmp_path: Path) -> None:
    write_report(tables(*find_runs(outputs)), tmp_path)
    (tmp_path / "browser").mkdir()
    with open_browser(tmp_path / "browser") as page:
        page.size(390, 800)
        page.open((tmp_path / "report.html").as_uri(), "document.querySelector('td[title]')")
        rows = "[...document.querySelector('table').tBodies[0].rows].map(r => parseFloat(r.cells[1].dataset.value))"
        press = "document.querySelectorAll('th button')[1].click()"
        page.run(press)
        down = page.run(rows)
        page.run(press)
        assert down == sorted(down, reverse=True) and page.run(rows) == sorted(down)
        assert page.run("document.querySelector('td[title]').title").startswith("python main.py")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll by themselves
        assert not page.complaints() and not page.fetched()
