"""Usable information: bits per pair that a family of probes reads of IsSameObject beyond class and distance.

    H_V(Y | C) - H_V(Y | C, representation)      (predictive V-information; Xu et al., ICLR 2020)

C is the cell of a pair: whether its classes agree, and its distance. V is the family of functions o(C) + s(x_i, x_j): o(C) is
the log-odds of the cell's training pairs, s a probe; fitted with o beside it, it need not learn class and distance again. s = 0
is a member, so V without the representation is o alone.

The estimate is at most the truth in expectation: s is fitted and chosen on other images than it is scored on, so its cost is
at least H_V(Y | C, representation), and H_V(Y | C) is taken at the base rates of the scored pairs themselves, the lowest cost
that any o has there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import trainer
from activation import PatchSample
from controls import Subject
from metrics.bootstrap import difference, ratio_estimate
from pairs.bits import Bits, Sent, pair_sets
from pairs.scores import upper_pairs
from runs.run import Run
from tasks import Batch, Fit, ProbeResult, SubsetResult

GIVEN = "given_class_distance"  # the read-out
GIVEN_FIT = "given class and distance"  # the variant of the fits that see o(C)
EXACT = 8  # patches: distances up to here have a cell each, larger ones one for every whole patch
N_AGREEMENTS, N_DISTANCES = 4, 128
COUNTED_IMAGES = 64  # at a time


class Given(Sent):
    """IsSameObject with o(C) beside the probe: class agreement and distance are known.

    Args:
        train: the split whose base rates o is.
    """

    labels = (*Sent.labels, "row", "column")
    scored = (*Sent.scored, "same_class")

    def __init__(self, seeds: Sequence[int], train: PatchSample, **settings: Any) -> None:
        of_fit = "foreground" if "foreground" in settings["variants"] else settings["variants"][0]
        super().__init__(seeds, **{**settings, "variants": [of_fit]})
        self.log_odds = cell_log_odds(*self.count_cells(train))  # [cells]

    def count_cells(self, sample: PatchSample) -> tuple[Tensor, Tensor]:
        """Pairs i < j that the loss counts and those of one object, by cell: float64 [cells] each."""
        counted, positive = torch.zeros(2, N_AGREEMENTS * N_DISTANCES, dtype=torch.float64)
        for batch in self.batches(sample, COUNTED_IMAGES, None):
            first, second = upper_pairs(batch.labels["identity"].shape[1])
            same, sets = pair_sets(batch, first, second)
            cell, here = pair_cells(batch)[:, first, second], sets[self.variants[0]]
            counted += torch.bincount(cell[here], minlength=len(counted))
            positive += torch.bincount(cell[here & same], minlength=len(counted))
        return positive, counted

    def fits(self) -> list[Fit]:
        """Called otherwise than the fits without o(C)."""
        return [Fit(GIVEN_FIT, seed) for seed in self.seeds]

    def offsets(self, batch: Batch) -> Tensor:
        """o(C) of every pair, [B, T, T]."""
        return self.log_odds.to(batch.labels["identity"].device)[pair_cells(batch)]

    def constant(self, train: PatchSample) -> Tensor:
        """o(C) alone is the best answer that reads no representation: nothing is added to it, [S]."""
        return torch.zeros(len(self.seeds))

    def collector(self, sample: PatchSample, n_layers: int, detail: bool = True) -> "Usable":
        """Collects bits, with and without the probe."""
        return Usable(self, sample, n_layers)


class Usable(Bits):
    """Bits with the probe, less than those of the cells alone, at their base rates among the very pairs that are scored."""

    def __init__(self, task: Given, sample: PatchSample, n_layers: int) -> None:
        super().__init__(task, sample, n_layers)
        positive, counted = task.count_cells(sample)
        self.best = torch.special.logit(positive / counted.clamp_min(1))  # [cells], infinite where a cell has one answer
        self.alone: dict[str, Tensor] = {}  # by subset, float64 [M]

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in the logits [S, L, B, T, T] of a batch."""
        super().add(batch, logits)
        first, second = upper_pairs(logits.shape[-1])
        same, members = pair_sets(batch, first, second)
        rate = self.best.to(same.device).sigmoid()[pair_cells(batch)[:, first, second]]  # [B, P]
        cost = -torch.where(same, rate, 1 - rate).log2()
        for subset in self.answered(self.task.variants[0]):
            here = self.alone.setdefault(subset, torch.zeros(self.n_images, dtype=torch.float64))
            here[batch.images] = torch.where(members[subset], cost, 0.0).sum(-1).cpu()

    def results(self) -> list[SubsetResult]:
        """Usable information of every subset, and the two entropies it is the difference of."""
        results = []
        for found in super().results():
            counted, with_probe = found.per_image["n_pairs"], found.metrics["bits_per_pair"]
            alone = ratio_estimate(self.alone[found.subset].expand(self.n_fits, -1), counted)
            metrics = {"usable_information": difference(alone, with_probe), "entropy": alone, "entropy_left": with_probe}
            bounds = (-torch.inf, torch.inf)
            found = found._replace(readout=GIVEN, metrics=metrics, per_image={}, variant=GIVEN_FIT, bounds=bounds)
            results.append(found)
        return results


def pair_cells(batch: Batch) -> Tensor:
    """The cell C of every pair, int64 [B, T, T]: agreement of classes (none known, one known, different, same) and distance.

    Distances up to EXACT patches are kept exactly, longer ones in whole patches. Without classes none is known.
    """
    row, column = batch.labels["row"], batch.labels["column"]
    square = (row[:, :, None] - row[:, None]).square() + (column[:, :, None] - column[:, None]).square()
    far = EXACT**2 + square.sqrt().round() - EXACT
    distance = torch.where(square <= EXACT**2, square.round(), far).clamp_max(N_DISTANCES - 1).long()
    class_ = batch.labels.get("class", torch.zeros_like(batch.labels["identity"]))
    a, b = class_[:, :, None], class_[:, None]
    agreement = torch.where((a > 0) & (b > 0), 2 + (a == b).long(), ((a > 0) | (b > 0)).long())
    return agreement * N_DISTANCES + distance


def cell_log_odds(positive: Tensor, counted: Tensor) -> Tensor:
    """o(C), float32 [cells]: a cell is smoothed by one pair at the rate of its agreement, that by one at the rate of all."""
    shape = (N_AGREEMENTS, N_DISTANCES)
    yes, n = positive.view(shape), counted.view(shape)
    rate = (yes.sum() + 0.5) / (n.sum() + 1)
    of_agreement = (yes.sum(1, keepdim=True) + rate) / (n.sum(1, keepdim=True) + 1)  # [agreements, 1]
    return torch.special.logit((yes + of_agreement) / (n + 1)).flatten().float()


def usable_information(run: Run, settings: Mapping[str, Any], subject: Subject, options: trainer.FitOptions) -> ProbeResult:
    """Usable information of every layer beyond class and distance; metrics "usable_information", "entropy", "entropy_left"."""
    samples = {split: _with_places(sample) for split, sample in subject.samples.items()}
    task = Given(subject.seeds, samples["train"], **settings)
    return trainer.probe(run, task, subject._replace(samples=samples, part="usable"), options)


def _with_places(sample: PatchSample) -> PatchSample:
    """Rows and columns of patches as labels of their own, which a visit gathers like all others."""
    row, column = sample.labels["place"].unbind(-1)
    return sample._replace(labels={**sample.labels, "row": row, "column": column})
