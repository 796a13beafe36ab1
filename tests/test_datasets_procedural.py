import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from datasets.painting import LOOKS
from datasets.procedural import Scenes
from datasets.scene import build
from errors import UserError

ROOT = Path(__file__).parents[1]


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1])


def test_config_builds_every_split_with_documented_shapes():
    config = OmegaConf.load(ROOT / "cfgs/dataset/scenes.yaml")
    for split, count in (("train", config.n_train), ("val", config.n_val), ("test", config.n_test)):
        scenes = build(config, split)
        assert len(scenes) == count
        image, labels, key = scenes[count - 1]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert set(labels) == {"identity", "class"}
        for label in labels.values():
            assert label.shape == (96, 96) and label.dtype == torch.int32
        assert split in key
        json.dumps([scenes.fingerprint(), scenes.info(), scenes.report()])
    assert scenes.classes == ["background", *LOOKS] and len(scenes.classes) == 9


def test_scene_depends_on_its_index_alone():
    forward, backward = Scenes("train", n_train=50), Scenes("train", n_train=1000)
    want = [forward[i] for i in range(12)]
    for i in reversed(range(12)):
        got = backward[i]
        assert got.key == want[i].key and torch.equal(got.image, want[i].image)
        assert all(torch.equal(got.labels[name], want[i].labels[name]) for name in got.labels)
    images, identity, category = backward.render_batch([7, 3, 3])
    for b, i in enumerate([7, 3, 3]):
        assert torch.equal(images[b], want[i].image)
        assert torch.equal(identity[b].int(), want[i].labels["identity"])
        assert torch.equal(category[b].int(), want[i].labels["class"])


def test_index_range_is_that_of_a_sequence():
    scenes = Scenes("val", n_val=3)
    assert len(list(iter(scenes))) == 3 and scenes[-1].key == scenes[2].key
    for index in (3, -4):
        with pytest.raises(IndexError):
            scenes[index]


def test_splits_and_seeds_are_disjoint():
    first = [Scenes(split)[0].image for split in ("pretrain", "train", "val", "test")]
    first += [Scenes("train", seed=1)[0].image, Scenes("train")[1].image]
    for i, a in enumerate(first):
        for b in first[:i]:
            assert not torch.equal(a, b)


def test_labels_belong_together_and_some_class_repeats():
    scenes = Scenes("train")
    counts, repeats, classes_seen, background = [], 0, set(), []
    for i in range(60):
        labels = scenes[i].labels
        identity, category = labels["identity"], labels["class"]
        assert torch.equal(identity == 0, category == 0)
        present = [k for k in identity.unique().tolist() if k > 0]
        of_object = [category[identity == k].unique().tolist() for k in present]
        assert all(len(c) == 1 for c in of_object), "an object has one class"
        kinds = [c[0] for c in of_object]
        classes_seen.update(kinds)
        counts.append(len(present))
        repeats += len(set(kinds)) < len(kinds)
        background.append(float((identity == 0).float().mean()))
    assert max(counts) <= 6 and np.mean(counts) > 3.5
    assert repeats >= 57  # a repeated object may be wholly hidden
    assert classes_seen == set(range(1, 9))
    assert 0.5 < np.mean(background) < 0.85


def test_colour_of_a_class_is_shared_but_not_equal():
    scenes = Scenes("train", inst_jitter=0.1, near=0.0)
    same, other = [], []
    for i in range(60):
        image, labels, _ = scenes[i]
        objects = []
        for k in range(1, 7):
            mask = labels["identity"] == k
            if mask.sum() > 150:
                objects.append((int(labels["class"][mask][0]), image[:, mask].float().mean(1)))
        for a in range(len(objects)):
            for b in range(a):
                alike = objects[a][0] == objects[b][0]
                (same if alike else other).append(float((objects[a][1] - objects[b][1]).norm()))
    assert 5 < np.mean(same) < 0.6 * np.mean(other)


@pytest.mark.parametrize("size", [64, 160, (64, 128), [128, 80]])
def test_any_size_and_shape(size):
    image, labels, _ = Scenes("test", size=size)[0]
    height, width = (size, size) if isinstance(size, int) else size
    assert image.shape == (3, height, width) and labels["identity"].shape == (height, width)
    assert labels["identity"].max() > 0


def test_objects_scale_with_the_picture():
    small, large = Scenes("test"), Scenes("test", size=192)
    for i in range(5):
        a, b = small[i].labels["identity"], large[i].labels["identity"][::2, ::2]
        assert (a == b).float().mean() > 0.97  # the same scene, twice as large


def test_noise_moves_the_picture_to_an_unrelated_scene_and_never_the_labels():
    levels = [0.0, 0.25, 0.5, 0.75, 1.0]
    scenes = [Scenes("test", noise=noise) for noise in levels]
    own = torch.zeros(len(levels))
    for i in range(12):
        items = [s[i] for s in scenes]
        for item in items:
            assert torch.equal(item.labels["identity"], items[0].labels["identity"])
        own += torch.tensor([correlation(items[0].image, item.image) for item in items]) / 12
        blend = 0.5 * items[0].image.float() + 0.5 * items[-1].image.float()
        assert (blend - items[2].image.float()).abs().max() <= 1
    assert own[0] > 0.999 and bool((own.diff() < 0).all()) and abs(own[-1]) < 0.2


def test_at_full_noise_edges_of_the_picture_tell_nothing_of_edges_of_objects():
    """Edge strength at true object borders, relative to elsewhere: above 1 with signal, about 1 without."""

    def contrast(noise: float) -> float:
        at, off = [], []
        for image, labels, _ in Scenes("test", noise=noise, n_test=80):
            grey, identity = image.float().mean(0), labels["identity"]
            edge = (grey[:, 1:] - grey[:, :-1]).abs()
            border = identity[:, 1:] != identity[:, :-1]
            at.append(float(edge[border].mean()))
            off.append(float(edge[~border].mean()))
        return float(np.mean(at) / np.mean(off))

    assert contrast(0.0) > 1.8
    # Objects prefer the middle in every scene, and so do edges: this prior is all that is left.
    assert 0.8 < contrast(1.0) < 1.25


def test_clip_shows_the_picture_between_its_past_and_future():
    scenes = Scenes("pretrain")
    clips = scenes.render_clip([5, 2])
    assert clips.shape == (2, 3, 3, 96, 96) and clips.dtype == torch.uint8
    assert torch.equal(clips[:, 0], scenes.render_batch([5, 2])[0])
    assert torch.equal(clips, scenes.render_clip([5, 2], episodes=3)[:, :3])
    assert torch.equal(clips[:1], scenes.render_clip([5]))
    images, identity, _ = scenes.render_batch(range(30))
    clips = scenes.render_clip(range(30))
    still = (clips[:, 1] == images).all(1) & (clips[:, 2] == images).all(1)
    assert still[identity == 0].float().mean() > 0.85  # the camera does not move; objects pass over some background
    assert 0.25 < still[identity > 0].float().mean() < 0.75  # about half of the objects rest


def test_fingerprint_names_what_matters():
    base = Scenes("train").fingerprint()
    for change in ({"noise": 0.5}, {"seed": 3}, {"objects": [4, 8]}, {"size": 64}, {"n_train": 7}, {"near": 0.1}):
        assert Scenes("train", **change).fingerprint() != base
    assert Scenes("train").fingerprint() == base


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"split": "dev"}, "pretrain, train, val, test"),
        ({"noise": 1.5}, "dataset.noise"),
        ({"objects": [1, 3]}, "dataset.objects"),
        ({"objects": 4}, "dataset.objects"),
        ({"radius": [20, 10]}, "dataset.radius"),
        ({"size": [96]}, "dataset.size"),
        ({"size": 4}, "dataset.size"),
        ({"n_train": 0}, "dataset.n_train"),
        ({"seed": -1}, "dataset.seed"),
        ({"inst_jitter": 0.9}, "dataset.inst_jitter"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_mistakes_are_named(knobs, word):
    with pytest.raises(UserError, match=word):
        Scenes(**{"split": "train", **knobs})
