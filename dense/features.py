"""Where the tokens, label maps and attention of a split come from: one extraction, shared by all dense evaluations.

Tokens are those of the activation cache (`activation.open_sample`), every patch of every image, put back on the grid of
the image (with `protocol.geometry.kind=cover` several windows make one grid). Label maps are kept beside them at full
size, a byte per pixel; the attention of the class token is kept once per backbone. What is cached is read without
building a backbone or opening an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from torch import Tensor

from activation import PatchSample, build_dataset, open_sample
from backbones.attention import check_class_attention, class_attention
from backbones.contract import BackboneFacts
from backbones.load import backbone_facts, load_backbone
from dense.contract import Grids, LabelMaps
from errors import UserError
from files import digest, lock, plain, safe_name
from machine import choose_device
from patches.geometry import plan_geometry
from patches.windows import cut_windows
from runs.progress import track
from runs.states import load_state, save_state

FORMAT = 1  # raise it when the meaning of a cached map changes
SHARD = 128  # images of one file of label maps
BACKGROUND = ("class", "ignore", "drop")


class Split(NamedTuple):
    """A split as the evaluations take it.

    sample: what the cache holds for it.
    """

    grids: Grids
    maps: LabelMaps
    sample: PatchSample


def dense_config(cfg: DictConfig) -> DictConfig:
    """The configuration with every patch kept and the input size the protocol asks for.

    Raises:
        UserError: a protocol that keeps some patches twice, or whose input size the patches of the model do not divide.
    """
    changed = cfg.copy()
    selection = {**OmegaConf.to_container(cfg.protocol.selection), "patches": "all", "per_visit": None, "by": "class"}
    OmegaConf.update(changed, "protocol.selection", selection, merge=False, force_add=True)
    OmegaConf.update(changed, "model.output_mode", "patches")
    if cfg.protocol.geometry.kind not in ("cover", "stretch"):
        raise UserError(
            f"dense evaluations need every part of an image once, protocol.geometry.kind={cfg.protocol.geometry.kind} gives "
            "windows that overlap; set cover or stretch"
        )
    size, grid = cfg.dense.input_size, cfg.dense.grid
    if size is not None or grid is not None:
        if size is not None and grid is not None:
            raise UserError(
                f"dense.input_size={size} and dense.grid={grid} both say how large an image is seen; set one of them"
            )
        patch = backbone_facts(cfg.model).patch_size
        if size is not None and size % patch:
            raise UserError(
                f"protocol {cfg.protocol.name} shows the model images of {size} pixels, which its patches of {patch} pixels do "
                f"not divide; choose another model, or set dense.input_size={round(size / patch) * patch}"
            )
        OmegaConf.update(changed, "model.image_size", int(size or grid * patch))
    if cfg.dense.background not in BACKGROUND:
        raise UserError(f"unknown dense.background={cfg.dense.background}; valid: {', '.join(BACKGROUND)}")
    return changed


def open_split(cfg: DictConfig, split: str, say: Callable[[str], None], *, attention: bool = False) -> Split:
    """Tokens and label maps of a split; `cfg` comes from `dense_config`.

    Args:
        attention: also the attention of the class token.

    Raises:
        UserError: what `open_sample` raises, a data set without class maps, a model whose attention cannot be read.
    """
    facts = backbone_facts(cfg.model)
    if attention:
        check_class_attention(facts)
    sample = open_sample(cfg, split, say=say)
    shapes, order = lattice(sample)
    dim = sample.tokens.shape[-1]

    def read(images: Tensor) -> Tensor:
        h, w = shapes[int(images[0])].tolist()
        x = sample.tokens.gather(images)  # [L, B, T, D]
        if order is not None:
            x = x.gather(2, order[images][None, :, : h * w, None].expand(len(x), -1, -1, dim))
        return x[:, :, : h * w].unflatten(2, (h, w))

    looked = open_attention(cfg, split, sample, say) if attention else None
    grids = Grids(read, shapes, layers=sample.tokens.layers, dim=dim, patch=facts.patch_size, attention=looked)
    return Split(grids, change_background(open_maps(cfg, split, sample), cfg.dense.background), sample)


def lattice(sample: PatchSample) -> tuple[Tensor, Tensor | None]:
    """Rows and columns of every image [M, 2], and which token lies at each place in raster order [M, T]; None: all in order.

    Raises:
        UserError: the patches of an image do not fill a grid.
    """
    place = sample.labels["place"].round().long()  # [M, T, 2]
    shapes = place.amax(1) + 1
    flat = place[..., 0] * shapes[:, 1:] + place[..., 1]  # [M, T]
    count = shapes.prod(1)
    inside = torch.arange(flat.shape[1]) < count[:, None]  # what follows fills up the table
    flat = torch.where(inside, flat, flat.shape[1])
    order = flat.argsort(dim=1, stable=True)
    if not torch.equal(flat.gather(1, order)[inside], torch.arange(flat.shape[1]).expand_as(flat)[inside]):
        raise UserError("the patches of an image do not fill a grid; set protocol.geometry.kind=stretch")
    return shapes, None if torch.equal(order, torch.arange(flat.shape[1]).expand_as(order)) else order


def change_background(maps: LabelMaps, background: str) -> LabelMaps:
    """Class 0 as a class like any other, ignored (it stays in the list), or dropped from the list."""
    if background == "class":
        return maps
    if background == "ignore":
        hide = lambda image: (x := maps.read(image).short()).masked_fill(x == 0, -1)
        return LabelMaps(hide, maps.n_images, maps.classes)
    n = maps.n_classes

    def shift(image: int) -> Tensor:
        x = maps.read(image).short()
        return torch.where((x > 0) & (x < n), x - 1, -1)

    return LabelMaps(shift, maps.n_images, maps.classes[1:])


# ----------------------------------------------------------------------------------------------- label maps, attention


def open_maps(cfg: DictConfig, split: str, sample: PatchSample) -> LabelMaps:
    """Class maps of the images of a sample at full size.

    Maps are decoded once, to files of 128 images; a killed pass goes on at the next file. Up to `cache.ram_gb` they are held
    in memory (a byte per pixel up to 255 classes), beyond it they are read from the files.

    Raises:
        UserError: the data set has no class maps.
    """
    classes, numbers = list(sample.meta["classes"]), sample.meta["numbers"].tolist()
    dataset = build_dataset(cfg, split)
    made_from = {
        "format": FORMAT, "dataset": type(dataset).__name__, "fingerprint": dataset.fingerprint(), "split": split,
        "numbers": numbers, "classes": classes,
    }  # fmt: skip
    folder = Path(cfg.cache.dir) / "maps" / safe_name(f"{type(dataset).__name__}-{split}-{digest(plain(made_from))}")
    dtype = torch.uint8 if len(classes) <= 255 else torch.int16

    def write(rows: range) -> dict[str, Tensor]:
        maps = {}
        for row in rows:
            scene = dataset[numbers[row]]
            if "class" not in scene.labels:
                raise UserError(
                    f"{scene.key} has no class map, which dense evaluations compare with; use a data set of class maps"
                )
            label = scene.labels["class"]
            outside = (label < 0) | (label >= len(classes))
            maps[str(row)] = label.masked_fill(outside, torch.iinfo(dtype).max).to(dtype)
        return maps

    files = _fill(folder, len(numbers), write, cfg, f"{split}: label maps")
    held, n_bytes = {}, 0
    for file in files:
        tensors = load_state(file).tensors
        n_bytes += sum(value.nbytes for value in tensors.values())
        if n_bytes <= cfg.cache.ram_gb * 1e9:
            held |= {int(name): value for name, value in tensors.items()}

    def read(image: int) -> Tensor:
        if image in held:
            return held[image]
        with safe_open(files[image // SHARD], "pt") as file:
            return file.get_tensor(str(image))

    return LabelMaps(read, len(numbers), classes)


def open_attention(cfg: DictConfig, split: str, sample: PatchSample, say: Callable[[str], None]) -> Callable[[Tensor], Tensor]:
    """The attention of the class token of every image, computed once: images [B] -> [B, heads, h, w] float32.

    In an image of several windows every patch has the attention of the window its token comes from.

    Raises:
        UserError: a model whose attention cannot be read.
    """
    numbers, facts = sample.meta["numbers"].tolist(), sample.meta["facts"]
    device, dataset = choose_device(cfg.device), build_dataset(cfg, split)
    folder = Path(cfg.cache.dir) / "attention" / safe_name(f"{facts['name']}-{split}-{sample.meta['fingerprint']}")
    shapes, order = lattice(sample)
    backbone: list[Any] = []  # loaded when the first file is missing

    def write(rows: range) -> dict[str, Tensor]:
        if not backbone:
            backbone.append(load_backbone(cfg.model, device, say))
        maps, size = {}, cfg.cache.batch_windows
        for first in range(rows.start, rows.stop, size):
            part = range(first, min(first + size, rows.stop))
            windows = [seen_windows(dataset[numbers[row]].image, cfg, backbone[0].facts) for row in part]
            found = [class_attention(backbone[0], few.to(device)).half().cpu() for few in torch.cat(windows).split(size)]
            for row, seen in zip(part, torch.cat(found).split([len(each) for each in windows]), strict=True):
                h, w = shapes[row].tolist()
                window, y, x = sample.position[row].clamp_min(0).unbind(1)  # [T]
                tokens = seen[window, :, y, x]  # [T, heads]
                tokens = tokens if order is None else tokens[order[row]]
                maps[str(row)] = tokens[: h * w].T.unflatten(1, (h, w)).contiguous()
        return maps

    held = {}
    for file in _fill(folder, len(numbers), write, cfg, f"{split}: attention"):
        held |= {int(name): value for name, value in load_state(file).tensors.items()}
    return lambda images: torch.stack([held[int(image)] for image in images]).float()


def seen_windows(image: Tensor, cfg: DictConfig, facts: BackboneFacts) -> Tensor:
    """An image [3, H, W] uint8 as the backbone sees it, [n_windows, 3, h p, w p] float32."""
    options = OmegaConf.to_container(cfg.protocol.geometry)
    geometry = plan_geometry(
        tuple(image.shape[-2:]), geometry=options, patch_size=facts.patch_size, image_size=facts.image_size
    )
    return cut_windows(
        image, geometry, mean=facts.mean, std=facts.std, interpolation=facts.interpolation, antialias=options["antialias"]
    )


def _fill(folder: Path, n_images: int, write: Callable[[range], dict[str, Tensor]], cfg: DictConfig, title: str) -> list[Path]:
    """Files of `SHARD` images each, made where they are missing."""
    parts = [range(first, min(first + SHARD, n_images)) for first in range(0, n_images, SHARD)]
    files = [folder / f"{part.start:07d}.safetensors" for part in parts]
    with lock(folder / "lock", cfg.cache.lock_timeout, print) as beat:
        missing = [(file, part) for file, part in zip(files, parts, strict=True) if not file.exists()]
        for file, part in track(missing, title, f"{SHARD} images,"):
            save_state(file, write(part), {"images": [part.start, part.stop]})
            beat()
    return files
