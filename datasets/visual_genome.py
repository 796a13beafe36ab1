"""Visual Genome as codes: object categories bound to one attribute each, a colour or a frequent attribute.

Reads metadata mined from Visual Genome (Krishna et al. 2017) in the layout of "Formalizing the Binding Problem" (arXiv
2606.03976); the mined files are not distributed with the paper. Below `<root>/deprecated/meta_filtered_<kind>_<split>/`,
kind `color` or `topattr`:

    attributes_filtered_<kind>.json   list of images: image_id, image_url, attributes [{object_class, attributes_<kind>}]
    vg_stats_filtered_<kind>.json     vocabulary and how often each pair of category and attribute occurs
    split_dataset.json                optional: image ids per split

Photographs have no known law of Y, so H(Y|F) is replaced by the entropy of handing out the attributes seen in the image
among the objects seen in it, pairs weighed by how often they occur. Two versions, both always computed:

    vg_assignment   the published number: arrangements along the ordered list of objects. Two cars, red and blue,
                    count as one bit although both arrangements are the same object code. Too high, and conditioned on
                    how many of each there are, which F does not say: neither an upper nor a lower bound of H(Y|F).
    vg_merged       arrangements with the same object code counted as one.

Published statistics come from the whole corpus, test images included; `statistics=train` counts the training images.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import datasets.codes as codes
from datasets.codes import CodeScenes, Groups, check_whole, data_folder, split_name
from datasets.scene import Scene, check_choice, file_fingerprint, read_image
from errors import UserError

FLOOR = 1e-12  # added to every pair's probability, as published: pairs never counted are possible
BUDGET = 2_000_000  # additions of the dynamic programme per image beyond which a bound replaces the entropy
MERGE_LIMIT = 20_000  # steps of listing object codes per image beyond which the entropy of the tables stands for theirs
PRIORS = ("vg_assignment", "vg_merged")


class ArrangementEntropy(NamedTuple):
    """Entropies of one image in bits, and whether each is exact or an upper bound."""

    assignment: float
    merged: float
    assignment_exact: bool
    merged_exact: bool


def arrangement_entropy(
    pairs: Sequence[tuple[int, int]], log_p: np.ndarray, *, budget: int = BUDGET, merge_limit: int = MERGE_LIMIT
) -> ArrangementEntropy:
    """Entropy of handing out the attributes of an image's (category, attribute) instances among its categories.

    An arrangement gives every instance one attribute so that each attribute is used as often as it was seen; its weight
    is the product of exp(log_p [N_1, N_2]) over the instances. All that matters of it is its table k: how often category
    c got attribute a. Tables with the observed margins have weight prod p^k / k!, so one pass over the cells (c, a), with
    the attributes handed out so far as its state, gives the entropy of tables and of arrangements together.

    The pass is iterative and its size, known before, is bounded by `budget`; beyond it both numbers are upper bounds
    (all arrangements equally likely). Object codes are tables with the numbers forgotten. Both have the same entropy
    unless two categories and two attributes occur three times or more: a second table with the same margins and the same
    non-zero cells differs along a cycle, where each row and column holds a cell of at least 2 beside one of at least 1.
    Then the rows of the frequent categories are listed, in at most `merge_limit` steps; beyond it the entropy of tables
    is reported, again an upper bound.
    """
    n, rows, columns = len(pairs), Counter(c for c, _ in pairs), Counter(a for _, a in pairs)
    if len(rows) < 1 or len(columns) < 2:
        return ArrangementEntropy(0.0, 0.0, True, True)
    categories, attributes = sorted(rows), sorted(columns)
    need, supply = np.array([rows[c] for c in categories]), np.array([columns[a] for a in attributes])
    p = _balance(log_p[np.ix_(categories, attributes)], need, supply)  # [C, A], natural log
    orders = sum(math.lgamma(k + 1) for k in need)
    # Which side is the state does not matter to the weight of a table: take the cheaper one.
    sides = sorted([(need, supply, p), (supply, need, p.T)], key=lambda side: _cost(*side[:2]))
    if _cost(*sides[0][:2]) > budget:
        most = math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in supply)
        fewer = min(most, math.lgamma(n + 1) - orders)
        return ArrangementEntropy(most / math.log(2), fewer / math.log(2), False, False)
    log_z, mean_p, mean_k = (float(x[tuple(sides[0][1])]) for x in _tables(*sides[0]))
    table = max(0.0, log_z - mean_p + mean_k) / math.log(2)
    assignment = max(0.0, log_z + orders - mean_p) / math.log(2)
    if (need >= 3).sum() < 2 or (supply >= 3).sum() < 2:
        return ArrangementEntropy(assignment, table, True, True)
    merged = _merged(*min(sides, key=lambda side: _listed(*side[:2])), limit=merge_limit)
    return ArrangementEntropy(assignment, table if merged is None else merged, True, merged is not None)


def _balance(log_p: np.ndarray, need: np.ndarray, supply: np.ndarray) -> np.ndarray:
    """Scale rows and columns so that they sum to about their margins (Sinkhorn).

    Factors of rows and columns are the same in every table of these margins, so no entropy changes; but the tables
    that count then have weights around one, whatever tiny probabilities the image forces.
    """
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    for _ in range(20):
        p = p * (supply / p.sum(0))
        p = p * (need / p.sum(1))[:, None]
    return np.log(np.maximum(p, 1e-280))


def _cost(need: np.ndarray, supply: np.ndarray) -> int:
    """Additions of `_tables`: cells x values of a cell x states; beyond reason where NumPy lacks the axes."""
    cells = int((np.minimum(need[:, None], supply) + 1).sum())
    return cells * math.prod(int(k) + 1 for k in supply) if len(supply) <= 30 else 2**62


def _tables(need: np.ndarray, supply: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the tables with row sums `need`, for every possible column sums u at once.

    Returns arrays of shape (supply + 1): log sum of prod exp(k p) / k!, and the means of sum k p and of sum log k!, in
    natural logs; -inf and 0 where sum(u) is not sum(need). State of the pass: what each column has handed out so far.
    """
    shape = tuple(int(k) + 1 for k in supply)
    total = np.indices(shape).sum(0)
    # Weight of the tables begun, and its products with sum k p and with sum log k!.
    state = np.zeros((3, *shape))
    state[(0, *(0,) * len(shape))] = 1.0
    done, log_scale = 0, 0.0
    for c, quota in enumerate(need):
        done += int(quota)
        for j, most in enumerate(supply):
            fresh = state.copy()
            for k in range(1, min(int(quota), int(most)) + 1):
                at = (slice(None),) * (j + 1)  # the leading axis and the columns before j
                part = state[(*at, slice(None, -k))] * math.exp(k * p[c, j] - math.lgamma(k + 1))
                part[1] += k * p[c, j] * part[0]
                part[2] += math.lgamma(k + 1) * part[0]
                fresh[(*at, slice(k, None))] += part
            state = fresh
        state *= total == done
        scale = state[0].max()
        state, log_scale = state / scale, log_scale + math.log(scale)
    weight = state[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_p, mean_k = np.where(weight > 0, state[1:] / weight, 0.0)
        return np.log(weight) + log_scale, mean_p, mean_k


def _listed(need: np.ndarray, supply: np.ndarray) -> int:
    """How many ways there are to fill the rows that occur three times or more, column sums aside."""
    return math.prod(math.comb(int(k) + len(supply) - 1, int(k)) for k in need if k >= 3)


def _merged(need: np.ndarray, supply: np.ndarray, p: np.ndarray, *, limit: int) -> float | None:
    """Entropy in bits over the sets of non-zero cells; None beyond `limit` steps.

    The cells of a row that occurs once or twice tell its numbers, and with them what the other rows share. So: list the
    cells of the rows that occur three times or more together with what they leave, then add the entropy of the light rows.
    """
    heavy = need >= 3
    log_z, mean_p, mean_k = _tables(need[~heavy], supply, p[~heavy])
    states: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {(tuple(map(int, supply)), ()): 1.0}
    steps = 0
    for c in np.flatnonzero(heavy):
        fresh: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for (left, cells), weight in states.items():
            for row in _rows(int(need[c]), left):
                steps += 1
                if steps > limit:
                    return None
                mask = sum(1 << j for j, k in enumerate(row) if k)
                key = (tuple(a - b for a, b in zip(left, row, strict=True)), (*cells, mask))
                factor = math.exp(sum(k * p[c, j] - math.lgamma(k + 1) for j, k in enumerate(row) if k))
                fresh[key] = fresh.get(key, 0.0) + weight * factor
        states = fresh
    left = tuple(np.array([key[0] for key in states]).T)
    weight = np.array(list(states.values())) * np.exp(log_z[left])
    share = weight / weight.sum()
    rest = np.where(share > 0, log_z[left] - mean_p[left] + mean_k[left], 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(share > 0, -share * np.log(share), 0.0)
    return max(0.0, float((own + share * rest).sum())) / math.log(2)


def _rows(quota: int, left: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to take `quota` from what is left of the columns."""
    if len(left) == 1:
        if quota <= left[0]:
            yield (quota,)
        return
    for k in range(max(0, quota - sum(left[1:])), min(quota, left[0]) + 1):
        for rest in _rows(quota - k, left[1:]):
            yield (k, *rest)


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
        for knob, value, valid in (
            ("on_error", on_error, ("raise", "skip")),
            ("attributes", attributes, ("color", "topattr")),
            ("metadata_split", metadata_split, ("coco", "top50")),
            ("prior", prior, PRIORS),
            ("statistics", statistics, ("corpus", "train")),
        ):
            check_choice(knob, value, valid)
        self.kind, self.statistics = attributes, statistics
        self.root = data_folder(root, ["VG_DATA_DIR"], "data/datasets/visual_genome")
        self.image_root = data_folder(image_root, ["VG_IMG_ROOT"], str(self.root.absolute()))
        self.folder = self.root / "deprecated" / f"meta_filtered_{attributes}_{metadata_split}"
        self.seed, self.budget = check_whole("seed", seed, 0), check_whole("budget", budget, 0)
        lengths = {"train": n_train, "val": n_val, "test": n_test}
        self.lengths = {k: None if n is None else check_whole(f"n_{k}", n, 0) for k, n in lengths.items()}
        self._stats_file = f"vg_stats_filtered_{attributes}.json"
        self.stats = self._load(self._stats_file, dict)
        self.records_file = f"attributes_filtered_{attributes}.json"
        records = self._load(self.records_file, list)
        groups = Groups(self._vocabulary())
        self.groups = groups
        self.none = "no_attribute" if "no_attribute" in groups.names[1] else "no_color"
        self._numbers = [{name: i for i, name in enumerate(group)} for group in groups.names]
        chosen = self._choose(records, self.split)
        pairs = [self._pairs(records[i], i) for i in chosen]
        self.counts = self._pair_counts(records)
        self.images = [self._image(records[i], i) for i in chosen]
        self.image_ids = [records[i]["image_id"] for i in chosen]
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

    def _load(self, name: str, kind: type) -> Any:
        path = self.folder / name
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing: the mined Visual Genome metadata do not come with the paper; place them there or set "
                "dataset.root=… (or VG_DATA_DIR)"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(content, kind):
            raise UserError(f"{path}: got a {type(content).__name__}, expected a {kind.__name__}")
        return content

    def _stat(self, *names: str) -> Any:
        found = next((self.stats[name] for name in names if name in self.stats), None)
        if found is None:
            raise UserError(f"{self.folder / self._stats_file}: {' or '.join(names)} missing")
        return found

    def _vocabulary(self) -> list[list[str]]:
        """Categories and attributes; by (-occurrences, name) where the file counts them, else in its order."""
        categories, attributes = (
            list(self._checked(self._stat(name), list, self._stats_file, name))
            for name in ("selected_object_classes", f"selected_{self.kind}_attributes")
        )
        if not categories:
            raise UserError(f"{self._stats_file}: selected_object_classes: got none, expected at least one name")
        none = "no_color" if self.kind == "color" else "no_attribute"
        if none not in attributes:
            attributes.append(none)
        groups = []
        for names, table in (
            (categories, "selected_object_occurrences"),
            (attributes, "selected_attribute_occurrences"),
        ):
            times = self.stats.get(table)
            if isinstance(times, dict) and times:
                times = {name: self._checked(n, int | float, self._stats_file, table, name) for name, n in times.items()}
                names = sorted(names, key=lambda name: (-times.get(name, 0), name))
            groups.append(names)
        return groups

    def _choose(self, records: Sequence[Mapping], split: str) -> list[int]:
        """Which records make up a split."""
        number = self.lengths[split]
        if (self.folder / "split_dataset.json").exists():
            listed = self._load("split_dataset.json", dict)
            if split not in listed:
                raise UserError(f"{self.folder}/split_dataset.json: {split} missing, expected train, val and test")
            wanted = set(self._checked(listed[split], list, "split_dataset.json", split))
            kept = [i for i, record in enumerate(records) if self._field(record, i, "image_id") in wanted]
            order = np.random.default_rng(self.seed + codes.SPLITS.index(split)).permutation(len(kept))
            chosen = [kept[i] for i in order[:number]]
        elif None in self.lengths.values():
            raise UserError(
                "dataset.n_train, n_val, n_test: got null, expected numbers: without split_dataset.json every split would "
                "hold all images"
            )
        else:
            start = sum(self.lengths[name] for name in codes.SPLITS[: codes.SPLITS.index(split)])
            chosen = list(range(len(records)))[start : start + number]
        if not chosen:
            raise UserError(
                f"dataset split {split}: none of the {len(records)} images of {self.folder / self.records_file} is left; "
                "lower dataset.n_train or n_val"
            )
        return chosen

    def _field(self, record: Any, number: int, *path: str | int) -> Any:
        value, name = record, f"{self.folder / self.records_file}: [{number}]"
        for step in path:
            name += f"[{step}]" if isinstance(step, int) else f".{step}"
            try:
                value = value[step]
            except (KeyError, TypeError, IndexError):
                raise UserError(f"{name} missing") from None
        return value

    def _checked(self, value: Any, kind: Any, file: str, *path: str | int) -> Any:
        """The value, if it is of its kind; else file and place are named."""
        if isinstance(value, kind) and not isinstance(value, bool):
            return value
        place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")
        wanted = {list: "a list", dict: "a table"}.get(kind, "a number")
        raise UserError(f"{self.folder / file}: {place}: got {str(value)[:40]!r}, expected {wanted}")

    def _pairs(self, record: Mapping, number: int) -> list[tuple[int, int]]:
        """(category, attribute) of every listed object of a known category, in the order of the file.

        The attribute is the first listed one that is known and is not the none value, else the none value.
        """
        categories, attributes = self._numbers
        found = []
        objects = self._checked(self._field(record, number, "attributes"), list, self.records_file, number, "attributes")
        for i in range(len(objects)):
            name = self._field(record, number, "attributes", i, "object_class")
            path = ("attributes", i, f"attributes_{self.kind}")
            listed = self._checked(self._field(record, number, *path), list, self.records_file, number, *path)
            if name in categories:
                first = next((a for a in listed if a in attributes and a != self.none), self.none)
                found.append((categories[name], attributes[first]))
        return found

    def _image(self, record: Mapping, number: int) -> str:
        """Path of the photograph below the image root: the last two parts of its address."""
        return "/".join(str(self._field(record, number, "image_url")).split("/")[-2:])

    def _pair_counts(self, records: Sequence[Mapping]) -> np.ndarray:
        """How often category and attribute occur together, [N_1, N_2]."""
        counts = np.zeros(self.groups.sizes)
        if self.statistics == "train":
            for i in self._choose(records, "train"):
                for pair in self._pairs(records[i], i):
                    counts[pair] += 1
            return counts
        table = self._stat("object_to_color_attribute_occurrences", "object_to_topk_attribute_occurrences")
        categories, attributes = self._numbers
        where = (self._stats_file, f"object_to_{'color' if self.kind == 'color' else 'topk'}_attribute_occurrences")
        for category, row in self._checked(table, dict, *where).items():
            for attribute, times in self._checked(row, dict, *where, category).items():
                if category in categories and attribute in attributes:
                    times = self._checked(times, int | float, *where, category, attribute)
                    counts[categories[category], attributes[attribute]] = times
        return counts

    def _entropies(self, pairs: Sequence[Sequence[tuple[int, int]]]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        """Both entropies of every image, and for how many each is an upper bound only."""
        log_p = np.log(self.counts / (self.counts.sum() or 1) + FLOOR)
        known: dict[tuple, ArrangementEntropy] = {}
        found = []
        for row in tqdm(pairs, f"vg{self.kind} entropies", disable=None):
            margins = (tuple(sorted(c for c, _ in row)), tuple(sorted(a for _, a in row)))
            if margins not in known:
                known[margins] = arrangement_entropy(row, log_p, budget=self.budget)
            found.append(known[margins])
        values = {
            "vg_assignment": np.array([one.assignment for one in found]),
            "vg_merged": np.array([one.merged for one in found]),
        }
        return values, {
            "vg_assignment": sum(not one.assignment_exact for one in found),
            "vg_merged": sum(not one.merged_exact for one in found),
        }
