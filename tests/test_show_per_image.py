"""The scores of single images: with the resamples they give every interval again, and each is what brute force gives."""

import csv
import json

import pytest
import torch
from program import SCENES, TINY, Finished, run
from samples import planted_sample

from metrics.bootstrap import Estimate, interval, resample
from pairs.scores import PairScores, pair_strata
from runs.states import load_state
from show.per_image import UNDEFINED, read_scores


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A tiny run with controls of one layer and of several."""
    folder = tmp_path_factory.mktemp("scores")
    return run(folder, *TINY, "controls=[position,cosine]", "model.layers=[embed,0]")


def test_influences_reproduce_every_interval_exactly(trained: Finished) -> None:
    state = read_scores(trained.dir)
    recipe, n_checked = state.recipe, 0
    records = {
        (r["name"], r["layer_index"], r["question"], r["readout"], r["subset"]): r
        for r in trained.records()
        if (r["kind"], r.get("seed")) == ("score", "mean")
    }
    counts = resample(len(recipe["images"]), recipe["n_boot"], recipe["seed"])
    for entry in recipe["results"]:
        place = (entry["question"], entry["readout"], entry["subset"])
        for metric in entry["metrics"]:
            influence = state.tensors["/".join((entry["name"], *place, "influence", metric))]  # [L, M]
            of_layers = [records[entry["name"], index, *place] for index in range(len(entry["layers"]))]
            values = [r["metrics"][metric] for r in of_layers]
            estimate = Estimate(torch.tensor([v if v is not None else 0.5 for v in values], dtype=torch.float64), influence)
            low, high = interval(estimate, counts)
            for index, record in enumerate(of_layers):
                if record["metrics"][metric] is not None:
                    assert record["interval"][metric] == [float(low[index]), float(high[index])]
                    n_checked += 1
    assert n_checked >= 20 and {entry["name"] for entry in recipe["results"]} == {"probe", "position", "cosine"}


def brute_force(scores: torch.Tensor, same: torch.Tensor, kept: torch.Tensor, distance: torch.Tensor | None) -> float | None:
    """Share of (one object, two objects) couples of pairs that are in the right order, ties half; of one distance only."""
    won = couples = 0.0
    positive, negative = (kept & same).nonzero().flatten().tolist(), (kept & ~same).nonzero().flatten().tolist()
    for i in positive:
        for j in negative:
            if distance is None or abs(float(distance[i] - distance[j])) < 1e-4:
                couples += 1
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
    return won / couples if couples else None


@pytest.mark.parametrize("levels", [0, 3])
def test_the_auroc_of_an_image_is_that_of_its_pairs(levels: int) -> None:
    """With many ties (`levels` different scores) too; images with pairs of one kind only have none."""
    sample, n_fits = planted_sample(n_images=6, n_tokens=9), 2
    sample.labels["identity"][2] = 1  # one object: nothing to compare
    sample.labels["class"][2] = 1
    strata = pair_strata(sample.labels["identity"], sample.labels["class"], None, sample.position)
    logits = torch.randn(n_fits, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    logits = (logits * levels).round() if levels else logits
    scores = PairScores(strata, n_fits)
    for images in torch.arange(6).split(4):
        scores.add(images, logits[:, images])
    lowest = {"all": 0, "foreground": 1, "same_class": 3, "same_class_matched": 3}
    blocks = scores.evaluate()
    for name, block in blocks.items():
        for image in range(6):
            kept = (strata.kind[image] >= lowest[name]) & (strata.kind[image] != 255)
            distance = strata.distance[image] if name == "same_class_matched" else None
            assert int(block.per_image["n_pairs"][image]) == int(kept.sum())
            assert int(block.per_image["n_positive"][image]) == int((kept & strata.same[image]).sum())
            for fit in range(n_fits):
                expected = brute_force(scores.scores[fit, image], strata.same[image], kept, distance)
                got = float(block.per_image["auroc"][fit, image])
                assert got != got if expected is None else got == pytest.approx(expected, abs=1e-12)
    assert bool(blocks["all"].per_image["auroc"][:, 2].isnan().all())
    assert not bool(blocks["all"].per_image["auroc"][:, 0].isnan().any())
    assert scores.evaluate(detail=False)["all"].per_image == {}


def test_the_table_of_images_agrees_with_the_tensors(trained: Finished) -> None:
    state = read_scores(trained.dir)
    with open(trained.dir / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    subsets = {row["subset"] for row in rows}
    assert subsets == {"all", "foreground", "same_class", "same_class_matched"}
    images = state.recipe["images"]
    assert len(rows) == len(subsets) * 2 * len(images) and {row["image"] for row in rows} == set(images)
    for row in rows[:: len(rows) // 40]:
        prefix = f"probe/{row['question']}/{row['readout']}/{row['subset']}"
        layer, image = ["embed", "0"].index(row["layer"]), images.index(row["image"])
        auroc = float(state.tensors[f"{prefix}/auroc"][layer, image])
        assert (row["auroc"] == "") == (auroc == UNDEFINED)
        assert not row["auroc"] or float(row["auroc"]) == pytest.approx(auroc, abs=1e-6)
        influence = float(state.tensors[f"{prefix}/influence/auroc"][layer, image])
        assert float(row["influence"]) == pytest.approx(influence, rel=1e-6)
    facts = json.loads((trained.dir / "run.json").read_text())
    assert set(facts["sha256"]) == {"scores.csv", "scores.safetensors"}


def test_predictions_give_the_scores_again(trained: Finished) -> None:
    """From predictions.safetensors alone: the pairs of layer 0, ranked by their logits, have the recorded AUROC."""
    folder = trained.dir.parents[2]
    again = run(folder, "mode=eval", f"run={trained.dir}", "eval.predictions=true", "wandb.mode=disabled")
    state = load_state(again.dir / "predictions.safetensors")
    prediction = state.tensors["prediction"]  # [S, L, M, P]
    fits, n_images = state.recipe["fits"], int(SCENES[2].partition("=")[2])
    assert prediction.shape[:3] == (len(fits), 2, n_images) and fits[0] == {"variant": "all", "seed": 0}
    identity, valid = state.tensors["label/identity"], state.tensors["label/identity_valid"]
    scores = PairScores(pair_strata(identity, None, valid), 1)
    scores.scores[0], scores.seen[:] = prediction[0, 1], True
    (record,) = (
        r for r in again.records() if (r["kind"], r.get("seed"), r["layer"], r["subset"]) == ("score", 0, 0, "all")
    )  # fmt: skip
    assert float(scores.evaluate(["all"])["all"].metrics["auroc"].value) == pytest.approx(record["metrics"]["auroc"], abs=1e-12)
    assert not (trained.dir / "predictions.safetensors").exists()
