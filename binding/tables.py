"""Tables of mode=train_binding: what the splits hold, and the information every row reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from binding.information import found_nothing, suspicions
from controls import PROBE_ROW
from metrics.bootstrap import mean_over_seeds
from show.choice import best_layer
from show.convergence import marks, sentences
from show.records import Column, Resampling, mean_interval
from show.text import format_table
from tasks import ProbeResult

CONTROL_LABELS = {"random": "random weights", "pixels": "raw pixels", "blind": "nothing to read"}
SHOWN = {
    "loss_Y": "L_Y", "loss_F": "L_F", "information_Y": "I(Y;Z)", "information_F": "I(F;Z)",
    "binding_information": "binding inf.", "ratio": "ratio",
}  # fmt: skip
RATIO = Column("binding", "", "images", "ratio", "binding ratio")  # the headline, by which layers are chosen
NOTHING = "∅"  # behind a layer whose probe reads less than the prior alone says
CONDITIONAL = {"lower_bound": "lower bound", "ratio_lower": "ratio ≥"}


def split_table(rows: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]]) -> str:
    """What the splits hold.

    Args:
        rows: per split its name, its counts and entropies, and the report of its data set.
    """
    titles = ["split", "n", "distinct F", "distinct Y", "largest F", "E H(Y|F)", "H(F)", "H(F) plug-in", "H(Y)", "prior"]
    body = []
    for split, counted, of_data in rows:
        support = f" of {of_data['support_F']}" if "support_F" in of_data else ""  # codes the split may hold
        entropies = (counted[name] for name in ("E_H_Y_given_F", "H_F", "H_F_plug_in", "H_Y"))
        body.append([
            split, str(counted["n"]), f"{counted['distinct_F']}{support}", str(counted["distinct_Y"]),
            f"{counted['largest_F_mass']:.1%}", *map(bits, entropies), of_data["prior"],
        ])  # fmt: skip
    return format_table(titles, body)


def information_table(results: Sequence[ProbeResult], resampling: Resampling, *, conditional: bool) -> str:
    """Every row and layer; ± is half of the 95 % interval, * the layer of the best ratio on validation, of each row,
    ∅ that nothing was found there.

    Below: what the numbers rest on, and what is doubtful.
    """
    shown = SHOWN | CONDITIONAL if conditional else SHOWN
    body: list[list[str]] = []
    doubts: dict[str, dict[str, list[str]]] = {}  # sentence -> label of the row -> layers
    for result in results:
        subset, n_seeds, counts = result.subsets[0], len(result.seeds), resampling.counts(result)
        means = {key: mean_over_seeds(e, n_seeds).value for key, e in subset.metrics.items()}
        chosen = best_layer(result, RATIO)
        ends = {key: mean_interval(subset.metrics[key], subset, n_seeds, counts) for key in shown if key in means}
        for index, layer in enumerate(result.layers):
            cells = []
            for key in shown:
                digits = 3 if "ratio" in key else 2
                if key in means:
                    half = float(ends[key][1][index] - ends[key][0][index]) / 2
                    cells.append(f"{float(means[key][index]):.{digits}f} ±{half:.{digits}f}")
                else:
                    cells.append("–")
            here = {key: float(values[index]) for key, values in means.items()}
            mark = "*" * (len(result.layers) > 1 and index == chosen) + marks(result, layer)
            mark += NOTHING * (found_nothing(here) and result.control != "blind")  # that one reads nothing on purpose
            body.append([row_label(result), f"{layer} {mark}".strip(), *cells])
            for sentence in suspicions(here, subset.notes["H_F"]) if result.control != "blind" else ():
                doubts.setdefault(sentence, {}).setdefault(row_label(result), []).append(str(layer))
    table = format_table(["tokens and probe", "layer", *shown.values()], body)
    marked = any(NOTHING in row[1] for row in body)
    none = [f"{NOTHING} no information found: the prior of Y, without any image, does as well"] * marked
    return "\n".join([table, _basis(results), *none, *_warnings(doubts, len(body)), *sentences(results)])


def _basis(results: Sequence[ProbeResult]) -> str:
    """What the numbers rest on, in one line."""
    subset, seeds = results[0].subsets[0], sorted({len(result.seeds) for result in results}, reverse=True)
    entropies = {"H(Y)": "H_Y", "H(F)": "H_F", "H(Y|F)": "H_Y_given_F"}
    known = ", ".join(f"{name} {bits(subset.notes[key])}" for name, key in entropies.items())
    text = (
        f"bits per image, {subset.counts['n_images']} images, prior {subset.notes['prior']}: {known}; "
        f"mean over {seeds[0]} seed{'s' * (seeds[0] > 1)}{f' (controls {seeds[-1]})' if len(seeds) > 1 else ''}, "
        "± half of the 95 % interval over images and seeds"
    )
    readers = {(r.subsets[0].notes["probe"], r.subsets[0].notes["probe_F"]) for r in results}
    swapped = [f"F is read by {other}, Y by {mode}" for mode, other in sorted(readers) if mode != other]
    several = ["* chosen on validation"] if any(len(result.layers) > 1 for result in results) else []
    return "; ".join([text, *swapped, *several])


def _warnings(doubts: Mapping[str, Mapping[str, Sequence[str]]], n_rows: int) -> list[str]:
    """One line per doubt, with the rows and layers it concerns."""
    lines = []
    for sentence, where in doubts.items():
        places = "; ".join(f"{label}, layer {', '.join(layers)}" for label, layers in where.items())
        everywhere = n_rows > 1 and sum(map(len, where.values())) == n_rows
        lines.append(f"warning: {sentence}: {'every row' if everywhere else places}")
    return lines


def row_label(result: ProbeResult) -> str:
    """What a row of the table is called: tokens and probe, or its name in `binding.ladder`; then its control."""
    notes = result.subsets[0].notes
    plain = f"{notes['output_mode']} {notes['probe']}"
    label = plain if result.row in (PROBE_ROW, plain.replace(" ", "-")) else result.row
    return label + (f", {CONTROL_LABELS.get(result.control, result.control)}" if result.control else "")


def bits(value: float | None) -> str:
    """A number of bits; a dash where the prior is not known."""
    return "–" if value is None else f"{value:.2f}"
