"""VOC, ADE20K's challenge, Cityscapes: trees in the published formats, odd and damaged files, the cut into splits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import TREES, VOC_LISTS, colour, save, stripes, voc
from PIL import Image
from test_datasets_check import check_data, config

from datasets.ade20k_challenge import Ade20kChallenge
from datasets.cityscapes import CLASSES, EVALUATED, Cityscapes
from datasets.scene import UnreadableScene, build
from datasets.voc import Voc
from errors import UserError

PUBLISHED = ["voc12", "ade20k_challenge", "cityscapes", "coco_things", "coco_stuff", "coco_all"]


def columns(label_map: torch.Tensor, n: int = 8) -> list[int]:
    """The values of n equal stripes, each of one value."""
    width = label_map.shape[1] // n
    parts = [label_map[:, i * width : (i + 1) * width] for i in range(n)]
    assert all(len(part.unique()) == 1 for part in parts)
    return [int(part[0, 0]) for part in parts]


# --------------------------------------------------------------------------------------------------------- the splits


@pytest.mark.parametrize("name", PUBLISHED)
def test_splits_are_cut_from_the_published_sets(name: str, tmp_path: Path) -> None:
    options = TREES[name](tmp_path)
    keys = {split: build(config(name, **options), split).keys for split in ("train", "val", "test")}
    assert all(names == sorted(names) for names in keys.values())
    assert not set(keys["train"]) & set(keys["val"])
    reported = {split: build(config(name, **options, validation="published"), split).keys for split in keys}
    assert reported["val"] == reported["test"] == keys["test"]
    assert reported["train"] == sorted(keys["train"] + keys["val"])
    other = build(config(name, **options, split_seed=1), "val").keys
    assert other != keys["val"] and set(other) <= set(reported["train"])
    few = build(config(name, **options, limit=2, validation="published"), "train").keys
    assert few == [reported["train"][0], reported["train"][len(reported["train"]) // 2]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_list_of_few_images(name: str, tmp_path: Path) -> None:
    options = TREES[name](tmp_path / "data")
    everything = build(config(name, **options, validation="published"), "train").keys
    chosen = everything[-1:0:-2]  # in any order
    stems = [key.rpartition("/")[2] for key in chosen]
    listed = tmp_path / "trainaug_128_42.txt"
    listed.write_text("\n".join(chosen) + "\n")
    if chosen == stems:
        assert build(config(name, **options, file_set=str(listed)), "train").keys == sorted(chosen)
        assert not set(build(config(name, **options, file_set=str(listed)), "val").keys) & set(chosen)
    listed.write_text(f"{stems[0]}\n{stems[0]}\n")
    with pytest.raises(UserError, match="line 2: .* stands in line 1 already"):
        build(config(name, **options, file_set=str(listed)), "train")
    listed.write_text("nobody\n")
    with pytest.raises(UserError, match=r"file_set=.*1 of its 1 names, first nobody, are no training image"):
        build(config(name, **options, file_set=str(listed)), "train")
    with pytest.raises(UserError, match="nowhere.txt is missing"):
        build(config(name, **options, file_set=str(tmp_path / "nowhere.txt")), "train")


@pytest.mark.parametrize("name", PUBLISHED)
def test_check_data_walks_it_and_names_every_bad_file(name: str, tmp_path: Path) -> None:
    options = {"root": "", **TREES[name](tmp_path / "data"), "validation": "published"}
    run, found, error = check_data(tmp_path, config(name, **options))
    assert error is None and all(facts["unreadable"] == [] for facts in found["splits"].values())
    assert found["splits"]["train"]["classes"]["present"] > 0
    data = build(config(name, **options), "train")
    for i, damage in enumerate((Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:60]), resize)):
        path = data.root / data._files(i)[-1 if damage is resize else 0]
        damage(path)
    _, found, error = check_data(tmp_path, config(name, **options))
    faults = found["splits"]["train"]["unreadable"]
    expected = 3 if name != "coco_things" else 2
    assert len(faults) == expected + (name == "coco_things"), faults
    assert "is missing" in faults[0][1] and "truncated or damaged" in faults[1][1]
    assert str(error).startswith("3 unreadable scenes, first ")
    assert check_data(tmp_path, config(name, **options, on_error="skip"))[2] is None


def resize(path: Path) -> None:
    Image.open(path).resize((8, 8), Image.Resampling.NEAREST).save(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_roots_that_are_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^dataset.root: got .*/nowhere, which is no folder; expected"):
        build(config(name, root=str(tmp_path / "nowhere")), "train")
    with pytest.raises(UserError, match=rf"{tmp_path}.*(expected|missing|has neither)"):
        build(config(name, root=str(tmp_path)), "train")
    with pytest.raises(UserError, match="expected a share between 0 and 1"):
        build(config(name, **TREES[name](tmp_path) | {"val_fraction": 1.5}), "train")
    with pytest.raises(UserError, match="dataset.split: got 'trainaug'"):
        build(config(name, **TREES[name](tmp_path / "two")), "trainaug")


# ---------------------------------------------------------------------------------------------------------------- VOC


@pytest.mark.parametrize("layout", ["official", "rearranged"])
def test_voc_values(layout: str, tmp_path: Path) -> None:
    voc(tmp_path, layout)
    data = Voc("train", root=tmp_path, validation="published")
    assert data.keys == VOC_LISTS["train"] and len(data.classes) == 21 and data.classes[15] == "person"
    image, labels, key = data[0]
    assert key == "2007_000000" and image.shape == (3, 12, 16)
    assert columns(labels["class"]) == [0, 15, 15, -1, 20, 0, 12, 3], "palette indices, void -1"
    if layout == "official":
        assert columns(labels["identity"]) == [0, 1, 2, -1, 3, 0, 4, 5]
    assert set(labels) == ({"class", "identity"} if layout == "official" else {"class"})
    assert not data[1].labels["class"].any(), "an image of background alone"
    assert data.report()["background_is_a_class"] and not data.report()["complete"]
    folder = data.root
    assert Voc("test", root=folder)[0].key == "2008_000001", "the inner folder may be named too"


def test_voc_trainaug_has_classes_alone_in_every_split(tmp_path: Path) -> None:
    voc(tmp_path)
    place = tmp_path / "VOCdevkit" / "VOC2012"
    with pytest.raises(UserError, match=r"ImageSets/Segmentation/trainaug.txt is missing"):
        Voc("train", root=tmp_path, train_set="trainaug")
    (place / "ImageSets/Segmentation/trainaug.txt").write_text("2007_000000\n2010_000001\n")
    for name in ("2007_000000", "2010_000001"):
        save(place / "JPEGImages" / f"{name}.jpg", colour(1))
        save(place / "SegmentationClassAug" / f"{name}.png", stripes([0, 7, 255, 20]))  # grey, not palette
    data = Voc("train", root=tmp_path, train_set="trainaug", validation="published")
    assert [columns(data[i].labels["class"], 4) for i in range(2)] == [[0, 7, -1, 20]] * 2
    assert set(data[0].labels) == set(Voc("test", root=tmp_path, train_set="trainaug")[0].labels) == {"class"}
    assert data.fingerprint() != Voc("train", root=tmp_path, validation="published").fingerprint()


@pytest.mark.parametrize(
    ("folder", "pixels", "reason"),
    [
        ("SegmentationClass", stripes([0, 21]), r"has value 21 \(row 0, column 8\), which is no class"),
        ("SegmentationClass", stripes([0, 254]), "has value 254"),
        ("SegmentationClass", stripes([0, 300], dtype=np.uint16), "has value 300"),
        ("SegmentationClass", colour(0), "is of mode RGB, expected one channel"),
        ("SegmentationClass", stripes([0, 1], (8, 16)), "is 16x8 pixels, its image 16x12"),
        ("SegmentationObject", stripes([0, 1], (12, 8)), "is 8x12 pixels, its image 16x12"),
    ],
)
def test_voc_masks_that_are_wrong(folder: str, pixels: np.ndarray, reason: str, tmp_path: Path) -> None:
    voc(tmp_path)
    save(tmp_path / "VOCdevkit/VOC2012" / folder / "2007_000000.png", pixels)
    with pytest.raises(UnreadableScene, match=f"^2007_000000: .*{folder}/2007_000000.png {reason}"):
        Voc("train", root=tmp_path, validation="published")[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe", "cannot be read"), (b"", "is empty"), (b"a\n..\n", "line 2: got '..'"), (b"a\0b\n", "line 1: got")],
)
def test_voc_lists_that_are_wrong(content: bytes, reason: str, tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"train.txt.*{reason}"):
        Voc("train", root=tmp_path)


# ------------------------------------------------------------------------------------------------- ADE20K's challenge


def test_ade20k_challenge_values(tmp_path: Path) -> None:
    options = TREES["ade20k_challenge"](tmp_path)
    data = Ade20kChallenge("test", **options)
    assert len(data.classes) == 151 and data.classes[:2] == ["other", "wall"]
    assert columns(data[1].labels["class"], 4) == [-1, 1, 150, 2] and set(data[1].labels) == {"class"}
    kept = Ade20kChallenge("test", **options, unlabelled="background")
    assert columns(kept[1].labels["class"], 4) == [0, 1, 150, 2] and kept.report()["background_is_a_class"]
    assert kept.fingerprint() != data.fingerprint()
    save(data.root / "annotations/validation/ADE_val_00000001.png", stripes([0, 151]))
    with pytest.raises(UnreadableScene, match="has value 151"):
        data[0]
    save(data.root / "annotations/validation/ADE_val_00000007.png", stripes([0, 1]))
    with pytest.raises(UnreadableScene, match="ADE_val_00000007: .*images/validation/ADE_val_00000007.jpg is missing"):
        Ade20kChallenge("test", **options)[2]
    (tmp_path / "full" / "images" / "ADE").mkdir(parents=True)
    with pytest.raises(UserError, match="is the full release of ADE20K"):
        Ade20kChallenge("test", root=tmp_path / "full")


# --------------------------------------------------------------------------------------------------------- Cityscapes


def test_cityscapes_values(tmp_path: Path) -> None:
    options = TREES["cityscapes"](tmp_path)
    data = Cityscapes("test", **options)
    assert len(CLASSES) == 20 == len(EVALUATED) + 1
    image, labels, key = data[0]
    assert key == "lindau/lindau_000000_000019"
    assert columns(labels["class"]) == [1, 14, 14, 12, -1, -1, 11, -1]
    assert columns(labels["identity"]) == [0, 2, 1, -1, -1, 3, 0, -1], "by instance id; a group and void have none"
    assert {name.partition("/")[0] for name in Cityscapes("train", **options).keys} <= {"aachen", "bochum"}
    mask = f"{data.root}/gtFine/val/{key}_gtFine_instanceIds.png"
    save(Path(mask), stripes([7, 26001, 26000, 25, 1, 29000, 23, 255], dtype=np.uint16))
    with pytest.raises(UnreadableScene, match="do not agree on the classes"):
        data[0]
    save(Path(mask), stripes([7, 99], dtype=np.uint16))
    with pytest.raises(UnreadableScene, match="has value 99, expected a label id"):
        data[0]
    save(Path(mask.replace("instanceIds", "labelIds")), stripes([7, 34]))
    with pytest.raises(UnreadableScene, match="has value 34"):
        data[0]
