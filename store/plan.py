"""What a split will take, estimated before any image is opened: a refusal names the largest value that fits.

Estimates are of the largest tensors alone; what fits by them may still be tight, what does not fit is hopeless.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from backbones.contract import BackboneFacts, by_pixels
from errors import UserError
from machine import free_memory
from store.shards import TokenStore

LABEL_BYTES = 40  # of a kept patch in the index: position, two labels with validity and purity, place
IMAGE_BYTES = 200  # of an image in it: name, digest, grid
BATCHES_AHEAD = 4  # batches of windows in memory at once: three being read, one in the backbone
WORKING_COPIES = 10  # of the tokens of a batch in a forward pass: block input, queries, keys, values, hidden units
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def tokens_per_image(cfg: Any, facts: BackboneFacts) -> int:
    """Tokens that are kept of an image (where all patches of several windows are kept, those of one: at least as many)."""
    patches = math.prod(side // facts.patch_size for side in facts.image_size)
    if cfg.model.output_mode == "patches":
        return patches if cfg.protocol.selection.patches == "all" else cfg.protocol.selection.patches
    return patches + facts.has_class_token if cfg.model.output_mode == "all" else 1 + facts.has_class_token


def stored_bytes(cfg: Any, n_images: int, n_tokens: int, dim: int, n_layers: int) -> int:
    """Bytes of the token files of so many images, exactly."""
    store = TokenStore(Path(), {"dtype": cfg.cache.dtype}, n_images, n_tokens, dim, cfg.cache)
    return n_layers * sum(map(store.file_bytes, range(store.n_shards)))


def check_index(cfg: Any, split: str, n_images: int, facts: BackboneFacts) -> None:
    """Refuse a split whose labels alone do not fit in memory, whether they are cached or not."""
    each, free = IMAGE_BYTES + LABEL_BYTES * tokens_per_image(cfg, facts), free_memory()
    if n_images * each > free:
        fewer = max(0, int(free - n_images * IMAGE_BYTES) // (n_images * LABEL_BYTES))
        patches = f" or protocol.selection.patches={fewer}" if fewer and cfg.model.output_mode == "patches" else ""
        raise UserError(
            f"split {split} has {n_images} images and the labels of their tokens take about {n_images * each / 1e9:.3g} GB of "
            f"memory ({free / 1e9:.3g} GB are free); at most {free // each} images fit{patches}"
        )


def check_extraction(cfg: Any, split: str, n_images: int, facts: BackboneFacts, n_layers: int) -> None:
    """Refuse a split that is not cached and whose windows do not fit in memory or whose tokens not in `cache.disk_gb`."""
    (height, width), patch, batch = facts.image_size, facts.patch_size, cfg.cache.batch_windows
    each = 12 * BATCHES_AHEAD + 4 * WORKING_COPIES * facts.dim / patch**2  # bytes of a pixel
    free = free_memory()
    if batch * height * width * each > free:
        side, alone = (int(math.sqrt(free / n / each)) // patch * patch for n in (batch, 1))
        raise UserError(
            f"model.image_size={by_pixels(facts.image_size)}: a batch of {batch} windows takes about "
            f"{batch * height * width * each / 1e9:.3g} GB of memory ({free / 1e9:.3g} GB are free); at most "
            f"model.image_size={side} fits, or {alone} with cache.batch_windows=1"
        )
    kept, item = tokens_per_image(cfg, facts), ITEM_BYTES[cfg.cache.dtype]
    of_token, budget = n_layers * facts.dim * item, cfg.cache.disk_gb * 1e9
    if n_images * kept * of_token > budget:
        fewer = int(budget // (n_images * of_token))
        patches = f", or protocol.selection.patches={fewer}" if fewer and cfg.model.output_mode == "patches" else ""
        raise UserError(
            f"split {split} takes about {n_images * kept * of_token / 1e9:.4g} GB ({n_images} images × {n_layers} layers × "
            f"{kept} tokens × {facts.dim} × {item} bytes) and cache.disk_gb is {cfg.cache.disk_gb}; at most "
            f"{int(budget // (kept * of_token))} images fit{patches}; raise cache.disk_gb, or take fewer model.layers"
        )
