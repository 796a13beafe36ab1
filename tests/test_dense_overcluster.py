"""Projection, k-means and matching of clusters to classes."""

import pytest
import torch

from dense.contract import Grids, LabelMaps
from dense.overcluster import cluster_counts, overcluster
from dense.projection import fit_projection, project
from errors import UserError


def planted(n_images=9, n_classes=4, grid=6, patch=3, noise=0.1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    named = torch.randint(0, n_classes, (n_images, grid, grid), generator=rng)
    tokens = torch.randn(n_classes, 10, generator=rng)[named] * 3 + 50
    tokens = tokens + noise * torch.randn(tokens.shape, generator=rng)
    maps = named.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return Grids.from_tensor(tokens[None], patch=patch), LabelMaps.from_tensor(maps, n_classes)


def test_projection_equals_a_plain_decomposition():
    tokens = torch.randn(5, 4, 3, 6) * torch.arange(1, 7) + 1000
    tokens[..., 2] = 7.0  # a constant channel
    grids = Grids.from_tensor(tokens[None], patch=2)
    projection = fit_projection(grids, n_components=3)
    found = project(grids, projection)
    flat = tokens.flatten(0, 2).double()
    z = (flat - flat.mean(0)) / flat.std(0, correction=0).clamp_min(1e-9)
    z[:, 2] = 0
    _, values, v = torch.linalg.svd(z, full_matrices=False)
    expected = z @ v[:3].T
    values = torch.from_numpy(found.values).double()
    torch.testing.assert_close(values.abs(), expected.abs(), atol=2e-3, rtol=1e-3)
    assert found.start.tolist() == [0, 12, 24, 36, 48, 60]
    alone = fit_projection(grids, n_components=None)
    torch.testing.assert_close(alone.shift, projection.shift)
    torch.testing.assert_close(alone.scale, projection.scale)


def test_planted_classes_are_found_and_every_image_counts():
    grids, maps = planted()
    options = {"n_clusters": ["classes", 12], "seeds": 2, "pca": 4, "iterations": 10, "restarts": 2, "size": 18}
    results = overcluster({"test": grids}, {"test": maps}, **options)
    assert len(results) == 2 * 2 * 3
    published = [r for r in results if r.notes["published"]]
    assert [r.setting["matching"] for r in published] == ["hungarian"] * 2 + ["many_to_one_precision"] * 2
    assert all(float(r.metrics["miou"].value) > 0.99 for r in published)
    assert all(int(r.confusion.sum()) == 9 * 18 * 18 for r in results)
    again = overcluster({"test": grids}, {"test": maps}, **options)
    assert all(torch.equal(a.confusion, b.confusion) for a, b in zip(results, again, strict=True))


def test_shuffled_labels_are_not_found():
    grids, maps = planted()
    order = torch.randperm(9)
    shuffled = maps.subset(order.roll(1))
    found = overcluster({"test": grids}, {"test": shuffled}, n_clusters=4, seeds=1, pca=4, iterations=10, restarts=2, size=18)
    assert all(float(r.metrics["miou"].value) < 0.5 for r in found)


def test_what_is_asked_is_checked_first():
    grids, maps = planted(n_images=1)
    assert cluster_counts(["classes", 300, 4], 4) == [4, 300]
    with pytest.raises(UserError, match="37 clusters of 36 tokens"):
        overcluster({"test": grids}, {"test": maps}, n_clusters=37)
    with pytest.raises(UserError, match="expected numbers of clusters"):
        overcluster({"test": grids}, {"test": maps}, n_clusters="many")
    with pytest.raises(UserError, match="pca=11 components of tokens with 10 channels"):
        overcluster({"test": grids}, {"test": maps}, n_clusters=4, pca=11)
