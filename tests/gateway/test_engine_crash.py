"""An engine crash: open requests get an error, new ones wait for the restart, and the gateway stays up."""

from __future__ import annotations

import asyncio
import time

import pytest
from openai import APIError, AsyncOpenAI

from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import chat, events, fast_engine, live
from tests.fixtures.live_server import HANG_S, eventually

STEADY = StepTimes(d=0.01)


async def test_stream_in_flight_ends_with_an_openai_error_event() -> None:
    async with live(fast_engine(times=STEADY, output_tokens=500)) as antares:
        pending = asyncio.create_task(antares.ask(chat(stream=True), x_slo_class="free"))
        running = antares.gateway.engine_queues[0].running
        await eventually(lambda: any(request.generated for request in running.values()))
        antares.engine.crash()
        answer = await pending
        assert answer.text.endswith("\n\ndata: [DONE]\n\n")
        assert events(answer.text)[-1]["error"]["code"] == "engine_lost"
        assert antares.outcomes["failed"] == 1


async def test_openai_client_raises_when_the_engine_dies() -> None:
    async with live(fast_engine(times=STEADY, output_tokens=500)) as antares:
        client = AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(**chat(stream=True), extra_headers={"x-slo-class": "free"})
        with pytest.raises(APIError, match="engine died"):
            async for _ in stream:
                antares.engine.crash()


async def test_plain_request_in_flight_gets_503_with_retry_after() -> None:
    async with live(fast_engine(times=STEADY, output_tokens=500)) as antares:
        pending = asyncio.create_task(antares.ask(x_slo_class="free"))
        await eventually(lambda: antares.engine.state.engine_running)
        antares.engine.crash()
        answer = await pending
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_lost")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["x-should-retry"] == "true"


async def test_request_during_a_restart_is_served_after_it() -> None:
    async with live(fast_engine(restart_s=1.0)) as antares:
        antares.engine.crash()
        answers = await asyncio.gather(*(antares.ask() for _ in range(5)))
        assert [answer.status_code for answer in answers] == [200] * 5
        assert all(float(answer.headers["x-antares-queue-ms"]) > 200 for answer in answers)
        assert antares.engine.state.restarts == 1


async def test_request_that_cannot_wait_for_a_restart_gets_503_at_once() -> None:
    async with live(fast_engine(restart_s=30)) as antares:
        antares.engine.crash()
        started = time.monotonic()
        answer = await antares.ask(x_slo_ttft_ms="8000")
        assert time.monotonic() - started < 4
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert 25 <= int(answer.headers["retry-after"]) <= 31
        assert antares.outcomes["rejected"] == 1


async def test_wait_for_a_late_restart_ends_by_the_deadline() -> None:
    async with live(fast_engine(restart_s=30)) as antares:
        antares.engine.crash()
        antares.engine.state.ready_in_s = 0.1
        answer = await antares.ask(x_slo_ttft_ms="1300")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert not antares.gateway.engine_queues[0].waiting


async def test_operator_routes_answer_while_the_engine_is_down() -> None:
    async with live(fast_engine(restart_s=0.3)) as antares:
        antares.engine.crash()
        assert (await antares.http.get("/health")).text == "ok"
        assert (await antares.http.get("/ready")).status_code == 503
        assert 'antares_engine_up{engine="simulated"} 0.0' in (await antares.http.get("/metrics")).text
        assert (await antares.http.get("/status")).json()["engines"][0]["alive"] is False
        assert (await antares.http.get("/v1/models")).json()["data"][0]["id"] == "simulated"
        models = await antares.http.post("/v1/embeddings", json={"input": "a"})
        assert (models.status_code, models.json()["error"]["code"]) == (503, "engine_unavailable")
        await eventually(lambda: antares.engine.state.alive)
        assert (await antares.http.get("/ready")).status_code == 200
        assert (await antares.http.get("/v1/models")).status_code == 200


async def test_ledger_balances_after_repeated_crashes() -> None:
    async with live(fast_engine(times=STEADY, restart_s=0.05, output_tokens=10)) as antares:
        pending = [asyncio.create_task(antares.ask(chat(str(i), stream=i % 2 == 0))) for i in range(20)]
        for _ in range(3):
            await eventually(lambda: antares.engine.state.alive)
            await asyncio.sleep(0.03)
            antares.engine.crash()
        await asyncio.gather(*pending)
        await eventually(antares.is_idle)
        assert sum(antares.outcomes.values()) == antares.gateway.ledger.accepted == 20
        assert antares.outcomes["failed"] > 0


async def test_unexpected_engine_error_gets_502() -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError("a bug")

    async with live() as antares:
        antares.engine.stub = broken
        answer = await antares.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "engine_error")
        assert antares.outcomes["failed"] == 1


async def test_failing_policy_fails_its_waiting_requests() -> None:
    class FailingPolicy:
        name, gate = "failing", "open"

        def decide(self, *inputs: object) -> None:
            raise ZeroDivisionError

    async with live() as antares:
        antares.gateway.engine_queues[0].admission.policy = FailingPolicy()  # type: ignore[assignment]
        async with asyncio.timeout(HANG_S):
            answer = await antares.ask()
        assert answer.status_code >= 500
        assert antares.is_idle()
