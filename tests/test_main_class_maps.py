"""A folder of class maps alone goes through every mode and control that needs no identity; the others say what they lack."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from program import FIT, MODEL, Finished, run

SIDE, IGNORED = 96, 255
PRESETS = [*MODEL, *FIT, "model.layers=[embed,0]", "dataset=folder", f"dataset.ignore={IGNORED}", "trainer.batch_images=4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two coloured classes on grey; a strip of each is ignored."""
    root, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    (root / "data").mkdir()
    (root / "data" / "classes.txt").write_text("red\nblue\n")
    colors = np.array([[128, 128, 128], [220, 30, 30], [30, 30, 220]])
    for split, n in (("train", 6), ("val", 4), ("test", 4)):
        for kind in ("images", "class"):
            (root / "data" / kind / split).mkdir(parents=True)
        for number in range(n):
            classes = rng.integers(0, 3, (3, 3)).repeat(SIDE // 3, 0).repeat(SIDE // 3, 1)
            pixels = (colors[classes] + rng.normal(0, 8, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / "data" / "images" / split / f"{number}.png")
            classes[:16] = IGNORED  # the first of six rows of patches
            Image.fromarray(classes.astype(np.uint8)).save(root / "data" / "class" / split / f"{number}.png")
    return root


def short(folder: Path, *overrides: str) -> Finished:
    return run(folder, *PRESETS, f"dataset.root={folder}/data", *overrides)


def test_its_classes_are_fitted_and_scored_beside_the_controls(folder: Path, capsys: pytest.CaptureFixture) -> None:
    finished = short(folder, "mode=train_class", "controls=all", "protocol.selection.patches=all")
    of = lambda kind: [record for record in finished.records() if record["kind"] == kind]
    records = of("score")
    assert {record["question"] for record in records} == {"same_class", "class"}
    assert {record["name"] for record in records} == {"probe", "position", "pixels", "pixels_position"}
    accuracy = {r["n_patches"] for r in records if r["question"] == "class"}
    assert accuracy == {4 * 30}  # patches whose pixels are all ignored have no class
    assert finished.objective == max(
        r["metrics"]["accuracy"] for r in of("validation") if (r["name"], r["question"]) == ("probe", "class")
    )
    table = capsys.readouterr().out
    assert "class accuracy" in table and "of them one class" in table and "same object" not in table
    again = run(folder, "mode=eval", f"run={finished.dir}", "wandb.mode=disabled")
    assert again.objective == finished.objective


def test_it_is_checked_and_extracted(folder: Path) -> None:
    assert short(folder, "mode=check_data").records()
    written = {record["split"]: record["images"] for record in short(folder, "mode=extract").records()}
    assert written == {"train": 6, "val": 4, "test": 4}


@pytest.mark.parametrize("mode", ["train", "train_identity"])
def test_pairs_are_refused_in_one_sentence(folder: Path, mode: str) -> None:
    sentence = f"Folder has no maps of objects and mode={mode} needs them; name another dataset, or ask about classes"
    with pytest.raises(SystemExit, match=sentence):
        short(folder, f"mode={mode}")
