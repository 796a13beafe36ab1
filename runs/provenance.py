"""Where a number comes from: the commit, a digest of the program's code, versions, the machine."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from files import ROOT
from machine import cpu_name

MADE_WITH = ("code", "python", "torch", "cpu")  # what of `provenance` can change the last digit of a number
PACKAGES = ("torch", "torchvision", "timm", "numpy")
# Folders whose Python files make no number of a run.
_BESIDE = ("tests", "scripts")


def code_digest(root: Path = ROOT) -> str:
    """Digest of the program's Python files: a number is never taken over from other code.

    The files are those at the root and in every folder below it that holds Python files, so a new folder counts the
    moment it is there; tests, scripts and hidden folders (a virtual environment) do not.
    """
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in _BESIDE]
    digest = hashlib.sha256()
    for folder in [root, *sorted(folders)]:
        for path in sorted(folder.glob("*.py")):
            if path.name != "conftest.py":
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance() -> dict[str, Any]:
    """What a number was made with: commit, dirty flag, versions, processor.

    Versions come from the metadata of the installed packages: to import torch for its version costs seconds.
    """
    status = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "code": code_digest(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "cpu": cpu_name(),
    }


def made_with(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of `provenance` can change the last digit of a number, with the number of threads; None where it is not known."""
    import torch  # here: the start of every command reads this file

    return {key: facts.get(key) for key in MADE_WITH} | {"threads": torch.get_num_threads()}
