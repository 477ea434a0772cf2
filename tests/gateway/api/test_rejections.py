"""Rejections: 429 with the attainable bound, 429 for full queues, and 503 while draining."""

from __future__ import annotations

import asyncio
import math

import pytest
from openai import AsyncOpenAI, RateLimitError

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.observability.explanation import explain
from tests.fixtures.live_gateway import CHAT, CLASSES, AdmitNothing, Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually

SLOW = StepTimes(d=0.02, alpha=1e-3)
"""Prefill of 100 words takes 0.1 s, a decode step 20 ms."""


async def test_infeasible_ttft_gets_429_with_the_documented_error() -> None:
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


async def test_request_with_the_attainable_bound_is_served() -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        for bound in ("ttft", "tpot", "e2e"):
            headers = {"x_slo_class": "free", f"x_slo_{bound}_ms": "12"}
            error = (await antares.ask(**headers)).json()["error"]
            assert error["param"] == f"x-slo-{bound}-ms"
            assert error["attainable_ms"] > 12
            headers[f"x_slo_{bound}_ms"] = str(math.ceil(error["attainable_ms"] * 1.01) + 2)
            assert (await antares.ask(**headers)).status_code == 200, bound


async def test_infeasible_tpot_gets_429_without_retry() -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        answer = await antares.ask(x_slo_tpot_ms="10")
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("tpot_unattainable", "x-slo-tpot-ms")
        assert answer.headers["x-should-retry"] == "false"


async def test_infeasible_e2e_gets_429_naming_the_bound() -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        answer = await antares.ask(x_slo_e2e_ms="240", x_slo_class="free")
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("e2e_unattainable", "x-slo-e2e-ms")
        assert error["attainable_ms"] > 240


async def test_late_request_gets_429_with_should_retry() -> None:
    async with live(fast_engine(times=SLOW, max_num_seqs=1)) as antares:
        ahead = [asyncio.create_task(antares.ask(chat("word " * 200), x_slo_class="free")) for _ in range(3)]
        await eventually(lambda: antares.gateway.ledger.open_count == 3)
        answer = await antares.ask(chat("word " * 10), x_slo_ttft_ms="200")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "ttft_unattainable")
        assert answer.headers["x-should-retry"] == "true"
        for task in ahead:
            task.cancel()
        await eventually(antares.is_idle)


async def test_full_class_queue_gets_429_queue_full() -> None:
    async with live(classes={**CLASSES, "chat": {"max_waiting": 1}}) as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        waiting = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        answer = await antares.ask(x_request_id="full")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert "full (classes.chat.max_waiting). The limit is 1;" in answer.json()["error"]["message"]
        explained = explain((await antares.http.get("/v1/requests/full")).json())
        assert "(classes.chat.max_waiting is 1)" in explained
        assert "raise classes.chat.max_waiting" in explained
        assert answer.headers["x-should-retry"] == "true"
        assert int(answer.headers["retry-after"]) >= 1
        waiting.cancel()
        await eventually(antares.is_idle)


@pytest.mark.parametrize("limit", [2, 4096])
async def test_queue_full_states_when_the_busy_engine_has_a_slot(limit: int) -> None:
    # The engine has one slot, which is taken for 80 steps of 0.1 s.
    engine = fast_engine(times=StepTimes(d=0.1, alpha=1e-6), max_num_seqs=1)
    async with live(engine, classes={**CLASSES, "free": {"max_waiting": 1}}) as antares:
        body = chat(max_tokens=80, ignore_eos=True)
        queue = antares.gateway.engine_queues[0]
        ahead = []
        for busy in (lambda: antares.engine.state.engine_running, lambda: queue.waiting):
            ahead.append(asyncio.create_task(antares.ask(body, x_slo_class="free", x_slo_output_tokens="80")))
            await eventually(busy)
        antares.gateway.proxy.open_requests.limit = limit
        answer = await antares.ask(x_slo_class="free")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert 6 <= int(answer.headers["retry-after"]) <= 10
        for task in ahead:
            task.cancel()
        await eventually(antares.is_idle)


async def test_too_many_open_requests_get_429_queue_full() -> None:
    async with live(server={"max_open_requests": 1}) as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        waiting = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        antares.engine.render = None  # type: ignore[assignment,method-assign]  # a full gateway tokenises nothing
        answer = await antares.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert "(server.max_open_requests)" in answer.json()["error"]["message"]
        metrics = (await antares.http.get("/metrics")).text
        assert 'model="simulated",outcome="rejected",reason="gateway_full"' in metrics
        waiting.cancel()
        await eventually(antares.is_idle)


@pytest.mark.parametrize("bound", ["ttft", "tpot"])
async def test_best_effort_class_is_served_without_its_bound(bound: str) -> None:
    async with live(fast_engine(times=SLOW)) as antares:
        headers = {"x_slo_class": "batch", f"x_slo_{bound}_ms": "1", "x_slo_report": "1"}
        answer = await antares.ask(**headers)
        slo_report = answer.json()["antares"]
        assert (answer.status_code, slo_report["best_effort"], slo_report["attained"]) == (200, True, False)
        assert slo_report["violated"] == [bound]


async def test_infeasible_best_effort_request_slows_no_paced_request() -> None:
    async with live(fast_engine(times=StepTimes(d=2e-3, alpha=1e-5), output_tokens=50)) as antares:
        best_effort = asyncio.create_task(
            antares.ask(chat(max_tokens=400, ignore_eos=True), x_slo_class="batch", x_slo_tpot_ms="0.01")
        )
        await eventually(lambda: antares.engine.state.engine_running)
        answer = await antares.ask(x_slo_tpot_ms="20", x_slo_ttft_ms="400", x_slo_report="1")
        assert answer.status_code == 200
        assert answer.json()["antares"]["attained"]
        best_effort.cancel()


async def test_client_that_disconnects_in_the_queue_is_cancelled() -> None:
    async with live() as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        waiting = [asyncio.create_task(antares.ask()) for _ in range(5)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 5)
        for task in waiting:
            task.cancel()
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 5


async def test_openai_client_obeys_x_should_retry(antares: Live) -> None:
    client = AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=3)
    with pytest.raises(RateLimitError) as raised:
        await client.chat.completions.create(**chat(), extra_headers={"x-slo-ttft-ms": "1"})
    assert raised.value.code == "ttft_unattainable"
    assert antares.gateway.ledger.accepted == 1


async def test_waiting_request_gets_503_draining_when_the_gateway_stops() -> None:
    async with live() as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        waiting = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        await antares.gateway.stop()
        answer = await waiting
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "true")
        assert antares.outcomes["rejected"] == 1


async def test_draining_gateway_rejects_new_and_finishes_open_requests() -> None:
    async with live(fast_engine(times=StepTimes(d=5e-3))) as antares:
        served = asyncio.create_task(antares.ask())
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        draining = asyncio.create_task(antares.gateway.drain(2.0))
        await asyncio.sleep(0)
        rejected = await antares.http.post(CHAT, json=chat())
        assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "draining")
        assert (await antares.http.get("/ready")).status_code == 503
        assert (await antares.http.get("/health")).status_code == 200
        assert (await served).status_code == 200
        assert await draining
