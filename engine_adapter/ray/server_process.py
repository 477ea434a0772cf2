"""A server as a child process on a free port, which ends with its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence

HEALTH_TIMEOUT_S = 1.0
"""Seconds to wait for the server's `/health`."""

_LAUNCH = f"""\
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Has the kernel send SIGTERM when the parent ends (PR_SET_PDEATHSIG, Linux only), and becomes the server."""


class ServerProcess:
    """A server that runs ``command``, in which ``{host}`` and ``{port}`` stand for its address."""

    def __init__(self, command: Sequence[str], host: str) -> None:
        port = _free_port(host)
        self.url = f"http://{host}:{port}"
        words = [word.replace("{host}", host).replace("{port}", str(port)) for word in command]
        # NOTE: the signal fires when the starting thread ends. Ray runs the methods of an actor in its main thread.
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *words], stdin=subprocess.DEVNULL, start_new_session=True
        )

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def is_healthy(self) -> bool:
        """Whether the server answers `/health`."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=HEALTH_TIMEOUT_S) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self, drain_s: float) -> int:
        """Send SIGTERM, and SIGKILL to its whole process group after ``drain_s``. Returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(drain_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
