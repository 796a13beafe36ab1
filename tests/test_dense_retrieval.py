"""Dense retrieval against the published program's numbers and its laws."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dense import retrieval as module
from dense.contract import Grids, LabelMaps, predict_pixels, soft_labels
from dense.retrieval import (
    FaissSearch,
    MemoryBank,
    build_bank,
    choose_images,
    nearest,
    patches_per_image,
    retrieval,
    sampling_scores,
    transfer,
)
from errors import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden/neco/hummingbird.json").read_text())


def test_patch_labels_and_sampling_equal_the_published_ones():
    maps = torch.tensor(GOLDEN["gt"])
    shares = soft_labels(maps, (2, 2), GOLDEN["num_classes"])
    torch.testing.assert_close(shares, torch.tensor(GOLDEN["patch_soft_labels"]))
    flat = shares.flatten(1, 2)
    assert sampling_scores(flat, torch.ones(1, 4)).view(1, 2, 2).tolist() == GOLDEN["patch_scores"]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 2, 2, 5)
    bank = build_bank([(tokens, maps)], 3, per_image=2, generator=generator, dtype=torch.float32)
    kept = sorted(GOLDEN["sampled_indices_torch_seed0"][0])
    unit = F.normalize(tokens.view(4, 5), dim=-1)
    assert sorted(((bank.tokens[:, None] - unit).norm(dim=-1) < 1e-6).nonzero()[:, 1].tolist()) == kept


def test_neighbours_and_transferred_labels_equal_the_published_ones():
    raw, labels = torch.tensor(GOLDEN["bank_raw"]), torch.tensor(GOLDEN["bank_labels"])
    bank = MemoryBank(F.normalize(raw, dim=-1), labels)
    queries = torch.tensor(GOLDEN["queries"])[0]
    products, rows = nearest(queries, bank.tokens, GOLDEN["k"])
    assert rows.tolist() == GOLDEN["nn_indices_inner_product"]
    torch.testing.assert_close(products, torch.tensor(GOLDEN["nn_scores_fp32"]), atol=2e-5, rtol=0)
    products, rows = nearest(F.normalize(queries, dim=-1), bank.tokens, GOLDEN["k"])
    for temperature, expected in GOLDEN["label_hat"].items():
        found = transfer(products, rows, labels, float(temperature))
        torch.testing.assert_close(found[None], torch.tensor(expected), atol=2e-4, rtol=0)
    shares = transfer(products, rows, labels).view(1, 2, 2, 3)
    assert predict_pixels(shares, (8, 8)).tolist() == GOLDEN["upsampled_bilinear_align_corners_false_pred_map"]


@pytest.mark.parametrize("search", ["flat_search", "product_search"])
@pytest.mark.parametrize("n", [5, 64, 1000, 1037])
def test_nearest_is_exact_whatever_the_chunks(n, search, monkeypatch):
    monkeypatch.setattr("dense.retrieval.flat_search", getattr(module, search))
    monkeypatch.setattr("dense.retrieval.QUERIES", 5)
    queries, bank = torch.randn(13, 8), torch.randn(n, 8).half()
    products = queries @ bank.float().T
    expected = products.sort(1, descending=True)
    for chunk in (32, 100, 4096):
        found, rows = nearest(queries, bank, 7, chunk=chunk)
        torch.testing.assert_close(found, expected.values[:, : min(7, n)])
        torch.testing.assert_close(products.gather(1, rows), found)


def test_faiss_finds_almost_the_same():
    bank = F.normalize(torch.randn(600, 8), dim=-1)
    queries = bank[:20] + 0.01 * torch.randn(20, 8)
    _, rows = FaissSearch(bank)(queries, 3)
    assert rows[:, 0].tolist() == list(range(20))
    with pytest.raises(UserError, match="search=exact"):
        FaissSearch(bank[:100])


def planted(n_images=6, n_classes=3, patch=4, grid=4, noise=0.2, seed=0):
    """Tokens that are the code of their patch's class plus noise, and maps with a class per patch and a void row."""
    rng = torch.Generator().manual_seed(seed)
    named = torch.randint(0, n_classes, (n_images, grid, grid), generator=rng)
    codes = torch.eye(n_classes, 8)
    tokens = codes[named] + noise * torch.randn(n_images, grid, grid, 8, generator=rng)
    maps = named.repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    maps[:, 0] = 255
    return Grids.from_tensor(tokens[None], patch=patch), LabelMaps.from_tensor(maps, n_classes)


def test_retrieval_reads_what_is_planted_and_void_is_left_out():
    train, test = planted(), planted(seed=1)
    features, labels = {"train": train[0], "test": test[0]}, {"train": train[1], "test": test[1]}
    results = retrieval(features, labels, neighbours=5)
    assert [r.setting["matching"] for r in results] == ["direct", "hungarian"]
    assert all(float(r.metrics["accuracy"].value) > 0.9 for r in results)
    assert results[0].notes == {"bank": 6 * 16, "train_images": 6}
    few = retrieval(features, labels, neighbours=5, fraction="1/3", memory_size=8, seeds=2)
    assert [r.setting["seed"] for r in few] == [0, 0, 1, 1] and few[0].notes == {"bank": 8, "train_images": 2}
    again = retrieval(features, labels, neighbours=5, fraction="1/3", memory_size=8, seeds=2)
    assert torch.equal(few[2].confusion, again[2].confusion)


def test_void_becomes_class_0_only_where_asked():
    tokens, maps = torch.randn(1, 1, 2, 4), torch.tensor([[[255, 255, 1, 255], [255, 255, 1, 1]]])
    options = {"per_image": None, "generator": torch.Generator(), "dtype": torch.float32}
    dropped = build_bank([(tokens, maps)], 2, **options)
    assert dropped.labels.tolist() == [[0.0, 1.0]]
    published = build_bank([(tokens, maps)], 2, void="class_0", **options)
    assert published.labels.tolist() == [[1.0, 0.0], [0.25, 0.75]]


def test_fractions_are_nested_and_checked():
    small, large = choose_images(64, "1/8", 42), choose_images(64, "1/2", 42)
    assert len(small) == 8 and len(large) == 32 and set(small.tolist()) < set(large.tolist())
    assert len(choose_images(10582, "1/8", 0)) == 1322
    with pytest.raises(UserError, match="leaves none"):
        choose_images(100, "1/128", 0)
    for wrong in ("2/1", "0", "1/0", "x"):
        with pytest.raises(UserError, match="fraction"):
            choose_images(10, wrong, 0)


def test_a_memory_is_shared_by_the_images():
    assert patches_per_image(1024 * 10_000, 2 * 10582) == 483
    assert patches_per_image(1024 * 100, 2 * 10582) == 4
    assert patches_per_image(10, 100) == 1 and patches_per_image(None, 5) is None
    train, maps = planted()
    features, labels = {"train": train, "test": train}, {"train": maps, "test": maps}
    assert retrieval(features, labels, memory_size=10**6)[0].notes["bank"] == 6 * 16
    with pytest.raises(UserError, match="unknown dense_retrieval.void"):
        retrieval(features, labels, void="keep")
