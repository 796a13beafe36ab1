"""BalancedColorShape: every scene has as many objects, colours and shapes as any other.

The data set of Sections 3.1-3.2 of "Formalizing the Binding Problem" (arXiv 2606.03976): of 8 colours and 8 shapes a
scene uses exactly 6 and 6, chosen uniformly from the feature codes of the split, and 18 of the 36 conjunctions they
span, uniform among the choices that use all 12. So H(Y|F) = log2 N_18(6, 6) = 32.91 bits in every scene, no feature code
is more frequent than another, and no code of one split occurs in another: splits are comparable.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import datasets.priors as priors
from datasets.color_shape import ColorShape, published_streams
from datasets.sampling import random_words, sample_until, smallest, stream, unit
from datasets.scene import check_whole
from errors import UserError

IDLE = {"distribution_mode", "f_split_max_attempt_factor"}  # options of ColorShape's own prior


class BalancedColorShape(ColorShape):
    """Scenes of `num_objects` coloured shapes that use a fixed number of colours and of shapes.

    Args:
        candidate_colors_per_sample, candidate_shapes_per_sample: values of each kind a scene uses.
        num_objects: conjunctions in a scene; max_objects: must not be smaller (kept for published configurations).
        object_sample_max_attempts: draws of conjunctions per scene until one uses every chosen value (the bound is on
            the mean over the scenes).
        f_split_train_count, f_split_val_count, f_split_test_count: feature codes per split, of C(8,6)^2 = 784.
        Others: see `ColorShape`.

    Raises:
        UserError: for numbers that cannot go together.
    """

    name = "balancedcolorshape"

    def __init__(
        self,
        split: str,
        *,
        n_colors: int = 8,
        n_shapes: int = 8,
        candidate_colors_per_sample: int = 6,
        candidate_shapes_per_sample: int = 6,
        num_objects: int = 18,
        max_objects: int = 18,
        object_sample_max_attempts: int = 1000,
        split_mode: str = "f_ranked_three_way",
        f_split_test_buckets: int | str | Sequence[int] = (0,),
        f_split_salt: str = "balancedcolorshape_fsplit_v1",
        f_split_train_count: int | None = 522,
        f_split_val_count: int | None = 131,
        f_split_test_count: int | None = 131,
        **others: Any,
    ) -> None:
        if idle := sorted(IDLE & set(others)):
            raise UserError(
                f"dataset.{idle[0]} means nothing here, where every feature code is chosen and none refused; leave it out"
            )
        self.num_objects = check_whole("num_objects", num_objects, 1)
        self.chosen = (
            check_whole("candidate_colors_per_sample", candidate_colors_per_sample, 1, check_whole("n_colors", n_colors, 1)),
            check_whole("candidate_shapes_per_sample", candidate_shapes_per_sample, 1, check_whole("n_shapes", n_shapes, 1)),
        )
        a, b = self.chosen
        if not max(a, b) <= num_objects <= a * b:
            raise UserError(
                f"dataset.num_objects: got {num_objects}, expected {max(a, b)} to {a * b} to use all of {a} colours and "
                f"{b} shapes"
            )
        if max_objects < num_objects:
            raise UserError(f"dataset.max_objects: got {max_objects}, expected at least num_objects = {num_objects}")
        self.attempts_per_scene = check_whole("object_sample_max_attempts", object_sample_max_attempts, 1)
        super().__init__(
            split,
            n_colors=n_colors,
            n_shapes=n_shapes,
            max_objects=max_objects,
            split_mode=split_mode,
            f_split_test_buckets=f_split_test_buckets,
            f_split_salt=f_split_salt,
            f_split_train_count=f_split_train_count,
            f_split_val_count=f_split_val_count,
            f_split_test_count=f_split_test_count,
            **others,
        )

    def details(self, index: int) -> dict[str, Any]:
        """Boxes, number of objects, the values the scene uses and the conjunctions present."""
        used = [np.flatnonzero(part).tolist() for part in np.split(self.feature_code[index], [self.groups.sizes[0]])]
        names = self.groups.decode_features(self.feature_code[index])
        return super().details(index) | {
            "selected_color_indices": used[0],
            "selected_shape_indices": used[1],
            "selected_colors": names[0],
            "selected_shapes": names[1],
            "conjunction_ids": np.flatnonzero(self.object_code[index]).tolist(),
        }

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the content of this split, JSON-able."""
        return super().fingerprint() | {"chosen": list(self.chosen), "num_objects": self.num_objects}

    @property
    def _largest_scene(self) -> int:
        return self.num_objects

    def _prior(self) -> priors.Prior:
        return priors.balanced(self.groups.sizes, self.num_objects)

    def _candidates(self) -> np.ndarray:
        """Feature codes of the wanted shape: combinations of colours outside, of shapes inside, lexicographic."""
        parts = [
            [np.isin(np.arange(size), pick) for pick in itertools.combinations(range(size), k)]
            for size, k in zip(self.groups.sizes, self.chosen, strict=True)
        ]
        return np.array([np.concatenate(pair) for pair in itertools.product(*parts)], np.uint8)

    def _draw(self, n: int, budget: int) -> tuple[np.ndarray, int]:
        del budget  # the feature code is chosen, never refused
        key = stream(self.name, self.seed, self.split, "features")
        chosen = (unit(random_words(key, np.arange(n), 0, 1))[:, 0] * len(self.support)).astype(int)
        key, cells = stream(self.name, self.seed, self.split, "objects"), self.chosen[0] * self.chosen[1]

        def draw(indices: np.ndarray, attempt: int) -> np.ndarray:
            words = random_words(key, indices, attempt * cells, cells)
            return smallest(words, np.full(len(indices), self.num_objects))

        why = "raise dataset.object_sample_max_attempts or num_objects"
        picked_cells, attempts = sample_until(n, draw, self._covers, n * self.attempts_per_scene, why)
        return self._spread(picked_cells, self.support[chosen]), attempts

    def _draw_published(self, n: int, budget: int) -> tuple[np.ndarray, int]:
        del budget
        generator, rng = published_streams(self.seed, self.split)
        cells, picked_cells, attempts = self.chosen[0] * self.chosen[1], [], 0
        self._published_boxes = []
        for index in range(n):
            code = self.support[int(torch.randint(len(self.support), (1,), generator=generator))]
            for _ in range(self.attempts_per_scene):
                attempts += 1
                picked = np.isin(np.arange(cells), rng.sample(range(cells), self.num_objects))[None]
                if self._covers(picked)[0]:
                    break
            else:
                raise UserError(
                    f"{self.key(index)}: no choice of {self.num_objects} conjunctions used every chosen value in "
                    f"{self.attempts_per_scene} draws; raise dataset.object_sample_max_attempts or num_objects"
                )
            picked_cells.append(self._spread(picked, code[None])[0])
            self._published_boxes.append(self._place_published(self.num_objects, rng, index))
        return np.stack(picked_cells), attempts

    def _covers(self, picked: np.ndarray) -> np.ndarray:
        """Whether a choice of cells [m, cells] uses every chosen colour and shape, [m]."""
        picked = picked.reshape(-1, *self.chosen).astype(bool)
        return picked.any(1).all(1) & picked.any(2).all(1)

    def _spread(self, picked: np.ndarray, feature_code: np.ndarray) -> np.ndarray:
        """Cells of the chosen grid [m, cells] in the whole grid, [m, K] uint8."""
        colors, shapes = np.split(feature_code, [self.groups.sizes[0]], axis=1)
        inside = (colors[:, :, None] & shapes[:, None, :]).astype(bool)  # [m, N_1, N_2], row-major like the cells
        code = np.zeros(inside.shape, np.uint8)
        code[inside] = picked.reshape(-1)
        return code.reshape(len(picked), -1)
