"""The index of a split: which images are used, how their patches are labelled and which are kept. No backbone is needed for it.

One pass over the data set, cached under `<cache.dir>/index`; selection comes from labels, image name and seed alone, so
every backbone of one patch size and image size sees the same patches.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from backbones.contract import BackboneFacts
from datasets.scene import build
from errors import UserError
from files import digest, lock, plain, safe_name, sealed, wait, write_atomically
from machine import rank
from patches.selection import PRIMARY, primary_label
from runs.progress import track
from store.labelled import SKIP_HINT, LabelledItems
from store.listing import hold
from store.reading import ImageItems, load_items
from store.shards import read_manifest

FORMAT = 3  # raise it when the meaning of an indexed number changes: older directories are then left alone
LISTED = 5  # names of left-out images that are logged; the manifest has all


class Index(NamedTuple):
    """The M usable images of a split, and T patches of each.

    keys: names of the images.
    tensors: "number" [M] int64 item of the data set; "content" [M, 16] uint8 digest of the image; "grids" [M, 2] int16
        patches of one window; "position" [M, T, 3] int16 (window, row, column) of the kept patches, absent where whole
        images are kept; for each label map "identity" and "class" of the data: "label.<name>" [M, T] int32,
        "label.<name>_valid" [M, T] bool and "label.<name>_purity" [M, T] float32 (`PatchLabels`); with them "label.place"
        [M, T, 2] float32 row and column in the scaled image, in patches. Or codes as "label.<name>" [M, n].
    manifest: what it was made from, and "dropped", "skipped": lists of (image, reason).
    """

    keys: list[str]
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]

    @property
    def grids(self) -> Tensor:
        """[M, 2] int16 rows and columns of patches of one window."""
        return self.tensors["grids"]

    @property
    def one_grid(self) -> bool:
        """Whether all images have the same grid."""
        return len(self.grids.unique(dim=0)) == 1

    @property
    def label_maps(self) -> list[str]:
        """Names of the label maps that patches have labels of; none for data of codes."""
        return [name for name in PRIMARY if f"label.{name}_valid" in self.tensors]

    @property
    def selected_by(self) -> str | None:
        """The label map that patches were selected by; None for data of codes."""
        return primary_label(self.label_maps, self.manifest["facts"]["selection"]["by"]) if self.label_maps else None

    def placed(self, mode: str, has_class_token: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions [M, T, 3] and labels of the tokens of an output mode; class and pooled tokens are no valid patches.

        Raises:
            UserError: the tokens of all patches are wanted, and the images have different grids.
        """
        labels = {name.removeprefix("label."): value for name, value in self.tensors.items() if name.startswith("label.")}
        labels |= {name: labels[name].long() for name in self.label_maps}
        pixel_maps, no_patch = bool(self.label_maps), torch.full((1, 3), -1)
        if mode == "patches":
            return self.tensors["position"].long(), labels
        if mode != "all":
            if pixel_maps:
                labels = {name: torch.zeros_like(value[:, :1]) for name, value in labels.items()}
            return no_patch.expand(len(self.keys), -1, -1), labels
        if not self.one_grid:
            raise UserError(
                "model.output_mode=all needs images of one grid of patches, got several; use images of one shape, "
                "model.output_mode=patches or mean_spatial"
            )
        h, w = self.grids[0].tolist()
        position = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(h), torch.arange(w))  # [N, 3]
        if has_class_token:
            position = torch.cat([no_patch, position])  # [1 + N, 3]
            if pixel_maps:
                labels = {name: torch.cat([torch.zeros_like(value[:, :1]), value], dim=1) for name, value in labels.items()}
        return position.expand(len(self.keys), -1, -1), labels


def open_index(
    cfg: Any,
    dataset: Any,
    split: str,
    facts: BackboneFacts,
    *,
    whole_images: bool,
    say: Callable[[str], None],
    plan: Callable[[], None] = lambda: None,
) -> Index:
    """The index of a split, from the cache or built in one pass over its images; `whole_images` keeps every patch.

    Args:
        plan: refuses what is too large; called where there is no index yet, before the pass.

    Raises:
        UserError: no usable image, an unreadable one under `dataset.on_error=raise`, data unfit for the output mode.
    """
    protocol, cache = cfg.protocol, cfg.cache
    selection = {"by": None, **protocol.selection}  # configurations of former runs do not have it
    primary_label(PRIMARY, selection["by"])  # an unknown name is refused before a pass over the data
    decides = ("by",) if whole_images else [key for key in selection if key != "per_visit"]  # drawn of the kept ones
    made_from = plain(
        {
            "format": FORMAT,
            "dataset": type(dataset).__name__,
            "fingerprint": dataset.fingerprint(),
            "split": split,
            "geometry": protocol.geometry,
            "labels": protocol.labels,
            "selection": {key: selection[key] for key in decides},
            "patch_size": facts.patch_size,
            "image_size": list(facts.image_size),
        }
    )
    kept = "whole" if whole_images else "patches"
    rules = protocol.name.partition(",")[0]  # without what differs from its file: that is in the digest
    name = safe_name(f"{type(dataset).__name__}-{split}-{rules}-{kept}-{digest(made_from)}")
    directory = Path(cache.dir) / "index" / name
    if rank()[0]:  # rank 0 builds it and touches its lock file while it works
        is_built = lambda: (directory / "manifest.json").exists() or None
        wait(is_built, [directory / "lock"], cache.lock_timeout, f"rank 0, which builds {directory}")
    index = _read(directory, made_from, cache.repair)
    if index is None:
        with lock(directory / "lock", cache.lock_timeout, say) as beat:
            index = _read(directory, made_from, cache.repair)
            if index is None:
                plan()
                items = LabelledItems(ImageItems(dataset, made_from, cache.ram_gb), protocol, facts, whole_images)
                index = _build(items, made_from, cache.workers, beat)
                _write(directory, index)
    if (used := hold(directory)) is not None:  # now; all of it is in memory
        used.close()
    _log_left_out(index, dataset, split, say)
    return index


def _log_left_out(index: Index, dataset: Any, split: str, say: Callable[[str], None]) -> None:
    """Log the images that are not used; refuse skipped ones where `dataset.on_error` is not skip."""
    skipped, dropped = index.manifest["skipped"], index.manifest["dropped"]
    if skipped and dataset.on_error != "skip":  # an earlier run was allowed to skip them
        raise UserError(f"{skipped[0][0]}: {skipped[0][1]}{SKIP_HINT}")
    for reason, left_out in (("dropped by the protocol", dropped), ("unreadable and skipped", skipped)):
        if left_out:
            names = ", ".join(f"{key} ({why})" for key, why in left_out[:LISTED]) + (", …" if len(left_out) > LISTED else "")
            say(f"{split}: {len(left_out)} of {len(dataset)} images {reason}: {names}")


def build_dataset(cfg: Any, split: str) -> Any:
    """The data set of the configuration (`datasets.scene.build`)."""
    return build(cfg.dataset, split)


def _build(items: LabelledItems, made_from: dict[str, Any], workers: int, beat: Callable[[], None]) -> Index:
    """One pass over the data set."""
    columns: dict[str, list] = {}
    dropped, skipped = [], []
    split, loader = made_from["split"], load_items(items, range(len(items)), workers)
    for item in track(loader, f"{split}: labels", "image", len(items)):
        beat()
        if "fatal" in item:
            raise UserError(item["fatal"])
        if "dropped" in item:
            dropped.append(item["dropped"])
        elif "fault" in item:
            if items.dataset.on_error != "skip":
                raise UserError(": ".join(item["fault"]) + item["hint"])
            skipped.append(item["fault"])
        else:
            _check_same_labels(item, columns)
            for name, value in item.items():
                columns.setdefault(name, []).append(value)
    keys = columns.pop("key", [])
    if not keys:
        reasons = Counter(reason for _, reason in dropped + skipped).most_common(3)
        counted = "; ".join(f"{n} × {reason}" for reason, n in reasons) or "the data set is empty"
        raise UserError(f"no usable image among the {len(items)} of split {split}: {counted}")
    tensors = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in _stacked(columns).items()}
    manifest = {"facts": made_from, "digest": digest(made_from), "images": len(keys), "dropped": dropped, "skipped": skipped}
    return Index(keys, tensors, plain(manifest))


def _check_same_labels(item: dict[str, Any], columns: dict[str, list]) -> None:
    """Refuse an image whose label maps are not those of the images before it."""
    names = [", ".join(name for name in PRIMARY if f"label.{name}" in labels) or "codes" for labels in (item, columns)]
    if columns and names[0] != names[1]:
        raise UserError(
            f"{item['key']} has labels {names[0]} and {columns['key'][0]} has {names[1]}; all images of a data set need the "
            "same label maps"
        )


def _stacked(columns: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """One array [M, …] per column, from the M images' own of perhaps different lengths."""
    per_patch = [name for name in columns if name == "position" or (name.startswith("label.") and "label.place" in columns)]
    lengths = {len(value) for name in per_patch for value in columns[name]}
    if len(lengths) > 1:
        # Where every owned patch is kept, longer images have more of them; shorter ones are filled up with invalid ones.
        # Whole images of several shapes can only be pooled, and pooled tokens have no label of a patch.
        n_tokens = max(lengths) if "position" in columns else 1
        for name in per_patch:
            columns[name] = [_resized(value, n_tokens) for value in columns[name]]
    return {name: np.stack(column) for name, column in columns.items()}


def _resized(value: np.ndarray, n: int) -> np.ndarray:
    """The first n entries, followed by zeros where there are fewer."""
    value = value[:n]
    return np.pad(value, [(0, n - len(value)), *[(0, 0)] * (value.ndim - 1)])


def _write(directory: Path, index: Index) -> None:
    """Write an index; the manifest comes last and makes it count."""
    data = save(index.tensors)
    index.manifest.update(sha256=hashlib.sha256(data).hexdigest(), keys=index.keys)
    write_atomically(directory / "index.safetensors", data)
    write_atomically(directory / "manifest.json", sealed(index.manifest))


def _read(directory: Path, made_from: dict[str, Any], repair: bool) -> Index | None:
    """The index of a directory; None where there is none yet, or a damaged one that is to be repaired.

    Raises:
        UserError: a damaged file, which is named.
    """
    path, file = directory / "manifest.json", directory / "index.safetensors"
    manifest = read_manifest(path, made_from, repair)
    if manifest is None or not file.exists():
        return None
    remedy = f"delete {directory} or set cache.repair=true to build it again"
    try:
        if fault := _fault_of(manifest):
            raise UserError(f"{path} is damaged ({fault} does not fit the rest); {remedy}")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
            raise UserError(f"{file} is damaged (its checksum differs); {remedy}")
        tensors = load(data)
        if fault := _fault_of_tensors(tensors, manifest["images"]):
            raise UserError(f"{file} is damaged ({fault} is not what an index holds); {remedy}")
    except (UserError, OSError, SafetensorError) as error:
        if repair:
            return None
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged ({error}); {remedy}") from error
    return Index(manifest["keys"], tensors, manifest)


def _fault_of(manifest: dict[str, Any]) -> str:
    """The first entry of a manifest that is not of its kind, or does not fit the others; empty if all do."""

    def texts(value: Any, n: int | None = None) -> bool:
        return isinstance(value, list) and all(isinstance(text, str) for text in value) and n in (None, len(value))

    def left_out(value: Any) -> bool:
        return isinstance(value, list) and all(texts(pair, 2) for pair in value)

    fits = {
        "digest": manifest.get("digest") == digest(manifest["facts"]),
        "images": type(manifest.get("images")) is int and manifest["images"] >= 1,
        "keys": texts(manifest.get("keys"), manifest.get("images")),
        "dropped": left_out(manifest.get("dropped")),
        "skipped": left_out(manifest.get("skipped")),
        "sha256": isinstance(manifest.get("sha256"), str),
    }
    return next((name for name, good in fits.items() if not good), "")


def _fault_of_tensors(tensors: dict[str, Tensor], n_images: int) -> str:
    """The first tensor of an index that is missing or of another kind or shape; empty if none is."""
    always = {"number": (torch.int64, ()), "content": (torch.uint8, (16,)), "grids": (torch.int16, (2,))}
    for name, (dtype, shape) in always.items():
        if name not in tensors or tensors[name].dtype != dtype or tensors[name].shape != (n_images, *shape):
            return name
    return next((name for name, value in tensors.items() if value.shape[:1] != (n_images,)), "")
