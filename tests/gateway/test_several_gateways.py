"""Two gateway processes divide two servers: disjoint shares, the loss of one gateway, and its restart."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.listening import ServeError
from gateway.serve import serve as serve_gateway
from tests.fixtures.live_gateway import CLASSES, gateway_config
from tests.fixtures.live_server import eventually
from tests.fixtures.served_process import served
from tests.fixtures.simulated_servers import ask, running, servers, stream


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
