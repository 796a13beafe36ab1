"""Collects pair scores batch by batch and turns them into results: the one place where they are summed."""

from typing import Any

import torch
from torch import Tensor

from activation import PatchSample
from errors import UserError
from metrics.bootstrap import ratio_estimate
from pairs.scores import PairScores, PairStrata, pair_strata
from tasks import Batch, SubsetResult, visited_tokens

LABEL_OF = {"is_same_object": "identity", "same_class": "class"}  # the label that answers a question


class PairCollector:
    """Pair scores of every image, by question, read-out and variant.

    A question whose label the data lack is not asked: class maps alone give no is_same_object.

    Args:
        task: a `pairs.task.PairTask`: its seeds, variants, questions and read-outs.
        detail: also average precision, and scores by distance and per image.
        count_classes: also count the patches whose class is right.
    """

    def __init__(self, task: Any, sample: PatchSample, n_layers: int, *, detail: bool, count_classes: bool = False) -> None:
        self.task, self.n_layers, self.detail, self.count_classes = task, n_layers, detail, count_classes
        self.labels, place = _evaluated(sample, task.per_visit)
        questions = [name for name in task.questions if LABEL_OF[name] in self.labels]
        self.strata = {name: _strata(name, self.labels, place) for name in questions}
        self.scores: dict[tuple[str, str, str], PairScores] = {}  # by question, read-out, variant
        self.right: list[Tensor] = []

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in the logits of a batch of images, [S, L, B, …]."""
        n_seeds = len(self.task.seeds)
        for readout, scores in self.task.readouts(logits):  # [S, L, B, T, T]
            for question, strata in self.strata.items():
                for variant, of_variant in zip(self.task.variants, scores.split(n_seeds), strict=True):
                    key = (question, readout, variant)
                    if key not in self.scores:
                        threshold = 0.0 if readout == "logit" else 0.5
                        self.scores[key] = PairScores(strata, n_seeds * self.n_layers, threshold=threshold)
                    self.scores[key].add(batch.images, of_variant)
        if self.count_classes:
            right = (logits.argmax(-1) == batch.labels["class"]) & batch.labels["class_valid"]  # [S, L, B, T]
            self.right.append(right.sum(-1).flatten(0, 1).cpu())  # [S * L, B]

    def results(self) -> list[SubsetResult]:
        """Every subset of every question, each from the fit that was made for it."""
        results = []
        for (question, readout, variant), scores in self.scores.items():
            for subset, numbers in scores.evaluate(self._subsets(question, variant), detail=self.detail).items():
                result = SubsetResult(question, readout, subset, numbers.metrics, numbers.counts, numbers.distance)
                results.append(result._replace(per_image=numbers.per_image, variant=variant))
        return results + ([self._class_accuracy()] if self.right else [])

    def _subsets(self, question: str, variant: str) -> list[str]:
        """The subsets scored with a variant: where a fit saw pairs on objects alone, it scores those inside the foreground."""
        names = list(self.task.subsets)
        if len(self.task.variants) > 1:
            names = [name for name in names if (name == "all") == (variant != "foreground")]
        if question == "same_class":  # the subsets inside a class are empty by construction
            names = [name for name in names if not name.startswith("same_class")]
        return names

    def _class_accuracy(self) -> SubsetResult:
        n_valid = self.labels["class_valid"].sum(1)  # [M]; an image may have none
        accuracy = ratio_estimate(torch.cat(self.right, 1), n_valid)
        counts = {"n_patches": int(n_valid.sum()), "n_images": int((n_valid > 0).sum())}
        return SubsetResult("class", "argmax", "patches", {"accuracy": accuracy}, counts, [])


def _evaluated(sample: PatchSample, per_visit: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Labels and their validity [M, T] of the evaluated tokens, and where those lie: [M, T, 3], all in one frame."""
    rows = visited_tokens(*sample.position.shape[:2], per_visit, None)
    names = [name for label in LABEL_OF.values() for name in (label, f"{label}_valid")]
    labels = {name: sample.labels[name] for name in names if name in sample.labels}
    place = sample.labels["place"]  # [M, T, 2]
    if rows is not None:
        labels = {name: value.gather(1, rows) for name, value in labels.items()}
        place = place.gather(1, rows[..., None].expand(-1, -1, 2))
    return labels, torch.cat([torch.zeros_like(place[..., :1]), place], -1)  # distances reach across windows


def _strata(question: str, labels: dict[str, Tensor], place: Tensor) -> PairStrata:
    """The kinds of pairs of a question; "same class" asks as if every class were one object, background as background."""
    if question == "same_class":
        return pair_strata(labels["class"], None, labels["class_valid"], place)
    return pair_strata(labels["identity"], labels.get("class"), labels["identity_valid"], place)


def check_pairs(split: str, identity: Tensor, valid: Tensor) -> None:
    """Refuse a split without two patches of one object, or without two of different ones in one image.

    Args:
        identity, valid: [M, T].
    """
    low = torch.where(valid, identity, identity.max() + 1).amin(1)
    high = torch.where(valid, identity, -1).amax(1)
    differ = bool((low < high).any())
    # Two patches of one identity: fewer distinct identities than valid patches in some image.
    ordered = torch.where(valid, identity, -1 - torch.arange(identity.shape[1])).sort(1).values
    agree = bool((ordered[:, 1:] == ordered[:, :-1]).any())
    if not (differ and agree):
        raise UserError(
            f"split {split} has no usable pair: {len(identity)} images, "
            f"{'no' if not agree else 'some'} pair of one object and {'no' if not differ else 'some'} pair of two; "
            "check the labels with mode=check_data, or take more images or patches"
        )
