"""Readiness with reasons, exit codes, systemd notifications, and the operator's commands."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.remote.engine import HttpEngine
from gateway import sd_notify
from gateway.api.auth import hash_key
from gateway.serve import EXIT_CUT
from tests.fixtures.live_gateway import CHAT, chat, fast_engine, live
from tests.fixtures.live_server import HANG_S, eventually, serve
from tests.fixtures.ports import free_port
from tests.fixtures.served_process import served

pytestmark = [pytest.mark.process, pytest.mark.skipif(sys.platform == "win32", reason="uses signals")]

RUN_MAIN = "import sys; sys.argv[0] = 'antares'; from gateway.cli import main; main()"
OPERATOR, TENANT = "operator-0123456789abcdef", "tenant-0123456789abcdef"

CONFIG = """\
server: {port: PORT, drain_s: 5}
engines: [ENGINES]
predictor: {enabled: false}
default_class: chat
classes: {chat: {}}
"""
SIMULATED = "{kind: simulated, name: here, step_times: {d: 0.02}}"


def config(*engines: str, port: int = 0) -> str:
    return CONFIG.replace("ENGINES", ", ".join(engines)).replace("PORT", str(port))


async def run_antares(*arguments: str, **env: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN_MAIN, *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **env},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), HANG_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


# --- readiness --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def plain_http_server() -> AsyncIterator[int]:
    """A server that does not speak TLS. Yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1:CLOSED", "connection refused"),
        ("http://no-such-host.invalid:8000", "DNS error"),
        ("https://127.0.0.1:PLAIN", "TLS error"),
        ("http://127.0.0.1:PLAIN", "returned 400"),
    ],
)
async def test_ready_names_the_engine_and_the_cause(url: str, cause: str) -> None:
    async with plain_http_server() as plain:
        url = url.replace("CLOSED", str(free_port())).replace("PLAIN", str(plain))
        async with live(HttpEngine("gpu-1", url)) as antares:
            answer = await antares.http.get("/ready")
            assert answer.status_code == 503
            assert not answer.json()["ready"]
            assert "engine gpu-1: " in answer.json()["why"]
            assert answer.json()["why"].count("gpu-1") == 1
            assert cause in answer.json()["why"]
            assert (await antares.http.get("/health")).status_code == 200


async def test_ready_names_every_engine_that_is_down() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    crashed = fast_engine(name="here", restart_s=30)
    async with live(crashed, more_engines=[HttpEngine("gpu-1", url)]) as antares:
        assert (await antares.http.get("/ready")).json() == {"ready": True}
        crashed.crash()
        why = (await antares.http.get("/ready")).json()["why"]
        assert "engine here: it crashed and restarts; engine gpu-1: " in why
        antares.gateway.proxy.draining = True
        assert (await antares.http.get("/ready")).json() == {"ready": False, "why": "draining"}


async def test_requests_while_engines_start_get_503_with_retry_after() -> None:
    starts = asyncio.Event()
    slow = fast_engine(name="slow")
    start = slow.start

    async def slow_start(events: EngineEvents) -> None:
        await starts.wait()
        await start(events)

    async with live(slow) as antares:
        await slow.stop()
        slow.state.why_down = "it is starting"
        slow.start = slow_start  # type: ignore[method-assign]
        starting = asyncio.create_task(antares.gateway.start())
        await eventually(lambda: antares.gateway.proxy.loading)
        assert (await antares.http.get("/health")).status_code == 200
        ready = await antares.http.get("/ready")
        assert (ready.status_code, ready.json()["why"]) == (503, "engine slow: it is starting")
        answer = await antares.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        starts.set()
        await starting
        assert (await antares.ask()).status_code == 200


async def test_serve_says_that_it_is_not_ready_and_why_and_keeps_trying(tmp_path: Path) -> None:
    port, upstream = free_port(), free_port()
    (tmp_path / "antares.yaml").write_text(
        config(f"{{kind: http, name: gpu-1, base_url: 'http://127.0.0.1:{upstream}'}}", port=port)
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN_MAIN, "serve", "-c", str(tmp_path / "antares.yaml"), stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        said = ""
        async with asyncio.timeout(HANG_S):
            while "is not ready" not in said:
                said = (await process.stderr.readline()).decode()
        assert "engine gpu-1" in said
        assert "connection refused" in said
        (tmp_path / "up").mkdir()
        async with served(tmp_path / "up", config(SIMULATED, port=upstream)), asyncio.timeout(HANG_S):
            while "is ready at" not in said:
                assert "is not ready" not in said or "connection refused" in said
                said = (await process.stderr.readline()).decode()
            assert "engines gpu-1" in said
            async with httpx.AsyncClient(trust_env=False) as http:
                assert (await http.get(f"http://127.0.0.1:{port}/ready")).json() == {"ready": True}
    finally:
        process.terminate()
        await process.stderr.read()
        assert await process.wait() == 0


async def test_serve_exits_1_with_a_message_if_a_server_rejects_the_key(tmp_path: Path) -> None:
    async def unauthorized(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serve(unauthorized) as upstream:
        (tmp_path / "antares.yaml").write_text(config(f"{{kind: http, name: gpu-1, base_url: '{upstream}'}}"))
        code, _, err = await run_antares("serve", "-c", str(tmp_path / "antares.yaml"))
    assert code == 1
    assert "antares: engine gpu-1 at" in err
    assert "set its api_key_env" in err
    assert "Traceback" not in err


async def test_start_names_the_engine_that_is_not_up(tmp_path: Path) -> None:
    down = f"{{kind: http, name: gpu-1, base_url: 'http://127.0.0.1:{free_port()}'}}"
    async with served(tmp_path, config(SIMULATED, down)) as (process, http):
        assert (await http.get("/ready")).json() == {"ready": True}
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        await process.stderr.read()
        assert await process.wait() == 0


# --- exit codes -------------------------------------------------------------------------------------------------------


async def test_exit_code_is_0_if_every_request_ended(tmp_path: Path) -> None:
    async with served(tmp_path, config(SIMULATED)) as (process, http):
        url = httpx.URL(str(http.base_url))
        # A request whose body never comes is not accepted, so ending it cuts nothing.
        _, silent = await asyncio.open_connection(url.host, url.port)
        silent.write(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-length: 500\r\n\r\n{{".encode())
        stream = asyncio.create_task(http.post(CHAT, json=chat(stream=True, max_tokens=30, ignore_eos=True)))
        while "antares_ledger_open 1.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert (await stream).text.endswith("data: [DONE]\n\n")
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        await process.stderr.read()
        assert await process.wait() == 0
        silent.close()


async def test_exit_code_tells_of_requests_that_were_cut(tmp_path: Path) -> None:
    async with served(tmp_path, config(SIMULATED).replace("drain_s: 5", "drain_s: 0.3")) as (process, http):
        stream = asyncio.create_task(http.post(CHAT, json=chat(stream=True, max_tokens=4000, ignore_eos=True)))
        while "antares_ledger_open 1.0" not in (await http.get("/metrics")).text:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert '"code":"draining"' in (await stream).text
        assert process.stderr is not None
        log = (await process.stderr.read()).decode()
        assert await process.wait() == EXIT_CUT
        assert "1 requests are still open" in log


# --- systemd ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(tmp_path: Path) -> Any:
    """The socket that systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(HANG_S)
        yield channel


@pytest.mark.parametrize("path", ["", "relative", "/no/such/socket"])
def test_notify_without_systemd_sends_nothing(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    assert not sd_notify.notify(READY=1)


def test_notify_sends_one_datagram_without_extra_lines(monkeypatch: pytest.MonkeyPatch, systemd: Any) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    assert sd_notify.notify(READY=1, STATUS="not ready:\nX=1")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=not ready: X=1"


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets")
def test_notify_supports_abstract_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0antares-test-{os.getpid()}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@antares-test-{os.getpid()}")
        assert sd_notify.notify(READY=1)
        assert channel.recv(100) == b"READY=1"


async def test_serve_notifies_systemd_of_every_change(
    tmp_path: Path, systemd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", systemd.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    systemd.setblocking(True)

    async def told(prefix: str) -> str:
        """Return the next message that begins with ``prefix``."""
        while True:
            message = (await asyncio.to_thread(systemd.recv, 4096)).decode()
            if message.startswith(prefix):
                return message

    async with asyncio.timeout(100), served(tmp_path, config(SIMULATED)) as (process, _):
        assert await told("READY=1") == "READY=1\nSTATUS=ready"
        await told("WATCHDOG=1")
        await told("WATCHDOG=1")
        (tmp_path / "antares.yaml").write_text("nonsense")
        process.send_signal(signal.SIGHUP)
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", await told("RELOADING"))
        assert "STATUS=ready; the last reload failed: line 1" in await told("READY=1")
        (tmp_path / "antares.yaml").write_text(config(SIMULATED))
        process.send_signal(signal.SIGHUP)
        assert await told("READY=1") == "READY=1\nSTATUS=ready"
        process.send_signal(signal.SIGTERM)
        assert await told("STOPPING") == "STOPPING=1\nSTATUS=draining"
        assert process.stderr is not None
        await process.stderr.read()
        assert await process.wait() == 0


# --- operator's commands ----------------------------------------------------------------------------------------------


async def test_reload_command_prints_what_changed_and_where_the_mistakes_are(tmp_path: Path) -> None:
    file = tmp_path / "antares.yaml"
    async with served(tmp_path, config(SIMULATED)) as (process, http):
        url = str(http.base_url)
        text = config(SIMULATED, port=9).replace("chat: {}", "chat: {ttft_ms: 900}")
        file.write_text(text)
        code, out, _ = await run_antares("config", "reload", "--url", url)
        assert (code, out) == (0, "changed: classes\nneeds a restart: server.port\n")
        file.write_text(text.replace("900", "-1"))
        code, out, err = await run_antares("config", "reload", "--url", url)
        assert (code, out) == (1, "")
        assert f"{file}: line 5: classes.chat.ttft_ms: " in err
        code, out, _ = await run_antares("config", "reload", "--url", url, "--json")
        assert code == 1
        assert [m["key"] for m in json.loads(out)["mistakes"]] == ["classes.chat.ttft_ms"]
        file.write_text(text.replace("900", "800"))
        code, out, _ = await run_antares("config", "reload", "--pid", str(process.pid))
        assert code == 0
        async with asyncio.timeout(HANG_S):
            while (await http.get("/status")).json()["classes"]["chat"]["slo_ttft_ms"] != 800:
                await asyncio.sleep(0.05)
        process.terminate()


@pytest.mark.parametrize("arguments", [("--url", "http://127.0.0.1:9"), ("--url", "nonsense"), ("--pid", "4194305")])
async def test_reload_command_exits_2_without_a_gateway(arguments: tuple[str, str]) -> None:
    code, out, err = await run_antares("config", "reload", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("antares: ")
    assert "Traceback" not in err


async def test_reload_route_requires_the_key_of_an_operator() -> None:
    keys = [
        {"sha256": hash_key(OPERATOR), "tenant": "ops", "operator": True},
        {"sha256": hash_key(TENANT), "tenant": "a"},
    ]
    async with live(keys=keys) as antares:

        async def reload(key: str | None) -> int:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return (await antares.http.post("/reload", headers=headers)).status_code

        assert [await reload(key) for key in (None, "wrong", TENANT)] == [401, 401, 403]
        # No file, so nothing can be reloaded.
        assert await reload(OPERATOR) == 422


async def test_reload_route_without_keys_is_for_local_programs_only() -> None:
    async with live() as antares:
        assert (await antares.http.post("/reload", headers={"origin": "http://evil.example"})).status_code == 403
        assert (await antares.http.post("/reload")).status_code == 422
        assert (await antares.http.get("/reload")).status_code == 405
        transport = httpx.ASGITransport(antares.gateway, client=("192.0.2.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as remote:
            assert (await remote.post("/reload")).status_code == 403


@pytest.mark.parametrize("pid", ["0", "-1"])
async def test_reload_command_signals_no_group_of_processes(pid: str) -> None:
    """``systemctl show -p MainPID`` prints 0 for a service that does not run."""
    code, out, err = await run_antares("config", "reload", "--pid", pid)
    assert (code, out) == (2, "")
    assert "--pid" in err


@pytest.mark.parametrize("key", ["a" * 20 + "\n" + "b" * 20, "ключ" * 6])
@pytest.mark.parametrize("command", [("config", "reload"), ("top", "--once"), ("explain", "r-1")])
async def test_commands_name_the_variable_of_a_broken_key_and_not_the_key(command: tuple[str, ...], key: str) -> None:
    code, out, err = await run_antares(*command, ANTARES_OPERATOR_KEY=key)
    assert (code, out) == (2, "")
    assert err.startswith("antares: the key in ANTARES_OPERATOR_KEY has a line break")
    assert key[:8] not in err


async def test_explain_says_that_another_server_is_no_gateway() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"id": "r-1"}'})

    async with serve(other) as url:
        code, out, err = await run_antares("explain", "r-1", "--url", url)
    assert (code, out) == (1, "")
    assert "is it an Antares gateway?" in err


async def test_health_command(tmp_path: Path) -> None:
    async with live() as antares:
        assert await run_antares("health", "--url", antares.url) == (0, "ok\n", "")
        port = str(urlsplit(antares.url).port)
        assert await run_antares("health", ANTARES_PORT=port) == (0, "ok\n", "")
        assert (await run_antares("health", "--url", antares.url, "--ready"))[0] == 0
        antares.gateway.proxy.draining = True
        assert await run_antares("health", "--url", antares.url, "--ready") == (1, "", "not ready: draining\n")
    code, _, err = await run_antares("health", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert "Connection refused" in err
