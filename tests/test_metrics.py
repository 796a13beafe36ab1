"""Scores against brute force, published values, and the bootstrap's coverage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import UserError
from metrics.bootstrap import Estimate, difference, interval, mean_estimate, mean_over_seeds, ratio_estimate, resample
from metrics.segmentation import confusion_matrix, hungarian_matching, iou, many_to_one_matching, merge_predictions, miou
from pairs.scores import KINDS, PairScores, pair_strata, upper_pairs

GOLDEN = Path(__file__).parent / "golden"


def scored(logits: torch.Tensor, identity: torch.Tensor, threshold: float = 0.0, **labels) -> dict:
    scores = PairScores(pair_strata(identity, **labels), int(np.prod(logits.shape[:-3])), threshold)
    for start in range(0, len(identity), 2):
        images = torch.arange(start, min(start + 2, len(identity)))
        scores.add(images, logits[..., images, :, :])
    return scores.evaluate()


def grid_positions(n_images: int, h: int, w: int) -> torch.Tensor:
    row, col = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    place = torch.stack([torch.zeros(h * w, dtype=torch.long), row.flatten(), col.flatten()], 1)
    return place.expand(n_images, -1, -1)


def random_case(seed: int = 0, n_images: int = 6, h: int = 4, w: int = 5, fits: int = 3, rounded: bool = True):
    g = torch.Generator().manual_seed(seed)
    n = h * w
    identity = torch.randint(0, 6, (n_images, n), generator=g)
    class_ = (identity + 1) // 2
    valid = torch.rand(n_images, n, generator=g) > 0.15
    same = (identity[:, :, None] == identity[:, None]).float()
    logits = torch.randn(fits, n_images, n, n, generator=g) + same - 0.5
    if rounded:  # many ties, and scores that lie exactly on the threshold
        logits = (logits * 2).round() / 2
    return logits, identity, class_, valid, grid_positions(n_images, h, w)


def brute_auroc(scores: list[float], positive: list[bool]) -> tuple[float, int]:
    won, couples = 0.0, 0
    for a, pos in zip(scores, positive, strict=True):
        for b, other in zip(scores, positive, strict=True):
            if pos and not other:
                couples += 1
                won += 1.0 if a > b else 0.5 if a == b else 0.0
    return won, couples


def brute_average_precision(scores: list[float], positive: list[bool]) -> float:
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        called = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        now = sum(called) / sum(positive)
        total += (now - recall) * sum(called) / len(called)
        recall = now
    return total


def brute_pairs(logits, identity, class_, valid, position):
    """(image, i, j, score, same, kind, distance) by the definition, one pair at a time."""
    for m in range(len(identity)):
        for i in range(identity.shape[1]):
            for j in range(identity.shape[1]):
                if not (valid[m, i] and valid[m, j]):
                    continue
                a, b = int(identity[m, i]), int(identity[m, j])
                ca, cb = int(class_[m, i]), int(class_[m, j])
                if a == 0 or b == 0:
                    kind = "background"
                elif a == b:
                    kind = "same_class_same_object"
                elif ca == 0 and cb == 0:
                    kind = "class_unknown"
                else:
                    kind = "same_class_different_object" if ca == cb else "different_class"
                apart = float(((position[m, i] - position[m, j])[1:] ** 2).sum())
                yield m, i, j, float(logits[m, i, j]), a == b, kind, apart


MEMBERS = {
    "all": KINDS,
    "foreground": [k for k in KINDS if k != "background"],
    "same_class": ["same_class_same_object", "same_class_different_object"],
}


def test_every_metric_equals_brute_force():
    logits, identity, class_, valid, position = random_case()
    blocks = scored(logits, identity, class_=class_, valid=valid, position=position)
    for fit in range(len(logits)):
        pairs = list(brute_pairs(logits[fit], identity, class_, valid, position))
        for name, kinds in MEMBERS.items():
            inside = [p for p in pairs if p[5] in kinds]
            upper = [p for p in inside if p[1] < p[2]]
            s, y = [p[3] for p in upper], [p[4] for p in upper]
            right = lambda chosen: np.mean([(p[3] > 0) == p[4] for p in chosen])
            got = {key: float(e.value[fit]) for key, e in blocks[name].metrics.items()}
            won, couples = brute_auroc(s, y)
            hits, passed = [p[3] > 0 for p in upper if p[4]], [p[3] <= 0 for p in upper if not p[4]]
            expected = {
                "accuracy": right(upper),
                "accuracy_upper_diagonal": right([p for p in inside if p[1] <= p[2]]),
                "accuracy_all": right(inside),
                "balanced_accuracy": (np.mean(hits) + np.mean(passed)) / 2,
                "auroc": won / couples,
                "average_precision": brute_average_precision(s, y),
                "positive_rate": np.mean(y),
                "majority": max(np.mean(y), 1 - np.mean(y)),
            }
            assert got == pytest.approx(expected, abs=1e-12)
            images = len({p[0] for p in upper})
            assert blocks[name].counts == {"n_pairs": len(upper), "n_positive": sum(y), "n_images": images}
        same_class = [p for p in pairs if p[5] in MEMBERS["same_class"] and p[1] < p[2]]
        per_distance = [
            brute_auroc([p[3] for p in same_class if p[6] == d], [p[4] for p in same_class if p[6] == d])
            for d in {p[6] for p in same_class}
        ]
        expected = sum(won for won, _ in per_distance) / sum(couples for _, couples in per_distance)
        assert float(blocks["same_class_matched"].metrics["auroc"].value[fit]) == pytest.approx(expected, abs=1e-12)


def test_distance_bins_partition_the_pairs_and_equal_brute_force():
    logits, identity, class_, valid, position = random_case(1, h=6, w=6)
    blocks = scored(logits, identity, class_=class_, valid=valid, position=position)
    pairs = [p for p in brute_pairs(logits[0], identity, class_, valid, position) if p[1] < p[2]]
    for name in ("foreground", "same_class"):
        rows = blocks[name].distance
        assert sum(row["n_pairs"] for row in rows) == blocks[name].counts["n_pairs"]
        assert sum(row["n_positive"] for row in rows) == blocks[name].counts["n_positive"]
        for row in rows:
            high = np.inf if row["to"] is None else row["to"]
            inside = [p for p in pairs if p[5] in MEMBERS[name] and row["from"] <= np.sqrt(p[6]) < high]
            won, couples = brute_auroc([p[3] for p in inside], [p[4] for p in inside])
            assert len(inside) == row["n_pairs"]
            expected = won / couples if couples else np.nan
            assert float(row["auroc"].value[0]) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_pair_counts_of_a_four_by_four_label_map():
    # Two crates (1, 2), a star (3), an object without class (4) and one more (5), background 0.
    identity = torch.tensor([[1, 1, 2, 2], [1, 0, 0, 2], [3, 0, 4, 4], [3, 3, 5, 0]]).view(1, 16)
    class_ = torch.tensor([0, 7, 7, 9, 0, 0])[identity]
    # Sizes: background 4, object 1: 3, 2: 3, 3: 3, 4: 2, 5: 1.
    strata = pair_strata(identity, class_)
    same_object = 3 + 3 + 3 + 1 + 0
    expected = {
        "background": 6 + 4 * 12,
        "class_unknown": 2 * 1,
        "different_class": 3 * 6 + 3 * (6 + 3),  # star with both crates; the two without class with all three others
        "same_class_different_object": 3 * 3,
        "same_class_same_object": same_object,
    }
    assert strata.counts() == expected
    assert sum(expected.values()) == 16 * 15 // 2
    assert int(strata.same.sum()) == same_object + 6  # background with background is positive, as published
    valid = torch.ones(1, 16, dtype=torch.bool)
    valid[0, 0] = False  # one patch of object 1
    less = pair_strata(identity, class_, valid).counts()
    assert sum(less.values()) == 15 * 14 // 2
    assert less["same_class_same_object"] == same_object - 2
    assert less["same_class_different_object"] == 2 * 3


def test_an_object_whose_class_votes_differ_is_one_object():
    counts = pair_strata(torch.tensor([[1, 1, 2]]), torch.tensor([[5, 0, 5]])).counts()
    assert counts["same_class_same_object"] == 1
    assert counts["same_class_different_object"] == 1
    assert counts["different_class"] == 1  # class known against class not known: certainly not both of class 5


def test_without_classes_the_same_class_blocks_have_no_score():
    logits, identity, _, _, position = random_case(rounded=False)
    blocks = scored(logits, identity, position=position)
    assert torch.isfinite(blocks["foreground"].metrics["auroc"].value).all()
    assert torch.isnan(blocks["same_class"].metrics["auroc"].value).all()
    low, high = interval(blocks["same_class_matched"].metrics["auroc"], resample(6, 50))
    assert torch.isnan(low).all() and torch.isnan(high).all()


def test_an_image_without_objects_has_foreground_scores_of_nothing():
    logits, identity, class_, valid, position = random_case(fits=2)
    blocks = scored(logits, torch.zeros_like(identity), class_=class_ * 0, valid=valid, position=position)
    assert (blocks["all"].metrics["accuracy"].value > 0).all()
    assert blocks["foreground"].counts == {"n_pairs": 0, "n_positive": 0, "n_images": 0}
    for name in ("foreground", "same_class", "same_class_matched"):
        for estimate in blocks[name].metrics.values():
            assert torch.isnan(estimate.value).all() and not estimate.influence.any()


def test_distances_across_windows():
    position = torch.tensor([[[0, 0, 0], [0, 0, 3], [1, 0, 0]]])
    identity = torch.tensor([[1, 1, 1]])
    distance = pair_strata(identity, position=position).distance
    assert distance.tolist() == [[3.0, np.inf, np.inf]]
    offsets = torch.tensor([[[0.0, 0.0], [0.0, 7.5]]])
    assert pair_strata(identity, position=position, offsets=offsets).distance.tolist() == [[3.0, 7.5, 4.5]]


def test_distance_alone_is_worth_one_half_when_matched():
    _, identity, class_, valid, position = random_case(2, n_images=8, h=7, w=7)
    rows, columns = position[..., 1].float(), position[..., 2].float()
    blob = 1 + (rows // 4 * 2 + columns // 4).long()  # four compact objects: near patches are the same object
    distance = (position[:, :, None] - position[:, None])[..., 1:].float().norm(dim=-1)
    blocks = scored(-distance[None], blob, class_=torch.ones_like(blob), position=position)
    assert float(blocks["same_class"].metrics["auroc"].value) > 0.85
    assert float(blocks["same_class_matched"].metrics["auroc"].value) == 0.5
    for row in blocks["same_class"].distance:
        assert row["n_pairs"] > 0


def test_class_alone_is_worth_one_half_inside_a_class():
    _, identity, class_, valid, position = random_case(3)
    oracle = (class_[:, :, None] == class_[:, None]).float()
    blocks = scored(oracle[None], identity, 0.5, class_=class_, valid=valid, position=position)
    assert float(blocks["same_class"].metrics["auroc"].value) == 0.5
    assert float(blocks["same_class_matched"].metrics["auroc"].value) == 0.5
    assert float(blocks["all"].metrics["auroc"].value) > 0.8


def test_rank_scores_do_not_change_under_monotone_maps_nor_orders():
    logits, identity, class_, valid, position = random_case(4)
    labels = {"class_": class_, "valid": valid, "position": position}
    first = scored(logits, identity, **labels)
    shuffled, moved = torch.randperm(6), torch.randperm(identity.shape[1])
    symmetric = (logits + logits.mT) / 2
    again = scored(torch.sigmoid(logits.double()).float(), identity, 0.5, **labels)
    for name, block in first.items():
        for key in set(block.metrics) & {"auroc", "average_precision"}:
            torch.testing.assert_close(again[name].metrics[key].value, block.metrics[key].value, rtol=0, atol=1e-12)
    other = scored(
        symmetric[:, shuffled][..., moved][..., moved, :],
        identity[shuffled][:, moved],
        **{key: value[shuffled][:, moved] for key, value in labels.items()},
    )
    first = scored(symmetric, identity, **labels)
    for name, block in first.items():
        for key, estimate in block.metrics.items():
            got = other[name].metrics[key]
            torch.testing.assert_close(got.value, estimate.value, rtol=0, atol=1e-12)
            torch.testing.assert_close(got.influence, estimate.influence[:, shuffled], rtol=0, atol=1e-12)


def test_a_fit_alone_scores_as_in_the_stack():
    logits, identity, class_, valid, position = random_case(5)
    labels = {"class_": class_, "valid": valid, "position": position}
    stack = scored(logits.view(1, 3, *logits.shape[1:]), identity, **labels)
    alone = scored(logits[1:2], identity, **labels)
    for name, block in alone.items():
        for key, estimate in block.metrics.items():
            assert torch.equal(estimate.value, stack[name].metrics[key].value[1:2])


def test_the_published_pair_scores():
    for case in json.loads((GOLDEN / "object_binding/pairwise.json").read_text())["data"]:
        identity = torch.tensor([row for batch in case["batches"] for row in batch["labels"]])
        logits = torch.tensor([row for batch in case["batches"] for row in batch["logits"]])
        block = scored(logits[None], identity)["all"]
        value = {key: float(e.value) for key, e in block.metrics.items()}
        assert value["accuracy_upper_diagonal"] == case["repo"]["acc_triu_with_diag"]
        extra = case["extra"]
        assert value["accuracy"] == pytest.approx(extra["acc_triu_nodiag"], abs=1e-12)
        assert value["balanced_accuracy"] == pytest.approx(extra["balanced_acc"], abs=1e-12)
        assert value["majority"] == pytest.approx(extra["majority_baseline"], abs=1e-12)
        assert block.counts["n_pairs"] == extra["n_pairs_nodiag"]
        assert block.counts["n_positive"] == extra["pos_pairs"]
        target = (identity[:, :, None] == identity[:, None]).float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        first, second = upper_pairs(identity.shape[1])
        assert float(loss[:, first, second].mean()) == pytest.approx(extra["bce_nodiag"], abs=1e-5)
        assert float(loss.mean()) == pytest.approx(case["repo"]["bce_mean_all_NxN"], abs=1e-5)


def test_the_published_scores_of_label_agreement():
    for case in json.loads((GOLDEN / "object_binding/pointwise.json").read_text())["data"]:
        label = torch.tensor([row for batch in case["batches"] for row in batch["labels"]])
        argmax = torch.tensor([row for batch in case["batches"] for row in batch["argmax"]])
        agree = (argmax[:, :, None] == argmax[:, None]).float()
        block = scored(agree[None], label, 0.5)["all"]
        value = {key: float(e.value) for key, e in block.metrics.items()}
        extra = case["extra"]
        assert value["accuracy_upper_diagonal"] == pytest.approx(case["repo"]["pairwise_acc_triu_with_diag"], abs=1e-12)
        assert value["accuracy"] == pytest.approx(extra["acc_triu_nodiag"], abs=1e-12)
        assert value["balanced_accuracy"] == pytest.approx(extra["balanced_acc"], abs=1e-12)
        assert value["majority"] == pytest.approx(extra["majority_baseline"], abs=1e-12)
        assert (block.counts["n_pairs"], block.counts["n_positive"]) == (extra["n_pairs_nodiag"], extra["pos_pairs"])


def test_bad_scores_are_refused():
    logits, identity, *_ = random_case()
    scores = PairScores(pair_strata(identity), 3)
    with pytest.raises(ValueError, match="6 images were never added"):
        scores.evaluate()
    logits[1, 4, 0, 3] = torch.nan
    with pytest.raises(UserError, match="fit 1 are not finite on image 4"):
        scores.add(torch.arange(6), logits)
    with pytest.raises(UserError, match="no image has two valid patches"):
        pair_strata(identity, valid=torch.zeros_like(identity, dtype=torch.bool))


# Uncertainty


def test_influence_is_the_derivative_by_the_weight_of_an_image():
    # Every image 200 times, one of them once more: a finite difference.
    logits, identity, class_, valid, position = random_case(6, n_images=4, fits=1)
    labels = {"class_": class_, "valid": valid, "position": position}
    base = scored(logits, identity, **labels)
    times = 200
    for image in range(4):
        weights = torch.full((4,), times)
        weights[image] += 1
        index = torch.repeat_interleave(torch.arange(4), weights)
        more = scored(logits[:, index], identity[index], **{key: value[index] for key, value in labels.items()})
        for name, block in base.items():
            for key, estimate in block.metrics.items():
                slope = (more[name].metrics[key].value - estimate.value) * times
                torch.testing.assert_close(slope, estimate.influence[:, image], rtol=0.02, atol=2e-4)


def test_influences_sum_to_zero():
    logits, identity, class_, valid, position = random_case(7)
    for block in scored(logits, identity, class_=class_, valid=valid, position=position).values():
        for estimate in [*block.metrics.values(), *(row["auroc"] for row in block.distance)]:
            assert float(estimate.influence.sum(1).abs().max()) < 1e-10


def test_interval_equals_the_brute_force_bootstrap():
    logits, identity, class_, valid, position = random_case(8, n_images=60, h=3, w=4, fits=1, rounded=False)
    logits = logits + torch.randn(60, 1, 1)  # images differ in difficulty
    labels = {"class_": class_, "valid": valid, "position": position}
    counts = resample(60, 300, seed=3)
    blocks = scored(logits, identity, **labels)
    draws = {name: {key: [] for key in block.metrics} for name, block in blocks.items()}
    for row in counts:
        index = torch.repeat_interleave(torch.arange(60), row.long())
        again = scored(logits[:, index], identity[index], **{key: value[index] for key, value in labels.items()})
        for name, block in again.items():
            for key, estimate in block.metrics.items():
                draws[name][key].append(float(estimate.value))
    for name, block in blocks.items():
        for key, estimate in block.metrics.items():
            low, high = (float(end) for end in interval(estimate, counts))
            true_low, true_high = np.quantile(draws[name][key], [0.025, 0.975])
            width = true_high - true_low
            assert abs(low - true_low) < 0.12 * width and abs(high - true_high) < 0.12 * width, (name, key)


def dependent_sample(rng: np.random.Generator, n_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs whose scores share effects of their image."""
    n = 8
    identity = torch.from_numpy(rng.integers(1, 4, (n_images, n)))
    same = (identity[:, :, None] == identity[:, None]).float()
    strength, shift = torch.from_numpy(rng.normal(1.0, 1.0, (2, n_images, 1, 1))).float()
    noise = torch.from_numpy(rng.normal(size=(n_images, n, n))).float()
    return same * strength + shift + noise, identity


def test_the_image_bootstrap_covers_and_the_pair_bootstrap_does_not():
    rng = np.random.default_rng(0)
    logits, identity = dependent_sample(rng, 4000)
    truth = {key: float(e.value) for key, e in scored(logits[None], identity)["all"].metrics.items()}
    n_images, trials = 50, 150
    first, second = upper_pairs(identity.shape[1])
    n_pairs = n_images * len(first)
    units = {"image": resample(n_images, 300, seed=1), "pair": resample(n_pairs, 300, seed=1)}
    covered = {(unit, key): 0 for unit in units for key in ("auroc", "average_precision", "accuracy")}
    for _ in range(trials):
        logits, identity = dependent_sample(rng, n_images)
        # Every pair as an image of two patches: what taking pairs for independent amounts to.
        two = torch.stack([identity[:, first], identity[:, second]], -1).view(n_pairs, 2)
        flat = logits[:, first, second].reshape(n_pairs, 1, 1).expand(-1, 2, 2)
        for unit, (x, labels) in {"image": (logits, identity), "pair": (flat, two)}.items():
            scores = PairScores(pair_strata(labels), 1)
            scores.add(torch.arange(len(labels)), x[None])
            metric = scores.evaluate()["all"].metrics
            for key in ("auroc", "average_precision", "accuracy"):
                low, high = interval(metric[key], units[unit])
                covered[unit, key] += float(low) <= truth[key] <= float(high)
    for (unit, key), hits in covered.items():
        share = hits / trials
        assert 0.89 <= share <= 0.99 if unit == "image" else share < 0.8, (unit, key, share)


def test_paired_differences_are_narrower_and_seeds_are_averaged_inside_a_resample():
    rng = np.random.default_rng(1)
    logits, identity = dependent_sample(rng, 80)
    stack = torch.stack([logits, logits + 0.1 * torch.randn_like(logits), logits + 0.2 * torch.randn_like(logits)])
    auroc = scored(stack, identity)["all"].metrics["auroc"]
    counts = resample(80, 400)
    a, b = (Estimate(auroc.value[i : i + 1], auroc.influence[i : i + 1]) for i in (0, 1))
    low, high = interval(difference(a, b), counts, bounds=(-1.0, 1.0))
    alone = interval(a, counts)
    assert float(high - low) < 0.5 * float(alone[1] - alone[0])
    assert float(low) <= float(a.value - b.value) <= float(high)
    seeds = mean_over_seeds(Estimate(auroc.value.repeat(2), auroc.influence.repeat(2, 1)), 2)
    torch.testing.assert_close(seeds.value, auroc.value)
    torch.testing.assert_close(seeds.influence, auroc.influence)
    averaged = mean_over_seeds(auroc, 3)
    assert averaged.value.shape == (1,) and float(averaged.value) == pytest.approx(float(auroc.value.mean()))


def test_resamples_are_seeded_and_draw_as_many_images_as_there_are():
    counts = resample(17, 30, seed=5)
    assert torch.equal(counts, resample(17, 30, seed=5)) and not torch.equal(counts, resample(17, 30, seed=6))
    assert counts.shape == (30, 17) and bool((counts.sum(1) == 17).all())


def test_chosen_blocks_score_as_among_all():
    logits, identity, class_, valid, position = random_case(9)
    scores = PairScores(pair_strata(identity, class_, valid, position), 3)
    scores.add(torch.arange(6), logits)
    every = scores.evaluate()
    assert list(every) == ["all", "foreground", "same_class", "same_class_matched"]
    for names in (["all"], ["same_class_matched"], ["foreground", "same_class"]):
        chosen = scores.evaluate(names)
        assert list(chosen) == names
        for name in names:
            assert chosen[name].counts == every[name].counts
            for key, estimate in every[name].metrics.items():
                assert torch.equal(chosen[name].metrics[key].value, estimate.value)
                torch.testing.assert_close(chosen[name].metrics[key].influence, estimate.influence)


def test_ratio_estimate_of_nothing_is_undefined():
    estimate = ratio_estimate(torch.zeros(2, 3), torch.zeros(3))
    assert torch.isnan(estimate.value).all() and not estimate.influence.any()
    assert mean_estimate(torch.tensor([[0.0, 1.0, 1.0]])).value.tolist() == pytest.approx([2 / 3])


# Labels of patches and pixels


def test_matching_and_miou_equal_the_published_values():
    for case in json.loads((GOLDEN / "neco/miou.json").read_text())["cases"]:
        target, predicted = torch.tensor(case["gt"]), torch.tensor(case["pred"])
        n_classes = case["num_gt"]
        counts = confusion_matrix(target, predicted, n_classes, case["num_pred"])
        renamed = {
            "hungarian": hungarian_matching(counts),
            "many_to_one_iou": many_to_one_matching(counts),
            "many_to_one_precision": many_to_one_matching(counts, "precision"),
            "direct": torch.arange(case["num_pred"]),
        }
        for mode, expected in case["results"].items():
            merged = merge_predictions(counts, renamed[mode])
            assert miou(merged, absent="zero") == pytest.approx(expected["neco_miou"], abs=1e-8)
            assert merged.diagonal().tolist() == expected["tp"]
            assert (merged.sum(0) - merged.diagonal()).tolist() == expected["fp"]
            assert (merged.sum(1) - merged.diagonal()).tolist() == expected["fn"]
            assert iou(merged).diagonal().tolist() == pytest.approx(expected["iou"], abs=1e-8)


def test_miou_of_absent_classes_and_lost_predictions():
    counts = confusion_matrix(torch.tensor([0, 0, 1, 255, -1]), torch.tensor([0, 1, 1, 0, 2]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert miou(counts) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert miou(counts, absent="zero") == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    with pytest.raises(ValueError, match=r"0 … 5, expected 0 … 2"):
        confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 5]), 3)
