"""What a trained probe is valid for: the activations it is asked about must be made as those it was fitted on.

A probe reads the channels of one layer of one model, at one size of windows, and standardises them with the statistics of its
training tokens. Asked about anything else it still gives numbers, which mean nothing: so a checkpoint states what it was
fitted on, and every use is compared with it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError

# What an entry is called in a message.
WORDS = {
    "weights": "the backbone weights",
    "depth": "the depth",
    "dim": "the width",
    "patch_size": "the patch size",
    "image_size": "the windows of size",
    "num_prefix_tokens": "the number of class and register tokens",
    "has_class_token": "the class token",
    "mean": "the pixel mean",
    "std": "the pixel deviation",
    "interpolation": "the interpolation",
    "norm": "the final norm",
    "output_mode": "the output mode",
    "scale": "the size of the tokens",
}
NEAR = 0.01  # sizes of tokens may differ by this share: rounding of another machine


def refuse_other_use(path: Path, fitted_on: Mapping[str, Any] | None, at_hand: Mapping[str, Any]) -> None:
    """Refuse activations that were made in another way than those a probe was fitted on.

    Args:
        path: of the checkpoint or its run. fitted_on: what it states; None or empty: of a version that stated nothing.
        at_hand: the same of the activations now (`activation.made_by`).

    Raises:
        UserError: naming what differs, both values, and what to do.
    """
    in_order = [*WORDS, *sorted(set(fitted_on or {}) - set(WORDS))]
    for key in (key for key in in_order if key in (fitted_on or {})):
        before, now = _plain(fitted_on[key]), _plain(at_hand.get(key))
        if not _equal(key, before, now):
            word = WORDS.get(key, key.replace("windows.", "the windows' "))
            raise UserError(
                f"{path} was fitted on {word} {_shown(before)}, these activations have {_shown(now)}; make them as they were "
                "made for the fit, or fit a probe on these"
            )


def refuse_other_layer(path: Path, layers: Sequence[int | str], layer: int | str) -> int:
    """Where a layer stands among those a probe was fitted on.

    Raises:
        UserError: it is not among them.
    """
    if isinstance(layer, bool) or layer not in layers:
        raise UserError(f"{path} holds no probe of layer {layer!r}, only of {', '.join(map(str, layers))}; name one of these")
    return list(layers).index(layer)


def refuse_standardised(path: Path, expected: Sequence[float], found: Sequence[float]) -> None:
    """Refuse tokens that were standardised before: the probe does it itself, with the statistics of its training tokens.

    Args:
        expected: mean size of the channels' means and mean deviation, of the training tokens; found: of the tokens at hand.

    Raises:
        UserError: the tokens at hand are of another scale.
    """
    (mean, deviation), (mean_now, deviation_now) = expected, found
    if deviation_now < 1e-3 * deviation or deviation_now > 1e3 * deviation:
        raise UserError(f"{path} was fitted on tokens of deviation {deviation:.3g}, these have {deviation_now:.3g}; check them")
    was_standardised = mean < 0.2 and 0.8 < deviation < 1.25
    if not was_standardised and mean_now < 0.05 * deviation_now and abs(deviation_now - 1) < 0.1:
        raise UserError(
            f"these tokens are standardised already (deviation {deviation_now:.3g}); {path} was fitted on tokens of deviation "
            f"{deviation:.3g} and standardises them itself, so hand them over as the model gives them"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _equal(key: str, before: Any, now: Any) -> bool:
    if key != "scale" or not (isinstance(before, list) and isinstance(now, list)):
        return type(before) is type(now) and before == now
    return len(before) == len(now) and all(math.isclose(a, b, rel_tol=NEAR) for a, b in zip(before, now, strict=True))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:25]}…{text[-12:]}"
