"""CBFE + CD: segments without any label but one threshold; cluster-based foreground extraction and community detection.

Protocol of Leopart (arXiv 2204.13101), as NeCo reports it (VOC, K = 21):
 1. tokens of both splits standardised, 50 principal components, spherical k-means (200 clusters);
 2. the attention of the class token gives a noisy foreground; every cluster gets its precision against it;
 3. clusters above a precision threshold are foreground. The threshold is the one whose mask fits the *labels* of the
    training split best, so the method is not free of labels;
 4. CBFE: k-means of the foreground tokens, background one cluster more, Hungarian matching to the classes;
 5. CD: many small clusters of the foreground, a graph of how often they lie beside each other, its communities are the
    segments, Hungarian matching.

Communities: Louvain of networkx, which the project has through torch and which is maintained, seeded and takes weights.
Published is Infomap, whose package is under AGPL and reads and writes files; the two agree on clear communities and differ on
faint ones. Louvain's `resolution` stands where Infomap's `markov_time` and preferred number of modules stood.

Further named deviations: k-means runs on tokens, not on their copies scaled up to 100 x 100 (a token has 12 to 16 of
them); `weight_threshold` and `resolution` are the best of a grid on the training split (published: 300 Optuna trials,
also over the number of clusters, on the same score); the angle 4π/3 of the published neighbourhood is kept by
`published_angles=true`, ours is 5π/4, which completes the eight directions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import networkx
import numpy as np
import torch
from torch import Tensor

from dense.contract import Grids, LabelMaps, Result, check_choices, resize_map, seed_list, segmentation_result
from dense.foreground import MASS_CBFE, attention_foreground, check_attention, image_mean, jaccard
from dense.overcluster import ScaledMaps
from dense.projection import Projected, assign, check_clusters, cluster, fit_projection, project
from errors import UserError
from metrics.segmentation import ABSENT, ImageConfusions, hungarian_matching

CHOICES = {"absent": ABSENT}
CUTS = (0.55, 0.75)  # the shares of clusters called background between which the threshold is sought
STEP = 0.05  # thresholds are multiples of it
DISTANCES = (1, 2)  # of neighbours, in pixels of the compared map


def cluster_precisions(clusters: Sequence[Tensor], foreground: Sequence[Tensor], n_clusters: int) -> Tensor:
    """Precision of every cluster against a foreground, float64 [K]: mean over the images that hold it; 0 for one in none.

    Args:
        clusters: int maps [H, W] of every image; foreground: bool maps of the same sizes.
    """
    total, images = torch.zeros(2, n_clusters, dtype=torch.float64)
    for named, mask in zip(clusters, foreground, strict=True):
        size = torch.bincount(named.flatten(), minlength=n_clusters)
        inside = torch.bincount(named[mask], minlength=n_clusters)
        total += inside / size.clamp_min(1)
        images += size > 0
    return total / images.clamp_min(1)


def search_threshold(
    precision: Tensor, clusters: Sequence[Tensor], maps: Sequence[Tensor], n_classes: int
) -> tuple[float, list[tuple[float, int, float]]]:
    """The precision above which clusters are foreground: the best cut for the labels, to the nearest 0.05.

    Returns:
        the threshold, and per cut its precision, index and mean Jaccard over images.
    """
    ordered, tried = precision.sort().values, []
    low, high = (int(share * len(precision)) for share in CUTS)
    for cut in range(low, max(high, low + 1)):
        inside = precision >= ordered[cut]
        scores = [
            jaccard(inside[named], target, n_classes, void="object") for named, target in zip(clusters, maps, strict=True)
        ]
        tried.append((float(ordered[cut]), cut, float(image_mean(scores, zero=True).value)))
    best = max(tried, key=lambda row: row[2])[0]
    return round(best / STEP) * STEP, tried


def directions(published_angles: bool) -> list[tuple[int, int]]:
    """Steps (rows, columns) to the neighbours at all distances and eight angles."""
    angles = [i * math.pi / 4 for i in range(8)]
    if published_angles:
        angles[5] = 4 * math.pi / 3
    away = lambda x: int(math.copysign(math.floor(abs(x) + 0.5), x))  # halves away from zero, as in C
    return [(away(round(math.sin(a) * d, 9)), away(round(math.cos(a) * d, 9))) for d in DISTANCES for a in angles]


def cooccurrence(clusters: Sequence[Tensor], n_clusters: int, *, published_angles: bool = False) -> Tensor:
    """How often cluster j lies beside a pixel of cluster i, float64 [K, K]: rows of every image sum to 1, then averaged.

    The diagonal is 0. A row is averaged over the images in which its cluster has a neighbour of another one.
    """
    steps = directions(published_angles)
    total, images = torch.zeros(n_clusters, n_clusters, dtype=torch.float64), torch.zeros(n_clusters, dtype=torch.float64)
    for named in clusters:
        present, ids = named.unique(return_inverse=True)  # an image holds few of the clusters
        n = len(present)
        counts = torch.zeros(n * n, dtype=torch.int64)
        height, width = ids.shape
        for dy, dx in steps:
            here = ids[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
            there = ids[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            counts += torch.bincount((here * n + there).flatten(), minlength=n * n)
        counts = counts.view(n, n).fill_diagonal_(0).double()
        rows = counts.sum(1)
        total[present[:, None], present] += counts / rows.clamp_min(1)[:, None]
        images[present[rows > 0]] += 1
    return total / images.clamp_min(1)[:, None]


def communities(weights: Tensor, threshold: float, resolution: float, seed: int) -> Tensor:
    """Community of every cluster, int64 [K], the largest first.

    Two clusters are linked where both directions of `weights` [K, K] reach the threshold, with the smaller one as weight.
    """
    both = torch.minimum(weights, weights.T)
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(both)))
    linked = (both >= threshold).triu(1).nonzero().tolist()
    graph.add_weighted_edges_from((i, j, float(both[i, j])) for i, j in linked)
    found = networkx.community.louvain_communities(graph, weight="weight", resolution=resolution, seed=seed)
    named = torch.zeros(len(both), dtype=torch.int64)
    for number, members in enumerate(sorted(found, key=lambda each: (-len(each), min(each)))):
        named[sorted(members)] = number
    return named


def cbfe_cd(
    features: Mapping[str, Grids],
    labels: Mapping[str, LabelMaps],
    *,
    pca: int | None = 50,
    foreground_clusters: int = 200,
    community_clusters: int = 149,
    seeds: int | Sequence[int] = 3,
    iterations: int = 25,
    restarts: int = 1,
    max_points: int = 256,
    size: int = 100,
    mass: float = MASS_CBFE,
    weight_thresholds: Sequence[float] = (0.01, 0.03, 0.05, 0.07, 0.1),
    resolutions: Sequence[float] = (0.5, 1.0, 2.0),
    published_angles: bool = False,
    absent: str = "skip",
    seed: int = 0,
) -> list[Result]:
    """Foreground, CBFE and CD scores of one layer.

    Args:
        pca, iterations, restarts, max_points: as for overclustering.
        foreground_clusters: of step 1; community_clusters: of step 5 (published: tuned in 69 … 249).
        seeds: of CBFE's k-means (published 5) and of the communities (published 10).
        size: side of the compared maps.
        mass: share of the attention that is noisy foreground.
        weight_thresholds, resolutions: the grid the graph is tuned on, by the training labels.
        seed: of the clusters the foreground and the communities are made of, and of tuning (published 0).

    Returns:
        a result "foreground" (metric jaccard), and per seed one "cbfe" and one "cd".

    Raises:
        UserError: a backbone without a class token, more clusters than tokens.
    """
    check_choices("cbfe_cd", CHOICES, locals())
    check_attention(features)
    n_classes, names = labels["test"].n_classes, ("train", "test")
    n_tokens = sum(features[name].n_tokens for name in names)
    check_clusters(foreground_clusters, n_tokens)
    options = {"iterations": iterations, "restarts": restarts, "max_points": max_points}
    projection = fit_projection(*(features[name] for name in names), n_components=pca)
    tokens = {name: project(features[name], projection) for name in names}
    targets = {name: ScaledMaps(labels[name], features[name], size) for name in names}

    both = np.concatenate([tokens[name].values for name in names])
    index = cluster(both, foreground_clusters, seed=seed, spherical=True, **options)
    del both
    shapes = {name: features[name].shapes.tolist() for name in names}
    found = {name: assign(index, tokens[name].values) for name in names}
    scaled = {name: scale_up(found[name], tokens[name], shapes[name], size) for name in names}
    precision = {
        name: cluster_precisions(scaled[name], noisy(features[name], mass, size), foreground_clusters) for name in names
    }
    threshold, _ = search_threshold(precision["train"], scaled["train"], targets["train"].maps, n_classes)
    inside = {name: torch.from_numpy((precision[name] >= threshold).numpy()[found[name]]) for name in names}  # [n] tokens
    scores = [
        jaccard((precision["test"] >= threshold)[named], target, n_classes, void="ignore")
        for named, target in zip(scaled["test"], targets["test"].maps, strict=True)
    ]
    results = [Result({"step": "foreground"}, {"jaccard": image_mean(scores)}, notes={"threshold": threshold})]
    for name in names:
        if not bool(inside[name].any()):
            raise UserError(f"no cluster of {name} reaches the foreground precision {threshold:.2f}: nothing to segment")

    for each in seed_list(seeds, "cbfe_cd.seeds"):
        segments, n = segment(tokens["test"], inside["test"], n_classes - 1, each, options)
        compared = targets["test"].compare(segments.numpy(), tokens["test"], n)
        results.append(matched("cbfe", each, compared, absent, {"threshold": threshold}))

    fine = {name: segment(tokens[name], inside[name], community_clusters, seed, options) for name in names}
    weights = {name: cooccurrence(scale_up(fine[name][0].numpy(), tokens[name], shapes[name], size), fine[name][1],
                                  published_angles=published_angles) for name in names}  # fmt: skip

    def detect(name: str, weight_threshold: float, resolution: float, number: int) -> ImageConfusions:
        named = communities(weights[name], weight_threshold, resolution, number)
        return targets[name].compare(named[fine[name][0]].numpy(), tokens[name], int(named.max()) + 1)

    tuned = lambda setting: float(matched("cd", seed, detect("train", *setting, seed), absent, {}).metrics["miou"].value)
    setting = max(itertools.product(weight_thresholds, resolutions), key=tuned)
    notes = {"threshold": threshold, "weight_threshold": setting[0], "resolution": setting[1]}
    for each in seed_list(seeds, "cbfe_cd.seeds"):
        results.append(matched("cd", each, detect("test", *setting, each), absent, notes))
    return results


def noisy(grids: Grids, mass: float, size: int) -> list[Tensor]:
    """The foreground the attention shows, bool [size, size] of every image."""
    masks = []
    for image in range(grids.n_images):
        heads = grids.attention(torch.tensor([image]))[0]
        masks.append(resize_map(attention_foreground(heads.mean(0, keepdim=True), mass)[0], (size, size)).bool())
    return masks


def scale_up(clusters: np.ndarray, tokens: Projected, shapes: list[list[int]], size: int) -> list[Tensor]:
    """Cluster maps [size, size] of every image, from the clusters [n] of all tokens."""
    parts = (torch.from_numpy(clusters[a:b]) for a, b in itertools.pairwise(tokens.start))
    return [resize_map(part.view(*shape), (size, size)) for part, shape in zip(parts, shapes, strict=True)]


def segment(tokens: Projected, inside: Tensor, n_clusters: int, seed: int, options: Mapping) -> tuple[Tensor, int]:
    """Clusters of the foreground tokens, int64 [n] with the background as the last number, and how many numbers there are."""
    values = tokens.values[inside.numpy()]
    index = cluster(values, n_clusters, seed=seed, **options)
    named = torch.full((len(inside),), n_clusters)
    named[inside] = torch.from_numpy(assign(index, values))
    return named, n_clusters + 1


def matched(step: str, seed: int, found: ImageConfusions, absent: str, notes: Mapping) -> Result:
    """The result after Hungarian matching."""
    renamed = found.rename(hungarian_matching(found.total()))
    return segmentation_result({"step": step, "seed": seed}, renamed, absent=absent, notes=notes)
