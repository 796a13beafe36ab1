"""Pictures behind the numbers: retrieved and clustered patches of a few scored images, ready to be drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from activation import build_dataset
from dense.contract import predict_pixels, soft_labels
from dense.features import Split
from dense.projection import cluster, fit_projection, project
from dense.retrieval import MemoryBank, nearest, transfer

TRAIN_IMAGES, SHOWN, NEIGHBOURS = 200, 4, 6  # the memory of the examples, images shown, neighbours shown of a query
CLUSTERS, MEMBERS = 6, 8  # of the gallery


class Example(NamedTuple):
    """A scored image and what retrieval makes of it.

    image: [3, H, W] uint8; truth, prediction: [H, W] classes. query: row, column of a patch on its largest object.
    neighbours: pictures [3, h, w] uint8 of the training patches nearest to it with the patches around them, nearest first;
    cosines: of each.
    """

    image: Tensor
    truth: Tensor
    prediction: Tensor
    query: tuple[int, int]
    grid: tuple[int, int]
    neighbours: list[Tensor]
    cosines: list[float]


def retrieval_examples(cfg: DictConfig, splits: Mapping[str, Split]) -> list[Example]:
    """What a memory of the first training images makes of the first scored images with an object, at the last layer."""
    train, test = splits["train"], splits["test"]
    pictures = {role: build_dataset(cfg, cfg.dense[f"{role}_split"]) for role in ("train", "test")}
    scene = lambda role, image: pictures[role][int(splits[role].sample.meta["numbers"][image])].image
    layer, n_classes = train.grids.layers[-1], test.maps.n_classes
    chosen = torch.arange(min(TRAIN_IMAGES, train.grids.n_images))
    tokens, labels, source = [], [], []
    for images, x in train.grids.at(layer).subset(chosen).batches(8):
        h, w = x.shape[2:4]
        shares = soft_labels(train.maps.at(images, (h * train.grids.patch, w * train.grids.patch)), (h, w), n_classes)
        tokens.append(F.normalize(x[0].flatten(0, 2), dim=-1))
        labels.append(shares.flatten(0, 2))
        source += [(int(image), row, column) for image in images for row in range(h) for column in range(w)]
    bank = MemoryBank(torch.cat(tokens), torch.cat(labels))
    examples = []
    for image in range(test.grids.n_images):
        truth = test.maps.read(image).long()
        inside = (truth > 0) & (truth < n_classes)
        if not bool(inside.any()):
            continue
        x = test.grids.at(layer).read(torch.tensor([image]))[0, 0]  # [h, w, D]
        h, w = x.shape[:2]
        products, rows = nearest(F.normalize(x.flatten(0, 1), dim=-1), bank.tokens, 30)
        shares = transfer(products, rows, bank.labels).view(1, h, w, -1)
        largest = int(truth[inside].mode().values)
        area = soft_labels(truth[None, : truth.shape[0] // h * h, : truth.shape[1] // w * w], (h, w), n_classes)[
            0, ..., largest
        ]
        query = divmod(int(area.argmax()), w)
        at = [source[row] for row in rows[query[0] * w + query[1], :NEIGHBOURS].tolist()]
        shown = [context_picture(scene("train", i), train.grids.shapes[i].tolist(), r, c) for i, r, c in at]
        cosines = products[query[0] * w + query[1], :NEIGHBOURS].tolist()
        called = predict_pixels(shares, truth.shape)[0]
        examples.append(Example(scene("test", image), truth, called, query, (h, w), shown, cosines))
        if len(examples) == SHOWN:
            break
    return examples


def cluster_gallery(cfg: DictConfig, splits: Mapping[str, Split], n_clusters: int = 300) -> list[dict[str, Any]]:
    """Clusters of patches of the scored split that lie most on one class: class, purity, pictures of members of several images.

    Purity is the share of the labelled pixels under a cluster that carry the class, its most frequent one but the background.
    Clusters of fewer than 8 images are left out; the members shown are the nearest to the centroid, one of an image.
    """
    test, dataset = splits["test"], build_dataset(cfg, cfg.dense.test_split)
    grids = test.grids.at(test.grids.layers[-1])
    grids = grids.subset(torch.arange(min(TRAIN_IMAGES, grids.n_images)))
    tokens = project(grids, fit_projection(grids, n_components=min(50, grids.dim)))
    count = min(n_clusters, grids.n_tokens)
    index = cluster(tokens.values, count, seed=0, iterations=15, restarts=1, max_points=256)
    distance, named = (torch.from_numpy(each[:, 0]) for each in index.search(tokens.values, 1))
    source, shares = [], torch.zeros(count, test.maps.n_classes)
    for image, (h, w) in enumerate(grids.shapes.tolist()):
        seen = test.maps.at(torch.tensor([image]), (h * grids.patch, w * grids.patch))
        area = soft_labels(seen, (h, w), test.maps.n_classes).flatten(0, 2)  # [N, C]
        shares.index_add_(0, named[tokens.start[image] : tokens.start[image + 1]], area)
        source += [(image, row, column) for row in range(h) for column in range(w)]
    first = int(test.maps.classes[0] == "background")
    purity, kind = (shares / shares.sum(1, keepdim=True).clamp_min(1e-9))[:, first:].max(1)
    rows = []
    for k in purity.argsort(descending=True).tolist():
        inside = (named == k).nonzero().flatten()
        members: dict[int, tuple[int, int, int]] = {}
        for token in inside[distance[inside].argsort()].tolist():
            members.setdefault(source[token][0], source[token])
        if len(members) < MEMBERS:
            continue
        pictures = [
            context_picture(dataset[int(test.sample.meta["numbers"][i])].image, grids.shapes[i].tolist(), r, c)
            for i, r, c in list(members.values())[:MEMBERS]
        ]
        rows.append({"class": int(kind[k]) + first, "purity": float(purity[k]), "pictures": pictures})
        if len(rows) == CLUSTERS:
            break
    return rows


def context_picture(image: Tensor, grid: Sequence[int], row: int, column: int, reach: int = 1) -> Tensor:
    """A patch with its neighbours, [3, h, w], cut at the border of the image."""
    (h, w), (height, width) = grid, image.shape[-2:]
    top, left = max(row - reach, 0) * height // h, max(column - reach, 0) * width // w
    return image[:, top : min(row + reach + 1, h) * height // h, left : min(column + reach + 1, w) * width // w]
