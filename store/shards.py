"""Shards of tokens on disk: one safetensors file per layer and shard, memory maps, checksums.

A shard of tokens is one safetensors file per layer and a JSON record with their checksums, written last: a shard
without its record does not count. Whose bytes were compared with their checksum is remembered by size, time of change and
inode, so that a cache of many gigabytes is read through once and not at every start (`checked`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from files import digest, read_sealed, sealed, write_atomically

DTYPES = {"float16": (torch.float16, "F16"), "bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}
SHARD_BYTES = 16 << 20  # of one layer: shards of wide images hold fewer than cache.shard_images, so that RAM stays flat
MAP_BYTES = 1 << 30  # of the files that are memory-mapped at a time


class StackedTokens:
    """Tokens of one split, [L, M, T, D], read by image: from memory, or memory-mapped from the cache if too large."""

    def __init__(self, layers: Sequence[int | str], shape: tuple[int, int, int, int]) -> None:
        self.layers = list(layers)
        self.shape = tuple(shape)  # (L, M, T, D)
        self.nbytes = 0
        self.made_from = ""  # all that decides these numbers, as text; empty where it is not known
        self._held: Tensor | None = None
        self._store: TokenStore | None = None
        self._part = slice(None)
        self._preload = False

    @classmethod
    def from_tensor(cls, x: Tensor, layers: Sequence[int | str]) -> StackedTokens:
        """Wrap tokens [L, M, T, D] that are in memory already."""
        self = cls(layers, tuple(x.shape))
        self._held, self.nbytes = x, x.numel() * x.element_size()
        return self

    @classmethod
    def from_store(cls, store: TokenStore, layers: Sequence[int | str], mode: str, ram_gb: float) -> StackedTokens:
        """Read a complete store as one output mode; held in memory from the first read on if it fits `ram_gb`."""
        kept, dim = store.n_tokens, store.dim
        if mode in ("cls", "mean_spatial"):
            kept = 1
        elif mode == "cls_mean":  # concat(class token, spatial mean): two stored tokens side by side are one of width 2D
            kept, dim = 1, 2 * dim
        self = cls(layers, (len(layers), store.n_images, kept, dim))
        self.made_from = f"{store.digest} {mode}"
        self._part = {"cls": slice(0, 1), "mean_spatial": slice(-1, None)}.get(mode, slice(None))
        self._store, self.nbytes = store, int(np.prod(self.shape)) * store.itemsize
        self._preload = self.nbytes <= ram_gb * 1e9
        return self

    def to(self, device: torch.device | str) -> StackedTokens:
        """The same tokens held in the memory of a device, where they must fit; `gather` then answers there."""
        held = self._read_all() if self._held is None else self._held  # [L, M, T, D]
        return StackedTokens.from_tensor(held.to(device), self.layers)

    def preload(self) -> None:
        """Read what the first `gather` would read into memory: before a fork, so that all copies share it."""
        if self._preload:
            self._held = self._read_all()

    def gather(self, images: Tensor | Sequence[int], layers: Sequence[int] | None = None) -> Tensor:
        """Tokens of some images at some layers (indices into `layers`; all if None): [L, B, T, D] float32."""
        images = torch.as_tensor(images, dtype=torch.long)
        chosen = range(self.shape[0]) if layers is None else list(layers)
        self.preload()
        if self._held is not None:
            images, exact = images.to(self._held.device), self._held.dtype == torch.float32
            out = torch.empty(len(chosen), len(images), *self.shape[2:], device=images.device)  # [l, B, T, D]
            stored = torch.empty(0 if exact else out.shape[1:], dtype=self._held.dtype, device=images.device)
            for row, layer in enumerate(chosen):  # one buffer for all layers: fresh memory costs more than the copy
                torch.index_select(self._held[layer], 0, images, out=out[row] if exact else stored)
                if not exact:
                    out[row] = stored
            return out
        out = torch.empty(len(chosen), len(images), *self.shape[2:])
        shard = images // self._store.shard_images
        for number in shard.unique().tolist():
            rows = (shard == number).nonzero().flatten()
            within = images[rows] - number * self._store.shard_images
            for row, layer in enumerate(chosen):
                out[row].index_copy_(0, rows, self._shard(layer, number).index_select(0, within).float())
        return out

    def _shard(self, layer: int, number: int) -> Tensor:
        stored = self._store.open(self.layers[layer], number)[:, self._part]  # [n, T', D'] as on disk
        return stored.reshape(len(stored), *self.shape[2:])

    def _read_all(self) -> Tensor:
        """All tokens [L, M, T, D] in the dtype of the store."""
        self._preload = False
        held = torch.empty(self.shape, dtype=self._store.dtype)
        for number in range(self._store.n_shards):
            start, stop = self._store.span(number)
            for layer in range(self.shape[0]):
                held[layer, start:stop] = self._shard(layer, number)
        self._store.close()
        return held


class TokenStore:
    """A directory of tokens: `layer_05/00012.safetensors` by layer and shard, `shards/00012.json` once complete.

    `checked/00012.json` says which of these files were seen whole; it may be lost, they are then read again.
    """

    def __init__(self, directory: Path, facts: dict[str, Any], n_images: int, n_tokens: int, dim: int, cache: Any) -> None:
        self.directory, self.facts, self.digest, self.cache = directory, facts, digest(facts), cache
        self.n_images, self.n_tokens, self.dim = n_images, n_tokens, dim
        self.dtype, self.code = DTYPES[facts["dtype"]]
        self.itemsize, self.verify = self.dtype.itemsize, bool(cache.verify)
        self.layer_bytes = n_images * n_tokens * dim * self.itemsize  # of the numbers, without file headers
        widest = SHARD_BYTES // (n_tokens * dim * self.itemsize)
        self.shard_images = max(1, min(int(cache.shard_images), widest))
        self._maps: OrderedDict[Path, Tensor] = OrderedDict()
        self.use: IO[str] | None = None  # held open while the tokens are in use (`store.listing.hold`)

    def read(self) -> bool:
        """Take over the shard size of the directory; False if nothing is there yet."""
        path = self.directory / "manifest.json"
        manifest = read_manifest(path, self.facts, bool(self.cache.repair))
        if manifest is None:
            return False
        shard_images = manifest.get("shard_images")
        if type(shard_images) is int and shard_images >= 1:
            self.shard_images = shard_images
        differing = [key for key, value in self.manifest().items() if manifest.get(key) != value]
        if differing and not self.cache.repair:
            raise UserError(f"{path} is damaged ({differing[0]} does not fit the rest), {_remedy(path)}")
        return not differing

    def create(self) -> None:
        """Write the manifest of a new directory."""
        write_atomically(self.directory / "manifest.json", sealed(self.manifest()))

    def manifest(self) -> dict[str, Any]:
        """What the manifest holds: all that decides the content, and how it is cut into shards."""
        sizes = {"images": self.n_images, "tokens_per_image": self.n_tokens, "dim": self.dim}
        return {"digest": self.digest, "facts": self.facts, **sizes, "shard_images": self.shard_images, "shards": self.n_shards}

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n_images // self.shard_images)

    def span(self, number: int) -> tuple[int, int]:
        """First image of a shard and the one after its last."""
        return number * self.shard_images, min((number + 1) * self.shard_images, self.n_images)

    def file(self, layer: int | str, number: int) -> Path:
        """The tokens of one layer of a shard."""
        name = layer if isinstance(layer, str) else f"{layer:02d}"
        return self.directory / f"layer_{name}" / f"{number:05d}.safetensors"

    def record(self, number: int) -> Path:
        """The JSON record that makes a shard count."""
        return self.directory / "shards" / f"{number:05d}.json"

    def head(self, number: int) -> bytes:
        """The bytes before the numbers of a safetensors file with one tensor, `tokens` [n, T, D]."""
        start, stop = self.span(number)
        size = (stop - start) * self.n_tokens * self.dim * self.itemsize
        entry = {"dtype": self.code, "shape": [stop - start, self.n_tokens, self.dim], "data_offsets": [0, size]}
        text = json.dumps({"tokens": entry}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def file_bytes(self, number: int) -> int:
        """Size in bytes of a shard's file of one layer."""
        start, stop = self.span(number)
        return len(self.head(number)) + (stop - start) * self.n_tokens * self.dim * self.itemsize

    def entries(self, number: int) -> dict[str, Any]:
        """Size and checksum of the files of a shard, by layer; {} if it was never completed.

        Raises:
            UserError: the record is damaged or of another store, unless `cache.repair`.
        """
        path = self.record(number)
        try:
            record = read_sealed(path, "delete it or set cache.repair=true to extract it again")
            layers = record.get("layers")
            described = {"store": self.digest, "images": list(self.span(number)), "layers": layers}
            complete = isinstance(layers, dict) and all(_describes(layers[key], self.file_bytes(number)) for key in layers)
            if record != described or not complete:
                raise UserError(f"{path} is of another store or shard, delete it or set cache.repair=true to extract it again")
            return layers
        except FileNotFoundError:
            return {}
        except UserError:
            if self.cache.repair:
                return {}
            raise

    def missing(self, layers: Sequence[int | str], verify: bool = True) -> dict[int, list[int | str]]:
        """Shards that lack layers, with those layers.

        Args:
            verify: compare the bytes of every file with its checksum, unless that was done before and the file is the same
                since (`self.verify`: even then). False: existence, sizes and headers only.

        Raises:
            UserError: a damaged file, unless `cache.repair`, which counts it as missing.
        """
        lacking: dict[int, list[int | str]] = {}
        for number in range(self.n_shards):
            entries, head, checked = self.entries(number), self.head(number), self._checked(number) if verify else {}
            seen = {}
            for layer in layers:
                file, entry = self.file(layer, number), entries.get(str(layer))
                if entry is None or not file.exists():
                    lacking.setdefault(number, []).append(layer)
                    continue
                state = _state(file)  # before it is read
                is_known = not self.verify and checked.get(str(layer)) == state
                fault = _fault(file, head, self.file_bytes(number), entry, verify and not is_known)
                if fault and not self.cache.repair:
                    raise UserError(f"{file} is damaged ({fault}), delete it or set cache.repair=true to extract it again")
                if fault:
                    lacking.setdefault(number, []).append(layer)
                elif verify:
                    seen[str(layer)] = state
            self._remember(number, checked, seen)
        return lacking

    def _checked(self, number: int) -> dict[str, Any]:
        """Size, time of change and inode of the files of a shard that had their checksum when they were last read, by layer."""
        try:
            return read_sealed(self._checked_file(number), "")
        except (FileNotFoundError, UserError):
            return {}

    def _checked_file(self, number: int) -> Path:
        return self.directory / "checked" / f"{number:05d}.json"

    def _remember(self, number: int, checked: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
        """Note which files of a shard have their checksum; where nothing may be written they are read again next time."""
        if any(checked.get(layer) != state for layer, state in seen.items()):
            with contextlib.suppress(UserError):
                write_atomically(self._checked_file(number), sealed({**checked, **seen}))

    def open(self, layer: int | str, number: int) -> Tensor:
        """The tokens [n, T, D] of one file, memory-mapped; the least recently used maps are let go."""
        file = self.file(layer, number)
        if file not in self._maps:
            start, stop = self.span(number)
            with open(file, "rb") as handle:
                view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)  # private: torch wants writable memory
            flat = torch.frombuffer(view, dtype=self.dtype, offset=len(self.head(number)))
            self._maps[file] = flat.view(stop - start, self.n_tokens, self.dim)
            if len(self._maps) > max(1, min(MAP_BYTES // self.file_bytes(0), 256)):  # each holds a file descriptor too
                self._maps.popitem(last=False)
        self._maps.move_to_end(file)
        return self._maps[file]

    def close(self) -> None:
        """Let every map go."""
        self._maps.clear()

    def write(self, number: int, layers: Sequence[int | str], values: Tensor, pool: ThreadPoolExecutor) -> None:
        """Publish a shard: values [l, n, T, D] of some layers, files first, then the record that makes them count."""

        def one(layer: int | str, value: Tensor) -> dict[str, Any]:
            parts = [self.head(number), value.contiguous().view(torch.uint8).numpy()]
            digest = hashlib.sha256(parts[0])
            digest.update(parts[1])
            write_atomically(self.file(layer, number), *parts)
            return {"bytes": self.file_bytes(number), "sha256": digest.hexdigest()}

        written = dict(zip(map(str, layers), pool.map(one, layers, values), strict=True))
        entries = dict(sorted((self.entries(number) | written).items()))
        record = {"store": self.digest, "images": list(self.span(number)), "layers": entries}
        write_atomically(self.record(number), sealed(record))
        self._remember(number, self._checked(number), {str(layer): _state(self.file(layer, number)) for layer in layers})


def _state(file: Path) -> list[int]:
    """What changes when a file is written again, moved or copied: size, time of change in ns, inode."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _describes(entry: Any, n_bytes: int) -> bool:
    """Whether an entry of a record has the form that describes a file of this size."""
    return isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} and entry["bytes"] == n_bytes


def _fault(file: Path, head: bytes, size: int, entry: Mapping[str, Any], verify: bool) -> str:
    """What is wrong with a file of a store, in words; empty if nothing is."""
    if file.stat().st_size != size:
        return f"{file.stat().st_size} bytes instead of {size}"
    with open(file, "rb") as handle:
        if handle.read(len(head)) != head:
            return "its header is not the one that was written"
        if verify:
            handle.seek(0)
            if hashlib.file_digest(handle, "sha256").hexdigest() != entry["sha256"]:
                return "its checksum differs"
    return ""


def read_manifest(path: Path, facts: Mapping[str, Any], repair: bool) -> dict[str, Any] | None:
    """A directory's manifest, None if there is none (or a damaged one and `repair`).

    Raises:
        UserError: damaged, or made from other facts than these.
    """
    try:
        manifest = read_sealed(path, _remedy(path))
    except FileNotFoundError:
        return None
    except UserError:
        if repair:
            return None
        raise
    recorded = manifest.get("facts")
    if recorded != facts:
        recorded = recorded if isinstance(recorded, dict) else {}
        other = sorted(key for key in {*recorded, *facts} if recorded.get(key) != facts.get(key))
        raise UserError(
            f"{path.parent} holds another configuration ({', '.join(other)} differ), delete it or set another cache.dir"
        )
    return manifest


def _remedy(manifest: Path) -> str:
    return f"delete {manifest.parent} or set cache.repair=true to build it again"
