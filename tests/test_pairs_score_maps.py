"""mode=vis: its files, which images and runs it takes, and what it says about those it cannot take."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from looking import FakeRun, encoded, finished_run, fitted_run, probe_stack
from PIL import Image
from safetensors.torch import load_file

from errors import UserError
from pairs.maps import auroc
from pairs.score_maps import find_scene, image_scores, maps_of, open_runs
from pairs.score_maps import run as run_vis
from store.index import build_dataset


@pytest.fixture
def finished(tmp_path: Path):
    return finished_run(tmp_path)


def look(finished, folder: Path, **vis):
    """Files by ending, the result, and what was said."""
    finished.cfg.vis.update(**vis)
    run = FakeRun(folder, finished.directory)
    result = run_vis(finished.cfg, run)
    return {path.suffix: path for path in folder.iterdir()}, result, run.said


def test_mode_vis_writes_strip_gif_numbers_and_facts_with_fixed_names(finished, tmp_path):
    first, result, _ = look(finished, tmp_path / "vis1")
    second, _, _ = look(finished, tmp_path / "vis2")
    assert set(first) == {".gif", ".json", ".png", ".safetensors"}
    assert len({path.stem for path in first.values()}) == 1 and first[".png"].name.startswith("test-001_w")
    for ending, path in first.items():
        assert path.read_bytes() == second[ending].read_bytes()
    facts, numbers = json.loads(first[".json"].read_text()), load_file(first[".safetensors"])
    assert facts["layers"] == ["embed", 0, 1] and facts["image_hw"] == [32, 80]
    assert [row["view"] for row in facts["rows"]] == ["probe", "cosine", "attention"]
    at = tuple(facts["anchor"][k] for k in ("window", "row", "column"))
    assert [float(s[at]) for s in numbers["0.patch_scores"]] == facts["rows"][0]["own_score"] == result["own_score"]
    assert numbers["0.maps"].shape == (3, 32, 80)
    assert bool((numbers["2.patch_scores"][2] == -1).all()) and facts["rows"][2]["own_score"][2] is None
    scene = build_dataset(finished.cfg, "test")[1]
    assert torch.equal(numbers["identity"], scene.labels["identity"])


def test_mode_vis_takes_an_anchor_and_a_folder(finished, tmp_path):
    run = FakeRun(tmp_path / "vis", finished.directory)
    finished.cfg.vis.update(pixel=[17, 60], gif=False, out=str(tmp_path / "here"), rows=["probe"])
    run_vis(finished.cfg, run)
    files = list((tmp_path / "here").iterdir())
    assert len(files) == 3 and not list(run.dir.iterdir())
    facts = json.loads(next(p for p in files if p.suffix == ".json").read_text())
    top, left, bottom, right = facts["box"]
    assert top <= 17 < bottom and left <= 60 < right
    assert sorted(run.said) == sorted(str(p) for p in files)


def test_several_images_and_anchors_have_a_sheet_and_a_page(finished, tmp_path):
    run = FakeRun(tmp_path / "vis", finished.directory)
    finished.cfg.vis.update(image=[0, "test-002"], anchors=2, rows=["probe"], gif=False, page=True)
    run_vis(finished.cfg, run)
    names = sorted(path.name for path in run.dir.iterdir())
    assert sum(name.endswith(".png") for name in names) == 5 and "sheet.png" in names and "explorer.html" in names


def test_a_picture_of_ones_own_needs_no_labels(finished, tmp_path):
    Image.new("RGB", (90, 41), (200, 30, 40)).save(tmp_path / "my photo.jpg")
    files, _, _ = look(finished, tmp_path / "vis", image=str(tmp_path / "my photo.jpg"))
    facts = json.loads(files[".json"].read_text())
    assert facts["key"] == "my photo" and facts["image_hw"] == [41, 90] and facts["rows"][0]["auroc"] == [None] * 3
    (tmp_path / "notes.jpg").write_text("no picture")
    with pytest.raises(UserError, match="notes.jpg is not a picture"):
        look(finished, tmp_path / "vis2", image=str(tmp_path / "notes.jpg"))


def test_best_and_worst_are_those_by_the_images_own_score(finished, tmp_path):
    runs = open_runs([finished.directory], finished.cfg)
    dataset, said = build_dataset(runs[0].cfg, "test"), []
    from activation import open_sample

    sample = open_sample(runs[0].cfg, "test", say=said.append)
    scores, layer = image_scores(runs[0], sample)
    best, worst = (find_scene(name, runs[0], dataset, "test", said.append) for name in ("best", "worst"))
    assert best.key == sample.keys[scores.index(max(scores))] and worst.key == sample.keys[scores.index(min(scores))]
    form, at = runs[0].forms()[runs[0].layers.index(layer)], sample.keys.index(best.key)
    x = sample.tokens.gather(torch.tensor([at]), [sample.tokens.layers.index(layer)])[0, 0].float()
    first, second = torch.triu_indices(len(x), len(x), 1)
    identity, valid = sample.labels["identity"][at], sample.labels["identity_valid"][at]
    used = valid[first] & valid[second]
    with torch.no_grad():
        mine = auroc(form.scores(x, x)[first, second][used].numpy(), (identity[first] == identity[second])[used].numpy())
    assert mine == pytest.approx(max(scores))


def test_runs_beside_share_the_backbone_and_add_rows(finished, tmp_path):
    other = finished.directory.with_name("toy-2")
    shutil.copytree(finished.directory, other)
    runs = open_runs([finished.directory, other], finished.cfg)
    assert runs[0].backbone is runs[1].backbone
    scene = build_dataset(runs[0].cfg, "test")[1]
    finished.cfg.vis.rows = ["probe"]
    maps = maps_of([encoded(run, scene) for run in runs], runs, finished.cfg.vis)
    assert [row.run for row in maps.rows] == ["toy-1", "toy-2"]
    assert torch.equal(maps.rows[0].patch_scores, maps.rows[1].patch_scores)


def test_runs_whose_patches_differ_are_not_shown_together(finished, tmp_path):
    other = finished.directory.with_name("toy-2")
    shutil.copytree(finished.directory, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("patch_size: 8", "patch_size: 16"))
    with pytest.raises(UserError, match=r"toy-2 has patches of 16 px in images of .* of 8 px"):
        open_runs([finished.directory, other], finished.cfg)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": 3}, r"vis.image=3, expected 0 … 2"),
        ({"image": "test-1"}, r"vis.image=test-1 is no file and no image of split test; keys look like test-000"),
        ({"image": []}, "vis.image is an empty list"),
        ({"image": 1.5}, "vis.image=1.5 is not understood"),
        ({"rows": ["probe", "heads"]}, "unknown row 'heads' in vis.rows; valid: probe, cosine, attention"),
        ({"rows": []}, "vis.rows is empty"),
        ({"anchor": "all"}, "unknown vis.anchor=all"),
        ({"beside": ["nowhere"]}, "nowhere is not a run directory"),
    ],
)
def test_mode_vis_names_what_is_missing(finished, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        look(finished, tmp_path / "vis", **settings)


def test_a_run_without_checkpoints_and_a_device_that_is_none_are_named(finished, tmp_path):
    finished.cfg.update(device="nonsense")
    with pytest.raises(UserError, match=r"device=nonsense is unknown, expected auto"):
        look(finished, tmp_path / "vis1")
    finished.cfg.update(device="cpu")
    for file in (finished.directory / "checkpoints/probe").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="holds no best checkpoint of probe"):
        look(finished, tmp_path / "vis2")


def test_scenes_of_codes_have_no_maps(tmp_path):
    run = fitted_run(tmp_path, [probe_stack("dot_product", [1], 16)], "dataset.codes=true")
    with pytest.raises(UserError, match="test-000 has no identity map"):
        find_scene(0, run, build_dataset(run.cfg, "test"), "test", print)
