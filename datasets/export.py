"""Writing a data set of codes to disk, and reading it back.

    python main.py mode=export_data dataset=balancedcolorshape export.dir=data/exported
    python main.py mode=train_binding dataset=exported dataset.root=data/exported/balancedcolorshape

One directory per split, `dataset_<split>_seed<seed>`:

    images/sample_000000.png    the image at its native resolution (the published export stores it resized)
    image_metadata.jsonl        a line per image: index, key, Y, F, H_Y_given_F, extras such as boxes and num_objects
    codes.safetensors           object_code [M, K], feature_code [M, n] uint8, H_Y_given_F [M] float32 bits
    metadata.json               groups, prior of Y, constants, facts, what it was made from; "complete" once all is there

Images are written aside and renamed; a second call writes only what is missing.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch.utils.data import DataLoader

from datasets.codes import CodeScenes, Groups
from datasets.listings import data_root, file_fingerprint, inside
from datasets.metadata import Entry, read_json
from datasets.pictures import read_image
from datasets.scene import Scene, UnreadableScene, build, check_choice
from datasets.splits import split_name, split_report
from errors import UserError
from files import write_atomically
from runs.progress import stage, stages, track

FORMAT = 1
REDO = "delete it and export again"


def run(cfg: Any, run: Any) -> dict[str, Any]:
    """Entry of `mode=export_data`: export the splits, print what a reader must know before comparing them."""
    labels = {}
    stages(*cfg.export.splits)
    for split in cfg.export.splits:
        stage(split)
        dataset = build(cfg.dataset, split)
        directory = export(dataset, cfg.export.dir, workers=cfg.export.workers)
        labels[split] = _labels(dataset)
        run.say(f"{split}: {len(dataset)} images in {directory}")
    report = split_report(labels)
    for warning in report["warnings"]:
        run.say(f"warning: {warning}")
    for split, facts in report["splits"].items():
        run.write({"kind": "export", "split": split, **facts})
    return {"report": report}


def export(dataset: Any, directory: str | os.PathLike, *, workers: int = 0) -> Path:
    """Write one split of a data set of codes; returns its directory `<directory>/<data set>/dataset_<split>_...`.

    workers: processes that draw and compress images; 0 does it here. The result does not depend on it.

    Raises:
        UserError: the data set has no codes, the directory holds another data set, an image is unreadable (unless the
            data set skips those), the disk refuses.
    """
    if not isinstance(dataset, CodeScenes):
        raise UserError(
            f"mode=export_data writes data sets of object and feature codes, got {type(dataset).__name__}; choose one such "
            "as dataset=colorshape"
        )
    fingerprint = json.loads(json.dumps(dataset.fingerprint()))
    seed = f"_seed{fingerprint['seed']}" if "seed" in fingerprint else ""
    target = Path(directory) / str(fingerprint["dataset"]) / f"dataset_{dataset.split}{seed}"
    try:
        (target / "images").mkdir(parents=True, exist_ok=True)
        return _export(dataset, target, fingerprint, workers)
    except OSError as error:
        raise UserError(f"cannot export to {target}: {error.strerror}; set export.dir=…") from error


def _export(dataset: CodeScenes, target: Path, fingerprint: dict, workers: int) -> Path:
    header = {"format": FORMAT, "complete": False, "fingerprint": fingerprint}
    if (target / "metadata.json").exists():
        if read_json(target / "metadata.json", damaged=REDO).key("fingerprint").value != fingerprint:
            raise UserError(f"{target} holds a data set made with other settings; choose another export.dir or delete it")
    else:
        write_atomically(target / "metadata.json", json.dumps(header))
    writer = _Writer(dataset, target / "images")
    loader = DataLoader(writer, batch_size=None, num_workers=int(workers))
    rows, unreadable = [], []
    for index, key, reason in track(loader, "writing", "image", len(dataset)):
        if reason is None:
            rows.append((index, key))
        elif dataset.on_error == "skip":
            unreadable.append([key, reason])
        else:
            raise UnreadableScene(key, reason)
    kept = np.array([index for index, _ in rows], np.int64)
    if not len(kept):
        raise UserError(f"{target}: no image of the data set can be read, first: {': '.join(unreadable[0])}")
    labels = {name: values[kept] for name, values in _labels(dataset).items()}
    lines = (json.dumps(_row(dataset, labels, row, index, key)) for row, (index, key) in enumerate(rows))
    write_atomically(target / "image_metadata.jsonl", "".join(f"{line}\n" for line in lines))
    write_atomically(target / "codes.safetensors", save(labels))
    facts = {
        "groups": dataset.groups.names,
        "prior": dataset.prior_name,
        "info": dataset.info(),
        "report": dataset.report(),
        "keys": [key for _, key in rows],
        "files": [_file(index) for index, _ in rows],
        "unreadable": unreadable,
    }
    write_atomically(target / "metadata.json", json.dumps(header | facts | {"complete": True}, indent=1))
    return target


class Exported(CodeScenes):
    """A split written by `export`.

    Args:
        split: "train", "val" or "test".
        root: the directory that holds `dataset_<split>_seed<seed>`.
        on_error: "raise" or "skip", for the caller: unreadable images raise `UnreadableScene` either way.

    Raises:
        UserError: no such split, several, or one whose export did not end.
    """

    def __init__(self, split: str, *, root: str, on_error: str = "raise") -> None:
        self.split, self.on_error = split_name(split), on_error
        check_choice("on_error", on_error, ("raise", "skip"))
        folder = data_root(root, "one written by mode=export_data")
        places = sorted(folder.glob(f"dataset_{self.split}*/metadata.json"))
        if len(places) != 1:
            raise UserError(
                f"dataset.root={root}: expected one exported split dataset_{self.split}_…/metadata.json, got "
                f"{len(places) or 'none'}; write one with mode=export_data"
            )
        self.directory = places[0].parent
        meta = read_json(places[0], damaged=REDO)
        if meta.key("format").value != FORMAT or meta.key("complete").value is not True:
            raise UserError(f"{self.directory}: the export is not complete; repeat its command, images already there are kept")
        self._read_metadata(meta)
        self._read_codes([group.different() for group in meta.key("groups").each()], meta)

    def _read_metadata(self, meta: Entry) -> None:
        """Take over names and facts, each checked."""
        self.keys = [entry.text() for entry in meta.key("keys").each()]
        self.files = [entry.text() for entry in meta.key("files").each(len(self.keys))]
        if len(set(self.keys)) != len(self.keys):
            raise UserError(f"{meta.key('keys').place}: got the same key twice, expected each once; {REDO}")
        for entry in meta.key("files").each():
            inside(self.directory / "images", entry.text(), entry.place)
        self._info = {name: entry.number() for name, entry in meta.key("info").items()}
        self._report = {name: entry.value for name, entry in meta.key("report").items()}
        self._origin = {name: entry.value for name, entry in meta.key("fingerprint").items()}

    def _read_codes(self, groups: list[list[str]], meta: Entry) -> None:
        """Load the codes; they must be of the groups and the length that the metadata say."""
        path = self.directory / "codes.safetensors"
        try:
            codes = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); {REDO}") from None
        self.groups = Groups(groups)
        n, shapes = len(self.keys), {"object_code": self.groups.n_objects, "feature_code": self.groups.n_features}
        for name, width in shapes.items():
            code = codes.get(name)
            if code is None or code.dtype != np.uint8 or code.shape != (n, width) or (code > 1).any():
                raise UserError(f"{path}: expected {name} of 0 and 1, [{n}, {width}] uint8, as metadata.json says; {REDO}")
        entropy = codes.get("H_Y_given_F")
        if entropy is None or entropy.dtype != np.float32 or entropy.shape != (n,) or not np.isfinite(entropy).all():
            raise UserError(f"{path}: expected H_Y_given_F of finite numbers, [{n}] float32; {REDO}")
        self.set_codes(self.groups, codes["object_code"], meta.key("prior").text(), entropy)
        if not np.array_equal(self.feature_code, codes["feature_code"]):
            raise UserError(f"{path}: feature_code does not follow from object_code and the groups of metadata.json; {REDO}")

    def __getitem__(self, index: int) -> Scene:
        """Scene `index` as it was exported: image [3, H, W] uint8, the three labels, the same key."""
        index = self.position(index)
        image = read_image(self.directory / "images" / self.files[index], self.keys[index])
        return Scene(image, self.labels(index), self.keys[index])

    def info(self) -> dict[str, float]:
        """The constants of the data set that was exported, bits."""
        return dict(self._info)

    def report(self) -> dict[str, Any]:
        """The facts of the data set that was exported."""
        return self._report | {"source": str(self.directory)}

    def fingerprint(self) -> dict[str, Any]:
        """What was exported, and the images as they lie on disk now (size and time of every file)."""
        files = file_fingerprint(self.directory / "images", self.files)
        return {"dataset": "exported", "split": self.split, "of": self._origin, **files}


class _Writer:
    """A map-style data set whose item `i` is the deed of writing image `i`: (index, key, reason it failed or None)."""

    def __init__(self, dataset: CodeScenes, images: Path) -> None:
        self.dataset, self.images = dataset, images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, str, str | None]:
        path = self.images / _file(index)
        if path.exists():
            return index, self.dataset.key(index), None
        try:
            scene = self.dataset[index]
        except UnreadableScene as error:
            return index, error.key, error.reason
        png = io.BytesIO()
        Image.fromarray(scene.image.permute(1, 2, 0).numpy()).save(png, format="PNG")
        write_atomically(path, png.getvalue())
        return index, scene.key, None


def _labels(dataset: CodeScenes) -> dict[str, np.ndarray]:
    return {
        "object_code": dataset.object_code,
        "feature_code": dataset.feature_code,
        "H_Y_given_F": dataset.entropy,
    }


def _row(dataset: CodeScenes, labels: Mapping[str, np.ndarray], row: int, index: int, key: str) -> dict[str, Any]:
    return {
        "index": index,
        "key": key,
        "file": f"images/{_file(index)}",
        "Y": labels["object_code"][row].tolist(),
        "F": labels["feature_code"][row].tolist(),
        "H_Y_given_F": float(labels["H_Y_given_F"][row]),
        **dataset.details(index),
    }


def _file(index: int) -> str:
    return f"sample_{index:06d}.png"
