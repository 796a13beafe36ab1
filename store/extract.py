"""Extraction: one forward pass writes every layer of the kept tokens; what is on disk already is only opened."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones.contract import BackboneFacts, Layer
from backbones.load import load_backbone
from errors import UserError
from files import digest, holder, lock, plain, safe_name, wait
from machine import choose_device, job, rank, resolve_dtype
from runs.progress import count
from store.chunks import Chunk, WindowItems, cut_chunks, order_of_images, stored_chunks
from store.index import Index
from store.listing import hold
from store.reading import ImageItems, load_items, read_ahead
from store.shards import TokenStore
from store.writing import ShardWriter

FORMAT = 2  # raise it when the meaning of a cached number changes: older directories are then left alone
# What is stored for each output mode; class token and spatial mean are stored together, as two tokens of one image.
STORED = {"patches": "patches", "all": "all", "cls": "pooled", "mean_spatial": "pooled", "cls_mean": "pooled"}


class Extraction(NamedTuple):
    """The tokens that are wanted of one split.

    cfg: sections `model`, `protocol`, `cache` and `device` of the configuration.
    dataset: the items of the split; split: its name; index: its usable images and their kept patches.
    facts: of the backbone; layers: those wanted; stored: what is kept of an image, a value of STORED.
    """

    cfg: Any
    dataset: Any
    split: str
    index: Index
    facts: BackboneFacts
    layers: list[Layer]
    stored: str

    def store(self) -> TokenStore:
        """The store of these tokens, named by all that decides its bytes, but for the layers."""
        cfg, index, facts = self.cfg, self.index, self.facts
        made_from = {
            "format": FORMAT,
            "backbone": facts.as_dict(),
            "norm": bool(cfg.model.norm),
            "compute_dtype": str(resolve_dtype(cfg.model.dtype, choose_device(cfg.device))).removeprefix("torch."),
            "geometry": cfg.protocol.geometry,
            "tokens": self.stored,
            "dtype": cfg.cache.dtype,
            "images": len(index.keys),
            "content": _digest_tensor(index.tensors["content"]),
        }
        if self.stored == "patches":
            n_tokens = index.tensors["position"].shape[1]
            made_from["positions"] = _digest_tensor(index.tensors["position"])
        elif self.stored == "all":
            n_tokens = int(index.grids[0].prod()) + facts.has_class_token
        else:
            n_tokens = 1 + facts.has_class_token
        made_from = plain(made_from)
        name = safe_name(f"{facts.name}-{type(self.dataset).__name__}-{self.split}-{digest(made_from)}")
        return TokenStore(Path(cfg.cache.dir) / "tokens" / name, made_from, len(index.keys), n_tokens, facts.dim, cfg.cache)

    def store_to_pool(self) -> TokenStore | None:
        """The store that holds all tokens of these images where pooled ones are wanted, if it is complete."""
        if self.stored != "pooled" or not self.index.one_grid:
            return None
        all_tokens = self._replace(stored="all").store()
        return all_tokens if all_tokens.read() and not all_tokens.missing(self.layers) else None


def _digest_tensor(x: Tensor) -> str:
    return f"{list(x.shape)} {hashlib.blake2b(x.contiguous().numpy(), digest_size=16).hexdigest()}"


class Opened(NamedTuple):
    """A complete store, the bytes this process wrote to make it so, and the images it ran the backbone on."""

    store: TokenStore
    bytes_written: int = 0
    images_extracted: int = 0


def open_store(wanted: Extraction, say: Callable[[str], None]) -> Opened:
    """The store of an extraction, complete: shards that lack a layer are extracted first.

    The ranks of one launch share the shards. Rank 0 holds the directory's lock, so that no other launch enters; every
    rank holds a lock file of its own and touches it while it works, by which the others see that it lives.

    Raises:
        UserError: too large for `cache.disk_gb` or the disk; held by another process; damaged; see also `ShardWriter`.
    """
    store, cache = wanted.store(), wanted.cfg.cache
    store.use = hold(store.directory)
    exists = store.read()
    # Tokens that fit in memory are read as a whole anyway, so checking all their bytes costs little.
    store.verify = store.verify or store.layer_bytes * len(wanted.layers) <= cache.ram_gb * 1e9
    lacking = store.missing(wanted.layers)
    if exists and not lacking:
        return Opened(store)
    _check_room(wanted, store, lacking)
    (mine, world) = rank()
    locks = [store.directory / (f"lock-{number}" if number else "lock") for number in range(world)]
    if mine:
        _wait_for_first_rank(wanted, store, locks[0])
    with lock(locks[mine], cache.lock_timeout, say, job()) as beat:
        if not store.read():
            store.create()
        todo = {number: layers for number, layers in store.missing(wanted.layers).items() if number % world == mine}
        n_bytes = sum(store.file_bytes(number) * len(layers) for number, layers in todo.items())
        n_images = _fill(wanted, store, todo, say, beat) if todo else 0
        complete = lambda: (beat() or not store.missing(wanted.layers, verify=False)) or None
        others = [path for path in locks if path != locks[mine]]
        wait(complete, others, cache.lock_timeout, "the other ranks, which write their shards")
        store.use = store.use or hold(store.directory)
    return Opened(store, n_bytes, n_images)


def _wait_for_first_rank(wanted: Extraction, store: TokenStore, first_lock: Path) -> None:
    """Wait until rank 0 of this launch holds the directory, or has completed it already."""

    def is_open() -> bool | None:
        if not store.read():
            return None
        return holder(first_lock).get("job") == job() or not store.missing(wanted.layers, verify=False) or None

    wait(is_open, [first_lock], wanted.cfg.cache.lock_timeout, f"rank 0, which opens {store.directory}")


def _check_room(wanted: Extraction, store: TokenStore, lacking: Mapping[int, list[Layer]]) -> None:
    """Refuse what is too large for the budget or the disk, before anything is written."""
    cache, split, layers = wanted.cfg.cache, wanted.split, wanted.layers
    total = sum(map(store.file_bytes, range(store.n_shards))) * len(layers)
    if total > cache.disk_gb * 1e9:
        raise UserError(
            f"split {split} takes {total / 1e9:.4g} GB ({store.n_images} images × {len(layers)} layers × "
            f"{store.n_tokens} tokens × {store.dim} × {store.itemsize} bytes) and cache.disk_gb is {cache.disk_gb}; "
            "raise it, or take fewer model.layers, protocol.selection.patches or images, or a smaller cache.dtype"
        )
    n_bytes = sum(store.file_bytes(number) * len(layers) for number, layers in lacking.items())
    free = shutil.disk_usage(cache.dir).free
    if n_bytes > free:
        raise UserError(
            f"split {split} needs {n_bytes / 1e9:.4g} GB and {cache.dir} has {free / 1e9:.4g} GB free; "
            "free some space or set cache.dir"
        )


def _fill(
    wanted: Extraction,
    store: TokenStore,
    todo: Mapping[int, list[Layer]],
    say: Callable[[str], None],
    beat: Callable[[], None],
) -> int:
    """Write the layers that shards lack, `todo`, and count the images the backbone ran on."""
    all_tokens = wanted.store_to_pool()
    n_images = sum(stop - start for start, stop in map(store.span, todo))
    n_bytes = sum(store.file_bytes(number) * len(layers) for number, layers in todo.items())
    say(
        f"{wanted.split}: {'extracting' if all_tokens is None else 'pooling'} {n_images} of {store.n_images} images × "
        f"{len(wanted.layers)} layers × {store.n_tokens} tokens × {store.dim} {wanted.cfg.cache.dtype}: "
        f"{n_bytes / 1e9:.3f} GB"
    )
    if all_tokens is None:
        chunks = _forward_chunks(wanted, store, todo, say)
    else:
        chunks = stored_chunks(all_tokens, store, todo, wanted.facts.has_class_token)
    with (
        ShardWriter(store, wanted.index.keys, wanted.facts.has_class_token) as writer,
        count(f"{wanted.split}: tokens", n_images, "image") as step,
        torch.inference_mode(),
        closing(chunks),
    ):
        for chunk in chunks:
            writer.add(chunk)
            step.update(chunk.images)
            beat()
        writer.wait(beat)
    return n_images if all_tokens is None else 0


def _forward_chunks(
    wanted: Extraction, store: TokenStore, todo: Mapping[int, list[Layer]], say: Callable[[str], None]
) -> Generator[Chunk]:
    """Decode, cut and batch images ahead in a thread, run the backbone here."""
    cfg, index = wanted.cfg, wanted.index
    device = choose_device(cfg.device)
    backbone = load_backbone(cfg.model, device, say)
    orders = order_of_images(store, todo, index)
    numbers = index.tensors["number"][[m for images in orders.values() for m in images]].tolist()
    images = ImageItems(wanted.dataset, index.manifest["facts"], cfg.cache.ram_gb)
    items = WindowItems(images, plain(cfg.protocol.geometry), wanted.facts)
    loader = iter(load_items(items, numbers, cfg.cache.workers))  # its processes start here, before any thread does

    def batches() -> Generator[Chunk]:
        for chunk in cut_chunks(loader, orders, todo, index, store, cfg.cache.batch_windows):
            yield chunk._replace(windows=chunk.windows.pin_memory()) if device.type == "cuda" else chunk

    for chunk in read_ahead(batches()):
        with torch.inference_mode():
            tokens = backbone(chunk.windows.to(device, non_blocking=True), chunk.layers)
        yield chunk._replace(windows=None, tokens=tokens)
