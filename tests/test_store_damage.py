"""A cache is never believed: every flipped byte and every edited entry is refused by name, or changes nothing."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import toy_config

import store.shards
from activation import PatchSample, open_sample
from errors import UserError
from files import sealed

SIZES = ["cache.shard_images=4", "dataset.widths=[32,56]", "model.layers=[embed,1]"]


def opened(folder: Path, *overrides: str) -> PatchSample:
    return open_sample(toy_config(folder, *SIZES, *overrides), "train", say=lambda text: None)


def content(sample: PatchSample) -> list[torch.Tensor]:
    labels = [sample.labels[name] for name in sorted(sample.labels)]
    return [sample.tokens.gather(range(len(sample.keys))), sample.position, sample.grids, *labels]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    opened(folder)
    return folder


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "cache")


def refused_or_equal(cache: Path, file: Path, expected: PatchSample) -> bool:
    """Whether a cache with one damaged file is refused by name; else it gives what the whole one gives."""
    try:
        sample = opened(cache)
    except UserError as error:
        text = str(error)
        assert str(file) in text or f"{file.parent} holds another configuration" in text, text
        assert "delete" in text and "\n" not in text, text
        return True
    assert sample.keys == expected.keys
    assert all(torch.equal(a, b) for a, b in zip(content(sample), content(expected), strict=True)), file
    return False


def files_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file() and "lock" not in path.name)


def test_every_flipped_byte_is_refused_or_changes_nothing(whole: Path, cache: Path) -> None:
    expected, draw, n_refused = opened(whole), random.Random(0), 0
    for file in files_of(cache):
        good = file.read_bytes()
        flips = draw.sample(range(len(good)), min(6, len(good)))  # a lock has no bytes
        for at in flips:
            bad = bytearray(good)
            bad[at] ^= 1 << draw.randrange(8)
            file.write_bytes(bad)
            refused = refused_or_equal(cache, file, expected)
            assert refused or file.suffix == ".json", (file, at)
            n_refused += refused
            file.write_bytes(good)
    assert n_refused > 60
    assert opened(cache).keys == expected.keys


EDITS: dict[str, Callable[[dict], Any]] = {
    "shard_images": lambda m: m.update(shard_images=-6),
    "shard_images 0": lambda m: m.update(shard_images=0),
    "shard_images text": lambda m: m.update(shard_images="4"),
    "shard_images large": lambda m: m.update(shard_images=10**9),
    "shards": lambda m: m.update(shards=1),
    "images": lambda m: m.update(images=5),
    "images true": lambda m: m.update(images=True),
    "dim": lambda m: m.update(dim=8),
    "tokens": lambda m: m.update(tokens_per_image=None),
    "facts": lambda m: m.update(facts=[]),
    "facts.norm": lambda m: m.get("facts", {}).update(norm=True),
    "digest": lambda m: m.update(digest="0"),
    "empty": lambda m: m.clear(),
    "keys empty": lambda m: m.update(keys=[]),
    "keys shortened": lambda m: m.update(keys=m.get("keys", [])[:-1]),
    "keys text": lambda m: m.update(keys="x" * 10),
    "keys numbers": lambda m: m.update(keys=list(range(10))),
    "dropped": lambda m: m.update(dropped=[1]),
    "skipped": lambda m: m.update(skipped=[["a"]]),
    "sha256": lambda m: m.update(sha256=7),
    "layers": lambda m: m.update(layers=[]),
    "a layer": lambda m: m.update(layers={"embed": 5}),
    "a size": lambda m: m.update(layers={"embed": {"bytes": 1, "sha256": "0"}}),
    "store": lambda m: m.update(store="0" * 16),
}


@pytest.mark.parametrize("seal", [False, True], ids=["digest as it was", "digest made anew"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_entry_is_refused_or_changes_nothing(whole: Path, cache: Path, edit: str, seal: bool) -> None:
    expected = opened(whole)
    for pattern in ("tokens/*/manifest.json", "tokens/*/shards/00001.json", "index/*/manifest.json"):
        (file,) = cache.glob(pattern)
        text = file.read_text()
        entries = json.loads(text)
        EDITS[edit](entries)
        changed = entries != json.loads(text)
        if seal:  # somebody who knows how a digest is made: what does not fit the rest is refused all the same
            entries.pop("check", None)
        file.write_text(sealed(entries) if seal else json.dumps(entries))
        refused = refused_or_equal(cache, file, expected)
        assert refused == changed or (seal and not refused), (pattern, edit)
        file.write_text(text)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", '{"facts": ' * 50_000, "\x00", None])
def test_what_is_no_object_is_named_and_repaired(whole: Path, cache: Path, text: str | None) -> None:
    expected = opened(whole)
    for pattern in ("tokens/*/manifest.json", "tokens/*/shards/00001.json", "index/*/manifest.json"):
        (file,) = cache.glob(pattern)
        file.unlink()
        file.mkdir() if text is None else file.write_text(text)
        assert refused_or_equal(cache, file, expected)
        if text is None:
            file.rmdir()
        again = opened(cache, "cache.repair=true")
        assert all(torch.equal(a, b) for a, b in zip(content(again), content(expected), strict=True))


def test_a_record_of_another_store_is_refused(cache: Path, tmp_path: Path) -> None:
    opened(tmp_path / "other", "model.seed=1")
    files = (sorted(folder.glob("tokens/*/*/00001.*")) for folder in (cache, tmp_path / "other"))
    for ours, theirs in zip(*files, strict=True):
        shutil.copy(theirs, ours)
    with pytest.raises(UserError, match="00001.json is of another store or shard, delete it or set cache.repair"):
        opened(cache)


def test_caches_of_the_version_before_are_left_alone(whole: Path, cache: Path) -> None:
    for file in cache.rglob("manifest.json"):
        entries = json.loads(file.read_text())
        entries.pop("check")
        file.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="its checksum differs"):
        opened(cache)


def test_paths_that_are_no_folders_are_named(tmp_path: Path, cache: Path) -> None:
    for name in ("tokens", "index"):
        shutil.rmtree(cache / name)
        (cache / name).write_text("")
        with pytest.raises(UserError, match=f"{cache / name} is a file where a folder belongs; .* set cache.dir to another"):
            opened(cache)
        (cache / name).unlink()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, reason in ((tmp_path / "loop", "symbolic links"), (tmp_path / ("x" * 300), "name too long")):
        with pytest.raises(UserError, match=f"{path} cannot be a folder .*{reason}.*; set cache.dir to another one"):
            opened(path)


def test_a_file_that_is_a_folder_or_a_loop_is_named(cache: Path) -> None:
    for pattern in ("tokens/*/layer_01/00001.safetensors", "index/*/index.safetensors"):
        (file,) = cache.glob(pattern)
        data = file.read_bytes()
        file.unlink()
        file.mkdir()
        with pytest.raises(UserError, match=str(file)):
            opened(cache)
        file.rmdir()
        file.write_bytes(data)


def test_long_names_are_cut_so_that_every_file_system_takes_them(tmp_path: Path) -> None:
    sample = opened(tmp_path, f"protocol.name={'x' * 300}")
    assert max(len(path.name) for path in tmp_path.rglob("*")) <= 200 and len(sample.keys) == 10


def test_activations_larger_than_memory_are_read_through_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = store.shards._fault
    monkeypatch.setattr(store.shards, "_fault", lambda file, *rest: read.append(rest[-1]) or real(file, *rest))
    large = "cache.ram_gb=0"
    opened(cache, large)
    n_files = len(read)
    assert n_files > 4 and all(read)  # the fixture is a copy: other inodes than those that were written
    read.clear()
    opened(cache, large)
    assert read == [False] * n_files
    read.clear()
    opened(cache, large, "cache.verify=true")
    assert read == [True] * n_files
    # An edit that keeps the size is seen by the time of change, and so is one that is put back in another file.
    (file,) = cache.glob("tokens/*/layer_01/00001.safetensors")
    good, before = file.read_bytes(), file.stat()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"layer_01/00001.safetensors is damaged \(its checksum differs\)"):
        opened(cache, large)
    file.write_bytes(good)
    opened(cache, large)
    bad = file.with_name("aside")
    bad.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    os.utime(bad, ns=(before.st_atime_ns, file.stat().st_mtime_ns))
    bad.replace(file)  # of the same size and time of change
    with pytest.raises(UserError, match="its checksum differs"):
        opened(cache, large)


def test_what_was_just_written_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path, "cache.ram_gb=0")
    monkeypatch.setattr(hashlib, "file_digest", None)
    opened(tmp_path, "cache.ram_gb=0")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"1": 5}', sealed({"1": [0, 0, 0]}), None])
def test_notes_on_checked_files_may_be_lost(whole: Path, cache: Path, text: str | None) -> None:
    expected = opened(whole)
    for file in cache.glob("tokens/*/checked/*.json"):
        file.unlink()
        file.mkdir() if text is None else file.write_text(text)
    (token,) = cache.glob("tokens/*/layer_01/00001.safetensors")
    sample = opened(cache, "cache.ram_gb=0")
    assert all(torch.equal(a, b) for a, b in zip(content(sample), content(expected), strict=True))
    data = token.read_bytes()
    token.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="its checksum differs"):
        opened(cache, "cache.ram_gb=0")
