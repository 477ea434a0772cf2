"""Labels that a client can vary: their number in `/metrics` is bounded."""

from __future__ import annotations

import asyncio

from tests.fixtures.live_gateway import chat, fast_engine, live


async def test_distinct_tpot_bounds_do_not_grow_metrics() -> None:
    async with live(fast_engine(max_num_seqs=64), policy={"name": "scorpio"}) as gateway:

        async def metric_lines() -> int:
            return len((await gateway.http.get("/metrics")).text.splitlines())

        async def ask(number: int) -> None:
            headers = {"x-slo-tpot-ms": f"{500 + number / 10}", "x-slo-ttft-ms": "60000"}
            await gateway.http.post("/v1/chat/completions", json=chat(max_tokens=2), headers=headers)

        await asyncio.gather(*(ask(number) for number in range(50)))
        before = await metric_lines()
        await asyncio.gather(*(ask(number) for number in range(50, 1000)))
        assert await metric_lines() <= before + 20
