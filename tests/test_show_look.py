"""mode=show: what the contact sheet shows is what the index keeps and the scores count."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from looking import FakeRun
from omegaconf import OmegaConf
from toys import Toy, toy_config

from activation import build_dataset, open_sample
from backbones.load import backbone_facts
from errors import UserError
from pairs.scores import pair_strata
from patches.labels import PatchLabels
from show.look import BACKGROUND, UNUSED, Looked, draw_contact_sheet, label_colors, look_at, painted_patches, pair_kinds
from show.look import run as run_show
from store.labelled import LabelledItems


@pytest.fixture
def cfg(tmp_path: Path):
    cfg = toy_config(tmp_path, "dataset.n=3", "dataset.widths=[32,80]")
    cfg.show = {"split": "train", "images": 3}
    return cfg


def looked_at(cfg) -> list[Looked]:
    dataset = build_dataset(cfg, "train")
    items = LabelledItems(dataset, cfg.protocol, backbone_facts(cfg.model), whole_images=False)
    return [look_at(items, number) for number in range(len(dataset))]


def test_the_patches_shown_as_kept_are_those_that_will_be_measured(cfg):
    sample = open_sample(cfg, "train", say=lambda text: None)
    for image, position, identity in zip(looked_at(cfg), sample.position, sample.labels["identity"], strict=True):
        assert torch.equal(image.kept, position)
        assert torch.equal(image.labels["identity"].label[tuple(image.kept.T)].long(), identity.long())


def test_kinds_of_pairs_are_counted_as_the_scores_split_them():
    rng = torch.Generator().manual_seed(1)
    identity = torch.randint(0, 7, (1, 40), generator=rng)
    category = torch.where(identity > 0, identity % 3, 0)  # objects 3 and 6 have no class
    usable = torch.rand(1, 40, generator=rng) < 0.8
    counts = pair_strata(identity, category, usable).counts()
    shown = pair_kinds(identity[0], category[0], usable[0])
    expected = ("same_class_same_object", "same_class_different_object", "different_class", "class_unknown", "background")
    assert list(shown.values()) == [counts[kind] for kind in expected] and shown["class unknown"] > 0


def test_every_patch_is_painted_where_it_lies(cfg):
    image = looked_at(cfg)[1]
    number = torch.arange(image.owned.numel()).view(image.owned.shape).float() / image.owned.numel()
    picture = painted_patches(image, number[..., None].expand(*number.shape, 3))
    assert picture.shape == (32, 80, 3) and len(np.unique(picture[..., 0])) == int(image.owned.sum())


def test_labels_seven_apart_have_colours_of_their_own():
    label = torch.tensor([[[0, 1, 8, 15, 1, 0]]], dtype=torch.int32)
    valid = torch.tensor([[[True, True, True, True, True, False]]])
    colors = label_colors(PatchLabels(label, torch.ones(label.shape), valid))[0, 0]
    assert torch.equal(colors[1], colors[4]) and len(colors.unique(dim=0)) == 5  # background, three labels, not used
    assert colors[0].tolist() == pytest.approx(BACKGROUND) and colors[5].tolist() == list(UNUSED)


def test_the_sheet_has_a_row_of_five_panels_per_image(cfg):
    looked = looked_at(cfg)
    figure = draw_contact_sheet(looked, ["background", "thing"], "a line")
    assert len(figure.axes) == 15 and figure.texts[0].get_text() == "a line"
    assert figure.axes[5].get_title().endswith("windows") and figure.axes[0].get_title().endswith("1 window")
    kept = figure.axes[1].collections[0].get_offsets()
    assert len(kept) == int(looked[0].usable.sum())


def test_mode_show_writes_sheet_and_numbers(cfg, tmp_path):
    run = FakeRun(tmp_path / "run", None)
    result = run_show(cfg, run)
    facts = json.loads((run.dir / "contact_sheet.json").read_text())
    assert result["images"] == 3 and [image["key"] for image in facts["images"]] == ["train-000", "train-001", "train-002"]
    assert facts["images"][1]["windows"] == 3 and (run.dir / "contact_sheet.png").stat().st_size > 1000
    assert sum(sum(image["pairs"].values()) for image in facts["images"]) == sum(result["pairs"].values())


def test_what_cannot_be_shown_is_said(cfg, tmp_path):
    cfg.dataset.codes = True
    with pytest.raises(UserError, match="mode=show shows patches: .* these images have codes"):
        run_show(cfg, FakeRun(tmp_path / "codes", None))
    cfg.dataset.codes, cfg.dataset.unreadable = False, [1]
    run = FakeRun(tmp_path / "run", None)
    assert run_show(cfg, run)["images"] == 2
    assert run.said[0] == "left out: train-001: truncated file"
    items = LabelledItems(Toy("train", unreadable=[0]), OmegaConf.to_container(cfg.protocol), backbone_facts(cfg.model), False)
    assert look_at(items, 0) == "train-000: truncated file"
