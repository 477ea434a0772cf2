"""A real gateway process with what it depends on, into which faults are injected.

`rig` starts `antares serve` with a simulated engine in its process, or with ``kind: http`` in front of a simulated
server, which is another process. A predictor is a third one, if asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.faults.client import Reply, exchange, request

Kind = Literal["simulated", "http", "vllm"]
KINDS: tuple[Kind, ...] = ("simulated", "http")
"""Kinds that every fault is injected into."""

START_S = 60.0
"""Longest start of a process, in seconds, on a busy machine."""
VLLM_START_S = 300.0
"""The same for a real vLLM on CPU."""

_MAIN = "import sys; sys.argv[0] = 'antares'; from gateway.cli import main; main()"
_FILE_LIMIT = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); "
_SERVER = """
import asyncio, sys, uvicorn
from engine_adapter.engine import EngineEvents
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes

async def main():
    engine = SimulatedEngine(times=StepTimes(**eval(sys.argv[2])), max_num_seqs=int(sys.argv[3]))
    await engine.start(EngineEvents())
    options = dict(port=int(sys.argv[1]), lifespan="off", access_log=False, log_level="warning", backlog=4096)
    await uvicorn.Server(uvicorn.Config(engine.app, **options)).serve()

asyncio.run(main())
"""
"""A simulated server: port, step times and slots are its arguments."""

STEP_TIMES = {"b": 1e-6, "d": 1e-3, "alpha": 1e-6}
"""A step takes a millisecond, so that an answer takes about 0.1 s."""

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"

LIMITS = {"head_timeout_s": 2.5, "stall_s": 2.5, "idle_timeout_s": 3.0}
"""Short time limits of the edge, so that a slow client is cut within seconds."""

CLASSES: dict[str, Any] = {
    "chat": {"ttft_ms": 5000, "tpot_ms": 1000},
    "free": {"max_waiting": 20_000},
    "batch": {"ttft_ms": 5000, "on_unattainable": "best_effort"},
}


@dataclass
class Rig:
    """A running gateway.

    Attributes:
        model: what its engine serves. ``environment``: more variables of `antares serve`.
        kind: the kind of its engine. ``slots``: sequences that the engine serves at a time.
        process: `antares serve`. ``port``: where it listens. ``log``: its standard error.
        server, server_port: the simulated server of ``kind: http``.
    """

    kind: Kind
    folder: Path
    config: dict[str, Any]
    port: int
    slots: int
    step_times: dict[str, float]
    process: asyncio.subprocess.Process = field(init=False)
    server: asyncio.subprocess.Process | None = None
    server_port: int = 0
    file_limit: int = 0
    model: str = "simulated"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> str:
        """What the gateway and its predictor have logged."""
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")

    @property
    def server_log(self) -> str:
        """What the simulated server has logged."""
        file = self.folder / "server.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    @property
    def file(self) -> Path:
        """The configuration file."""
        return self.folder / "antares.yaml"

    def write_config(self, text: str | bytes | None = None) -> None:
        """Write the configuration file: ``text``, or the valid configuration."""
        content = yaml.safe_dump(self.config) if text is None else text
        self.file.write_bytes(content.encode() if isinstance(content, str) else content)

    async def start(self) -> None:
        """Start the gateway and wait until it is ready."""
        self.write_config()
        main = (_FILE_LIMIT.format(self.file_limit) if self.file_limit else "") + _MAIN
        with (self.folder / "log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", main, "serve", "-c", str(self.file), stdout=log, stderr=log,
                env={**os.environ, "COLUMNS": "200", **self.environment},
            )  # fmt: skip
        await until(self.is_ready, VLLM_START_S if self.kind == "vllm" else START_S)

    async def start_server(self) -> None:
        """Start the simulated server. Does not wait for it."""
        with (self.folder / "server.log").open("ab") as log:
            self.server = await asyncio.create_subprocess_exec(
                sys.executable, "-c", _SERVER, str(self.server_port), str(self.step_times), str(self.slots),
                stdout=log, stderr=log,
            )  # fmt: skip

    async def is_ready(self) -> bool:
        """Whether the gateway serves requests. Raises `RuntimeError` if it has ended."""
        if self.process.returncode is not None:
            raise RuntimeError(f"antares serve ended with {self.process.returncode}:\n{self.log[-4000:]}")
        return (await self.get("/ready")).status == 200

    async def get(self, path: str) -> Reply:
        """GET ``path`` from the gateway."""
        return await exchange(self.port, request(path, b"", method="GET"), limit_s=START_S)

    async def status(self) -> dict[str, Any]:
        """Return `/status`."""
        reply = await self.get("/status")
        if reply.status != 200:
            raise RuntimeError(f"/status: {reply.end}")
        document: dict[str, Any] = json.loads(reply.body)
        return document

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the gateway."""
        self.process.send_signal(number)

    def predictor_pid(self) -> int | None:
        """The process id of the predictor that the gateway started; None while there is none."""
        return child_of(self.process.pid, "predictor_service")

    async def stop(self) -> None:
        """Stop the processes. Paused ones are continued first."""
        for process in (getattr(self, "process", None), self.server):
            if process is None or process.returncode is not None:
                continue
            for number in (signal.SIGCONT, signal.SIGTERM):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(number)
            try:
                await asyncio.wait_for(process.wait(), 15)
            except TimeoutError:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def vllm_rig(folder: Path, model: str, max_model_len: int, **config: Any) -> AsyncIterator[Rig]:
    """Run a gateway with a real vLLM on CPU until the block ends, as `make serve` configures it.

    ``max_model_len``: bounds what a request without a limit of output tokens takes.
    """
    document = {**yaml.safe_load(QUICKSTART.read_text(encoding="utf-8")), **config}
    document["engines"][0]["flags"]["max-model-len"] = max_model_len
    port = free_port()
    document["server"] = {**document["server"], "port": port}
    slots = document["engines"][0]["flags"]["max-num-seqs"]
    running = Rig("vllm", folder, document, port, slots, {}, model=model)
    try:
        await running.start()
        yield running
    finally:
        await running.stop()


@contextlib.asynccontextmanager
async def rig(
    kind: Kind,
    folder: Path,
    *,
    slots: int = 64,
    step_times: dict[str, float] | None = None,
    file_limit: int = 0,
    **config: Any,
) -> AsyncIterator[Rig]:
    """Run a gateway with an engine of ``kind`` until the block ends. ``config`` replaces sections of its file.

    ``file_limit``: the largest file (bytes) that the gateway and its predictor may write.
    """
    times, port = step_times or STEP_TIMES, free_port()
    engine: dict[str, Any] = {"kind": kind, "name": kind, "max_num_seqs": slots, "step_times": times}
    server_port = 0
    if kind == "http":
        server_port = free_port()
        engine["base_url"] = f"http://127.0.0.1:{server_port}"
    document = {
        "server": {"drain_s": 5},
        "engines": [engine],
        "predictor": {"enabled": False, "expected_tokens": 64},
        "classes": CLASSES,
        "default_class": "chat",
        "limits": LIMITS,
        **config,
    }
    document["server"] = {**document["server"], "port": port}
    running = Rig(kind, folder, document, port, slots, times, server_port=server_port, file_limit=file_limit)
    try:
        if server_port:
            await running.start_server()
        await running.start()
        yield running
    finally:
        await running.stop()


async def until(condition: Callable[[], Any], within_s: float = 20.0, every_s: float = 0.05) -> float:
    """Wait until ``condition()``, which may be asynchronous, holds. Returns the seconds that it took."""
    started = time.monotonic()
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return time.monotonic() - started
        if time.monotonic() - started > within_s:
            raise TimeoutError(f"not within {within_s:g} s")
        await asyncio.sleep(every_s)


def child_of(pid: int, part: str) -> int | None:
    """The process id of a running child of ``pid`` whose command line contains ``part``; None if there is none."""
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and _parent(folder) == pid and part.encode() in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    return None


def _parent(folder: Path) -> int:
    return int((folder / "stat").read_text().rpartition(")")[2].split()[1])


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def memory_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def descriptors(pid: int) -> int:
    """Open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
