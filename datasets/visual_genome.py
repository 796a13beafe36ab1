"""Visual Genome as codes: object categories bound to one attribute each, a colour or a frequent attribute.

Reads metadata mined from Visual Genome (Krishna et al. 2017) in the layout of "Formalizing the Binding Problem" (arXiv
2606.03976); the mined files are not distributed with the paper. Below `<root>/deprecated/meta_filtered_<kind>_<split>/`,
kind `color` or `topattr`:

    attributes_filtered_<kind>.json   list of images: image_id, image_url, attributes [{object_class, attributes_<kind>}]
    vg_stats_filtered_<kind>.json     vocabulary and how often each pair of category and attribute occurs
    split_dataset.json                optional: image ids per split

Photographs have no known prior of Y; what stands for H(Y|F) is in `datasets/arrangements.py`. Published statistics come
from the whole corpus, test images included; `statistics=train` counts the training images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets.arrangements import BUDGET, ArrangementEntropy, arrangement_entropy
from datasets.codes import CodeScenes, Groups
from datasets.listings import data_folder, file_fingerprint, inside
from datasets.metadata import Entry, read_json
from datasets.pictures import read_image
from datasets.scene import Scene, check_choice, check_whole
from datasets.splits import SPLITS, split_name
from errors import UserError
from runs.progress import track

FLOOR = 1e-12  # added to every pair's probability, as published: pairs never counted are possible
PRIORS = ("vg_assignment", "vg_merged")


class VisualGenome(CodeScenes):
    """Photographs with the code of their (category, attribute) pairs.

    Args:
        split: "train", "val" or "test".
        attributes: "color" (VGColor) or "topattr" (VGTopAttr).
        root: the metadata; else VG_DATA_DIR, else data/datasets/visual_genome below BINDING_PROJECT_ROOT or here.
        image_root: the folders VG_100K and VG_100K_2; else VG_IMG_ROOT, else `root`.
        metadata_split: "coco" or "top50", which mined set.
        prior: "vg_assignment" or "vg_merged": which entropy stands for H(Y|F).
        statistics: "corpus" (published: pair counts of the statistics file) or "train" (of the training images).
        n_train, n_val, n_test: images per split; None for all the split file lists. Without a split file the three are
            consecutive stretches of the metadata; with one, drawn from the listed images with the seed.
        seed: of the draw; seed + 1 and seed + 2 for val and test, as published.
        budget: additions per image the entropy may cost before a bound replaces it; images concerned are counted.
        on_error: "raise" or "skip", for the caller: unreadable images raise `UnreadableScene` either way.

    Raises:
        UserError: files missing or damaged (file, record and field named), no images.
    """

    def __init__(
        self,
        split: str,
        *,
        attributes: str = "color",
        root: str | None = None,
        image_root: str | None = None,
        metadata_split: str = "coco",
        prior: str = "vg_assignment",
        statistics: str = "corpus",
        n_train: int | None = 8000,
        n_val: int | None = 2000,
        n_test: int | None = 2000,
        seed: int = 0,
        budget: int = BUDGET,
        on_error: str = "raise",
    ) -> None:
        self.split, self.on_error = split_name(split), on_error
        check_choice("on_error", on_error, ("raise", "skip"))
        check_choice("attributes", attributes, ("color", "topattr"))
        check_choice("metadata_split", metadata_split, ("coco", "top50"))
        check_choice("prior", prior, PRIORS)
        check_choice("statistics", statistics, ("corpus", "train"))
        self.kind, self.statistics = attributes, statistics
        self.root = data_folder(root, ["VG_DATA_DIR"], "data/datasets/visual_genome")
        self.image_root = data_folder(image_root, ["VG_IMG_ROOT"], str(self.root.absolute()))
        self.folder = self.root / "deprecated" / f"meta_filtered_{attributes}_{metadata_split}"
        self.seed, self.budget = check_whole("seed", seed, 0), check_whole("budget", budget, 0)
        lengths = {"train": n_train, "val": n_val, "test": n_test}
        self.lengths = {k: None if n is None else check_whole(f"n_{k}", n, 0) for k, n in lengths.items()}
        self.stats = self._read(f"vg_stats_filtered_{attributes}.json")
        self._records_file = f"attributes_filtered_{attributes}.json"
        records = self._read(self._records_file).each()
        groups = Groups(self._vocabulary())
        self.groups = groups
        self.none = "no_attribute" if "no_attribute" in groups.names[1] else "no_color"
        self._numbers = [{name: i for i, name in enumerate(group)} for group in groups.names]
        chosen = self._choose(records, self.split)
        pairs = [self._pairs(record) for record in chosen]
        self.counts = self._pair_counts(records)
        self.images = [self._image(record) for record in chosen]
        self.image_ids = [_identifier(record.key("image_id")) for record in chosen]
        object_code = np.stack([groups.object_code(sorted(set(row))) for row in pairs])
        self.entropies, self.approximated = self._entropies(pairs)
        self.set_codes(groups, object_code, prior, self.entropies[prior])

    def __getitem__(self, index: int) -> Scene:
        """Photograph `index`: image [3, H, W] uint8 as on disk and the three labels of every data set of codes."""
        index = self.position(index)
        image = read_image(self.image_root / self.images[index], self.key(index))
        return Scene(image, self.labels(index), self.key(index))

    def key(self, index: int) -> str:
        """Folder and stem of the image file."""
        return str(Path(self.images[index]).with_suffix(""))

    def details(self, index: int) -> dict[str, Any]:
        """Image number and number of distinct pairs."""
        return {"image_id": self.image_ids[index], **super().details(index)}

    def info(self) -> dict[str, float]:
        """Means in bits: H_Y_given_F under the chosen prior, and both versions by name."""
        means = {f"H_Y_given_F_{name}": float(values.mean(dtype=np.float32)) for name, values in self.entropies.items()}
        return super().info() | means

    def report(self) -> dict[str, Any]:
        """Facts on the split beside those of the base, among them for how many images an entropy is only a bound."""
        return super().report() | {
            "source": str(self.folder),
            "statistics": self.statistics,
            "conditioned_on": "the multisets of categories and of attributes in the image, which F does not carry",
            "requested": self.lengths[self.split],
            "approximated_images": self.approximated[self.prior_name],
            **{f"approximated_images_{name}": number for name, number in self.approximated.items()},
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        number, wanted = self.approximated[self.prior_name], self.lengths[self.split]
        bounds = [f"H(Y|F) of {number} of {len(self)} images is only an upper bound; raise dataset.budget"] if number else []
        return bounds + ([f"only {len(self)} of {wanted} images exist"] if wanted and len(self) < wanted else [])

    def fingerprint(self) -> dict[str, Any]:
        """The codes, how they were weighed, and the image files as they lie on disk (names, sizes, times)."""
        return {
            "dataset": f"vg{self.kind}",
            "split": self.split,
            "seed": self.seed,
            "prior": self.prior_name,
            "statistics": self.statistics,
            "codes": hashlib.sha256(self.object_code.tobytes() + self.entropy.tobytes()).hexdigest(),
            "images": file_fingerprint(self.image_root, self.images),
        }

    def _read(self, name: str) -> Entry:
        path = self.folder / name
        missing = "the mined Visual Genome metadata do not come with the paper: place them there or set dataset.root=…"
        return read_json(path, missing=f"{missing} (or VG_DATA_DIR)")

    def _vocabulary(self) -> list[list[str]]:
        """Categories and attributes; by (-occurrences, name) where the file counts them, else in its order."""
        categories, attributes = (
            self.stats.key(name).different() for name in ("selected_object_classes", f"selected_{self.kind}_attributes")
        )
        none = "no_color" if self.kind == "color" else "no_attribute"
        if none not in attributes:
            attributes.append(none)
        groups = []
        for names, table in (
            (categories, "selected_object_occurrences"),
            (attributes, "selected_attribute_occurrences"),
        ):
            if self.stats.has(table) and self.stats.value[table]:
                times = {name: entry.number(0) for name, entry in self.stats.key(table).items()}
                names = sorted(names, key=lambda name: (-times.get(name, 0), name))
            groups.append(names)
        return groups

    def _choose(self, records: Sequence[Entry], split: str) -> list[Entry]:
        """The records that make up a split."""
        number = self.lengths[split]
        if (self.folder / "split_dataset.json").exists():
            wanted = {_identifier(entry) for entry in self._read("split_dataset.json").key(split).each()}
            kept = [record for record in records if _identifier(record.key("image_id")) in wanted]
            order = np.random.default_rng(self.seed + SPLITS.index(split)).permutation(len(kept))
            chosen = [kept[i] for i in order[:number]]
        elif None in self.lengths.values():
            raise UserError(
                "dataset.n_train, n_val, n_test: got null, expected numbers: without split_dataset.json every split would "
                "hold all images"
            )
        else:
            start = sum(self.lengths[name] for name in SPLITS[: SPLITS.index(split)])
            chosen = list(records)[start : start + number]
        if not chosen:
            raise UserError(
                f"dataset split {split}: none of the {len(records)} images of {self.folder / self._records_file} is left; "
                "lower dataset.n_train or n_val"
            )
        return chosen

    def _pairs(self, record: Entry) -> list[tuple[int, int]]:
        """(category, attribute) of every listed object of a known category, in the order of the file.

        The attribute is the first listed one that is known and is not the none value, else the none value.
        """
        categories, attributes = self._numbers
        pairs = []
        for thing in record.key("attributes").each():
            category = thing.key("object_class").text()
            listed = [entry.text() for entry in thing.key(f"attributes_{self.kind}").each()]
            if category in categories:
                first = next((name for name in listed if name in attributes and name != self.none), self.none)
                pairs.append((categories[category], attributes[first]))
        return pairs

    def _image(self, record: Entry) -> str:
        """Path of the photograph below the image root: the last two parts of its address."""
        address = record.key("image_url")
        name = "/".join(address.text().split("/")[-2:])
        inside(self.image_root, name, address.place)
        return name

    def _pair_counts(self, records: Sequence[Entry]) -> np.ndarray:
        """How often category and attribute occur together, [N_1, N_2]."""
        counts = np.zeros(self.groups.sizes)
        if self.statistics == "train":
            for record in self._choose(records, "train"):
                for pair in self._pairs(record):
                    counts[pair] += 1
            return counts
        categories, attributes = self._numbers
        kinds = ("color", "topk") if self.kind == "color" else ("topk", "color")
        table = self.stats.key(*(f"object_to_{kind}_attribute_occurrences" for kind in kinds))
        for category, row in table.items():
            for attribute, times in row.items():
                if category in categories and attribute in attributes:
                    counts[categories[category], attributes[attribute]] = times.number(0)
        return counts

    def _entropies(self, pairs: Sequence[Sequence[tuple[int, int]]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Both entropies of every image, and for how many each is an upper bound only."""
        log_p = np.log(self.counts / (self.counts.sum() or 1) + FLOOR)
        known: dict[tuple, ArrangementEntropy] = {}
        entropies = []
        for row in track(pairs, f"vg{self.kind}: entropies", "pair"):
            margins = (tuple(sorted(c for c, _ in row)), tuple(sorted(a for _, a in row)))
            if margins not in known:
                known[margins] = arrangement_entropy(row, log_p, budget=self.budget)
            entropies.append(known[margins])
        values = {
            "vg_assignment": np.array([one.assignment for one in entropies]),
            "vg_merged": np.array([one.merged for one in entropies]),
        }
        return values, {
            "vg_assignment": sum(not one.assignment_exact for one in entropies),
            "vg_merged": sum(not one.merged_exact for one in entropies),
        }


def _identifier(entry: Entry) -> int | str:
    """The number of an image; some files have it as a text."""
    return entry.text() if isinstance(entry.value, str) else entry.whole()
