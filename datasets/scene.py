"""The one item type every data set yields."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from errors import UserError


class Scene(NamedTuple):
    """One item of any data set.

    image: [3, H, W] uint8, as on disk; normalising is the backbone's business.
    labels: pixel maps "identity" and "class", [H, W] int32, 0 background or unlabelled; or codes: "object_code" [n_Y]
        uint8, "feature_code" [n_F] uint8 and "H_Y_given_F" [1] float32 in bits.
    key: stable name of the item (file stem, or split, seed and index): part of the cache fingerprint.
    """

    image: Tensor
    labels: dict[str, Tensor]
    key: str


class UnreadableScene(UserError):
    """A scene whose files are missing, damaged or do not fit together; the caller raises, or counts and skips it."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason
