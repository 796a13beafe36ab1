"""Equal fits are made once: a control whose numbers another run already has is taken over from there.

A checkpoint of a control carries `equal`, the digest of everything that decides its numbers (`controls.fit_digest`). Before
a control is fitted, the runs of the same mode in the same output folder are searched for a finished fit of the same digest:
in a sweep over probes the similarities are fitted once, in a sweep over models position and pixels. That holds for any two
runs of a folder, not only for those of one sweep, for the same reason for which a repeated command is read and not computed
again: settings, data, seeds, code and machine are the same, so the numbers would be, to the last bit. `resume=false` fits
everything itself. Whatever is damaged, incomplete or in doubt is passed over, and the control is fitted.

What was taken over says so: `fitted_in` in checkpoint and records names the run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from runs.records import read_lines
from runs.run import Run, checkpoint_path
from runs.states import State, load_state, peek, save_state

OF_A_CURVE = ("epoch", "solution")  # kinds of the records that tell the course of a fit


class Equal(NamedTuple):
    """A finished fit of another run: both checkpoints by name, its records in history.jsonl, where it was fitted."""

    states: dict[str, State]
    records: list[dict[str, Any]]
    fitted_in: str


def take_over(run: Run, name: str, number: int, equal: str, facts: Mapping[str, Any]) -> bool:
    """Put the checkpoints and records of an equal fit of another run into this run; whether there was one.

    Args:
        name, number: of the fit and of the chunk of its layers.
        equal: digest of what decides its numbers.
        facts: what the checkpoints of this run say of data and configuration, in place of what those of the other do.
    """
    if not run.shares:
        return False
    for directory in sorted(run.dir.parent.iterdir()):
        best = checkpoint_path(directory, name, f"best.{number:02d}")
        if directory == run.dir or not best.is_file() or (peek(best).get("facts") or {}).get("equal") != equal:
            continue
        try:
            found = _read(directory, name, number, equal)
        except UserError as error:
            run.say(f"warning: {error}; {name} is fitted again")
            continue
        if found is None:
            continue
        for record in found.records:
            origin = {"fitted_in": found.fitted_in} if record["kind"] == "fit" else {}
            run.write({**record, **origin}, file="history.jsonl")
        for which in ("last", "best"):  # best is written last: then the fit is complete
            state = found.states[which]
            new = {**state.recipe["facts"], **facts, "fitted_in": found.fitted_in}
            save_state(checkpoint_path(run.dir, name, f"{which}.{number:02d}"), state.tensors, {**state.recipe, "facts": new})
        run.say(f"{name}: the fit of {found.fitted_in} is taken over (equal data, settings, seeds and code)")
        return True
    return False


def _read(directory: Path, name: str, number: int, equal: str) -> Equal | None:
    """A finished fit of a run, checked; None where its checkpoints have no checksum or its course is not all there.

    Raises:
        UserError: a checkpoint is damaged or of something else, or the records cannot be read.
    """
    states = {}
    for which in ("best", "last"):
        path = checkpoint_path(directory, name, f"{which}.{number:02d}")
        states[which] = load_state(path, {"facts": {"equal": equal, "which": which}})
        if not states[which].checked:
            return None
    recipe = states["best"].recipe
    if {**states["last"].recipe, "facts": {**states["last"].recipe["facts"], "which": "best"}} != recipe:
        return None
    own = directory.relative_to(directory.parents[1]).as_posix()  # <mode>/<run>
    records = _course(directory / "history.jsonl", name, recipe)
    return None if records is None else Equal(states, records, recipe["facts"].get("fitted_in") or own)


def _course(path: Path, name: str, recipe: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The records of a fit without the names of its run; None where one is missing, twice or damaged."""
    lines, layers, facts = read_lines(path), recipe["layers"], recipe["facts"]
    if lines.damaged:
        return None
    of_fit = [record for record in lines.records if record.get("name") == name]
    curve = [r for r in of_fit if r.get("kind") in OF_A_CURVE and r.get("layer") == str(layers)]
    ends = [r for r in of_fit if r.get("kind") == "fit" and r.get("layer") in layers]
    n_epochs = max(max(row) for row in facts["epochs"])
    steps = list(range(1, n_epochs + 1)) if n_epochs else [None]  # what is solved for has one record
    if [r.get("epoch") for r in curve] != steps or len(ends) != sum(len(row) for row in facts["epochs"]):
        return None
    of_run = ("mode", "task", "protocol", "model", "dataset", "probe", "fitted_in")
    return [{key: value for key, value in record.items() if key not in of_run} for record in (*curve, *ends)]
