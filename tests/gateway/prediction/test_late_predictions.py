"""A request waits for its predicted length only if the length may decide something."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine_adapter.engine import EngineState, Receive, Scope, Send
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.call import Call
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import POLICIES, make_policy
from gateway.prediction.client import LATER_S
from gateway.requests.request import Request
from gateway.requests.slo import Slo
from gateway.scheduling.admission import AdmissionController
from tests.fixtures.live_gateway import Live, chat, fast_engine, live, serving
from tests.fixtures.live_server import eventually


class HeldService:
    """A scripted predictor that answers once ``release`` is set: 50 tokens, p90 90."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        answer = b'{"observed": 1}'
        if b'"inputs"' in body:
            self.asked += body.count(b'"prompt_tokens"')
            await self.release.wait()
            one = b'{"length": 50, "p90": 90, "raw_p50": 40, "raw_p90": 80}'
            answer = b'{"predictions": [' + b", ".join([one] * body.count(b'"prompt_tokens"')) + b"]}"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer})


@asynccontextmanager
async def held(**engine: Any) -> AsyncIterator[tuple[HeldService, Live]]:
    service = HeldService()
    async with (
        serving(service) as url,
        live(fast_engine(**engine), predictor_url=url, predictor={"timeout_ms": 900, "expected_tokens": 8}) as antares,
    ):
        yield service, antares


async def test_request_is_served_before_its_prediction_while_there_is_room() -> None:
    async with held() as (service, antares):
        answer = await antares.ask(x_slo_report="1")
        assert answer.status_code == 200
        assert answer.json()["antares"]["predicted_tokens"] == 8
        # It has ended before the service would have been asked.
        await asyncio.sleep(5 * LATER_S)
        assert service.asked == 0
        metrics = (await antares.http.get("/metrics")).text
        assert 'antares_predictions_total{source="fallback"} 1.0' in metrics


async def test_request_that_ends_before_its_prediction_is_reported_all_the_same() -> None:
    async with held(output_tokens=300) as (service, antares):
        asking = asyncio.create_task(antares.ask(chat(max_tokens=300)))
        await eventually(lambda: service.asked == 1)
        assert (await asking).status_code == 200
        service.release.set()
        await eventually(lambda: antares.gateway.predictor.reports.sent == 1)
        metrics = (await antares.http.get("/metrics")).text
        assert 'antares_predictions_total{source="service"} 1.0' in metrics


async def test_prediction_that_arrives_later_replaces_the_usual_length() -> None:
    async with held(output_tokens=1000) as (service, antares):
        asking = asyncio.create_task(antares.ask(chat(max_tokens=400)))
        running = antares.gateway.engine_queues[0].running
        await eventually(lambda: running)
        (request,) = running.values()
        assert request.predicted_at_arrival == 8
        service.release.set()
        await eventually(lambda: request.predicted_at_arrival == 50)
        assert request.predicted_tokens >= request.generated or request.generated > 50
        assert (await asking).status_code == 200


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x_slo_e2e_ms": "60000"}, chat()),
        ({"x_slo_ttft_ms": "5"}, chat("word " * 3000)),
        ({}, chat(n=20)),
    ],
    ids=["the pace depends on the length", "the first token is at risk", "many sequences"],
)
async def test_request_waits_for_a_prediction_that_may_decide(headers: dict[str, str], body: Any) -> None:
    async with held(max_num_seqs=32) as (service, antares):
        asking = asyncio.create_task(antares.ask(body, x_slo_report="1", **headers))
        await eventually(lambda: service.asked == 1)
        await asyncio.sleep(0.1)
        assert not asking.done()
        service.release.set()
        await asking
        metrics = (await antares.http.get("/metrics")).text
        assert 'antares_predictions_total{source="service"} 1.0' in metrics


async def test_request_waits_for_its_prediction_behind_others() -> None:
    async with held(max_num_seqs=1, output_tokens=1000) as (service, antares):
        first = asyncio.create_task(antares.ask(chat(max_tokens=600), x_slo_class="free"))
        service.release.set()
        await eventually(lambda: antares.gateway.engine_queues[0].running)
        service.release.clear()
        second = asyncio.create_task(antares.ask(x_slo_class="free"))
        await eventually(lambda: service.asked == 2)
        await asyncio.sleep(0.05)
        assert len(antares.gateway.engine_queues[0].waiting) == 0
        service.release.set()
        await eventually(lambda: len(antares.gateway.engine_queues[0].waiting) == 1)
        first.cancel()
        assert (await second).status_code == 200


def request(number: int, *, prompt: int = 100, slo: Slo | None = None, **changes: Any) -> Request:
    slo = slo or Slo(ttft_s=1.0, tpot_s=0.1)
    return Request(f"r{number}", "chat", 0.0, slo, prompt, 10.0, **changes)


@pytest.mark.parametrize(
    ("asked", "tokens", "expected"),
    [
        (request(0), 100, True),
        (request(0), 700, False),  # memory: 100 + 700 and the running 250 of 2,000 tokens
        (request(0, prompt=300), 100, True),
        (request(0, prompt=600), 100, False),  # prefill: 600 ms of a bound of one second
        (request(0, slo=Slo(ttft_s=1.0, tpot_s=0.019)), 100, False),  # a step takes 10 ms
        (request(0, slo=Slo(ttft_s=1.0, tpot_s=0.021)), 100, True),
        (request(0, slo=Slo(e2e_s=100.0)), 100, False),
        (request(0, slo=Slo()), 100, True),
        (request(0, sequences=8), 10, False),
    ],
)
def test_has_ample_room_up_to_half_of_everything(asked: Request, tokens: float, expected: bool) -> None:
    state = EngineState(max_num_seqs=16, kv_tokens=2000)
    state.step_time.start_over(StepTimes(b=0.0, d=0.01, alpha=0.001))
    admission = AdmissionController(Fcfs(), state)
    other = request(1, slo=Slo())
    other.predict(100.0, 150.0)
    other.admitted_s = other.first_token_s = 0.0
    admission.running[other.id] = other
    asked.predict(tokens / 2, tokens)
    assert admission.has_ample_room(0.0, asked) is expected


def test_has_ample_room_is_false_beside_a_prompt_that_is_prefilled() -> None:
    admission = AdmissionController(Fcfs(), EngineState(max_num_seqs=16, kv_tokens=2000))
    other = request(1)
    other.admitted_s = 0.0
    admission.running[other.id] = other
    assert not admission.has_ample_room(0.0, request(0))
    other.first_token_s = 1.0
    assert admission.has_ample_room(0.0, request(0))


def test_has_ample_room_is_false_behind_a_waiting_request() -> None:
    admission = AdmissionController(Fcfs(), EngineState(max_num_seqs=16, kv_tokens=2000))
    admission.submit(request(1))
    assert not admission.has_ample_room(0.0, request(0))


def test_replace_prediction_revises_a_length_that_is_exceeded() -> None:
    one = request(0, max_tokens=500.0)
    one.advance(5)
    pace_s = one.pace_s = 0.123
    one.replace_prediction(3.0, 6.0)
    assert one.predicted_at_arrival == 3.0
    assert one.predicted_tokens > 5
    assert one.pace_s == pace_s


bounds = st.none() | st.floats(0.02, 5.0)


@st.composite
def requests(draw: st.DrawFn, number: int) -> Request:
    slo = Slo(ttft_s=draw(bounds), tpot_s=draw(bounds))
    made = request(number, prompt=draw(st.integers(1, 3000)), slo=slo, sequences=draw(st.integers(1, 4)))
    made.predict(draw(st.floats(1, 500)), draw(st.floats(500, 1000)))
    return made


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_policy_admits_a_request_that_has_ample_room(policy: str, data: st.DataObject) -> None:
    state = EngineState(max_num_seqs=64, kv_tokens=100_000)
    state.step_time.start_over(StepTimes(b=1e-6, d=0.01, alpha=1e-4))
    admission = AdmissionController(make_policy(policy), state)
    for number in range(data.draw(st.integers(0, 8))):
        other = data.draw(requests(number))
        other.admitted_s = other.first_token_s = 0.0
        admission.running[other.id] = other
    arriving = data.draw(requests(99))
    assume(admission.has_ample_room(0.0, arriving))
    admission.submit(arriving)
    decision = admission.decide(0.0)
    assert decision.admit == [arriving]
    assert decision.reject == []


async def test_late_prediction_keeps_no_request_in_memory_and_counts_as_no_wait() -> None:
    async with held() as (service, antares):
        for _ in range(5):
            answer = await antares.ask()
        gc.collect()
        # The engine may remember who observed its last request.
        assert len([each for each in gc.get_objects() if isinstance(each, Call)]) <= 1
        service.release.set()
        await eventually(lambda: antares.gateway.predictor.reports.sent)
        record = (await antares.http.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
        assert b'"predicting_ms":null' in orjson.dumps(record)
