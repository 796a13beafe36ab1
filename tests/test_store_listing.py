"""mode=cache: what is listed is what lies there, and nothing that is in use goes."""

import gc
import json
import os
import time
from pathlib import Path

import pytest
from program import Finished, run
from toys import toy_config

from activation import open_sample
from errors import UserError
from files import lock
from store.listing import Limit, entries, hold, in_use, read_limit, remove, table, too_many

DAY = 86400.0


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Tokens and labels of two splits, used 40 and 10 days ago."""
    folder = tmp_path / "cache"
    for split, days in (("train", 40), ("test", 10)):
        open_sample(toy_config(folder), split, say=lambda text: None)
        gc.collect()
        for file in folder.glob(f"*/*-{split}-*/used"):
            os.utime(file, (time.time() - days * DAY,) * 2)
    return folder


def command(cache: Path, *options: str) -> tuple[str, Finished]:
    finished = run(cache.parent, "mode=cache", f"cache.dir={cache}", "wandb.mode=disabled", *options)
    return (finished.dir / "log.txt").read_text(), finished


def names(folder: Path) -> set[tuple[str, str]]:
    return {(entry.kind, entry.data) for entry in entries(folder)}


def test_entries_are_what_lies_there(cache: Path) -> None:
    found = entries(cache)
    assert [entry.data for entry in found] == ["Toy-test"] * 2 + ["Toy-train"] * 2, "the newest first"
    for entry in found:
        files = [path.stat().st_size for path in entry.directory.rglob("*") if path.is_file()]
        assert entry.bytes == sum(files) and entry.images == 10 and not entry.state
        named = entry.model, entry.weights, entry.layers
        assert named == (("vit_tiny_patch16_224", "random weights 0", 3) if entry.kind == "tokens" else ("", "", 0))
    assert {round((time.time() - entry.used) / DAY) for entry in found} == {10, 40}
    tokens, index = (next(entry.directory for entry in found if entry.kind == kind) for kind in ("tokens", "index"))
    (tokens / "shards" / "00000.json").unlink()
    (index / "manifest.json").write_text("{")
    assert {entry.state for entry in entries(cache)} == {"", "unfinished", "damaged"}


@pytest.mark.parametrize(("weights", "words"), [
    ("none", ""), ("random:3", "random weights 3"), ("sha256:59fc92678db5", "weights 59fc9267"),
    ("hub:timm/vit:positions=hub", "weights hub:timm/vit:positions=hub"),
])  # fmt: skip
def test_two_networks_of_one_architecture_have_their_weights_named(cache: Path, weights: str, words: str) -> None:
    entry = next(entry for entry in entries(cache) if entry.kind == "tokens")
    manifest = json.loads((entry.directory / "manifest.json").read_text())
    manifest["facts"]["backbone"]["weights"] = weights
    (entry.directory / "manifest.json").write_text(json.dumps(manifest))
    (changed,) = [other for other in entries(cache) if other.directory == entry.directory]
    line = table([changed], [], None, time.time()).splitlines()[1]
    comma = ", " if words else ""
    assert changed.weights == words and line.endswith(f"vit_tiny_patch16_224{comma}{words} on {entry.data}")


def test_reading_is_the_last_use(cache: Path) -> None:
    sample = open_sample(toy_config(cache), "train", say=lambda text: None)
    assert all(time.time() - entry.used < 60 for entry in entries(cache) if entry.data == "Toy-train")
    directory = Path(sample.meta["directory"])
    assert in_use(directory) and not remove(directory) and directory.is_dir()
    del sample
    gc.collect()
    assert not in_use(directory) and remove(directory) and not directory.exists()
    assert hold(directory) is None


def test_what_is_being_filled_stays(cache: Path) -> None:
    directory = entries(cache)[-1].directory
    with lock(directory / "lock", 1, print):
        assert in_use(directory) and not remove(directory)
    assert remove(directory)
    assert not list(cache.rglob("*removed*"))


@pytest.mark.parametrize(
    ("text", "limit"),
    [("30d", Limit(30 * DAY, None)), ("12h", Limit(DAY / 2, None)), ("2w", Limit(14 * DAY, None)), ("20GB", Limit(None, 20e9)),
     ("1.5 MB", Limit(None, 1.5e6))],
)  # fmt: skip
def test_limits(text: str, limit: Limit) -> None:
    assert read_limit(text) == limit


@pytest.mark.parametrize("text", ["30", "d", "-1d", "20gb", "30 days", "1e3MB", "all"])
def test_other_limits_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"cache.prune={text} is no age or size, expected such as 12h, 30d"):
        read_limit(text)


def test_the_oldest_go_first(cache: Path) -> None:
    found, now = entries(cache), time.time()
    assert {entry.data for entry in too_many(found, read_limit("30d"), now)} == {"Toy-train"}
    assert too_many(found, read_limit("90d"), now) == [] == too_many(found, Limit(None, 1e9), now)
    total = sum(entry.bytes for entry in found)
    (first,) = too_many(found, Limit(None, total - 1), now)
    assert first.used == min(entry.used for entry in found)
    assert len(too_many(found, Limit(None, 0), now)) == 4
    with hold(first.directory):
        assert first.directory not in [entry.directory for entry in too_many(entries(cache), Limit(None, total - 1), now)]


def test_the_command_lists_prunes_and_says_what_it_freed(cache: Path) -> None:
    said, _ = command(cache)
    assert "vit_tiny_patch16_224, random weights 0 on Toy-train" in said and "labels of Toy-test" in said and "40 days" in said
    before = names(cache)
    said, _ = command(cache, "cache.prune=30d", "cache.dry_run=true")
    assert said.count("(goes)") == 2 and "in 2 of them can go" in said and "removed" not in said and names(cache) == before
    said, _ = command(cache, "cache.prune=30d")
    assert "removed 2 of 4 entries, freed" in said and names(cache) == {("tokens", "Toy-test"), ("index", "Toy-test")}
    sample = open_sample(toy_config(cache), "test", say=lambda text: None)
    said, _ = command(cache, "cache.prune=0MB", "resume=false")
    assert "(in use)" in said and "the rest is in use" in said and names(cache) == {("tokens", "Toy-test")}
    again = open_sample(toy_config(cache), "train", say=lambda text: None)
    assert again.tokens.shape == sample.tokens.shape, "what was removed is extracted again"
    assert "holds no activations" in command(cache.parent / "empty")[0]
