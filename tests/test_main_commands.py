"""`main.py` as a process: what it prints, how it ends, that it can be killed; and every command the documents show."""

import itertools
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from program import ROOT, TINY, Done, configured, finish, places, run, start

import main
import options
from datasets.scene import find_class
from runs.records import read_records
from runs.run import read_facts
from tasks import find_question

ONE = [*TINY, "model.layers=[1]"]


def run_directories(folder: Path, mode: str = "train") -> list[Path]:
    return sorted(path.parent for path in (folder / "outputs" / mode).glob("*/run.json"))


def errors(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("error: ")]


def shell(folder: Path, *command: str, **environment: str) -> Done:
    """A command line as a user types it, in a fresh interpreter."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=given)
    return Done(done.returncode, done.stdout, done.stderr)


# ------------------------------------------------------------------------------------------------------ how it ends


def test_the_command_prints_its_table_and_where_the_files_are(tmp_path: Path) -> None:
    done = shell(tmp_path, sys.executable, "main.py", *places(tmp_path), *TINY, "controls=[position]")
    assert done.status == 0, done.err
    (directory,) = run_directories(tmp_path)
    assert "all pairs AUROC" in done.out and "probe gains" in done.out
    assert f"records, curve and checkpoints: {directory}" in done.out
    assert read_facts(directory)["status"] == "finished"
    assert not [path for path in tmp_path.iterdir() if path.name not in ("cache", "outputs")]  # nothing left elsewhere

    # Again, with everything there: what takes seconds to import and has nothing to do is not imported.
    again = shell(
        tmp_path, sys.executable, "-X", "importtime", "main.py", *places(tmp_path), *TINY, "controls=[position]",
        "wandb.mode=offline",
    )  # fmt: skip
    assert again.status == 0 and "all pairs AUROC" in again.out
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", again.err, re.MULTILINE))
    assert "torch" in imported and not imported & {"timm", "torchvision", "torch._dynamo", "wandb", "scipy"}
    assert run_directories(tmp_path) == [directory]


def test_the_command_line_is_checked_before_torch_is_imported(tmp_path: Path) -> None:
    code = "import sys, main, options, runs.run; print(sorted(sys.modules.keys() & {'torch', 'timm', 'wandb', 'matplotlib'}))"
    assert shell(tmp_path, sys.executable, "-c", code).out == "[]\n"


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("probe.nonsense=1", "error: unknown option 'probe.nonsense'; valid keys of probe: "),  # cannot be composed
        ("+unknown=1", "error: +unknown=1 adds an option that nothing reads; "),  # refused before the run opens
        ("model.layers=[9]", "error: model.layers: there is no layer 9"),  # refused by the run
    ],
)
def test_a_mistake_is_one_sentence_and_status_1(tmp_path: Path, mistake: str, said: str) -> None:
    done = finish(start(tmp_path, *TINY, mistake))
    assert done.status == 1 and "Traceback" not in done.err
    assert len(errors(done)) == 1 and errors(done)[0].startswith(said)
    for directory in run_directories(tmp_path):
        assert read_facts(directory)["status"] == "failed"


@pytest.mark.parametrize("mistake", ["probe.nonsense=1", "model.layers=[9]"])
def test_debug_shows_the_trace(tmp_path: Path, mistake: str) -> None:
    done = finish(start(tmp_path, *TINY, mistake, "debug=true"))
    assert done.status == 1 and "Traceback" in done.err


def own_mode(folder: Path, code: str) -> str:
    """A mode of the user's own: its file in a folder, its module on the import path."""
    (folder / "mine" / "mode").mkdir(parents=True)
    (folder / "mine" / "mode" / "own.yaml").write_text("# @package _global_\nmode: own\nentry: own_mode.run\ntask: null\n")
    (folder / "own_mode.py").write_text(code)
    return f"--config-dir={folder / 'mine'}"


def test_a_defect_is_told_apart_from_a_mistake(tmp_path: Path) -> None:
    place = own_mode(tmp_path, "def run(cfg, run):\n    return 1 / 0\n")
    done = finish(start(tmp_path, place, *TINY, "mode=own", PYTHONPATH=str(tmp_path)))
    assert done.status == 1 and "Traceback" not in done.err
    assert "error: unexpected ZeroDivisionError" in errors(done)[0] and "debug=true" in errors(done)[0]


def test_a_mode_of_ones_own_runs_and_what_cannot_be_imported_is_named(tmp_path: Path) -> None:
    place = own_mode(tmp_path, "def run(cfg, run):\n    run.say('my own mode')\n    return {}\n")
    done = finish(start(tmp_path, place, *TINY, "mode=own", PYTHONPATH=str(tmp_path)))
    assert done.status == 0 and "my own mode" in done.out
    (tmp_path / "own_mode.py").unlink()
    done = finish(start(tmp_path, place, *TINY, "mode=own", "resume=false", PYTHONPATH=str(tmp_path)))
    assert re.search(r"own.yaml: entry own_mode.run cannot be imported .*put its folder on PYTHONPATH", errors(done)[0])


@pytest.mark.parametrize("entry", ["os.system", "foo.bar", "nodots", "datasets.check.run", "''"])
def test_nothing_but_the_entry_of_the_mode_is_called(tmp_path: Path, entry: str) -> None:
    with pytest.raises(SystemExit, match=r"error: entry(=.* is not the entry of mode=train|: got ''|: '').*"):
        run(tmp_path, *TINY, f"entry={entry}")


def test_a_sweep_extracts_once_mirrors_every_job_and_survives_one_that_fails(tmp_path: Path) -> None:
    done = finish(start(tmp_path, "-m", *ONE, "probe.mode=linear,nonsense,cosine", "wandb.mode=offline"))
    assert done.status == 1 and "job 1 failed: unknown probe.mode 'nonsense'" in done.err
    assert len(errors(done)) == 1 and "Traceback" not in done.err
    assert done.out.count("extracting") == 3  # a split each, by the first job
    status = {directory.name.split("-")[3]: read_facts(directory)["status"] for directory in run_directories(tmp_path)}
    assert status == {"linear": "finished", "cosine": "finished"}  # the job that failed at once leaves no directory
    for directory in run_directories(tmp_path):
        mirrors = list((directory / "wandb").glob("offline-run-*/*.wandb"))
        assert len(mirrors) == (read_facts(directory)["status"] == "finished")  # the failed one has nothing to mirror


# ---------------------------------------------------------------------------------------------- stopped and resumed


def progress(folder: Path) -> int:
    """Grows with every file and every record."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".part")]
    return len(found) + sum(path.read_bytes().count(b"\n") for path in found if path.suffix == ".jsonl")


def until_progress(folder: Path, process: Any, goal: int) -> None:
    while process.is_alive() and progress(folder) < goal:
        time.sleep(0.005)


LONG = [*TINY, "controls=[position,cosine]", "model.layers=[embed,0]", "trainer.epochs=6", "trainer.checkpoint_seconds=0",
        "cache.shard_images=4"]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = finish(start(folder, *LONG))
    assert done.status == 0, done.err
    return folder


def compare(folder: Path, undisturbed: Path) -> None:
    """Records, losses and cached tokens are those of the run that nothing disturbed."""
    (ours,), (theirs,) = run_directories(folder), run_directories(undisturbed)
    assert ours.name == theirs.name and read_facts(ours)["status"] == "finished"
    for file in ("metrics.jsonl", "history.jsonl"):
        assert read_records(ours / file) == read_records(theirs / file), file
    assert (ours / "layers.csv").read_bytes() == (theirs / "layers.csv").read_bytes()
    tokens = [
        {path.relative_to(place): path.read_bytes() for path in (place / "cache" / "tokens").rglob("*.safetensors")}
        for place in (folder, undisturbed)
    ]
    assert tokens[0] == tokens[1] and tokens[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_it_resumes_to_the_same_records(tmp_path: Path, undisturbed: Path, seed: int) -> None:
    moments, whole, kills = random.Random(seed), progress(undisturbed), 0
    while True:
        process = start(tmp_path, *LONG)
        if kills < 8:
            until_progress(tmp_path, process, progress(tmp_path) + 1 + moments.randrange(whole // 6))
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        done = finish(process)
        if done.status == 0:
            break
        assert done.status == -signal.SIGKILL, done.err
        kills += 1
    assert kills >= 3
    compare(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
@pytest.mark.parametrize("stage", ["cache", "outputs"])
def test_a_signal_is_clean_and_the_same_command_resumes(
    tmp_path: Path, undisturbed: Path, stage: str, number: int, status: int, word: str
) -> None:
    process = start(tmp_path, *LONG)
    begun = {"cache": "cache/tokens/*/shards/*.json", "outputs": "outputs/train/*/history.jsonl"}[stage]
    while process.is_alive() and not list(tmp_path.glob(begun)):
        time.sleep(0.005)
    os.kill(process.pid, number)
    done = finish(process)
    assert done.status == status and "Traceback" not in done.err
    assert f"{word}: nothing finished is lost, the same command resumes here" in done.err
    assert read_facts(run_directories(tmp_path)[0])["status"] == "interrupted"
    assert not list(tmp_path.rglob("*.part"))
    assert finish(start(tmp_path, *LONG)).status == 0
    compare(tmp_path, undisturbed)


# ------------------------------------------------------------------------------------------------ several processes


def test_torchrun_extracts_the_bytes_of_one_process(tmp_path: Path) -> None:
    asked = [*TINY, "mode=extract", "cache.shard_images=4"]
    assert finish(start(tmp_path / "one", *asked)).status == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517"]
    done = shell(tmp_path, *launch, "main.py", *places(tmp_path / "two"), *asked)
    assert done.status == 0, done.err
    tokens = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name / "cache").rglob("*.safetensors")}
        for name in ("one", "two")
    ]
    assert [*map(len, tokens)][0] > 3 and {k.parts[1:]: v for k, v in tokens[0].items()} == {
        k.parts[1:]: v for k, v in tokens[1].items()
    }
    (directory,) = run_directories(tmp_path / "two", "extract")
    assert [r["split"] for r in read_records(directory / "metrics.jsonl")] == ["train", "val", "test"]


def test_the_submitit_launcher_runs_a_sweep_in_processes_of_its_own(tmp_path: Path) -> None:
    launcher = ["-m", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"]
    done = shell(tmp_path, sys.executable, "main.py", *launcher, *places(tmp_path), *ONE, "probe.mode=cosine,dot_product")
    assert done.status == 0, done.err
    assert [read_facts(directory)["status"] for directory in run_directories(tmp_path)] == ["finished"] * 2
    logs = [path.read_text() for path in (tmp_path / "outputs" / "sweeps").glob("*/.submitit/*/*_log.out")]
    assert len(logs) == 2 and sum(log.count("extracting") for log in logs) == 3  # one job extracts, the other waits


def test_the_slurm_launcher_composes_and_says_where_it_can_run(tmp_path: Path) -> None:
    launcher = ["-m", "hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
    done = finish(start(tmp_path, *launcher, *ONE, "seed=0,1", PATH="/nowhere"))
    assert done.status == 1 and "error: the launcher cannot start the jobs" in errors(done)[0]


# ------------------------------------------------------------------------------------------ commands in the documents

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
PROGRAM = re.compile(r'(?:(?<![\w/])python|"\$python"|torchrun(?: -[-\w=]+)*) main\.py([^`\n]*)')
SHELL = re.compile(r"(?<![\w/])bash scripts/(\w+)\.sh([^`\n]*)")


def words(text: str) -> list[str]:
    """The arguments of a command: up to a comment, an explanation set apart by spaces, or a further command."""
    text = re.split(r"\s#|\s{3,}|&&|·|\s\|\s", text, maxsplit=1)[0]
    return shlex.split(text.replace('"$@"', "").rstrip('"') if text.count('"') % 2 else text.replace('"$@"', ""))


def lines_of(path: Path) -> str:
    """The text of a document; in a script, variables stand for their defaults and comments for text."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    if path.suffix == ".sh":
        defaults = dict(re.findall(r"^(\w+)=\$\{\w+:-([^}]*)\}", text, re.MULTILINE))
        defaults.pop("python", None)
        text = re.sub(r"\$\(dirname \"\$facts\"\)", "outputs/train/some-run", text)
        text = re.sub(r"\"?\$(\w+)\"?", lambda m: m[0] if m[1] == "python" else defaults.get(m[1], "some"), text)
    return text


def commands_of(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every `python main.py …` of a document and what the scripts it calls run, as (where, arguments)."""
    text = lines_of(path)
    for number, line in enumerate(text.splitlines(), start=1):
        for found in PROGRAM.finditer(line):
            arguments = words(found[1])
            sketch = any(sign in argument for argument in arguments for sign in ("<", "…", "key=value"))
            if not (sketch and "`" in line):
                yield f"{path.name}:{number}", arguments
        for found in SHELL.finditer(line):
            script = ROOT / "scripts" / f"{found[1]}.sh"
            assert script in SCRIPTS, f"{path}:{number} calls {script}"
            if '"$@"' in script.read_text():
                for inner in PROGRAM.finditer(lines_of(script)):
                    yield f"{path.name}:{number}", [*words(inner[1]), *words(found[2])]


def jobs_of(arguments: list[str]) -> list[list[str]]:
    """The overrides of the jobs of a command; of a sweep every choice once, not every combination."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    overrides = [] if "--cfg" in arguments else overrides
    if not {"-m", "--multirun"} & set(arguments):
        return [overrides]
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [[batch[0] for batch in BasicSweeper.split_arguments([o], None)[0]] for o in parsed]
    first = [options_[0] for options_ in choices]
    varied = [[*first[:i], choice, *first[i + 1 :]] for i, found in enumerate(choices) for choice in found[1:]]
    return [first, *varied]


DOCUMENTS = [
    ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *SCRIPTS,
    *(path for path in sorted((ROOT / "cfgs").rglob("*.yaml")) if "main.py" in path.read_text()),
]  # fmt: skip
COMMANDS = list(dict.fromkeys((where, tuple(arguments)) for path in DOCUMENTS for where, arguments in commands_of(path)))


def test_the_documents_show_what_they_promise() -> None:
    shown = [" ".join(arguments) for where, arguments in COMMANDS if where.startswith("README.md")]
    jobs = [job for where, arguments in COMMANDS if where.startswith("README.md") for job in jobs_of(list(arguments))]
    for mode in (path.stem for path in (ROOT / "cfgs" / "mode").glob("*.yaml")):
        assert mode == "export_data" or any(f"mode={mode}" in job for job in jobs), mode
    assert any("-m " in command for command in shown) and "" in shown
    assert {where.partition(":")[0] for where, _ in COMMANDS} >= {"README.md", "train.sh", "eval.sh"}


@pytest.mark.parametrize(("where", "arguments"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_of_the_documents_composes(where: str, arguments: tuple[str, ...]) -> None:
    swept = ["hydra.mode=MULTIRUN"] if "-m" in arguments else []
    for overrides in jobs_of(list(arguments)):
        with configured(*overrides, *swept) as cfg:
            options.check(cfg)
            assert not OmegaConf.missing_keys(cfg), where
            assert callable(main.find_entry(cfg)) and find_class(cfg.dataset._target_)
            assert timm.is_model(cfg.model.name.partition(".")[0])
            if cfg.task:
                find_question(cfg.task).check(cfg)


def test_a_sweep_is_taken_apart() -> None:
    jobs = jobs_of(["-m", "mode=train", "probe.mode=linear,mlp", "model=demo_vit,pixels", "model.layers=[0,1]"])
    varied = [dict(job.split("=") for job in jobs_) for jobs_ in jobs]
    assert [(job["probe.mode"], job["model"]) for job in varied] == [
        ("linear", "demo_vit"), ("mlp", "demo_vit"), ("linear", "pixels"),
    ]  # fmt: skip
    assert len(list(itertools.chain(*jobs))) == 12
