"""mode=plan: bytes are those that come out, widths follow the law of the square root, and what cannot be planned is refused."""

import functools
import math
from pathlib import Path

import pytest
import torch
from program import TINY, places
from samples import planted_sample

import trainer
import vit_probing as vp
from controls import PROBE_ROW, Subject
from errors import UserError
from metrics.bootstrap import interval, resample
from pairs.pilot import NORMAL, Costs, Pilot, _deviation, growth, visits
from pairs.plan import NIGHT, cheapest, overnight, report
from pairs.task import Pairwise, columns
from runs.run import wrapped

OPTIONS = functools.cache(lambda: trainer.FitOptions.read(vp.compose(*TINY)))
SMALL = ["dataset.n_train=24", "dataset.n_val=9", "dataset.n_test=17", "model.layers=[embed,7]",
         "cache.shard_images=5", "trainer.epochs=1", "trainer.seeds=1", "trainer.n_boot=20", "wandb.mode=disabled",
         "controls=[pixels,random]"]  # fmt: skip


def plan_of(folder: Path, *overrides: str) -> dict:
    run = vp.run("mode=plan", *places(folder), *overrides)
    return next(record for record in run.records if record["kind"] == "plan")


@pytest.mark.parametrize("more", [[], ["protocol.selection.patches=7", "cache.dtype=float32", "controls=none"]])
def test_bytes_are_those_that_come_out(tmp_path: Path, more: list[str]) -> None:
    plan = plan_of(tmp_path, "plan.images=8", *SMALL, *more)
    assert not list((tmp_path / "cache").glob("tokens/*")), "nothing is left of the pilot"
    vp.run(*places(tmp_path), *SMALL, *more)
    files = list((tmp_path / "cache" / "tokens").rglob("layer_*/*.safetensors"))
    assert plan["total_bytes"] == sum(file.stat().st_size for file in files) > 0
    assert plan["images"] == {"train": 24, "val": 9, "test": 17} and plan["seconds"]["fits"] > 0
    assert set(plan["half_width"]) == {"all pairs AUROC", "foreground AUROC", "same class, matched AUROC"}


def scored(n_images: int, seed: int) -> tuple:
    """Cosine similarity, which nothing is fitted for, on images with objects in a known way."""
    sample = planted_sample(n_images, seed=seed, noise=0.8)
    task, settings = Pairwise([0], ["all"]), {"mode": "cosine", "standardize": False, "learn_scale": False}
    probe = task.build_probe(settings, sample, sample.tokens.layers)
    subject = Subject(PROBE_ROW, "", settings, {"test": sample}, [0])
    result = trainer.evaluate(task, [probe], subject, OPTIONS(), split="test")
    return result, columns("pairwise", "upper", {"is_same_object"})[0]


@pytest.mark.parametrize("seed", range(5))
def test_widths_of_more_images_follow_from_a_few(seed: int) -> None:
    few, column = scored(60, seed)
    many, _ = scored(400, seed + 100)
    expected = NORMAL * _deviation(few, column) / math.sqrt(400)
    low, high = interval(many.subsets[0].metrics["auroc"], resample(400, 2000, seed))
    assert float((high - low).mean() / 2) == pytest.approx(expected, rel=0.2)


def test_seconds_grow_with_what_costs_them() -> None:
    costs, images = Costs(10.0, 3.0, 0.1, 0.4, 0.01, 0.2), {"train": 100, "val": 20, "test": 30}
    seconds = costs.seconds(images, epochs=2)
    assert visits(images, 2) == 2 * (3 * 100 + 20)
    assert seconds == pytest.approx({"labels and tokens": 10 + 150 * 0.5, "fits": 6.4, "scores and figure": 3 + 0.2 * 50})


@pytest.mark.parametrize(
    ("ratios", "n_train", "factor"),
    [([2**0.25], 400, 0.25**0.25), ([2**0.2, 2**0.3], 400, 0.25**0.25), ([2**0.25, math.nan], 400, 0.25**0.25),
     ([3.0], 400, 0.5), ([0.9], 400, 1.0), ([1.2], 100, 1.0), ([1.2], 50, 1.0), ([], 400, 1.0)],
)  # fmt: skip
def test_the_growth_of_a_probe_that_sees_more(ratios: list[float], n_train: int, factor: float) -> None:
    assert growth(ratios, 100, n_train) == pytest.approx(factor)  # from 100 images on, 1 / sqrt(n) at most


def pilot(deviation: dict[int, float]) -> Pilot:
    title = "all pairs AUROC"
    return Pilot(Costs(5.0, 0.0, 0.0, 0.1, 0.001, 0.05), {title: deviation}, {title: 0.8}, {title: 7}, 100)


def test_the_cheapest_way_is_first_and_wide_enough() -> None:
    cfg, images = vp.compose(*TINY), {"train": 100, "val": 20, "test": 30}
    piloted = pilot({16: 0.2, 32: 0.12, 64: 0.1})
    assert piloted.half_width("all pairs AUROC", 64, 100) == pytest.approx(NORMAL * 0.01)
    ways = cheapest(cfg, piloted, images, 0.05)
    for way in ways:
        half = piloted.half_width("all pairs AUROC", way["patches"], way["test_images"])
        one_less = piloted.half_width("all pairs AUROC", way["patches"], way["test_images"] - 1)
        assert half <= 0.05 < one_less and way["enough"] == (way["test_images"] <= 30)
    enough = [way["seconds"] for way in ways if way["enough"]]
    assert ways[0]["enough"] and enough == sorted(enough) and len(ways) == 6  # two layers, three numbers of patches
    narrow = cheapest(cfg, piloted, images, 0.025)
    assert {w["patches"]: w["test_images"] for w in narrow}[64] == math.ceil((NORMAL * 0.1 / 0.025) ** 2)
    assert not any(way["enough"] for way in cheapest(cfg, piloted, images, 0.001))


def test_a_night_is_filled_with_the_narrowest_interval_first() -> None:
    cfg, images = vp.compose(*TINY), {"train": 20000, "val": 1000, "test": 4000}
    piloted = pilot({16: 0.2, 32: 0.12, 64: 0.1})
    piloted = piloted._replace(costs=piloted.costs._replace(tokens=4.0))
    ways = overnight(cfg, piloted, images)
    assert [way["patches"] for way in ways[:2]] == [64, 64] and ways[0]["layers"] == 1  # of one layer more images fit
    widths = [way["half_width"] for way in ways]
    assert widths == sorted(widths) and len(ways) == 6
    for way in ways:
        assert 0.98 * NIGHT < way["seconds"] <= NIGHT and way["images"]["train"] == int(20000 * way["share"])
        assert way["half_width"] == piloted.half_width("all pairs AUROC", way["patches"], way["images"]["test"])
    cfg.cache.disk_gb = 2 * ways[-1]["bytes"] / 1e9
    assert 0 < len(overnight(cfg, piloted, images)) < 6 and overnight(cfg, piloted, images, limit=6.0) == []


def test_the_report_fits_a_terminal(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "plan.images=8", "plan.width=0.02", *SMALL, "controls=none")
    plan["overnight"] = [{**way, "images": plan["images"], "half_width": 0.01} for way in plan["ways"]]
    plan["warnings"] = ["model, train takes 90.4 GB"]
    text = wrapped(report(plan))
    assert max(map(len, text.splitlines())) <= 100 and "the cheapest first" in text and "a night" in text
    assert [way["layers"] for way in plan["ways"]].count(2) == 3


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["plan.width=0.7"], "plan.width: got 0.7, expected a half-width between 0 and 0.5"),
        (["plan.width=narrow"], "plan.width: got narrow"),
        (["trainer.folds=5"], "mode=plan plans one fit of each probe, got trainer.folds=5"),
        (["dataset.n_test=7"], "split test has 7 readable images, a plan needs 8"),
        (["plan.images=many"], "plan.images: got 'many', expected a whole number"),
        (["probe.mode=class_linear"], "needs a pairwise probe"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        vp.run("mode=plan", *places(tmp_path), *SMALL, *overrides)


def test_a_pilot_draws_no_random_number(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first, again = (plan_of(tmp_path / name, "plan.images=8", *SMALL, "controls=none") for name in ("a", "b"))
    assert first["half_width"] == again["half_width"] and torch.equal(state, torch.random.get_rng_state())
