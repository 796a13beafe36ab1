"""trainer.folds=k: k-fold over images, for data too small to keep images apart for one test.

The images of all splits are pooled and dealt into k parts. Every image is tested exactly once, by probes that were neither
fitted nor chosen on it: part n is the test part of fold n, the images that follow it in the deal are its validation images, in
the share the data set's own splits have (val / (train + val)), and all others are its training images. Layers are chosen
inside every fold, on its validation images.

A pooled score is the mean over folds, weighted by their images: pairs are ranked among answers of one probe only. Its interval
resamples all images; that the folds share training images is not in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import trainer
from activation import SPLITS, PatchSample
from controls import Subject
from errors import UserError
from files import digest
from metrics.bootstrap import Estimate, pooled_estimate
from runs.run import Run
from show.records import Resampling, write_records
from tasks import Fold, ProbeResult, SubsetResult, Task


class PooledTokens:
    """Tokens of some images of several sources; to a probe the same as `StackedTokens`.

    Args:
        parts: sources of the same layers, tokens an image and width.
        rows: [M'] which of their images, counted through all of them.
    """

    def __init__(self, parts: Sequence[Any], rows: Tensor) -> None:
        self.parts, self.rows, self.layers = list(parts), rows, list(parts[0].layers)
        self.ends = torch.tensor([part.shape[1] for part in parts]).cumsum(0)
        self.shape = (parts[0].shape[0], len(rows), *parts[0].shape[2:])

    def preload(self) -> None:
        """Read all sources into memory that fit there (`StackedTokens.preload`)."""
        for part in self.parts:
            part.preload()

    def gather(self, images: Tensor | Sequence[int], layers: Sequence[int] | None = None) -> Tensor:
        """Tokens [L, B, T, D] float32 of some images at some layers (indices; all if None)."""
        rows = self.rows[torch.as_tensor(images, dtype=torch.long)]  # [B]
        number = torch.bucketize(rows, self.ends, right=True)
        out = None
        for part in number.unique().tolist():
            at = (number == part).nonzero().flatten()
            first = int(self.ends[part]) - self.parts[part].shape[1]
            tokens = self.parts[part].gather(rows[at] - first, layers)  # [L, b, T, D]
            out = tokens.new_empty(tokens.shape[0], len(rows), *tokens.shape[2:]) if out is None else out
            out[:, at.to(out.device)] = tokens
        return out


def deal(n_images: Mapping[str, int], n_folds: int, seed: int) -> list[dict[str, Tensor]]:
    """The images of every fold by split, indices into all images pooled in the order train, val, test.

    Raises:
        UserError: fewer images than a fold needs.
    """
    total, fitted = sum(n_images.values()), n_images["train"] + n_images["val"]
    if n_folds > total // 2:
        raise UserError(f"trainer.folds={n_folds} and there are {total} images; at most trainer.folds={total // 2} fits")
    order, folds = torch.randperm(total, generator=torch.Generator().manual_seed(seed)), []
    parts = order.tensor_split(n_folds)
    for number in range(n_folds):
        others = torch.cat([parts[(number + step) % n_folds] for step in range(1, n_folds)])
        n_val = min(max(1, round(len(others) * n_images["val"] / fitted)), len(others) - 1)
        folds.append({"train": others[n_val:], "val": others[:n_val], "test": parts[number]})
    return [{split: images.sort().values for split, images in fold.items()} for fold in folds]


def pool(samples: Mapping[str, PatchSample]) -> PatchSample:
    """The images of the splits at hand as one sample, in the order train, val, test; images are called <split>/<key>.

    Raises:
        UserError: the splits keep different numbers of patches an image.
    """
    splits = [split for split in SPLITS if split in samples]
    parts = [samples[split] for split in splits]
    kept = {split: samples[split].tokens.shape[2] for split in splits}
    if len(set(kept.values())) > 1:
        raise UserError(f"trainer.folds pools the splits, which keep {kept} patches an image; set protocol.selection.patches")
    tokens = PooledTokens([part.tokens for part in parts], torch.arange(sum(len(part.keys) for part in parts)))
    made_from = {split: [samples[split].meta.get(key) for key in ("fingerprint", "index")] for split in splits}
    return parts[0]._replace(
        tokens=tokens,
        position=torch.cat([part.position for part in parts]),
        labels={name: torch.cat([part.labels[name] for part in parts]) for name in parts[0].labels},
        keys=[f"{split}/{key}" for split in splits for key in samples[split].keys],
        grids=torch.cat([part.grids for part in parts]),
        meta={**parts[0].meta, "pooled": made_from},
    )


def take(pooled: PatchSample, images: Tensor) -> PatchSample:
    """Some images of a pooled sample."""
    tokens = PooledTokens(pooled.tokens.parts, pooled.tokens.rows[images])
    made_from = digest({"pooled": pooled.meta["pooled"], "images": images.tolist()})
    return pooled._replace(
        tokens=tokens,
        position=pooled.position[images],
        labels={name: value[images] for name, value in pooled.labels.items()},
        keys=[pooled.keys[i] for i in images.tolist()],
        grids=pooled.grids[images],
        meta={**pooled.meta, "fingerprint": made_from, "index": made_from},
    )


def of_folds(subject: Subject, folds: Sequence[Mapping[str, Tensor]]) -> list[Subject]:
    """A probe or a control on every fold, as fits of its own: fold-1, fold-2, …; itself where there are no folds."""
    if not folds:
        return [subject]
    pooled = pool(subject.samples)
    samples = ({split: take(pooled, of_split) for split, of_split in images.items()} for images in folds)
    return [subject._replace(samples=of_fold, part=f"fold-{number}") for number, of_fold in enumerate(samples, start=1)]


def probe_folds(
    run: Run, task: Task, subject: Subject, options: trainer.FitOptions, folds: Sequence[Mapping[str, Tensor]],
    resampling: Resampling,
) -> ProbeResult:  # fmt: skip
    """Fit and score a probe or a control on every fold, write the records of each; the pooled result.

    A fold that is fitted is only read.
    """
    results = []
    for of_fold, images in zip(of_folds(subject, folds), folds, strict=True):
        result = trainer.probe(run, task, of_fold, options)
        write_records(run, result, resampling, split=of_fold.part, chosen_on=f"{of_fold.part} val")
        results.append(Fold(images["test"], result))
    return pool_results(results, pool(subject.samples).keys)


def pool_results(folds: Sequence[Fold], keys: Sequence[str]) -> ProbeResult:
    """One result of all images from those of the folds, which are kept in it."""
    first = folds[0].result
    subsets = [
        _pool_subsets([fold.result.subsets[number] for fold in folds], [fold.images for fold in folds], len(keys))
        for number in range(len(first.subsets))
    ]
    n_train = min(fold.result.n_train for fold in folds)
    fits = [fit for fold in folds for fit in fold.result.fits]
    return first._replace(subsets=subsets, validation=None, n_train=n_train, keys=list(keys), folds=list(folds), fits=fits)


def _pool_subsets(parts: Sequence[SubsetResult], images: Sequence[Tensor], n_images: int) -> SubsetResult:
    """A subset of all images: pooled metrics, summed counts, the scores of the images side by side."""
    join = lambda estimates: pooled_estimate(estimates, images, n_images)
    metrics = {key: join([part.metrics[key] for part in parts]) for key in parts[0].metrics}
    counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
    bins = list(dict.fromkeys((row["from"], row["to"]) for part in parts for row in part.distance))
    distance = []
    for low, high in bins:
        rows = [next((row for row in part.distance if (row["from"], row["to"]) == (low, high)), None) for part in parts]
        filled = [_undefined(parts[0], len(at)) if row is None else row["auroc"] for row, at in zip(rows, images, strict=True)]
        summed = {key: sum(row[key] for row in rows if row is not None) for key in ("n_pairs", "n_positive")}
        distance.append({"from": low, "to": high, **summed, "auroc": join(filled)})
    per_image = {}
    for key, value in parts[0].per_image.items():
        per_image[key] = value.new_zeros(*value.shape[:-1], n_images)
        for part, at in zip(parts, images, strict=True):
            per_image[key][..., at] = part.per_image[key]
    return parts[0]._replace(metrics=metrics, counts=counts, distance=distance, per_image=per_image)


def _undefined(subset: SubsetResult, n_images: int) -> Estimate:
    """The estimate of a fold that has no such pairs."""
    n_fits = len(next(iter(subset.metrics.values())).value)
    return Estimate(torch.full((n_fits,), torch.nan, dtype=torch.float64), torch.zeros(n_fits, n_images, dtype=torch.float64))
