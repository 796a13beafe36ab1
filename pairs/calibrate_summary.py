"""What the worlds of mode=calibrate show: rates of claims and of covers, by strength and by true gain, as records and text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pairs.worlds import WorldOptions
from show.text import format_table

BIN, LAST_BIN = 0.01, 6  # width of the bins of true gains in AUROC, number of the last one
PLANTED = 0.03  # the effect that the power is stated for
Z = 1.959964


def wilson(hits: float, n: float) -> tuple[float, float]:
    """95 % interval of a rate (Wilson, J. Amer. Statist. Assoc. 22, 1927)."""
    p = hits / n
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (centre - half) / (1 + Z * Z / n), (centre + half) / (1 + Z * Z / n)


class Rate(NamedTuple):
    """Hits of n, and the ends of a 95 % interval."""

    hits: int
    n: int
    low: float
    high: float

    def __str__(self) -> str:
        if self.n == 0:
            return "–"
        return f"{100 * self.hits / self.n:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def rate(hits: Sequence[bool], scenes: Sequence[str]) -> Rate:
    """A rate whose interval knows that worlds on one set of scenes are alike.

    Wilson's interval of n / d worlds, d being how much more the hits of sets of scenes vary than those of independent worlds
    would (the design effect of Kish, Survey Sampling, 1965), at least 1.
    """
    n, total = len(hits), sum(hits)
    if n == 0:
        return Rate(0, 0, 0.0, 1.0)
    p, sets = total / n, list(dict.fromkeys(scenes))
    excess = [sum(hit - p for hit, name in zip(hits, scenes, strict=True) if name == at) for at in sets]
    independent = n * p * (1 - p) * (len(sets) - 1) / len(sets)
    d = max(1.0, sum(x * x for x in excess) / independent) if independent > 0 else 1.0
    return Rate(total, n, *wilson(total / d, n / d))


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per strength, and of all together (strength None): worlds, mean score and effect, the rates of claims and of covers.

    A gain over the class oracle where classes say nothing has a truth and an estimate that agree to the last digit; such
    gains are left out of the cover, which they could only raise.
    """
    lines = []
    for strength in [*sorted({row["strength"] for row in rows}), None]:
        here = [row for row in rows if strength in (None, row["strength"])]
        gains = [
            (low <= truth <= high, row["scenes"])
            for row in here for _, low, high, truth in row["gains"].values() if low < high
        ]  # fmt: skip
        scenes = [row["scenes"] for row in here]
        lines.append({
            "strength": strength, "worlds": len(here),
            "score": sum(row["value"] for row in here) / len(here),
            "effect": sum(row["effect"] for row in here) / len(here),
            "claimed": rate([row["claimed"] for row in here], scenes),
            "scores": rate([row["low"] <= row["truth"] <= row["high"] for row in here], scenes),
            "gains": rate([hit for hit, _ in gains], [name for _, name in gains]),
            "above_one": {name: sum(row["gains"][name][1] > 0 for row in here) / len(here) for name in here[0]["gains"]},
        })  # fmt: skip
    return lines


def by_effect(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Claims of planted worlds by their true gain over the best control, in bins of BIN; those of the null worlds apart.

    The last bin has all larger gains. Fits of one strength differ in what they find, so a world counts by its own truth.
    `at`: the share of claims by the number of test images.
    """
    lines, number_of = [], lambda row: min(round(row["effect"] / BIN), LAST_BIN)
    for null in (True, False):
        here = [row for row in rows if (row["strength"] == 0) == null]
        for number in [None] if null else sorted(set(map(number_of, here))):
            worlds = here if null else [row for row in here if number_of(row) == number]
            mean = sum(row["effect"] for row in worlds) / len(worlds)
            claimed = rate([row["claimed"] for row in worlds], [row["scenes"] for row in worlds])
            at = {n: sum(row["claimed_at"][n] for row in worlds) / len(worlds) for n in worlds[0]["claimed_at"]}
            lines.append({"null": null, "bin": number, "effect": mean, "claimed": claimed, "at": at})
    return lines


def format_summary(
    summary: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]], n_groups: int, world: WorldOptions
) -> str:
    """The table, what stands below it, and the two numbers."""
    header = ["planted", "worlds", "AUROC", "effect", "claimed", "scores covered", "gains covered"]
    body = [
        [
            f"{line['strength']:g}", str(line["worlds"]), f"{line['score']:.3f}", f"{line['effect']:+.3f}",
            str(line["claimed"]), str(line["scores"]), str(line["gains"]),
        ]
        for line in summary[:-1]
    ]  # fmt: skip
    null, every, planted = summary[0], summary[-1], [line for line in curve if not line["null"]]
    power = next((line for line in planted if line["bin"] == round(PLANTED / BIN)), None)
    single = ", ".join(f"{name} {100 * share:.1f}" for name, share in null["above_one"].items())
    low, high = PLANTED - BIN / 2, PLANTED + BIN / 2
    in_bin = lambda x: f"{x['bin'] * BIN:+.2f} {100 * x['claimed'].hits / x['claimed'].n:.0f} % of {x['claimed'].n}"
    text = [
        format_table(header, body),
        f"column same class, matched; effect: true gain over the best control; {n_groups} sets of scenes, "
        f"{world.n_train} / {world.n_test} training / test images of {world.patches} patches",
        f"null worlds with a gain over one control alone, percent: {single}",
        f"claimed by true gain: {', '.join(map(in_bin, planted))}",
        f"intervals cover {every['scores']} of the scores and {every['gains']} of the gains",
        "",
        f"false claims: {null['claimed']} of {null['worlds']} null worlds",
    ]
    if power is None:
        missing = f"power: no world has a true gain of {low:+.3f} to {high:+.3f}; plant other calibrate.strengths"
        return "\n".join([*text, missing])
    of_worlds = f"of {power['claimed'].n} worlds with a true gain of {low:+.3f} to {high:+.3f} AUROC"
    by_size = ", ".join(f"{n} {100 * share:.0f} %" for n, share in power["at"].items())
    return "\n".join([*text, f"power: {power['claimed']} {of_worlds}", f"power there by test images: {by_size}"])
