"""What settings the probes of codes take, and how the F probe differs from the Y probe."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from binding.probes import BINDING_PROBES
from errors import UserError

OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "rank": ("a whole number of at least 1", lambda x: type(x) is int and x >= 1),
    "init_std": ("a number above 0, or null", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    "whiten": ("a number above 0, or null", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    "dnn_hidden_dim": ("a whole number of at least 1, or null", lambda x: type(x) is int and x >= 1),
    "dnn_num_layers": ("a whole number of at least 1 (it counts the output layer)", lambda x: type(x) is int and x >= 1),
    "dnn_dropout": ("a number from 0 to below 1", lambda x: type(x) in (int, float) and 0 <= x < 1),
    "condition_readout": ("true or false", lambda x: isinstance(x, bool)),
    "condition_query": ("true or false", lambda x: isinstance(x, bool)),
    "readout": ("program or paper", lambda x: x in ("program", "paper")),
}


def check_settings(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse values no probe can be built with, before anything is extracted.

    Args:
        sections: the settings of the Y probe under "", those that differ for F under "F."; null leaves open.

    Raises:
        UserError: the first option that does not fit.
    """
    for prefix, settings in sections.items():
        for option, (wanted, fits) in OPTIONS.items():
            value = settings[option]
            may_be_null = prefix or option in ("init_std", "whiten", "dnn_hidden_dim")
            if not (fits(value) or (value is None and may_be_null)):
                raise UserError(f"probe.{prefix}{option}: got {value!r}, expected {wanted}")


def is_reuse(mode: str) -> bool:
    """Whether a probe shares weights between conjunctions, which only the object code has."""
    return mode.endswith("_reuse")


def feature_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """What differs for the F probe: all that `probe.F` sets; instead of a *_reuse probe of Y its fallback.

    Raises:
        UserError: a *_reuse probe is asked for, which needs conjunctions.
    """
    differing = {key: value for key, value in changes.items() if value is not None and key != "fallback"}
    if is_reuse(settings["mode"]):
        differing.setdefault("mode", changes["fallback"])
    if is_reuse(differing.get("mode", "")):
        fitting = ", ".join(name for name in BINDING_PROBES if not is_reuse(name))
        raise UserError(
            f"probe.F asks for {differing['mode']}, which shares weights between conjunctions and the feature code has none; "
            f"take one of {fitting}"
        )
    return differing
