"""The index of a split: which images are used, what their patches are called and which are kept. No backbone in sight.

One pass over the data set, cached under `<cache.dir>/index`; selection comes from labels, image name and seed alone, so
every backbone of one patch size and image size sees the same patches.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from datasets.scene import build
from errors import UserError
from files import digest, lock, plain, safe_name, wait, write_atomically
from machine import rank
from patches.geometry import DroppedImage, Geometry, plan_geometry
from patches.labels import label_patches
from patches.selection import owned_patches, select_patches
from store.shards import read_manifest

FORMAT = 2  # raise it when the meaning of an indexed number changes: older directories are then left alone

SKIP_HINT = "; mend it, or leave it out with dataset.on_error=skip"
T = TypeVar("T")


class Index(NamedTuple):
    """What is known of the M usable images of a split.

    keys: their names.
    tensors: "number" [M] int64 item of the data set; "content" [M, 16] uint8 digest of the image; "grids" [M, 2] int16
        patches of one window; "position" [M, T, 3] int16 (window, row, column) of the kept patches, absent where whole
        images are kept; labels as "label.<name>": per kept patch [M, T], or codes [M, n].
    manifest: the facts it was made from, and "dropped", "skipped": lists of (image, reason).
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

    def placed(self, mode: str, has_class_token: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Positions [M, T, 3] and labels of the tokens of an output mode; class and pooled tokens are no valid patches.

        Raises:
            UserError: every token is asked for, and the images have different grids.
        """
        labels = {name.removeprefix("label."): value for name, value in self.tensors.items() if name.startswith("label.")}
        labels = {name: value.long() if name in ("identity", "class") else value for name, value in labels.items()}
        pixel_maps, position = "valid" in labels, torch.full((1, 3), -1)
        if mode == "patches":
            return self.tensors["position"].long(), labels
        if mode != "all":
            if pixel_maps:
                labels = {name: torch.zeros_like(value[:, :1]) for name, value in labels.items()}
            return position.expand(len(self.keys), -1, -1), labels
        if not self.one_grid:
            raise UserError(
                "model.output_mode=all needs images of one grid of patches, got several; use images of one shape, "
                "model.output_mode=patches or mean_spatial"
            )
        h, w = self.grids[0].tolist()
        patches = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(h), torch.arange(w))  # [N, 3]
        if has_class_token:
            patches = torch.cat([position, patches])
            if pixel_maps:
                labels = {name: torch.cat([torch.zeros_like(value[:, :1]), value], dim=1) for name, value in labels.items()}
        return patches.expand(len(self.keys), -1, -1), labels


def open_index(
    cfg: Any,
    dataset: Any,
    split: str,
    *,
    patch_size: int,
    image_size: Sequence[int],
    whole: bool,
    say: Callable[[str], None],
) -> Index:
    """The index of a split, from the cache or made in one pass over its images; `whole` keeps every patch.

    Raises:
        UserError: no usable image, an unreadable one under `dataset.on_error=raise`, data unfit for the output mode.
    """
    protocol, cache = cfg.protocol, cfg.cache
    facts = plain(
        {
            "format": FORMAT,
            "dataset": type(dataset).__name__,
            "fingerprint": dataset.fingerprint(),
            "split": split,
            "geometry": protocol.geometry,
            "labels": protocol.labels,
            # how many are drawn of them at each visit is not decided here
            "selection": None if whole else {k: v for k, v in protocol.selection.items() if k != "per_visit"},
            "patch_size": patch_size,
            "image_size": list(image_size),
        }
    )
    kind = "whole" if whole else "patches"
    name = safe_name(f"{type(dataset).__name__}-{split}-{protocol.name}-{kind}-{digest(facts)}")
    directory = Path(cache.dir) / "index" / name
    if rank()[0]:  # rank 0 makes it and touches its lock file while it works
        made = lambda: (directory / "manifest.json").exists() or None
        wait(made, [directory / "lock"], cache.lock_timeout, f"rank 0, which makes {directory}")
    index = _read(directory, facts, cache.repair)
    if index is None:
        with lock(directory / "lock", cache.lock_timeout, say) as beat:
            index = _read(directory, facts, cache.repair)
            if index is None:
                items = _Labelled(dataset, protocol, patch_size, image_size, whole)
                index = _make(items, split, cache.workers, directory, facts, beat)
    skipped, dropped = index.manifest["skipped"], index.manifest["dropped"]
    if skipped and dataset.on_error != "skip":  # an earlier run was allowed to skip them
        raise UserError(f"{skipped[0][0]}: {skipped[0][1]}{SKIP_HINT}")
    for what, listed in (("dropped by the protocol", dropped), ("unreadable and skipped", skipped)):
        if listed:
            some = ", ".join(f"{key} ({reason})" for key, reason in listed[:5]) + (", …" if len(listed) > 5 else "")
            say(f"{split}: {len(listed)} of {len(dataset)} images {what}: {some}")
    return index


def build_dataset(cfg: Any, split: str) -> Any:
    """The data set of the configuration (`datasets.scene.build`)."""
    return build(cfg.dataset, split)


def content_id(image: Tensor) -> bytes:
    """16 bytes that stand for the decoded image [3, H, W] uint8."""
    shape = f"{tuple(image.shape)}".encode()
    return hashlib.blake2b(
        image.contiguous().numpy(), digest_size=16, salt=hashlib.blake2b(shape, digest_size=8).digest()
    ).digest()


def load_items(items: Dataset, order: Sequence[int], workers: int) -> DataLoader:
    """Items one by one in the given order, read ahead by `workers` processes (0: by the caller)."""
    return DataLoader(
        items,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        collate_fn=_same,
        prefetch_factor=4 if workers else None,
    )


def _same(item: Any) -> Any:
    return item


def read_ahead(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Run an iterator in a thread, `depth` items ahead; its errors are raised here."""
    box: queue.Queue = queue.Queue(depth)
    stop, n_threads = threading.Event(), torch.get_num_threads()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                box.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        torch.set_num_threads(1)  # of this thread: the others belong to the forward pass
        try:
            for item in source:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = box.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(n_threads)


class _Labelled(Dataset):
    """Item i of a data set as the index records it; faults are values, to stay one sentence across processes."""

    def __init__(self, dataset: Any, protocol: Any, patch_size: int, image_size: Sequence[int], whole: bool) -> None:
        self.dataset, self.whole = dataset, whole
        self.protocol = plain(protocol)
        self.grid_facts = {"patch_size": patch_size, "image_size": tuple(image_size)}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            scene = self.dataset[i]
        except UserError as error:  # a data set raises it for the one item asked for
            reason = getattr(error, "reason", str(error))
            return {"fault": (getattr(error, "key", f"item {i}"), reason), "hint": SKIP_HINT}
        size = tuple(scene.image.shape[-2:])
        try:
            geometry = plan_geometry(size, geometry=self.protocol["geometry"], **self.grid_facts)
            item = self._labels(scene, geometry)
        except DroppedImage as error:
            return {"dropped": (scene.key, str(error))}
        except UserError as error:
            return {"fault": (scene.key, str(error)), "hint": ""}
        return item | {  # numpy: a tensor from a worker process would hold a file descriptor for as long as it lives
            "key": scene.key,
            "number": np.int64(i),
            "content": np.frombuffer(content_id(scene.image), np.uint8),
            "grids": np.array(geometry.grid, np.int16),
        }

    def _labels(self, scene: Any, geometry: Geometry) -> dict[str, Any]:
        codes = "object_code" in scene.labels
        if codes and not self.whole:
            return {"fatal": "output_mode=patches needs pixel labels, these images have codes: use all or cls"}
        if self.whole and len(geometry.starts) > 1:
            return {
                "fatal": f"{scene.key} takes {len(geometry.starts)} windows, the output modes of whole images need "
                "one; set protocol.geometry.kind=stretch" + ("" if codes else " or model.output_mode=patches")
            }
        if codes:
            return {f"label.{name}": value.numpy() for name, value in scene.labels.items()}
        found = label_patches(scene.labels, geometry, labels=self.protocol["labels"])
        identity = found["identity"]
        if self.whole:
            n_windows, h, w = identity.label.shape
            position = torch.cartesian_prod(torch.arange(n_windows), torch.arange(h), torch.arange(w))  # [N, 3] raster
            valid = (owned_patches(geometry) & identity.valid).flatten()
            item = {}
        else:
            selection = self.protocol["selection"]
            seed = hashlib.blake2b(f"{selection['seed']}|{scene.key}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            position, valid = select_patches(identity, geometry, selection=selection, generator=generator)
            item = {"position": position.numpy().astype(np.int16)}
        at = tuple(position.clamp(min=0).T)
        # Where patches lie in the image, in patches: distances then mean the same within and across windows.
        starts = torch.tensor(geometry.starts, dtype=torch.float32)[at[0]] / geometry.patch
        place = (starts + position[:, 1:]).numpy()
        item |= {"label.valid": valid.numpy(), "label.purity": identity.purity[at].numpy(), "label.place": place}
        return item | {f"label.{name}": patch.label[at].numpy().astype(np.int32) for name, patch in found.items()}


def _make(items: _Labelled, split: str, workers: int, directory: Path, facts: dict, beat: Callable[[], None]) -> Index:
    columns: dict[str, list] = {}
    dropped, skipped = [], []
    loader = load_items(items, range(len(items)), workers)
    for item in tqdm(loader, desc=f"{split}: labels", total=len(items), unit="img", mininterval=0.5, leave=False):
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
            for name, value in item.items():
                columns.setdefault(name, []).append(value)
    keys = columns.pop("key", [])
    if not keys:
        why = Counter(reason for _, reason in dropped + skipped).most_common(3)
        said = "; ".join(f"{n} × {reason}" for reason, n in why) or "the data set is empty"
        raise UserError(f"no usable image among the {len(items)} of split {split}: {said}")
    if (
        items.whole and len({value.shape for value in columns.get("label.valid", [])}) > 1
    ):  # whole images of several shapes: pooled tokens only
        columns = {name: [v[:1] for v in column] if name.startswith("label.") else column for name, column in columns.items()}
    if "position" in columns:  # where every patch of a long image is kept there are more of them
        n_tokens = max(map(len, columns["position"]))
        for name in [name for name in columns if name == "position" or name.startswith("label.")]:
            columns[name] = [np.pad(v, [(0, n_tokens - len(v))] + [(0, 0)] * (v.ndim - 1)) for v in columns[name]]
    tensors = {name: torch.from_numpy(np.ascontiguousarray(np.stack(column))) for name, column in columns.items()}
    data = save(tensors)
    manifest = {"facts": facts, "digest": digest(facts), "images": len(keys), "dropped": dropped, "skipped": skipped}
    manifest = plain(manifest | {"sha256": hashlib.sha256(data).hexdigest(), "keys": keys})
    write_atomically(directory / "index.safetensors", data)
    write_atomically(directory / "manifest.json", json.dumps(manifest, indent=1))  # last: it makes the index count
    return Index(keys, tensors, manifest)


def _read(directory: Path, facts: dict, repair: bool) -> Index | None:
    manifest, file = read_manifest(directory / "manifest.json", facts, repair), directory / "index.safetensors"
    if manifest is None or not file.exists():
        return None
    try:
        if hashlib.sha256(file.read_bytes()).hexdigest() == manifest["sha256"]:
            return Index(manifest["keys"], load_file(file), manifest)
    except (SafetensorError, KeyError):
        pass
    if repair:
        return None
    raise UserError(f"{file} is damaged (its checksum differs), delete {directory} or set cache.repair=true to make it again")
