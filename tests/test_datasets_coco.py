"""COCO: polygons, run lengths and crowds through pycocotools, pixel maps, merged and full classes, damaged annotations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_trees import COCO_SIZE, coco, coco_annotations, runs_of, save, stripes
from pycocotools import mask as coco_mask

from datasets.coco import Coco
from datasets.coco_masks import decode_mask, read_categories, read_instances
from datasets.scene import UnreadableScene
from errors import UserError

THINGS = ["accessory", "animal", "appliance", "electronic", "food", "furniture", "indoor", "kitchen", "outdoor", "person",
          "sports", "vehicle"]  # fmt: skip


def test_categories_are_those_of_coco() -> None:
    categories = read_categories()
    things, stuff = ([c for c in categories if c.kind == kind] for kind in ("thing", "stuff"))
    assert (len(things), len(stuff)) == (80, 91) and [c.id for c in stuff] == list(range(92, 183))
    assert sorted({c.supercategory for c in things}) == THINGS and len({c.supercategory for c in stuff}) == 15
    assert {c.id: c.name for c in categories}[18] == "dog" and len({c.name for c in categories}) == 171


def test_things_with_their_objects(tmp_path: Path) -> None:
    options = coco(tmp_path)
    data = Coco("test", **options)
    assert data.classes == ["unlabelled", *THINGS]
    image, labels, key = data[0]
    assert key == "000000000001" and image.shape == (3, *COCO_SIZE)
    classes, identity = torch.full(COCO_SIZE, -1), torch.zeros(COCO_SIZE, dtype=torch.long)
    classes[0:3], identity[0:3] = 10, -1  # the crowd lies below everything
    classes[2:10, 0:8], identity[2:10, 0:8] = 2, 3  # the dog has the last id; a crowd has no number
    for left in (2, 5):  # the cat in two pieces, smaller, on top
        identity[4:6, left : left + 2] = 2
    classes[9:11, 12:15], identity[9:11, 12:15] = 11, 1  # the kite
    assert torch.equal(labels["class"].long(), classes) and torch.equal(labels["identity"].long(), identity)
    empty = data[1].labels
    assert (empty["class"] == -1).all() and not empty["identity"].any(), "an image without objects"
    full = Coco("test", **options, merge=False, unlabelled="background")
    assert len(full.classes) == 81 and full.classes[1] == "person"
    assert {full.classes[v] for v in full[0].labels["class"].unique()} == {"unlabelled", "person", "dog", "cat", "kite"}
    assert full.fingerprint() != data.fingerprint()


def test_pixel_maps_of_things_and_stuff(tmp_path: Path) -> None:
    options = coco(tmp_path)
    things = Coco("test", **options, masks="pixelmaps")[0]
    assert set(things.labels) == {"class"}
    # values 0, 1, 90, 100, 200, 255, 62, 3: nothing, person, toothbrush, three times stuff, chair, car
    assert things.labels["class"][0, ::2].tolist() == [-1, 10, 7, -1, -1, -1, 6, 12]
    stuff = Coco("test", **options, labels="stuff")
    assert len(stuff.classes) == 16 and stuff.classes[1] == "building" and stuff.classes[-1] == "window"
    values = [stuff.classes[v] if v >= 0 else v for v in stuff[0].labels["class"][0, ::4].tolist()]
    assert values == [-1, "textile", -1, "solid"], "things and category 183 (other) are left out"
    assert len(Coco("test", **options, labels="stuff", merge=False).classes) == 92
    everything = Coco("test", **options, labels="all", merge=False)
    assert len(everything.classes) == 172
    names = {everything.classes[v] for v in everything[0].labels["class"].unique() if v >= 0}
    assert names == {"person", "dog", "cat", "kite", "banner", "wood"}
    assert len(Coco("test", **options, labels="all", merge=True).classes) == 28
    save(tmp_path / "annotations/val2017/000000000001.png", stripes([0, 12]))
    with pytest.raises(UnreadableScene, match="has value 12"):
        Coco("test", **options, masks="pixelmaps")[0]
    save(tmp_path / "annotations/stuff_annotations/stuff_val2017_pixelmaps/000000000001.png", stripes([0, 91]))
    with pytest.raises(UnreadableScene, match="has value 91"):
        stuff[0]
    with pytest.raises(UserError, match="labels=all, expected annotations"):
        Coco("test", **options, labels="all", masks="pixelmaps")


def test_folders_as_the_archives_unpack(tmp_path: Path) -> None:
    options = coco(tmp_path)
    for part in ("train2017", "val2017"):
        (tmp_path / "images" / part).rename(tmp_path / part)
    stuff = tmp_path / "annotations/stuff_annotations"
    for folder in list(stuff.iterdir()):
        folder.rename(tmp_path / "annotations" / folder.name)
    assert Coco("test", **options)[0].key == Coco("test", **options, labels="stuff")[0].key == "000000000001"


def test_masks_equal_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        size = tuple(int(n) for n in rng.integers(1, 40, 2))
        mask = (rng.random(size) < rng.random()).astype(np.uint8)
        packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
        for counts in (runs_of(mask), packed):
            assert np.array_equal(decode_mask({"size": list(size), "counts": counts}, *size), mask.astype(bool))
    assert not decode_mask([], 3, 4).any() and decode_mask([], 3, 4).shape == (3, 4)


def test_damaged_segmentations_never_reach_c() -> None:
    size, rng = list(COCO_SIZE), np.random.default_rng(0)
    packed = coco_mask.encode(np.asfortranarray((rng.random(COCO_SIZE) < 0.5).astype(np.uint8)))["counts"].decode()
    wrong = [
        [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [["a"] * 6], [[1, 2, 3, 4, 5, float("nan")]], [[0, 0, 1e9, 0, 1, 1]], [5], [None],
        {"size": size, "counts": [191]}, {"size": size, "counts": [-1, 193]}, {"size": size, "counts": [1.5, 190.5]},
        {"size": [16, 12], "counts": [192]}, {"size": size}, {"counts": [192]}, {"size": size, "counts": None},
        {"size": size, "counts": "\ud800"}, {"size": size, "counts": ""}, {"size": size, "counts": "oooooooooooooooo"}, {}, 5,
        {"size": size, "counts": [True, 191]}, {"size": [-1, 2], "counts": []},
    ]  # fmt: skip
    for _ in range(300):  # damaged compressed text either decodes to as many pixels or is refused
        i = int(rng.integers(len(packed)))
        wrong.append({"size": size, "counts": packed[:i] + chr(int(rng.integers(40, 120))) + packed[i + 1 :]})
    refused = 0
    for segmentation in wrong:
        try:
            assert decode_mask(segmentation, *COCO_SIZE).shape == COCO_SIZE
        except ValueError as error:
            refused += 1
            assert "polygon" in str(error) or "run lengths" in str(error)
    assert refused >= 200


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda c: c.pop("annotations"), "annotations missing"),
        (lambda c: c.update(images={}), r"images: got \{\}, expected a list"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), r"images\[0\].file_name: got '../x.jpg'"),
        (lambda c: c["images"][0].update(file_name="a\0.jpg"), r"images\[0\].file_name: got"),
        (lambda c: c["images"][0].update(file_name="\ud800.jpg"), r"images\[0\].file_name: got"),
        (lambda c: c["images"][1].update(id=1), r"images\[1\].id: got 1, expected every image once"),
        (lambda c: c["images"][0].update(height="12"), r"images\[0\].height: got '12', expected a whole number"),
        (lambda c: c["images"][0].update(width=0), r"images\[0\].width: got 0"),
        (lambda c: c["annotations"][2].update(category_id=12), r"annotations\[2\].category_id: got 12, expected a category"),
        (lambda c: c["annotations"][2].update(image_id=99), r"annotations\[2\].image_id: got 99"),
        (lambda c: c["annotations"][2].pop("segmentation"), r"annotations\[2\].segmentation missing"),
        (lambda c: c["annotations"][2].update(segmentation=3), r"annotations\[2\].segmentation: got 3, expected polygons"),
        (lambda c: c["annotations"][2].update(iscrowd=2), r"annotations\[2\].iscrowd: got 2"),
        (lambda c: c["annotations"][1].update(id=14), r"annotations\[1\].id: got 14, expected every annotation once"),
        (lambda c: c["annotations"].append(None), r"annotations\[4\]: got None, expected a table"),
        (lambda c: c["categories"][0].update(name="cat"), r"categories\[0\]: got .*, expected a category of COCO"),
    ],
)
def test_damaged_annotation_files_name_entry_and_key(change, place: str, tmp_path: Path) -> None:
    options = coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"instances_val2017.json: {place}") as caught:
        Coco("test", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff", b"5", b'{"categories": 5}'])
def test_files_that_are_no_annotations(data: bytes, tmp_path: Path) -> None:
    options = coco(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").write_bytes(data)
    with pytest.raises(UserError, match="instances_val2017.json"):
        Coco("test", **options)
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match="instances_val2017.json is missing; scripts/download_coco.sh says"):
        Coco("test", **options)


def test_damaged_masks_are_found_at_their_image(tmp_path: Path) -> None:
    options = coco(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = [[0, 1]]
    path.write_text(json.dumps(content))
    with pytest.raises(UnreadableScene, match=r"^000000000001: annotation 14 in .*/instances_val2017.json has a polygon"):
        Coco("test", **options)[0]
    content["images"][1]["height"] = 13
    path.write_text(json.dumps(content))
    with pytest.raises(UnreadableScene, match=r"in .*_val2017.json are of 16x13 pixels, 000000000002.jpg has 16x12"):
        Coco("test", **options)[1]


def test_annotations_are_kept_as_text(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 12, "width": 16} for i in range(20)]
    annotations = [{**a, "image_id": i} for i in range(20) for a in coco_annotations(i)]
    categories = {c.id: c for c in read_categories() if c.kind == "thing"}
    content = {"images": images, "annotations": annotations, "categories": [c._asdict() for c in categories.values()]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    objects = read_instances(tmp_path / "a.json", categories)
    assert len(objects) == 20 and all(isinstance(image.annotations, bytes) for image in objects.values())
