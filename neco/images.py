"""Images for post-training, cropped ahead: those of any data set of the project, or of a plain folder."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbones.contract import BackboneFacts
from datasets.listings import IMAGE_ENDINGS, file_fingerprint, list_images, spread
from datasets.pictures import read_image
from datasets.scene import build
from errors import UserError
from neco.crops import CropBatch, CropOptions, collate, sample_crops
from neco.patch_ordering import World
from neco.recipe import ImageOptions, Recipe

Place = tuple[int, int]  # epoch and number of an image


class FolderImages:
    """The images below a folder, by name."""

    def __init__(self, folder: str) -> None:
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise UserError(f"neco.images.folder={folder} is no folder, name one that holds images")
        self.files = [root / f"{stem}{ending}" for stem, ending in list_images(root).items()]
        if not self.files:
            raise UserError(f"neco.images.folder={folder} holds no image ({', '.join(IMAGE_ENDINGS)}), name another folder")
        self.root = root

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Tensor:
        """[3, H, W] uint8, upright."""
        path = self.files[index]
        return read_image(path, path.relative_to(self.root).as_posix(), upright=True)

    def fingerprint(self) -> Any:
        """What tells these images from others: names, sizes, times."""
        return file_fingerprint(self.root, [path.relative_to(self.root).as_posix() for path in self.files])


class DatasetImages:
    """The images of a split of a data set."""

    def __init__(self, dataset_cfg: Any, split: str) -> None:
        self.dataset = build(dataset_cfg, split)

    def __len__(self) -> int:
        return len(self.dataset)

    def image(self, index: int) -> Tensor:
        """[3, H, W] uint8."""
        return self.dataset[index].image

    def fingerprint(self) -> Any:
        """What the data set says of itself."""
        return self.dataset.fingerprint()


def open_images(dataset_cfg: Any, options: ImageOptions, batch: int) -> tuple[FolderImages | DatasetImages, list[int]]:
    """The images and the numbers of those that are used.

    Raises:
        UserError: an empty or missing folder, fewer images than a batch.
    """
    source = FolderImages(options.folder) if options.folder else DatasetImages(dataset_cfg, options.split)
    # A generated stream has no end; a limit is what makes an epoch of it.
    numbers = spread(range(len(source)), options.limit) if options.limit != len(source) else list(range(len(source)))
    if len(numbers) < batch:
        raise UserError(f"{len(numbers)} images are fewer than a batch (neco.batch_images={batch}), take a smaller batch")
    return source, numbers


def plan_batches(numbers: Sequence[int], recipe: Recipe, world: World, seed: int, start: int = 0) -> Iterator[list[Place]]:
    """The images of this process, part by part, from optimiser step `start` on; every epoch in an order of its own.

    What does not fill a batch at the end of an epoch is left out, as in the reference program.
    """
    steps = len(numbers) // recipe.batch_images
    for epoch in range(start // steps, recipe.epochs):
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()
        for step in range(steps):
            if epoch * steps + step < start:
                continue
            batch = [(epoch, numbers[i]) for i in order[step * recipe.batch_images : (step + 1) * recipe.batch_images]]
            part = len(batch) // recipe.accumulate
            for first in range(0, len(batch), part):
                mine = part // world.size
                yield batch[first + world.rank * mine : first + (world.rank + 1) * mine]


class _Crops(Dataset):
    """Samples by place; what is wrong with a file comes back as a value, for a worker cannot raise every exception."""

    def __init__(self, source: FolderImages | DatasetImages, options: CropOptions, seed: int) -> None:
        self.source, self.options, self.seed = source, options, seed

    def __getitem__(self, place: Place) -> Any:
        try:
            return sample_crops(self.source.image(place[1]), self.options, (self.seed, *place))
        except UserError as error:
            return str(error)


def load_batches(
    source: FolderImages | DatasetImages,
    places: Iterator[list[Place]],
    recipe: Recipe,
    facts: BackboneFacts,
    seed: int,
) -> Iterator[CropBatch]:
    """Cropped, normalised batches, decoded ahead by worker processes.

    Raises:
        UserError: an image that cannot be read or cropped.
    """
    together = functools.partial(
        collate, options=recipe.crops, patch_size=facts.patch_size, mean=facts.mean, std=facts.std
    )
    loader = DataLoader(
        _Crops(source, recipe.crops, seed),
        batch_sampler=places,  # type: ignore[arg-type]
        collate_fn=functools.partial(_collate, together=together),
        num_workers=recipe.images.workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


def _collate(samples: Sequence[Any], together: Callable[[Sequence[Any]], CropBatch]) -> CropBatch | str:
    return next((sample for sample in samples if isinstance(sample, str)), None) or together(samples)


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the main one decides
