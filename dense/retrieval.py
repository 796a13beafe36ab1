"""Dense retrieval: a patch is named by the labels of its nearest neighbours in a memory of training patches.

Hummingbird (Balažević et al., arXiv 2306.01667) in the open implementation NeCo reports with: a bank of unit-length
patch tokens with soft labels (class shares of their pixels), the k = 30 nearest by cosine, a softmax of the
cosines / 0.02 as weights, soft labels scaled up bilinearly. What is published and what we do otherwise are two values of
one option each: `void` (void pixels become class 0 as published, or are left out), `matching` (Hungarian as published,
or class ids as they are), `absent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dense.contract import (
    Grids,
    LabelMaps,
    Result,
    check_choices,
    predict_pixels,
    resize_map,
    score_size,
    seed_list,
    segmentation_result,
    soft_labels,
)
from dense.projection import load_faiss
from errors import UserError
from metrics.segmentation import ABSENT, ImageConfusions, hungarian_matching

BATCH = 8  # images read at a time
QUERIES, CHUNK = 1024, 65536  # queries and rows of the bank of one product
LISTS, VISITED = 512, 32  # search=faiss: inverted lists and how many of them a query visits, as published for ScaNN
CHOICES = {"void": ("drop", "class_0"), "search": ("exact", "faiss"), "dtype": ("float16", "float32"), "absent": ABSENT}
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class MemoryBank(NamedTuple):
    """Patches of the training images: tokens [n, D] of unit length, labels [n, C] shares of classes."""

    tokens: Tensor
    labels: Tensor


def parse_fraction(fraction: str | float | int) -> Fraction:
    """A share such as "1/8", 0.125 or 1, exactly.

    Raises:
        UserError: it is none, or not above 0 and at most 1.
    """
    try:
        value = Fraction(str(fraction))
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise UserError(f"dense_retrieval.fraction={fraction}: expected a share above 0 and at most 1, such as 1/8")
    return value


def choose_images(n_images: int, fraction: str | float | int, seed: int) -> Tensor:
    """Which training images a fraction keeps, ascending: the first of a seeded order, so that larger ones hold smaller ones.

    Raises:
        UserError: the fraction leaves no image.
    """
    share = parse_fraction(fraction)
    count = int(n_images * share)
    if count < 1:
        raise UserError(f"dense_retrieval.fraction={fraction} of {n_images} training images leaves none; take a larger one")
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values


def patches_per_image(memory_size: int | None, n_images: int) -> int | None:
    """How many patches of an image the bank takes at most: an equal part of it each, at least one; None takes all.

    Args:
        n_images: passes over an image count each.
    """
    return None if memory_size is None else max(1, memory_size // n_images)


def sampling_scores(shares: Tensor, uniform: Tensor) -> Tensor:
    """What the published sampling sorts patches by, [B, N]; the smallest are taken.

    A patch counts, for each class in it, the patches of its image that hold the class, times a random number: small
    objects are kept more often than their area says.

    Args:
        shares: [B, N, C] soft labels; uniform: [B, N] random numbers in 0 … 1.
    """
    present = (shares > 0).float()
    return (present * present.sum(1, keepdim=True)).sum(-1) * uniform


def build_bank(
    stream: Iterable[tuple[Tensor, Tensor]],
    n_classes: int,
    *,
    per_image: int | None,
    void: str = "drop",
    generator: torch.Generator,
    dtype: torch.dtype = torch.float16,
) -> MemoryBank:
    """The memory of a stream of images.

    Args:
        stream: tokens [B, h, w, D] and label maps [B, h p, w p] of training images, as often as they are seen.
        per_image: patches kept of each (`patches_per_image`); an image with fewer usable ones gives those.
        void: "drop": ignored pixels count for no class and patches of nothing else stay out; "class_0": they are class 0.
        generator: of the random numbers, one per patch in reading order.

    Raises:
        UserError: no patch has a label.
    """
    tokens, labels = [], []
    for x, maps in stream:
        if void == "class_0":
            maps = torch.where((maps >= 0) & (maps < n_classes), maps, 0)
        shares = soft_labels(maps, x.shape[1:3], n_classes).flatten(1, 2)  # [B, N, C]
        x = F.normalize(x.flatten(1, 2), dim=-1)  # [B, N, D]
        order = sampling_scores(shares, torch.rand(shares.shape[:2], generator=generator))
        known = shares.sum(-1)
        for image in range(len(x)):
            usable = (known[image] > 0).nonzero().flatten()
            if per_image is not None:
                usable = usable[order[image, usable].argsort(stable=True)[:per_image]]
            tokens.append(x[image, usable].to(dtype))
            labels.append((shares[image, usable] / known[image, usable, None]).to(dtype))
    if not sum(map(len, tokens)):
        raise UserError("no training patch carries a label, so there is nothing to retrieve; look at mode=check_data")
    return MemoryBank(torch.cat(tokens), torch.cat(labels))


def nearest(queries: Tensor, bank: Tensor, k: int, *, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The k largest inner products of every query with a bank, exactly: products in float32, chunk by chunk of the bank.

    On the CPU by faiss' flat search, which multiplies and keeps the largest in one pass; elsewhere by products and topk of
    torch. Ties may go to either.

    Args:
        queries: [Q, D]; bank: [n, D] of any float type, on the device where it is searched.

    Returns:
        products float32 [Q, k], falling, and rows of the bank int64 [Q, k], on the device of the bank.
    """
    k, queries = min(k, len(bank)), queries.to(bank.device, torch.float32)
    search = flat_search if bank.device.type == "cpu" else product_search
    best, rows = (
        torch.zeros(len(queries), 0, device=bank.device),
        torch.zeros(len(queries), 0, dtype=torch.int64).to(bank.device),
    )
    for start in range(0, len(bank), chunk):
        part = bank[start : start + chunk].float()  # [c, D], the only copy in float32
        top, at = search(queries, part, min(k, len(part)))
        both, where = torch.cat([best, top], 1), torch.cat([rows, at + start], 1)
        best, kept = both.topk(min(k, both.shape[1]))
        rows = where.gather(1, kept)
    return best, rows


def flat_search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest products of every query [Q, D] with a bank [n, D], both float32 on the CPU, and their rows."""
    faiss = load_faiss()
    products, rows = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(products), torch.from_numpy(rows)


def product_search(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What `flat_search` gives, on any device, `QUERIES` rows of products at a time."""
    parts = [(part @ bank.T).topk(k) for part in queries.split(QUERIES)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


class FaissSearch:
    """Approximate search for large banks: inverted lists, of which a query visits the nearest few."""

    def __init__(self, bank: Tensor) -> None:
        faiss = load_faiss()
        vectors = bank.float().cpu().numpy()
        if len(vectors) < LISTS:
            raise UserError(f"search=faiss needs a memory of at least {LISTS} patches, got {len(vectors)}; set search=exact")
        self.index = faiss.index_factory(vectors.shape[1], f"IVF{LISTS},Flat", faiss.METRIC_INNER_PRODUCT)
        self.index.cp.min_points_per_centroid = 1
        self.index.train(vectors)
        self.index.add(vectors)
        self.index.nprobe = VISITED

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `nearest`; a query whose lists hold fewer than k patches gets products of minus infinity."""
        values, rows = self.index.search(queries.float().cpu().numpy(), k)
        values = torch.from_numpy(values).masked_fill(torch.from_numpy(rows) < 0, -torch.inf)
        return values, torch.from_numpy(rows).clamp_min(0)


def transfer(products: Tensor, rows: Tensor, labels: Tensor, temperature: float = 0.02) -> Tensor:
    """Soft labels float32 [Q, C] of queries: those of their neighbours, weighted by softmax(cosine / temperature).

    Args:
        products, rows: cosines [Q, k] and rows of the bank [Q, k]; labels: [n, C] of the bank.
    """
    weight = (products / temperature).softmax(-1)
    return torch.einsum("qk,qkc->qc", weight, labels[rows].float())


def retrieval(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    memory_size: int | None = 25600,
    epochs: int = 1,
    fraction: str | float = "1/1",
    fraction_seed: int = 42,
    neighbours: int = 30,
    temperature: float = 0.02,
    void: str = "drop",
    search: str = "exact",
    dtype: str = "float16",
    size: int | str = "full",
    absent: str = "skip",
    seeds: int | Sequence[int] = 1,
    device: str = "cpu",
    augmented: Callable[[Tensor, int], Iterable[tuple[Tensor, Tensor]]] | None = None,
) -> list[Result]:
    """Name the patches of the scored split by their neighbours in a memory of one layer of the training split.

    Args:
        memory_size: most patches in the bank, an equal part of each image (the published program fails where an image has
            fewer; here it gives all it has); None: all.
        epochs: passes over the training images, each with a draw of its own.
        fraction: share of the training images that is used, drawn with `fraction_seed`.
        void: "drop" or "class_0" (as published), see `build_bank`.
        search: "exact" or "faiss" (inverted lists, approximate).
        seeds: of the sampled patches; a bank of all patches is the same for every seed, so it takes one.
        device: where exact search multiplies.
        augmented: live training images in place of stored tokens: (images [n] in order, number of the pass) -> tokens
            [1, B, h, w, D] and label maps [B, h p, w p].

    Returns:
        per seed a result with class ids as they are ("direct") and one after Hungarian matching.

    Raises:
        UserError: a fraction that leaves no image, unknown values.
    """
    train, test = features["train"], features["test"]
    n_classes = labels["test"].n_classes
    check_choices("dense_retrieval", CHOICES, locals())
    images = choose_images(train.n_images, fraction, fraction_seed)
    per_image = patches_per_image(memory_size, len(images) * epochs)
    chosen = train.subset(images), labels["train"].subset(images)
    results = []
    for seed in seed_list(seeds if per_image is not None or augmented else 1, "dense_retrieval.seeds"):
        if augmented is not None:
            passes = range(seed * epochs, (seed + 1) * epochs)
            stream = ((x[0], maps) for number in passes for x, maps in augmented(images, number))
        else:
            stream = stored_stream(*chosen, epochs)
        bank = build_bank(
            stream,
            n_classes,
            per_image=per_image,
            void=void,
            generator=torch.Generator().manual_seed(seed),
            dtype=DTYPES[dtype],
        )
        notes = {"bank": len(bank.tokens), "train_images": len(images)}
        found = retrieve(bank, test, labels["test"], neighbours, temperature, search=search, size=size, device=device)
        setting = {"fraction": str(fraction), "seed": seed, "size": size}
        for matching, each in (("direct", found), ("hungarian", found.rename(hungarian_matching(found.total())))):
            results.append(segmentation_result({**setting, "matching": matching}, each, absent=absent, notes=notes))
    return results


def stored_stream(grids: Grids, maps: LabelMaps, epochs: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Stored tokens of all images with their label maps at the input resolution, `epochs` times."""
    for _ in range(epochs):
        for images, x in grids.batches(BATCH):
            yield x[0], maps.at(images, [side * grids.patch for side in x.shape[2:4]])


def retrieve(
    bank: MemoryBank,
    grids: Grids,
    maps: LabelMaps,
    neighbours: int,
    temperature: float,
    *,
    search: str = "exact",
    size: int | str = "input",
    device: str = "cpu",
) -> ImageConfusions:
    """Classes against retrieved classes of every image of a split."""
    bank = MemoryBank(bank.tokens.to(device), bank.labels.to(device))
    approximate = FaissSearch(bank.tokens) if search == "faiss" else None
    found = ImageConfusions(grids.n_images, maps.n_classes)
    for images, x in grids.batches(BATCH):
        queries = F.normalize(x[0].flatten(0, 2), dim=-1)  # [B N, D]
        products, rows = approximate(queries, neighbours) if approximate else nearest(queries, bank.tokens, neighbours)
        shares = transfer(products, rows, bank.labels, temperature).view(*x.shape[1:4], -1)  # [B, h, w, C]
        for image, share in zip(images.tolist(), shares.cpu(), strict=True):
            full = maps.read(image)
            size_here = score_size(size, share.shape[:2], grids.patch, full.shape)
            found.add(torch.tensor([image]), resize_map(full, size_here)[None], predict_pixels(share[None], size_here))
    return found
