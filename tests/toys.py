"""A small data set with every fault a cache has to live with, and the configuration that caches it with a two-block ViT."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from datasets.scene import Scene, UnreadableScene, allow

SIDE = 32
allow("toys")


class Toy:
    """Noise images [3, 32, W] with objects of 8 px; `widths` cycle over the items, `unreadable` items raise.

    `maps` are the label maps they have; class 0 is background, and the class of object 3 is ignored if `holes`.
    """

    def __init__(
        self,
        split: str,
        *,
        n: int = 10,
        widths: Sequence[int] = (SIDE,),
        unreadable: Sequence[int] = (),
        codes: bool = False,
        maps: Sequence[str] = ("identity", "class"),
        holes: bool = False,
        seconds: float = 0.0,
        look: int = 0,
        version: int = 0,
        on_error: str = "raise",
    ) -> None:
        self.split, self.on_error, self.n, self.widths, self.unreadable = split, on_error, n, widths, unreadable
        self.maps, self.holes = list(maps), holes
        self.codes, self.seconds, self.look, self.version = codes, seconds, look, version
        self.classes = ["background", "thing"]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Scene:
        time.sleep(self.seconds)
        key = f"{self.split}-{i:03d}"
        if i in self.unreadable:
            raise UnreadableScene(key, "truncated file")
        rng = torch.Generator().manual_seed(1000 * self.look + i)
        width = self.widths[i % len(self.widths)]
        image = torch.randint(0, 256, (3, SIDE, width), generator=rng, dtype=torch.uint8)
        if self.codes:
            code = torch.randint(0, 2, (4,), generator=rng, dtype=torch.uint8)
            return Scene(image, {"object_code": code, "H_Y_given_F": torch.tensor([1.5])}, key)
        coarse = torch.randint(0, 4, (SIDE // 8, width // 8), generator=rng, dtype=torch.int32)
        identity = coarse.repeat_interleave(8, 0).repeat_interleave(8, 1)
        class_ = torch.where(identity == 3, -1, identity.clamp(max=1)) if self.holes else identity.clamp(max=1)
        maps = {"identity": identity, "class": class_}
        return Scene(image, {name: maps[name] for name in self.maps}, key)

    def fingerprint(self) -> dict[str, Any]:
        return {"n": self.n, "widths": list(self.widths), "look": self.look, "version": self.version,
                "maps": self.maps, "holes": self.holes}  # fmt: skip

    def info(self) -> dict[str, float]:
        return {"bits": 2.0} if self.codes else {}

    def report(self) -> dict[str, Any]:
        return {"found": self.n}


def toy_config(directory: Path, *overrides: str) -> DictConfig:
    """What the cache reads of a composed configuration."""
    base = {
        "device": "cpu",
        "threads": 0,
        "seed": 0,
        "dataset": {"_target_": "toys.Toy"},
        "model": {
            "source": "timm",
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "weights": None,
            "digest": None,
            "image_size": SIDE,
            "layers": "all",
            "norm": False,
            "dtype": "float32",
            "attention": "sdpa",
            "compile": False,
            "output_mode": "patches",
            "seed": 0,
            "kwargs": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
        },
        "protocol": OmegaConf.load(Path(__file__).parent.parent / "cfgs" / "protocol" / "clean.yaml").protocol,
        "cache": {
            "dir": str(directory),
            "disk_gb": 1,
            "dtype": "float16",
            "shard_images": 4,
            "batch_windows": 3,
            "workers": 0,
            "verify": False,
            "repair": False,
            "lock_timeout": 20,
            "ram_gb": 1,
        },
    }
    small = OmegaConf.create({"protocol": {"selection": {"patches": 6}}})
    return OmegaConf.merge(base, small, OmegaConf.from_dotlist(list(overrides)))
