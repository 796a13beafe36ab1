"""How a run ended: its last text, its objective, and the digests of all files it left.

The same command again shows this at once, if the data, the weights and every file are still what they were; where anything
has changed, it computes what is missing, as after a kill.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from files import write_atomically
from runs.run import RESULT_FILES, Run, wrapped

TABLE = "table.txt"


def conclude(run: Run, text: str, objective: float | None) -> None:
    """All results are written: keep the text a reader sees, note the digest of every file, and show the text."""
    text = wrapped(text)
    write_atomically(run.dir / TABLE, text + "\n")
    run.facts["conclusion"] = {"objective": objective, "files": _digests(run.dir)}
    run.finishing()  # what follows is only shown
    run.say(text)
    run.close_mirror(complete=True)


def concluded(run: Run) -> dict[str, Any] | None:
    """What the entry of a run returns, after its text was shown again; None where there is something to compute.

    To be asked once the run has said what it rests on (`Run.rest_on`), which sets results of other data aside.
    """
    before = run.before.get("conclusion")
    if not isinstance(before, Mapping) or before.get("files") != _digests(run.dir) or not (run.dir / TABLE).is_file():
        return None
    kept = {key: run.before[key] for key in ("conclusion", "sha256") if key in run.before}
    run.facts |= kept
    run.finishing()
    run.say((run.dir / TABLE).read_text(encoding="utf-8").removesuffix("\n"))
    return {"objective": before.get("objective")}


def _digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every result file, by its place in the directory; states of fits under way are none."""
    found: dict[str, str] = {}
    for name in RESULT_FILES:
        path = directory / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and not file.name.startswith("state."):
                with open(file, "rb") as content:
                    found[file.relative_to(directory).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return found
