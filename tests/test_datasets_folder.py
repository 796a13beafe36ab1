import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from datasets.folder import Folder
from datasets.listings import place_by_hash
from datasets.pictures import read_image, read_label_map
from datasets.scene import UnreadableScene, build
from errors import UserError

CONFIG = Path(__file__).parent.parent / "cfgs" / "dataset" / "folder.yaml"


def write(root: Path, key: str, identity: np.ndarray, ending: str = ".png", classes: np.ndarray | None = None) -> np.ndarray:
    """One image with its maps; returns the pixels [H, W, 3] (losslessly kept by .png)."""
    rng = np.random.default_rng(len(key))
    pixels = rng.integers(0, 256, (*identity.shape, 3)).astype(np.uint8)
    for kind, name, data in (
        ("images", f"{key}{ending}", pixels),
        ("identity", f"{key}.png", identity),
        ("class", f"{key}.png", classes),
    ):
        if data is not None:
            path = root / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data).save(path)
    return pixels


def all_train(root: Path, **knobs) -> Folder:
    return Folder("train", root=root, **{"val_fraction": 0.0, "test_fraction": 0.0, **knobs})


def map_of(values: list[int], dtype: type = np.uint8, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    return np.resize(np.array(values, dtype), size)


@pytest.mark.parametrize(("dtype", "highest"), [(np.uint8, 255), (np.uint16, 255), (np.uint16, 60000)])
def test_identity_of_8_and_16_bit(tmp_path: Path, dtype: type, highest: int) -> None:
    identity = map_of([0, 1, 2, highest], dtype)
    pixels = write(tmp_path, "a", identity)
    data = all_train(tmp_path)
    scene = data[0]
    assert scene.key == "a" and scene.image.dtype == torch.uint8
    assert (scene.image.permute(1, 2, 0).numpy() == pixels).all()
    assert scene.labels["identity"].dtype == torch.int32
    assert (scene.labels["identity"].numpy() == identity).all()
    assert data.classes == ["background", "object"]
    assert (scene.labels["class"].numpy() == (identity > 0)).all() and scene.labels["class"].dtype == torch.int32


def test_palette_identity_is_read_by_index(tmp_path: Path) -> None:
    identity = map_of([0, 1, 2])
    write(tmp_path, "a", identity)
    picture = Image.fromarray(identity).convert("P")
    picture.putdata(identity.ravel().tolist())
    picture.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
    picture.save(tmp_path / "identity" / "a.png")
    assert Image.open(tmp_path / "identity" / "a.png").mode == "P"
    assert (all_train(tmp_path)[0].labels["identity"].numpy() == identity).all()


@pytest.mark.parametrize("ending", [".jpg", ".JPEG", ".png", ".webp", ".bmp", ".tif"])
def test_image_formats(tmp_path: Path, ending: str) -> None:
    write(tmp_path, "a", map_of([0, 1]), ending)
    assert all_train(tmp_path)[0].image.shape == (3, 12, 16)


def test_class_maps_and_names(tmp_path: Path) -> None:
    identity, classes = map_of([0, 1, 2]), map_of([0, 2, 1])
    write(tmp_path, "a", identity, classes=classes)
    with pytest.raises(UserError, match="classes.txt is missing"):
        all_train(tmp_path)
    for text in ("cat\ndog\n", "background\ncat\n\n dog \n", "\ufeffUnlabelled\ncat\ndog"):
        (tmp_path / "classes.txt").write_text(text, encoding="utf-8")
        data = all_train(tmp_path)
        assert data.classes == ["background", "cat", "dog"]
        assert (data[0].labels["class"].numpy() == classes).all()
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(UnreadableScene, match="class 2, but .*names 1 classes"):
        all_train(tmp_path)[0]
    (tmp_path / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(UserError, match="each class once"):
        all_train(tmp_path)


def test_ignored_pixels_become_minus_one(tmp_path: Path) -> None:
    identity, classes = map_of([0, 1, 2, 255]), map_of([0, 1, 255, 255])
    write(tmp_path, "a", identity)
    labels = all_train(tmp_path, ignore=255)[0].labels
    assert labels["identity"].unique().tolist() == [-1, 0, 1, 2] and labels["class"].unique().tolist() == [-1, 0, 1]
    write(tmp_path, "a", identity, classes=classes)
    (tmp_path / "classes.txt").write_text("cat")
    data = all_train(tmp_path, ignore=255)
    assert (data[0].labels["class"].numpy() == np.where(classes == 255, -1, classes.astype(int))).all()
    assert data.fingerprint() != all_train(tmp_path).fingerprint()
    with pytest.raises(UserError, match="ignore"):
        all_train(tmp_path, ignore=0)


def test_split_folders_are_the_splits(tmp_path: Path) -> None:
    for key in ("train/b", "train/deep/a", "val/c"):
        write(tmp_path, key, map_of([0, 1]))
    assert Folder("train", root=tmp_path).keys == ["train/b", "train/deep/a"]
    assert Folder("val", root=tmp_path)[0].key == "val/c"
    with pytest.raises(UserError, match="split test: none of the 3 images"):
        Folder("test", root=tmp_path)
    write(tmp_path, "loose", map_of([0, 1]))
    with pytest.raises(UserError, match="loose.png lies outside the folders train, val and test"):
        Folder("train", root=tmp_path)


def test_hash_split_is_a_partition_and_stable(tmp_path: Path) -> None:
    for i in range(60):
        write(tmp_path, f"scene {i}", map_of([0, 1], size=(2, 2)))
    splits = {s: Folder(s, root=tmp_path, val_fraction=0.25, test_fraction=0.25).keys for s in ("train", "val", "test")}
    assert sorted(sum(splits.values(), [])) == sorted(f"scene {i}" for i in range(60))
    assert all(8 <= len(splits[s]) <= 22 for s in ("val", "test"))
    write(tmp_path, "a new one", map_of([0, 1], size=(2, 2)))
    after = Folder("val", root=tmp_path, val_fraction=0.25, test_fraction=0.25)
    assert [key for key in after.keys if key != "a new one"] == splits["val"]
    other = Folder("val", root=tmp_path, val_fraction=0.25, test_fraction=0.25, split_seed=1)
    assert other.keys != after.keys
    assert len(Folder("train", root=tmp_path, limit=5)) == 5


def test_hash_split_has_the_asked_shares() -> None:
    placed = [place_by_hash(f"{i}", 0.1, 0.2, 0) for i in range(20000)]
    assert abs(placed.count("val") / 20000 - 0.1) < 0.01 and abs(placed.count("test") / 20000 - 0.2) < 0.01


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    write(tmp_path, "a", map_of([0, 1]))
    first = all_train(tmp_path).fingerprint()
    assert all_train(tmp_path).fingerprint() == first and first["files"] == 2
    write(tmp_path, "a", map_of([0, 1, 2, 3, 4, 5, 6, 7, 8]))
    second = all_train(tmp_path).fingerprint()
    write(tmp_path, "b", map_of([0, 1]))
    assert len({d["digest"] for d in (first, second, all_train(tmp_path).fingerprint())}) == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "identity/b.png").unlink(), "identity/b.png is missing"),
        (lambda root: (root / "identity/b.png").write_bytes(b"\x89PNG broken"), "identity/b.png"),
        (lambda root: cut(root / "identity/b.png"), "identity/b.png is truncated or damaged"),
        (lambda root: cut(root / "images/b.jpg"), "images/b.jpg is truncated or damaged"),
        (lambda root: (root / "images/b.jpg").write_bytes(b""), "images/b.jpg is not a picture"),
        (lambda root: Image.new("L", (16, 13)).save(root / "identity/b.png"), "16x13 pixels, its image 16x12"),
        (lambda root: Image.new("RGB", (16, 12)).save(root / "identity/b.png"), "mode RGB, expected one channel"),
        (lambda root: Image.new("F", (16, 12)).save(root / "images/b.jpg", "TIFF"), "floating-point"),
    ],
)
def test_damaged_scene_is_named(tmp_path: Path, damage, message: str) -> None:
    rng = np.random.default_rng(0)
    for key in ("a", "b"):
        write(tmp_path, key, rng.integers(0, 9, (12, 16)).astype(np.uint8), ".jpg")
    damage(tmp_path)
    data = all_train(tmp_path)
    assert data[0].key == "a"
    with pytest.raises(UnreadableScene, match=message) as caught:
        data[1]
    assert caught.value.key == "b" and "\n" not in str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_wrong_layouts_and_knobs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="images is missing"):
        Folder("train", root=tmp_path)
    with pytest.raises(UserError, match="no folder"):
        Folder("train", root=tmp_path / "nowhere")
    write(tmp_path, "a", map_of([0, 1]))
    for knobs, message in (
        ({"split": "dev"}, "train, val, test"),
        ({"on_error": "pass"}, "raise or skip"),
        ({"val_fraction": 0.7, "test_fraction": 0.7}, "val_fraction"),
        ({"limit": 0.5}, "limit"),
        ({"val_fraction": 0.0, "split": "val"}, "split val: none of the 1 images"),
    ):
        with pytest.raises(UserError, match=message):
            Folder(**{"split": "train", "root": tmp_path, **knobs})
    write(tmp_path, "a", map_of([0, 1]), ".jpg")
    with pytest.raises(UserError, match="share a name"):
        Folder("train", root=tmp_path)


def test_exif_orientation_is_followed(tmp_path: Path) -> None:
    write(tmp_path, "a", map_of([0, 1], size=(16, 12)), ".jpg")
    picture = Image.new("RGB", (16, 12))
    picture.paste((255, 0, 0), (0, 0, 16, 6))  # upper half red; turned a quarter to the right: right half
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "images" / "a.jpg", exif=exif, quality=95)
    image = all_train(tmp_path)[0].image
    assert image.shape == (3, 16, 12) and image[0, :, 8:].min() > 200 and image[0, :, :4].max() < 50


def test_pixel_formats(tmp_path: Path) -> None:
    ramp = (np.arange(256).reshape(16, 16) * 257).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "grey16.png")
    image = read_image(tmp_path / "grey16.png", "x")
    assert image.shape == (3, 16, 16) and (image[2].numpy() == ramp // 257).all()
    for mode in ("L", "RGBA", "LA", "CMYK", "1"):
        Image.new(mode, (5, 4)).save(path := tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
        assert read_image(path, "x").shape == (3, 4, 5)
    Image.new("1", (5, 4), 1).save(tmp_path / "mask.png")
    assert read_label_map(tmp_path / "mask.png", "x").unique().tolist() == [1]


def test_config_file_builds_it(tmp_path: Path) -> None:
    write(tmp_path, "train/a", map_of([0, 1]))
    cfg = OmegaConf.merge(OmegaConf.load(CONFIG), {"root": str(tmp_path)})
    assert len(build(cfg, "train")) == 1


def test_class_maps_alone_are_enough(tmp_path: Path) -> None:
    classes = map_of([0, 1, 2, 255])
    write(tmp_path, "a", map_of([0, 0]), classes=classes)
    shutil.rmtree(tmp_path / "identity")
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    data = all_train(tmp_path, ignore=255)
    labels = data[0].labels
    assert set(labels) == {"class"} and data.report()["maps"] == ["class"]
    assert (labels["class"].numpy() == np.where(classes == 255, -1, classes.astype(int))).all()
    (tmp_path / "class" / "a.png").unlink()
    with pytest.raises(UnreadableScene, match="class/a.png is missing"):
        data[0]
    (tmp_path / "identity").mkdir()
    with pytest.raises(UnreadableScene, match="identity/a.png is missing"):
        all_train(tmp_path)[0]
