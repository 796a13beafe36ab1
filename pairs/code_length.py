"""The online code of IsSameObject: what it costs to send the labels of the training pairs to a reader of the representation.

Images are sent in blocks of growing size, each with the probe that was fitted on all blocks before it (Blier and Ollivier,
NeurIPS 2018; Voita and Titov, EMNLP 2020). A probe that learns late, or needs much freedom, pays for it.

Our choices. The first block is sent at its own base rate, learnt on the way (`metrics.code_length.base_rate_bits`; the papers
send it at one bit a label), and so is a block whose probe is worse than a constant answer on validation. Sender and reader both
have the validation split, which says that and when a fit stops. A pair is sent once (i < j). Images are put in one order, drawn
with the seed of the run. A fit to few images may take as many steps as one to all of them (`block_options`).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

import trainer
from activation import PatchSample
from controls import Subject
from errors import UserError
from metrics.bootstrap import Estimate, difference, ratio_estimate
from metrics.code_length import base_rate_bits, block_ends
from pairs.bits import Bits, Sent, pair_counts
from pairs.folds import pool, take
from runs.run import Run
from tasks import ProbeResult, SubsetResult
from trainer import FitOptions

OFTEN = 8


def code_length(run: Run, settings: Mapping[str, Any], subject: Subject, options: FitOptions) -> ProbeResult:
    """The online code of the training pairs: a result whose M images are those of the training split, in the order sent.

    Metrics: "bits_per_pair"; "base_rate", bits per pair of a code that knows the base rate alone; "saved", the difference;
    "compression", one bit per pair (the uniform code) over bits per pair.

    Raises:
        UserError: too few training images for two blocks.
    """
    train, task = subject.samples["train"], Sent(subject.seeds, **settings)
    ends = sending_blocks(len(train.keys))
    pooled = pool({"train": train})
    order = torch.randperm(len(train.keys), generator=torch.Generator().manual_seed(options.seed))
    blocks = []
    for number, (first, last) in enumerate(itertools.pairwise(ends), start=1):
        passes, of_block = block_options(options, first, len(order))
        seen = {"train": take(pooled, order[:first].repeat(passes)), "val": subject.samples["val"]}
        fitted = subject._replace(samples={**seen, "test": take(pooled, order[first:last])}, part=f"code-{number}")
        stack = trainer.fit_stack(run, task, fitted, of_block)
        blocks.append(trainer.evaluate(task, stack, fitted, options, split="test", detail=False))
    first_block = _count(task, take(pooled, order[: ends[0]]), options.batch_images)
    subsets = [_sent(blocks, number, start) for number, start in enumerate(first_block)]
    result = blocks[-1]._replace(subsets=subsets, n_train=len(train.keys), keys=[train.keys[i] for i in order.tolist()])
    return result._replace(fits=[fit for block in blocks for fit in block.fits])


@dataclass(frozen=True)
class BlockOptions(FitOptions):
    """Options of a fit whose epochs are shorter than those of `whole`, of which there may be `shorter` times as many."""

    whole: FitOptions
    shorter: float

    def learning_rate(self, epoch: float, dim: int) -> float:
        """That of the fit to all images after as many steps."""
        return self.whole.learning_rate(epoch / self.shorter, dim)


def block_options(options: FitOptions, n_seen: int, n_images: int) -> tuple[int, FitOptions]:
    """How often an epoch passes over the images seen so far, and the options of their fit.

    It gets the steps, the patience and the learning rates, step by step, of a fit to all images: epochs of a few steps would
    end before anything is learnt. Validation is looked at more often, an epoch of few images being an `OFTEN`-th of all, for
    few images are soon known too well.
    """
    passes = math.ceil(n_images / OFTEN / n_seen)
    shorter = n_images / (passes * n_seen)
    scaled = {field.name: getattr(options, field.name) for field in fields(FitOptions)}
    scaled["epochs"] = math.ceil(options.epochs * shorter)
    scaled["patience"] = None if options.patience is None else math.ceil(options.patience * shorter)
    return passes, BlockOptions(**scaled, whole=options, shorter=shorter)


def _count(task: Sent, sample: PatchSample, batch_images: int) -> list[SubsetResult]:
    """The pairs of a block that is sent without a probe."""
    block = Bits(task, sample, 1)
    for batch in task.batches(sample, batch_images, None):
        n_images, n_tokens = batch.labels["identity"].shape
        block.add(batch, torch.zeros(len(task.fits()), 1, n_images, n_tokens, n_tokens))
    return block.results()


def sending_blocks(n_images: int) -> list[int]:
    """Where the blocks end.

    Raises:
        UserError: fewer than two.
    """
    ends = block_ends(n_images)
    if len(ends) < 2:
        raise UserError(f"bits.code_length=true needs at least 16 training images, got {n_images}; leave it out or take more")
    return ends


def _sent(blocks: Sequence[ProbeResult], number: int, start: SubsetResult) -> SubsetResult:
    """A subset of all blocks: those that were sent with a probe, behind the first one.

    Args:
        number: of the subset in the results of the blocks.
    """
    parts = [start, *(block.subsets[number] for block in blocks)]
    counted, positive = (torch.cat([part.per_image[key] for part in parts]) for key in ("n_pairs", "n_positive"))  # [M]
    base = base_rate_bits(positive, counted)  # [M]
    n_fits, first = len(parts[1].per_image["bits"]), len(start.per_image["n_pairs"])
    sent = [base[:first].expand(n_fits, -1)]
    for block, part in zip(blocks, parts[1:], strict=True):
        last = first + part.per_image["bits"].shape[1]
        sent.append(torch.where(_no_use(block, part.variant)[:, None], base[first:last], part.per_image["bits"]))
        first = last
    bits = torch.cat(sent, 1)  # [F, M]
    length, at_base_rate = ratio_estimate(bits, counted), ratio_estimate(base.expand_as(bits), counted)
    metrics = {
        "bits_per_pair": length, "saved": difference(at_base_rate, length), "base_rate": at_base_rate,
        "compression": Estimate(1 / length.value, -length.influence / length.value[:, None].square()),
    }  # fmt: skip
    notes = {"blocks": len(parts)}
    return start._replace(
        metrics=metrics, counts=pair_counts(counted, positive), notes=notes, per_image={}, bounds=(-torch.inf, torch.inf)
    )


def _no_use(block: ProbeResult, variant: str) -> Tensor:
    """Which fits of a variant are worse than a constant answer on validation, bool [F], seed first."""
    worse = {(fit.seed, fit.layer) for fit in block.fits if fit.variant == variant and fit.worse_than_constant}
    return torch.tensor([(seed, layer) in worse for seed in block.seeds for layer in block.layers])
