"""A server as a child process: its address, its health and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from engine_adapter.ray.server_process import ServerProcess

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform != "linux", reason="uses PR_SET_PDEATHSIG")]

SERVER = """
import http.server, signal, subprocess, sys, time
if sys.argv[4:]: subprocess.Popen(["sleep", "60"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *args): pass
def stop(*_):
    time.sleep(float(sys.argv[3])); sys.exit(7)
signal.signal(signal.SIGTERM, stop)
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""

ODD_SERVER = """
import socket, sys
listening = socket.create_server((sys.argv[1], int(sys.argv[2])))
while True:
    with listening.accept()[0] as client: client.recv(1000); client.send(b"odd\\n\\n")
"""


def command(stops_after_s: float = 0.0, *, child: bool = False) -> list[str]:
    return [sys.executable, "-c", SERVER, "{host}", "{port}", str(stops_after_s), *["child"] * child]


def wait_healthy(server: ServerProcess) -> None:
    until = time.monotonic() + 60
    while not server.is_healthy():
        assert server.exit_code is None
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_ended(server: ServerProcess) -> None:
    until = time.monotonic() + 60
    while server.exit_code is None:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    running = ServerProcess(command(), "127.0.0.1")
    yield running
    running.stop(0)


def test_server_gets_a_free_address_and_answers(server: ServerProcess) -> None:
    wait_healthy(server)
    other = ServerProcess(command(), "127.0.0.1")
    try:
        assert urlsplit(server.url).hostname == "127.0.0.1"
        assert other.url != server.url
        wait_healthy(other)
    finally:
        other.stop(0)


def test_server_that_does_not_answer_in_http_is_not_healthy() -> None:
    server = ServerProcess([sys.executable, "-c", ODD_SERVER, "{host}", "{port}"], "127.0.0.1")
    try:
        port, until = urlsplit(server.url).port, time.monotonic() + 60
        while not is_open(port):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert not server.is_healthy()
    finally:
        server.stop(0)


def is_open(port: int | None) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_stop_waits_for_the_drain_and_returns_the_exit_code(server: ServerProcess) -> None:
    slow = ServerProcess(command(0.3), "127.0.0.1")
    wait_healthy(slow)
    assert slow.stop(10) == 7
    assert not slow.is_healthy()
    assert slow.stop(10) == 7


def test_server_that_does_not_stop_is_killed() -> None:
    stubborn = ServerProcess(command(60), "127.0.0.1")
    wait_healthy(stubborn)
    assert stubborn.stop(0.1) == 128 + signal.SIGKILL


def test_command_that_does_not_exist_ends_at_once() -> None:
    absent = ServerProcess(["/no/such/program"], "127.0.0.1")
    assert absent.stop(10) != 0
    assert not absent.is_healthy()


@pytest.mark.parametrize("stops_after_s", [0.0, 60.0])
def test_server_and_its_processes_end_with_the_parent(stops_after_s: float) -> None:
    script = f"""
import time
from engine_adapter.ray.server_process import ServerProcess
server = ServerProcess({command(stops_after_s, child=True)!r}, "127.0.0.1")
while not server.is_healthy(): time.sleep(0.05)
print(server._supervisor.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    supervisor = int(parent.stdout.readline())
    processes = [supervisor, *descendants(supervisor)]
    assert len(processes) == 3
    parent.kill()
    parent.wait()
    wait_until_gone(processes)


def test_processes_of_a_server_end_with_it() -> None:
    server = ServerProcess(command(child=True), "127.0.0.1")
    wait_healthy(server)
    supervisor = server._supervisor.pid
    first, child = descendants(supervisor)
    os.kill(first, signal.SIGKILL)
    wait_until_gone([first, child])
    assert server.stop(10) == 128 + signal.SIGKILL


def wait_until_gone(processes: list[int]) -> None:
    until = time.monotonic() + 50
    while any(is_running(pid) for pid in processes):
        assert time.monotonic() < until
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:  # noqa: PTH123 - a process may end meanwhile
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_servers_of_one_host_get_report_ports_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str
) -> None:
    monkeypatch.setenv("ANTARES_REPORT_ADDRESS", f"{host}:0")
    code = "import os, sys; open(sys.argv[2], 'w').write(os.environ['ANTARES_REPORT_ADDRESS'])"
    ports = set()
    for name in ("a", "b"):
        server = ServerProcess([sys.executable, "-c", code, "{port}", str(tmp_path / name)], "127.0.0.1")
        wait_ended(server)
        assert (tmp_path / name).read_text() == f"{host}:{server.report_port}"
        ports.add(server.report_port)
    assert len(ports) == 2


def test_report_address_with_a_port_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTARES_REPORT_ADDRESS", "127.0.0.1:9410")
    server = ServerProcess(["true"], "127.0.0.1")
    wait_ended(server)
    assert server.report_port is None
