"""OcclusionClevr: CLEVR-like scenes that hide parts of each other, rendered by Blender, Y uniform over all object sets.

Published with "Formalizing the Binding Problem" (arXiv 2606.03976). Rendered once by `scripts/generate_occlusion_clevr.py`
inside Blender and kept below the root:

    <root>/<split>_N<n>_seed<seed>_M<max>_C<colours>_S<shapes>_render<r>_out<s>[_camz<z>][_campitch<p>]/
        spec.jsonl                              a line per scene: the source of the codes
        images/CLEVRGEN_<split>_000000.png      and what `datasets/occlusion_cache.py` keeps beside them

Random numbers: `sampling=hashed` draws every scene from a hash of (seed, split, index). `sampling=published` repeats the
published objects and seeds (dataset seed + index, so image i + 1 of training and image i of validation share camera,
light and places).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import datasets.sampling as draws
from datasets.codes import CodeScenes, Groups
from datasets.listings import data_folder, file_fingerprint
from datasets.metadata import Entry
from datasets.occlusion_cache import RenderCache, line_of
from datasets.pictures import read_image
from datasets.priors import uniform_up_to
from datasets.scene import Scene, check_choice, check_whole
from datasets.splits import SPLITS, split_name
from errors import UserError

COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
SHAPES = ("cube", "sphere", "cylinder")


class OcclusionClevr(CodeScenes, RenderCache):
    """Rendered scenes with the codes of their list of objects.

    Args:
        split: "train", "val" or "test".
        root: where caches lie; else OCCLUSION_CLEVR_GEN_ROOT, CLEVR_GEN_ROOT, data/generated/occlusionclevr.
        n_colors, n_shapes: the first so many of the canonical lists, or of `colors` and `shapes` where given.
        max_objects: most objects in a scene; None for no limit.
        n_train, n_val, n_test: scenes; the defaults are the published 10 000 cut 80:20, and 2 000.
        seed: of the whole data set; folders are named by seed, seed + 1, seed + 2 for train, val, test.
        sampling: "hashed" or "published", see the module text.
        on_error: "raise" or "skip", for the caller: unreadable images raise `UnreadableScene` either way.
        rendering: the options of `RenderCache`.

    Raises:
        UserError: images are missing and what rendering needs is not there, Blender failed, a damaged list, other settings.
    """

    def __init__(
        self,
        split: str,
        *,
        root: str | None = None,
        n_colors: int = 4,
        n_shapes: int = 3,
        colors: Sequence[str] | None = None,
        shapes: Sequence[str] | None = None,
        max_objects: int | None = 12,
        n_train: int = 8000,
        n_val: int = 2000,
        n_test: int = 2000,
        seed: int = 123223,
        sampling: str = "hashed",
        on_error: str = "raise",
        **rendering: Any,
    ) -> None:
        self.split, self.on_error = split_name(split), on_error
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("sampling", sampling, ("hashed", "published"))
        groups = Groups([_first("n_colors", n_colors, colors, COLORS), _first("n_shapes", n_shapes, shapes, SHAPES)])
        self.groups, self.sampling, self.seed = groups, sampling, check_whole("seed", seed, 0)
        most = groups.n_objects if max_objects is None else check_whole("max_objects", max_objects, 1)
        self.max_objects = min(most, groups.n_objects)
        lengths = {"train": n_train, "val": n_val, "test": n_test}
        self.requested = check_whole(f"n_{self.split}", lengths[self.split], 1)
        super().__init__(**rendering)
        variables = ["OCCLUSION_CLEVR_GEN_ROOT", "CLEVR_GEN_ROOT"]
        self.root = data_folder(root, variables, "data/generated/occlusionclevr")
        self.directory = self.root / self.directory_name()

        self.ids = self._prepare()
        self.dropped = sorted(set(range(self.requested)) - set(self.ids))
        object_code = np.stack([self._object_code(self.line(i), i) for i in self.ids])
        self.prior = uniform_up_to(groups.sizes, self.max_objects)
        self.set_codes(groups, object_code, self.prior.name, self.prior)

    def __getitem__(self, index: int) -> Scene:
        """Scene `index`: image [3, H, W] uint8 and the three labels; resized where `render_size` is not `image_size`."""
        index = self.position(index)
        image = read_image(self._image(self.ids[index]), self.key(index))
        size = self.image_size
        if tuple(image.shape[1:]) != (size, size):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BILINEAR)
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
        return Scene(image, self.labels(index), self.key(index))

    def key(self, index: int) -> str:
        """File stem of a scene."""
        return Path(self.spec[self.ids[index]]["image_filename"]).stem

    def details(self, index: int) -> dict[str, Any]:
        """The scene's line of the list, and its number of objects."""
        return {**self.spec[self.ids[index]], **super().details(index)}

    def info(self) -> dict[str, float]:
        """Constants in bits: mean H_Y_given_F of the scenes; exact H_Y, H_F, E_H_Y_given_F of the prior."""
        entropies = self.prior.population()
        return super().info() | {name: entropies[name] for name in ("H_Y", "H_F", "E_H_Y_given_F")}

    def report(self) -> dict[str, Any]:
        """Facts on the split beside those of the base; scenes without an image are listed."""
        return super().report() | {
            "source": str(self.directory),
            "requested": self.requested,
            "dropped": [self.spec[i]["image_filename"] for i in self.dropped],
            "warnings": [f"{len(self.dropped)} of {self.requested} images are missing and left out"] if self.dropped else [],
        }

    def fingerprint(self) -> dict[str, Any]:
        """Lines and settings of the scenes, and the image files as they lie on disk (names, sizes, times)."""
        return {
            "dataset": "occlusionclevr",
            "split": self.split,
            "seed": self.seed,
            "groups": self.groups.names,
            "prior": self.prior_name,
            "image_size": self.image_size,
            "settings": self.settings,
            "spec": hashlib.sha256("\n".join(line_of(self.spec[i]) for i in self.ids).encode()).hexdigest(),
            "images": file_fingerprint(self.directory / "images", [self.spec[i]["image_filename"] for i in self.ids]),
        }

    def directory_name(self) -> str:
        """Name of the cache folder, as published."""
        elevation, pitch = self.settings["camera_elevation"], self.settings["camera_pitch_deg"]
        colors, shapes = ("-".join(names) for names in self.groups.names)
        name = f"{self.split}_N{self.requested}_seed{self._split_seed}_M{self.max_objects}_C{colors}_S{shapes}"
        name += f"_render{self.render_size}_out{self.image_size}"
        name += f"_camz{elevation:g}" if elevation is not None else ""
        return name + (f"_campitch{pitch:g}" if pitch is not None else "")

    @property
    def _split_seed(self) -> int:
        return self.seed + SPLITS.index(self.split)

    def _sample(self) -> list[dict[str, Any]]:
        """The list of scenes of this configuration."""
        n, cells = self.requested, self.groups.n_objects
        if self.sampling == "published":
            generator = torch.Generator().manual_seed(self._split_seed)
            drawn = np.stack([draws.draw_published(generator, cells, self.max_objects) for _ in range(n)])
            seeds = [self._split_seed + i for i in range(n)]
        else:
            draw = draws.draw_uniform(draws.stream("occlusionclevr", self.seed, self.split), cells, self.max_objects)
            drawn, _ = draws.sample_until(n, draw, lambda code: np.ones(len(code), bool), n, "")
            seeds = [draws.stream("occlusionclevr", self.seed, self.split, i) % 2**31 for i in range(n)]
        return [
            {
                "image_filename": f"CLEVRGEN_{self.split}_{i:06d}.png",
                "image_index": i,
                "split": self.split,
                "seed": seed,
                "objects": [
                    {"color": color, "shape": shape, **self.object_kind} for color, shape in self.groups.decode_objects(code)
                ],
            }
            for i, (code, seed) in enumerate(zip(drawn, seeds, strict=True))
        ]

    def _object_code(self, line: Entry, number: int) -> np.ndarray:
        """Y [K] of a line of the list, checked."""
        line.key("image_index").whole(number, number)
        values = []
        for thing in line.key("objects").each():
            row = []
            for field, known in zip(("color", "shape"), self.groups.names, strict=True):
                value = thing.key(field)
                if value.text() not in known:
                    raise value.wrong(f"one of {', '.join(known)}")
                row.append(known.index(value.text()))
            for field, wanted in self.object_kind.items():
                if thing.key(field).value != wanted:
                    raise UserError(
                        f"{thing.key(field).place} is {thing.key(field).value!r}, dataset.default_{field} {wanted!r}; set it "
                        "back, or choose another dataset.root"
                    )
            values.append(row)
        code = self.groups.object_code(values)
        if code.sum() > self.max_objects:
            raise UserError(
                f"{line.place}: {int(code.sum())} different objects, more than dataset.max_objects={self.max_objects}"
            )
        return code


def _first(option: str, number: int, chosen: Sequence[str] | None, canonical: Sequence[str]) -> list[str]:
    """The first `number` values of the given list, else of the canonical one."""
    names = list(canonical if chosen is None else chosen)
    for name in names:
        check_choice(option.removeprefix("n_"), name, canonical)
    return names[: check_whole(option, number, 1, len(names))]
