"""Standardised principal components of patch tokens, in two streamed passes, and k-means on them with faiss.

Every token of a split is standardised per channel (population deviation), then projected to the first principal
components: what NeCo clusters (50 of them, no whitening). Only the projected tokens are held, 200 bytes each.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense.contract import Grids
from errors import UserError

BATCH = 16  # images read at a time


class Projection(NamedTuple):
    """shift, scale: [D] float32, (x - shift) * scale is standardised. axes: [D, P] float32 orthonormal, or None."""

    shift: Tensor
    scale: Tensor
    axes: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Projected tokens [..., P] of tokens [..., D]."""
        x = (x - self.shift) * self.scale
        return x if self.axes is None else x @ self.axes


class Projected(NamedTuple):
    """Projected tokens of all images one after the other: values [n, P] float32, start [M + 1] first token of each image."""

    values: np.ndarray
    start: np.ndarray


def fit_projection(*splits: Grids, n_components: int | None, standardize: bool = True) -> Projection:
    """Statistics and principal components of all tokens of one or several splits (one layer each).

    Moments are summed in float64 around the mean of the first batch, so that a large common offset costs no digits. The
    sign of a component is arbitrary; k-means does not depend on it.

    Raises:
        UserError: more components than channels.
    """
    dim = splits[0].dim
    if n_components is not None:
        check_components(n_components, dim)
    shape = (dim,) if n_components is None else (dim, dim)  # without components the variances are enough
    total, square, count = torch.zeros(dim, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64), 0
    around = None
    for split in splits:
        for _, x in split.batches(BATCH):
            flat = x[0].flatten(0, 2)  # [n, D]
            around = flat.mean(0) if around is None else around
            flat = flat - around
            total += flat.sum(0).double()
            square += (flat.square().sum(0) if n_components is None else flat.T @ flat).double()
            count += len(flat)
    mean = total / count
    covariance = square / count - (mean.square() if n_components is None else torch.outer(mean, mean))
    variance = covariance if n_components is None else covariance.diagonal()
    deviation = variance.clamp_min(0).sqrt()
    # A channel that never changes stays 0 instead of becoming rounding noise blown up to deviation 1.
    constant = deviation <= 1e-6 * (1 + (mean + around).abs())
    scale = torch.where(constant, 0.0, 1 / deviation) if standardize else torch.ones_like(deviation)
    axes = None
    if n_components is not None:
        _, vectors = torch.linalg.eigh(covariance * torch.outer(scale, scale))
        axes = vectors.flip(1)[:, :n_components].float().contiguous()
    return Projection((mean + around).float(), scale.float(), axes)


def project(split: Grids, projection: Projection) -> Projected:
    """All tokens of a split (one layer) projected, in float32."""
    start = np.concatenate([[0], split.shapes.prod(1).cumsum(0).numpy()])
    width = split.dim if projection.axes is None else projection.axes.shape[1]
    values = np.empty((start[-1], width), np.float32)
    for images, x in split.batches(BATCH):
        for image, tokens in zip(images.tolist(), projection(x[0]), strict=True):
            values[start[image] : start[image + 1]] = tokens.flatten(0, 1).numpy()
    return Projected(values, start)


def load_faiss() -> Any:
    """The library, imported on first use, with as many threads as torch and without its reports on how it was loaded."""
    logging.getLogger("faiss").setLevel(logging.WARNING)
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def check_components(n_components: int, dim: int) -> None:
    """Refuse more principal components than channels.

    Raises:
        UserError: naming both.
    """
    if not 1 <= n_components <= dim:
        raise UserError(f"pca={n_components} components of tokens with {dim} channels; set it to at most {dim}, or null")


def check_clusters(n_clusters: int, n_tokens: int) -> None:
    """Refuse more clusters than tokens.

    Raises:
        UserError: naming both.
    """
    if not 1 <= n_clusters <= n_tokens:
        raise UserError(f"{n_clusters} clusters of {n_tokens} tokens are not possible; take fewer clusters or more images")


def cluster(
    values: np.ndarray, n_clusters: int, *, seed: int, iterations: int, restarts: int, max_points: int, spherical: bool = False
) -> Any:
    """K-means; the answer is the index of its centroids (search with `assign`).

    Args:
        values: [n, P] float32.
        max_points: tokens per cluster that are trained on, a random part of all (faiss' own default is 256).
        spherical: centroids of unit length, compared by inner product.

    Raises:
        UserError: fewer tokens than clusters.
    """
    check_clusters(n_clusters, len(values))
    faiss = load_faiss()
    kmeans = faiss.Kmeans(
        values.shape[1],
        n_clusters,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,
        max_points_per_centroid=max_points,
    )
    kmeans.train(values)
    return kmeans.index


def assign(index: Any, values: np.ndarray) -> np.ndarray:
    """Nearest centroid of every row, int64 [n]."""
    return index.search(values, 1)[1][:, 0]
