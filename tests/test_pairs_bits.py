"""IsSameObject in bits: by brute force, in planted worlds beside their truth, and end to end."""

import importlib.util
import itertools
import math
from dataclasses import replace
from pathlib import Path

import program
import pytest
import torch
from samples import planted_sample

from controls import Subject, constant_loss
from metrics.bootstrap import interval, resample
from metrics.code_length import base_rate_bits
from pairs.bits import Bits, Sent
from pairs.code_length import _sent, code_length
from pairs.usable_information import GIVEN, Given, Usable, _with_places, pair_cells
from probes import build_probe
from runs.run import Run
from store.shards import StackedTokens
from tasks import Batch, FitReport, ProbeResult, SubsetResult
from trainer import FitOptions

SCRIPT = Path(__file__).parent.parent / "scripts" / "planted_bits.py"
spec = importlib.util.spec_from_file_location("planted_bits", SCRIPT)
planted_bits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted_bits)

SETTINGS = {"variants": ["all", "foreground"], "per_visit": None, "pairs": "upper"}


def labelled(seed=0, n_images=6, n_tokens=7):
    """Labels with background, invalid patches and an object of two classes; logits of two variants and one layer."""
    rng = torch.Generator().manual_seed(seed)
    sample = planted_sample(n_images=n_images, n_tokens=16, seed=seed)
    cut = {name: value[:, :n_tokens].clone() for name, value in sample.labels.items()}
    cut["identity_valid"] = torch.rand(n_images, n_tokens, generator=rng) > 0.2
    cut["class"][cut["identity"] == 3] = torch.randint(0, 3, (int((cut["identity"] == 3).sum()),), generator=rng)
    cut["place"] = torch.randint(0, 12, (n_images, n_tokens, 2), generator=rng).float()
    tokens = StackedTokens.from_tensor(torch.zeros(1, n_images, n_tokens, 1), [0])
    sample = _with_places(sample._replace(tokens=tokens, labels=cut, position=sample.position[:, :n_tokens]))
    return sample, 2 * torch.randn(2, 1, n_images, n_tokens, n_tokens, generator=rng)


def batch_of(sample):
    return Batch(torch.arange(len(sample.keys)), None, sample.labels)


def listed(sample, subset):
    """(image, i, j, one object) of every pair of a subset, from its definition."""
    identity, class_, valid = (sample.labels[key].tolist() for key in ("identity", "class", "identity_valid"))
    for m, (i, j) in itertools.product(range(len(identity)), itertools.combinations(range(len(identity[0])), 2)):
        on_objects = identity[m][i] > 0 and identity[m][j] > 0
        one_class = class_[m][i] == class_[m][j] > 0
        if valid[m][i] and valid[m][j]:
            if {"all": True, "foreground": on_objects, "same_class": on_objects and one_class}[subset]:
                yield m, i, j, identity[m][i] == identity[m][j]


def cost(logit, same):
    return math.log2(1 + math.exp(-logit if same else logit))


def test_bits_of_every_subset_by_brute_force():
    sample, logits = labelled()
    task = Sent([0], **SETTINGS)
    task.scored = ("all", "foreground", "same_class")
    bits = Bits(task, sample, 1)
    bits.add(batch_of(sample), logits)
    results = {result.subset: result for result in bits.results()}
    assert list(results) == ["all", "foreground", "same_class"]
    for subset, result in results.items():
        answers = logits[int(subset != "all"), 0].tolist()
        costs = [(m, cost(answers[m][i][j], same)) for m, i, j, same in listed(sample, subset)]
        assert result.counts["n_pairs"] == len(costs)
        assert float(result.metrics["bits_per_pair"].value) == pytest.approx(sum(c for _, c in costs) / len(costs), abs=1e-6)
        for m in range(len(sample.keys)):
            assert float(result.per_image["bits"][0, m]) == pytest.approx(sum(c for at, c in costs if at == m), abs=1e-5)


def test_cells_are_classes_and_distances():
    sample, _ = labelled()
    cells, names = pair_cells(batch_of(sample)), {}
    class_, place = sample.labels["class"].tolist(), sample.labels["place"].tolist()
    for m, i, j, _ in listed(sample, "all"):
        a, b, (y, x), (v, u) = class_[m][i], class_[m][j], place[m][i], place[m][j]
        square = (y - v) ** 2 + (x - u) ** 2
        distance = square if square <= 64 else f"about {round(math.sqrt(square))}"
        agreement = "none" if a == b == 0 else "one" if 0 in (a, b) else "same" if a == b else "different"
        assert names.setdefault(int(cells[m, i, j]), (agreement, distance)) == (agreement, distance)
    assert len(set(names.values())) == len(names) > 20


def test_usable_information_is_the_entropy_of_the_cells_less_what_the_probe_leaves():
    """By brute force: the cells at the base rates of these pairs, the probe with its own offsets."""
    sample, logits = labelled()
    task = Given([0], sample, **SETTINGS)
    usable = Usable(task, sample, 1)
    usable.add(batch_of(sample), logits[:1])
    cells = pair_cells(batch_of(sample)).tolist()
    rates: dict[int, list[bool]] = {}
    for m, i, j, same in listed(sample, "foreground"):
        rates.setdefault(cells[m][i][j], []).append(same)
    for result in usable.results():
        pairs = list(listed(sample, result.subset))
        share = lambda m, i, j: sum(rates[cells[m][i][j]]) / len(rates[cells[m][i][j]])
        alone = [-math.log2(share(m, i, j) if same else 1 - share(m, i, j)) for m, i, j, same in pairs]
        left = [cost(float(logits[0, 0, m, i, j]), same) for m, i, j, same in pairs]
        value = (sum(alone) - sum(left)) / len(pairs)
        assert result.readout == GIVEN
        assert float(result.metrics["usable_information"].value) == pytest.approx(value, abs=1e-6)
        assert float(result.metrics["entropy"].value) == pytest.approx(sum(alone) / len(pairs), abs=1e-6)


def test_offsets_of_cells_stand_beside_every_probe():
    """The logit and the loss of a probe that says nothing are those of the cells; Newton's method has them too."""
    sample, _ = labelled(n_images=40)
    task, batch = Given([0], sample, **SETTINGS), batch_of(sample)
    x = torch.randn(1, 40, 7, 5)
    probe = build_probe({"mode": "quadratic"}, seeds=[0], layers=[0], dim=5)
    with torch.no_grad():
        probe.weight.zero_(), probe.bias.zero_()
    logits = task.logits(probe, x, batch)
    assert torch.allclose(logits[0, 0], task.offsets(batch))
    samples = {"train": sample, "val": sample}
    assert float(task.loss(probe, x, batch).detach()) == pytest.approx(float(constant_loss(task, samples, 64)), abs=1e-6)
    similar = build_probe({"mode": "dot_product", "learn_scale": True}, seeds=[0], layers=[0], dim=5)
    task.solve(similar, lambda: iter([(x, batch)]))
    best, moved = float(task.loss(similar, x, batch).detach()), []
    for name, step in itertools.product(("bias", "scale"), (-0.05, 0.05)):
        with torch.no_grad():
            getattr(similar, name).add_(step)
            moved.append(float(task.loss(similar, x, batch)))
            getattr(similar, name).sub_(step)
    assert min(moved) > best


@pytest.fixture(scope="module")
def options():
    with program.configured("trainer.epochs=3", "trainer.seeds=1", "threads=1") as cfg:
        return FitOptions.read(cfg)


def test_a_block_is_sent_with_what_came_before_it(tmp_path, options):
    """Other labels in the last block change the bits of that block alone; the first one goes at its base rate."""
    fit, probe = options, {"mode": "dot_product", "learn_scale": True}  # solved for
    sample = planted_sample(n_images=32, layers=(0, 1), noise=0.1, dim=6)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(fit.seed))
    changed = {**sample.labels, "identity": sample.labels["identity"].clone()}
    changed["identity"][order[16:]] = sample.labels["identity"][order[16:]].flip(1)
    bits = []
    for number, labels in enumerate((sample.labels, changed)):
        (folder := tmp_path / str(number)).mkdir()
        train = sample._replace(labels=labels, meta={**sample.meta, "fingerprint": str(number), "index": str(number)})
        val = planted_sample(n_images=8, layers=(0, 1), noise=0.1, dim=6, seed=1)
        subject = Subject("probe", "", probe, {"train": train, "val": val}, [0])
        result = code_length(Run(folder, {}), SETTINGS, subject, fit)
        whole = result.subsets[0]
        per_pair, pairs = whole.metrics["bits_per_pair"], 120  # 16 * 15 / 2 of an image
        of_image = per_pair.influence[1] * 32 * pairs + per_pair.value[1] * pairs  # of the layer that has objects
        bits.append(of_image)
        assert result.keys == [sample.keys[i] for i in order.tolist()] and whole.notes["blocks"] == 3
    assert torch.allclose(bits[0][:16], bits[1][:16]) and (bits[0][16:] - bits[1][16:]).abs().min() > 1e-3
    identity = sample.labels["identity"][order[:8]]
    same = (identity[:, :, None] == identity[:, None]).flatten(1).sum(1) - 16
    assert torch.allclose(bits[0][:8], base_rate_bits(same // 2, torch.full((8,), 120)))


def test_a_probe_that_is_worse_than_a_constant_answer_sends_nothing():
    """By hand: of two layers the first is worse on validation; its second block goes at the base rate like the first."""
    counts = {"n_pairs": torch.tensor([3.0, 5.0]), "n_positive": torch.tensor([1.0, 2.0])}
    start = SubsetResult("is_same_object", "online_code", "all", {}, {}, [], per_image=counts | {"bits": torch.zeros(2, 2)})
    bits = torch.tensor([[9.0, 9.0], [1.0, 2.0]], dtype=torch.float64)
    block = SubsetResult("is_same_object", "online_code", "all", {}, {}, [], per_image=counts | {"bits": bits}, variant="all")
    end = lambda layer, worse: FitReport("code-1", "all", 0, layer, 3, 1, 0.5, False, 0, worse)
    other = end(1, True)._replace(variant="foreground")
    result = ProbeResult("probe", "", "probe", [0, 1], [0], [block], fits=[end(0, True), end(1, False), other])
    found = _sent([result], 0, start)
    base = base_rate_bits(torch.tensor([1, 2, 1, 2]), torch.tensor([3, 5, 3, 5]))
    lengths = torch.stack([base.sum(), base[:2].sum() + 3]) / 16
    assert torch.allclose(found.metrics["bits_per_pair"].value, lengths)
    assert torch.allclose(found.metrics["saved"].value, base.sum() / 16 - lengths)


WORLD = {"n_train": 300, "n_val": 30, "n_test": 60, "patches": 20, "n_population": 1000, "population_patches": 16}


@pytest.mark.parametrize(
    ("kind", "options", "probe", "least"),
    [
        ("usable", planted_bits.FULL, [], 0.6),
        ("code", planted_bits.BARE, ["probe.mode=dot_product", "probe.standardize=false"], 0.85),  # no freedom to pay for
    ],
)
def test_planted_bits_stay_below_their_truth(tmp_path, kind, options, probe, least):
    """Nothing where nothing is planted; most of what is there at a small size (docs/results.md: at the default size)."""
    world = replace(options, **WORLD, noise=0.1)
    large = planted_bits.draw_scenes("population", world, planted_bits.NAME)
    with program.configured("trainer.seeds=1", "threads=1", "trainer.epochs=30", *probe) as cfg:
        rows = planted_bits.compare(world, kind, (0.0, 0.9), large, cfg, tmp_path)
    for name, value, low, high, here, family, anything in rows:
        noise = (high - low) / 2
        assert value <= family + noise and family <= anything + 1e-3, name
        assert value <= here + 1e-3, name  # on the same scenes, by the same luck
        if ", 0.9" in name:
            assert value >= least * here and here > 0.05, name
        else:
            assert abs(anything) < 1e-6 and value <= noise


def test_the_truth_of_the_script_is_the_information_of_its_densities():
    """The exact densities are calibrated: among pairs of one predicted probability, so many are of one object."""
    world = replace(planted_bits.FULL, **WORLD)
    large = planted_bits.draw_scenes("population", world, planted_bits.NAME)
    truth = planted_bits.truth_of(large, 0.5, 0, world, given=True)
    for subset in truth.values():
        assert 0 < subset.family < subset.any < subset.entropy < 1
    nothing = planted_bits.truth_of(large, 0.0, 0, world, given=True)
    assert abs(nothing["foreground"].any) < 1e-6 and nothing["foreground"].family < 1e-3


BITS = [
    "mode=train", "dataset.n_train=18", "trainer.seeds=1", "model.layers=[0,1]", "bits.code_length=true",
    "bits.usable_information=true",
]  # fmt: skip


def test_the_option_adds_columns_records_and_a_table(tmp_path, capsys):
    controls = "controls=[position,class_oracle,dot_product]"
    done = program.run(tmp_path, *program.TINY, *BITS, controls)
    said = capsys.readouterr().out
    assert "foreground usable bits" in said and "all pairs, saved" in said and "online code of the pairs of 18" in said
    names = {"probe", "position", "class_oracle", "dot_product"}
    scores = [r for r in done.records() if r["kind"] == "score" and r["seed"] == "mean"]
    sent = [r for r in done.records() if r["kind"] == "code_length" and r["seed"] == "mean"]
    assert {r["name"] for r in sent} == names and {r["split"] for r in sent} == {"train"}
    assert {r["subset"] for r in sent} == {"all", "foreground"}
    for record in sent:
        metrics = record["metrics"]
        assert metrics["saved"] == pytest.approx(metrics["base_rate"] - metrics["bits_per_pair"])
        assert metrics["compression"] == pytest.approx(1 / metrics["bits_per_pair"])
        low, high = record["interval"]["bits_per_pair"]
        assert 0 < low < metrics["bits_per_pair"] < high
    assert {r["split"] for r in scores} == {"test"}
    given = [r for r in scores if r["readout"] == GIVEN]
    assert {r["name"] for r in given} == names and {r["subset"] for r in given} == {"foreground", "same_class"}
    for record in given:
        metrics = record["metrics"]
        assert metrics["usable_information"] == pytest.approx(metrics["entropy"] - metrics["entropy_left"])
    oracle = next(r for r in given if r["name"] == "class_oracle" and r["subset"] == "same_class")
    assert oracle["metrics"]["usable_information"] < 0.01  # class agreement is known already
    gains = [r for r in done.records() if r["kind"] == "gain" and r["metric"] == "usable_information"]
    assert {r["name"] for r in gains} == names - {"probe"}
    history = done.records("history.jsonl")
    assert {r["part"] for r in history if r["kind"] == "fit"} == {"", "usable", "code-1"}


def test_without_the_option_nothing_is_added(tmp_path, capsys):
    done = program.run(tmp_path, *program.TINY, "mode=train")
    assert "usable" not in capsys.readouterr().out
    assert {r.get("readout", "logit") for r in done.records()} == {"logit"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=train_class", "bits.code_length=true"], "bits are those of IsSameObject"),
        (["mode=train", "bits.usable_information=true", "trainer.folds=2"], "bits need the splits as they are"),
        (["mode=train", "bits.code_length=true", "dataset.n_train=15"], "at least 16 training images, got 15"),
    ],
)
def test_bits_that_mean_nothing_are_refused(tmp_path, overrides, message):
    with pytest.raises(SystemExit, match=message):
        program.run(tmp_path, *program.TINY, *overrides)


def test_intervals_of_bits_may_lie_below_zero():
    sample, logits = labelled(n_images=12)
    usable = Usable(Given([0], sample, **SETTINGS), sample, 1)
    usable.add(batch_of(sample), 5 * logits[:1])
    result = usable.results()[0]
    low, high = interval(result.metrics["usable_information"], resample(12, 200), bounds=result.bounds)
    assert float(low) < float(high) < 0
