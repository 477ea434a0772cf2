"""Starts server processes, ends them by pid, and reads their CPU time and memory, child processes included."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_END_S = 10.0
"""Time that SIGTERM allows, in seconds."""


def tree(pid: int) -> list[int]:
    """Return ``pid`` and the processes that it started, their own ones included."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found.extend(int(child) for child in children.read_text(encoding="ascii").split())
    return found


def thread_cpu_ns(pid: int) -> dict[tuple[int, str], int]:
    """Return the CPU nanoseconds so far of each thread of ``pid`` and its child processes."""
    return {thread: spent for process in tree(pid) for thread, spent in own_thread_cpu_ns(process).items()}


def own_thread_cpu_ns(pid: int) -> dict[tuple[int, str], int]:
    """Return the CPU nanoseconds so far of each thread of ``pid``. A thread that ends meanwhile is missing."""
    spent = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            spent[pid, task.name] = int((task / "schedstat").read_text(encoding="ascii").split()[0])
    return spent


def cpu_s(before: Mapping[tuple[int, str], int], after: Mapping[tuple[int, str], int]) -> float:
    """Return the CPU seconds between two results of `thread_cpu_ns`. A thread that ended between them is missing."""
    return sum(spent - before.get(thread, 0) for thread, spent in after.items()) / 1e9


def memory_mib(pid: int) -> float:
    """Return the resident memory (MiB) of ``pid`` and its child processes. Shared pages count once per process."""
    pages = 0
    for process in tree(pid):
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * _PAGE_BYTES / 2**20


def peak_memory_mib(pid: int) -> float:
    """Return the sum (MiB) of the largest resident memory that each of the processes had so far."""
    kib = 0
    for process in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    kib += int(line.split()[1])
    return kib / 1024


def log_end(log: Path) -> str:
    """Return the last 2,000 characters of a log."""
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]


@contextlib.asynccontextmanager
async def running(command: list[str], log: Path, env: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run ``command`` while the block runs; its output goes to the file ``log``. Then end it and its children.

    From now on, SIGTERM cancels the caller's task, so that a benchmark that is ended leaves no server behind.
    """
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with log.open("wb") as output:
        # In a group of its own, so that its children end with it.
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, env={**os.environ, **env}, cwd=log.parent, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
