"""The machine a run works on: devices, ranks of a launch, number formats, memory, the processor's name.

torch is imported where it is needed: a command that only reads files does not wait for it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")  # of a backbone's forward pass


def let_waiting_threads_sleep() -> None:
    """Threads of OpenMP that wait for work give their processor up sooner; to be called before torch is imported.

    By default they spin for about a millisecond after every product, on the very processors that `share_threads` is using: a
    fit of the default run takes 1.4 times as long (measured). Read by the OpenMP of GCC, which torch brings on Linux.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether the hardware multiplies bfloat16 at a higher rate than float32, as the device itself reports.

    CUDA with bfloat16 units; x86 with AMX or AVX512-BF16. Not measured, so that a machine always decides alike.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private names in torch; a version that drops them only loses the fast path.
    checks = (getattr(torch.cpu, f"_is_{part}_supported", bool) for part in ("amx_tile", "avx512_bf16"))
    return kind == "cpu" and any(check() for check in checks)


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype one of `DTYPES` or `auto` means on a device; auto is bfloat16 where that multiplies faster, else float32."""
    import torch

    if name == "auto":
        name = "bfloat16" if multiplies_bfloat16(device) else "float32"
    return getattr(torch, name)


def choose_device(name: str) -> torch.device:
    """The device of this process for `auto`, `cpu`, `cuda` or `cuda:1`; each rank on a machine takes a GPU of its own.

    Raises:
        UserError: unknown, or not there.
    """
    import torch

    kind, _, number = str(name).partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise UserError(f"device={name} is unknown, expected auto, cpu, cuda or cuda:<number>")
    count = torch.cuda.device_count()
    if kind == "cpu" or (kind == "auto" and not count):
        return torch.device("cpu")
    if int(number or 0) >= count:
        raise UserError(f"device={name} and this machine has {count or 'no'} CUDA devices, set device=cpu or auto")
    return torch.device("cuda", int(number or int(os.environ.get("LOCAL_RANK", 0)) % count))


def set_threads(n_threads: int) -> None:
    """Let torch use this many CPU threads; 0 leaves its own choice (all cores)."""
    import torch

    if n_threads:
        torch.set_num_threads(n_threads)


_table_width = 100


def set_table_width(characters: int) -> None:
    """Characters of a line that tables on the terminal may take (`report.width`)."""
    global _table_width
    _table_width = characters


def table_width() -> int:
    """What `set_table_width` was last called with; 100 before."""
    return _table_width


def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of freed memory for the next arrays instead of handing it back at once.

    Fresh memory costs more than the arithmetic of a small probe: the system clears every page of it first. Other C
    libraries than glibc, which have no `mallopt`, are left as they are; no number depends on it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: from this size on every array is the system's own, as by default at most
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD


def even_parts(items: Sequence, at_most: int) -> list[Sequence]:
    """Cut into as few parts of at most this many items as will do, of sizes that differ by one at most."""
    n_parts = -(-len(items) // at_most)
    ends = [len(items) * number // n_parts for number in range(n_parts + 1)] if n_parts else []
    return [items[start:stop] for start, stop in itertools.pairwise(ends)]


def share_threads(work: Callable[[Any], None], items: Sequence) -> None:
    """Call `work` on every one of independent items, an item per thread that torch may use, each with one thread inside.

    Many small products run faster side by side than one after the other, each cut into pieces; and what an item yields
    then does not depend on the number of threads. A thread that is done takes the next item.
    """
    import torch

    n_threads = torch.get_num_threads()
    if n_threads == 1 or len(items) < n_threads:
        for item in items:
            work(item)
        return
    waiting = iter(items)  # a list's: one thread after the other takes the next

    def work_on() -> None:
        for item in waiting:
            work(item)

    torch.set_num_threads(1)
    try:
        others = [_one_thread_each(n_threads - 1).submit(work_on) for _ in range(1, n_threads)]
        try:
            work_on()
        finally:
            wait(others)
        for other in others:
            other.result()
    finally:
        torch.set_num_threads(n_threads)


@functools.lru_cache(maxsize=1)
def _one_thread_each(n_workers: int) -> ThreadPoolExecutor:
    import torch

    return ThreadPoolExecutor(n_workers, "share", initializer=torch.set_num_threads, initargs=(1,))


def rank() -> tuple[int, int]:
    """This process's number and how many there are, as `torchrun` says; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def job() -> str:
    """A name all ranks of one launch share and no other launch has."""
    return ":".join(os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"))


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        name = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        name = None
    return name.group(1) if name else platform.processor() or platform.machine()


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can be taken: of a GPU its free memory, else main memory without swapping."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available.group(1)) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def torch_facts() -> dict[str, Any]:
    """Threads and GPU a run computed with; empty if it never needed torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
