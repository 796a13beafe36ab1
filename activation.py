"""Run the frozen backbone once over each split, every wanted layer to disk; later runs read and build no backbone.

Two passes, each skipped when its result is there: the index of labels and selected patches (`index.py`), then the
tokens of those patches. A token directory is named by a hash of everything that decides its content — weights digest,
preprocessing, geometry, norm, dtypes, positions, image contents — which its `manifest.json` shows in readable form.
Labels are not part of it, layers are files in it: another layer is extracted alone. A killed run
resumes at the next missing shard and ends with the same bytes; the ranks of a `torchrun` launch share the shards.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones.attention import check_attention
from backbones.contract import Layer, Tokens
from backbones.load import backbone_facts, layers_of
from errors import UserError
from files import check_folder, plain
from machine import choose_device, rank
from runs.progress import stage, stages
from store.extract import STORED, Extraction, open_store
from store.index import build_dataset, open_index
from store.plan import check_extraction, check_index
from store.shards import DTYPES, StackedTokens

__all__ = ["PatchSample", "StackedTokens", "Tokens", "build_dataset", "open_sample", "run"]
CORRELATION_TOKENS = 500  # tokens per channel that its correlations are estimated from (our choice)
SPLITS = ("train", "val", "test")
# Of a backbone: what decides the meaning of its tokens.
MADE_BY = ("weights", "depth", "dim", "patch_size", "image_size", "num_prefix_tokens", "has_class_token", "mean", "std",
           "interpolation")  # fmt: skip


class PlannedTokens(NamedTuple):
    """Tokens that are not read yet: which layers, and the shape [L, M, T, D] they will have."""

    layers: list[Layer]
    shape: tuple[int, int, int, int]


class PatchSample(NamedTuple):
    """What the cache holds for one split.

    tokens: [L, M, T, D], read with `gather`.
    position: [M, T, 3] int64 window, row, column of each token in its window's grid; -1 for class and pooled tokens.
    labels: for each label map the data have, "identity", "class" or both: <name> [M, T] int64, <name>_valid [M, T] bool
        (whether the token is a patch of which the label is known), <name>_purity [M, T] float32 (share of the patch that
        carries it); with them "place" [M, T, 2] float32, row and column in the scaled image, in patches. Or codes [M, n].
    info: constants of the data set, e.g. entropies in bits.
    keys: name of each image.
    grids: [M, 2] int64 rows and columns of patches of one window.
    meta: where it comes from: fingerprint, dropped and skipped images, classes, protocol, backbone facts, cost; and
        "selected_by", the label map that patches were selected by (None: codes).
    """

    tokens: StackedTokens | PlannedTokens
    position: Tensor
    labels: dict[str, Tensor]
    info: dict[str, float]
    keys: list[str]
    grids: Tensor
    meta: dict[str, Any]

    @property
    def valid(self) -> Tensor | None:
        """Tokens whose primary label is known, bool [M, T]; None for data of codes, where every token counts."""
        name = self.meta.get("selected_by")
        return None if name is None else self.labels[f"{name}_valid"]


def run(cfg: Any, run: Any) -> dict[str, Any]:
    """mode=extract: fill the cache for every split; a record and a table line per split, from rank 0."""
    first, share = rank()[0] == 0, f" (new GB and images/s: of 1 of {rank()[1]} ranks)" if rank()[1] > 1 else ""
    lines = [f"{'split':6}{'images':>8}{'layers':>8}{'GB':>9}{'new GB':>9}{'seconds':>9}{'images/s':>10}  left out{share}"]
    records = []
    stages(*SPLITS)
    for split in SPLITS:
        stage(split, parts=2)
        sample = open_sample(cfg, split, say=run.say)
        meta, n_skipped = sample.meta, len(sample.meta["skipped"])
        cost = {name: meta[name] for name in ("bytes", "bytes_written", "seconds", "images_per_second")}
        record = {"kind": "extract", "split": split, "images": len(sample.keys), "layers": sample.tokens.layers, **cost}
        record |= {name: meta[name] for name in ("fingerprint", "directory", "dropped")} | {"skipped": n_skipped}
        records.append(record)
        if first:
            run.write(record)
        out = [f"{n} {reason}" for reason, n in meta["dropped"].items()] + [f"{n_skipped} unreadable"] * bool(n_skipped)
        lines.append(
            f"{split:6}{len(sample.keys):8d}{len(sample.tokens.layers):8d}{meta['bytes'] / 1e9:9.3f}"
            f"{meta['bytes_written'] / 1e9:9.3f}{meta['seconds']:9.1f}{meta['images_per_second']:10.1f}"
            f"  {', '.join(out) or '-'}"
        )
    if first:
        run.say("\n".join(lines))
    return {"splits": records}


def plan_samples(
    cfg: Any,
    say: Callable[[str], None],
    splits: Sequence[str] = SPLITS,
    check: Callable[[dict[str, PatchSample]], None] | None = None,
) -> dict[str, Labelled]:
    """The labels of several splits and the plans of their tokens.

    Args:
        check: looks at all splits while their tokens are only planned, and refuses what labels and sizes show to be wrong.
    """
    labelled = {split: open_labels(cfg, split, say=say) for split in splits}
    if check is not None:
        check({split: of_split.sample for split, of_split in labelled.items()})
    return labelled


def open_planned(labelled: Mapping[str, Labelled], say: Callable[[str], None]) -> dict[str, PatchSample]:
    """The tokens of splits whose labels are open (`open_tokens`)."""
    return {split: open_tokens(of_split, say=say) for split, of_split in labelled.items()}


def open_samples(
    cfg: Any,
    say: Callable[[str], None],
    splits: Sequence[str] = SPLITS,
    check: Callable[[dict[str, PatchSample]], None] | None = None,
) -> dict[str, PatchSample]:
    """The tokens and labels of several splits: `plan_samples`, then `open_planned`."""
    return open_planned(plan_samples(cfg, say, splits, check), say)


def fingerprints(sample: PatchSample) -> dict[str, str]:
    """What tells these activations and labels from all others; known before any token is extracted."""
    return {"activations": sample.meta["fingerprint"], "labels": sample.meta["index"]}


def made_by(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What activations must have been made with for a probe fitted on them to mean anything (`runs.validity`).

    Args:
        meta: "facts" of the backbone, "norm", "geometry" (windows) and "output_mode"; of a `PatchSample` or alike.
    """
    if "facts" not in meta:
        return {}
    facts = meta["facts"]
    known = {name: facts[name] for name in MADE_BY} | {name: meta[name] for name in ("norm", "output_mode")}
    windows = {f"windows.{name}": value for name, value in meta["geometry"].items()}
    scale = {"scale": json.loads(facts["kwargs"])["scale"]} if facts["source"] == "module" else {}
    return known | windows | scale


def _silent(text: str) -> None:
    pass


def open_sample(cfg: Any, split: str, *, say: Callable[[str], None] = print) -> PatchSample:
    """The tokens and labels of a split; if they are cached, no backbone is built and no image is opened.

    Raises:
        UserError: as `open_labels` and `open_tokens`.
    """
    return open_tokens(open_labels(cfg, split, say=say), say=say)


class Labelled(NamedTuple):
    """A split whose labels are known and whose tokens are only planned, and what extracts them."""

    sample: PatchSample
    wanted: Extraction


def open_labels(cfg: Any, split: str, *, say: Callable[[str], None] = print) -> Labelled:
    """The labels of a split and the plan of its tokens.

    Raises:
        UserError: an output mode the model or the data cannot give; unreadable images (`dataset.on_error`) or no usable
            one; more images, patches or pixels than memory or `cache.disk_gb` can hold.
    """
    mode = cfg.model.output_mode
    if mode not in STORED:
        raise UserError(f"model.output_mode={mode} is unknown, expected one of {', '.join(STORED)}")
    if cfg.cache.dtype not in DTYPES:
        raise UserError(f"cache.dtype={cfg.cache.dtype} is unknown, expected one of {', '.join(DTYPES)}")
    for name, least in (("batch_windows", 1), ("shard_images", 1), ("workers", 0)):
        if not isinstance(cfg.cache[name], int) or cfg.cache[name] < least:
            raise UserError(f"cache.{name}={cfg.cache[name]} is not possible, expected a whole number from {least} on")
    if rank()[0]:
        say = _silent
    for folder in ("", "index", "tokens", "architectures"):
        check_folder(Path(cfg.cache.dir) / folder, "cache.dir")
    facts = backbone_facts(cfg.model, Path(cfg.cache.dir) / "architectures")
    check_attention(cfg.model, choose_device(cfg.device))
    layers = layers_of(cfg.model.layers, facts)
    if mode in ("cls", "cls_mean") and not facts.has_class_token:
        raise UserError(
            f"model.output_mode={mode} needs a class token and {facts.name} has none, use mean_spatial, all or patches"
        )
    named = cfg.dataset.get(f"n_{split}")  # an absurd number is refused before the data set is built
    if isinstance(named, int):
        check_index(cfg, split, named, facts)
    dataset = build_dataset(cfg, split)
    check_index(cfg, split, len(dataset), facts)
    plan = partial(check_extraction, cfg, split, len(dataset), facts, len(layers))
    index = open_index(cfg, dataset, split, facts, whole_images=mode != "patches", say=say, plan=plan)
    position, labels = index.placed(mode, facts.has_class_token)
    tokens = PlannedTokens(layers, (len(layers), len(index.keys), position.shape[1], facts.dim))
    meta = {
        "index": index.manifest["digest"],
        "numbers": index.tensors["number"],  # [M] item of the data set behind every image
        "dataset": type(dataset).__name__,
        "split": split,
        "protocol": cfg.protocol.name,
        "output_mode": mode,
        "selected_by": index.selected_by,
        "classes": list(dataset.classes),
        "report": dataset.report(),
        "dropped": dict(Counter(reason for _, reason in index.manifest["dropped"])),
        "dropped_images": index.manifest["dropped"],
        "skipped": index.manifest["skipped"],
        "facts": facts.as_dict(),
        "model": cfg.model,
        "geometry": plain(cfg.protocol.geometry),
        "norm": bool(cfg.model.norm),
    }
    wanted = Extraction(cfg, dataset, split, index, facts, layers, STORED[mode])
    meta["fingerprint"] = wanted.store().digest
    sample = PatchSample(tokens, position, labels, dict(dataset.info()), index.keys, index.grids.long(), meta)
    return Labelled(sample, wanted)


def open_tokens(labelled: Labelled, *, say: Callable[[str], None] = print) -> PatchSample:
    """The tokens of a split whose labels are open: what is not cached is extracted first.

    Raises:
        UserError: a cache that would pass `cache.disk_gb`, is damaged, or is held by another process; a full disk;
            non-finite tokens.
    """
    (sample, wanted), started = labelled, time.perf_counter()
    store, n_bytes, n_images = open_store(wanted, _silent if rank()[0] else say)
    seconds = time.perf_counter() - started
    meta = {
        "fingerprint": store.digest,
        "directory": str(store.directory),
        "bytes": store.layer_bytes * len(wanted.layers),
        "bytes_written": n_bytes,
        "seconds": seconds,
        "images_per_second": n_images / seconds,
    }
    tokens = StackedTokens.from_store(store, wanted.layers, wanted.cfg.model.output_mode, wanted.cfg.cache.ram_gb)
    return sample._replace(tokens=tokens, meta=sample.meta | meta)


def token_statistics(sample: PatchSample, layers: Sequence, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over the valid patches of a (training) sample, those of its primary label.

    Returns:
        two float32 tensors [L, D]; a constant channel gets deviation 1.
    """
    index = [list(sample.tokens.layers).index(layer) for layer in layers]
    n_images = sample.tokens.shape[1]
    valid, count = sample.valid, 0.0
    total, square = torch.zeros(2, len(index), sample.tokens.shape[-1], dtype=torch.float64)
    # Near enough to the mean, so that sums of a batch in float32 lose nothing of the deviation.
    shift = sample.tokens.gather(torch.arange(min(batch_size, n_images)), index).float().mean((1, 2))  # [L, D]
    for first in range(0, n_images, batch_size):
        images = torch.arange(first, min(first + batch_size, n_images))
        weight = torch.ones(len(images), sample.tokens.shape[2]) if valid is None else valid[images].float()
        weight = weight.flatten()  # [B T]
        for row, layer in enumerate(index):  # one at a time: copies of all layers at once are large
            x = sample.tokens.gather(images, [layer])[0].flatten(0, 1).float() - shift[row]  # [B T, D]
            total[row] += weight @ x
            square[row] += weight @ x.square_()
        count += float(weight.sum())
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    mean += shift
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std))
    return mean.float(), std.float()


def token_correlation(sample: PatchSample, layers: Sequence, batch_size: int) -> Tensor:
    """Correlation of the channels over all tokens of some images of a (training) sample of codes, float32 [L, D, D].

    Of evenly spread images, so many that there are about `CORRELATION_TOKENS` tokens per channel; a constant channel is
    correlated with none, not with itself either.
    """
    index = [list(sample.tokens.layers).index(layer) for layer in layers]
    _, n_images, n_tokens, dim = sample.tokens.shape
    n_used = min(n_images, math.ceil(CORRELATION_TOKENS * dim / n_tokens))
    chosen = torch.arange(n_used) * n_images // n_used
    total, product = torch.zeros(len(index), dim, dtype=torch.float64), torch.zeros(len(index), dim, dim, dtype=torch.float64)
    for images, (row, layer) in itertools.product(chosen.split(batch_size), enumerate(index)):
        x = sample.tokens.gather(images, [layer])[0].flatten(0, 1).double()  # [B T, D]
        total[row] += x.sum(0)
        product[row] += x.mT @ x
    mean = total / (n_used * n_tokens)
    covariance = product / (n_used * n_tokens) - mean[:, :, None] * mean[:, None]
    deviation = covariance.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()  # [L, D]
    constant = deviation <= 1e-6 * (1 + mean.abs())  # as in `token_statistics`
    scale = torch.where(constant, 0.0, 1 / deviation)
    return (covariance * scale[:, :, None] * scale[:, None]).float()
