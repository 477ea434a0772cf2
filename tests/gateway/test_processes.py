"""`server.processes`: several processes share a port, divide the engines, and survive the loss of one of them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gateway.config.schema import parse
from gateway.listening import ServeError
from gateway.processes import parent
from gateway.serve import EXIT_CUT
from gateway.supervisor import Supervisor
from tests.fixtures.live_gateway import CLASSES, gateway_config
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.ports import free_port, free_ports
from tests.fixtures.served_process import served, until_said
from tests.fixtures.simulated_servers import ask, running, servers, stream

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(180),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shares a port"),
]


def document(ports: list[int], **server: Any) -> dict[str, Any]:
    """Return a configuration with an engine at each of ``ports``."""
    return {
        "server": {"port": 0, "processes": 2, **server},
        "engines": [
            {"kind": "http", "name": f"main-{number}", "base_url": f"http://127.0.0.1:{port}"}
            for number, port in enumerate(ports)
        ],
        "predictor": {"enabled": False},
        "classes": CLASSES,
        "default_class": "free",
    }


@asynccontextmanager
async def two(folder: Path, ports: list[int], **server: Any) -> AsyncIterator[tuple[Process, httpx.AsyncClient]]:
    """Serve with two processes. Yields the parent and a client; each of its calls may reach another process."""
    async with served(folder, yaml.safe_dump(document(ports, **server))) as (process, http):
        http._transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_keepalive_connections=0))
        try:
            yield process, http
        finally:
            with suppress(ProcessLookupError):
                process.terminate()
            async with asyncio.timeout(HANG_S):
                await process.wait()


def command_lines(process: Process) -> dict[int, list[str]]:
    """Return the command line of each child of ``process``. A child that ends meanwhile is missing."""
    lines = {}
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split():
        with suppress(OSError):
            lines[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    return lines


def children(process: Process) -> list[int]:
    """Return the process ids of the gateway's processes, in their order."""
    lines = command_lines(process)
    found = {json.loads(line[-2])["index"]: pid for pid, line in lines.items() if "gateway.processes" in line}
    return [found[index] for index in sorted(found)]


def alive(pids: Iterable[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


async def statuses(http: httpx.AsyncClient, calls: int = 30) -> dict[int, dict[str, Any]]:
    """Return the status of each process that answered one of ``calls``, by its index."""
    answers = [await http.get("/status") for _ in range(calls)]
    return {document["shard"]["index"]: document for document in (answer.json() for answer in answers)}


async def test_processes_share_the_port_and_divide_engines_and_requests(tmp_path: Path) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (_, http):
        assert Counter([await ask(http) for _ in range(40)]) == {200: 40}
        found = await statuses(http)
        assert [found[index]["shard"] for index in (0, 1)] == [{"index": 0, "count": 2}, {"index": 1, "count": 2}]
        names = [{engine["name"] for engine in found[index]["engines"]} for index in (0, 1)]
        assert names[0] | names[1] == {"main-0", "main-1"}
        assert not names[0] & names[1]
        served_by = [found[index]["ledger"]["finished"] for index in (0, 1)]
        assert sum(served_by) == 40
        # The kernel spreads the connections. All 40 reach one process once in 5 * 10^11 times.
        assert min(served_by) > 0


async def test_each_process_has_a_port_of_its_own(tmp_path: Path) -> None:
    port = free_ports(3)
    async with servers(2) as engines, two(tmp_path, [*engines], port=port) as (process, http):
        for index in (0, 1):
            own = f"http://{http.base_url.host}:{port + 1 + index}"
            assert {(await http.get(f"{own}/status")).json()["shard"]["index"] for _ in range(5)} == {index}
            assert (await http.get(f"{own}/metrics")).status_code == 200
        assert len(children(process)) == 2


async def test_loss_of_a_process_costs_its_own_requests_only(tmp_path: Path) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (process, http):
        streams = [asyncio.create_task(stream(http)) for _ in range(12)]
        await eventually(lambda: sum(running(engines)) == 12 and min(running(engines)) > 0)
        lost = next(index for index, found in (await statuses(http)).items() if found["engines"][0]["name"] == "main-0")
        of_lost = running(engines)[0]
        first = children(process)
        os.kill(first[lost], signal.SIGKILL)
        # Until the kernel has closed its sockets, a connection may still reach it, and breaks.
        await eventually(lambda: not alive([first[lost]]))
        assert [await ask(http) for _ in range(5)] == [200] * 5
        assert Counter(await asyncio.gather(*streams)) == {True: 12 - of_lost, False: of_lost}
        await eventually(lambda: running(engines) == [0, 0])
        await eventually(lambda: len(children(process)) == 2)
        assert children(process)[lost] != first[lost]
        assert children(process)[1 - lost] == first[1 - lost]
        async with asyncio.timeout(HANG_S):
            while len(found := await statuses(http, calls=5)) < 2 or not found[lost]["ledger"]["finished"]:
                assert await ask(http) == 200


async def test_killed_process_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    async with servers(2) as engines, two(tmp_path, [*engines]) as (process, _):
        os.kill(children(process)[0], signal.SIGKILL)
        await until_said(process, "restarting it")
        process.terminate()
        assert await process.wait() == 0
        assert not [*(tmp_path / "tmp").iterdir()]


async def test_process_that_is_stopped_alone_drains_and_is_replaced(tmp_path: Path) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (process, http):
        streams = [asyncio.create_task(stream(http)) for _ in range(12)]
        await eventually(lambda: sum(running(engines)) == 12)
        first = children(process)
        os.kill(first[0], signal.SIGTERM)
        assert await asyncio.gather(*streams) == [True] * 12
        await eventually(lambda: len(children(process)) == 2 and children(process)[0] != first[0])
        assert process.returncode is None


@pytest.mark.parametrize(("drain_s", "code"), [(30, 0), (0, EXIT_CUT)])
async def test_sigterm_drains_all_processes(tmp_path: Path, drain_s: float, code: int) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines], drain_s=drain_s) as (process, http):
        streams = [asyncio.create_task(stream(http)) for _ in range(8)]
        await eventually(lambda: min(running(engines)) > 0)
        pids = children(process)
        process.terminate()
        assert await process.wait() == code
        assert await asyncio.gather(*streams) == [True] * 8 or code == EXIT_CUT
        assert not alive(pids)


async def test_sigterm_to_parent_and_processes_cuts_no_request(tmp_path: Path) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (process, http):
        streams = [asyncio.create_task(stream(http)) for _ in range(8)]
        await eventually(lambda: sum(running(engines)) == 8)
        for pid in [*children(process), process.pid]:
            os.kill(pid, signal.SIGTERM)
        assert await process.wait() == 0
        assert await asyncio.gather(*streams) == [True] * 8


async def test_second_signal_ends_the_drain_of_all_processes(tmp_path: Path) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (process, http):
        streams = [asyncio.create_task(stream(http)) for _ in range(8)]
        await eventually(lambda: min(running(engines)) > 0 and sum(running(engines)) == 8)
        process.terminate()
        await until_said(process, "draining")
        process.terminate()
        assert await process.wait() == EXIT_CUT
        await asyncio.gather(*streams)


@pytest.mark.parametrize("by", ["signal", "request"])
async def test_reload_reaches_all_processes(tmp_path: Path, by: str) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (process, http):
        changed = document([*engines])
        changed["classes"] = {**CLASSES, "new": {}}
        (tmp_path / "antares.yaml").write_text(yaml.safe_dump(changed))
        if by == "signal":
            process.send_signal(signal.SIGHUP)
        else:
            assert (await http.post("/reload")).json()["changed"] == ["classes"]
        async with asyncio.timeout(HANG_S):
            while sum("new" in found["classes"] for found in (await statuses(http)).values()) < 2:
                await asyncio.sleep(0.05)


async def test_reload_names_a_port_that_needs_a_restart(tmp_path: Path) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (_, http):
        (tmp_path / "antares.yaml").write_text(yaml.safe_dump(document([*engines], port=8100, drain_s=5)))
        report = (await http.post("/reload")).json()
        assert report["needs_restart"] == ["server.port"]


async def test_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    async with servers(2) as engines, two(tmp_path, [*engines]) as (process, _):
        pids = children(process)
        process.kill()
        await eventually(lambda: not alive(pids))


async def test_processes_share_one_predictor(tmp_path: Path) -> None:
    port = free_ports(3)
    async with servers(2) as engines:
        config = {**document([*engines], port=port), "predictor": {"enabled": True}}
        async with served(tmp_path, yaml.safe_dump(config)) as (process, http):
            lines = command_lines(process)
            assert sorted("predictor_service.cli" in line for line in lines.values()) == [False, False, True]
            assert await ask(http) == 200
            os.kill(next(pid for pid, line in lines.items() if "predictor_service.cli" in line), signal.SIGKILL)
            own = [f"http://{http.base_url.host}:{port + 1 + index}/metrics" for index in (0, 1)]

            async def counts() -> list[str]:
                return [_restarts(await http.get(url)) for url in own]

            async with asyncio.timeout(HANG_S):
                while "1.0" not in await counts():
                    await asyncio.sleep(0.1)
            assert await counts() == ["1.0", "0.0"], "one process counts for all"
            process.terminate()
            assert await process.wait() == 0
            assert not alive(lines)


def _restarts(metrics: httpx.Response) -> str:
    found = re.search(r"^antares_predictor_restarts_total (\S+)", metrics.text, re.MULTILINE)
    return found[1] if found else ""


async def test_parent_tells_systemd_once_all_processes_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        told: list[str] = []

        def hear() -> list[str]:
            with suppress(BlockingIOError):
                while True:
                    told.append(systemd.recv(4096).decode())
            return told

        async with servers(2) as engines, two(tmp_path, [*engines]) as (process, _):
            await eventually(lambda: "READY=1\nSTATUS=ready" in hear())
            told.clear()
            process.send_signal(signal.SIGHUP)
            await eventually(lambda: "READY=1\nSTATUS=ready" in hear())
            first = children(process)[1]
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: hear()[-1] == "STATUS=process 1: it ended with code -9")
            await eventually(lambda: hear()[-1] == "READY=1\nSTATUS=ready")
            assert told[0].startswith("RELOADING=1\nMONOTONIC_USEC=")
            process.terminate()
            assert await process.wait() == 0
            assert hear()[-1] == "STOPPING=1\nSTATUS=draining"


@asynccontextmanager
async def parent_of(folder: Path, ports: list[int]) -> AsyncIterator[tuple[parent.Parent, asyncio.Task[int]]]:
    """Run a parent in this process. Yields it and the task with its exit code, once its processes are ready."""
    file = folder / "antares.yaml"
    file.write_text(yaml.safe_dump(document(ports)))
    config = gateway_config(**document(ports))
    one = parent.Parent(file, config, {}, config.shard.shard())
    running = asyncio.create_task(one.run(free_port(), folder))
    await eventually(lambda: running.done() or (pids_of(one) and all(process.is_ready for process in one.processes)))
    yield one, running
    if not running.done():
        one.end()
        assert await running == 0


def pids_of(one: parent.Parent) -> list[int]:
    return [process.pid or 0 for process in one.processes]


async def test_hung_process_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "HANG_S", 3.0)
    async with servers(2) as engines, parent_of(tmp_path, [*engines]) as (one, _):
        first = pids_of(one)
        os.kill(first[0], signal.SIGSTOP)
        await eventually(lambda: pids_of(one)[0] not in (0, first[0]) and one.processes[0].is_ready)
        assert pids_of(one)[1] == first[1]


async def test_process_that_hangs_while_it_drains_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "HANG_S", 3.0)
    async with servers(2) as engines, parent_of(tmp_path, [*engines]) as (one, running):
        os.kill(pids_of(one)[0], signal.SIGSTOP)
        one.end()
        async with asyncio.timeout(25):
            assert await running == 1


async def test_processes_survive_a_pause_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "HANG_S", 3.0)
    async with servers(2) as engines, parent_of(tmp_path, [*engines]) as (one, _):
        first = pids_of(one)
        for pid in first:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3.5)  # noqa: ASYNC251 - pauses the parent too
        await asyncio.sleep(0)
        for pid in first:
            os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(1)
        assert pids_of(one) == first


async def test_failed_start_of_a_process_leaves_none_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = Supervisor.start, []

    async def failing(self: Supervisor) -> None:
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        await start(self)
        started.append(self.pid)

    monkeypatch.setattr(Supervisor, "start", failing)
    with pytest.raises(ServeError, match=r"cannot start 2 processes: .* Resource temporarily unavailable"):
        async with parent_of(tmp_path, [1, 2]) as (_, running):
            await running
    assert not alive(started)


async def test_module_in_the_current_folder_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gateway.py").write_text("raise SystemExit('not the gateway')")
    monkeypatch.chdir(tmp_path)
    async with servers(2) as engines, parent_of(tmp_path, [*engines]) as (_, running):
        assert not running.done()


async def test_folder_with_too_long_a_name_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    with pytest.raises(ServeError, match="AF_UNIX path too long"):
        async with parent_of(folder, [1, 2]) as (_, running):
            await running


# --- starts that fail -------------------------------------------------------------------------------------------------


async def fails(folder: Path, config: dict[str, Any]) -> tuple[int, str]:
    """Return the exit code and the log of `antares serve`, which must not start."""
    (folder / "antares.yaml").write_text(yaml.safe_dump(config))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from gateway.cli import main; main()", "serve", "-c", str(folder / "antares.yaml"),
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, log = await asyncio.wait_for(process.communicate(), HANG_S)
    assert process.returncode is not None
    return process.returncode, log.decode()


@pytest.mark.parametrize("after", [0, 2])
async def test_port_that_is_taken_is_named(tmp_path: Path, after: int) -> None:
    port = free_ports(3)
    with socket.create_server(("127.0.0.1", port + after)):
        code, log = await fails(tmp_path, document([1, 2], port=port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port + after}: Address already in use" in log
    assert ("process 1 did not start; the lines above say why" in log) == (after > 0)


async def test_second_gateway_on_the_same_port_does_not_start(tmp_path: Path) -> None:
    port = free_ports(3)
    async with servers(1) as engines, two(tmp_path, [*engines], port=port):
        (tmp_path / "second").mkdir()
        code, log = await fails(tmp_path / "second", document([*engines], port=port))
        assert (code, f"cannot listen on 127.0.0.1:{port}" in log) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": [{"kind": "simulated", "name": "here"}]}, r"own engine 'here', which is of kind simulated"),
        ({"server": {"port": 65534, "processes": 2}}, "each process has a port of its own, after server.port"),
        ({"server": {"processes": 33}}, "less than or equal to 32"),
    ],
)
def test_configuration_that_cannot_be_divided_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse({**document([1, 2]), **change})


async def test_signals_count_while_the_predictor_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actions: list[Any] = []

    async def start(self: Supervisor) -> None:
        actions.extend(map(signal.getsignal, (signal.SIGHUP, signal.SIGTERM)))
        raise ServeError("seen")

    monkeypatch.setattr(Supervisor, "start", start)
    config = gateway_config(**{**document([1, 2]), "predictor": {"enabled": True}})
    with pytest.raises(ServeError, match="seen"):
        await parent.serve_all(tmp_path / "antares.yaml", config, {})
    assert len(actions) == 2
    assert signal.SIG_DFL not in actions


async def test_too_many_processes_of_all_gateways_are_refused(tmp_path: Path) -> None:
    config = gateway_config(**{**document([1, 2], processes=32), "shard": {"index": 0, "count": 3}})
    with pytest.raises(ServeError, match=r"is 96, and at most 64 processes divide the engines"):
        await parent.serve_all(tmp_path / "antares.yaml", config, {})


def test_gateway_of_several_counts_all_processes() -> None:
    config = gateway_config(**{**document([1, 2], processes=2), "shard": {"index": 1, "count": 3}})
    one = parent.Parent(Path("antares.yaml"), config, {"logging.level": "debug"}, config.shard.shard())
    child = one._child(1, 8100)
    assert child.overrides == {"logging.level": "debug", "shard.count": 6, "shard.index": 3}
