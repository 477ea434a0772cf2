"""A server as a child process on a free port, which ends with its parent."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from engine_adapter.report_channel.server import ADDRESS_ENV

HEALTH_TIMEOUT_S = 2.0
"""Seconds to wait for the server's `/health`. As long as the gateway waits (`engine_adapter.remote.engine`), so that
no server is replaced that the gateway uses."""

SUPERVISOR = Path(__file__).with_name("supervisor.py")

KILL_S = 10.0
"""Seconds that the processes of a killed server may take to end. Convention."""


class ServerProcess:
    """A server that runs ``command``, in which ``{host}`` and ``{port}`` stand for its address.

    Attributes:
        url: its base URL.
        report_port: where its report channel listens, if the environment asks for a free port (``HOST:0``); else None.
    """

    def __init__(self, command: Sequence[str], host: str) -> None:
        port = _free_port(host)
        self.url = f"http://{host}:{port}"
        words = [word.replace("{host}", host).replace("{port}", str(port)) for word in command]
        report_host, _, report_port = os.environ.get(ADDRESS_ENV, "").rpartition(":")
        self.report_port: int | None = None
        environment = dict(os.environ)
        if report_port == "0":
            # Servers of one machine share the environment, but cannot share a port.
            self.report_port = _free_port(report_host.removeprefix("[").removesuffix("]"))
            environment[ADDRESS_ENV] = f"{report_host}:{self.report_port}"
        # NOTE: the supervisor acts when the starting thread ends. Ray runs the methods of an actor in its main thread.
        self._supervisor = subprocess.Popen(
            [sys.executable, "-P", str(SUPERVISOR), *words],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=environment,
        )

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._supervisor.poll()

    def is_healthy(self) -> bool:
        """Whether the server answers `/health`."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=HEALTH_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def stop(self, drain_s: float) -> int:
        """Send SIGTERM, and SIGKILL to all its processes after ``drain_s`` (s). Returns the exit code."""
        for number, within_s in ((signal.SIGTERM, drain_s), (signal.SIGHUP, KILL_S)):
            with contextlib.suppress(ProcessLookupError):
                self._supervisor.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._supervisor.wait(within_s)
        self._supervisor.kill()
        return self._supervisor.wait()


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
