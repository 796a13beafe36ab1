"""Chunks: what one forward pass makes of some windows, and where each of its tokens belongs in a shard.

They come from windows of images, batched for the backbone (`cut_chunks`), or from another store that holds the tokens
already, as if a backbone had just computed them (`stored_chunks`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from backbones.contract import BackboneFacts, Layer, Tokens
from errors import UserError
from patches.geometry import plan_geometry
from patches.windows import cut_windows
from store.index import Index
from store.reading import ImageItems, content_id
from store.shards import StackedTokens, TokenStore

T = TypeVar("T")


class Chunk(NamedTuple):
    """Tokens of some layers on their way to a shard.

    number: the shard. layers: those it lacks. last: nothing more comes for it. images: how many this chunk completes.
    rows: [k] int64 rows of the shard, image · T + token, that the k kept tokens of this chunk go to.
    source: [k, 2] int64 window in the chunk and patch in the window; None where all patches are kept or pooled.
    windows: [b, 3, H, W] float32 normalised pixels; None once the tokens are there.
    tokens: one entry per layer, of b windows; None before the forward pass.
    """

    number: int
    layers: list[Layer]
    last: bool
    images: int
    rows: Tensor
    source: Tensor | None
    windows: Tensor | None = None
    tokens: list[Tokens] | None = None


class WindowItems(Dataset):
    """Item i of a data set as normalised windows [n, 3, H, W] float32 with its content digest, or its fault in words."""

    def __init__(self, images: ImageItems, geometry: dict[str, Any], facts: BackboneFacts) -> None:
        self.images, self.geometry, self.facts = images, geometry, facts

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, bytes] | str:
        facts = self.facts
        try:
            image = self.images.image(i)
            geometry = plan_geometry(
                tuple(image.shape[-2:]), geometry=self.geometry, patch_size=facts.patch_size, image_size=facts.image_size
            )
            windows = cut_windows(
                image,
                geometry,
                mean=facts.mean,
                std=facts.std,
                interpolation=facts.interpolation,
                antialias=self.geometry["antialias"],
            )
        except UserError as error:
            return f"{getattr(error, 'key', f'item {i}')}: {getattr(error, 'reason', error)}"
        return windows, content_id(image)


class _Window(NamedTuple):
    """One window on its way into a batch: its image (counted in the shard), its number there, whether it is the last."""

    image: int
    number: int
    is_last: bool
    pixels: Tensor  # [3, H, W]


def order_of_images(store: TokenStore, shards: Iterable[int], index: Index) -> dict[int, list[int]]:
    """The images of each shard in the order they are read: those of one grid adjoin, so that batches are full."""
    grids = index.grids.tolist()
    return {number: sorted(range(*store.span(number)), key=lambda m: (grids[m], m)) for number in shards}


def cut_chunks(
    items: Iterator[tuple[Tensor, bytes] | str],
    orders: Mapping[int, list[int]],
    todo: Mapping[int, list[Layer]],
    index: Index,
    store: TokenStore,
    batch_size: int,
) -> Iterator[Chunk]:
    """Batches of at most `batch_size` windows of one shape; never across shards, so a resumed run makes the same ones.

    Args:
        items: what `WindowItems` yields, for all images of `orders` in order.
        orders: images of each shard (`order_of_images`); todo: layers that each shard lacks.

    Raises:
        UserError: an image cannot be read any more, or is not the one that was indexed.
    """
    for number, images in orders.items():
        start, n_left = store.span(number)[0], len(images)
        for (_, width), adjoining in groupby(images, key=lambda m: index.grids[m].tolist()):
            windows = (window for m in adjoining for window in _windows_of(next(items), m, start, index))
            for batch in _batches(windows, batch_size):
                n_completed = sum(window.is_last for window in batch)
                n_left -= n_completed
                rows, source = _targets(batch, start, width, index, store)
                pixels = torch.stack([window.pixels for window in batch])  # [b, 3, H, W]
                yield Chunk(number, todo[number], n_left == 0, n_completed, rows, source, pixels)


def _windows_of(item: tuple[Tensor, bytes] | str, m: int, start: int, index: Index) -> Iterator[_Window]:
    """The windows of image m, which must be the one that was indexed."""
    if isinstance(item, str):
        raise UserError(f"{item}; it was readable when the index was built, repair the file")
    windows, content = item
    if content != index.tensors["content"][m].numpy().tobytes():
        raise UserError(f"{index.keys[m]}: the image changed while it was being read, repeat the command")
    for number, pixels in enumerate(windows):
        yield _Window(m - start, number, number + 1 == len(windows), pixels)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one of what remains."""
    while batch := list(islice(items, size)):
        yield batch


def _targets(batch: Sequence[_Window], start: int, width: int, index: Index, store: TokenStore) -> tuple[Tensor, Tensor | None]:
    """Where the tokens of a batch belong: rows of the shard [k], and the source [k, 2] of each (`Chunk`).

    Args:
        start: first image of the shard; width: patches in a row of a window.
    """
    image = torch.tensor([window.image for window in batch])  # [b]
    rows = image[:, None] * store.n_tokens + torch.arange(store.n_tokens)  # [b, T]
    if "position" not in index.tensors:
        return rows.flatten(), None
    kept = index.tensors["position"][start + image].long()  # [b, T, 3] window, row, column
    number = torch.tensor([window.number for window in batch])  # [b]
    is_here = kept[..., 0] == number[:, None]  # [b, T] kept patches that lie in this very window
    patch = kept[..., 1] * width + kept[..., 2]
    return rows[is_here], torch.stack([is_here.nonzero()[:, 0], patch[is_here]], dim=1)


def stored_chunks(
    all_tokens: TokenStore, store: TokenStore, todo: Mapping[int, list[Layer]], has_class_token: bool
) -> Generator[Chunk]:
    """The tokens of images of one window, read back from the store that keeps them all, in pieces that fit memory."""
    n_prefix = int(has_class_token)
    for number, layers in todo.items():
        tokens = StackedTokens.from_store(all_tokens, layers, "all", 0)
        start, stop = store.span(number)
        for first in range(start, stop, all_tokens.shard_images):
            images = torch.arange(first, min(first + all_tokens.shard_images, stop))
            x = tokens.gather(images)  # [l, n, P + N, D]
            rows = ((images - start)[:, None] * store.n_tokens + torch.arange(store.n_tokens)).flatten()
            of_layers = [Tokens(y[:, :n_prefix], y[:, n_prefix:], (0, 0)) for y in x]
            yield Chunk(number, layers, int(images[-1]) + 1 == stop, len(images), rows, None, None, of_layers)
