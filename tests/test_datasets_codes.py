import hashlib
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets import priors, sampling, splits
from datasets.codes import Groups
from datasets.priors import count_subsets, uniform_up_to
from datasets.splits import split_codes, split_report
from errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "binding"


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def grid(*sizes: int) -> Groups:
    return Groups([[f"{g}{v}" for v in range(size)] for g, size in enumerate(sizes)])


def bits(text: str) -> np.ndarray:
    return np.array([int(c) for c in text], np.uint8)


def sha256(rows: list[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def all_object_codes(cells: int) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=cells)), np.uint8)


# ------------------------------------------------------------------------------------------------ groups, counting


def test_conjunctions_run_row_major_and_decode():
    groups = Groups([["red", "blue"], ["circle", "square", "star"]])
    assert (groups.n_features, groups.n_objects, groups.sizes) == (5, 6, (2, 3))
    assert groups.values.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    y = groups.object_code([(1, 2), (0, 1), (1, 2)])
    assert np.flatnonzero(y).tolist() == [1, 5]
    assert groups.feature_code(y).tolist() == [1, 1, 0, 1, 1]
    assert groups.decode_objects(y) == [("red", "square"), ("blue", "star")]
    assert groups.decode_features(groups.feature_code(y)) == [["red", "blue"], ["square", "star"]]
    with pytest.raises(UserError, match="none twice"):
        Groups([["red", "red"]])


def test_feature_code_of_four_groups_is_the_union_of_the_objects():
    groups = grid(3, 2, 2, 2)
    y = (np.random.default_rng(0).random((50, groups.n_objects)) < 0.1).astype(np.uint8)
    offsets = np.cumsum((0, *groups.sizes[:-1]))
    for row, f in zip(y, groups.feature_code(y), strict=True):
        expected = np.zeros(groups.n_features)
        for k in np.flatnonzero(row):
            expected[groups.values[k] + offsets] = 1
        assert np.array_equal(f, expected)
    assert np.array_equal(groups.counts(groups.feature_code(y))[0], groups.counts(groups.feature_code(y[0])))


@pytest.mark.parametrize("case", golden("combinatorics")["cases"], ids=lambda c: f"{c['a']},{c['k']}")
def test_counts_are_exact(case):
    assert count_subsets(case["a"], case["k"]) == int(case["N"])


@pytest.mark.parametrize("name", [k for k, v in golden("entropy").items() if isinstance(v, dict)])
def test_entropy_of_a_feature_code(name):
    block = golden("entropy")[name]
    groups = grid(*block["group_sizes"])
    prior = uniform_up_to(groups.sizes, block["max_objects"])
    f = np.stack([bits(case["F"]) for case in block["cases"]])
    counts = groups.counts(f)
    assert counts.tolist() == [case["a"] for case in block["cases"]]
    assert [prior.number(a) for a in counts.tolist()] == [int(case["count"]) for case in block["cases"]]
    entropy = prior.entropy(counts)
    assert np.allclose(entropy, [case["H_bits"] for case in block["cases"]], rtol=0, atol=1e-9)
    assert np.allclose(entropy.astype(np.float32), [case["H_float32_reference"] for case in block["cases"]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", golden("entropy")["population"], ids=lambda c: str(c["group_sizes"]))
def test_population_entropies(case):
    found = uniform_up_to(case["group_sizes"], case["max_objects"]).population()
    assert found["num_Y"] == int(case["num_Y"]) and found["num_F"] == case["num_F_with_nonzero_count"]
    for ours, theirs in (("H_Y", "H_Y_bits"), ("E_H_Y_given_F", "E_H_Y_given_F_bits"), ("H_F", "H_F_bits")):
        assert found[ours] == pytest.approx(case[theirs], abs=1e-9)
    assert found["acceptance"] == 1


def test_entropy_at_a_fixed_number_of_objects():
    for case in golden("entropy")["H_given_num_objects_7x7"]:
        assert priors.entropy_given_size((7, 7), case["k"]) == pytest.approx(case["H_bits"], abs=1e-9)
    with pytest.raises(UserError, match="two"):
        priors.entropy_given_size((2, 2, 2), 2)
    with pytest.raises(UserError, match="0 to 4"):
        priors.entropy_given_size((2, 2), 5)


@pytest.mark.parametrize("case", golden("entropy")["balanced"], ids=lambda c: f"{c['split_mode']}-{c['split']}")
def test_balanced_entropies(case):
    n, k = case["n_colors"], case["candidate_colors"]
    half = [row for row in itertools.product((0, 1), repeat=n) if sum(row) == k]
    candidates = np.array([a + b for a, b in itertools.product(half, half)], np.uint8)
    counts = (522, 131, 131) if case["split_mode"] == "f_ranked_three_way" else (None,) * 3
    names = ("train_count", "val_count", "test_count")
    support = split_codes(
        candidates,
        case["split"],
        mode=case["split_mode"],
        salt="balancedcolorshape_fsplit_v1",
        **dict(zip(names, counts, strict=True)),
    )
    found = priors.balanced((n, n), case["num_objects"]).population(support)
    assert found["num_F"] == case["split_F"] and found["num_Y"] == int(case["split_Y"])
    for name in ("H_F", "H_Y"):
        assert found[name] == pytest.approx(case[name], abs=1e-9)
    assert found["E_H_Y_given_F"] == pytest.approx(case["H_Y_given_F"], abs=1e-9)


@pytest.mark.parametrize(
    "prior",
    [
        priors.uniform_up_to((2, 3), 4),
        priors.fixed_size((2, 3), 3),
        priors.independent_draws((2, 3), 4),
        priors.empirical_sizes((2, 3), all_object_codes(6)[[0, 3, 7, 9, 20, 63]]),
    ],
    ids=lambda p: p.name,
)
def test_every_law_against_enumeration(prior):
    groups = grid(2, 3)
    y = all_object_codes(6)
    p = np.array([float(prior.weight.get(int(row.sum()), 0)) for row in y])
    p /= p.sum()
    f = groups.feature_code(y)
    keys = [row.tobytes() for row in f]
    mass = {key: p[[k == key for k in keys]].sum() for key in keys}

    def entropy(q):
        q = np.array([x for x in q if x > 0])
        return float(-(q * np.log2(q)).sum())

    expected = {}
    for key in mass:
        q = p[[k == key for k in keys]]
        expected[key] = entropy(q / q.sum()) if mass[key] > 0 else 0.0
    found = prior.entropy(groups.counts(f))
    assert np.allclose(found, [expected[key] for key in keys], atol=1e-9)
    population = prior.population()
    assert population["H_Y"] == pytest.approx(entropy(p), abs=1e-9)
    assert population["H_F"] == pytest.approx(entropy(mass.values()), abs=1e-9)
    assert population["H_Y"] == pytest.approx(population["H_F"] + population["E_H_Y_given_F"], abs=1e-9)


def test_independent_draws_is_the_law_of_drawing():
    rng = np.random.default_rng(0)
    draws = rng.integers(0, 6, (20000, 3))
    size = np.array([len(set(row)) for row in draws.tolist()])
    prior = priors.independent_draws((2, 3), 3)
    total = sum(math.comb(6, m) * w for m, w in prior.weight.items())
    for m, w in prior.weight.items():
        share = math.comb(6, m) * w / total
        assert abs((size == m).mean() - share) < 4 * math.sqrt(share * (1 - share) / len(size))


def test_entropies_of_many_scenes_take_no_time():
    groups = grid(8, 8)
    y = (np.random.default_rng(0).random((100_000, 64)) < 0.1).astype(np.uint8)
    counts = groups.counts(groups.feature_code(y))
    start = time.process_time()
    entropy = uniform_up_to(groups.sizes, 16).entropy(counts)
    assert time.process_time() - start < 1.0
    assert entropy.shape == (100_000,) and entropy.max() > 30


# ------------------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("block", golden("splits")["ranked"], ids=lambda b: str(b["total"]))
def test_ranked_split_byte_for_byte(block):
    config = block["config"]
    groups = grid(config["n_colors"], config["n_shapes"])
    candidates = groups.candidates()
    if config["candidate_colors_per_sample"]:
        wanted = [config["candidate_colors_per_sample"], config["candidate_shapes_per_sample"]]
        candidates = candidates[(groups.counts(candidates) == wanted).all(1)]
    assert len(candidates) == block["total"]
    for split, expected in block["splits"].items():
        rows = splits.bit_strings(
            split_codes(
                candidates,
                split,
                mode="f_ranked_three_way",
                salt=config["f_split_salt"],
                exclude_all_ones=config["exclude_all_ones_f"],
                **{f"{s}_count": config[f"f_split_{s}_count"] for s in splits.SPLITS},
            )
        )
        assert len(rows) == expected["count"]
        assert sha256(rows) == expected["sha256_rank_order"] and sha256(sorted(rows)) == expected["sha256_sorted"]
        assert rows[: len(expected["first_in_rank_order"])] == expected["first_in_rank_order"]


def test_hash_split_byte_for_byte_and_its_population():
    (block,) = golden("splits")["hash"]
    groups, salt = grid(7, 7), block["config"]["f_split_salt"]
    candidates = groups.candidates()
    assert len(candidates) == block["num_all_F"]
    prior, members = uniform_up_to(groups.sizes, 16), {}
    for split, expected in block["splits"].items():
        support = split_codes(candidates, split, mode="f_disjoint_hash", salt=salt, test_buckets="1, 0,1")
        members[split] = set(splits.bit_strings(support))
        assert len(support) == expected["count"]
        assert sha256(sorted(members[split])) == expected["sha256_sorted"]
        found = prior.population(support)
        assert found["acceptance"] == pytest.approx(expected["acceptance_probability_under_uniform_Y"], abs=1e-9)
        for ours, theirs in (("H_Y", "H_Y_bits"), ("E_H_Y_given_F", "E_H_Y_given_F_bits"), ("H_F", "H_F_bits")):
            assert found[ours] == pytest.approx(expected[theirs], abs=1e-9)
    for row in block["rows"]:
        assert int(splits.digest(salt, row["F"]), 16) % 10 == row["bucket"]
        assert {split: row["F"] in rows for split, rows in members.items()} == row["accept"]
    assert prior.population(split_codes(candidates, "test", mode="f_disjoint_hash", salt=salt, test_buckets=[0, 1]))[
        "largest_F_mass"
    ] == pytest.approx(0.7027, abs=5e-5)


def test_digest_of_the_worked_example():
    assert splits.digest("colorshape_fsplit_v1", "1" * 14) == "d85fd483c95d2d920883ed46034c5576f2e3ce59"


def test_three_disjoint_splits_with_validation_buckets():
    candidates = grid(4, 4).candidates()
    knobs = {"mode": "f_disjoint_hash", "salt": "x", "test_buckets": [0, 1], "val_buckets": "2,3"}
    parts = [set(splits.bit_strings(split_codes(candidates, split, **knobs))) for split in splits.SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(candidates)
    without = split_codes(candidates, "train", exclude_all_ones=True, **knobs)
    assert not without.all(1).any()


@pytest.mark.parametrize(
    ("knobs", "word"),
    [
        ({"mode": "random"}, "f_ranked_three_way"),
        ({"mode": "f_disjoint_hash", "test_buckets": [0], "val_buckets": [0, 1]}, "one split"),
        ({"mode": "f_disjoint_hash", "test_buckets": []}, "at least one bucket"),
        ({"mode": "f_disjoint_hash", "test_buckets": [10]}, "0 to 9"),
        ({"mode": "f_disjoint_hash", "test_buckets": "a"}, "whole numbers"),
        ({"mode": "f_disjoint_hash", "hash_mod": 1}, "at least 2"),
        ({"mode": "f_ranked_three_way", "train_count": 3, "val_count": 3, "test_count": 3}, "= 9, .* sum to the 10"),
        ({"mode": "f_ranked_three_way", "train_count": 12, "val_count": -1, "test_count": -1}, "at least 0"),
    ],
)
def test_split_mistakes_are_named(knobs, word):
    with pytest.raises(UserError, match=word):
        split_codes(grid(2, 2).candidates(), "train", **knobs)
    with pytest.raises(UserError, match="train, val, test"):
        split_codes(grid(2, 2).candidates(), "dev")


def test_split_report_says_what_is_not_comparable():
    groups, prior = grid(7, 7), uniform_up_to((7, 7), 16)
    rng, by_split = np.random.default_rng(0), {}
    for name, chance in (("train", 0.2), ("val", 0.2), ("test", 0.6)):
        y = (rng.random((400, 49)) < chance).astype(np.uint8)
        f = groups.feature_code(y)
        by_split[name] = {"object_code": y, "feature_code": f, "H_Y_given_F": prior.entropy(groups.counts(f))[:, None]}
    by_split["val"]["object_code"][:40] = by_split["train"]["object_code"][:40]
    report = split_report({k: {n: torch.from_numpy(a) for n, a in v.items()} for k, v in by_split.items()})
    assert report["splits"]["test"]["n"] == 400 and report["splits"]["test"]["largest_F_mass"] > 0.9
    assert report["overlap"]["val in train"]["Y"] >= 0.1 and report["overlap"]["test in train"]["Y"] == 0
    assert any("not comparable" in text for text in report["warnings"])
    assert any("one feature code" in text for text in report["warnings"])
    json.dumps(report)
    same = split_report({"train": by_split["train"], "test": by_split["train"]})
    assert same["warnings"] == [] and same["overlap"]["test in train"] == {"F": 1.0, "Y": 1.0}
    f = by_split["train"]["feature_code"]
    plug_in = [np.mean([(row == other).all() for other in f]) for row in f]
    assert report["splits"]["train"]["H_F"] == pytest.approx(-np.mean(np.log2(plug_in)))


# ---------------------------------------------------------------------------------------------------------- sampling


def test_words_do_not_depend_on_what_was_asked_beside_them():
    all_words = sampling.random_words(5, np.arange(100), 0, 40)
    assert np.array_equal(sampling.random_words(5, [17, 3], 8, 9), all_words[[17, 3], 8:17])
    assert len(np.unique(all_words)) == all_words.size
    u = sampling.unit(sampling.random_words(sampling.stream("a", 1), np.arange(20000), 0, 4))
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.size) and np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03


def test_uniform_law_is_sampled():
    prior = uniform_up_to((7, 7), 16)
    draw = sampling.draw_uniform(sampling.stream("test"), 49, 16)
    y, drawn = sampling.sample_until(20000, draw, lambda y: np.ones(len(y), bool), 20000, "")
    assert drawn == 20000
    weights = sampling.size_weights(49, 16)
    size = y.sum(1)
    for m in range(17):
        p = weights[m] / sum(weights)
        assert abs((size == m).mean() - p) <= 4 * math.sqrt(p * (1 - p) / 20000) + 1e-12
    full = grid(7, 7).feature_code(y).all(1).mean()
    assert abs(full - 0.38253) < 4 * math.sqrt(0.38253 * 0.61747 / 20000)
    assert np.abs(y.mean(0) - y.mean()).max() < 4 * math.sqrt(0.25 / 20000)  # every cell equally often
    found = prior.population()
    assert found["largest_F_mass"] == pytest.approx(0.38253, abs=5e-6)


def test_sampling_gives_up_with_a_sentence():
    draw = sampling.draw_uniform(1, 4, 4)
    with pytest.raises(UserError, match="giving up at 50; relax"):
        sampling.sample_until(10, draw, lambda y: np.zeros(len(y), bool), 50, "relax")
