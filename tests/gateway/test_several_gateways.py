"""Two gateway processes divide two servers: disjoint shares, the loss of one gateway, and its restart."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine_adapter.engine import EngineEvents
from gateway.serve import ServeError
from gateway.serve import serve as serve_gateway
from tests.fixtures.live_gateway import CHAT, CLASSES, StubbedEngine, chat, fast_engine, gateway_config
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.ports import free_port
from tests.fixtures.served_process import served

LONG = chat(stream=True, max_tokens=3000, ignore_eos=True)
"""A stream of about 3 s."""


@asynccontextmanager
async def servers(count: int) -> AsyncIterator[dict[int, StubbedEngine]]:
    """Serve ``count`` simulated engines. Yields them by port."""
    async with AsyncExitStack() as stack:
        engines = {}
        for _ in range(count):
            port, engine = free_port(), fast_engine()
            await engine.start(EngineEvents())
            stack.push_async_callback(engine.stop)
            await stack.enter_async_context(serve(engine.app, port))
            engines[port] = engine
        yield engines


def configuration(folder: Path, ports: list[int], index: int) -> str:
    """Return the file of gateway ``index`` of two. Only the index differs."""
    (folder / "urls.json").write_text(json.dumps({"engines": [f"http://127.0.0.1:{port}" for port in ports]}))
    discover = {"file": str(folder / "urls.json"), "every_s": 0.5}
    engine = {"kind": "http", "name": "pool", "base_url": f"http://127.0.0.1:{ports[0]}", "discover": discover}
    document: dict[str, Any] = {
        "server": {"port": 0},
        "engines": [engine],
        "shard": {"index": index, "count": 2},
        "predictor": {"enabled": False},
        "classes": CLASSES,
        "default_class": "free",
    }
    return yaml.safe_dump(document)


async def ask(http: httpx.AsyncClient) -> int:
    return (await http.post(CHAT, json=chat(max_tokens=2))).status_code


async def stream(http: httpx.AsyncClient) -> bool:
    """Return whether a long stream ends normally."""
    last = ""
    try:
        async with http.stream("POST", CHAT, json=LONG) as answer:
            async for line in answer.aiter_lines():
                last = line or last
    except httpx.HTTPError:
        return False
    return last == "data: [DONE]"


def running(engines: dict[int, StubbedEngine]) -> list[int]:
    return [engine.state.engine_running for engine in engines.values()]


@pytest.mark.process
@pytest.mark.timeout(120)
async def test_loss_of_a_gateway_costs_its_own_requests_only(tmp_path: Path) -> None:
    folders = [tmp_path / str(index) for index in range(2)]
    for folder in folders:
        folder.mkdir()
    async with servers(2) as engines, AsyncExitStack() as second:
        files = [configuration(tmp_path, [*engines], index) for index in range(2)]
        _, survivor = await second.enter_async_context(served(folders[1], files[1]))
        async with served(folders[0], files[0]) as (lost, http):
            assert [(await one.get("/status")).json()["shard"]["index"] for one in (http, survivor)] == [0, 1]
            first = [asyncio.create_task(stream(http)) for _ in range(4)]
            await eventually(lambda: sum(running(engines)) == 4)
            # Each gateway sends all its requests to its own server.
            assert sorted(running(engines)) == [0, 4]
            own = running(engines).index(4)
            others = [asyncio.create_task(stream(survivor)) for _ in range(3)]
            await eventually(lambda: running(engines)[1 - own] == 3)
            lost.kill()
            assert await asyncio.gather(*first) == [False] * 4
            assert await asyncio.gather(*others) == [True] * 3
            # The server stops computing what the dead gateway's clients cannot get.
            await eventually(lambda: running(engines) == [0, 0])
            assert await ask(survivor) == 200
        async with served(folders[0], files[0]) as (_, http):
            again = asyncio.create_task(stream(http))
            await eventually(lambda: running(engines)[own] == 1)
            assert await again
            assert await ask(http) == 200


async def test_gateway_that_does_not_know_its_index_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop")
    with pytest.raises(ServeError, match=r"'laptop' does not end in a number from 0 to 1; set shard\.index"):
        await serve_gateway(gateway_config(shard={"count": 2}, server={"port": 0}))
