"""mode=calibrate: how often the program claims IsSameObject where there is none, and where there is.

Planted worlds (`pairs.worlds`) go through the fit, the controls, the scores and the intervals of every other run; a world is a
layer of the stack. On each the claim of the table is made or not (`show.claims`). Null worlds give the rate of false claims,
planted ones the power, a large independent sample of the same world the truth that intervals have to cover.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

import trainer
from activation import PatchSample
from controls import NOTHING_RANDOM, Opened, Subject, class_oracle, cosine, dot_product, position, position_code
from errors import UserError
from metrics.bootstrap import Estimate, difference, interval, resample
from pairs.calibrate_summary import Rate, Z, by_effect, format_summary, summarise
from pairs.collector import PairCollector
from pairs.task import Pairwise
from pairs.worlds import Scenes, WorldOptions, as_sample, draw_random, draw_scenes, draw_tokens
from probes import Probe, build_probe
from runs.progress import track
from runs.records import write_table
from runs.run import Run
from show.claims import above_every_control
from tasks import ProbeResult
from trainer import FitOptions

CLAIM = "same_class_matched"  # the column that claims are made in
SCORED_IMAGES = 128  # at a time
SHARED = ("train", "val", "population")  # splits that the worlds on one set of scenes share
SIZES = (100, 200, 300, 400, 600, 800)  # test images that claims are counted at


class Settings(NamedTuple):
    """How many worlds: `groups` sets of scenes, on each `worlds[i]` worlds of strength `strengths[i]`."""

    groups: int
    strengths: list[float]
    worlds: list[int]
    world: WorldOptions
    seed: int

    @classmethod
    def read(cls, cfg: DictConfig) -> "Settings":
        """As configured.

        Raises:
            UserError: strengths and worlds do not belong together, or there is no null world.
        """
        options = cfg.calibrate
        strengths, worlds = [float(s) for s in options.strengths], [int(n) for n in options.worlds]
        if len(strengths) != len(worlds) or min(worlds, default=0) < 1:
            raise UserError(
                f"calibrate.worlds={worlds} and calibrate.strengths={strengths}: expected a number of worlds, at least 1, for "
                "every strength; write two lists of one length"
            )
        if 0.0 not in strengths or len(set(strengths)) < len(strengths):
            raise UserError(f"calibrate.strengths={strengths}: expected different numbers with 0, the null worlds, among them")
        sizes = ("n_train", "n_val", "n_test", "patches", "n_population", "population_patches")
        world = WorldOptions(**{name: int(options[name]) for name in sizes})
        if max(world.patches, world.population_patches) > world.side**2:
            raise UserError(f"calibrate.patches: a world has {world.side**2} patches; take no more of them")
        return cls(int(options.groups), strengths, worlds, world, int(cfg.seed))

    def of_layers(self) -> list[float]:
        """The strength of every world on one set of scenes."""
        return [s for s, n in zip(self.strengths, self.worlds, strict=True) for _ in range(n)]


class ClaimTask(Pairwise):
    """IsSameObject of the fit that saw pairs on objects, scored on the subset that claims are made of."""

    subsets = (CLAIM,)

    def __init__(self, seeds: Sequence[int]) -> None:
        super().__init__(seeds, ["foreground"])
        self.kept: PairCollector | None = None

    def collector(self, sample: PatchSample, n_layers: int, detail: bool = True) -> PairCollector:
        """Sorts the pairs of a sample once for all that is scored on it."""
        identity = sample.labels["identity"]
        if self.kept is None or self.kept.labels["identity"] is not identity:
            self.kept = PairCollector(self, sample, n_layers, detail=detail)
        fresh = copy(self.kept)
        fresh.n_layers, fresh.detail, fresh.scores, fresh.right = n_layers, detail, {}, []
        return fresh


def run(cfg: DictConfig, run: Run) -> dict[str, Any]:
    """Entry of mode=calibrate: records and `calibration.csv` per world, the figure, a table and two numbers.

    Returns:
        {"objective": the rate of false claims in null worlds}.

    Raises:
        UserError: an option out of range.
    """
    settings, options = Settings.read(cfg), FitOptions.read(cfg)
    run.rest_on({"worlds": repr(settings)})
    rows = []
    for group in track(range(settings.groups), "calibrating", "set of scenes"):
        rows += measure(settings, cfg, group, options, run)
    for row in rows:
        run.write({"kind": "world", "name": row["scenes"], "split": "test", "layer": row["world"], **row})
    nested = ("gains", "claimed_at")
    flat = [{k: v for k, v in row.items() if k not in nested} | _flat_gains(row["gains"]) for row in rows]
    write_table(run.dir / "calibration.csv", flat)
    summary, curve = summarise(rows), by_effect(rows)
    for line in summary:
        name = "all" if line["strength"] is None else f"strength {line['strength']:g}"
        rates = {key: value._asdict() for key, value in line.items() if isinstance(value, Rate)}
        run.write({"kind": "calibration", "name": name, "subset": CLAIM, **line, **rates})
    from pairs.calibrate_figure import write_calibration  # here: nothing waits for matplotlib but the figure

    write_calibration(summary, curve, run.dir / "calibration.png")
    run.finishing()
    run.say(format_summary(summary, curve, settings.groups, settings.world))
    run.say(f"\nrecords and figure: {run.dir}")
    null = summary[0]["claimed"]
    return {"objective": null.hits / null.n}


def _flat_gains(gains: Mapping[str, Sequence[float]]) -> dict[str, float]:
    ends = ("gain", "gain_low", "gain_high", "gain_truth")
    return {f"{name}_{end}": x for name, values in gains.items() for end, x in zip(ends, values, strict=True)}


# ---------------------------------------------------------------------------------------------------------- one set of scenes


def build_subjects(settings: Settings, cfg: DictConfig, group: int) -> list[Subject]:
    """The probe on the worlds of one set of scenes, and its controls: those of the default run.

    Position, pixels and random weights are the same for all worlds on these scenes; cosine and dot product are theirs.
    """
    name, world = f"scenes-{settings.seed}-{group:03d}", settings.world
    scenes = {split: draw_scenes(split, world, name) for split in SHARED}
    return subjects_on(scenes, dict(enumerate(settings.of_layers())), cfg, world, name)


def subjects_on(
    scenes: Mapping[str, Scenes], strengths: Mapping[int, float], cfg: DictConfig, world: WorldOptions, name: str
) -> list[Subject]:
    """The probe on worlds of these scenes, by number, and its controls."""
    samples = {split: as_sample(s, draw_tokens(s, strengths, world), list(strengths)) for split, s in scenes.items()}
    seeds = [0]

    def shared(control: str, make: Any) -> Subject:
        made = {split: samples[split]._replace(tokens=as_sample(s, make(s), [control]).tokens) for split, s in scenes.items()}
        return Subject(name, control, cfg.probe, made, seeds)

    opened = Opened(cfg, samples, row=name)
    return [
        Subject(name, "", cfg.probe, samples, seeds),
        position(opened),
        shared("pixels", lambda s: s.pixels[None]),
        shared("pixels_position", lambda s: torch.cat([s.pixels, _code(s)], -1)[None]),
        shared("random", lambda s: draw_random(s, world)),
        class_oracle(opened)._replace(seeds=NOTHING_RANDOM),
        cosine(opened),
        dot_product(opened),
    ]


def _code(scenes: Scenes) -> Tensor:
    """The code of places [M, T, 96] the position control reads."""
    return position_code(torch.cat([torch.zeros_like(scenes.place[..., :1]), scenes.place], -1))


def measure(settings: Settings, cfg: DictConfig, group: int, options: FitOptions, run: Run) -> list[dict[str, Any]]:
    """Fit and score everything on one set of scenes; a row per world.

    Worlds share the training scenes and the large sample. Every world has test scenes of its own: on shared ones the intervals
    of all worlds hit or miss together, and ten of them say little more than one.
    """
    subjects, world = build_subjects(settings, cfg, group), settings.world
    task, wide, name = ClaimTask([0]), replace(options, batch_images=SCORED_IMAGES), subjects[0].row
    stacks = [trainer.fit_stack(run, ClaimTask(subject.seeds), subject, options) for subject in subjects]
    score = lambda stack, subject, split: auroc(trainer.evaluate(task, stack, subject, wide, split=split, detail=False), CLAIM)
    truth = [score(stack, subject, "population") for stack, subject in zip(stacks, subjects, strict=True)]
    counts = resample(world.n_test, int(cfg.trainer.n_boot), settings.seed)
    rows = []
    for number, strength in enumerate(settings.of_layers()):
        scenes = draw_scenes(f"test-{number}", world, name)
        own = subjects_on({"test": scenes}, {number: strength}, cfg, world, name)
        test = {
            subject.control: score([at_layer(stack, subject.samples["test"].tokens.layers[0])], subject, "test")
            for stack, subject in zip(stacks, own, strict=True)
        }
        here = [Estimate(*(x[number if len(x) > 1 else 0][None] for x in of_subject)) for of_subject in truth]
        row = judge(test, dict(zip(test, here, strict=True)), counts)
        rows.append({"scenes": name, "world": number, "strength": strength, "subset": CLAIM, **row})
    return rows


def at_layer(stack: Sequence[Probe], layer: int | str) -> Probe:
    """The fits of one layer of a stack, as a stack of their own."""
    probe = next(probe for probe in stack if layer in probe.layers)
    if len(probe.layers) == 1:
        return probe
    recipe, at = probe.recipe, slice(row := probe.layers.index(layer), row + 1)
    alone = build_probe({"mode": recipe["mode"], **recipe["knobs"]}, seeds=probe.seeds, layers=[layer], dim=probe.dim)
    # Statistics of tokens are [L, D], parameters [S, L, …].
    alone.load_state_dict({key: x[at] if key.startswith("token_") else x[:, at] for key, x in probe.state_dict().items()})
    return alone


def judge(test: Mapping[str, Estimate], population: Mapping[str, Estimate], counts: Tensor) -> dict[str, Any]:
    """Claim and intervals of one world, beside the truth.

    Args:
        test, population: the estimate of one fit by control, that of the probe under "".
        counts: resamples of the test images.

    Returns:
        score and gains as [value, low, high, truth], `claimed`, `effect`, the true gain over the best control, and
        `claimed_at`, the claim on the first test images alone, by their number.
    """
    probe, true_probe = test[""], population[""]
    controls = [name for name in test if name]
    gains = {name: difference(probe, test[name]) for name in controls}
    true_gains = {name: difference(true_probe, population[name]) for name in controls}
    ends = {name: [float(x) for x in (gain.value, *interval(gain, counts, bounds=(-1.0, 1.0)))] for name, gain in gains.items()}
    low, high = interval(probe, counts)
    return {
        "value": float(probe.value), "low": float(low), "high": float(high), "truth": float(truth_of(probe, true_probe)),
        "effect": min(float(gain.value) for gain in true_gains.values()),
        "claimed": above_every_control(ends.values()),
        "claimed_at": {n: claimed_at(gains.values(), n) for n in SIZES if n <= probe.influence.shape[1]},
        "gains": {name: [*ends[name], float(truth_of(gains[name], true_gains[name]))] for name in controls},
    }  # fmt: skip


def claimed_at(gains: Iterable[Estimate], n_images: int) -> bool:
    """Whether the claim would be made on the first images alone.

    First order in the weights of images, as the bootstrap is; the interval is the normal one, 1.96 standard errors.
    """
    ends = []
    for gain in gains:
        scale = gain.influence.shape[1] / n_images
        value = float(gain.value) + scale * float(gain.influence[0, :n_images].sum())
        spread = scale * gain.influence[0, :n_images]
        half = Z * float((spread - spread.mean()).square().sum().sqrt())
        ends.append((value, value - half, value + half))
    return above_every_control(ends)


def auroc(result: ProbeResult, subset: str) -> Estimate:
    """The AUROC of a subset at every layer; the fits have one seed."""
    return next(s.metrics["auroc"] for s in result.subsets if s.subset == subset)


def truth_of(estimate: Estimate, population: Estimate) -> Tensor:
    """The value that the interval of an estimate has to cover, [F].

    The large sample is an estimate of the truth too, and the two are independent: their difference d has the variance v + w of
    both. d * sqrt(v / (v + w)) has the variance v of the estimate alone, so the truth is put at that distance. Variances are
    the sums of squared influences.
    """
    v, w = (e.influence.square().sum(1) for e in (estimate, population))
    share = torch.where(v > 0, (v / (v + w).clamp_min(1e-300)).sqrt(), 1.0)
    return estimate.value - (estimate.value - population.value) * share
