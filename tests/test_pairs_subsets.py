"""Reference values of every subset of pairs, by brute force from the definitions; no code is shared with `pair_strata`.

A pair is two different, valid patches of one image, counted once. Definitions of the subsets:

    all                 every pair
    foreground          both patches lie on objects (identity above 0)
    same_class          both lie on objects: on one object, or on two objects of one known class (above 0)
    same_class_matched  the same pairs; only pairs at one distance are compared with each other
"""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from activation import PatchSample
from pairs.scores import PairScores, pair_strata
from pairs.task import Pairwise
from tasks import Batch

IMAGES, TOKENS, FITS = 5, 9, 2
SUBSETS = ("all", "foreground", "same_class", "same_class_matched")


def world(seed):
    """Labels with every kind of patch: background, invalid, objects without a class, one object with two class votes."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda high: torch.randint(0, high, (IMAGES, TOKENS), generator=rng)
    identity, votes, valid = draw(5), draw(4), torch.rand(IMAGES, TOKENS, generator=rng) > 0.15
    class_ = torch.where(identity > 0, (identity + votes // 3) % 3, 0)  # classes 0 (unknown), 1, 2; votes differ in an object
    place = torch.stack([draw(3), draw(3)], -1).float()
    scores = torch.randint(-3, 4, (FITS, IMAGES, TOKENS, TOKENS), generator=rng).float()  # many ties, not symmetric
    return identity, class_, valid, place, scores


ORDERS = {  # which (i, j) the three accuracies count
    "accuracy": itertools.combinations,
    "accuracy_upper_diagonal": itertools.combinations_with_replacement,
    "accuracy_all": lambda tokens, n: itertools.product(tokens, repeat=n),
}


def pairs_of(subset, identity, class_, valid, place, scores, image_weights=None, order="accuracy"):
    """(positive, score, squared distance, weight) of every pair of a subset, straight from the definitions."""
    listed = []
    for m in range(IMAGES):
        weight = 1 if image_weights is None else image_weights[m]
        for i, j in ORDERS[order](range(TOKENS), 2):
            if not (valid[m][i] and valid[m][j]):
                continue
            one_object = identity[m][i] == identity[m][j]
            on_objects = identity[m][i] != 0 and identity[m][j] != 0
            one_class = class_[m][i] == class_[m][j] != 0
            member = {
                "all": True,
                "foreground": on_objects,
                "same_class": on_objects and (one_object or one_class),
            }[subset.removesuffix("_matched")]
            if member:
                (y, x), (v, u) = place[m][i], place[m][j]
                listed.append((one_object, scores[m][i][j], (y - v) ** 2 + (x - u) ** 2, weight))
    return listed


def auroc(pairs, matched=False):
    """Share of (positive, negative) couples in the right order, ties half; matched: only couples at one distance."""
    won, couples = Fraction(0), Fraction(0)
    for _, high, d, w in (pair for pair in pairs if pair[0]):
        for _, low, e, v in (pair for pair in pairs if not pair[0]):
            if not matched or d == e:
                couples += w * v
                won += w * v * (Fraction(1) if high > low else Fraction(1, 2) if high == low else 0)
    return won / couples


def average_precision(pairs):
    """Sum over thresholds of precision times what recall gains there."""
    total, found, area = sum(pair[0] for pair in pairs), 0, Fraction(0)
    for threshold in sorted({pair[1] for pair in pairs}, reverse=True):
        called = [pair for pair in pairs if pair[1] >= threshold]
        hits = sum(pair[0] for pair in called)
        area += Fraction(hits, len(called)) * Fraction(hits - found, total)
        found = hits
    return area


def reference(subset, labels, scores):
    """Every metric of a subset of one fit."""
    pairs = pairs_of(subset, *labels, scores)
    if subset == "same_class_matched":
        return {"auroc": auroc(pairs, matched=True)}, pairs
    right = [(score > 0) == positive for positive, score, _, _ in pairs]
    of = lambda wanted: [r for r, pair in zip(right, pairs, strict=True) if pair[0] == wanted]
    mean = lambda values: Fraction(sum(values), len(values))
    rate = mean([pair[0] for pair in pairs])
    metrics = {
        "auroc": auroc(pairs),
        "average_precision": average_precision(pairs),
        **{name: mean([(p[1] > 0) == p[0] for p in pairs_of(subset, *labels, scores, order=name)]) for name in ORDERS},
        "balanced_accuracy": (mean(of(True)) + mean(of(False))) / 2,
        "positive_rate": rate,
        "majority": max(rate, 1 - rate),
    }
    return metrics, pairs


def plain(labels):
    return [x.tolist() for x in labels]


def compare(block, subset, fit, labels, scores):
    expected, pairs = reference(subset, plain(labels), scores[fit].tolist())
    for name, value in expected.items():
        assert float(block.metrics[name].value[fit]) == pytest.approx(float(value), abs=1e-12), (subset, name)
    assert block.counts["n_pairs"] == len(pairs) and block.counts["n_positive"] == sum(pair[0] for pair in pairs)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_subset_has_its_reference_values(seed):
    *labels, scores = world(seed)
    identity, class_, valid, place = labels
    position = torch.cat([torch.zeros(IMAGES, TOKENS, 1), place], -1)
    gathered = PairScores(pair_strata(identity, class_, valid, position), FITS)
    gathered.add(range(IMAGES), scores)
    blocks = gathered.evaluate(SUBSETS)
    for subset, fit in itertools.product(SUBSETS, range(FITS)):
        compare(blocks[subset], subset, fit, labels, scores)


def test_the_subsets_of_a_run_have_their_reference_values():
    """The same through the collector of mode=train: its labels, its frame of places, its variant of each subset."""
    *labels, scores = world(2)
    identity, class_, valid, place = labels
    names = {"identity": identity, "identity_valid": valid, "class": class_, "class_valid": valid, "place": place}
    position = torch.cat([torch.arange(TOKENS).expand(IMAGES, -1)[..., None], place.long()], -1)  # a window for every patch
    sample = PatchSample(None, position, names, {}, [], None, {})
    task = Pairwise([0], ("all", "foreground"))
    collector = task.collector(sample, 1)
    batch = Batch(torch.arange(IMAGES), None, names)
    collector.add(batch, scores[:, None])  # fit 0 saw all pairs, fit 1 those on objects
    results = {result.subset: result for result in collector.results()}
    assert list(results) == list(SUBSETS)
    for number, subset in ((0, "all"), (1, "foreground"), (1, "same_class"), (1, "same_class_matched")):
        expected, pairs = reference(subset, plain(labels), scores[number].tolist())
        for name, value in expected.items():
            assert float(results[subset].metrics[name].value[0]) == pytest.approx(float(value), abs=1e-12), (subset, name)
        assert results[subset].counts["n_pairs"] == len(pairs)


@pytest.mark.parametrize("subset", ["foreground", "same_class", "same_class_matched"])
def test_influences_are_the_derivatives_of_the_references(subset):
    """Weighing an image by 1 + h moves the brute-force AUROC by h times its influence."""
    *labels, scores = world(3)
    position = torch.cat([torch.zeros(IMAGES, TOKENS, 1), labels[3]], -1)
    gathered = PairScores(pair_strata(*labels[:3], position), FITS)
    gathered.add(range(IMAGES), scores)
    estimate, h = gathered.evaluate(SUBSETS)[subset].metrics["auroc"], Fraction(1, 10**6)
    for m in range(IMAGES):
        ends = []
        for sign in (1, -1):
            weights = [1 + sign * h * (k == m) for k in range(IMAGES)]
            pairs = pairs_of(subset, *plain(labels), scores[0].tolist(), weights)
            ends.append(auroc(pairs, subset == "same_class_matched"))
        assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(float(estimate.influence[0, m]), abs=1e-9)


def test_every_kind_of_pair_is_counted_by_its_definition():
    *labels, _ = world(4)
    identity, class_, valid, _ = plain(labels)
    kinds = dict.fromkeys(pair_strata(*labels[:3]).counts(), 0)
    for m, (i, j) in itertools.product(range(IMAGES), itertools.combinations(range(TOKENS), 2)):
        one, two, a, b = identity[m][i], identity[m][j], class_[m][i], class_[m][j]
        if valid[m][i] and valid[m][j]:
            if one == 0 or two == 0:
                kinds["background"] += 1
            elif one == two:
                kinds["same_class_same_object"] += 1
            elif a == 0 and b == 0:
                kinds["class_unknown"] += 1
            else:
                kinds["same_class_different_object" if a == b else "different_class"] += 1
    assert pair_strata(*labels[:3]).counts() == kinds and min(kinds.values()) > 0


def test_the_worlds_tell_the_subsets_apart():
    """Each subset of the reference differs from the next in size, so a mislabelled kind of pair cannot hide."""
    *labels, scores = world(0)
    sizes = [len(pairs_of(subset, *plain(labels), scores[0].tolist())) for subset in SUBSETS[:3]]
    assert sizes[0] > sizes[1] > sizes[2] > 0 and math.isfinite(sum(sizes))
