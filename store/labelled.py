"""One image of a data set as the index records it: its patches, their labels, and which of them are kept."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from backbones.contract import BackboneFacts
from datasets.scene import Scene
from errors import UserError
from files import plain
from patches.geometry import DroppedImage, Geometry, plan_geometry
from patches.labels import label_patches
from patches.selection import owned_patches, primary_label, select_patches
from store.reading import content_id

SKIP_HINT = "; repair it, or leave it out with dataset.on_error=skip"


class LabelledItems(Dataset):
    """Item i of a data set as a record of the index, or its fault: a value, to stay one sentence across processes.

    A record is {"fatal": sentence}: nothing can be done with this data set; {"dropped": (key, reason)}: the protocol leaves
    the image out; {"fault": (key, reason), "hint": text}: it cannot be used; else "key", "number", "content", "grids",
    "position" and "label.<name>", as `Index` has them, of one image.

    Args:
        protocol: its sections geometry, labels and selection.
        whole_images: keep every patch; else those that the protocol selects.
    """

    def __init__(self, dataset: Any, protocol: Any, facts: BackboneFacts, whole_images: bool) -> None:
        self.dataset, self.whole_images = dataset, whole_images
        self.protocol = plain(protocol)
        self.sizes = {"patch_size": facts.patch_size, "image_size": facts.image_size}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            scene = self.dataset[i]
        except UserError as error:  # a data set raises it for this item alone
            reason = getattr(error, "reason", str(error))
            return {"fault": (getattr(error, "key", f"item {i}"), reason), "hint": SKIP_HINT}
        size = tuple(scene.image.shape[-2:])
        try:
            geometry = plan_geometry(size, geometry=self.protocol["geometry"], **self.sizes)
            columns = self._label_columns(scene, geometry)
        except DroppedImage as error:
            return {"dropped": (scene.key, str(error))}
        except UserError as error:
            return {"fault": (scene.key, str(error)), "hint": ""}
        return columns | {  # numpy: a tensor from a worker process would hold a file descriptor for as long as it lives
            "key": scene.key,
            "number": np.int64(i),
            "content": np.frombuffer(content_id(scene.image), np.uint8),
            "grids": np.array(geometry.grid, np.int16),
        }

    def _label_columns(self, scene: Scene, geometry: Geometry) -> dict[str, Any]:
        """The positions of the kept patches and their labels, or the codes of the image."""
        has_codes = "object_code" in scene.labels
        if has_codes and not self.whole_images:
            return {"fatal": "output_mode=patches needs pixel labels, these images have codes: use all or cls"}
        if self.whole_images and len(geometry.starts) > 1:
            return {
                "fatal": f"{scene.key} takes {len(geometry.starts)} windows, the output modes of whole images need "
                "one; set protocol.geometry.kind=stretch" + ("" if has_codes else " or model.output_mode=patches")
            }
        if has_codes:
            return {f"label.{name}": value.numpy() for name, value in scene.labels.items()}
        labels = label_patches(scene.labels, geometry, labels=self.protocol["labels"])
        selection, columns = self.protocol["selection"], {}
        if not labels:
            return {"fatal": f"{scene.key} has no label map; its data set needs identity or class maps, or codes"}
        try:
            primary = labels[primary_label(labels, selection.get("by"))]
        except UserError as error:
            return {"fatal": str(error)}
        if self.whole_images:
            position, drawn = _every_patch(geometry), owned_patches(geometry).flatten()
        else:
            seed = hashlib.blake2b(f"{selection['seed']}|{scene.key}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            position, drawn = select_patches(primary, geometry, selection=selection, generator=generator)
            columns["position"] = position.numpy().astype(np.int16)
        window, row, column = position.T
        for name, patch in labels.items():
            columns[f"label.{name}"] = patch.label[window, row, column].numpy().astype(np.int32)
            columns[f"label.{name}_valid"] = (drawn & patch.valid[window, row, column]).numpy()
            columns[f"label.{name}_purity"] = patch.purity[window, row, column].numpy()
        return columns | {"label.place": _places(position, geometry).numpy()}


def _every_patch(geometry: Geometry) -> Tensor:
    """All patches of all windows, int64 [n_windows · N, 3] window, row, column, in raster order."""
    return torch.cartesian_prod(*(torch.arange(n) for n in (len(geometry.starts), *geometry.grid)))


def _places(position: Tensor, geometry: Geometry) -> Tensor:
    """Row and column of patches [T, 3] in the scaled image, float32 [T, 2], in patches.

    Distances then mean the same within a window and across windows.
    """
    starts = torch.tensor(geometry.starts, dtype=torch.float32)[position[:, 0]] / geometry.patch
    return starts + position[:, 1:]
