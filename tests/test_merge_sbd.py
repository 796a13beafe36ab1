from pathlib import Path

import numpy as np
from dataset_trees import VOC_LISTS, colour, save, voc
from PIL import Image
from program import ROOT
from scipy.io import savemat

from datasets.voc import Voc


def load_script():
    import importlib.util

    spec = importlib.util.spec_from_file_location("merge_sbd", ROOT / "scripts" / "merge_sbd.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_trainaug_is_the_union_without_validation(tmp_path: Path) -> None:
    voc(tmp_path)
    place, sbd = tmp_path / "VOCdevkit/VOC2012", tmp_path / "benchmark_RELEASE/dataset"
    lists = {"train": [VOC_LISTS["train"][0], "2009_000009"], "val": [VOC_LISTS["val"][0], "2010_000001"]}
    (sbd / "cls").mkdir(parents=True)
    mask = np.random.default_rng(0).integers(0, 21, (12, 16)).astype(np.uint8)
    for part, names in lists.items():
        (sbd / f"{part}.txt").write_text("\n".join(names))
        for name in names:
            savemat(sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": mask, "Boundaries": 0}})
            save(place / "JPEGImages" / f"{name}.jpg", colour(3))
    names = load_script().merge(sbd, place)
    assert names == [*VOC_LISTS["train"], "2009_000009", "2010_000001"]
    data = Voc("train", root=tmp_path, train_set="trainaug", validation="published")
    assert data.keys == names and (data[len(names) - 1].labels["class"].numpy() == mask).all()
    first = place / "SegmentationClassAug" / f"{names[0]}.png"
    assert first.read_bytes() == (place / "SegmentationClass" / f"{names[0]}.png").read_bytes()
    assert Image.open(first).mode == "P"
