"""What a reader sees of a run: layers.csv, the layer curve, the table on the terminal."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from metrics.bootstrap import interval, mean_over_seeds
from metrics.sample_size import size_warnings, spread_of
from runs.conclusion import conclude
from runs.records import write_table
from runs.run import Run
from show.choice import best_layer, chosen, chosen_estimate, gains, objective, regret, write_choices
from show.claims import above_every_control
from show.convergence import marks, sentences
from show.per_image import write_scores
from show.records import Column, Resampling, curve_rows, find, find_subset
from show.text import format_table, interval_text
from tasks import CONTROL_TASK, ProbeResult

LEVEL = 0.05  # gains whose corrected p-value is not below it are marked
DOUBT = "°"


def present(
    results: Sequence[ProbeResult],
    columns: Sequence[Column],
    resampling: Resampling,
    run: Run,
    *,
    split: str,
    draw: Callable[[list[dict], Sequence[Column], Path, str], None],
    text: str,
    remedy: str = "",
    units: Mapping[str, tuple[float, str]] | None = None,
) -> dict[str, Any]:
    """Write choices and gains, layers.csv and the scores of every image, draw the layer curve, mirror it, print the table.

    Args:
        results: the probe first, then its controls.
        split: the one that was scored.
        draw: writes the figure of the scores in layers.csv to a path, with lines that say what it shows and what to doubt.
        text: the table.
        remedy: what helps where images are few.
        units: of the losses in the learning curves, by part (`show.learning`).

    Returns:
        {"objective": the headline score on validation, at the layer chosen there}.
    """
    write_choices(run, results, columns, resampling, split)
    rows, figure = curve_rows(run, results, split), run.dir / "layers.png"
    if write_table(run.dir / "layers.csv", rows):
        figure.unlink(missing_ok=True)
    write_scores(run, results, columns, resampling, split)
    scores = [row for row in rows if row["kind"] == "score"]
    if run.mirror is not None:
        run.mirror.curve(scores, columns)
    warnings = few_images(results[0], columns, remedy)
    draw_learning(run, units)
    if not figure.exists():  # a finished run that is shown again has its figure
        draw(scores, columns, figure, "\n".join([about(run, results[0]), *warnings]))
    value = objective(results[0], columns[0], split)
    conclude(run, "\n".join([text, *warnings, f"\nrecords, curve and checkpoints: {run.dir}"]), value)
    return {"objective": value}


def about(run: Run, probe: ProbeResult) -> str:
    """What a figure of a run shows, in one line."""
    names, n_images, n_seeds = run.identity, probe.subsets[0].counts["n_images"], len(probe.seeds)
    parts = [names["model"], names["dataset"], f"protocol {names['protocol']}", f"probe {names['probe']}"]
    return " · ".join([*parts, f"{n_images} images", f"{n_seeds} seeds" if n_seeds > 1 else "one seed"])


def few_images(probe: ProbeResult, columns: Sequence[Column], remedy: str) -> list[str]:
    """What too few images do to the numbers of a probe, a sentence each; widths are those of its chosen layers."""
    at = {column.title: chosen_estimate(probe, column) for column in columns}
    spreads = {title: spread_of(found[1], len(probe.seeds)) for title, found in at.items() if found is not None}
    n_test = max(subset.counts.get("n_images", 0) for subset in probe.subsets)
    sentences = size_warnings(probe.n_train, n_test, spreads, "measured here", remedy)
    return [f"warning: {sentence}" for sentence in sentences]


def draw_learning(run: Run, units: Mapping[str, tuple[float, str]] | None) -> None:
    """Draw the learning curves of every fit of the run."""
    if (run.dir / "history.jsonl").exists() and not (run.dir / "learning.png").exists():
        from show.learning import write_learning_curves  # here: no fit waits for matplotlib

        write_learning_curves(run.dir, units)


def table(results: Sequence[ProbeResult], columns: Sequence[Column], resampling: Resampling) -> str:
    """The layers of the probe, its chosen layer, then every control at its chosen layer and what the probe has over it.

    Layers are chosen on validation, of every column by itself. The regret is the score of the best layer of the scored split
    minus that of the chosen one. A gain is the probe's chosen layer minus the control's, paired over images. The last row is
    the claim of each column: every gain's interval lies above 0 (how often this errs: `mode=calibrate`).
    """
    probe, counts = results[0], resampling.counts(results[0])
    header = ["layer", *(column.title for column in columns)]
    body = [
        [f"{layer} {marks(probe, layer)}".strip(), *(score_cell(probe, c, i, counts) for c in columns)]
        for i, layer in enumerate(probe.layers)
    ]
    if len(probe.layers) > 1:
        body.append(["chosen on val", *(_chosen_cell(probe, column, counts) for column in columns)])
        body.append(["  regret", *(_regret_cell(probe, column, counts) for column in columns)])
    for control in results[1:]:
        label = f"{control.name} {marks(control)}".strip()
        body.append([label, *(_chosen_cell(control, column, counts) for column in columns)])
        body.append(["  probe gains", *(_gain_cell(probe, control, column, counts) for column in columns)])
    if len(results) > 1:
        body.append(["above every control", *(_claim_cell(results, column, counts) for column in columns)])
    lines = [format_table(header, body), basis(probe)]
    if any(DOUBT in cell for row in body for cell in row):
        among = f", corrected over {len(probe.layers)} layers (Holm)" if len(probe.layers) > 1 else ""
        lines.append(f"{DOUBT} may be chance: p of the paired bootstrap, two-sided{among}, is not below {LEVEL:g}")
    return "\n".join([*lines, *sentences(results)])


def score_cell(result: ProbeResult, column: Column, index: int, counts: Tensor) -> str:
    """Mean over seeds of a layer with its interval."""
    estimate = find(result, column)
    if estimate is None:
        return "–"
    mean = mean_over_seeds(estimate, len(result.seeds))
    low, high = interval(mean, counts, bounds=find_subset(result, column).bounds)
    return interval_text(float(mean.value[index]), float(low[index]), float(high[index]))


def _chosen_cell(result: ProbeResult, column: Column, counts: Tensor) -> str:
    """The score at the chosen layer, which is named where there are several."""
    here = chosen(result, column, counts)
    if here is None:
        return "–"
    return interval_text(*here.score) + (f" @{here.layer}" if len(result.layers) > 1 else "")


def _gain_cell(probe: ProbeResult, control: ProbeResult, column: Column, counts: Tensor) -> str:
    """What the probe's chosen layer has over the control's, with a mark where it may be chance."""
    found = gains(probe, control, column, counts)
    if found is None:
        return ""
    index = best_layer(probe, column)
    p = found.p_chosen if index is None else float(found.p_holm[index])  # folds choose a layer each: nothing to correct
    return interval_text(*found.chosen, sign="+") + ("" if p < LEVEL else f" {DOUBT}")


def _claim_cell(results: Sequence[ProbeResult], column: Column, counts: Tensor) -> str:
    """Whether the probe is above every control that rivals it in a column (`show.claims`); the control task is no rival."""
    rivals = [control for control in results[1:] if control.control != CONTROL_TASK]
    of_controls = [gains(results[0], control, column, counts) for control in rivals]
    ends = [found.chosen for found in of_controls if found is not None]
    return ("yes" if above_every_control(ends) else "no") if ends else "–"


def _regret_cell(result: ProbeResult, column: Column, counts: Tensor) -> str:
    """What the best layer of the scored split has over the chosen one."""
    cost = regret(result, column, counts)
    return "–" if cost is None else f"{interval_text(*cost.regret)} @{cost.layer}"


def basis(probe: ProbeResult) -> str:
    """What the numbers rest on, in one line."""
    subset = probe.subsets[0]
    rate, majority = (subset.metrics.get(key) for key in ("positive_rate", "majority"))
    seeds = f"{len(probe.seeds)} seeds" if len(probe.seeds) > 1 else "one seed"
    text = f"mean over {seeds}, 95 % intervals over {subset.counts['n_images']} images"
    if probe.folds:
        text += f", each tested once in {len(probe.folds)} folds"
    if rate is not None and majority is not None:
        positive = {"is_same_object": "one object", "same_class": "one class"}.get(subset.question, "positive")
        text += f", {subset.counts['n_pairs']} pairs, {float(rate.value[0]):.3f} of them {positive}"
        text += f" (majority rate {float(majority.value[0]):.3f})"
    return text
