"""What the labels of pairs cost in bits, image by image, with a probe that has a probability for each."""

from collections.abc import Iterator

import torch
from torch import Tensor

from activation import PatchSample
from metrics.bootstrap import ratio_estimate
from metrics.code_length import answer_bits
from pairs.scores import upper_pairs
from pairs.task import Pairwise
from tasks import Batch, SubsetResult

SENT = "online_code"  # the read-out


class Bits:
    """Collects what every image's pairs cost, by subset.

    Args:
        task: its variants answer the subsets as in `pairs.collector`.
        sample: the split.
        n_layers: L.
    """

    def __init__(self, task: "Sent", sample: PatchSample, n_layers: int) -> None:
        self.task, self.n_images = task, len(sample.keys)
        self.n_fits = len(task.seeds) * n_layers
        self.bits: dict[str, Tensor] = {}  # by subset, float64 [F, M]
        self.counts: dict[str, Tensor] = {}  # float64 [2, M]: pairs, pairs of one object
        self.variant_of: dict[str, str] = {}
        self.subsets = [name for name in task.scored if name != "same_class" or "class" in sample.labels]

    def add(self, batch: Batch, logits: Tensor) -> None:
        """Take in the logits [S, L, B, T, T] of a batch."""
        first, second = upper_pairs(logits.shape[-1])
        same, members = pair_sets(batch, first, second)
        for variant, of_variant in zip(self.task.variants, logits.split(len(self.task.seeds)), strict=True):
            cost = answer_bits(of_variant[..., first, second].float(), same.float()).flatten(0, 1)  # [F, B, P]
            for subset in self.answered(variant):
                counted, self.variant_of[subset] = members[subset], variant  # [B, P]
                if subset not in self.bits:
                    self.bits[subset] = torch.zeros(self.n_fits, self.n_images, dtype=torch.float64)
                    self.counts[subset] = torch.zeros(2, self.n_images, dtype=torch.float64)
                self.bits[subset][:, batch.images] = (cost * counted).sum(-1).double().cpu()
                self.counts[subset][:, batch.images] = torch.stack([counted, counted & same]).sum(-1).double().cpu()

    def answered(self, variant: str) -> list[str]:
        """The subsets that the fit of a variant is scored on."""
        if len(self.task.variants) == 1:
            return [name for name in self.subsets if name != "all" or variant == "all"]
        return [name for name in self.subsets if (name == "all") == (variant != "foreground")]

    def results(self) -> list[SubsetResult]:
        """Bits per pair of every subset; bits and counts of each image stand in `per_image`."""
        return [
            SubsetResult(
                "is_same_object", SENT, subset, {"bits_per_pair": ratio_estimate(bits, counted)},
                pair_counts(counted, positive), [], bounds=(0.0, torch.inf), variant=self.variant_of[subset],
                per_image={"bits": bits, "n_pairs": counted, "n_positive": positive},
            )
            for subset, bits in self.bits.items()
            for counted, positive in [self.counts[subset]]
        ]  # fmt: skip


def pair_counts(counted: Tensor, positive: Tensor) -> dict[str, int]:
    """How many pairs, pairs of one object and images with a pair, from the counts [M] of each image."""
    return {"n_pairs": int(counted.sum()), "n_positive": int(positive.sum()), "n_images": int((counted > 0).sum())}


def pair_sets(batch: Batch, first: Tensor, second: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Whether the pairs are of one object, and which of them belong to each subset, bool [B, P].

    "same_class" are pairs on objects whose patches have one known class; an object whose patches disagree on the class
    does not enter it by its identity, for that would tell the answer.
    """
    identity, valid = batch.labels["identity"], batch.labels["identity_valid"]
    both = lambda x: x[:, first] & x[:, second]
    foreground = both(valid & (identity > 0))
    sets = {"all": both(valid), "foreground": foreground}
    if "class" in batch.labels:
        class_ = batch.labels["class"]
        sets["same_class"] = foreground & both(class_ > 0) & (class_[:, first] == class_[:, second])
    return identity[:, first] == identity[:, second], sets


class Sent(Pairwise):
    """IsSameObject, its answers counted in bits."""

    labels = (*Pairwise.labels, "class")
    scored: tuple[str, ...] = ("all", "foreground")  # what a variant is fitted on is what it sends

    def collector(self, sample: PatchSample, n_layers: int, detail: bool = True) -> Bits:
        """Collects bits."""
        return Bits(self, sample, n_layers)

    def batches(self, sample: PatchSample, batch_size: int, generator: torch.Generator | None) -> Iterator[Batch]:
        """Data of identities alone have no classes."""
        self.labels = tuple(name for name in type(self).labels if name in sample.labels)
        return super().batches(sample, batch_size, generator)
