"""CLEVR scenes of six objects (Johnson et al. 2017; 6-object release), as codes of four feature groups.

Layout: `<root>/scenes_6obj/CLEVR_6obj_000000.json` and `<root>/images_6obj/CLEVR_6obj_000000.png`; scenes from
`second_root_start` on are looked up below `<root>2` first. Splits are ranges of scene numbers: training from 0,
validation after it, then test.

The scenes come from CLEVR's own generator, so every H(Y|F) is that of an assumed prior. The published one,
`uniform<=M`, takes all sets of at most six conjunctions as equally likely; `independent_draws` is closer to how CLEVR
draws its objects; the name of the prior used is in every report.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import datasets.priors as priors
from datasets.codes import CodeScenes, Groups
from datasets.listings import data_folder, file_fingerprint
from datasets.pictures import read_image
from datasets.scene import Scene, UnreadableScene, check_choice, check_whole
from datasets.splits import SPLITS, split_name
from errors import UserError
from runs.progress import track

VALUES = {
    "color": ["blue", "red", "purple", "cyan", "gray", "brown", "green", "yellow"],
    "shape": ["cube", "sphere", "cylinder"],
    "material": ["rubber", "metal"],
    "size": ["small", "large"],
}
PRIORS = ("uniform<=M", "fixed_k", "independent_draws", "empirical")


class Clevr(CodeScenes):
    """CLEVR images with the codes of their scene files.

    Args:
        split: "train", "val" or "test".
        root: the data; else CLEVR_DATA_DIR, else data/datasets/clevr below BINDING_PROJECT_ROOT or here.
        num_total: scenes in the release; later numbers are not looked for.
        second_root_start: first scene number looked up below `<root>2` first; None for half of `num_total`.
        n_train, n_val, n_test: lengths of the three ranges of scene numbers, one after the other; the defaults are the
            published 40 000 cut 80:20, and 5 000. A range that reaches beyond the release is clipped, which is
            among the report's warnings.
        max_objects: M (or k) of the assumed prior.
        prior: prior of Y: "uniform<=M", "fixed_k", "independent_draws" or "empirical" (see `datasets.priors`).
        on_error: "raise", or "skip" to leave out scenes whose scene file is unreadable (named in the report);
            unreadable images raise `UnreadableScene` either way, for the caller to decide.

    Raises:
        UserError: no data, an empty range, a damaged scene file (file, object and field named), too small a `max_objects`.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | None = None,
        num_total: int = 50000,
        second_root_start: int | None = None,
        n_train: int = 32000,
        n_val: int = 8000,
        n_test: int = 5000,
        max_objects: int = 6,
        prior: str = "uniform<=M",
        on_error: str = "raise",
    ) -> None:
        self.split, self.on_error = split_name(split), on_error
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("prior", prior, PRIORS)
        self.root = data_folder(root, ["CLEVR_DATA_DIR"], "data/datasets/clevr")
        self.second_root = Path(str(self.root).rstrip("/") + "2")
        self.total = check_whole("num_total", num_total, 1)
        start = self.total // 2 if second_root_start is None else second_root_start
        self.second_root_start = check_whole("second_root_start", start, 0)
        if not self.root.is_dir():
            raise UserError(
                f"dataset.root={self.root}: no such folder, expected scenes_6obj and images_6obj in it; set dataset.root=… or "
                "CLEVR_DATA_DIR"
            )
        lengths = {"train": n_train, "val": n_val, "test": n_test}
        lengths = {name: check_whole(f"n_{name}", length, 0) for name, length in lengths.items()}
        first = sum(lengths[name] for name in SPLITS[: SPLITS.index(self.split)])
        wanted = range(first, first + lengths[self.split])
        available = range(first, min(wanted.stop, self.total))
        if not available:
            raise UserError(
                f"dataset split {self.split}: scene numbers {wanted.start} to {wanted.stop} (exclusive) are none of the "
                f"{self.total} of dataset.num_total; lower dataset.n_train, n_val, or raise n_{self.split}"
            )
        self.requested = len(wanted)
        groups = Groups(list(VALUES.values()))
        self.max_objects = check_whole("max_objects", max_objects, 1, groups.n_objects)
        self.skipped: list[tuple[str, str]] = []
        self.groups = groups
        self.ids, object_code = self._read(available)
        training = object_code
        if prior == "empirical" and self.split != "train":
            training = self._read(range(min(lengths["train"], self.total)))[1]
        self.prior = self._build_prior(prior, training)
        self.set_codes(groups, object_code, self.prior.name, self.prior)

    def __getitem__(self, index: int) -> Scene:
        """Scene `index`: image [3, H, W] uint8 as on disk and the three labels of every data set of codes."""
        index = self.position(index)
        key = self.key(index)
        return Scene(read_image(self._locate(self.ids[index], "images_6obj", "png"), key), self.labels(index), key)

    def key(self, index: int) -> str:
        """File stem of a scene."""
        return _stem(self.ids[index])

    def details(self, index: int) -> dict[str, Any]:
        """Number of the scene and its distinct objects."""
        return {"image_id": self.ids[index], **super().details(index)}

    def info(self) -> dict[str, float]:
        """Constants in bits: mean H_Y_given_F of the scenes, and H_Y, H_F, E_H_Y_given_F of the assumed prior."""
        entropies = self.prior.population()
        return super().info() | {name: entropies[name] for name in ("H_Y", "H_F", "E_H_Y_given_F")}

    def report(self) -> dict[str, Any]:
        """Facts on the split beside those of the base; scenes left out are listed."""
        return super().report() | {
            "source": str(self.root),
            "image_ids": [self.ids[0], self.ids[-1]],
            "requested": self.requested,
            "skipped": [list(pair) for pair in self.skipped],
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        existing = len(self.ids) + len(self.skipped)
        short = [f"only {existing} of {self.requested} scenes exist"] if existing < self.requested else []
        return short + ([f"{len(self.skipped)} scene files cannot be read and are left out"] if self.skipped else [])

    def fingerprint(self) -> dict[str, Any]:
        """The codes, their prior, and the image files as they lie on disk (names, sizes, times)."""
        paths = [self._locate(i, "images_6obj", "png") for i in self.ids]
        roots = {"first": self.root, "second": self.second_root}
        return {
            "dataset": "clevr",
            "split": self.split,
            "prior": self.prior_name,
            "codes": hashlib.sha256(self.object_code.tobytes() + self.entropy.tobytes()).hexdigest(),
            "images": {
                name: file_fingerprint(root, [str(path.relative_to(root)) for path in paths if path.parents[1] == root])
                for name, root in roots.items()
            },
        }

    def _build_prior(self, name: str, training: np.ndarray) -> priors.Prior:
        if name == "empirical":
            return priors.empirical_sizes(self.groups.sizes, training)
        make = {"uniform<=M": priors.uniform_up_to, "fixed_k": priors.fixed_size, "independent_draws": priors.independent_draws}
        return make[name](self.groups.sizes, self.max_objects)

    def _locate(self, scene_id: int, folder: str, ending: str) -> Path:
        """Path of a file of a scene: the first place it exists in, or the first it should."""
        roots = [self.second_root, self.root] if scene_id >= self.second_root_start else [self.root]
        paths = [root / folder / f"{_stem(scene_id)}.{ending}" for root in roots]
        return next((path for path in paths if path.exists()), paths[0])

    def _read(self, ids: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Scene numbers that could be read and their object codes [M, K]; several files at once, for slow disks."""
        rows = {}
        with ThreadPoolExecutor(8) as pool:
            for scene_id, row in track(zip(ids, pool.map(self._code, ids), strict=True), "clevr: scenes", "file", len(ids)):
                if not isinstance(row, UnreadableScene):
                    rows[scene_id] = row
                elif self.on_error == "skip":
                    self.skipped.append((row.key, row.reason))
                else:
                    pool.shutdown(cancel_futures=True)
                    raise UnreadableScene(row.key, f"{row.reason}; fix it, or leave it out with dataset.on_error=skip")
        if not rows:
            raise UserError(f"{self.root}: none of the {len(ids)} scene files can be read, first: {self.skipped[0][1]}")
        return list(rows), np.stack(list(rows.values()))

    def _code(self, scene_id: int) -> np.ndarray | UnreadableScene:
        path = self._locate(scene_id, "scenes_6obj", "json")
        try:
            code = self.groups.object_code(read_objects(path))
        except FileNotFoundError:
            return UnreadableScene(_stem(scene_id), f"scene file {path} is missing")
        except (OSError, ValueError) as error:
            return UnreadableScene(_stem(scene_id), f"{path}: {error}")
        if code.sum() > self.max_objects:  # a mistake of the configuration, whatever on_error says of files
            raise UserError(
                f"{path}: {int(code.sum())} different objects, more than dataset.max_objects={self.max_objects}; raise it"
            )
        return code


def read_objects(path: str | os.PathLike, values: Mapping[str, Sequence[str]] = VALUES) -> list[list[int]]:
    """Objects of a CLEVR scene file, each as its value in every group.

    Raises:
        ValueError: no JSON, or a field is missing or unknown; the text names object and field.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            scene = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON ({error})") from None
    return parse_objects(scene, values)


def parse_objects(scene: Any, values: Mapping[str, Sequence[str]]) -> list[list[int]]:
    """Objects of a scene in memory, as `read_objects`."""
    objects = scene.get("objects") if isinstance(scene, dict) else None
    if not isinstance(objects, list):
        raise ValueError("objects missing")
    rows = []
    for i, thing in enumerate(objects):
        row = []
        for field, known in values.items():
            if not isinstance(thing, dict) or field not in thing:
                raise ValueError(f"objects[{i}].{field} missing")
            if thing[field] not in known:
                raise ValueError(f"objects[{i}].{field}: got {thing[field]!r}, expected one of {', '.join(known)}")
            row.append(list(known).index(thing[field]))
        rows.append(row)
    return rows


def _stem(scene_id: int) -> str:
    return f"CLEVR_6obj_{scene_id:06d}"
