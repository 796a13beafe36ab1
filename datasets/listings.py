"""Which files belong to a data set: lists of names, sorted listings, splits by name, fingerprints, paths that stay inside."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from errors import UserError

T = TypeVar("T")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items, evenly spread over all of them; None takes all.

    Raises:
        UserError: the limit is no whole number of at least 1.
    """
    if limit is None:
        return list(items)
    if limit < 1 or limit != int(limit):
        raise UserError(f"dataset.limit: got {limit}, expected a whole number of at least 1, or null")
    n = min(int(limit), len(items))
    return [items[i * len(items) // n] for i in range(n)]


def data_folder(value: str | os.PathLike | None, variables: Sequence[str], default: str) -> Path:
    """Where files lie: the option, else the first of the environment variables that is set, else `default`.

    A default is taken below BINDING_PROJECT_ROOT, else below the working directory.
    """
    folder = value or next((os.environ[name] for name in variables if os.environ.get(name)), None)
    return Path(folder) if folder else Path(os.environ.get("BINDING_PROJECT_ROOT") or ".") / default


def data_root(root: str | os.PathLike[str], expected: str) -> Path:
    """The folder that `dataset.root` names.

    Raises:
        UserError: it is no folder; `expected` says what it should hold.
    """
    path = Path(root).expanduser()
    try:
        if path.is_dir():
            return path
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise UserError(f"dataset.root: got {str(root)[:80]!r}, which cannot be a folder ({error})") from None
    raise UserError(f"dataset.root: got {path}, which is no folder; expected {expected}")


def place_by_hash(key: str, val_fraction: float, test_fraction: float, seed: int) -> str:
    """The split of an image from its name alone: test, val and train take that share of all possible hashes."""
    value = hashlib.blake2b(f"{seed}|{key}".encode(errors="surrogateescape"), digest_size=8).digest()
    share = int.from_bytes(value, "big") / 2**64
    if share < test_fraction:
        return "test"
    return "val" if share < test_fraction + val_fraction else "train"


def list_images(folder: Path) -> dict[str, str]:
    """{name without ending: ending} of the images below a folder, sorted; names are relative, with forward slashes.

    Raises:
        UserError: two images of one name.
    """
    endings: dict[str, str] = {}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            stem, ending = os.path.splitext(name)
            if ending.lower() not in IMAGE_ENDINGS or name.startswith("."):
                continue
            key = Path(os.path.relpath(os.path.join(place, stem), folder)).as_posix()
            if key in endings:
                raise UserError(f"{folder / key} is there as {endings[key]} and as {ending}: their masks would share a name")
            endings[key] = ending
    return dict(sorted(endings.items()))


def list_files(folder: Path, ending: str, deep: bool = False) -> list[str]:
    """Names without `ending` of the files in a folder (`deep`: one level of folders below it), sorted, hidden ones left out.

    Raises:
        UserError: the folder is missing or cannot be listed.
    """
    try:
        names = os.listdir(folder)
        if deep:
            inner = (name for name in names if not name.startswith(".") and (folder / name).is_dir())
            names = [f"{name}/{file}" for name in inner for file in os.listdir(folder / name)]
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}): expected a folder of *{ending} files") from None
    hidden = lambda name: name.rpartition("/")[2].startswith(".")
    return sorted(name.removesuffix(ending) for name in names if name.endswith(ending) and not hidden(name))


def read_names(path: Path) -> list[str]:
    """The image names that a list file holds, one per line, in the order of the file; paths count by their stem.

    Raises:
        UserError: the file is missing, is no text, is empty, or has a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: expected a text file with one image name per line") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}), expected a text file with one image name per line") from None
    names: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        first = line.split()[0].rpartition("/")[2]  # some published lists have image and mask paths on a line
        stem = os.path.splitext(first)[0] if first.lower().endswith(IMAGE_ENDINGS) else first
        if stem in ("", ".", "..") or "\0" in stem:
            raise UserError(f"{path}: line {number}: got {line[:60]!r}, expected an image name")
        if stem in names:
            raise UserError(f"{path}: line {number}: {stem} stands in line {names[stem]} already; remove one")
        names[stem] = number
    if not names:
        raise UserError(f"{path} is empty, expected one image name per line")
    return list(names)


def inside(folder: Path, name: str, source: str) -> Path:
    """The path of a file that metadata name, which must lie in the folder it is looked up in, links followed.

    Args:
        folder: chosen by the program or the user, so that it may be a link itself.
        name: as it stands in the metadata.
        source: file and entry that the name comes from, for the error.

    Raises:
        UserError: an absolute path, `..`, a link that leaves the folder, a name that no file can have.
    """
    try:
        name.encode()
        path = folder / name
        parts = Path(name).parts
        stays = not Path(name).is_absolute() and ".." not in parts and bool(parts) and "\0" not in name
        if stays and os.path.realpath(path).startswith(os.path.join(os.path.realpath(folder), "")):
            return path
    except (ValueError, OSError):
        pass
    raise UserError(f"{source}: got {name[:80]!r}, expected the name of a file inside {folder}")


def file_fingerprint(root: Path, names: Iterable[str]) -> dict[str, Any]:
    """What stands for files without reading them: their number and a digest of names (below root), sizes and times.

    An absent file counts as such, so that putting it in place changes the fingerprint.
    """
    digest, count, folder = hashlib.blake2b(digest_size=16), 0, os.fspath(root)
    for name in names:
        try:
            status = os.stat(os.path.join(folder, name))
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            state = "absent"
        digest.update(f"{name} {state}\n".encode(errors="surrogateescape"))
        count += 1
    return {"files": count, "digest": digest.hexdigest()}
