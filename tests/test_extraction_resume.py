"""Extraction by processes that are killed, that share the work, and whose memory is watched."""

import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import until
from test_activation import quiet, token_files
from toys import toy_config

import store.shards
from activation import open_sample
from errors import UserError

# One server process imports torch once; every process of these tests is forked from it, with no threads to inherit.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["activation", "toys", "test_activation"])


def extract(directory: Path, overrides: list[str], environment: dict[str, str]) -> None:
    """What a process does; it leaves the bytes it wrote in a file named by its pid, a UserError ends it with status 3."""
    os.environ.update(environment)
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    try:
        sample = open_sample(toy_config(directory, *overrides), "train", say=quiet)
        (directory / f"wrote-{os.getpid()}").write_text(str(sample.meta["bytes_written"]))
    except UserError as error:
        print(error)
        os._exit(3)


def start(directory: Path, *overrides: str, **environment: str) -> multiprocessing.Process:
    process = context.Process(target=extract, args=(directory, list(overrides), environment))
    process.start()
    return process


def wrote(directory: Path, *processes: multiprocessing.Process) -> list[int]:
    """Bytes each process wrote."""
    return [int((directory / f"wrote-{process.pid}").read_text()) for process in processes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of an extraction that nothing disturbed: 24 images in 6 shards."""
    directory = tmp_path_factory.mktemp("whole")
    open_sample(toy_config(directory, "dataset.n=24", "dataset.widths=[32,56]"), "train", say=quiet)
    return token_files(directory / "tokens")


def test_a_killed_extraction_resumes_to_the_same_bytes(tmp_path: Path, whole: dict[str, str]) -> None:
    overrides = ["dataset.n=24", "dataset.widths=[32,56]", "dataset.seconds=0.01", "cache.ram_gb=0"]
    moments = random.Random(0)
    shards = lambda: len(list((tmp_path / "tokens").glob("*/shards/*.json")))
    seen, kills = [0], 0
    while seen[-1] < 4:  # of 6
        process = start(tmp_path, *overrides)
        if len(seen) > 1:  # the first is killed while it starts or labels, the others once they have written something
            until(lambda: shards() > seen[-1])
        time.sleep(moments.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += process.exitcode == -signal.SIGKILL  # on a busy machine one may have finished before it was hit
        seen.append(shards())
    assert kills >= 2
    process = start(tmp_path, *overrides)
    process.join()
    assert process.exitcode == 0 and token_files(tmp_path / "tokens") == whole
    assert not list(tmp_path.rglob("*.part"))


def test_an_interrupt_ends_at_once_and_keeps_what_was_done(tmp_path: Path, whole: dict[str, str]) -> None:
    overrides = ["dataset.n=24", "dataset.widths=[32,56]"]
    process = start(tmp_path, *overrides, "dataset.seconds=0.05", "cache.ram_gb=0")
    until(lambda: bool(list((tmp_path / "tokens").glob("*/shards/*.json"))))
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 1 and not list(tmp_path.rglob("*.part"))  # KeyboardInterrupt went through
    kept = token_files(tmp_path / "tokens")
    assert kept and kept.items() <= whole.items()
    process = start(tmp_path, *overrides)
    process.join()
    assert token_files(tmp_path / "tokens") == whole


def test_ranks_share_the_shards_and_write_the_bytes_of_one_process(tmp_path: Path, whole: dict[str, str]) -> None:
    overrides = ["dataset.n=24", "dataset.widths=[32,56]", "dataset.seconds=0.002", "cache.ram_gb=0"]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    second = start(tmp_path, *overrides, RANK="1", LOCAL_RANK="1", **launch)
    first = start(tmp_path, *overrides, RANK="0", LOCAL_RANK="0", **launch)
    first.join(60), second.join(60)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert wrote(tmp_path, first) == wrote(tmp_path, second) != [0]  # three shards each
    assert token_files(tmp_path / "tokens") == whole


def test_a_rank_whose_partner_dies_gives_up_and_one_process_finishes(tmp_path: Path, whole: dict[str, str]) -> None:
    overrides = ["dataset.n=24", "dataset.widths=[32,56]", "cache.lock_timeout=1", "dataset.seconds=0.02", "cache.ram_gb=0"]
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
    first = start(tmp_path, *overrides, RANK="0", **launch)
    second = start(tmp_path, *overrides, RANK="1", **launch)
    until(lambda: bool(list((tmp_path / "tokens").glob("*/shards/*.json"))))
    os.kill(second.pid, signal.SIGKILL)
    first.join(60), second.join()
    assert first.exitcode == 3  # one sentence, no hang
    alone = start(tmp_path, *overrides)
    alone.join()
    assert alone.exitcode == 0 and token_files(tmp_path / "tokens") == whole


def test_a_second_process_waits_for_the_first_and_then_reads(tmp_path: Path, whole: dict[str, str]) -> None:
    overrides = ["dataset.n=24", "dataset.widths=[32,56]", "dataset.seconds=0.01", "cache.ram_gb=0"]
    processes = [start(tmp_path, *overrides) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(wrote(tmp_path, *processes))[:2] == [0, 0]
    assert token_files(tmp_path / "tokens") == whole


def peak(directory: str, n: int, answer: multiprocessing.Queue) -> None:
    """Peak resident memory in MB that extracting and reading `n` images adds."""
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    store.shards.MAP_BYTES = 4 << 20
    wide = ["model.kwargs.embed_dim=256", "model.output_mode=all", "cache.dtype=float32", "cache.ram_gb=0"]
    sizes = ["cache.shard_images=20", "cache.batch_windows=20"]
    open_sample(toy_config(directory, *wide, *sizes, "dataset.n=20", "dataset.look=1"), "train", say=quiet)  # warm up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = open_sample(toy_config(directory, *wide, *sizes, f"dataset.n={n}"), "train", say=quiet).tokens
    for images in torch.randperm(n).split(20):
        tokens.gather(images)
    answer.put((tokens.nbytes / 2**20, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10))


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    answer, added = context.Queue(), {}
    for n in (100, 800):
        process = context.Process(target=peak, args=(str(tmp_path / str(n)), n, answer))
        process.start()
        size, added[n] = answer.get(timeout=300)
        process.join()
        assert process.exitcode == 0
    assert size > 35  # MB of tokens that would have been held
    assert added[800] - added[100] < 12, added
