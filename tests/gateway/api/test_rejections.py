"""A request that cannot be served in time is told so, at once and exactly."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection
from typing import Any

import pytest
from openai import AsyncOpenAI, RateLimitError

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.policies.base import Decision
from tests.fixtures.live_gateway import CHAT, CLASSES, Live, chat, eventually, fast_engine, live

SLOW = StepTimes(d=0.02, alpha=1e-3)
"""A prompt of 100 words takes 0.1 s; a token takes 20 ms, so 26 ms with eta."""


class AdmitNothing:
    """A policy under which everybody waits."""

    name = "nothing"
    gate = "open"

    def decide(self, now: float, waiting: Collection[Any], running: Collection[Any], engine: Any) -> Decision:
        return Decision()


async def test_a_hopeless_ttft_is_a_429_in_the_shape_of_the_contract() -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        answer = await antares.ask(chat("word " * 100), x_slo_ttft_ms="60")
        error = answer.json()["error"]
        assert answer.status_code == 429
        assert set(error) == {"message", "type", "code", "param", "predicted_ms", "attainable_ms"}
        assert (error["type"], error["code"], error["param"]) == (
            "slo_unattainable", "ttft_unattainable", "x-slo-ttft-ms",
        )  # fmt: skip
        assert 100 <= error["predicted_ms"] <= error["attainable_ms"]
        assert answer.headers["x-should-retry"] == "false"
        assert int(answer.headers["retry-after"]) >= 1
        assert antares.outcomes["rejected"] == 1


async def test_asking_again_for_what_is_attainable_is_served() -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        for bound in ("ttft", "tpot", "e2e"):
            headers = {"x_slo_class": "free", f"x_slo_{bound}_ms": "12"}
            refused = (await antares.ask(**headers)).json()["error"]
            assert refused["param"] == f"x-slo-{bound}-ms"
            assert refused["attainable_ms"] > 12
            headers[f"x_slo_{bound}_ms"] = str(math.ceil(refused["attainable_ms"] * 1.01) + 2)
            assert (await antares.ask(**headers)).status_code == 200, bound


async def test_a_hopeless_tpot_is_refused_at_once() -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        answer = await antares.ask(x_slo_tpot_ms="10")
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("tpot_unattainable", "x-slo-tpot-ms")
        assert answer.headers["x-should-retry"] == "false"


async def test_a_hopeless_e2e_bound_is_named_and_predicted_beyond_what_was_asked() -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        answer = await antares.ask(x_slo_e2e_ms="240", x_slo_class="free")
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("e2e_unattainable", "x-slo-e2e-ms")
        assert error["attainable_ms"] > 240


async def test_a_queue_too_long_for_the_deadline_is_worth_another_try() -> None:
    async with live(fast_engine(times=SLOW, max_num_seqs=1)) as antares:
        ahead = [asyncio.create_task(antares.ask(chat("word " * 200), x_slo_class="free")) for _ in range(3)]
        await eventually(lambda: antares.gateway.ledger.open_count == 3)
        answer = await antares.ask(chat("word " * 10), x_slo_ttft_ms="200")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "ttft_unattainable")
        assert answer.headers["x-should-retry"] == "true"
        for asking in ahead:
            asking.cancel()
        await eventually(antares.is_idle)


async def test_a_full_class_queue_is_a_429_queue_full() -> None:
    async with live(classes={**CLASSES, "chat": {"max_waiting": 1}}) as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        waiting = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        answer = await antares.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert answer.headers["x-should-retry"] == "true"
        assert int(answer.headers["retry-after"]) >= 1
        waiting.cancel()
        await eventually(antares.is_idle)


async def test_more_open_requests_than_the_gateway_takes_is_a_429_queue_full() -> None:
    async with live(server={"max_open_requests": 1}) as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        waiting = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        answer = await antares.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        waiting.cancel()
        await eventually(antares.is_idle)


@pytest.mark.parametrize("bound", ["ttft", "tpot"])
async def test_a_best_effort_class_is_served_late_instead_of_rejected(bound: str) -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        headers = {"x_slo_class": "batch", f"x_slo_{bound}_ms": "1", "x_slo_report": "1"}
        answer = await antares.ask(**headers)
        slo_report = answer.json()["antares"]
        assert (answer.status_code, slo_report["best_effort"], slo_report["attained"]) == (200, True, False)
        assert slo_report["violated"] == [bound]


async def test_an_impossible_best_effort_request_does_not_slow_the_rest_down() -> None:
    async with live(fast_engine(times=StepTimes(d=2e-3, alpha=1e-5), output_tokens=50)) as antares:
        greedy = asyncio.create_task(
            antares.ask(chat(max_tokens=400, ignore_eos=True), x_slo_class="batch", x_slo_tpot_ms="0.01")
        )
        await eventually(lambda: antares.engine.state.engine_running)
        answer = await antares.ask(x_slo_tpot_ms="20", x_slo_ttft_ms="400", x_slo_report="1")
        assert answer.status_code == 200
        assert answer.json()["antares"]["attained"]
        greedy.cancel()


async def test_a_client_that_leaves_the_queue_is_cancelled_and_forgotten() -> None:
    async with live() as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        waiting = [asyncio.create_task(antares.ask()) for _ in range(5)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 5)
        for task in waiting:
            task.cancel()
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 5


async def test_the_openai_client_obeys_x_should_retry(antares: Live) -> None:
    client = AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=3)
    with pytest.raises(RateLimitError) as refused:
        await client.chat.completions.create(**chat(), extra_headers={"x-slo-ttft-ms": "1"})
    assert refused.value.code == "ttft_unattainable"
    assert antares.gateway.ledger.accepted == 1


async def test_a_draining_gateway_takes_nothing_new_and_finishes_what_it_has() -> None:
    async with live(fast_engine(times=StepTimes(d=5e-3))) as antares:
        served = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        draining = asyncio.create_task(antares.gateway.drain(2.0))
        await asyncio.sleep(0)
        refused = await antares.http.post(CHAT, json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert (await antares.http.get("/ready")).status_code == 503
        assert (await antares.http.get("/health")).status_code == 200
        assert (await served).status_code == 200
        assert await draining
