import copy
import functools
import hashlib
import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from errors import UserError
from patches.geometry import DroppedImage, Geometry, plan_geometry
from patches.labels import PatchLabels, label_patches, patch_labels
from patches.selection import owned_patches, primary_label, select_patches
from patches.windows import cut_windows, merge_scores

ROOT = Path(__file__).parent.parent
PROTOCOLS = ("clean", "object_binding_2025", "object_binding_2026")
SHAPES = [(512, 683), (683, 512), (512, 512), (100, 400), (400, 100), (333, 500), (37, 52), (1536, 2048), (96, 97)]


def golden(name: str) -> Any:
    return json.loads((ROOT / "tests" / "golden" / "object_binding" / f"{name}.json").read_text())["data"]


@functools.cache
def protocol_file(name: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.load(ROOT / "cfgs" / "protocol" / f"{name}.yaml"))


def protocol(name: str, **changes: Any) -> dict[str, Any]:
    block = copy.deepcopy(protocol_file(name)["protocol"])
    for key, value in changes.items():
        group, option = key.split("__")
        block[group][option] = value
    return block


def plan(name: str, image_hw: tuple[int, int], patch: int = 14, size: int | tuple = 518, **changes: Any) -> Geometry:
    geometry = protocol(name, **{f"geometry__{key}": value for key, value in changes.items()})["geometry"]
    image_size = (size, size) if isinstance(size, int) else size
    return plan_geometry(image_hw, geometry=geometry, patch_size=patch, image_size=image_size)


def sha256(x: torch.Tensor) -> str:
    return hashlib.sha256(x.numpy().astype("<i8").tobytes()).hexdigest()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------- published values


@pytest.mark.parametrize("case", golden("window_geometry"), ids=lambda c: "x".join(map(str, c["original_hw"])))
def test_windows_of_2025_as_published(case: dict) -> None:
    image_hw = tuple(case["original_hw"])
    kept = plan("object_binding_2025", image_hw, drop=False)
    assert list(kept.scaled) == case["scaled_hw"]
    assert [list(start) for start in kept.starts] == [w["start_yx"] for w in case["label_windows"]]
    left, right, top, bottom = kept.pad
    for window in case["label_windows"]:
        assert [list(kept.window), [top, left, bottom, right]] == [window["size_hw"], window["pad_tlbr"]]
        assert [n * kept.patch for n in kept.grid] == window["padded_hw"]
    if case["derived_image_used"]:
        assert plan("object_binding_2025", image_hw) == kept
    else:
        with pytest.raises(DroppedImage, match=rf"^{case['derived_n_feature_windows']} ") as error:
            plan("object_binding_2025", image_hw)
        assert error.value.reason == str(error.value)


def test_pixels_of_2025_are_rounded_up_where_labels_are_rounded_to_even() -> None:
    geometry = plan("object_binding_2025", (1024, 1705))  # 852.5 wide
    assert (geometry.scaled, geometry.starts) == ((512, 852), ((0, 0), (0, 340)))
    assert (geometry.image_scaled, geometry.image_starts) == ((512, 853), ((0, 0), (0, 341)))


@pytest.mark.parametrize("case", golden("derived")["hf_geometry"], ids=lambda c: str(list(c.values())[:3]))
def test_crops_of_2026_as_published(case: dict) -> None:
    patch, crop, short_side = case["patch"], case["crop"], case["shortest_edge"]
    changes = {"crop": crop, "short_side": short_side}
    geometry = plan("object_binding_2026", tuple(case["original_hw"]), patch, 0, **changes)
    assert list(geometry.scaled) == case["scaled_hw"]
    assert geometry.starts == tuple(itertools.product(case["starts_y"], case["starts_x"]))
    assert len(geometry.starts) == case["n_crops"] and geometry.grid == (case["grid"],) * 2
    assert geometry == plan("object_binding_2026", tuple(case["original_hw"]), patch, crop)  # follows from the backbone


@pytest.mark.parametrize("image_hw", [(320, 480), (480, 320), (20, 700), (64, 64)])
def test_stretch_sees_the_whole_image_in_one_window(image_hw: tuple[int, int]) -> None:
    geometry = plan("clean", image_hw, 14, (28, 42), kind="stretch")
    assert geometry.starts == ((0, 0),) and geometry.scaled == geometry.window == (28, 42) and geometry.grid == (2, 3)
    image = torch.randint(0, 256, (3, *image_hw), generator=generator(), dtype=torch.uint8)
    options = {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "antialias": True}
    (window,) = cut_windows(image, geometry, **options)
    scaled = torch.nn.functional.interpolate(image[None], size=(28, 42), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(window, scaled / 255)
    assert plan("clean", image_hw, 14, 28, kind="stretch").scaled == (28, 28)
    if image_hw[0] == image_hw[1]:
        assert plan("clean", image_hw, 14, 28, kind="stretch") == plan("clean", image_hw, 14, 28)
    with pytest.raises(UserError, match="smaller than a patch of 32"):
        plan("clean", (20, 700), 32, 64, kind="stretch")


@pytest.mark.parametrize("number", range(4))
def test_patch_labels_of_2025_as_published(number: int) -> None:
    case = golden("patch_labels")["cases"][number]
    geometry, labels = plan("object_binding_2025", tuple(case["shape"]), drop=False), protocol("object_binding_2025")["labels"]
    raw = torch.tensor(case["class_mask"])
    class_map = case["class_mapping"] + [0] * (int(raw.max()) + 1)  # the entries beyond those listed are not reached
    maps = {"identity": torch.tensor(case["instance_mask"]), "raw_class": raw, "class_of_raw": torch.tensor(class_map)}
    found = label_patches(maps, geometry, labels=labels)
    for at, window in enumerate(case["windows"]):
        for name, key in (("identity", "instance"), ("class", "class")):
            rle = window[f"{key}_rle"]
            expected = torch.tensor([value for value, run in rle for _ in range(run)])
            assert torch.equal(found[name].label[at].flatten().long(), expected)
            assert sha256(found[name].label[at].long()) == window[f"{key}_sha256_int64"]
        known = torch.tensor(case["instance_mask"]).unique()
        assert int((~torch.isin(found["identity"].label[at], known)).sum()) == window["n_false_id_patches"]


@pytest.mark.parametrize("number", range(4))
def test_patch_labels_of_2026_as_published(number: int) -> None:
    mask = torch.tensor(golden("patch_labels")["cases"][number]["instance_mask"])
    case = golden("derived")["hf_patch_labels_518"]["cases"][number]
    geometry = plan("object_binding_2026", tuple(mask.shape))
    assert [list(start) for start in geometry.starts] == [crop["start_yx"] for crop in case["crops"]]
    found = patch_labels(mask, geometry, labels=protocol("object_binding_2026")["labels"])
    for label, crop in zip(found.label, case["crops"], strict=True):
        assert sha256(label.long()) == crop["sha256_int64"]
        assert {str(i): int((label == i).sum()) for i in label.unique().tolist()} == crop["counts"]


def test_draw_of_2025_as_published() -> None:
    case, rules = golden("patch_labels")["sampling"], protocol("object_binding_2025")
    geometry = plan("object_binding_2025", tuple(case["shape"]))
    identity = patch_labels(torch.tensor(case["instance_mask"]), geometry, labels=rules["labels"])
    position, drawn = select_patches(identity, geometry, selection=rules["selection"], generator=generator(case["torch_seed"]))
    assert drawn.all() and identity.valid[tuple(position.T)].all()
    assert position.dtype == torch.int64 and len(position) == case["num_samples"]
    assert position[:, 0].tolist() == case["window_of_sample"]
    assert (position[:, 1] * 37 + position[:, 2]).tolist() == case["patch_index_of_sample"]
    assert identity.label[tuple(position.T)].tolist() == case["labels"]


@pytest.mark.parametrize("number", range(2))
def test_merged_scores_as_published(number: int) -> None:
    case = golden("merge_scores")[number]
    maps, image_hw = torch.tensor(case["patch_scores"]), tuple(case["image_hw"])
    valid = torch.tensor([bool(m.any()) for m in maps])  # the published program takes an all-zero window as not seen
    merged = merge_scores(maps, valid, plan("object_binding_2025", image_hw), image_hw)
    torch.testing.assert_close(merged, torch.tensor(case["merged"]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("vote", ["area", "bilinear_round", "nearest"])
@pytest.mark.parametrize("case", golden("misc")["mode_ties"], ids=lambda c: str(c["counts"]))
def test_ties_go_to_the_smallest_label(case: dict, vote: str) -> None:
    values = [int(value) for value, n in case["counts"].items() for _ in range(n)]
    geometry = plan("clean", (14, 14), size=14)
    for seed in range(3):
        random.Random(seed).shuffle(values)
        mask = torch.tensor(values).reshape(14, 14)
        found = patch_labels(mask, geometry, labels={"vote": vote, "ignore": []})
        assert found.label.item() == case["mode"]
        assert found.purity.item() == pytest.approx(max(case["counts"].values()) / 196)


# ----------------------------------------------------------------------------------------------------- geometry


def shapes(n: int, seed: int, low: int = 1, high: int = 4000, ratio: int = 40) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    draw = lambda: int(math.exp(rng.uniform(math.log(low), math.log(high))))
    fixed = [(low, low), (low, high), (high, low), (high, high), (high, high - 1)]
    some = [(draw(), draw()) for _ in range(n)]
    return [shape for shape in fixed + some if max(shape) <= ratio * min(shape)]


def test_clean_windows_cover_and_their_owned_patches_tile_every_image() -> None:
    for patch, size in ((14, 518), (16, 224), (8, 96), (16, (128, 224))):
        for height, width in shapes(150, patch, low=16):
            geometry = plan("clean", (height, width), patch, size)
            (rows, columns), (tall, wide) = geometry.scaled, geometry.window
            assert (tall, wide) == (size if isinstance(size, tuple) else (size, size)) and not any(geometry.pad)
            assert rows >= tall and columns >= wide and (rows == tall or columns == wide)
            bend = (rows / height) / (columns / width)
            assert abs(bend - 1) <= patch / 2 / min(rows, columns) + 1e-9
            assert geometry.starts == tuple(sorted(set(geometry.starts)))
            n_windows = math.ceil(rows / tall) * math.ceil(columns / wide)
            assert len(geometry.starts) == n_windows  # the fewest
            times = np.zeros((rows, columns), int)
            for (y, x), mine in zip(geometry.starts, owned_patches(geometry).numpy(), strict=True):
                assert 0 <= y <= rows - tall and 0 <= x <= columns - wide
                times[y : y + tall, x : x + wide] += np.kron(mine, np.ones((patch, patch), int))
            assert (times == 1).all()  # every scaled pixel once


def test_windows_of_2025_are_kept_iff_the_sliding_window_sees_two_and_pad_to_whole_patches() -> None:
    n_kept = 0
    for height, width in shapes(3000, 0, ratio=4000):
        short, long = sorted((height, width))
        n_long = int(long * (512 / short) + 0.5)
        seen = 1 if n_long == 512 else 1 + math.ceil((n_long - 512) / 341)  # slide until the end is seen
        try:
            geometry = plan("object_binding_2025", (height, width))
        except DroppedImage:
            assert seen != 2
            continue
        n_kept += 1
        assert seen == 2 and geometry.pad == (3, 3, 3, 3) and geometry.grid == (37, 37)
        axis = 1 if height < width else 0
        assert geometry.starts[0] == (0, 0) and geometry.starts[1][1 - axis] == 0
        assert geometry.starts[1][axis] == geometry.scaled[axis] - 512 <= 341  # no gap between the two
        assert abs(geometry.image_scaled[axis] - geometry.scaled[axis]) <= 1
    assert n_kept > 100


@pytest.mark.parametrize(("patch", "pad", "grid"), [(14, 3, 37), (16, 0, 32), (8, 0, 64), (15, 6, 35), (30, 14, 18)])
def test_padding_of_2025_generalises(patch: int, pad: int, grid: int) -> None:
    geometry = plan("object_binding_2025", (480, 640), patch)
    assert geometry.pad == (pad, -512 % patch - pad) * 2 and geometry.grid == (grid, grid)


def test_crops_of_2026_cover_all_but_a_few_pixels() -> None:
    for patch, size in ((14, 518), (14, 224), (16, 224)):
        for height, width in shapes(300, 7):
            geometry = plan("object_binding_2026", (height, width), patch, size)
            for axis in (0, 1):
                starts, n = sorted({start[axis] for start in geometry.starts}), geometry.scaled[axis]
                assert starts[0] == 0 and all(b - a <= size for a, b in itertools.pairwise(starts))
                assert 0 <= n - starts[-1] - size <= max(len(starts) - 2, 0)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_owned_patches_of_any_protocol_are_nearest_and_part_or_overlap_by_less_than_a_patch(name: str) -> None:
    for image_hw in ((480, 640), (600, 1000), (900, 620), (100, 160)):
        geometry = plan(name, image_hw, 14, 518 if name == "object_binding_2025" else 224)
        owned, patch = owned_patches(geometry).numpy(), geometry.patch
        assert owned.any((1, 2)).all()
        left, _, top, _ = geometry.pad
        for axis, before in ((0, top), (1, left)):
            spans = set()
            for start, mine in zip(geometry.starts, owned, strict=True):
                index = np.flatnonzero(mine.any(1 - axis))
                first = start[axis] - before + patch * index
                assert mine.sum() == mine.any(0).sum() * mine.any(1).sum()  # a rectangle
                spans.add((int(first[0]), int(first[-1]) + patch))
            spans = sorted(spans)
            assert all(abs(b[0] - a[1]) <= patch for a, b in itertools.pairwise(spans))


def test_bad_geometry_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"image of 13×90 pixels is smaller than a patch of 14×14"):
        plan("clean", (13, 90))
    with pytest.raises(UserError, match=r"image_size=\[100, 100\] is no multiple of the patch size 14"):
        plan("clean", (100, 100), 14, 100)
    with pytest.raises(UserError, match="valid: cover, stretch, two_windows, uniform_crops"):
        plan("clean", (100, 100), kind="tiles")
    with pytest.raises(UserError, match="set protocol.geometry.window, protocol.geometry.stride"):
        plan("clean", (100, 100), kind="two_windows")
    with pytest.raises(UserError, match="leave out window"):
        plan("clean", (100, 100), window=3)
    with pytest.raises(UserError, match="crop=100 has to be a multiple"):
        plan("object_binding_2026", (100, 100), crop=100)
    with pytest.raises(UserError, match="crop=532 has to be .* at most short_side=518"):
        plan("object_binding_2026", (100, 100), crop=532)
    with pytest.raises(UserError, match="needs a square model.image_size"):
        plan("object_binding_2026", (100, 100), 14, (14, 28))


# ------------------------------------------------------------------------------------------------------ windows


def cut(image: torch.Tensor, geometry: Geometry, **changes: Any) -> torch.Tensor:
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic", "antialias": True}
    return cut_windows(image, geometry, **options | changes)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_windows_are_normalised_then_padded(name: str) -> None:
    geometry = plan(name, (480, 640))
    image = torch.tensor([255, 0, 51], dtype=torch.uint8).view(3, 1, 1).expand(3, 480, 640)
    windows = cut(image, geometry)
    h, w = (n * geometry.patch for n in geometry.grid)
    assert windows.shape == (len(geometry.starts), 3, h, w) and windows.dtype == torch.float32
    left, right, top, bottom = geometry.pad
    inner = windows[:, :, top : h - bottom, left : w - right]
    expected = torch.tensor([(1 - 0.5) / 0.2, -0.4 / 0.25, (0.2 - 0.3) / 0.3]).view(3, 1, 1).expand_as(inner)
    torch.testing.assert_close(inner, expected)
    assert int((windows == 0).sum()) == windows.numel() - inner.numel()  # zero is the mean colour


@pytest.mark.parametrize("name", PROTOCOLS)
def test_windows_show_the_place_their_labels_come_from(name: str) -> None:
    """A picture that writes its own labels in grey: the mean of a pure patch is its label."""
    rng, size = np.random.default_rng(0), (300, 420)
    coarse = rng.integers(0, 6, (10, 14))
    identity = torch.from_numpy(np.kron(coarse, np.ones((30, 30), np.int32)).astype(np.int32))
    image = (identity * 40).to(torch.uint8).expand(3, *size)
    geometry, rules = plan(name, size), protocol(name)
    windows = cut(image, geometry, mean=(0, 0, 0), std=(1, 1, 1), antialias=rules["geometry"]["antialias"])
    found = patch_labels(identity, geometry, labels=rules["labels"])
    grey = windows[:, 0].unflatten(2, (-1, 14)).unflatten(1, (-1, 14)).mean((2, 4)) * 255 / 40  # [n_windows, h, w]
    pure = found.purity == 1
    assert pure.float().mean() > 0.25
    torch.testing.assert_close(grey[pure], found.label[pure].float(), atol=0.25, rtol=0)


def test_image_of_the_right_size_is_left_as_it_is() -> None:
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)
    window = cut(image, plan("clean", (96, 96), 8, 96), mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal((window[0] * 255).round().to(torch.uint8), image)


def test_interpolation_of_the_protocol_comes_before_that_of_the_backbone() -> None:
    image = torch.randint(0, 256, (3, 100, 120), dtype=torch.uint8)
    two, cover = plan("object_binding_2025", (100, 120)), plan("clean", (100, 120))
    assert torch.equal(cut(image, two), cut(image, two, interpolation="bilinear"))
    assert not torch.equal(cut(image, cover), cut(image, cover, interpolation="bilinear"))
    with pytest.raises(UserError, match="unknown interpolation 'lanczos'; valid: bilinear, bicubic"):
        cut(image, cover, interpolation="lanczos")


# ------------------------------------------------------------------------------------------------------- labels


def brute_force(mask: torch.Tensor, geometry: Geometry, ignore: list[int]) -> list[tuple[int, float, bool]]:
    """Area vote in fractions, one patch and one pixel after the other."""
    (height, width), (rows, columns), p = mask.shape, geometry.scaled, geometry.patch
    results = []
    for (y, x), r, c in itertools.product(geometry.starts, range(geometry.grid[0]), range(geometry.grid[1])):
        top, left = y + r * p - geometry.pad[2], x + c * p - geometry.pad[0]
        box = [Fraction(top * height, rows), Fraction((top + p) * height, rows)]
        box += [Fraction(left * width, columns), Fraction((left + p) * width, columns)]
        area: dict[int, Fraction] = {}
        for i in range(max(0, math.floor(box[0])), min(height, math.ceil(box[1]))):
            for j in range(max(0, math.floor(box[2])), min(width, math.ceil(box[3]))):
                share = (min(i + 1, box[1]) - max(i, box[0])) * (min(j + 1, box[3]) - max(j, box[2]))
                area[int(mask[i, j])] = area.get(int(mask[i, j]), Fraction()) + share
        whole = sum(area.values())
        area = {label: n for label, n in area.items() if label not in ignore}
        best = min(area, key=lambda label: (-area[label], label), default=None)
        results.append((best or 0, float(area[best] / whole) if area else 0.0, bool(area)))
    return results


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("image_hw", [(23, 31), (40, 25), (16, 16), (9, 14), (61, 47)])
def test_area_vote_is_exact(image_hw: tuple[int, int], name: str) -> None:
    changes = {
        "object_binding_2025": {"window": 18, "stride": 12, "drop": False},
        "object_binding_2026": {"crop": 16, "short_side": 20},
    }
    geometry = plan(name, image_hw, 4 if name != "clean" else 8, 16, **changes.get(name, {}))
    mask = torch.randint(-1, 4, image_hw, generator=generator(sum(image_hw)), dtype=torch.int32)
    for scale in (1, 2000):  # ids far apart are renamed first
        found = patch_labels(mask * scale, geometry, labels={"vote": "area", "ignore": [-scale, 3 * scale]})
        expected = brute_force(mask * scale, geometry, [-scale, 3 * scale])
        assert [(*e[:1], *e[2:]) for e in expected] == list(
            zip(found.label.flatten().tolist(), found.valid.flatten().tolist(), strict=True)
        )
        torch.testing.assert_close(found.purity.flatten(), torch.tensor([e[1] for e in expected]))
        assert (found.label.dtype, found.purity.dtype) == (torch.int32, torch.float32)


def test_votes_of_a_4x4_map_by_hand() -> None:
    mask = torch.tensor([[1, 1, 2, 2], [1, 5, 2, 2], [0, 0, 7, 3], [4, 4, 3, 7]])
    geometry = plan("clean", (4, 4), 2, 4)
    for vote in ("area", "nearest", "bilinear_round"):
        found = patch_labels(mask, geometry, labels={"vote": vote, "ignore": []})
        assert found.label.tolist() == [[[1, 2], [0, 3]]]  # two ties, each to the smaller
        assert found.purity.tolist() == [[[0.75, 1.0], [0.5, 0.5]]]
        found = patch_labels(mask, geometry, labels={"vote": vote, "ignore": [0, 2, 3]})
        assert found.label.tolist() == [[[1, 0], [4, 7]]]
        assert found.purity.tolist() == [[[0.75, 0.0], [0.5, 0.5]]]  # of the whole patch
        assert found.valid.tolist() == [[[True, False], [True, True]]]
    # 4×4 pixels in one patch row of two: columns 0-1 against 2-3, after scaling 3 rows × 6 columns to 2 × 4
    wide = torch.tensor([[1, 1, 1, 2, 2, 2]] * 3)
    found = patch_labels(wide, plan("clean", (3, 6), 2, 2), labels={"vote": "area", "ignore": []})
    assert found.label.flatten().tolist() == [1, 2] and found.purity.flatten().tolist() == [1.0, 1.0]
    five = torch.tensor([[1, 1, 2, 2, 2]] * 2)  # scaled to 2 × 4: the edge lies in the middle of the third pixel
    found = patch_labels(five, plan("clean", (2, 5), 2, 2), labels={"vote": "area", "ignore": []})
    assert found.label.flatten().tolist() == [1, 2] and found.purity.flatten().tolist() == pytest.approx([0.8, 1.0])


def test_nearest_vote_takes_the_floor_and_border_padding_is_background() -> None:
    mask = torch.tensor([[1, 2, 3, 4]] * 4)
    geometry = Geometry((8, 8), ((0, 0),), (8, 8), (0, 0, 0, 0), (8, 8), 1)
    found = patch_labels(mask, geometry, labels={"vote": "nearest", "ignore": []})
    assert found.label[0, 0].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    padded = Geometry((4, 4), ((0, 0),), (4, 4), (1, 1, 1, 1), (2, 2), 3)
    found = patch_labels(torch.ones(4, 4, dtype=torch.int32), padded, labels={"vote": "nearest", "ignore": []})
    assert found.label.eq(0).all() and found.purity.flatten().tolist() == pytest.approx([5 / 9] * 4)
    found = patch_labels(torch.ones(4, 4, dtype=torch.int32), padded, labels={"vote": "area", "ignore": []})
    assert found.label.eq(1).all() and found.purity.eq(1).all()  # only what is image has an area


def test_class_is_mapped_before_or_after_the_vote() -> None:
    """Two raw classes without a class, together the majority: after the vote the third one wins."""
    raw = torch.tensor([[1, 1, 2, 2], [3, 3, 3, 0]])
    class_of_raw = torch.tensor([0, 0, 0, 9])
    maps = {"identity": raw, "class": class_of_raw[raw], "raw_class": raw, "class_of_raw": class_of_raw}
    geometry = Geometry((2, 4), ((0, 0),), (2, 4), (0, 0, 0, 0), (1, 1), 4)._replace(scaled=(4, 4), window=(4, 4))
    rule = {"vote": "nearest", "ignore": []}
    assert label_patches(maps, geometry, labels=rule | {"class_from": "class"})["class"].label.item() == 0
    after = label_patches(maps, geometry, labels=rule | {"class_from": "raw_class"})
    assert after["class"].label.item() == 9 and after["identity"].label.item() == 3
    only = {"class": class_of_raw[raw]}
    assert label_patches(only, geometry, labels=rule | {"class_from": "raw_class"})["class"].label.item() == 0
    with pytest.raises(UserError, match="label 3 is outside the class map of 3 entries"):
        patch_labels(raw, geometry, labels=rule, class_map=[0, 0, 0])
    with pytest.raises(UserError, match="valid: class, raw_class"):
        label_patches(maps, geometry, labels=rule | {"class_from": "name"})
    with pytest.raises(UserError, match="valid: area, bilinear_round, nearest"):
        patch_labels(raw, geometry, labels={"vote": "median", "ignore": []})


# ---------------------------------------------------------------------------------------------------- selection


def flat_labels(geometry: Geometry, share: float, seed: int = 0) -> PatchLabels:
    """Labels 0 or 1..3, the given share of them 0."""
    shape = (len(geometry.starts), *geometry.grid)
    draw = torch.rand(shape, generator=generator(seed))
    label = torch.where(draw < share, 0, torch.randint(1, 4, shape, generator=generator(seed + 1))).int()
    return PatchLabels(label, torch.rand(shape, generator=generator(seed + 2)), torch.ones(shape, dtype=torch.bool))


def select(labels: PatchLabels, geometry: Geometry, name: str = "clean", seed: int = 0, **changes: Any) -> tuple:
    selection = protocol(name)["selection"] | changes
    return select_patches(labels, geometry, selection=selection, generator=generator(seed))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_unique_patches_are_owned_distinct_and_hold_little_background(share: float) -> None:
    geometry = plan("clean", (300, 420), 16, 224)
    labels, owned = flat_labels(geometry, share), owned_patches(geometry)
    position, drawn = select(labels, geometry)
    assert position.shape == (64, 3) and position.dtype == torch.int64 and drawn.all()
    assert len({tuple(p) for p in position.tolist()}) == 64 and owned[tuple(position.T)].all()
    n_background = int((labels.label[tuple(position.T)] == 0).sum())
    n_objects = int((owned & (labels.label > 0)).sum())
    if n_objects >= 48:
        assert n_background <= 16
    else:
        assert 64 - n_background == n_objects  # all objects there are, the rest background
    again, other = select(labels, geometry), select(labels, geometry, seed=1)
    assert torch.equal(again[0], position) and not torch.equal(other[0], position)


def test_every_owned_patch_is_drawn_equally_often() -> None:
    geometry = plan("clean", (32, 48), 8, 32)
    labels = flat_labels(geometry, 0.0)
    count = torch.zeros(labels.label.shape)
    for seed in range(600):
        position, _ = select(labels, geometry, seed=seed, patches=6)
        count[tuple(position.T)] += 1
    assert int((count > 0).sum()) == 24 == int(owned_patches(geometry).sum())
    assert (count[count > 0] - 150).abs().max() < 5 * math.sqrt(150 * 0.75)


def test_too_few_patches_are_marked_and_repeated() -> None:
    geometry = plan("clean", (16, 16), 8, 16)
    labels = flat_labels(geometry, 0.5)
    position, drawn = select(labels, geometry, patches=10)
    assert drawn.tolist() == [True] * 4 + [False] * 6
    assert len({tuple(p) for p in position[:4].tolist()}) == 4 and torch.equal(position[4:8], position[:4])
    none = labels._replace(valid=torch.zeros_like(labels.valid))
    position, drawn = select(none, geometry, patches=3)
    assert not drawn.any() and position.eq(0).all()
    some = labels._replace(valid=torch.tensor([[[True, False], [False, True]]]))
    position, drawn = select(some, geometry, patches=3)
    assert drawn.tolist() == [True, True, False] and {tuple(p[1:]) for p in position.tolist()} == {(0, 0), (1, 1)}


def test_impure_patches_can_be_left_out() -> None:
    geometry = plan("clean", (300, 420), 16, 224)
    labels = flat_labels(geometry, 0.5)
    position, drawn = select(labels, geometry, min_purity=0.8)
    assert (labels.purity[tuple(position[drawn].T)] >= 0.8).all()


def test_all_patches_are_the_owned_ones_in_raster_order() -> None:
    geometry = plan("clean", (300, 420), 16, 224)
    labels = flat_labels(geometry, 0.5)
    labels.valid[0, 2, 3] = False
    position, drawn = select(labels, geometry, patches="all")
    assert len(position) == 14 * 20 and position.tolist() == sorted(position.tolist()) and drawn.all()
    assert position[~labels.valid[tuple(position.T)]].tolist() == [[0, 2, 3]]


@pytest.mark.parametrize(("image_hw", "size", "n_crops"), [((518, 518), 224, 9), ((480, 640), 518, 2), ((100, 399), 518, 4)])
def test_crops_of_2026_share_the_patches(image_hw: tuple[int, int], size: int, n_crops: int) -> None:
    geometry = plan("object_binding_2026", image_hw, 14, size)
    position, drawn = select(flat_labels(geometry, 0.5), geometry, "object_binding_2026")
    counts = position[:, 0].bincount().tolist()
    assert counts == [512 // n_crops] * (n_crops - 1) + [512 - 512 // n_crops * (n_crops - 1)] and drawn.all()
    assert len({tuple(p) for p in position.tolist()}) == 512


def test_crops_of_2026_repeat_patches_only_where_there_are_too_few() -> None:
    geometry = plan("object_binding_2026", (300, 300), 16, 224)  # 9 crops of 196: 56 or 64 each
    position, _ = select(flat_labels(geometry, 0.5), geometry, "object_binding_2026", patches=9 * 200)
    assert position[:, 0].bincount().tolist() == [200] * 9
    assert len({tuple(p) for p in position.tolist()}) < 9 * 196


def test_square_image_in_two_windows_is_owned_once() -> None:
    geometry = plan("object_binding_2025", (300, 300), drop=False)
    assert geometry.starts == ((0, 0), (0, 0))
    assert owned_patches(geometry).sum((1, 2)).tolist() == [37 * 37, 0]


def test_patches_are_selected_by_the_first_label_there_is_or_the_named_one() -> None:
    assert primary_label(["class", "identity"], None) == "identity" and primary_label(["class"], None) == "class"
    assert primary_label(["class", "identity"], "class") == "class"
    with pytest.raises(UserError, match="by=identity and the images have no identity maps, only class; set"):
        primary_label(["class"], "identity")
    with pytest.raises(UserError, match="by=object; valid: identity, class, null"):
        primary_label(["class"], "object")


def test_bad_selection_is_one_sentence() -> None:
    geometry = plan("clean", (32, 32), 8, 32)
    labels = flat_labels(geometry, 0.5)
    for changes, says in (
        ({"patches": 0}, "patches=0 is no number of patches, expected 1 or more, or all"),
        ({"patches": "many"}, "patches=many is no number"),
        ({"kind": "best"}, "valid: unique, replacement_per_window, without_replacement_per_crop"),
        ({"background_share": 1.5}, r"background_share=1\.5 is no share"),
        ({"min_purity": -1}, "min_purity=-1 is no share"),
        ({"max_purity": 1}, "leave out max_purity"),
    ):
        with pytest.raises(UserError, match=says):
            select(labels, geometry, **changes)


# --------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("image_hw", SHAPES, ids=str)
def test_merged_map_of_constant_windows_is_constant(name: str, image_hw: tuple[int, int]) -> None:
    changes = {"drop": False} if name == "object_binding_2025" else {}
    geometry = plan(name, image_hw, 14, 224 if name == "object_binding_2026" else 518, **changes)
    if name == "object_binding_2025" and max(image_hw) > 2 * min(image_hw):
        pytest.skip("two windows do not cover so wide an image")
    maps = torch.full((len(geometry.starts), *geometry.grid), 0.7)
    merged = merge_scores(maps, torch.ones(len(maps), dtype=torch.bool), geometry, image_hw)
    torch.testing.assert_close(merged, torch.full(image_hw, 0.7))


def test_merging_counts_valid_windows_only_even_when_they_are_zero() -> None:
    geometry = plan("clean", (28, 42), 14, 28)
    assert geometry.starts == ((0, 0), (0, 14))
    maps = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)])
    both = merge_scores(maps, torch.tensor([True, True]), geometry, (28, 42))
    assert both[0, [0, 20, 41]].tolist() == [1.0, 0.5, 0.0]  # zero is a score: the overlap is halved
    first = merge_scores(maps, torch.tensor([True, False]), geometry, (28, 42))
    assert first[0, [0, 20, 41]].tolist() == [1.0, 1.0, 0.0]
    assert merge_scores(maps, torch.tensor([False, False]), geometry, (28, 42)).eq(0).all()


def test_merged_map_puts_a_bright_patch_in_its_place() -> None:
    for image_hw in ((200, 200), (150, 380), (400, 120)):
        geometry = plan("clean", image_hw, 16, 224)
        maps = torch.zeros(len(geometry.starts), *geometry.grid)
        window = len(geometry.starts) - 1
        maps[window, 4, 9] = 1.0
        valid = torch.zeros(len(maps), dtype=torch.bool)
        valid[window] = True
        merged = merge_scores(maps, valid, geometry, image_hw)
        found = torch.tensor(np.unravel_index(int(merged.argmax()), image_hw))
        start = geometry.starts[window]
        centre = torch.tensor([(start[a] + (i + 0.5) * 16) * image_hw[a] / geometry.scaled[a] for a, i in enumerate((4, 9))])
        assert (found + 0.5 - centre).abs().max() <= 2


# --------------------------------------------------------------------------------------------------- protocols


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol_files_are_complete(name: str) -> None:
    block = protocol(name)
    assert block["name"] == name
    assert list(block) == ["name", "geometry", "labels", "selection", "pairs"]
    assert {"by", "patches", "per_visit", "seed", "kind"} <= set(block["selection"])
    defaults = OmegaConf.load(ROOT / "cfgs" / "config.yaml")
    whole = OmegaConf.load(ROOT / "cfgs" / "protocol" / f"{name}.yaml")
    for group in set(whole) - {"protocol"}:
        assert set(whole[group]) <= set(defaults[group])  # overrides of what exists, no new keys
