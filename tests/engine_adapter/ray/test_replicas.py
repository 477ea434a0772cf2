"""Servers in a Ray cluster of several nodes on this machine, behind a gateway: a node is lost under load."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures.live_gateway import CHAT, chat
from tests.fixtures.served_process import served

pytestmark = [
    pytest.mark.process,
    pytest.mark.timeout(240),
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install -e '.[ray]'"),
]

HOST = "127.0.0.2"
"""Of the cluster. NOTE: Ray replaces 127.0.0.1 by the machine's own address."""

SIMULATED = """\
engines: [{kind: simulated, step_times: {d: 0.02}}]
predictor: {enabled: false}
policy: {name: fcfs}
server: {allow_anonymous: true, drain_s: 5}
classes: {any: {}}
default_class: any
"""

GATEWAY = """\
server: {port: 0, drain_s: 5}
engines:
  - kind: http
    name: ray
    base_url: http://engines.invalid:8000
    send_slo: false
    discover: {file: FILE, every_s: 0.5}
predictor: {enabled: false}
classes: {chat: {}}
default_class: chat
"""


class Cluster:
    """Ray's own utility: nodes as processes of this machine. Each but the first has room for one engine."""

    def __init__(self, folder: str) -> None:
        # Imported here, because it takes seconds and reads the environment.
        from ray import cluster_utils

        self._nodes = cluster_utils.Cluster(
            initialize_head=True,
            # Otherwise Ray takes over the signals of this process.
            shutdown_at_exit=False,
            head_node_args={"num_cpus": 1, "node_ip_address": HOST, "include_dashboard": False, "temp_dir": folder},
        )

    @property
    def address(self) -> str:
        return str(self._nodes.address)

    async def add(self) -> Any:
        return await asyncio.to_thread(self._nodes.add_node, num_cpus=1, resources={"engine": 1}, node_ip_address=HOST)

    async def kill(self, node: Any) -> None:
        await asyncio.to_thread(self._nodes.remove_node, node, allow_graceful=False)

    async def stop(self) -> None:
        await asyncio.to_thread(self._nodes.shutdown)


@asynccontextmanager
async def launched(folder: Path, address: str, file: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run `python -m engine_adapter.ray` with two simulated servers."""
    (folder / "engine.yaml").write_text(SIMULATED)
    server = [sys.executable, "-c", "from gateway.cli import main; main()", "serve", "-c", str(folder / "engine.yaml")]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "engine_adapter.ray", "--address", address, "--node-ip", HOST, "--replicas", "2",
        "--cpus", "0", "--resource", "engine=1", "--file", str(file), "--drain-s", "5",
        "--", *server, "--host", "{host}", "--port", "{port}",
        stderr=(folder / "ray.log").open("wb"),
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def entries_in(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["engines"]) if file.exists() else []


def urls_in(file: Path) -> list[str]:
    return [entry["url"] for entry in entries_in(file)]


async def until(condition: Callable[[], Awaitable[bool]], within_s: float = 60) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.2)


async def samples(http: httpx.AsyncClient, name: str) -> list[float]:
    lines = (await http.get("/metrics")).text.splitlines()
    return [float(line.split()[-1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]


async def ended(http: httpx.AsyncClient, tokens: int) -> str:
    """Return how a stream ended: ``done`` or the code of its error."""
    body = {**chat(stream=True, max_tokens=tokens, ignore_eos=True), "model": "simulated"}
    answer = await http.post(CHAT, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    last = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    if last[-1] == "data: [DONE]" and '"error"' not in last[-2]:
        return "done"
    error = next(json.loads(line[6:]) for line in reversed(last) if line.startswith("data: {"))
    return str(error["error"]["code"])


@pytest.fixture
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder whose path is short enough for Ray's sockets. Ray's environment is set meanwhile."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        # Ray notes the latest cluster there. It creates the folder for its default clusters only.
        monkeypatch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        # Each server chooses a port for its report channel, which these simulated ones do not have.
        monkeypatch.setenv("ANTARES_REPORT_ADDRESS", f"{HOST}:0")
        yield folder


async def test_lost_node_costs_only_its_streams_and_ray_replaces_its_server(tmp_path: Path, short_folder: str) -> None:
    file = tmp_path / "engines.json"
    cluster = await asyncio.to_thread(Cluster, short_folder)
    try:
        lost, _ = await cluster.add(), await cluster.add()
        async with launched(tmp_path, cluster.address, file) as launcher:

            async def both_listed() -> bool:
                assert launcher.returncode is None, (tmp_path / "ray.log").read_text()[-3000:]
                return len(urls_in(file)) == 2

            await until(both_listed)
            first = set(urls_in(file))
            assert len({entry["report_port"] for entry in entries_in(file)}) == 2
            async with served(tmp_path, GATEWAY.replace("FILE", str(file))) as (_, http):
                await until(lambda: _both_up(http))
                streams = [asyncio.create_task(ended(http, 400)) for _ in range(12)]
                await until(lambda: _both_busy(http))

                await cluster.kill(lost)
                # Ray and the kernel end its server some time later. What is sent meanwhile may be in flight on it too.
                await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
                after = await asyncio.gather(*(ended(http, 2) for _ in range(6)))
                assert after == ["done"] * 6
                outcomes = await asyncio.gather(*streams)
                # Its server gets SIGTERM or SIGKILL, whichever Ray and the kernel send first.
                assert "done" in outcomes
                assert set(outcomes) - {"done"} in ({"engine_lost"}, {"draining"}, {"engine_lost", "draining"})

                await cluster.add()

                async def replacement_listed() -> bool:
                    return await both_listed() and len(first & set(urls_in(file))) == 1

                await until(replacement_listed)
                await until(lambda: _both_up(http))
                more = [asyncio.create_task(ended(http, 200)) for _ in range(8)]
                await until(lambda: _both_busy(http))
                assert set(await asyncio.gather(*more)) == {"done"}
                await until(lambda: _idle(http))

            last = urls_in(file)
            launcher.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(launcher.wait(), 30) == 0
            async with httpx.AsyncClient(trust_env=False) as http:
                for url in last:
                    with pytest.raises(httpx.TransportError):
                        await http.get(f"{url}/health")
    finally:
        await cluster.stop()


async def _both_up(http: httpx.AsyncClient) -> bool:
    return await samples(http, "antares_engine_up") == [1.0, 1.0]


async def _both_busy(http: httpx.AsyncClient) -> bool:
    return sum(value > 0 for value in await samples(http, "antares_engine_running_sequences")) == 2


async def _idle(http: httpx.AsyncClient) -> bool:
    return await samples(http, "antares_ledger_open") == [0.0]
