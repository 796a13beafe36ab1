"""Object code Y and feature code F, and what every data set of codes shares.

A scene holds objects; an object is a conjunction of one value from each of G feature groups. The object code
Y in {0,1}^K says which conjunctions are present (K = product of the group sizes; how often is not represented), the
feature code F in {0,1}^n which values occur at all (n = sum of the sizes). F is a function of Y, so
H(Y) = H(F) + H(Y|F), and H(Y|F), in bits, is what there is to know beyond the features: the denominator of the
binding ratio ("Formalizing the Binding Problem", arXiv 2606.03976). `priors` computes it, `splits` says which feature
codes a split holds, `sampling` draws scenes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.priors import Prior
from datasets.splits import split_report
from errors import UserError


class Groups:
    """Ordered feature groups with ordered values, and the algebra of the two codes.

    Features are numbered group after group; conjunctions run row-major, the last group fastest.
    """

    def __init__(self, names: Sequence[Sequence[str]]) -> None:
        self.names = [list(group) for group in names]
        self.sizes = tuple(len(group) for group in self.names)
        for group in self.names:
            if not group or len(set(group)) != len(group):
                raise UserError(f"feature group: got {group}, expected at least one value and none twice")
        self.n_features = sum(self.sizes)
        self.n_objects = math.prod(self.sizes)

    @cached_property
    def values(self) -> np.ndarray:
        """Value of every conjunction in every group, [K, G] int."""
        return np.stack(np.unravel_index(np.arange(self.n_objects), self.sizes), 1)

    def feature_code(self, object_code: np.ndarray) -> np.ndarray:
        """F of Y: [..., K] to [..., n] uint8."""
        present = np.asarray(object_code, bool).reshape(*np.shape(object_code)[:-1], *self.sizes)
        axes = range(-len(self.sizes), 0)
        parts = [present.any(tuple(other for other in axes if other != axis)) for axis in axes]
        return np.concatenate(parts, -1).astype(np.uint8)

    def counts(self, feature_code: np.ndarray) -> np.ndarray:
        """Number of values present in each group, [..., n] to [..., G] int64."""
        bounds = np.cumsum(self.sizes)[:-1]
        return np.stack([part.sum(-1, dtype=np.int64) for part in np.split(np.asarray(feature_code), bounds, -1)], -1)

    def object_code(self, objects: Sequence[Sequence[int]]) -> np.ndarray:
        """Y of a list of objects given by their value in each group, [K] uint8; duplicates collapse."""
        code = np.zeros(self.n_objects, np.uint8)
        for values in objects:
            code[np.ravel_multi_index(tuple(values), self.sizes)] = 1
        return code

    def decode_objects(self, object_code: np.ndarray) -> list[tuple[str, ...]]:
        """Names of the conjunctions present in one Y, in index order."""
        return [
            tuple(group[value] for group, value in zip(self.names, self.values[k], strict=True))
            for k in np.flatnonzero(np.asarray(object_code))
        ]

    def decode_features(self, feature_code: np.ndarray) -> list[list[str]]:
        """Names of the values present in one F, group by group."""
        flat = [name for group in self.names for name in group]
        bounds = np.cumsum(self.sizes)[:-1]
        return [[flat[i] for i in part if feature_code[i]] for part in np.split(np.arange(self.n_features), bounds)]

    def candidates(self) -> np.ndarray:
        """All feature codes some object code can have, groups all empty or none, [n_F, n] uint8 in counting order."""
        if self.n_features > 20:
            raise UserError(f"feature codes: {self.n_features} features are too many to list all codes, expected <= 20")
        parts = [[bits for bits in itertools.product((0, 1), repeat=size) if any(bits)] for size in self.sizes]
        rows = [sum(row, ()) for row in itertools.product(*parts)]
        return np.array([(0,) * self.n_features, *rows], np.uint8)


class CodeScenes:
    """What every data set of codes shares: labels, constants and facts. Subclasses load or draw the codes and images.

    Attributes set by `set_codes`: groups; object_code [M, K] and feature_code [M, n] uint8; entropy [M] float32 bits.
    """

    split: str
    on_error: str
    groups: Groups
    prior_name: str

    def set_codes(self, groups: Groups, object_code: np.ndarray, prior_name: str, entropy: np.ndarray | Prior) -> None:
        """Store the codes of the split; `entropy` is H(Y|F) in bits per scene, or the prior to compute it from."""
        self.groups, self.prior_name = groups, prior_name
        self.object_code = np.asarray(object_code, np.uint8)
        self.feature_code = groups.feature_code(self.object_code)
        if isinstance(entropy, Prior):
            entropy = entropy.entropy(groups.counts(self.feature_code))
        self.entropy = np.asarray(entropy, np.float32)
        self.classes = groups.names  # names of the values, a list per group

    def __len__(self) -> int:
        return len(self.object_code)

    def position(self, index: int) -> int:
        """The index, counted from the end if negative."""
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        return index % len(self)

    def labels(self, index: int) -> dict[str, Tensor]:
        """The labels of one scene: "object_code" [K] and "feature_code" [n] uint8, "H_Y_given_F" [1] float32 bits."""
        return {
            "object_code": torch.from_numpy(self.object_code[index].copy()),
            "feature_code": torch.from_numpy(self.feature_code[index].copy()),
            "H_Y_given_F": torch.from_numpy(self.entropy[index : index + 1].copy()),
        }

    def details(self, index: int) -> dict[str, Any]:
        """JSON-able extras of one scene for an export."""
        return {"num_objects": int(self.object_code[index].sum())}

    def info(self) -> dict[str, float]:
        """Constants in bits: "H_Y_given_F", the mean over the scenes of the split."""
        return {"H_Y_given_F": float(self.entropy.mean(dtype=np.float32))}

    def report(self) -> dict[str, Any]:
        """Facts on the split: its row of `split_report`, the prior of Y, group sizes."""
        labels = {"object_code": self.object_code, "feature_code": self.feature_code, "H_Y_given_F": self.entropy}
        facts = split_report({self.split: labels})["splits"][self.split]
        return {"prior": self.prior_name, "group_sizes": list(self.groups.sizes), **facts}
