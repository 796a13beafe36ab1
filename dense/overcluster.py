"""Overclustering: how well do clusters of patch tokens, found without labels, line up with classes?

Protocol of NeCo (arXiv 2408.11054; from Leopart, arXiv 2204.13101): all patch tokens of the scored split are
standardised, reduced to 50 principal components and clustered with k-means; the cluster map of an image is scaled up by
its nearest patch and compared with its label map at 100 x 100. K = number of classes: one cluster per class by Hungarian
matching; larger K: every cluster takes the class it is most precise for (published), or overlaps most with.

Named deviations: every image counts (the published loader leaves out the last incomplete batch, 9 of VOC's 1449); the
components are those of the exact covariance (published: faiss' own); label maps are scaled in one step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dense.contract import Grids, LabelMaps, Result, check_choices, resize_map, score_size, seed_list, segmentation_result
from dense.projection import Projected, assign, check_clusters, cluster, fit_projection, project
from errors import UserError
from metrics.segmentation import ABSENT, ImageConfusions, hungarian_matching, many_to_one_matching

CHOICES = {"absent": ABSENT}
MATCHINGS = ("hungarian", "many_to_one_iou", "many_to_one_precision")


def cluster_counts(n_clusters: int | str | Sequence[int | str], n_classes: int) -> list[int]:
    """The numbers of clusters asked for: a number, "classes" or a list of these, each once.

    Raises:
        UserError: something else.
    """
    listed = [n_clusters] if isinstance(n_clusters, int | str) else list(n_clusters)
    counts = [n_classes if count == "classes" else count for count in listed]
    if not counts or any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
        raise UserError(f"overcluster.n_clusters={n_clusters}: expected numbers of clusters, classes, or a list of these")
    return list(dict.fromkeys(counts))


def overcluster(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    n_clusters: int | str | Sequence[int | str] = ("classes", 300, 500),
    seeds: int | Sequence[int] = 3,
    pca: int | None = 50,
    standardize: bool = True,
    iterations: int = 25,
    restarts: int = 1,
    max_points: int = 256,
    size: int | str = "full",
    absent: str = "skip",
) -> list[Result]:
    """Cluster the tokens of one layer of the scored split and match the clusters to classes.

    Args:
        n_clusters: K, "classes" for the number of classes, or a list.
        seeds: k-means runs, a number or a list; published 5.
        pca: principal components kept; None: all channels.
        standardize: channels to mean 0 and deviation 1 first.
        iterations, restarts, max_points: of k-means (`projection.cluster`); published 100, 5, 256.
        size: of the compared maps, see `contract.score_size`.
        absent: classes that do not occur: skip, or zero as published.

    Returns:
        per K and seed a result for every matching; "published" in the notes marks the one the papers report.

    Raises:
        UserError: K larger than the number of tokens, an unknown option value.
    """
    grids, maps = features["test"], labels["test"]
    counts = cluster_counts(n_clusters, maps.n_classes)
    for count in counts:
        check_clusters(count, grids.n_tokens)
    check_choices("overcluster", CHOICES, locals())
    tokens = project(grids, fit_projection(grids, n_components=pca, standardize=standardize))
    targets = ScaledMaps(maps, grids, size)
    results = []
    for count in counts:
        for seed in seed_list(seeds, "overcluster.seeds"):
            index = cluster(tokens.values, count, seed=seed, iterations=iterations, restarts=restarts, max_points=max_points)
            found = targets.compare(assign(index, tokens.values), tokens, count)
            results += match_results(found, {"n_clusters": count, "seed": seed}, absent=absent)
    return results


class ScaledMaps:
    """Label maps at the size they are compared at, read once and kept as bytes.

    Args:
        maps: of the scored split; grids: its tokens, for their shapes; size: see `contract.score_size`.
    """

    def __init__(self, maps: LabelMaps, grids: Grids, size: int | str) -> None:
        self.n_classes, self.grids = maps.n_classes, grids
        dtype = torch.uint8 if maps.n_classes <= 255 else torch.int16
        self.maps: list[Tensor] = []
        for image, shape in enumerate(grids.shapes.tolist()):
            full = maps.read(image)
            scaled = resize_map(full, score_size(size, shape, grids.patch, full.shape))
            outside = (scaled < 0) | (scaled >= maps.n_classes)
            self.maps.append(scaled.masked_fill(outside, torch.iinfo(dtype).max).to(dtype))

    def compare(self, clusters: np.ndarray, tokens: Projected, n_clusters: int) -> ImageConfusions:
        """Classes against clusters [n] of all tokens, each scaled up by its nearest patch."""
        found = ImageConfusions(self.grids.n_images, self.n_classes, n_clusters)
        for image, (h, w) in enumerate(self.grids.shapes.tolist()):
            grid = torch.from_numpy(clusters[tokens.start[image] : tokens.start[image + 1]]).view(h, w)
            target = self.maps[image]
            found.add(torch.tensor([image]), target[None], resize_map(grid, target.shape)[None])
        return found


def match_results(found: ImageConfusions, setting: Mapping, *, absent: str) -> list[Result]:
    """A result per matching; the matching is that of the whole split, and an interval takes it as given."""
    total, results = found.total(), []
    published = "hungarian" if found.n_predictions == found.n_classes else "many_to_one_precision"
    for matching in MATCHINGS:
        if matching == "hungarian":
            assigned = hungarian_matching(total)
        else:
            assigned = many_to_one_matching(total, matching.removeprefix("many_to_one_"))
        notes = {"published": matching == published, "share_called_class_0": float((assigned == 0).double().mean())}
        results.append(
            segmentation_result({**setting, "matching": matching}, found.rename(assigned), absent=absent, notes=notes)
        )
    return results
