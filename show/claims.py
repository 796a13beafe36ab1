"""What a table claims of a column, as one rule: the table and `mode=calibrate`, which measures how often it errs, share it."""

from collections.abc import Iterable


def above_every_control(gains: Iterable[tuple[float, float, float]]) -> bool:
    """Whether the probe is claimed to lie above every control.

    Args:
        gains: the probe's score minus that of each control at their layers, with the ends of its paired 95 % interval.

    Returns:
        True where every interval lies above 0; where there is no control nothing is claimed.
    """
    lows = [low for _, low, _ in gains]
    return bool(lows) and all(low > 0 for low in lows)
