"""What a reader sees of fits that had not converged, or that read less than a constant answer: marks and sentences."""

from collections.abc import Iterable, Sequence

from metrics.convergence import FARTHEST
from tasks import FitReport, ProbeResult

MARKS = {"still_falling": "↓", "worse_than_constant": "!"}  # behind a layer in a table


def marks(result: ProbeResult, layer: int | str | None = None) -> str:
    """The marks of a layer, or of all of a result's layers; "" where every fit ended well."""
    fits = [fit for fit in result.fits if layer in (None, fit.layer)]
    return "".join(mark for key, mark in MARKS.items() if any(getattr(fit, key) for fit in fits))


def sentences(results: Sequence[ProbeResult], *, key: str = "trainer.epochs") -> list[str]:
    """One sentence per kind of bad ending, with the fits it concerns and what to do; none where every fit ended well.

    Args:
        key: what sets the epochs of these fits.
    """
    lines = []
    if places := _places(results, "still_falling"):
        falling = [fit for result in results for fit in result.fits if fit.still_falling]
        lines.append(f"↓ the validation loss was still falling when the fit ended: {places}; {_remedy(falling, key)}")
    if places := _places(results, "worse_than_constant"):
        lines.append(
            f"! worse than a constant answer on validation: {places}; lower trainer.lr or set probe.standardize=true"
        )
    return lines


def _remedy(falling: Iterable[FitReport], key: str) -> str:
    """How many epochs would do."""
    falling = list(falling)
    if all(fit.epochs == 0 for fit in falling):
        return "the solver reached no optimum"
    needed = max(fit.epochs_needed for fit in falling)
    if needed == 0:
        return f"too few epochs to tell how many would do; try {key}={4 * max(fit.epochs for fit in falling)}"
    far = any(fit.epochs_needed == needed == FARTHEST * fit.epochs for fit in falling)
    return f"{'at least' if far else 'about'} {needed} epochs {'are needed' if far else 'would do'} ({key}={needed})"


def _places(results: Sequence[ProbeResult], ending: str) -> str:
    """Names of the results with the layers and variants of the fits that ended so."""
    places = []
    for result in results:
        fits = [fit for fit in result.fits if getattr(fit, ending)]
        if not fits:
            continue
        kinds = list(dict.fromkeys((fit.part, fit.variant) for fit in result.fits))
        for part, variant in kinds:
            layers = [str(x) for x in dict.fromkeys(f.layer for f in fits if (f.part, f.variant) == (part, variant))]
            label = " ".join(word for word in (result.name, part, variant if len({v for _, v in kinds}) > 1 else "") if word)
            if layers:
                places.append(f"{label} (layer {', '.join(layers)})" if layers != [label] else label)
    return ", ".join(places)
