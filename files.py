"""Files: written whole or not at all, locked, and named by what they hold.

    write_atomically, publish   aside, flushed, renamed
    lock, wait, holder          an open file under `flock`: the system releases it when its process dies
    read_json, read_sealed      a JSON object, or one sentence on what is wrong with the file
    sealed, check_folder        JSON with a digest of itself; refuse a path that cannot be a folder
    digest, plain, safe_name    names and short digests of JSON-able facts

POSIX systems only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from errors import UserError

ROOT = Path(__file__).parent
T = TypeVar("T")
HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
_cleaned: set[Path] = set()  # folders this process has written to


def write_atomically(path: Path, *parts: bytes | str | memoryview | np.ndarray) -> None:
    """Write a file aside, flush it to the disk and rename it: it is there whole or not at all.

    Missing folders are made. Concurrent writers of one file do not meet: each writes aside under a name of its own.

    Args:
        path: the file.
        parts: its content in order; text is written as UTF-8.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent not in _cleaned:
            _cleaned.add(path.parent)
            _remove_leftovers(path.parent)
        with open(aside, "wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_if_changed(path: Path, content: bytes) -> bool:
    """Write a file (`write_atomically`) unless it holds this content already; whether it was written."""
    if path.is_file() and path.read_bytes() == content:
        return False
    write_atomically(path, content)
    return True


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine wrote aside; those of other machines cannot be asked."""
    for left in folder.glob(f".*.{HOST}-*.part"):
        try:
            os.kill(int(left.name.rpartition("-")[2].removesuffix(".part")), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, PermissionError):  # not a name of ours; a process of somebody else
            continue


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for a file or folder the system refuses to write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk is full, writing {path} failed; free some space or choose another folder (cache.dir, output_dir), then "
            "repeat the command: it goes on where it stopped"
        )
    if error.errno == errno.EFBIG:
        return UserError(
            f"{path} is larger than files may be here (`ulimit -f`), writing it failed; raise that limit, then repeat the "
            "command: it goes on where it stopped"
        )
    reason = error.strerror or type(error).__name__
    return UserError(f"{path} cannot be written ({reason}), set cache.dir or output_dir to a folder of your own")


def unreadable(path: Path, error: OSError) -> str:
    """What is wrong with a file that should be read, without what to do about it."""
    if error.errno == errno.EISDIR:
        return f"{path} is a folder where a file belongs"
    return f"{path} cannot be read ({error.strerror or type(error).__name__})"


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object a file holds.

    Args:
        remedy: what to do about a damaged file, the end of the sentence.

    Raises:
        FileNotFoundError: there is none (nor the folder it would be in).
        UserError: unreadable, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(path) from None
    except OSError as error:
        raise UserError(f"{unreadable(path, error)}; {remedy}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is damaged ({reason}); {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object); {remedy}")
    return value


def sealed(content: Mapping[str, Any]) -> str:
    """JSON text of a mapping with a digest of itself (`check`); `read_sealed` reads it back."""
    content = plain(content)
    return json.dumps({"check": digest(content), **content}, indent=1) + "\n"


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """What `sealed` wrote into a file.

    Raises:
        FileNotFoundError, UserError: as `read_json`; UserError also where the digest differs.
    """
    content = read_json(path, remedy)
    if content.pop("check", None) != digest(content):
        raise UserError(f"{path} is damaged (its checksum differs); {remedy}")
    return content


def check_folder(path: Path, option: str) -> None:
    """Refuse a path that is there and no folder, or that no file system takes.

    Raises:
        UserError: naming the path and the option that set it.
    """
    try:
        if not stat.S_ISDIR(os.stat(path).st_mode):
            raise UserError(f"{path} is a file where a folder belongs; move it away, or set {option} to another folder")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be a folder ({reason}); set {option} to another one") from error


def digest(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for a JSON-able mapping."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """A configuration node, tuple or mapping as the plain Python value its JSON text would give back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def safe_name(name: str) -> str:
    """A name any file system takes; of a long one the beginning and the end, where digests stand."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return name if len(name) <= 200 else f"{name[:160]}-{name[-32:]}"


def holder(path: Path) -> dict[str, Any]:
    """Who holds a lock: pid, host, job; {} if nobody does."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return {}
    except BlockingIOError:
        try:
            return json.loads(path.read_text())
        except ValueError:  # between taking the lock and signing it
            return {"pid": "?", "host": "?", "job": None}
    except FileNotFoundError:
        return {}


def wait(ready: Callable[[], T | None], alive: Sequence[Path], timeout: float, what: str) -> T:
    """Ask `ready` until it gives something; give up when no `alive` lock file was touched for `timeout` s."""
    since, pause = time.time(), 0.01
    while (value := ready()) is None:
        last = max([since, *(path.stat().st_mtime for path in alive if path.exists())])
        if time.time() - last > timeout:
            raise UserError(f"waited {timeout:g} s without a sign of life for {what}")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return value


@contextmanager
def lock(path: Path, timeout: float, say: Callable[[str], None], job: str = "") -> Iterator[Callable[[], None]]:
    """Hold a lock file; yields the function that shows the holder is at work (cheap, call it often).

    Raises:
        UserError: another living process holds it and did nothing for `timeout` seconds.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = open(path, "a+")
    except OSError as error:
        raise cannot_write(path, error) from error
    with opened as file:
        who: dict[str, Any] = {}

        def taken() -> bool | None:
            nonlocal who
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if not who and (who := holder(path)):
                    say(f"waiting for process {who.get('pid')} on {who.get('host')}, which is filling {path.parent}")
                return None

        try:
            wait(taken, [path], timeout, path.name)
        except UserError:
            raise UserError(
                f"{path.parent} is held by process {who.get('pid')} on {who.get('host')}, which has done nothing for "
                f"{timeout:g} s; wait for it or end it, or set a longer cache.lock_timeout"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "job": job}))
        file.flush()
        last = time.monotonic()

        def beat() -> None:
            nonlocal last
            if time.monotonic() - last > min(1.0, timeout / 4):
                last = time.monotonic()
                os.utime(path)

        try:
            yield beat
        finally:
            file.truncate(0)
            fcntl.flock(file, fcntl.LOCK_UN)  # for the loader's child processes too, which share the open file
