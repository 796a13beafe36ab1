"""How wide an interval to expect from few images, and when to say so."""

import math
from collections.abc import Mapping

from metrics.bootstrap import Estimate, mean_over_seeds

FEW_TEST = 50  # images; below, percentile intervals cover less than they say (92 % in place of 95 % at 20 images)
FEW_TRAIN = 100
# Spread (standard deviation) of the influence of one image in the default runs, 300 and 600 test images: half of the
# intervals in docs/results.md times sqrt(M) / 1.96. Only to expect a width before anything is measured.
TYPICAL_SPREAD = {"same class, matched AUROC": 0.13, "all pairs AUROC": 0.04}
TYPICAL_SPREAD_OF_CODES = {"binding ratio": 0.39}
FOLDS = "; trainer.folds=5 tests every image"  # the remedy where probes score pairs of patches


def expected_half_width(spread: float, n_images: int) -> float:
    """Half of a 95 % interval over images: 1.96 spread / sqrt(n)."""
    return 1.96 * spread / math.sqrt(max(n_images, 1))


def spread_of(estimate: Estimate, n_seeds: int) -> float:
    """Standard deviation over images of M times their influence on the mean over seeds of fits [S] at one layer."""
    influence = mean_over_seeds(estimate, n_seeds).influence[0]  # [M]
    return float((len(influence) * influence).square().mean().sqrt())


def size_warnings(n_train: int | None, n_test: int, spreads: Mapping[str, float], source: str, remedy: str = "") -> list[str]:
    """What too few images do to the numbers, a sentence each; none where there are enough.

    Args:
        n_train: None where it is not known.
        n_test: images that are scored.
        spreads: standard deviation of the influence of one image, by the name of a score.
        source: where these spreads come from.
        remedy: what helps, the end of the last sentence.
    """
    lines = []
    if n_test < FEW_TEST:
        widths = ", ".join(f"± {expected_half_width(spread, n_test):.2g} ({name})" for name, spread in spreads.items())
        lines.append(
            f"{n_test} test images, fewer than {FEW_TEST}: expect 95 % intervals of {widths}, from 1.96 sd / sqrt({n_test}) "
            f"with the spread of single images {source}, that cover less than 95 %"
        )
    if n_train is not None and n_train < FEW_TRAIN:
        lines.append(
            f"{n_train} training images, fewer than {FEW_TRAIN}: other training images would give other probes, which no "
            "interval over test images shows"
        )
    return [*lines[:-1], lines[-1] + remedy] if lines else []
