"""mode=analyze end to end on a tiny run: tables, figures, and masks that dataset=folder reads back."""

import csv
from pathlib import Path

import pytest
import torch
from program import TINY, Finished, run

from datasets.folder import Folder

SMALL = [
    "wandb.mode=disabled",
    "analyze.images=2",
    "analyze.object_images=2",
    "analyze.val_images=2",
    "analyze.pair_images=4",
    "analyze.ranks=[2,8]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("analyze")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Finished:
    return run(folder, *TINY, "mode=train")


def table(finished: Finished, name: str) -> list[dict[str, str]]:
    with open(finished.dir / name, newline="") as file:
        return list(csv.DictReader(file))


def test_reading_writes_tables_figures_and_masks(folder: Path, trained: Finished) -> None:
    finished = run(folder, "mode=analyze", f"run={trained.dir}", f"analyze.compare=[{trained.dir}]", *SMALL)
    names = {path.name for path in finished.dir.iterdir()}
    assert {"factors.png", "components.png", "objects.png", "ranks.csv", "attention.csv", "objects_tried.csv"} <= names
    angles = table(finished, "angles.csv")
    assert [row["between"] for row in angles] == ["layers"] * 3 + ["seeds"] * 3 + ["runs"] * 3 + ["random"]
    assert all(float(row["overlap"]) > 0.999 for row in angles if row["between"] == "runs")
    kept = table(finished, "kept_rank.csv")
    assert {(row["layer"], row["rank"]) for row in kept if row["how"] == "truncated"} == {
        (layer, rank) for layer in ("embed", "0", "1") for rank in ("2", "8", "32")
    }
    assert [row["rank"] for row in kept if row["how"] == "refitted"] == ["2", "8"]
    methods = [row["method"] for row in table(finished, "objects.csv")]
    assert methods == ["spectral", "correlation", "k-means", "normalised cut", "true patches (ceiling)"] * 2
    means = table(finished, "objects_mean.csv")
    assert all(-1 <= float(row["mbo_low"]) <= float(row["mbo"]) <= float(row["mbo_high"]) <= 1 for row in means)
    masks = Folder("test", root=finished.dir / "objects")
    assert len(masks) == 2 and masks[0].image.shape == (3, 96, 96) and masks[0].labels["identity"].shape == (96, 96)


def test_intervening_writes_every_dose_and_dose_zero_is_no_intervention(folder: Path, trained: Finished) -> None:
    finished = run(
        folder, "mode=analyze", f"run={trained.dir}", "analyze.do=intervene", "analyze.layer=0", "analyze.doses=[0,1]", *SMALL
    )
    rows = table(finished, "interventions.csv")
    assert {row["layer"] for row in rows} == {"0", "1"} and (finished.dir / "interventions.png").exists()
    nothing = [row for row in rows if row["dose"] == "0.0" and row["layer"] == "1"]
    assert len(nothing) == 14 and len({(row["auroc"], row["class_accuracy"]) for row in nothing}) == 1
    assert {row["edit"] for row in rows} == {"remove", "shuffle", "inject", "swap", "knock out a head"}
    assert all(float(row["flips"]) == 0 for row in nothing if row["edit"] == "swap")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("analyze.do=guess", "unknown analyze.do=guess; valid: read, intervene"),
        ("analyze.layer=7", "analyze.layer=7: the run has layers embed, 0, 1"),
        ("analyze.compare=[/nowhere]", "/nowhere is not a run directory"),
    ],
)
def test_what_cannot_be_analysed_is_said(folder: Path, trained: Finished, setting: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(folder, "mode=analyze", f"run={trained.dir}", setting, *SMALL)


def test_a_probe_without_a_form_is_refused(folder: Path) -> None:
    torch.manual_seed(0)
    cosine = run(folder, *TINY, "mode=train", "probe.mode=cosine")
    with pytest.raises(SystemExit, match="mode=analyze reads the quadratic form of a probe"):
        run(folder, "mode=analyze", f"run={cosine.dir}", *SMALL)
