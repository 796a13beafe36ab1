"""trainer.folds: every image is tested once by probes that never saw it; folds resume one by one and pool exactly."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import FIT, MODEL, run
from samples import planted_sample

import trainer
from errors import UserError
from metrics.bootstrap import Estimate, interval, pooled_estimate, resample
from pairs.folds import PooledTokens, deal, pool, take
from show.choice import best_layer, chosen_estimate, objective
from show.per_image import read_scores
from show.records import Column
from store.shards import StackedTokens
from tasks import Fold, ProbeResult, SubsetResult

COLUMN = Column("is_same_object", "logit", "all", "auroc", "all pairs AUROC")
SPLITS = ("train", "val", "test")


@pytest.mark.parametrize(("sizes", "n_folds"), [((10, 3, 7), 5), ((4, 1, 1), 3), ((9, 1, 3), 2), ((5, 0, 5), 4)])
def test_every_image_is_tested_once_and_kept_out_of_its_own_fit(sizes: tuple[int, ...], n_folds: int) -> None:
    total = sum(sizes)
    folds = deal(dict(zip(SPLITS, sizes, strict=True)), n_folds, seed=0)
    assert sorted(torch.cat([fold["test"] for fold in folds]).tolist()) == list(range(total))
    for fold in folds:
        assert sorted(torch.cat(list(fold.values())).tolist()) == list(range(total))  # each in one split
        assert min(len(images) for images in fold.values()) >= 1
    again = deal(dict(zip(SPLITS, sizes, strict=True)), n_folds, seed=1)
    assert any(not torch.equal(fold["train"], other["train"]) for fold, other in zip(folds, again, strict=True))


def test_too_many_folds_are_refused() -> None:
    with pytest.raises(UserError, match="trainer.folds=6 and there are 10 images; at most trainer.folds=5 fits"):
        deal({"train": 5, "val": 2, "test": 3}, 6, seed=0)


def test_pooled_tokens_are_those_of_their_sources() -> None:
    samples = {split: planted_sample(n_images=n, seed=n) for split, n in zip(SPLITS, (5, 3, 4), strict=True)}
    pooled = pool(samples)
    every = torch.cat([samples[split].tokens.gather(torch.arange(n)) for split, n in zip(SPLITS, (5, 3, 4), strict=True)], 1)
    torch.testing.assert_close(pooled.tokens.gather(torch.arange(12)), every)
    some = take(pooled, torch.tensor([11, 0, 6]))
    torch.testing.assert_close(some.tokens.gather(torch.tensor([2, 0]), [1]), every[1:, [6, 11]])
    assert some.keys == ["test/image3", "train/image0", "val/image1"]
    assert torch.equal(some.labels["identity"][1], samples["train"].labels["identity"][0])
    assert some.meta["fingerprint"] != take(pooled, torch.tensor([11, 0, 7])).meta["fingerprint"]
    one = PooledTokens([StackedTokens.from_tensor(torch.ones(1, 2, 3, 4), ["embed"])], torch.tensor([1, 1]))
    assert one.shape == (1, 2, 3, 4) and one.gather([0, 1]).shape == (1, 2, 3, 4)


def test_pooling_weighs_by_images_and_skips_what_is_undefined() -> None:
    """By hand: folds of 1, 2 and 3 images; the last has no score in the second fit."""
    images = [torch.tensor([4]), torch.tensor([0, 5]), torch.tensor([1, 2, 3])]
    values, rng = [[0.5, 0.2], [0.8, 0.5], [0.6, float("nan")]], torch.Generator().manual_seed(0)
    parts = [
        Estimate(torch.tensor(v, dtype=torch.float64), torch.randn(2, len(at), generator=rng, dtype=torch.float64))
        for v, at in zip(values, images, strict=True)
    ]
    parts[2].influence[1] = 0
    pooled = pooled_estimate(parts, images, 6)
    assert pooled.value.tolist() == pytest.approx([(0.5 + 1.6 + 1.8) / 6, (0.2 + 1.0) / 3])
    assert pooled.influence[0, 1:4].tolist() == pytest.approx((parts[2].influence[0] / 2).tolist())
    (alone,), (first, last) = parts[0].influence[1].tolist(), parts[1].influence[1].tolist()
    assert pooled.influence[1].tolist() == pytest.approx([2 / 3 * first, 0, 0, 0, alone / 3, 2 / 3 * last])
    nothing = Estimate(torch.full((2,), torch.nan, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64))
    assert pooled_estimate([nothing], [torch.arange(6)], 6).value.isnan().all()


def test_every_fold_chooses_its_own_layer() -> None:
    def fold(values: list[float], validation: list[float], images: list[int]) -> Fold:
        e = Estimate(torch.tensor(values, dtype=torch.float64), torch.zeros(2, len(images), dtype=torch.float64))
        subset = SubsetResult(*COLUMN[:3], {"auroc": e}, {"n_images": len(images)}, [])
        result = ProbeResult("probe", "", "probe", ["embed", 0], [0], [subset], {COLUMN[:4]: validation}, 3, list(images))
        return Fold(torch.tensor(images), result)

    folds = [fold([0.6, 0.9], [0.9, 0.1], [0, 1]), fold([0.7, 0.8], [0.2, 0.3], [2])]
    pooled = folds[0].result._replace(validation=None, keys=["a", "b", "c"], folds=folds)
    assert best_layer(pooled, COLUMN) is None
    layer, estimate = chosen_estimate(pooled, COLUMN)
    assert layer == "embed 0" and float(estimate.value) == pytest.approx((2 * 0.6 + 0.8) / 3)
    assert objective(pooled, COLUMN, "test") == pytest.approx((2 * 0.9 + 0.3) / 3)


def write_images(root: Path, n: int = 12) -> None:
    """Pictures of two coloured squares on grey, with identity maps."""
    rng = np.random.default_rng(0)
    for kind in ("images", "identity"):
        (root / kind).mkdir(parents=True)
    for number in range(n):
        identity = np.zeros((96, 96), np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, 48), (label - 1) * 48
            identity[top : top + 48, left : left + 48] = label
        colors = np.concatenate([[[128, 128, 128]], rng.integers(0, 256, (2, 3))])
        pixels = (colors[identity] + rng.normal(0, 8, (96, 96, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:02d}.png")
        Image.fromarray(identity).save(root / "identity" / f"{number:02d}.png")


def test_the_command_tests_every_image_of_a_folder_once_and_resumes_fold_by_fold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "mine")
    splits = ["dataset.val_fraction=0.34", "dataset.test_fraction=0.34", "protocol.selection.patches=all"]
    data = ["dataset=folder", f"dataset.root={tmp_path}/mine", *splits, "model.layers=[embed,0]"]
    command = [*MODEL, *FIT, *data, "controls=[position]", "trainer.folds=3", "trainer.batch_images=4"]
    real, fits = trainer.fit, []

    def stop_at_third(*args, **kwargs):
        fits.append(args[2].name)
        if len(fits) == 3:
            raise UserError("stopped")
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "fit", stop_at_third)
    with pytest.raises(SystemExit, match="stopped"):
        run(tmp_path, *command)
    done = run(tmp_path, *command)
    names = [f"{name}/fold-{k}" for name in ("probe", "position") for k in (1, 2, 3)]
    assert fits == [*names[:3], *names[2:]]  # the folds that were fitted are only read
    assert 0 <= done.objective <= 1

    state, records = read_scores(done.dir), done.records()
    images = [f"{number:02d}" for number in range(12)]
    assert sorted(key.split("/")[1] for key in state.recipe["images"]) == images
    of_splits = {r["split"]: r["n_images"] for r in records if (r["kind"], r.get("subset")) == ("score", "all")}
    assert of_splits == {"fold-1": 4, "fold-2": 4, "fold-3": 4, "test": 12}
    influence = state.tensors["probe/is_same_object/logit/all/influence/auroc"]  # [L, 12]
    assert influence.shape == (2, 12) and bool((influence != 0).all())
    scores = {(r["split"], r["layer_index"]): r for r in records
              if (r["kind"], r["name"], r.get("seed"), r["subset"]) == ("score", "probe", "mean", "all")}  # fmt: skip
    for layer in range(2):
        value = scores["test", layer]["metrics"]["auroc"]
        assert value == pytest.approx(np.mean([scores[f"fold-{k}", layer]["metrics"]["auroc"] for k in (1, 2, 3)]))
        estimate = Estimate(torch.tensor([value], dtype=torch.float64), influence[layer : layer + 1])
        low, high = interval(estimate, resample(12, 20, 0))
        assert scores["test", layer]["interval"]["auroc"] == [float(low), float(high)]
    assert {r["split"] for r in records if r["kind"] == "validation"} == {f"fold-{k} val" for k in (1, 2, 3)}
    with open(done.dir / "layers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"] for row in rows if row["kind"] == "gain"} == {"embed", "0", "chosen"}
    log = (done.dir / "log.txt").read_text()
    assert "12 images, each tested once in 3 folds" in log and "warning: 12 test images, fewer than 50: expect" in log
    run(tmp_path, "mode=report", f"runs={done.dir}")  # which reads the pooled records alone
    with pytest.raises(SystemExit, match="was fitted in 3 folds and has no one probe to look at"):
        run(tmp_path, "mode=eval", f"run={done.dir}", "wandb.mode=disabled")
    with pytest.raises(SystemExit, match="trainer.folds=3 and mode=train_binding fits no probe on patches; leave it out"):
        run(tmp_path, "mode=train_binding", "trainer.folds=3")
    shutil.rmtree(tmp_path / "mine")


def test_few_images_are_warned_of_before_anything_is_fitted(tmp_path: Path) -> None:
    write_images(tmp_path / "mine", 8)
    done = run(tmp_path, "mode=check_data", "dataset=folder", f"dataset.root={tmp_path}/mine", "dataset.val_fraction=0.3",
               "dataset.test_fraction=0.3", "wandb.mode=disabled")  # fmt: skip
    log = (done.dir / "log.txt").read_text()
    n_test = next(r["readable"] for r in done.records() if r["split"] == "test")
    width = 1.96 * 0.13 / n_test**0.5
    assert f"warning: {n_test} test images, fewer than 50: expect 95 % intervals of ± {width:.2g} (same class" in log
    assert "training images, fewer than 100" in log and log.count("trainer.folds=5") == 1
