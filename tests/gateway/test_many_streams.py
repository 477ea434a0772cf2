"""2,000 streams at once, of which a third disconnects: the ledger balances, and the engines are free afterwards."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.connections import raise_descriptor_limit
from tests.fixtures.live_gateway import CHAT, chat
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.ports import free_ports
from tests.fixtures.served_process import served
from tests.fixtures.simulated_servers import running, servers

STREAMS = 2000
TOKENS = 12
STEP_S = 0.5
"""So slow that all streams run at the same time before the first one ends."""

BODY = json.dumps(chat(stream=True, max_tokens=TOKENS, ignore_eos=True)).encode()
REQUEST = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (CHAT.encode(), len(BODY), BODY)


async def client(port: int, leaves: str) -> str:
    """Open a stream and return how it ended. ``leaves``: "before" the answer, "within" it, or "" at its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(REQUEST)
        await writer.drain()
        if leaves == "before":
            return "left"
        if leaves == "within":
            await reader.readuntil(b"data: ")
            return "left"
        text = await reader.readuntil(b"[DONE]")
        return "whole" if text.startswith(b"HTTP/1.1 200") and text.count(b'"content"') >= TOKENS - 1 else "broken"
    finally:
        writer.transport.abort()


@pytest.mark.process
@pytest.mark.timeout(240)
@pytest.mark.parametrize("processes", [1, 2])
async def test_ledger_balances_after_2000_streams_of_which_a_third_disconnects(tmp_path: Path, processes: int) -> None:
    raise_descriptor_limit()
    port = free_ports(1 + processes)
    async with servers(processes, times=StepTimes(d=STEP_S), max_num_seqs=STREAMS) as engines:
        document: dict[str, Any] = {
            "server": {"port": port, "processes": processes},
            "engines": [
                {"kind": "http", "name": f"main-{at}", "base_url": f"http://127.0.0.1:{at}", "max_num_seqs": STREAMS}
                for at in engines
            ],
            "predictor": {"enabled": False},
            "classes": {"chat": {"max_waiting": STREAMS}},
            "default_class": "chat",
        }
        async with served(tmp_path, yaml.safe_dump(document)) as (process, http):
            kinds = ["within", "before", "", "", "", ""] * (STREAMS // 6 + 1)
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, sum(running(engines)))
                    await asyncio.sleep(0.05)

            watching = asyncio.create_task(watch())
            ends = await asyncio.gather(*(client(port, kind) for kind in kinds[:STREAMS]))
            watching.cancel()
            left = sum(kind != "" for kind in kinds[:STREAMS])
            assert Counter(ends) == {"left": left, "whole": STREAMS - left}
            assert most > STREAMS // 2, "the streams did not run at once"
            await eventually(lambda: sum(running(engines)) == 0)

            async def ledger() -> Counter[str]:
                own = range(port + 1, port + 1 + processes) if processes > 1 else [port]
                found: Counter[str] = Counter()
                for at in own:
                    found.update((await http.get(f"http://127.0.0.1:{at}/status")).json()["ledger"])
                return found

            async with asyncio.timeout(HANG_S):
                while (found := await ledger())["open"]:
                    await asyncio.sleep(0.1)
            # The ledger does not count a request whose client left before the gateway read it.
            assert STREAMS - left <= found["finished"] <= found["accepted"] <= STREAMS
            assert found["accepted"] == found["finished"] + found["cancelled"]
            assert found["cancelled"] > 0
            process.terminate()
            assert await process.wait() == 0
