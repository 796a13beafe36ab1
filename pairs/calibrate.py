"""mode=calibrate: how often the program claims IsSameObject where there is none, and where there is.

Planted worlds (`pairs.worlds`) go through the fit, the controls, the scores and the intervals of every other run; a world is a
layer of the stack. On each the claim of the table is made or not (`show.claims`). Null worlds give the rate of false claims,
planted ones the power, a large independent sample of the same world the truth that intervals have to cover.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

import trainer
from controls import NOTHING_RANDOM, Opened, Subject, class_oracle, cosine, dot_product, position, position_code
from errors import UserError
from metrics.bootstrap import Estimate, difference, interval, resample
from pairs.task import Pairwise
from pairs.worlds import Scenes, WorldOptions, as_sample, draw_random, draw_scenes, draw_tokens
from runs.progress import track
from runs.records import write_table
from runs.run import Run
from show.claims import above_every_control
from show.text import format_table
from tasks import ProbeResult
from trainer import FitOptions

CLAIM = "same_class_matched"  # the column that claims are made in
BIN, LAST_BIN = 0.01, 6  # width of the bins of true gains in AUROC, number of the last one
PLANTED = 0.03  # the effect that the power is stated for
SCORED_IMAGES = 128  # at a time
SPLITS = ("train", "val", "test", "population")


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
        subset, layer = row["subset"], row["world"]
        run.write({"kind": "world", "name": row["scenes"], "split": "test", "layer": layer, "subset": subset, **row})
    flat = [{k: v for k, v in row.items() if k != "gains"} | _flat_gains(row["gains"]) for row in rows]
    write_table(run.dir / "calibration.csv", flat)
    summary = summarise(rows)
    for line in summary:
        run.write({"kind": "calibration", "name": f"strength {line['strength']:g}", "subset": line["subset"], **line})
    from pairs.calibrate_figure import write_calibration  # here: nothing waits for matplotlib but the figure

    write_calibration(summary, by_effect(rows), run.dir / "calibration.png")
    run.finishing()
    run.say(format_summary(summary, rows, settings))
    run.say(f"\nrecords and figure: {run.dir}")
    null = next(line for line in summary if line["strength"] == 0)
    return {"objective": null["claimed"] / null["worlds"]}


def _flat_gains(gains: Mapping[str, Sequence[float]]) -> dict[str, float]:
    ends = ("gain", "gain_low", "gain_high", "gain_truth")
    return {f"{name}_{end}": x for name, values in gains.items() for end, x in zip(ends, values, strict=True)}


# ---------------------------------------------------------------------------------------------------------- one set of scenes


def build_subjects(settings: Settings, cfg: DictConfig, group: int) -> list[Subject]:
    """The probe on the worlds of one set of scenes, and its controls: those of the default run.

    Position, pixels and random weights are the same for all worlds on these scenes; cosine and dot product are theirs.
    """
    name, strengths, world = f"scenes-{settings.seed}-{group:03d}", settings.of_layers(), settings.world
    scenes = {split: draw_scenes(split, world, name) for split in SPLITS}
    layers = list(range(len(strengths)))
    samples = {split: as_sample(s, draw_tokens(s, strengths, world), layers) for split, s in scenes.items()}
    seeds = [0]

    def shared(control: str, make: Any) -> Subject:
        made = {split: as_sample(s, make(s), [control]) for split, s in scenes.items()}
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
    """Fit and score everything on one set of scenes; a row per world and subset."""
    subjects = build_subjects(settings, cfg, group)
    results, wide = {split: [] for split in ("test", "population")}, replace(options, batch_images=SCORED_IMAGES)
    for subject in subjects:
        task = ClaimTask(subject.seeds)
        stack = trainer.fit_stack(run, task, subject, options)
        for split, of_split in results.items():
            of_split.append(trainer.evaluate(task, stack, subject, wide, split=split, detail=False))
    counts = resample(settings.world.n_test, int(cfg.trainer.n_boot), settings.seed)
    strengths = settings.of_layers()
    return [
        {"scenes": subjects[0].row, "world": world, "strength": strength, "subset": subset, **row}
        for subset in ClaimTask.subsets
        for world, (strength, row) in enumerate(
            zip(strengths, judge(results["test"], results["population"], subset, counts), strict=True)
        )
    ]


def judge(test: Sequence[ProbeResult], population: Sequence[ProbeResult], subset: str, counts: Tensor) -> list[dict[str, Any]]:
    """Claims and intervals of every world, beside the truth.

    Args:
        test, population: the probe first, then its controls; a layer is a world, a control of one layer serves all worlds.
        subset: a column of the table.
        counts: resamples of the test images.

    Returns:
        per world: score and gains as [value, low, high, truth], `claimed`, and `effect`, the true gain over the best control.
    """
    probe, *controls = [auroc(result, subset) for result in test]
    true_probe, *true_controls = [auroc(result, subset) for result in population]
    low, high = interval(probe, counts)
    truth = truth_of(probe, true_probe)
    gains = {}
    for result, control, true_control in zip(test[1:], controls, true_controls, strict=True):
        gain, true_gain = difference(probe, control), difference(true_probe, true_control)
        ends = interval(gain, counts, bounds=(-1.0, 1.0))
        gains[result.control] = torch.stack([gain.value, *ends, truth_of(gain, true_gain), true_gain.value], 1)  # [L, 5]
    rows = []
    for world in range(len(probe.value)):
        here = {name: values[world].tolist() for name, values in gains.items()}
        rows.append({
            "value": float(probe.value[world]), "low": float(low[world]), "high": float(high[world]),
            "truth": float(truth[world]),
            "effect": min(values[4] for values in here.values()),
            "claimed": above_every_control(values[:3] for values in here.values()),
            "gains": {name: values[:4] for name, values in here.items()},
        })  # fmt: skip
    return rows


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


# ------------------------------------------------------------------------------------------------------------------ summary


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson, J. Amer. Statist. Assoc. 22, 1927)."""
    z, p = 1.959964, hits / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per subset and strength: worlds, claims, mean effect, and how many intervals of scores and gains cover the truth.

    A gain over the class oracle where classes say nothing has a truth and an estimate that agree to the last digit; such
    gains are left out of the cover, which they could only raise.
    """
    lines = []
    for subset in dict.fromkeys(row["subset"] for row in rows):
        for strength in sorted({row["strength"] for row in rows}):
            here = [row for row in rows if (row["subset"], row["strength"]) == (subset, strength)]
            scores = [row["low"] <= row["truth"] <= row["high"] for row in here]
            gains = [low <= truth <= high for row in here for _, low, high, truth in row["gains"].values() if low < high]
            by_control = {
                name: sum(row["gains"][name][1] > 0 for row in here) / len(here) for name in here[0]["gains"]
            }  # fmt: skip
            lines.append({
                "subset": subset, "strength": strength, "worlds": len(here), "claimed": sum(row["claimed"] for row in here),
                "score": sum(row["value"] for row in here) / len(here),
                "effect": sum(row["effect"] for row in here) / len(here),
                "scores": len(scores), "scores_covered": sum(scores), "gains": len(gains), "gains_covered": sum(gains),
                "above_one": by_control,
            })  # fmt: skip
    return lines


def by_effect(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Claims of planted worlds by their true gain over the best control, in bins of BIN; those of the null worlds apart.

    The last bin has all larger gains. Fits of one strength differ in what they find, so a world counts by its own truth.
    """
    lines, number_of = [], lambda row: min(round(row["effect"] / BIN), LAST_BIN)
    for null in (True, False):
        here = [row for row in rows if row["subset"] == CLAIM and (row["strength"] == 0) == null]
        for number in [None] if null else sorted(set(map(number_of, here))):
            worlds = here if null else [row for row in here if number_of(row) == number]
            mean = sum(row["effect"] for row in worlds) / len(worlds)
            claimed = sum(row["claimed"] for row in worlds)
            lines.append({"null": null, "bin": number, "effect": mean, "worlds": len(worlds), "claimed": claimed})
    return lines


def rate(hits: int, n: int) -> str:
    """A rate in percent with its interval."""
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def format_summary(summary: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], settings: Settings) -> str:
    """The table, what stands below it, and the two numbers."""
    lines = [line for line in summary if line["subset"] == CLAIM]
    header = ["planted", "worlds", "AUROC", "effect", "claimed", "scores covered", "gains covered"]
    body = [
        [
            f"{line['strength']:g}", str(line["worlds"]), f"{line['score']:.3f}", f"{line['effect']:+.3f}",
            rate(line["claimed"], line["worlds"]), rate(line["scores_covered"], line["scores"]),
            rate(line["gains_covered"], line["gains"]),
        ]
        for line in lines
    ]  # fmt: skip
    null = next(line for line in lines if line["strength"] == 0)
    covered = [sum(line[key] for line in lines) for key in ("scores_covered", "scores", "gains_covered", "gains")]
    curve = [line for line in by_effect(rows) if not line["null"]]
    planted = next((line for line in curve if line["bin"] == round(PLANTED / BIN)), None)
    single = ", ".join(f"{name} {100 * share:.1f}" for name, share in null["above_one"].items())
    world = settings.world
    text = [
        format_table(header, body),
        f"column same class, matched; effect: true gain over the best control; {settings.groups} sets of scenes, "
        f"{world.n_train} / {world.n_test} training / test images of {world.patches} patches",
        f"null worlds with a gain over one control alone, percent: {single}",
        "claimed by true gain: "
        + ", ".join(f"{x['bin'] * BIN:+.2f} {100 * x['claimed'] / x['worlds']:.0f} % of {x['worlds']}" for x in curve),
        f"intervals cover {rate(*covered[:2])} of the scores and {rate(*covered[2:])} of the gains",
        "",
        f"false claims: {rate(null['claimed'], null['worlds'])} of {null['worlds']} null worlds",
    ]
    low, high = PLANTED - BIN / 2, PLANTED + BIN / 2
    if planted is None:
        text.append(f"power: no world has a true gain of {low:+.3f} to {high:+.3f}; plant other calibrate.strengths")
    else:
        share = rate(planted["claimed"], planted["worlds"])
        text.append(f"power: {share} of {planted['worlds']} worlds with a true gain of {low:+.3f} to {high:+.3f} AUROC")
    return "\n".join(text)
