"""Reading a data set item by item: in worker processes, or ahead in a thread."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


def content_id(image: Tensor) -> bytes:
    """16 bytes that stand for the decoded image [3, H, W] uint8."""
    shape = hashlib.blake2b(f"{tuple(image.shape)}".encode(), digest_size=8)
    return hashlib.blake2b(image.contiguous().numpy(), digest_size=16, salt=shape.digest()).digest()


def load_items(items: Dataset, order: Sequence[int], workers: int) -> DataLoader:
    """Items one by one in the given order, read ahead by `workers` processes (0: by the caller)."""
    return DataLoader(
        items,
        sampler=order,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        prefetch_factor=4 if workers else None,
    )


def _unchanged(item: Any) -> Any:
    return item


def read_ahead(source: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Run an iterator in a thread, `depth` items ahead; its errors are raised here."""
    box: queue.Queue = queue.Queue(depth)
    stop, n_threads = threading.Event(), torch.get_num_threads()

    def put(item: Any) -> bool:
        """Put an item into the box; False if the reader has left."""
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
