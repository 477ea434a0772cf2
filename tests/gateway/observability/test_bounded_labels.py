"""Labels that a client can vary: their number in `/metrics` is bounded."""

from __future__ import annotations

import asyncio

from tests.fixtures.live_gateway import chat, fast_engine, live


async def test_distinct_tpot_bounds_do_not_grow_metrics() -> None:
    async with live(fast_engine(max_num_seqs=64), policy={"name": "scorpio"}) as gateway:

        async def metrics() -> str:
            return (await gateway.http.get("/metrics")).text

        async def ask(number: int) -> None:
            headers = {"x-slo-tpot-ms": f"{500 + number / 10}", "x-slo-ttft-ms": "60000"}
            await gateway.http.post("/v1/chat/completions", json=chat(max_tokens=2), headers=headers)

        await asyncio.gather(*(ask(number) for number in range(50)))
        before = (await metrics()).count("\n")
        await asyncio.gather(*(ask(number) for number in range(50, 1000)))
        after = await metrics()
    assert 'tpot_ms="other"' in after
    assert after.count("\n") <= before + 20
