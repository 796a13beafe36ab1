"""mode=report over dense evaluations: what a table shows, what is refused and by which name."""

import csv
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from edited_runs import change_config, change_facts, change_records, edit_text, facts_of, flip
from program import MODEL, run

from errors import UserError
from metrics.bootstrap import Estimate, interval, resample
from runs.records import read_records
from show import board
from show.across_runs import EVERYTHING, find_runs, open_tables, write_report

QUICK = [
    *MODEL, "mode=dense_suite", "dense.evaluations=[patch_class,overcluster]", "model.layers=[0,-1]", "dense.figures=false",
    "dense.controls=[position]", "dataset.n_train=8", "dataset.n_val=2", "dataset.n_test=6", "trainer.n_boot=20",
    "wandb.mode=disabled", "patch_class.seeds=2", "patch_class.epochs=1", "patch_class.lrs=[1e-2]",
    "patch_class.normalize=[standardize]", "overcluster.n_clusters=[classes]", "overcluster.seeds=1", "overcluster.pca=8",
    "overcluster.iterations=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of two random backbones."""
    folder = tmp_path_factory.mktemp("dense_report")
    for seed in (0, 1):
        run(folder, *QUICK, f"model.seed={seed}")
    return folder / "outputs"


@pytest.fixture
def copies(outputs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of both, to be changed."""
    shutil.copytree(outputs / "dense_suite", tmp_path / "dense_suite")
    first, second = sorted((tmp_path / "dense_suite").iterdir())
    return first, second


def test_a_table_shows_what_the_records_say(outputs: Path) -> None:
    (table,) = open_tables(find_runs(outputs), ["task"])
    assert {label.rpartition(" · ")[2] for label in table.labels} == {"model.seed=0", "model.seed=1"}
    assert {key[0] for key in table.columns} == {"patch_class", "overcluster"}
    assert {key[3] for key in table.columns} == {"miou"}
    for row in table.rows:
        assert set(row.controls) == {"position"} and row.n_images == 6 and row.n_seeds == 2
        means = [r for r in read_records(row.directory / "metrics.jsonl") if r["kind"] == "dense" and r["seed"] == "mean"]
        for key in table.columns:
            recorded = {
                r["layer"]: (r["metrics"]["miou"], *r["interval"]["miou"])
                for r in means
                if r["name"] == "backbone" and f"{r['question']} {r['subset']}".replace("_", " ") == key[2]
            }
            assert {cell.layer: tuple(cell[1:]) for cell in row.curves[key]} == recorded
            assert row.cell(key).layer == 1  # the last one
    assert "last layer that was read" in board.text_table(table)


def test_differences_are_paired_over_images(outputs: Path) -> None:
    (table,) = open_tables(find_runs(outputs), ["task"])
    other = 1 - table.reference
    for key in table.columns:
        influences = []
        for index in (other, table.reference):
            with open(table.rows[index].directory / "scores.csv", newline="") as file:
                lines = [line for line in csv.DictReader(file) if (line["subject"], line["layer"]) == ("backbone", "1")]
            lines = [line for line in lines if f"{line['evaluation']} {line['setting']}".replace("_", " ") == key[2]]
            influences.append(torch.tensor([[float(line["influence"]) for line in lines]], dtype=torch.float64))
        values = [table.rows[index].cell(key).value for index in (other, table.reference)]
        apart = Estimate(torch.tensor([values[0] - values[1]], dtype=torch.float64), influences[0] - influences[1])
        low, high = interval(apart, resample(6, 20, 0), bounds=(-1.0, 1.0))
        assert table.difference(other, key)[:3] == pytest.approx((float(apart.value), float(low), float(high)), abs=1e-9)


def test_the_files_are_equal_when_written_again(outputs: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        write_report(open_tables(find_runs(outputs), EVERYTHING), folder)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
    assert "overcluster" in (tmp_path / "first/report.html").read_text()


def test_unfinished_runs_are_marked(copies: tuple[Path, Path]) -> None:
    change_facts(copies[1], status="failed")
    (table,) = open_tables(copies, ["task"])
    assert "failed" in board.text_table(table)


def drop_scores(directory: Path, keep: Callable[[dict[str, str]], bool]) -> None:
    """Fewer scores of images, in a file that run.json names."""
    path = directory / "scores.csv"
    with open(path, newline="") as file:
        lines = [line for line in csv.DictReader(file)]
        kept = [line for line in lines if keep(line)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(kept)
    name_scores(directory)


def images_of(directory: Path) -> list[str]:
    with open(directory / "scores.csv", newline="") as file:
        return list(dict.fromkeys(line["image"] for line in csv.DictReader(file)))


def name_scores(directory: Path) -> None:
    change_facts(directory, sha256={"scores.csv": hashlib.sha256((directory / "scores.csv").read_bytes()).hexdigest()})


MIXED = {
    "dense.background": "ignore", "dense.reference_size": 100, "dense.train_split": "val", "dense.test_split": "val",
    "dense.grid": 4, "patch_class.absent": "zero", "patch_class.void": "background", "patch_class.score_sizes": [100],
    "patch_class.selection": "none", "overcluster.size": 100, "overcluster.absent": "zero", "dataset.noise": 0.5,
    "dataset.n_test": 7, "protocol.labels.min_purity": 0.9, "protocol.geometry.kind": "stretch", "protocol.name": "mine",
    "model.image_size": 224, "trainer.n_boot": 21, "seed": 3,
}  # fmt: skip
EDITED: dict[str, tuple[Callable[[Path], None], str]] = {
    "scores gone": (lambda d: (d / "scores.csv").unlink(), "scores.csv is not there"),
    "a score edited": (lambda d: edit_text(d / "scores.csv", "backbone", "bacKbone"), "scores.csv is not the file"),
    "a byte flipped in scores": (lambda d: flip(d / "scores.csv", 0.9), "scores.csv is not the file"),
    "an image less": (lambda d: drop_scores(d, lambda line: line["image"] != images_of(d)[2]), "images is"),
    "an image less at one layer": (
        lambda d: drop_scores(d, lambda line: line["image"] != images_of(d)[2] or line["layer"] == "1"),
        "holds results of 2 sets of images",
    ),
    "no results": (lambda d: drop_scores(d, lambda line: False), "holds results of 0 sets of images"),
    "a layer less": (lambda d: drop_scores(d, lambda line: line["layer"] != "0"), "records of"),
    "a record lost": (
        lambda d: change_records(d, lambda r: [x for x in r if x.get("layer") != 1 or x.get("seed") != "mean"]),
        "records of",
    ),
    "records empty": (lambda d: (d / "metrics.jsonl").write_text(""), "has 0 records"),
    "a byte flipped in records": (lambda d: flip(d / "metrics.jsonl"), "metrics.jsonl: line"),
    "facts of another model": (
        lambda d: change_facts(d, identity={**facts_of(d)["identity"], "model": "dinov2"}),
        "run.json says dinov2",
    ),
    "config edited": (
        lambda d: (d / "config.yaml").write_text((d / "config.yaml").read_text() + "# x\n"),
        "config.yaml is not the one",
    ),
    "another task": (lambda d: change_facts(d, identity={**facts_of(d)["identity"], "task": "x"}), "run.json says x"),
}  # fmt: skip


@pytest.mark.parametrize("key", MIXED)
def test_runs_that_score_something_else_are_refused_by_name(key: str, copies: tuple[Path, Path]) -> None:
    change_config(copies[1], key, MIXED[key])
    with pytest.raises(UserError) as refused:
        open_tables(copies, ["task"])
    sentence = str(refused.value)
    section, _, name = key.rpartition(".")
    named = {"trainer.n_boot": "resamples is", "seed": "resamples is", "dense.test_split": "split is"}.get(key, f"{name} is")
    assert named in sentence and str(copies[0]) in sentence and str(copies[1]) in sentence


@pytest.mark.parametrize("case", EDITED)
def test_edited_and_damaged_runs_are_refused_by_name(case: str, copies: tuple[Path, Path]) -> None:
    change, named = EDITED[case]
    change(copies[1])
    with pytest.raises(UserError, match=re.escape(named)):
        open_tables(copies, ["task"])


def only(directory: Path, evaluation: str) -> None:
    """A run of one evaluation."""
    change_records(directory, lambda records: [r for r in records if r.get("question") == evaluation])
    drop_scores(directory, lambda line: line["evaluation"] == evaluation)
    change_config(directory, "dense.evaluations", [evaluation])


def test_runs_share_the_columns_that_both_have(copies: tuple[Path, Path]) -> None:
    only(copies[0], "overcluster")
    (table,) = open_tables(copies, ["task"])
    assert {key[0] for key in table.columns} == {"overcluster"}
    only(copies[1], "patch_class")
    with pytest.raises(UserError, match="share no column: the first has (overcluster|patch_class), the second (o|p)"):
        open_tables(copies, ["task"])
