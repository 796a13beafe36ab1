"""From chunks to shards on disk: the tokens that are kept, the check that it is a number, and the writing threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones.contract import Layer, Tokens
from errors import UserError
from store.chunks import Chunk
from store.shards import TokenStore

WRITERS = 4  # threads that hash and write the layer files of a shard
WAITING = 2  # shards in memory that wait for the disk
OVERFLOW, NOT_FINITE = 1, 2  # marks of a token that cannot be kept


def kept_tokens(tokens: Tokens, source: Tensor | None, stored: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is kept of one layer of a chunk, twice [k, D]: as computed, and in the dtype of the store. Registers never are.

    The spatial mean is taken in float32 over patch tokens already rounded to `dtype`, so that it is the same number
    whether it is computed here or later from stored patch tokens.

    Args:
        tokens: prefix [b, P, D] with the class token first (or P = 0), patch [b, N, D].
        source: [k, 2] window and patch of each token, with stored="patches".
        stored: "patches", "all" (class token and patches) or "pooled" (class token and spatial mean).
    """
    if stored == "patches":
        x = tokens.patch[source[:, 0], source[:, 1]]
        return x, x.to(dtype)
    cls = tokens.prefix[:, :1]
    if stored == "all":
        x = torch.cat([cls, tokens.patch], dim=1).flatten(0, 1)
        return x, x.to(dtype)
    exact = torch.cat([cls.float(), tokens.patch.float().mean(1, keepdim=True)], dim=1)
    rounded = torch.cat([cls.to(dtype), tokens.patch.to(dtype).float().mean(1, keepdim=True).to(dtype)], dim=1)
    return exact.flatten(0, 1), rounded.flatten(0, 1)


class _Shard(NamedTuple):
    """A shard that is being collected on the device of its tokens, n images of T tokens at l layers.

    values: [l, n · T, D] in the dtype of the store. faults: [l, n · T] uint8, 0 or OVERFLOW or NOT_FINITE.
    """

    number: int
    layers: list[Layer]
    values: Tensor
    faults: Tensor


class ShardWriter:
    """Collects chunks into shards; a thread writes each shard while the next one is computed.

    Args:
        store: where the shards go.
        keys: name of each image, for the error.
        has_class_token: of the backbone. Prefix tokens of others are registers and are not kept.
    """

    def __init__(self, store: TokenStore, keys: list[str], has_class_token: bool) -> None:
        self.store, self.keys, self.has_class_token = store, keys, has_class_token
        self._shard: _Shard | None = None
        self._written: list[Future] = []

    def __enter__(self) -> ShardWriter:
        self._threads = ExitStack()
        self._finisher = self._threads.enter_context(ThreadPoolExecutor(1))
        self._pool = self._threads.enter_context(ThreadPoolExecutor(WRITERS))
        return self

    def __exit__(self, *error: Any) -> None:
        self._threads.close()

    def add(self, chunk: Chunk) -> None:
        """Take in the tokens of a chunk; the last one of a shard sends it to the disk.

        Raises:
            UserError: an earlier shard holds a number that cannot be kept, or could not be written.
        """
        while self._written and self._written[0].done():
            self._written.pop(0).result()  # the first bad number stops the extraction
        device = chunk.tokens[0].patch.device
        if self._shard is None:
            self._shard = self._new_shard(chunk, device)
        rows = chunk.rows.to(device, non_blocking=True)
        source = None if chunk.source is None else chunk.source.to(device, non_blocking=True)
        for layer, tokens in enumerate(chunk.tokens):
            if not self.has_class_token:
                tokens = tokens._replace(prefix=tokens.prefix[:, :0])
            exact, rounded = kept_tokens(tokens, source, self.store.facts["tokens"], self.store.dtype)  # [k, D]
            self._shard.values[layer].index_copy_(0, rows, rounded)
            # The sum of a token is finite if all of it is; testing every number costs ten times as much.
            # Infinite once rounded: OVERFLOW, already as computed: both, NOT_FINITE.
            fault = sum((~x.sum(-1, dtype=torch.float32).isfinite()).byte() for x in (rounded, exact))
            self._shard.faults[layer].index_copy_(0, rows, fault)
        if chunk.last:
            if len(self._written) >= WAITING:
                self._written.pop(0).result()
            computed = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            self._written.append(self._finisher.submit(self._finish, self._shard, computed))
            self._shard = None

    def wait(self, beat: Callable[[], None]) -> None:
        """Wait until every shard is on disk, with a sign of life after each, and raise what went wrong."""
        for written in self._written:
            written.result()
            beat()

    def _new_shard(self, chunk: Chunk, device: torch.device) -> _Shard:
        start, stop = self.store.span(chunk.number)
        n_rows = (stop - start) * self.store.n_tokens
        values = torch.zeros(len(chunk.layers), n_rows, self.store.dim, dtype=self.store.dtype, device=device)
        faults = torch.zeros(len(chunk.layers), n_rows, dtype=torch.uint8, device=device)
        return _Shard(chunk.number, chunk.layers, values, faults)

    def _finish(self, shard: _Shard, computed: torch.cuda.Event | None) -> None:
        """Bring a shard from its device to the disk, if all of it is finite."""
        values, faults, n_tokens = shard.values, shard.faults, self.store.n_tokens
        if computed is not None:  # copy beside the computation, not after all of it
            with torch.cuda.stream(torch.cuda.Stream(values.device)):
                computed.wait()
                values, faults = values.cpu(), faults.cpu()
        if faults.any():
            layer, row = faults.nonzero()[0].tolist()
            image = self.store.span(shard.number)[0] + row // n_tokens
            place = f"layer {shard.layers[layer]} of image {self.keys[image]}"
            if faults[layer, row] == OVERFLOW:
                raise UserError(
                    f"{place} has activations beyond the range of cache.dtype=float16, set cache.dtype=bfloat16 or float32"
                )
            raise UserError(f"{place} has activations that are not finite, check the weights or set model.dtype=float32")
        self.store.write(shard.number, shard.layers, values.unflatten(1, (-1, n_tokens)), self._pool)
