"""mode=cache: what lies in the cache, how large it is, when it was last used; and pruning it by age or size.

    python main.py mode=cache                                   list
    python main.py mode=cache cache.prune=30d                   remove what was not used for 30 days (h, d or w)
    python main.py mode=cache cache.prune=20GB                  remove what was not used for longest until 20 GB are left
    … cache.dry_run=true                                        only say what would go

Whoever reads an entry holds a shared lock on its file `used`, whose time is the last use; whoever fills it holds `lock`. An
entry is removed only while neither is held by anybody: it is renamed first, so that nobody finds half of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from errors import UserError
from files import holder, safe_name
from runs.progress import stage

KINDS = ("tokens", "index")  # folders of the cache whose entries are listed and pruned
HOURS = {"h": 1, "d": 24, "w": 7 * 24}
BYTES = {"MB": 1e6, "GB": 1e9, "TB": 1e12}
REMOVED = ".removed-"  # in the name of an entry that is being deleted


class Entry(NamedTuple):
    """A directory of the cache.

    kind: "tokens" or "index" (labels and selection). model: the backbone; "" for an index. weights: in words, "" where there
    are none. data: data set and split. images, layers: how many. bytes: on disk. used: seconds since the epoch. state: "",
    "unfinished" or "damaged".
    """

    kind: str
    directory: Path
    model: str
    weights: str
    data: str
    images: int
    layers: int
    bytes: int
    used: float
    state: str


def hold(directory: Path) -> IO[str] | None:
    """Note that an entry is used now, and keep it from being removed until the file returned is closed.

    None where there is no entry, or a cache of somebody else's that cannot be locked.
    """
    path = directory / "used"
    while directory.is_dir():
        try:
            file = open(path, "a+")
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        fcntl.flock(file, fcntl.LOCK_SH)  # who removes an entry holds it only for as long as renaming takes
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # it was removed in between
    return None


def entries(cache_dir: Path) -> list[Entry]:
    """All entries of a cache, the most recently used first."""
    found = []
    for kind in KINDS:
        for directory in sorted((cache_dir / kind).glob("*")):
            if directory.is_dir() and REMOVED not in directory.name:
                with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
                    found.append(_entry(kind, directory))
    return sorted(found, key=lambda entry: (-entry.used, entry.directory.name))


def _entry(kind: str, directory: Path) -> Entry:
    manifest, weights, state = {}, "", ""
    try:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        made_from = manifest["facts"]
        images = int(manifest["images"])
        if kind == "tokens":
            model, weights = str(made_from["backbone"]["name"]), _in_words(str(made_from["backbone"]["weights"]))
            data = directory.name.removeprefix(f"{safe_name(model)}-").rpartition("-")[0]
            complete = len(list((directory / "shards").glob("*.json"))) == manifest["shards"]
        else:
            model, data = "", f"{made_from['dataset']}-{made_from['split']}"
            complete = (directory / "index.safetensors").is_file()
        state = "" if complete else "unfinished"
    except FileNotFoundError:
        model, data, images, state = "", directory.name, 0, "unfinished"
    except (OSError, ValueError, KeyError, TypeError):
        model, data, images, state = "", directory.name, 0, "damaged"
    stats = [(path, path.stat()) for path in directory.rglob("*") if path.is_file()]
    times = [stat.st_mtime for path, stat in stats if path.name == "used"] or [stat.st_mtime for _, stat in stats]
    layers = len(list(directory.glob("layer_*")))
    size = sum(stat.st_size for _, stat in stats)
    used = max(times, default=directory.stat().st_mtime)
    return Entry(kind, directory, model, weights, data, images, layers, size, used, state)


def _in_words(weights: str) -> str:
    """Which weights a backbone has, by `BackboneFacts.weights`: several of one architecture may lie in a cache."""
    origin, _, name = weights.partition(":")
    named = {"none": "", "random": f"random weights {name}", "sha256": f"weights {name[:8]}"}
    return named.get(origin, f"weights {weights}")


class Limit(NamedTuple):
    """What `cache.prune` asks for: entries used within `seconds` are kept, or the newest of together at most `bytes`."""

    seconds: float | None
    bytes: float | None


def read_limit(text: str) -> Limit:
    """The limit behind a text such as 30d or 20GB.

    Raises:
        UserError: it is neither an age nor a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(h|d|w|MB|GB|TB)", text.strip())
    if match is None:
        raise UserError(f"cache.prune={text} is no age or size, expected such as 12h, 30d, 8w, 500MB or 20GB")
    number, unit = float(match[1]), match[2]
    return Limit(number * HOURS[unit] * 3600, None) if unit in HOURS else Limit(None, number * BYTES[unit])


def too_many(found: Iterable[Entry], limit: Limit, now: float) -> list[Entry]:
    """The entries a limit leaves no place for, the least recently used first."""
    oldest_first = sorted(found, key=lambda entry: (entry.used, entry.directory.name))
    if limit.seconds is not None:
        return [entry for entry in oldest_first if now - entry.used > limit.seconds]
    total, chosen = sum(entry.bytes for entry in oldest_first), []
    for entry in oldest_first:
        if total <= limit.bytes:
            break
        if not in_use(entry.directory):
            chosen.append(entry)
            total -= entry.bytes
    return chosen


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Whether nobody reads or fills an entry; nobody can begin to until the end of the block."""
    with contextlib.ExitStack() as stack:
        for path in (directory / "used", *directory.glob("lock*")):
            try:
                file = stack.enter_context(open(path, "a+"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # held, or a cache of somebody else's
                yield False
                return
        yield True


def in_use(directory: Path) -> bool:
    """Whether some process reads or fills an entry."""
    if any(holder(path) for path in directory.glob("lock*")):
        return True
    try:
        with open(directory / "used") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def remove(directory: Path) -> bool:
    """Remove an entry, if nobody uses it; whether it is gone.

    Raises:
        UserError: the system refuses it.
    """
    aside = directory.with_name(f"{directory.name}{REMOVED}{os.getpid()}")
    try:
        with _alone(directory) as alone:
            if not alone:
                return False
            os.rename(directory, aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise UserError(f"{directory} cannot be removed ({error.strerror}); remove it by hand") from error
    return True


def run(cfg: Any, run: Any) -> dict[str, Any]:
    """mode=cache: list the cache, and prune it if asked to.

    Returns:
        {"entries": all before, "removed": those gone, "freed": bytes}
    """
    limit = None if cfg.cache.prune is None else read_limit(str(cfg.cache.prune))
    folder, now = Path(cfg.cache.dir), time.time()
    for left in [path for kind in KINDS for path in (folder / kind).glob(f"*{REMOVED}*")]:  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    stage("sizes")
    found = entries(folder)
    chosen = [] if limit is None else too_many(found, limit, now)
    run.say(table(found, chosen, limit, now) if found else f"{folder} holds no activations")
    if limit is None or cfg.cache.dry_run:
        return {"entries": found, "removed": [], "freed": 0}
    removed = []
    for entry in chosen:
        if remove(entry.directory):
            removed.append(entry)
        else:
            run.say(f"kept, in use: {entry.directory.name}")
    freed = sum(entry.bytes for entry in removed)
    left = sum(entry.bytes for entry in found) - freed
    run.say(f"removed {len(removed)} of {len(found)} entries, freed {_size(freed)}, {_size(left)} are left")
    if limit.bytes is not None and left > limit.bytes:
        run.say(f"note: more than {_size(limit.bytes)} are left because the rest is in use")
    return {"entries": found, "removed": removed, "freed": freed}


def table(found: list[Entry], chosen: list[Entry], limit: Limit | None, now: float) -> str:
    """A line per entry, and the sum."""
    lines = [f"{'size':>9}  {'last used':>10}  {'images':>7}  {'layers':>6}  what"]
    for entry in found:
        backbone = f"{entry.model}, {entry.weights}" if entry.weights else entry.model
        what = f"{backbone} on {entry.data}" if entry.kind == "tokens" else f"labels of {entry.data}"
        marks = [entry.state] * bool(entry.state) + ["in use"] * in_use(entry.directory)
        marks += ["goes"] * (entry in chosen and "in use" not in marks)
        suffix = f"  ({', '.join(marks)})" if marks else ""
        lines.append(
            f"{_size(entry.bytes):>9}  {_age(now - entry.used):>10}  {entry.images:>7}  {entry.layers or '':>6}  {what}{suffix}"
        )
    total = f"{_size(sum(entry.bytes for entry in found)):>9}  in {len(found)} entries of {found[0].directory.parent.parent}"
    if limit is not None:
        total += f"; {_size(sum(entry.bytes for entry in chosen))} in {len(chosen)} of them can go"
    return "\n".join([*lines, total])


def _size(n_bytes: float) -> str:
    for unit, factor in reversed(BYTES.items()):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes / 1e3:.0f} kB"


def _age(seconds: float) -> str:
    for word, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {word}"
    return "now"
