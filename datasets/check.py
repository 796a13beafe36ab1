"""mode=check_data: walk a data set, read every scene of every split, say what is there and what is wrong.

Works with every data set: one of pixel labels gets objects, classes and coverage counted, one of codes its codes. A
data set may offer `inspect(i)`, which reads what a Scene does not need (names, remarks); it is used where it exists.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.scene import Scene, UnreadableScene, build
from errors import UserError
from files import write_atomically
from metrics.sample_size import FOLDS, TYPICAL_SPREAD, TYPICAL_SPREAD_OF_CODES, size_warnings
from runs.progress import stage, stages, track

SPLITS = ("train", "val", "test")
LISTED = 10  # how many names the terminal gets; the file has all
SHARES = {"on objects": "object_share", "ignored": "ignored_share", "unmapped": "unmapped_share"}
COLUMNS = ("split", "images", "readable", "unreadable", "objects/image", *SHARES, "classes", "H x W")


class _Walked(Dataset):
    """Facts of item i of a data set, small enough to come back from a worker process; faults are values."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            scene = self.dataset[i]
            facts = describe(scene)
            if hasattr(self.dataset, "inspect"):
                facts |= self.dataset.inspect(i)
        except UnreadableScene as error:
            return {"fault": [error.key, error.reason]}
        except Exception as error:  # a walk must reach the last item, whatever a file does to a reader
            return {"fault": [f"item {i}", f"{type(error).__name__}: {error}"]}
        return facts


def count_values(label_map: Tensor) -> dict[int, int]:
    """{value: pixels} of a map of whole numbers, any shape; fastest for small ones of at least 0."""
    flat = label_map.flatten()
    if flat.numel() and 0 <= int(flat.min()) <= int(flat.max()) < 1 << 20:
        counts = torch.bincount(flat)
        values = counts.nonzero()[:, 0]
        return dict(zip(values.tolist(), counts[values].tolist(), strict=True))
    values, counts = flat.unique(return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def describe(scene: Scene) -> dict[str, Any]:
    """Countable facts of one scene.

    Returns:
        "key", "size" [H, W]; with an identity map "objects" (distinct identities above 0) and "object_pixels"; with any map
        "pixels" and "ignored_pixels"; with a class map "classes" {class: pixels}, "labelled" and "unmapped" pixels, and
        perhaps "unmapped_raw" (see `_describe_classes`); with codes "ones" {code: bits set} and "H_Y_given_F" in bits.
    """
    labels = scene.labels
    facts: dict[str, Any] = {"key": scene.key, "size": list(scene.image.shape[-2:])}
    if "object_code" in labels:
        facts["ones"] = {name: int(labels[name].sum()) for name in ("object_code", "feature_code") if name in labels}
        if "H_Y_given_F" in labels:
            facts["H_Y_given_F"] = float(labels["H_Y_given_F"])
    primary = labels.get("identity", labels.get("class"))  # of the map that says which pixels take part
    if primary is not None:
        facts["pixels"], facts["ignored_pixels"] = primary.numel(), int((primary < 0).sum())
    if "identity" in labels:
        objects = count_values(labels["identity"])
        facts["object_pixels"] = sum(n for value, n in objects.items() if value > 0)
        facts["objects"] = sum(value > 0 for value in objects)
    if "class" in labels:
        facts |= _describe_classes(labels)
    return facts


def _describe_classes(labels: dict[str, Tensor]) -> dict[str, Any]:
    """Pixels per class, and how much of what is labelled has no class of the data set.

    "labelled" are the pixels with a raw class, or on objects where there are no raw classes; "unmapped" are those of them
    whose class is 0, "unmapped_raw" by raw class. Without raw classes and objects nothing of the kind is known.
    """
    facts: dict[str, Any] = {"classes": count_values(labels["class"])}
    if "raw_class" in labels:
        table, counts = labels["class_of_raw"], count_values(labels["raw_class"])
        facts["unmapped_raw"] = {value: n for value, n in counts.items() if value and not int(table[value])}
        facts["labelled"] = sum(n for value, n in counts.items() if value)
        facts["unmapped"] = sum(facts["unmapped_raw"].values())
    elif "identity" in labels:
        on_object = labels["identity"] > 0
        facts["labelled"] = int(on_object.sum())
        facts["unmapped"] = int((on_object & (labels["class"] == 0)).sum())
    return facts


def _spread_of(values: Counter) -> dict[str, float]:
    """Fewest, mean and most of counted values."""
    n = sum(values.values())
    return {"min": min(values), "mean": sum(v * c for v, c in values.items()) / n, "max": max(values)}


SUMMED = ("pixels", "ignored_pixels", "object_pixels", "labelled", "unmapped")


class Tally:
    """The facts of a split, added up scene by scene."""

    def __init__(self) -> None:
        self.readable, self.keys = 0, set()
        self.unreadable: list[list[str]] = []
        self.repeated: list[str] = []
        self.remarks: list[list[str]] = []
        self.sums: Counter = Counter()
        self.sizes: Counter = Counter()
        self.objects: Counter = Counter()
        self.classes: Counter = Counter()
        self.unmapped_raw: Counter = Counter()
        self.ones: dict[str, Counter] = {}
        self.names: dict[int, Counter] = {}

    def add(self, facts: dict[str, Any]) -> None:
        """Count one scene, or one fault."""
        if "fault" in facts:
            self.unreadable.append(facts["fault"])
            return
        key = facts["key"]
        self.readable += 1
        if key in self.keys:
            self.repeated.append(key)
        self.keys.add(key)
        self.sizes[tuple(facts["size"])] += 1
        self.remarks += [[key, remark] for remark in facts.get("remarks", ())]
        for name, n in facts.get("ones", {}).items():
            self.ones.setdefault(name, Counter())[n] += 1
        if "objects" in facts:
            self.objects[facts["objects"]] += 1
        self.sums.update({name: facts[name] for name in SUMMED if name in facts})
        if "H_Y_given_F" in facts:
            self.sums["H_Y_given_F"] += facts["H_Y_given_F"]
        self.classes.update(facts.get("classes", {}))
        self.unmapped_raw.update(facts.get("unmapped_raw", {}))
        for raw, name in facts.get("names", {}).items():
            self.names.setdefault(raw, Counter())[name] += 1

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """Everything counted, JSON-able; shares are of pixels."""
        facts: dict[str, Any] = {"readable": self.readable, "unreadable": self.unreadable}
        if self.sizes:
            facts["sizes"] = self._summarise_sizes()
        if self.sums["pixels"]:
            facts["ignored_share"] = self.sums["ignored_pixels"] / self.sums["pixels"]
        if self.objects:
            total = sum(n * images for n, images in self.objects.items())
            facts["objects"] = {"total": total, **_spread_of(self.objects), "images_without": self.objects[0]}
            facts["object_share"] = self.sums["object_pixels"] / max(1, self.sums["pixels"])
        if self.classes:
            facts |= self._summarise_classes(classes)
        if self.ones:
            facts["codes"] = {name: _spread_of(counts) for name, counts in self.ones.items()}
            if "H_Y_given_F" in self.sums:
                facts["codes"]["mean_H_Y_given_F_bits"] = self.sums["H_Y_given_F"] / max(1, self.readable)
        conflicts = {str(raw): sorted(names) for raw, names in sorted(self.names.items()) if len(names) > 1}
        return facts | {"names_in_conflict": conflicts, "repeated_keys": self.repeated, "remarks": self.remarks}

    def _summarise_sizes(self) -> dict[str, Any]:
        (height, width), n = self.sizes.most_common(1)[0]
        return {
            "different": len(self.sizes),
            "most_common": {"size": [height, width], "images": n},
            "height": _spread_of(_projected(self.sizes, 0)),
            "width": _spread_of(_projected(self.sizes, 1)),
        }

    def _summarise_classes(self, classes: Sequence[str]) -> dict[str, Any]:
        """Classes present and absent, and the raw classes that have none, largest first."""
        present = [value for value in self.classes if value > 0]
        absent = [name for value, name in enumerate(classes) if value and value not in self.classes]
        facts: dict[str, Any] = {"classes": {"present": len(present), "known": len(classes) - 1, "absent": absent}}
        if "labelled" in self.sums:
            facts["unmapped_share"] = self.sums["unmapped"] / max(1, self.sums["labelled"])
        if self.unmapped_raw:
            facts["largest_unmapped"] = [
                {
                    "raw_class": raw,
                    "name": self.names[raw].most_common(1)[0][0] if raw in self.names else None,
                    "share": n / max(1, self.sums["labelled"]),
                }
                for raw, n in self.unmapped_raw.most_common(20)
            ]
        return facts


def _projected(sizes: Counter, axis: int) -> Counter:
    counts: Counter = Counter()
    for size, n in sizes.items():
        counts[size[axis]] += n
    return counts


def walk(dataset: Any, split: str, workers: int) -> Tally:
    """Read every scene of a split, with a progress bar; nothing but counts is kept."""
    tally = Tally()
    loader = DataLoader(_Walked(dataset), batch_size=None, num_workers=workers, collate_fn=_same)
    for facts in track(loader, f"{split}: checking", "image", len(dataset)):
        tally.add(facts)
    return tally


def _same(item: Any) -> Any:
    return item


def run(cfg: Any, run: Any, table: Callable[[Sequence[str], Sequence[Sequence[str]]], str]) -> dict[str, Any]:
    """Count all splits: table on the terminal, `check_data.json` in the run directory, a record per split.

    Args:
        table: makes a text of a header and rows.

    Raises:
        UserError: at the end, when something is wrong and `dataset.on_error` is raise; at once, when no split can be
            opened.
    """
    facts: dict[str, dict[str, Any]] = {}
    keys: dict[str, set[str]] = {}
    stages(*SPLITS, "contact sheet")
    for split in SPLITS:
        stage(split)
        facts[split], keys[split] = check_split(cfg, split)
    closed = {split: facts[split]["cannot_be_opened"] for split in SPLITS if "cannot_be_opened" in facts[split]}
    if len(closed) == len(SPLITS):
        raise UserError(closed[SPLITS[0]])
    shared = {f"{one} and {other}": sorted(keys[one] & keys[other]) for one, other in itertools.combinations(SPLITS, 2)}
    shared = {pair: names for pair, names in shared.items() if names}
    path = Path(run.dir) / "check_data.json"
    write_atomically(path, json.dumps({"splits": facts, "keys_in_two_splits": shared}, indent=1) + "\n")
    for split in SPLITS:
        run.write(_record(split, facts[split]))
    run.say(table(list(COLUMNS), [[split, *(_cell(name, facts[split]) for name in COLUMNS[1:])] for split in facts]))
    for line in format_remarks(facts, shared, path):
        run.say(line)
    unreadable = [entry for split in SPLITS for entry in facts[split].get("unreadable", ())]
    if cfg.dataset.get("on_error", "raise") == "raise":
        if unreadable:
            raise UserError(
                f"{len(unreadable)} unreadable scenes, first {': '.join(unreadable[0])}; {path} lists them all: fix them, "
                "or leave them out with dataset.on_error=skip"
            )
        for split, reason in closed.items():
            raise UserError(f"split {split} cannot be opened: {reason}")
    return {"unreadable": len(unreadable), "images": sum(facts[split].get("images", 0) for split in SPLITS)}


def check_split(cfg: Any, split: str) -> tuple[dict[str, Any], set[str]]:
    """Walk a split; returns its facts, JSON-able, and the keys of its scenes. One that cannot be opened says why."""
    try:
        dataset = build(cfg.dataset, split)
        facts = {"split": split, "images": len(dataset), "fingerprint": dataset.fingerprint()}
    except UserError as error:
        return {"split": split, "cannot_be_opened": str(error)}, set()
    tally = walk(dataset, split, int(cfg.cache.workers))
    return facts | {"report": dataset.report(), "info": dataset.info(), **tally.summary(dataset.classes)}, tally.keys


def _record(split: str, facts: dict[str, Any]) -> dict[str, Any]:
    """The record of a split: counts in place of lists."""
    # A record is written once per kind, split and block: with the digest of the files a repaired copy has its own.
    block = json.dumps(facts.get("fingerprint", {}), sort_keys=True)
    brief = {name: value for name, value in facts.items() if name not in ("unreadable", "remarks", "fingerprint")}
    faults = {name: len(facts.get(name, ())) for name in ("unreadable", "remarks")}
    return {"kind": "check_data", "split": split, "block": block, **brief, **faults}


def _cell(column: str, facts: dict[str, Any]) -> str:
    """A cell of the table; "-" where the data set has nothing of the kind."""
    try:
        match column:
            case "images" | "readable":
                return str(facts[column])
            case "unreadable":
                return str(len(facts["unreadable"]))
            case "objects/image":
                counts = facts["objects"] if "objects" in facts else facts["codes"]["object_code"]
                return "{mean:.1f} ({min}-{max})".format(**counts)
            case "classes":
                return "{present}/{known}".format(**facts["classes"])
            case "H x W":
                size, others = "x".join(map(str, facts["sizes"]["most_common"]["size"])), facts["sizes"]["different"] - 1
                return f"{size} and {others} more" if others else size
            case _:
                return f"{facts[SHARES[column]]:.1%}"
    except KeyError:
        return "-"


def format_remarks(facts: dict[str, dict[str, Any]], shared: dict[str, list[str]], path: Path) -> list[str]:
    """What is worth a line beside the table; the file has all of it."""
    lines = []
    for split, of_split in facts.items():
        if "cannot_be_opened" in of_split:
            lines.append(f"{split}: cannot be opened: {of_split['cannot_be_opened']}")
            continue
        if of_split["report"]:
            lines.append(f"{split}: " + "; ".join(f"{name} {_brief(value)}" for name, value in of_split["report"].items()))
        for name, entries in (("unreadable", of_split["unreadable"]), ("remark", of_split["remarks"])):
            lines += [f"{split}: {name}: {': '.join(entry)}" for entry in entries[:LISTED]]
            if len(entries) > LISTED:
                lines.append(f"{split}: {len(entries) - LISTED} more of these ({name}) in {path}")
        if largest := of_split.get("largest_unmapped", ())[:5]:
            shares = "; ".join(f"{entry['name'] or entry['raw_class']} {entry['share']:.1%}" for entry in largest)
            lines.append(f"{split}: largest unmapped classes (share of labelled pixels): {shares}")
        if of_split["names_in_conflict"]:
            lines.append(f"{split}: {len(of_split['names_in_conflict'])} raw classes have several names, listed in {path}")
        if of_split["repeated_keys"]:
            lines.append(f"{split}: {len(of_split['repeated_keys'])} names occur twice, first {of_split['repeated_keys'][0]}")
    n_images = {split: of_split.get("readable", 0) for split, of_split in facts.items()}
    if n_images["train"] and n_images["test"]:
        of_codes = "codes" in facts["test"]
        spreads, remedy = (TYPICAL_SPREAD_OF_CODES, "") if of_codes else (TYPICAL_SPREAD, FOLDS)
        few = size_warnings(n_images["train"], n_images["test"], spreads, "as in the default runs, docs/results.md", remedy)
        lines += [f"warning: {text}" for text in few]
    lines += [f"splits {pair} share {len(names)} names, first {names[0]}" for pair, names in shared.items()]
    return [*lines, f"details: {path}"]


def _brief(value: Any) -> str:
    """A report's value in a few words."""
    if isinstance(value, list) and len(value) > LISTED:
        return f"{len(value)} of them, first {value[0]}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
