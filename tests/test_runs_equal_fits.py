"""Equal fits are made once: what is taken over has the numbers of a fit of its own, and nothing that differs is taken over."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from program import TINY, Finished, run
from samples import planted_sample

import pairs.task
import trainer
from controls import MadeTokens, Subject, fit_digest
from runs.equal_fits import take_over
from runs.records import line_of, read_records
from runs.run import Run
from runs.states import load_state, peek, save_state
from tasks import Task

SMALL = ["dataset.n_train=8", "dataset.n_val=4", "dataset.n_test=4", "model.layers=[0,1]", "trainer.epochs=2"]
QUICK = [*TINY, *SMALL, "controls=[position,pixels,cosine]"]


@pytest.fixture(scope="module", autouse=True)
def no_figures() -> Iterator[None]:
    """Runs of this file draw nothing, which takes most of their time."""
    with mock.patch("pairs.layer_curve.write_layer_curve"), mock.patch("show.tables.draw_learning"):
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a linear probe and three controls."""
    folder = tmp_path_factory.mktemp("first")
    run(folder, *QUICK, "probe.mode=linear")
    return folder


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed; the activations are shared."""
    shutil.copytree(first / "outputs", tmp_path / "outputs")
    (tmp_path / "cache").symlink_to(first / "cache")
    return tmp_path


def origins(done: Finished) -> dict[str, str]:
    """Where each fit of a run was made, by its name; "" is the run itself."""
    fits = [record for record in done.records("history.jsonl") if record["kind"] == "fit"]
    return {record["name"]: record.get("fitted_in", "") for record in fits}


def best(directory: Path, name: str) -> Path:
    return directory / "checkpoints" / name / "best.00.safetensors"


def plain(done: Finished, file: str) -> list[str]:
    """The records of the controls as text, without where they come from."""
    return [
        json.dumps({key: value for key, value in record.items() if key != "fitted_in"})
        for record in done.records(file)
        if record["name"] != "probe"
    ]


def test_what_is_taken_over_equals_a_fit_of_its_own(folder: Path, tmp_path: Path) -> None:
    taken = run(folder, *QUICK, "probe.mode=diag_quadratic")
    source = next((folder / "outputs/train").glob("*-linear-*"))
    assert origins(taken) == {
        "probe": "", "position": "", "pixels": "", "cosine": f"train/{source.name}",  # the probe decides the first two
    }  # fmt: skip
    again = run(folder, *QUICK, "probe.mode=linear", "trainer.n_boot=30")  # decides no fit
    assert origins(again) == {"probe": "", **dict.fromkeys(("position", "pixels", "cosine"), f"train/{source.name}")}

    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/cache").symlink_to(folder / "cache")
    alone = run(tmp_path / "alone", *QUICK, "probe.mode=linear", "trainer.n_boot=30")
    assert set(origins(alone).values()) == {""}
    for file in ("metrics.jsonl", "history.jsonl"):
        assert plain(again, file) == plain(alone, file)
    for file in ("layers.csv", "scores.csv", "scores.safetensors", "table.txt"):
        shown = [(done.dir / file).read_bytes().replace(bytes(done.dir), b"") for done in (again, alone)]
        assert shown[0] == shown[1], file
    for name in ("position", "pixels", "cosine"):
        one, other = (load_state(best(done.dir, name)) for done in (again, alone))
        assert one.recipe["facts"].pop("fitted_in") == f"train/{source.name}"
        assert one.recipe == other.recipe
        assert {k: v.numpy().tobytes() for k, v in one.tensors.items()} == {
            k: v.numpy().tobytes() for k, v in other.tensors.items()
        }
    scores = [r for r in again.records() if r["kind"] == "score"]
    assert {r["name"] for r in scores if r.get("fitted_in") == f"train/{source.name}"} == {"position", "pixels", "cosine"}
    assert "fitted_in" not in next(r for r in scores if r["name"] == "probe")


# What a control's numbers depend on, and a control that must then be fitted again.
DIFFERENT = {
    "trainer.seeds=[3]": "position", "dataset.seed=3": "position", "dataset.noise=0.5": "pixels", "dataset.n_val=5": "cosine",
    "protocol.selection.patches=20": "position", "protocol.selection.seed=9": "position",
    "protocol.pairs.loss=all": "position", "protocol.pairs.fit=[all]": "cosine", "probe.standardize=false": "position",
    "probe.learn_scale=false": "cosine", "model.layers=[1]": "cosine", "cache.dtype=float32": "pixels",
}  # fmt: skip
OPTIONS = {
    "epochs": 3, "patience": 1, "averaging": 2.0, "batch_images": 8, "optimizer": "adam", "lr": 1.0, "beta2": 0.5,
    "weight_decay": 0.5, "schedule": "constant", "step_size": 3, "gamma": 0.5, "seed": 9, "device": "cuda", "lr_width": 3,
}  # fmt: skip


class Asked(Exception):
    """A control's fit was looked for."""


def digest_of_fit(folder: Path, name: str, *overrides: str) -> str:
    """The digest that a control's fit is looked for with."""

    def stop(run: Run, name: str, number: int, equal: str, facts: Any) -> bool:
        assert run.shares == ("resume=false" not in overrides)
        raise Asked(equal)

    def controls_only(run: Run, task: Task, subject: Subject, options: trainer.FitOptions) -> None:
        if subject.control:
            trainer.fit_stack(run, task, subject, options)

    changed = {override.partition("=")[0] for override in overrides}
    where = [f"output_dir={folder}/asked", "trainer.n_boot=50", f"controls=[{name}]"]
    quick = [part for part in QUICK if part.partition("=")[0] not in changed]
    with mock.patch.object(trainer, "take_over", stop), mock.patch.object(trainer, "probe", controls_only):
        with mock.patch.object(pairs.task, "write_records", lambda *args, **options: None), pytest.raises(Asked) as asked:
                run(folder, *quick, *where, "probe.mode=linear", *overrides)
    return str(asked.value)


@pytest.fixture(scope="module")
def digests(first: Path) -> dict[str, str]:
    """What the controls of the finished run carry."""
    (done,) = (first / "outputs/train").iterdir()
    return {name: peek(best(done, name))["facts"]["equal"] for name in ("position", "pixels", "cosine")}


def test_what_stays_the_same_is_the_same_fit(first: Path, digests: dict[str, str]) -> None:
    assert digest_of_fit(first, "position", "resume=false") == digests["position"]
    other = "model.kwargs={img_size: 96, patch_size: 16, embed_dim: 32, depth: 3, num_heads: 2}"
    for name, knows_the_model in (("position", False), ("pixels", False), ("cosine", True)):
        assert (digest_of_fit(first, name, other) != digests[name]) == knows_the_model


@pytest.mark.parametrize("change", DIFFERENT)
def test_what_differs_is_another_fit(change: str, first: Path, digests: dict[str, str]) -> None:
    assert digest_of_fit(first, DIFFERENT[change], change) != digests[DIFFERENT[change]]


def test_every_option_that_decides_a_number_tells_a_fit_apart() -> None:
    sample = planted_sample(n_images=3)
    sample = sample._replace(tokens=MadeTokens(lambda images: torch.ones(1, len(images), 16, 4), "made", 3, "ones"))
    subject = Subject("probe", "position", {"mode": "linear"}, {"train": sample, "val": sample}, [0])
    asked = pairs.task.Pairwise([0])
    probe, made = asked.build_probe(subject.probe, sample, ["made"]), {"code": "a", "threads": 1}
    options = {field.name: 0 for field in dataclasses.fields(trainer.FitOptions)}
    assert {*OPTIONS, "stack_gb", "checkpoint_seconds", "processes"} == options.keys()
    digest = lambda subject=subject, task=asked, **changed: fit_digest(
        subject, task, probe, {**options, **{k: v for k, v in changed.items() if k in options}},
        {**made, **{k: v for k, v in changed.items() if k in made}},
    )  # fmt: skip
    one = digest()
    assert one == digest(stack_gb=1, checkpoint_seconds=1, processes=1)
    for key, value in {**OPTIONS, "code": "b", "threads": 2}.items():
        assert digest(**{key: value}) != one, key
    labels = {**sample.labels, "identity": sample.labels["identity"] + 1}
    for changed in (sample._replace(labels=labels), sample._replace(position=sample.position + 1)):
        assert digest(subject._replace(samples={"train": sample, "val": changed})) not in (one, None)
    with torch.no_grad():
        next(probe.parameters()).add_(1.0)
    assert digest() != one
    # What is not known, or is no control, is never taken over.
    unknown = sample._replace(tokens=MadeTokens(sample.tokens.read, "made", 3))
    assert digest(subject._replace(samples={"train": sample, "val": unknown})) is None
    assert digest(subject._replace(control="")) is None and digest(code=None) is None
    asked.more = object()
    assert digest() is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


def lose(path: Path, kind: str) -> None:
    """Records that are whole, without the last one of a kind of the position control."""
    records = read_records(path)
    last = [r for r in records if r["name"] == "position" and r["kind"] == kind][-1]
    path.write_text("".join(line_of(record) + "\n" for record in records if record is not last))


def other_digest(path: Path) -> None:
    """A whole checkpoint that claims the digest of another fit."""
    state = load_state(path)
    save_state(path, state.tensors, {**state.recipe, "facts": {**state.recipe["facts"], "equal": "0" * 64}})


DAMAGED: dict[str, Callable[[Path], None]] = {
    "best": lambda d: flip(best(d, "position")),
    "last": lambda d: flip(best(d, "position").with_name("last.00.safetensors")),
    "no last": lambda d: best(d, "position").with_name("last.00.safetensors").unlink(),
    "cut": lambda d: best(d, "position").write_bytes(best(d, "position").read_bytes()[:-9]),
    "no header": lambda d: best(d, "position").write_bytes(b"\xff" * 8),
    "another control": lambda d: shutil.copy(best(d, "pixels"), best(d, "position")),
    "another digest": lambda d: other_digest(best(d, "position")),
    "no history": lambda d: (d / "history.jsonl").unlink(),
    "an epoch lost": lambda d: lose(d / "history.jsonl", "epoch"),
    "an ending lost": lambda d: lose(d / "history.jsonl", "fit"),
    "a line of history damaged": lambda d: flip(d / "history.jsonl"),
}


@pytest.mark.parametrize("case", [None, *DAMAGED])
def test_what_is_damaged_is_not_taken_over(case: str | None, first: Path, tmp_path: Path) -> None:
    (finished,) = (first / "outputs/train").iterdir()
    source = shutil.copytree(finished, tmp_path / "train" / finished.name)
    (tmp_path / "train/new").mkdir()
    equal = peek(best(source, "position"))["facts"]["equal"]
    if case is not None:
        DAMAGED[case](source)
    new = Run(tmp_path / "train/new", {})
    assert not take_over(new, "position", 0, equal, {})  # resume=false
    new.shares = True
    assert take_over(new, "position", 0, equal, {}) == (case is None) == best(new.dir, "position").exists()
    text = " ".join((new.dir / "log.txt").read_text().split())
    assert ("is fitted again" in text) == (case in ("best", "last", "no last", "cut", "no history"))
    if case is None:  # what is taken over twice says where it was fitted, not where it was read
        new.close()
        shutil.rmtree(source)
        (tmp_path / "train/newer").mkdir()
        newer = Run(tmp_path / "train/newer", {})
        newer.shares = True
        assert take_over(newer, "position", 0, equal, {}) and f"train/{finished.name}" in (newer.dir / "log.txt").read_text()
