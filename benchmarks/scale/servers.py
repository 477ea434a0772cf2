"""Two servers as processes of this machine, either behind fixed addresses or as actors of a Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import psutil

from benchmarks.faults.client import exchange, request
from benchmarks.faults.rig import free_port, until
from engine_adapter.ray.server_process import SUPERVISOR

COUNT = 2
NAMES = ("a", "b")
"""Engines of the gateway, for servers at fixed addresses."""

LIMIT_S = 600.0
"""Longest start (s) of the servers, on a busy machine."""

RESTART_S = 1.0
"""Seconds after which a process that has ended is started again. Convention of supervisors."""

STOP_S = 30.0
"""Seconds that the servers have to stop."""

Engine = Literal["vllm", "simulated"]
MODULES: dict[Engine, str] = {
    "vllm": "engine_adapter.vllm.cpu_server",
    "simulated": "benchmarks.scale.simulated_server",
}
MODELS: dict[Engine, str] = {"vllm": "smollm2-135m-instruct", "simulated": "simulated"}


class Servers(Protocol):
    """Two servers, and how one that is lost is replaced."""

    async def start(self) -> None:
        """Start the servers and wait until they answer."""

    def engines(self) -> list[dict[str, Any]]:
        """Return the gateway's sections of ``engines``, without limits and step times."""

    def urls(self) -> list[str]:
        """Return the addresses of the servers that are known to answer."""

    async def kill(self, url: str) -> list[psutil.Process]:
        """Kill the server at ``url``, and have it replaced. Returns the processes that must end."""

    async def stop(self) -> None:
        """Stop everything that was started."""


def server_command(engine: Engine) -> list[str]:
    """Return the command of a server, with ``{host}`` and ``{port}`` in place of its address."""
    return [sys.executable, "-m", MODULES[engine], "--host", "{host}", "--port", "{port}"]


@dataclass
class HttpServers:
    """Two processes at fixed addresses. This object is their supervisor, and starts them again when they end."""

    engine: Engine
    folder: Path
    _ports: list[int] = field(default_factory=list)
    _processes: dict[int, asyncio.subprocess.Process] = field(default_factory=dict)
    _supervision: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Start the servers and wait until they answer."""
        self._ports = [free_port() for _ in range(COUNT)]
        for port in self._ports:
            await self._start(port)
        self._supervision = [asyncio.create_task(self._supervise(port)) for port in self._ports]
        await until(self._all_answer, LIMIT_S, 0.5)

    async def _all_answer(self) -> bool:
        return all([await answers(url) for url in self.urls()])

    def engines(self) -> list[dict[str, Any]]:
        """See `Servers.engines`."""
        return [{"name": name, "base_url": url} for name, url in zip(NAMES, self.urls(), strict=True)]

    def urls(self) -> list[str]:
        """See `Servers.urls`."""
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    async def kill(self, url: str) -> list[psutil.Process]:
        """Kill the server's process. See `Servers.kill`."""
        server = psutil.Process(self._processes[urlsplit(url).port or 0].pid)
        lost = [server, *server.children(recursive=True)]
        server.kill()
        return lost

    async def stop(self) -> None:
        """See `Servers.stop`."""
        for task in self._supervision:
            task.cancel()
        await asyncio.gather(*self._supervision, return_exceptions=True)
        await asyncio.gather(*(stop(process) for process in self._processes.values()))

    async def _supervise(self, port: int) -> None:
        while True:
            await self._processes[port].wait()
            await asyncio.sleep(RESTART_S)
            await self._start(port)

    async def _start(self, port: int) -> None:
        words = [
            word.replace("{host}", "127.0.0.1").replace("{port}", str(port)) for word in server_command(self.engine)
        ]
        with (self.folder / f"server-{port}.log").open("ab") as log:
            self._processes[port] = await asyncio.create_subprocess_exec(*words, stdout=log, stderr=log)


@dataclass
class RayServers:
    """Two servers that `python -m engine_adapter.ray` runs in a Ray cluster of its own on this machine."""

    engine: Engine
    folder: Path
    _launcher: asyncio.subprocess.Process | None = None

    @property
    def _file(self) -> Path:
        return self.folder / "engines.json"

    async def start(self) -> None:
        """Start the cluster and the servers, and wait until they answer."""
        # Both fit on a machine with one core.
        options = ["--replicas", str(COUNT), "--cpus", "0.5", "--file", str(self._file), "--drain-s", str(STOP_S / 2)]
        with (self.folder / "ray.log").open("ab") as log:
            self._launcher = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "engine_adapter.ray", *options, "--", *server_command(self.engine),
                stdout=log, stderr=log, env={**os.environ, "RAY_DEDUP_LOGS": "0"},
            )  # fmt: skip
        await until(self._all_answer, LIMIT_S, 0.5)

    def _all_answer(self) -> bool:
        assert self._launcher is not None
        if self._launcher.returncode is not None:
            raise RuntimeError(f"the launcher ended:\n{(self.folder / 'ray.log').read_text()[-4000:]}")
        return len(self.urls()) == COUNT

    def engines(self) -> list[dict[str, Any]]:
        """See `Servers.engines`."""
        discover = {"file": str(self._file), "every_s": 0.5}
        return [{"name": "ray", "base_url": "http://engines.invalid:8000", "discover": discover}]

    def urls(self) -> list[str]:
        """See `Servers.urls`."""
        return list(json.loads(self._file.read_text())["engines"]) if self._file.exists() else []

    async def kill(self, url: str) -> list[psutil.Process]:
        """Kill the process of the actor, whose child is the server. See `Servers.kill`."""
        port = str(urlsplit(url).port)
        supervisor = next(
            process
            for process in psutil.process_iter(["cmdline"])
            if str(SUPERVISOR) in (words := process.info["cmdline"] or ()) and port in words
        )
        actor = supervisor.parent()
        lost = [actor, *actor.children(recursive=True)]
        actor.kill()
        return lost

    async def stop(self) -> None:
        """See `Servers.stop`."""
        if self._launcher is not None:
            await stop(self._launcher)


def make_servers(kind: str, engine: Engine, folder: Path) -> Servers:
    """Return the servers of ``kind``, not started."""
    return HttpServers(engine, folder) if kind == "http" else RayServers(engine, folder)


async def answers(url: str) -> bool:
    """Whether the server at ``url`` on this machine answers `/health`."""
    port = urlsplit(url).port or 0
    return (await exchange(port, request("/health", b"", method="GET"), limit_s=2)).status == 200


async def stop(process: asyncio.subprocess.Process) -> None:
    """Send SIGTERM, and SIGKILL after `STOP_S`."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
