"""Engines that hang, and the limits of failover: deadlines, budgets, streams that have begun."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from benchmarks.faults.server import FaultyServer
from engine_adapter.remote.engine import HttpEngine
from gateway.scheduling.retry_budget import RetryBudget
from tests.fixtures.engine_pair import CLASSES, pair
from tests.fixtures.live_gateway import live, serving
from tests.fixtures.live_server import HANG_S, eventually

pytestmark = pytest.mark.process

# --- hanging engines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_engine_is_left_after_the_timeout(stream: bool) -> None:
    async with pair("hang", failover={"first_token_timeout_s": 1.0}) as engines:
        started = time.monotonic()
        assert (await engines.ask(stream)).status_code == 200
        assert time.monotonic() - started < 15, "the default timeout is 20 s"
        assert await engines.metric('antares_failovers_total{engine="A",reason="hung"} 1.0')
        for _ in range(2):
            engines.antares.gateway.engine_queues[0].circuit.on_failure("hung", time.monotonic(), time.monotonic())
        asked = len(engines.a.asked)
        assert await engines.ask_many(20) == {200: 20}
        assert len(engines.a.asked) == asked


async def test_deadline_leaves_time_to_move_from_a_hanging_engine() -> None:
    async with pair("hang") as engines:
        started = time.monotonic()
        assert (await engines.ask(x_slo_class="tight")).status_code == 200
        assert time.monotonic() - started < 15, "served within its bound, although the timeout is 20 s"


async def test_only_engine_that_is_slow_is_not_left() -> None:
    server = FaultyServer(token_s=0.3)
    config: dict[str, Any] = {"classes": CLASSES, "failover": {"first_token_timeout_s": 0.1}}
    async with serving(server) as url, live(HttpEngine("A", url), **config) as antares:
        answer = await antares.ask({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True})
        assert (answer.status_code, len(server.asked)) == (200, 1)


# --- limits of failover -----------------------------------------------------------------------------------------------


async def test_stream_that_has_begun_is_not_sent_again() -> None:
    async with pair("cut") as engines:
        answer = await engines.ask(stream=True)
        assert answer.status_code == 200
        assert "engine_lost" in answer.text
        assert engines.b.asked == []
        await eventually(lambda: engines.antares.outcomes["failed"] == 1)


async def test_plain_response_that_breaks_is_sent_again() -> None:
    async with pair("cut") as engines:
        answer = await engines.ask(stream=False)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 5)
        assert len(engines.b.asked) == 1
        await eventually(engines.antares.is_idle)
        assert engines.antares.outcomes["finished"] == 1


async def test_engine_that_breaks_its_streams_rests() -> None:
    async with pair("cut") as engines:
        async with asyncio.timeout(HANG_S):
            while engines.circuit() == "closed":
                await engines.ask(stream=True)
        assert len(engines.a.asked) == 3
        assert (await engines.ask(stream=True)).text.endswith("data: [DONE]\n\n")


async def test_exhausted_budget_passes_the_engines_error() -> None:
    async with pair("500", failover={"retry_ratio": 0, "min_retries_per_s": 0}) as engines:
        answer = await engines.ask()
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "scripted 500")
        assert engines.b.asked == []
        assert await engines.metric('antares_failovers_denied_total{reason="budget"} 1.0')


@pytest.mark.parametrize(("slo_class", "status"), [("brief", 500), ("soft", 200), ("free", 200)])
async def test_request_past_its_deadline_moves_only_if_it_is_best_effort(slo_class: str, status: int) -> None:
    async with pair("500") as engines:
        engines.a.delay_s = 0.6
        assert (await engines.ask(x_slo_class=slo_class)).status_code == status
        denied = await engines.metric('antares_failovers_denied_total{reason="deadline"} 1.0')
        assert denied == (status == 500)


@pytest.mark.parametrize("padding", [1000, 100_000])
async def test_held_error_passes_if_it_is_small_and_is_replaced_otherwise(padding: int) -> None:
    async with pair("500", failover={"retry_ratio": 0, "min_retries_per_s": 0}) as engines:
        engines.a.padding = padding
        answer = await engines.ask()
        small = padding == 1000
        assert (answer.status_code, "scripted" in answer.text) == (500, small)
        assert (answer.json()["error"]["code"] == "engine_error") == (not small)


def test_retry_budget_is_a_share_of_the_requests_plus_a_minimum() -> None:
    budget = RetryBudget(ratio=0.2, per_second=1.0)
    assert sum(budget.spend(0.0) for _ in range(100)) == 10
    for _ in range(100):
        budget.on_request(0.0)
    assert sum(budget.spend(0.0) for _ in range(100)) == 20
    assert not budget.available(0.5)
    assert budget.available(1.0)
    for _ in range(1000):
        budget.on_request(2.0)
    assert sum(budget.spend(200.0) for _ in range(1000)) == 10, "what was not used is forgotten"
