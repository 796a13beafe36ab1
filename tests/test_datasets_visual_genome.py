import inspect
import itertools
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from datasets.arrangements import arrangement_entropy
from datasets.scene import UnreadableScene, build
from datasets.visual_genome import VisualGenome
from errors import UserError

ROOT = Path(__file__).parent.parent
GOLDEN = json.loads((ROOT / "tests/golden/binding/vg.json").read_text())
FIXTURE = GOLDEN["dataset_fixture"]
KNOBS = {"n_train": 8, "n_val": 2, "n_test": 4}


@pytest.fixture
def root(tmp_path):
    """The tree of the golden file, with tiny photographs."""
    folder = tmp_path / "deprecated" / "meta_filtered_color_coco"
    folder.mkdir(parents=True)
    (folder / "vg_stats_filtered_color.json").write_text(json.dumps(FIXTURE["stats_file"]))
    (folder / "attributes_filtered_color.json").write_text(json.dumps(FIXTURE["metadata_file"]))
    (tmp_path / "VG_100K_2").mkdir()
    for record in FIXTURE["metadata_file"]:
        Image.new("RGB", (9, 7), (record["image_id"], 0, 0)).save(tmp_path / f"VG_100K_2/{record['image_id']}.jpg")
    return tmp_path


def brute_force(pairs, log_p):
    """Entropies over sequences and over object codes, by listing every arrangement."""
    weights, merged = {}, Counter()
    classes = [c for c, _ in pairs]
    for order in set(itertools.permutations([a for _, a in pairs])):
        w = math.exp(sum(log_p[c, a] for c, a in zip(classes, order, strict=True)))
        weights[order] = w
        merged[frozenset(zip(classes, order, strict=True))] += w

    def entropy(values):
        p = np.array(list(values))
        p = p[p > 0] / p.sum()
        return float(-(p * np.log2(p)).sum())

    return entropy(weights.values()), entropy(merged.values())


def test_constants_of_the_golden_cases(tmp_path):
    for case in GOLDEN["cases"]:
        kind = case["attribute_key"].removeprefix("attributes_")
        folder = tmp_path / case["name"] / "deprecated" / f"meta_filtered_{kind}_top50"
        folder.mkdir(parents=True)
        table = {
            category: dict(zip(case["attributes"], row, strict=True))
            for category, row in zip(case["categories"], case["conj_counts"], strict=True)
        }
        name = "color" if kind == "color" else "topk"
        stats = {
            "selected_object_classes": case["categories"],
            f"selected_{kind}_attributes": case["attributes"],
            f"object_to_{name}_attribute_occurrences": table,
        }
        record = {"image_id": 1, "image_url": "h/VG_100K/1.jpg", "attributes": case["objects"]}
        (folder / f"vg_stats_filtered_{kind}.json").write_text(json.dumps(stats))
        (folder / f"attributes_filtered_{kind}.json").write_text(json.dumps([record]))
        data = VisualGenome(
            "train", attributes=kind, root=str(tmp_path / case["name"]), metadata_split="top50", n_train=1, n_val=0, n_test=0
        )
        assert data.classes == [case["categories"], case["attributes"]]
        assert data.object_code[0].tolist() == case["Y"] and data.feature_code[0].tolist() == case["F"]
        assert np.flatnonzero(data.object_code[0]).tolist() == case["Y_active"]
        assert data.entropies["vg_assignment"][0] == pytest.approx(case["H_bits"], abs=1e-7)
        if case["alternative_H_over_distinct_Y"] is not None:
            assert data.entropies["vg_merged"][0] == pytest.approx(case["alternative_H_over_distinct_Y"], abs=1e-7)


@pytest.mark.parametrize("kind", ["color", "topattr"])
def test_a_file_with_both_tables_is_read_by_its_own_kind(tmp_path, kind):
    folder = tmp_path / "deprecated" / f"meta_filtered_{kind}_coco"
    folder.mkdir(parents=True)
    times = {"color": 5, "topk": 7}
    stats = {"selected_object_classes": ["car"], f"selected_{kind}_attributes": ["red"]}
    stats |= {f"object_to_{name}_attribute_occurrences": {"car": {"red": n}} for name, n in times.items()}
    record = {"image_id": 1, "image_url": "h/VG_100K/1.jpg"}
    record["attributes"] = [{"object_class": "car", f"attributes_{kind}": ["red"]}]
    (folder / f"vg_stats_filtered_{kind}.json").write_text(json.dumps(stats))
    (folder / f"attributes_filtered_{kind}.json").write_text(json.dumps([record]))
    data = VisualGenome("train", attributes=kind, root=str(tmp_path), n_train=1, n_val=0, n_test=0)
    assert data.counts.sum() == times["color" if kind == "color" else "topk"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_golden_fixture(root, split):
    data, expected = VisualGenome(split, root=str(root), **KNOBS), FIXTURE["splits"][split]
    assert data.classes == FIXTURE["feature_groups"]
    assert data.counts.tolist() == FIXTURE["conjunction_counts"]
    assert data.image_ids == expected["image_ids"]
    assert [np.flatnonzero(y).tolist() for y in data.object_code] == expected["Y_active"]
    assert np.allclose(data.entropy, expected["H_bits_float32"], atol=1e-5)
    assert data.info()["H_Y_given_F"] == pytest.approx(expected["mean_H"], abs=1e-5)
    image, labels, key = data[1]
    assert image.shape == (3, 7, 9) and image.dtype == torch.uint8 and key == f"VG_100K_2/{data.image_ids[1]}"
    assert labels["object_code"].dtype == torch.uint8 and labels["H_Y_given_F"].shape == (1,)
    assert abs(int(image[0, 0, 0]) - data.image_ids[1]) < 4
    assert data.report()["approximated_images"] == 0
    json.dumps([data.fingerprint(), data.report(), data.info(), data.details(0)])


def test_entropies_against_listing_every_arrangement():
    rng = np.random.default_rng(0)
    log_p = np.log(rng.gamma(0.5, size=(4, 4)) + 1e-12)
    for trial in range(60):
        n = int(rng.integers(1, 8))
        pairs = [(int(rng.integers(0, 1 + trial % 4)), int(rng.integers(0, 4))) for _ in range(n)]
        found = arrangement_entropy(pairs, log_p)
        assert (found.assignment, found.merged) == pytest.approx(brute_force(pairs, log_p), abs=1e-9)
        assert found.assignment_exact and found.merged_exact


@pytest.mark.parametrize(
    ("classes", "attributes"),
    [
        ((3, 3), (3, 3)),
        ((4, 3, 1), (4, 4)),
        ((4, 3, 1), (5, 3)),
        ((4, 3, 1), (4, 3, 1)),
        ((3, 3, 2), (3, 3, 2)),
        ((3, 3, 2), (3, 3, 1, 1)),
    ],
)
def test_object_codes_with_more_than_one_table(classes, attributes):
    rng = np.random.default_rng(1)
    log_p = np.log(rng.random((4, 4)))
    names = [[i for i, k in enumerate(side) for _ in range(k)] for side in (classes, attributes)]
    pairs = list(zip(*names, strict=True))
    found = arrangement_entropy(pairs, log_p)
    assert (found.assignment, found.merged) == pytest.approx(brute_force(pairs, log_p), abs=1e-9)
    bound = arrangement_entropy(pairs, log_p, merge_limit=3)
    assert not bound.merged_exact and bound.merged >= found.merged and bound.assignment == found.assignment


def test_forced_improbable_pairs_do_not_underflow():
    p = np.full((30, 30), 1e-12)
    p[:, 0] = 1.0  # everything but the first attribute is next to impossible, and 29 of 30 objects must take it
    pairs = [(i, i if i < 5 else 5) for i in range(30)]
    found = arrangement_entropy(pairs, np.log(p))
    ways = math.log2(math.factorial(30) / math.factorial(25))
    assert found.assignment_exact and found.assignment == pytest.approx(ways, abs=1e-6)


def test_the_programme_is_bounded():
    rng = np.random.default_rng(0)
    log_p = np.log(rng.random((40, 40)))
    wide = [(i, i) for i in range(40)]  # 2^40 states: 20 distinct attributes made the published recursion 10^6
    start = time.process_time()
    found = arrangement_entropy(wide, log_p)
    assert time.process_time() - start < 1 and not found.assignment_exact and not found.merged_exact
    assert found.assignment == pytest.approx(math.lgamma(41) / math.log(2))
    one_sided = [(i % 2, i) for i in range(28)]  # many attributes, two categories: cheap the other way round
    found = arrangement_entropy(one_sided, log_p)
    assert found.assignment_exact and found.merged <= found.assignment
    small = [(0, 0), (1, 1), (2, 2)]
    exact, bound = arrangement_entropy(small, log_p), arrangement_entropy(small, log_p, budget=0)
    assert exact.assignment <= bound.assignment and exact.merged <= bound.merged


def test_approximated_images_are_counted(root):
    data = VisualGenome("train", root=root, budget=0, **KNOBS)
    exact = VisualGenome("train", root=root, **KNOBS)
    report = data.report()
    assert report["approximated_images"] == report["approximated_images_vg_assignment"] == 4
    assert report["warnings"] == ["H(Y|F) of 4 of 8 images is only an upper bound; raise dataset.budget"]
    assert (data.entropy >= exact.entropy - 1e-6).all()


def test_priors_and_statistics_are_named(root):
    merged = VisualGenome("test", root=root, prior="vg_merged", **KNOBS)
    assert merged.prior_name == "vg_merged" and merged.report()["prior"] == "vg_merged"
    info = merged.info()
    assert info["H_Y_given_F"] == info["H_Y_given_F_vg_merged"] < info["H_Y_given_F_vg_assignment"]
    train = VisualGenome("test", root=root, statistics="train", **KNOBS)
    pairs = [(o["object_class"], o["attributes_color"][0]) for r in FIXTURE["metadata_file"][:8] for o in r["attributes"]]
    for (c, category), (a, attribute) in itertools.product(*(enumerate(group) for group in train.classes)):
        assert train.counts[c, a] == pairs.count((category, attribute))
    prints = [d.fingerprint() for d in (merged, train, VisualGenome("test", root=root, **KNOBS))]
    assert prints[0] != prints[1] != prints[2] != prints[0]


def test_split_file(root):
    folder = root / "deprecated/meta_filtered_color_coco"
    listed = {"train": list(range(119, 107, -1)), "val": [100, 101], "test": [102, 103, 104, 999]}
    (folder / "split_dataset.json").write_text(json.dumps(listed))
    kept = list(range(108, 120))  # file order, then permuted with the seed and cut
    data = VisualGenome("train", root=root, **KNOBS)
    assert data.image_ids == [kept[i] for i in np.random.default_rng(0).permutation(12)[:8]]
    test = VisualGenome("test", root=root, n_train=None, n_val=None, n_test=None, seed=3)
    assert test.image_ids == [[102, 103, 104][i] for i in np.random.default_rng(5).permutation(3)]
    (folder / "split_dataset.json").write_text(json.dumps({"train": []}))
    with pytest.raises(UserError, match="val missing"):
        VisualGenome("val", root=root, **KNOBS)
    with pytest.raises(UserError, match="none of the 20 images"):
        VisualGenome("train", root=root, **KNOBS)


def test_environment(root, tmp_path, monkeypatch):
    monkeypatch.setenv("VG_DATA_DIR", str(root))
    assert VisualGenome("val", **KNOBS)[0].image.shape == (3, 7, 9)
    monkeypatch.setenv("VG_IMG_ROOT", str(tmp_path / "elsewhere"))
    with pytest.raises(UnreadableScene, match=r"elsewhere/VG_100K_2/108\.jpg is missing"):
        VisualGenome("val", **KNOBS)[0]


def test_mistakes_are_named(root):
    folder = root / "deprecated/meta_filtered_color_coco"
    with pytest.raises(UserError, match=r"vg_stats_filtered_topattr\.json is missing.*VG_DATA_DIR"):
        VisualGenome("train", attributes="topattr", root=root, **KNOBS)
    with pytest.raises(UserError, match="attributes"):
        VisualGenome("train", attributes="size", root=root)
    with pytest.raises(UserError, match="without split_dataset"):
        VisualGenome("train", root=root, n_train=None)
    with pytest.raises(UserError, match="none of the 20 images"):
        VisualGenome("test", root=root, n_train=16, n_val=4)
    records = json.loads((folder / "attributes_filtered_color.json").read_text())
    del records[3]["attributes"][1]["object_class"]
    (folder / "attributes_filtered_color.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"attributes_filtered_color\.json: \[3\]\.attributes\[1\]\.object_class missing"):
        VisualGenome("train", root=root, **KNOBS)
    (folder / "attributes_filtered_color.json").write_text("{}")
    with pytest.raises(UserError, match="got {}, expected a list"):
        VisualGenome("train", root=root, **KNOBS)
    (folder / "vg_stats_filtered_color.json").write_text('{"selected_object_classes": ["a"]}')
    (folder / "attributes_filtered_color.json").write_text("[]")
    with pytest.raises(UserError, match=r"vg_stats_filtered_color\.json: selected_color_attributes missing"):
        VisualGenome("train", root=root, **KNOBS)
    (folder / "vg_stats_filtered_color.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        VisualGenome("train", root=root, **KNOBS)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("vg_stats", lambda s: s.update(selected_object_classes="car"), "selected_object_classes: got 'car', expected a list"),
        ("vg_stats", lambda s: s.update(selected_object_classes=[]), r"selected_object_classes: got \[\]"),
        (
            "vg_stats",
            lambda s: s.update(selected_object_occurrences={"car": "x"}),
            r"occurrences.car: got 'x'",
        ),
        (
            "vg_stats",
            lambda s: s.update(object_to_color_attribute_occurrences=[1]),
            r"occurrences: got \[1\]",
        ),
        (
            "vg_stats",
            lambda s: s["object_to_color_attribute_occurrences"].update(z=3),
            r"occurrences.z: got 3",
        ),
        ("attributes", lambda s: s[1].update(attributes=None), r"\[1\].attributes: got None, expected a list"),
        (
            "attributes",
            lambda s: s[0]["attributes"][0].update(attributes_color=None),
            r"\[0\].attributes_color: got",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_names_file_and_place(root, file, change, said):
    path = next((root / "deprecated/meta_filtered_color_coco").glob(f"{file}_filtered_color.json"))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{path.name}: .*{said}"):
        VisualGenome("train", root=root, **KNOBS)


@pytest.mark.parametrize("name", ["vgcolor", "vgtopattr"])
def test_config_files_state_the_defaults(name):
    config = OmegaConf.load(ROOT / f"cfgs/dataset/{name}.yaml")
    parameters = inspect.signature(VisualGenome.__init__).parameters
    assert set(config) - {"_target_"} == set(parameters) - {"self", "split"}
    changed = {key for key in config if key != "_target_" and config[key] != parameters[key].default}
    assert changed == ({"attributes"} if name == "vgtopattr" else set())
    with pytest.raises(Exception, match="is missing"):
        build(OmegaConf.merge(config, {"root": "/nowhere"}), "train")
