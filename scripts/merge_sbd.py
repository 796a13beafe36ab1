"""Add the masks of the Semantic Boundaries Dataset to VOC 2012: SegmentationClassAug and the list trainaug.txt.

    python scripts/merge_sbd.py benchmark_RELEASE/dataset VOCdevkit/VOC2012

Masks of images that VOC labels itself are VOC's own (with their void border), all others are SBD's. trainaug is the union
of VOC's training list and SBD's two lists, without VOC's validation list: 10 582 names in the published data.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm


def merge(sbd: Path, voc: Path) -> list[str]:
    """Write masks and list; returns the names of trainaug."""
    lists = voc / "ImageSets" / "Segmentation"
    own = {part: (lists / f"{part}.txt").read_text().split() for part in ("train", "val")}
    more = [name for part in ("train", "val") for name in (sbd / f"{part}.txt").read_text().split()]
    names = sorted({*own["train"], *more} - set(own["val"]))
    target = voc / "SegmentationClassAug"
    target.mkdir(exist_ok=True)
    for name in tqdm(names, desc="masks", disable=None):
        if name in own["train"]:
            shutil.copyfile(voc / "SegmentationClass" / f"{name}.png", target / f"{name}.png")
        else:
            mask = loadmat(sbd / "cls" / f"{name}.mat")["GTcls"]["Segmentation"][0, 0]
            Image.fromarray(np.asarray(mask, np.uint8)).save(target / f"{name}.png")
    (lists / "trainaug.txt").write_text("".join(f"{name}\n" for name in names))
    return names


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"trainaug has {len(merge(Path(sys.argv[1]), Path(sys.argv[2])))} of 10582 names")
