"""Extraction: one forward pass writes every layer of the kept tokens; what is there already is opened."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from backbones.contract import BackboneFacts, Tokens
from backbones.load import load_backbone
from errors import UserError
from files import digest, holder, lock, plain, safe_name, wait
from machine import choose_device, job, rank, resolve_dtype
from patches.geometry import plan_geometry
from patches.windows import cut_windows
from store.index import Index, content_id, load_items, read_ahead
from store.shards import StackedTokens, TokenStore

FORMAT = 1  # raise it when the meaning of a cached number changes: older directories are then left alone
# What is stored for each output mode; class token and spatial mean are stored together, as two tokens of one image.
STORED = {"patches": "patches", "all": "all", "cls": "pooled", "mean_spatial": "pooled", "cls_mean": "pooled"}
WRITERS = 4  # threads that hash and write the layer files of a shard


def describe_store(cfg: Any, dataset: Any, split: str, index: Index, facts: BackboneFacts, stored: str) -> TokenStore:
    """The store of a split, named by all that decides its bytes, but for the layers."""
    known = {
        "format": FORMAT,
        "backbone": facts.as_dict(),
        "norm": bool(cfg.model.norm),
        "compute_dtype": str(resolve_dtype(cfg.model.dtype, choose_device(cfg.device))).removeprefix("torch."),
        "geometry": cfg.protocol.geometry,
        "tokens": stored,
        "dtype": cfg.cache.dtype,
        "images": len(index.keys),
        "content": _digest_tensor(index.tensors["content"]),
    }
    if stored == "patches":
        n_tokens = index.tensors["position"].shape[1]
        known["positions"] = _digest_tensor(index.tensors["position"])
    elif stored == "all":
        n_tokens = int(index.grids[0].prod()) + facts.has_class_token
    else:
        n_tokens = 1 + facts.has_class_token
    known = plain(known)
    name = safe_name(f"{facts.name}-{type(dataset).__name__}-{split}-{digest(known)}")
    return TokenStore(Path(cfg.cache.dir) / "tokens" / name, known, len(index.keys), n_tokens, facts.dim, cfg.cache)


def _digest_tensor(x: Tensor) -> str:
    return f"{list(x.shape)} {hashlib.blake2b(x.contiguous().numpy(), digest_size=16).hexdigest()}"


def open_store(
    cfg: Any, dataset: Any, split: str, index: Index, facts: BackboneFacts, layers: list, stored: str, say: Callable
) -> tuple[TokenStore, int, int]:
    """A store with all layers, the bytes this process wrote and the images it ran the backbone on to make it so."""
    store = describe_store(cfg, dataset, split, index, facts, stored)
    known = store.read()
    store.verify = store.verify or store.layer_bytes * len(layers) <= cfg.cache.ram_gb * 1e9  # read as a whole anyway
    lacking = store.missing(layers)
    if known and not lacking:
        return store, 0, 0
    _check_room(cfg, split, store, layers, lacking)
    (mine, world), timeout = rank(), cfg.cache.lock_timeout
    locks = [store.directory / (f"lock-{other}" if other else "lock") for other in range(world)]
    if mine:  # rank 0 of this launch holds the directory, or has completed it already
        opened = lambda: (store.read() and (holder(locks[0]).get("job") == job() or not store.missing(layers, False))) or None
        wait(opened, locks[:1], timeout, f"rank 0, which opens {store.directory}")
    with lock(locks[mine], timeout, say, job()) as beat:
        if not store.read():
            store.create()
        todo = {number: lack for number, lack in store.missing(layers).items() if number % world == mine}
        n_bytes = sum(store.file_bytes(number) * len(lack) for number, lack in todo.items())
        n_images = sum(stop - start for start, stop in map(store.span, todo))
        if todo:
            poolable = stored == "pooled" and index.one_grid
            whole = describe_store(cfg, dataset, split, index, facts, "all" if poolable else stored)
            derived = poolable and whole.read() and not whole.missing(layers)
            say(
                f"{split}: {'pooling' if derived else 'extracting'} {n_images} of {store.n_images} images × "
                f"{len(layers)} layers × {store.n_tokens} tokens × {store.dim} {cfg.cache.dtype}: "
                f"{n_bytes / 1e9:.3f} GB to {store.directory}"
            )
            if derived:
                n_images = 0
                chunks = _stored_chunks(whole, store, todo, facts)
            else:
                chunks = _forward_chunks(cfg, dataset, index, facts, store, todo, say)
            _write_shards(chunks, store, todo, facts, index.keys, split, beat)
        complete = lambda: (beat() or not store.missing(layers, False)) or None
        others = [path for path in locks if path != locks[mine]]
        wait(complete, others, timeout, "the other ranks, which write their shards")
    return store, n_bytes, n_images


def _check_room(cfg: Any, split: str, store: TokenStore, layers: list, lacking: Mapping[int, list]) -> None:
    """Refuse what is too large for the budget or the disk, before anything is made."""
    total = sum(map(store.file_bytes, range(store.n_shards))) * len(layers)
    if total > cfg.cache.disk_gb * 1e9:
        raise UserError(
            f"split {split} takes {total / 1e9:.4g} GB ({store.n_images} images × {len(layers)} layers × "
            f"{store.n_tokens} tokens × {store.dim} × {store.itemsize} bytes) and cache.disk_gb is {cfg.cache.disk_gb}; "
            "raise it, or take fewer model.layers, protocol.selection.patches or images, or a smaller cache.dtype"
        )
    n_bytes = sum(store.file_bytes(number) * len(lack) for number, lack in lacking.items())
    free = shutil.disk_usage(cfg.cache.dir).free
    if n_bytes > free:
        raise UserError(
            f"split {split} needs {n_bytes / 1e9:.4g} GB and {cfg.cache.dir} has {free / 1e9:.4g} GB free; "
            "free some space or set cache.dir"
        )


class _Chunk(NamedTuple):
    """Tokens of some layers on their way to a shard.

    number: the shard; layers: those it lacks; last: nothing more comes for it; images: how many this chunk finishes.
    rows: [k] int64 rows of the shard, image · T + token.
    source: [k, 2] int64 window in the chunk and patch, where patches are picked.
    windows: [b, 3, H, W] float32 normalised pixels; replaced by tokens, one entry per layer.
    """

    number: int
    layers: list[int | str]
    last: bool
    images: int
    rows: Tensor
    source: Tensor | None
    windows: Tensor | None
    tokens: list[Tokens] | None


def _forward_chunks(
    cfg: Any, dataset: Any, index: Index, facts: BackboneFacts, store: TokenStore, todo: Mapping[int, list], say: Callable
) -> Generator[_Chunk]:
    """Decode, cut and batch ahead in a thread, run the backbone here."""
    device = choose_device(cfg.device)
    backbone = load_backbone(cfg.model, device, say)
    grids = index.grids.tolist()
    # windows of equal shape adjoin, so that batches are full
    orders = {number: sorted(range(*store.span(number)), key=lambda m: (grids[m], m)) for number in todo}
    numbers = index.tensors["number"][[m for order in orders.values() for m in order]].tolist()
    items = _Windows(dataset, plain(cfg.protocol.geometry), facts)
    loader = iter(load_items(items, numbers, cfg.cache.workers))  # its processes start here, before any thread does
    position = index.tensors.get("position")
    batches = _batches(loader, orders, todo, index, position, store, cfg.cache.batch_windows, pin=device.type == "cuda")
    for chunk in read_ahead(batches):
        with torch.inference_mode():
            tokens = backbone(chunk.windows.to(device, non_blocking=True), chunk.layers)
        yield chunk._replace(windows=None, tokens=tokens)


class _Windows(Dataset):
    """Item i of a data set as normalised windows [n, 3, H, W] float32 with its content digest, or what is wrong."""

    def __init__(self, dataset: Any, geometry: dict[str, Any], facts: BackboneFacts) -> None:
        self.dataset, self.geometry, self.facts = dataset, geometry, facts

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, bytes] | str:
        facts = self.facts
        try:
            scene = self.dataset[i]
            geometry = plan_geometry(
                tuple(scene.image.shape[-2:]),
                geometry=self.geometry,
                patch_size=facts.patch_size,
                image_size=facts.image_size,
            )
            windows = cut_windows(
                scene.image,
                geometry,
                mean=facts.mean,
                std=facts.std,
                interpolation=facts.interpolation,
                antialias=self.geometry["antialias"],
            )
        except UserError as error:
            return f"{getattr(error, 'key', f'item {i}')}: {getattr(error, 'reason', error)}"
        return windows, content_id(scene.image)


def _batches(
    loader: Iterator,
    orders: Mapping[int, list[int]],
    todo: Mapping[int, list],
    index: Index,
    position: Tensor | None,
    store: TokenStore,
    batch_size: int,
    pin: bool,
) -> Iterator[_Chunk]:
    """Windows of equal shape, at most `batch_size`, never across shards: batches are the same after a resume."""
    content = index.tensors["content"]
    for number, order in orders.items():
        start = store.span(number)[0]
        pending: list[tuple[int, int, Tensor]] = []  # (image in shard, window, pixels)
        left = len(order)
        for at, m in enumerate(order):
            item = next(loader)
            if isinstance(item, str):
                raise UserError(f"{item}; it was readable when the index was made, mend it")
            windows, found = item
            if found != content[m].numpy().tobytes():
                raise UserError(f"{index.keys[m]}: the image changed while it was being read, repeat the command")
            pending += [(m - start, number_of, pixels) for number_of, pixels in enumerate(windows)]
            ends = at + 1 == len(order) or index.grids[order[at + 1]].tolist() != index.grids[m].tolist()
            while len(pending) >= batch_size or (ends and pending):
                taken, pending = pending[:batch_size], pending[batch_size:]
                of_image = torch.tensor([image for image, _, _ in taken])
                finished = len(set(of_image.tolist()) - {image for image, _, _ in pending})
                left -= finished
                rows = of_image[:, None] * store.n_tokens + torch.arange(store.n_tokens)  # [b, T]
                source = None
                if position is not None:
                    where = position[start + of_image].long()  # [b, T, 3]
                    hit = where[..., 0] == torch.tensor([window for _, window, _ in taken])[:, None]
                    window = hit.nonzero()[:, 0]
                    patch = where[..., 1] * int(index.grids[m][1]) + where[..., 2]
                    rows, source = rows[hit], torch.stack([window, patch[hit]], dim=1)
                batch = torch.stack([pixels for _, _, pixels in taken])
                batch = batch.pin_memory() if pin else batch
                last = left == 0 and not pending
                yield _Chunk(number, todo[number], last, finished, rows.flatten(), source, batch, None)


def _stored_chunks(whole: TokenStore, store: TokenStore, todo: Mapping[int, list], facts: BackboneFacts) -> Generator[_Chunk]:
    """The tokens of whole images read back from their store, one image shard of `store` in pieces that fit memory."""
    prefix = int(facts.has_class_token)
    for number, layers in todo.items():
        tokens = StackedTokens.from_store(whole, layers, "all", 0)
        start, stop = store.span(number)
        for first in range(start, stop, whole.shard_images):
            images = torch.arange(first, min(first + whole.shard_images, stop))
            x = tokens.gather(images)  # [l, n, P + N, D]
            rows = ((images - start)[:, None] * store.n_tokens + torch.arange(store.n_tokens)).flatten()
            read = [Tokens(y[:, :prefix], y[:, prefix:], (0, 0)) for y in x]
            yield _Chunk(number, layers, int(images[-1]) + 1 == stop, len(images), rows, None, None, read)


def _kept(tokens: Tokens, chunk: _Chunk, stored: str, facts: BackboneFacts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is kept of one layer of a chunk, [k, D]: as computed, and in the dtype of the store; no registers.

    The spatial mean is taken in float32 over patch tokens already rounded to `dtype`, so that it is the same number
    whether it is made here or later from stored patch tokens.
    """
    if stored == "patches":
        x = tokens.patch[chunk.source[:, 0], chunk.source[:, 1]]
        return x, x.to(dtype)
    cls = tokens.prefix[:, :1] if facts.has_class_token else tokens.prefix[:, :0]
    if stored == "all":
        x = torch.cat([cls, tokens.patch], dim=1).flatten(0, 1)
        return x, x.to(dtype)
    exact = torch.cat([cls.float(), tokens.patch.float().mean(1, keepdim=True)], dim=1)
    rounded = torch.cat([cls.to(dtype), tokens.patch.to(dtype).float().mean(1, keepdim=True).to(dtype)], dim=1)
    return exact.flatten(0, 1), rounded.flatten(0, 1)


def _write_shards(
    chunks: Generator[_Chunk],
    store: TokenStore,
    todo: Mapping[int, list],
    facts: BackboneFacts,
    keys: list[str],
    split: str,
    beat: Callable[[], None],
) -> None:
    """Collect chunks into shards on their device; a thread writes each shard while the next one is computed."""
    stored, width = store.facts["tokens"], store.dim
    n_images = sum(stop - start for start, stop in map(store.span, todo))
    pending: list[Future] = []
    values = faults = None
    with (
        ThreadPoolExecutor(1) as finisher,
        ThreadPoolExecutor(WRITERS) as pool,
        tqdm(total=n_images, desc=f"{split}: tokens", unit="img", mininterval=0.5, disable=rank()[0] > 0, leave=False) as bar,
        torch.inference_mode(),
        closing(chunks) as stream,
    ):
        for chunk in stream:
            while pending and pending[0].done():
                pending.pop(0).result()  # the first bad number stops the extraction
            device = chunk.tokens[0].patch.device
            if values is None:
                start, stop = store.span(chunk.number)
                n_rows = (stop - start) * store.n_tokens
                values = torch.zeros(len(chunk.layers), n_rows, width, dtype=store.dtype, device=device)
                faults = torch.zeros(len(chunk.layers), n_rows, dtype=torch.uint8, device=device)  # 1 overflow, 2 not finite
            rows = chunk.rows.to(device, non_blocking=True)
            if chunk.source is not None:
                chunk = chunk._replace(source=chunk.source.to(device, non_blocking=True))
            for row, tokens in enumerate(chunk.tokens):
                exact, rounded = _kept(tokens, chunk, stored, facts, store.dtype)
                values[row].index_copy_(0, rows, rounded)
                # the sum of a token is finite if all of it is; testing every number costs ten times as much
                fault = sum((~x.sum(-1, dtype=torch.float32).isfinite()).byte() for x in (rounded, exact))
                faults[row].index_copy_(0, rows, fault)
            if chunk.last:
                if len(pending) > 1:
                    pending.pop(0).result()  # at most two shards wait for the disk
                done = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
                pending.append(finisher.submit(_finish, store, chunk.number, chunk.layers, values, faults, keys, done, pool))
                values = faults = None
            bar.update(chunk.images)
            beat()
        for future in pending:
            future.result()
            beat()


def _finish(
    store: TokenStore,
    number: int,
    layers: list,
    values: Tensor,
    faults: Tensor,
    keys: list[str],
    done: Any,
    pool: ThreadPoolExecutor,
) -> None:
    """Bring a shard [l, n · T, D] from its device to the disk, if all of it is finite."""
    if done is not None:  # copy beside the computation, not after all of it
        with torch.cuda.stream(torch.cuda.Stream(values.device)):
            done.wait()
            values, faults = values.cpu(), faults.cpu()
    if faults.any():
        row, at = faults.nonzero()[0].tolist()
        what = f"layer {layers[row]} of image {keys[store.span(number)[0] + at // store.n_tokens]}"
        if faults[row, at] == 1:
            raise UserError(
                f"{what} has activations beyond the range of cache.dtype=float16, set cache.dtype=bfloat16 or float32"
            )
        raise UserError(f"{what} has activations that are not finite, check the weights or set model.dtype=float32")
    store.write(number, layers, values.unflatten(1, (-1, store.n_tokens)), pool)
