"""Faults of the operator's files and disks, and too much load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.checks import Ends
from benchmarks.faults.client import HUNG_UP, chat, exchange
from benchmarks.faults.fault import Fault, load, recovered
from benchmarks.faults.process_faults import WAITS_FOR_LENGTH, predictor, with_predictor
from benchmarks.faults.rig import CLASSES, Rig, until

DISK_BYTES = 4 << 20
"""Size of the full disk."""

SLOTS = 8
"""Slots of an engine that is overloaded."""

_OVERLOAD_STEP_S = 0.02


# --- reload -----------------------------------------------------------------------------------------------------------


def _broken_files(config: dict[str, Any]) -> list[bytes]:
    """Configuration files that must change nothing."""
    valid = yaml.safe_dump(config).encode()
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
    )
    return [
        b"", valid[: len(valid) // 2], b"{" * 5000, b"[" * 100_000, b"\xff\xfe\x00", valid + b"\t- :\n", b"null",
        b"- 1\n", valid + b"unknown: 1\n", valid + valid, bomb.encode(),
        valid.replace(b"ttft_ms: 5000", b"ttft_ms: -1"),
        valid + b"# " + b"x" * (4 << 20), valid.replace(b"default_class: chat", b"default_class: none"),
        b"a: !!python/none x\n",
        valid + b"shadow: " + b"[" + b"{name: fcfs}," * 5000 + b"]\n", b"a: 2024-99-99\n", valid + b"\x00",
    ]  # fmt: skip


async def reload_storm(running: Rig, ends: Ends) -> None:
    """100 signals in two seconds, while the file is valid, broken, huge or absent."""
    broken = _broken_files(running.config)
    valid = [yaml.safe_dump({**running.config, "classes": _classes(20_000 + n)}).encode() for n in range(3)]
    async with load(running, ends):
        for number in range(100):
            running.write_config((broken, valid)[number % 2][number // 2 % len((broken, valid)[number % 2])])
            if number % 25 == 24:
                running.file.unlink()
            running.signal(signal.SIGHUP)
            await asyncio.sleep(0.02)
        last = 30_000 + ends.seen.total()
        running.write_config(yaml.safe_dump({**running.config, "classes": _classes(last)}))
        running.signal(signal.SIGHUP)
        await until(lambda: _has_bound(running, last), 60)
        await recovered(running, ends)


def _classes(ttft_ms: int) -> dict[str, Any]:
    return {**CLASSES, "chat": {**CLASSES["chat"], "ttft_ms": ttft_ms}}


async def _has_bound(running: Rig, ttft_ms: int) -> bool:
    return bool((await running.status())["classes"]["chat"]["slo_ttft_ms"] == ttft_ms)


# --- disks and files --------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def with_small_disk(folder: Path) -> AsyncIterator[dict[str, Any]]:
    """The access log, the predictor's state and its collected data on a small disk that is full.

    It is a tmpfs if it can be mounted, else a limit on the size of each file.
    """
    disk = folder / "disk"
    disk.mkdir()
    options: dict[str, Any] = {
        "logging": {"access": "json", "access_path": str(disk / "access.jsonl")},
        "predictor": {"timeout_ms": 50, "state_dir": str(disk), "collect_dir": str(disk), "expected_tokens": 64},
    }
    mounted = _mount(disk)
    try:
        yield options if mounted else {**options, "file_limit": DISK_BYTES}
    finally:
        if mounted:
            _unmount(disk)


def _mount(disk: Path) -> bool:
    if os.geteuid() != 0 or not shutil.which("mount"):
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _overwrite(folder: Path, content: bytes) -> None:
    """Replace every file of the predictor's state by ``content``."""
    state = folder / "calibration.json"
    if state.exists() and (found := re.search(rb'"predictor": ?"([^"]+)"', state.read_bytes())):
        content = content.replace(b"ID", found[1])
    # The predictor makes the folder with its first report of a length.
    folder.mkdir(parents=True, exist_ok=True)
    for file in {*folder.iterdir(), state}:
        file.write_bytes(content)


async def fill_disk(running: Rig, ends: Ends) -> None:
    """Fill the disk under load, and make room again. The access log must continue."""
    disk, log = running.folder / "disk", Path(running.config["logging"]["access_path"])
    filler = disk / "filler"
    async with load(running, ends, max_tokens=4, headers=WAITS_FOR_LENGTH):
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.tell() < DISK_BYTES and file.write(b"x" * 16384):
                pass
        await asyncio.sleep(2)
        filler.unlink()
        size = _size(log)
        await recovered(running, ends)
        if not running.file_limit:
            await until(lambda: _size(log) != size, 15)


_STATE = b'{"format": 1, "predictor": "ID", "windows": '
STATE_FILES: tuple[bytes, ...] = (
    b"", b"{", b"null", b"[]", b"\xff\x00" * 1000, b'{"format": 99}', b"[" * 100_000, _STATE + b"1}", _STATE + b"[1]}",
    _STATE + b'[{"model": "m", "slo_class": "chat", "rows": [[1]]}]}', _STATE + b"[" + b"{}," * 300_000 + b"{}]}",
    _STATE + b'[{"model": "m", "slo_class": "chat", "rows": [[1e300, -1, 0, 7], [1, 2, 3, 18446744073709551615]]}]}',
    _STATE + b'[{"model": "m", "slo_class": "chat", "rows": ' + b"[" * 500 + b"]" * 500 + b"}]}",
)  # fmt: skip
"""What the predictor may find in its state. ``ID`` becomes the id that it has written there itself."""


async def corrupt_state(running: Rig, ends: Ends) -> None:
    """Replace the predictor's state by garbage, and kill the predictor so that it reads it. One of `STATE_FILES`."""
    state = Path(running.config["predictor"]["state_dir"])
    pid = await predictor(running)
    content = STATE_FILES[len(list(running.folder.glob("seen-*"))) % len(STATE_FILES)]
    (running.folder / f"seen-{time.monotonic_ns()}").touch()
    async with load(running, ends, headers=WAITS_FOR_LENGTH):
        os.kill(pid, signal.SIGSTOP)
        _overwrite(state, content)
        os.kill(pid, signal.SIGKILL)
        ends.recovery_s = await until(lambda: running.predictor_pid() not in (None, pid), 60)
        started = time.monotonic()
        await predictor(running)
        ends.recovery_s += time.monotonic() - started


# --- load -------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def with_few_slots(folder: Path) -> AsyncIterator[dict[str, Any]]:
    """A slow engine with few slots, which is easily overloaded."""
    yield {
        "slots": SLOTS,
        "step_times": {"b": 0.0, "d": _OVERLOAD_STEP_S, "alpha": 0.0},
        "classes": {"chat": {"ttft_ms": 1000, "tpot_ms": 200}, "free": {}},
    }


async def overload(running: Rig, ends: Ends) -> None:
    """Ten times the capacity for three seconds: requests of 20 tokens, a third of them streamed."""
    tokens = 20
    capacity = SLOTS / (tokens * _OVERLOAD_STEP_S)
    r = random.Random(0)
    async with asyncio.TaskGroup() as group:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            body = chat(stream=r.random() < 0.33, max_tokens=tokens, ignore_eos=True)
            group.create_task(ends.add(exchange(running.port, body, limit_s=60)))
            await asyncio.sleep(r.expovariate(10 * capacity))
    await recovered(running, ends)


@contextlib.asynccontextmanager
async def with_long_queue(folder: Path) -> AsyncIterator[dict[str, Any]]:
    """A queue without a small limit, and the time limits of the edge that are the default."""
    yield {
        "server": {"drain_s": 5, "max_open_requests": 20_000},
        "step_times": {"b": 0.0, "d": 0.01, "alpha": 0.0},
        "limits": {},
    }


CONNECTING = 256
"""Connections that a client opens at a time. More overflow the listener's queue."""


def wait_in_line(count: int) -> Callable[[Rig, Ends], Awaitable[None]]:
    """Return the fault of ``count`` requests that wait at the same time, behind one that takes every slot."""

    async def inject(running: Rig, ends: Ends) -> None:
        free, connecting = {"x-slo-class": "free"}, asyncio.Semaphore(CONNECTING)
        long = chat(headers=free, n=running.slots, max_tokens=8000, ignore_eos=True, stream=True)
        blocking = asyncio.create_task(exchange(running.port, long, limit_s=240))
        await until(lambda: _count(running, "running", 1))
        waiting = [
            asyncio.create_task(
                ends.add(exchange(running.port, chat(max_tokens=2, headers=free), limit_s=240, connecting=connecting))
            )
            for _ in range(count)
        ]
        await until(lambda: _count(running, "waiting", count), 75)
        blocking.cancel()
        await asyncio.gather(blocking, return_exceptions=True)
        ends.abusive[HUNG_UP] += 1
        await asyncio.gather(*waiting)
        await recovered(running, ends)

    return inject


async def _count(running: Rig, name: str, least: int) -> bool:
    return bool(sum(engine[name] for engine in (await running.status())["engines"]) >= least)


MANY_WAITING = 10_000
OPERATOR_FAULTS = (
    Fault("reload storm", "100 SIGHUP in 2 s, the file in turn valid, broken, huge, a YAML bomb or absent",
          reload_storm),
    Fault("full disk", "access log, predictor state and collected data on a full disk for 2 s", fill_disk,
          around=with_small_disk),
    Fault("corrupt state", "the predictor restarts with a corrupt state file, another one each time", corrupt_state,
          around=with_predictor),
    Fault("10x overload", "ten times the capacity for 3 s, TTFT bound 1 s", overload, r"200|429 \w+",
          around=with_few_slots),
    Fault(f"{MANY_WAITING:,} waiting", f"{MANY_WAITING:,} requests wait at the same time", wait_in_line(MANY_WAITING),
          abusive=HUNG_UP, memory_mb=400, around=with_long_queue),
)  # fmt: skip
