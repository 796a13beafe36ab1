"""mode=check_data: walk a data set, read every scene of every split, say what is there and what is wrong.

Works with every data set: one of pixel labels gets objects, classes and coverage counted, one of codes its codes. A
data set may offer `inspect(i)`, which reads what a Scene does not need (names, remarks); it is used where it exists.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.scene import Scene, UnreadableScene, build
from errors import UserError

SPLITS = ("train", "val", "test")
LISTED = 10  # how many names the terminal gets; the file has all


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
        "key", "size" [H, W]; with pixel labels "objects" (distinct identities above 0), "pixels", "object_pixels",
        "classes" {class: pixels}, "labelled" and "unmapped" pixels (with a class, or an object where the data set has
        no raw classes; and those of them whose class is 0), "unmapped_raw" {raw class: unmapped pixels}; with codes
        "ones" {code: bits set} and "H_Y_given_F" in bits.
    """
    facts: dict[str, Any] = {"key": scene.key, "size": list(scene.image.shape[-2:])}
    labels = scene.labels
    if "object_code" in labels:
        facts["ones"] = {name: int(labels[name].sum()) for name in ("object_code", "feature_code") if name in labels}
        if "H_Y_given_F" in labels:
            facts["H_Y_given_F"] = float(labels["H_Y_given_F"])
    if "identity" in labels:
        objects = count_values(labels["identity"])
        facts["pixels"] = labels["identity"].numel()
        facts["object_pixels"] = sum(n for value, n in objects.items() if value > 0)
        facts["objects"] = sum(value > 0 for value in objects)
        if "class" in labels:
            facts["classes"] = count_values(labels["class"])
            raw = labels.get("raw_class")
            if raw is None:
                on_object = labels["identity"] > 0
                facts["labelled"] = facts["object_pixels"]
                facts["unmapped"] = int((on_object & (labels["class"] == 0)).sum())
            else:
                table, counts = labels["class_of_raw"], count_values(raw)
                facts["unmapped_raw"] = {value: n for value, n in counts.items() if value and not int(table[value])}
                facts["labelled"] = sum(n for value, n in counts.items() if value)
                facts["unmapped"] = sum(facts["unmapped_raw"].values())
    return facts


def _spread_of(values: Counter) -> dict[str, float]:
    """Fewest, mean and most of counted values."""
    n = sum(values.values())
    return {"min": min(values), "mean": sum(v * c for v, c in values.items()) / n, "max": max(values)}


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
        self.sums.update({name: facts[name] for name in ("pixels", "object_pixels", "labelled", "unmapped") if name in facts})
        if "H_Y_given_F" in facts:
            self.sums["H_Y_given_F"] += facts["H_Y_given_F"]
        self.classes.update(facts.get("classes", {}))
        self.unmapped_raw.update(facts.get("unmapped_raw", {}))
        for raw, name in facts.get("names", {}).items():
            self.names.setdefault(raw, Counter())[name] += 1

    def summary(self, classes: Sequence[str]) -> dict[str, Any]:
        """Everything counted, JSON-able; shares are of pixels."""
        found: dict[str, Any] = {"readable": self.readable, "unreadable": self.unreadable}
        if self.sizes:
            (height, width), n = self.sizes.most_common(1)[0]
            found["sizes"] = {
                "different": len(self.sizes),
                "most_common": {"size": [height, width], "images": n},
                "height": _spread_of(_projected(self.sizes, 0)),
                "width": _spread_of(_projected(self.sizes, 1)),
            }
        if self.objects:
            total = sum(n * images for n, images in self.objects.items())
            found["objects"] = {"total": total, **_spread_of(self.objects), "images_without": self.objects[0]}
            found["object_share"] = self.sums["object_pixels"] / max(1, self.sums["pixels"])
        if self.classes:
            present = sorted(value for value in self.classes if value > 0)
            found["classes"] = {
                "present": len(present),
                "known": len(classes) - 1,
                "absent": [name for value, name in enumerate(classes) if value and value not in self.classes],
            }
            found["unmapped_share"] = self.sums["unmapped"] / max(1, self.sums["labelled"])
        if self.unmapped_raw:
            found["largest_unmapped"] = [
                {
                    "raw_class": raw,
                    "name": self.names[raw].most_common(1)[0][0] if raw in self.names else None,
                    "share": n / max(1, self.sums["labelled"]),
                }
                for raw, n in self.unmapped_raw.most_common(20)
            ]
        if self.ones:
            found["codes"] = {name: _spread_of(counts) for name, counts in self.ones.items()}
            if "H_Y_given_F" in self.sums:
                found["codes"]["mean_H_Y_given_F_bits"] = self.sums["H_Y_given_F"] / max(1, self.readable)
        found["names_in_conflict"] = {str(raw): sorted(names) for raw, names in sorted(self.names.items()) if len(names) > 1}
        found["repeated_keys"], found["remarks"] = self.repeated, self.remarks
        return found


def _projected(sizes: Counter, axis: int) -> Counter:
    found: Counter = Counter()
    for size, n in sizes.items():
        found[size[axis]] += n
    return found


def walk(dataset: Any, split: str, workers: int) -> Tally:
    """Read every scene of a split, with a progress bar; nothing but counts is kept."""
    tally = Tally()
    loader = DataLoader(_Walked(dataset), batch_size=None, num_workers=workers, collate_fn=_same)
    for facts in tqdm(loader, desc=f"{split}: checking", unit="img", mininterval=0.5, leave=False):
        tally.add(facts)
    return tally


def _same(item: Any) -> Any:
    return item


def run(cfg: Any, run: Any) -> dict[str, Any]:
    """Entry of mode=check_data: table on the terminal, `check_data.json` in the run directory, a record per split.

    Raises:
        UserError: at the end, when something is wrong and `dataset.on_error` is raise; at once, when no split can be
            opened.
    """
    found: dict[str, dict[str, Any]] = {}
    keys: dict[str, set[str]] = {}
    closed: dict[str, str] = {}
    for split in SPLITS:
        try:
            dataset = build(cfg.dataset, split)
            facts = {"split": split, "images": len(dataset), "fingerprint": dataset.fingerprint()}
        except UserError as error:
            closed[split] = str(error)
            found[split] = {"split": split, "cannot_be_opened": str(error)}
            continue
        tally = walk(dataset, split, int(cfg.cache.workers))
        keys[split] = tally.keys
        facts |= {"report": dataset.report(), "info": dataset.info(), **tally.summary(dataset.classes)}
        found[split] = facts
    if len(closed) == len(SPLITS):
        raise UserError(next(iter(closed.values())))
    shared = {
        f"{one} and {other}": sorted(keys[one] & keys[other])
        for place, one in enumerate(keys)
        for other in list(keys)[place + 1 :]
        if keys[one] & keys[other]
    }
    path = Path(run.dir) / "check_data.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(json.dumps({"splits": found, "keys_in_two_splits": shared}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    for split, facts in found.items():
        # A record is written once per kind, split and block: the files' digest lets a mended copy have its own.
        block = json.dumps(facts.get("fingerprint", {}), sort_keys=True)
        brief = {name: value for name, value in facts.items() if name not in ("unreadable", "remarks", "fingerprint")}
        faults = {name: len(facts.get(name, ())) for name in ("unreadable", "remarks")}
        run.write({"kind": "check_data", "split": split, "block": block, **brief, **faults})
    _tell(found, shared, path, run.say)

    unreadable = [entry for facts in found.values() for entry in facts.get("unreadable", ())]
    if getattr(cfg.dataset, "on_error", "raise") == "raise":
        if unreadable:
            raise UserError(
                f"{len(unreadable)} unreadable scenes, first {': '.join(unreadable[0])}; {path} lists them all: mend them, "
                "or leave them out with dataset.on_error=skip"
            )
        if closed:
            split, why = next(iter(closed.items()))
            raise UserError(f"split {split} cannot be opened: {why}")
    return {"unreadable": len(unreadable), "images": sum(facts.get("images", 0) for facts in found.values())}


def _tell(found: dict[str, dict[str, Any]], shared: dict[str, list[str]], path: Path, say: Any) -> None:
    """The findings as text."""
    header = ["split", "images", "readable", "unreadable", "objects/image", "on objects", "unmapped", "classes", "H x W"]
    rows = [header]
    for split, facts in found.items():
        if "cannot_be_opened" in facts:
            rows.append([split, *["-"] * (len(header) - 1)])
            continue
        row = [split, str(facts["images"]), str(facts["readable"]), str(len(facts["unreadable"]))]
        if "objects" in facts:
            row += ["{mean:.1f} ({min}-{max})".format(**facts["objects"]), f"{facts['object_share']:.1%}"]
        elif "codes" in facts:
            row += ["{mean:.1f} ({min}-{max})".format(**facts["codes"]["object_code"]), "-"]
        else:
            row += ["-", "-"]
        if "classes" in facts:
            row += [f"{facts['unmapped_share']:.1%}", "{present}/{known}".format(**facts["classes"])]
        else:
            row += ["-", "-"]
        if "sizes" in facts:
            size = "x".join(map(str, facts["sizes"]["most_common"]["size"]))
            others = facts["sizes"]["different"] - 1
            row.append(f"{size} and {others} more" if others else size)
        else:
            row.append("-")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    for row in rows:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        say("  ".join(cells).rstrip())
    for split, facts in found.items():
        if "cannot_be_opened" in facts:
            say(f"{split}: cannot be opened: {facts['cannot_be_opened']}")
            continue
        if facts["report"]:
            say(f"{split}: " + "; ".join(f"{name} {_brief(value)}" for name, value in facts["report"].items()))
        for what, entries in (("unreadable", facts["unreadable"]), ("remark", facts["remarks"])):
            for entry in entries[:LISTED]:
                say(f"{split}: {what}: {': '.join(entry)}")
            if len(entries) > LISTED:
                say(f"{split}: {len(entries) - LISTED} more of these ({what}) in {path}")
        lost = [
            f"{entry['name'] or entry['raw_class']} {entry['share']:.1%}" for entry in facts.get("largest_unmapped", ())[:5]
        ]
        if lost:
            say(f"{split}: largest unmapped classes (share of labelled pixels): {'; '.join(lost)}")
        if facts["names_in_conflict"]:
            say(f"{split}: {len(facts['names_in_conflict'])} raw classes have several names, listed in {path}")
        if facts["repeated_keys"]:
            say(f"{split}: {len(facts['repeated_keys'])} names occur twice, first {facts['repeated_keys'][0]}")
    for pair, names in shared.items():
        say(f"splits {pair} share {len(names)} names, first {names[0]}")
    say(f"details: {path}")


def _brief(value: Any) -> str:
    """A report's value in a few words."""
    if isinstance(value, list) and len(value) > LISTED:
        return f"{len(value)} of them, first {value[0]}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
