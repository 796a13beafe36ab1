"""Reading a data set: item by item in worker processes or ahead in a thread, and images that stay in memory."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from files import digest

T = TypeVar("T")
IMAGES_SHARE = 0.25  # of cache.ram_gb that decoded images may take


class ImageMemory:
    """Decoded images of the splits this process reads, so that each scene is rendered or decoded once.

    The pass over labels and the pass over tokens follow each other, and the controls read the same images again. Images
    that worker processes decode are not kept: they would have to be sent to this process first.
    """

    def __init__(self) -> None:
        self._splits: OrderedDict[str, dict[int, Tensor]] = OrderedDict()  # the least recently used first
        self.nbytes = 0

    def get(self, split: str, i: int) -> Tensor | None:
        """Image i [3, H, W] uint8 of a split, if it is kept."""
        return self._splits.get(split, {}).get(i)

    def put(self, split: str, i: int, image: Tensor, budget: float) -> None:
        """Keep an image within a budget in bytes; images of splits that were not used for longest make room."""
        if image.nbytes > budget or get_worker_info() is not None:
            return
        images = self._splits.setdefault(split, {})
        self._splits.move_to_end(split)
        while self.nbytes + image.nbytes > budget and len(self._splits) > 1:
            _, dropped = self._splits.popitem(last=False)
            self.nbytes -= sum(old.nbytes for old in dropped.values())
        if self.nbytes + image.nbytes <= budget and i not in images:
            images[i] = image.clone()  # of its own: a data set may return a view of something larger
            self.nbytes += image.nbytes


IMAGES = ImageMemory()


class ImageItems(Dataset):
    """A split whose images are read through the memory of this process; else the data set itself.

    Args:
        dataset: the items.
        made_from: what an index was made from: "dataset", "fingerprint" and "split" name the images.
        ram_gb: `cache.ram_gb`.
    """

    def __init__(self, dataset: Any, made_from: Mapping[str, Any], ram_gb: float) -> None:
        self.dataset, self.budget = dataset, IMAGES_SHARE * ram_gb * 1e9
        self.split = digest({key: made_from[key] for key in ("dataset", "fingerprint", "split")})

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def on_error(self) -> str:
        """What the caller does with an unreadable item."""
        return self.dataset.on_error

    def __getitem__(self, i: int) -> Any:
        """Scene i, read anew; its image is kept for later."""
        scene = self.dataset[i]
        IMAGES.put(self.split, i, scene.image, self.budget)
        return scene

    def image(self, i: int) -> Tensor:
        """The image [3, H, W] uint8 of scene i, from memory if it is there."""
        image = IMAGES.get(self.split, i) if self.budget else None
        return self[i].image if image is None else image


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
