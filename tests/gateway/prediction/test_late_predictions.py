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
from gateway.scheduling.room import ROOM_S
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


def paced_engine(max_num_seqs: int = 16) -> AdmissionController:
    """Return the admission to an engine with steps of 10 ms, whose prompts of 100 tokens take 100 ms."""
    state = EngineState(max_num_seqs=max_num_seqs, kv_tokens=20_000)
    state.step_time.start_over(StepTimes(b=0.0, d=0.01, alpha=0.001))
    return AdmissionController(Fcfs(), state)


@pytest.mark.parametrize("admitted", [True, False])
def test_has_ample_room_beside_prompts_that_take_less_than_half_of_every_bound(admitted: bool) -> None:
    admission = paced_engine()
    for number in range(3):
        other = request(number)
        admission.submit(other)
        if admitted:
            other.admitted_s = 0.0
            admission.waiting.remove(other)
            admission.running[other.id] = other
    # Prompts get 0.9 of the time, so four of them take 444 ms, and five 556 ms, of a bound of one second.
    assert admission.has_ample_room(0.0, request(8))
    assert not admission.has_ample_room(0.2, request(8))  # of 800 ms
    assert not admission.has_ample_room(0.0, request(8, prompt=200))
    assert admission.has_ample_room(0.0, request(8, prompt=100, slo=Slo()))
    assert not admission.has_ample_room(0.0, request(8, prompt=200, slo=Slo()))  # the others' bounds


def test_has_ample_room_again_when_an_answer_began() -> None:
    admission = paced_engine()
    others = [request(number) for number in range(5)]
    for other in others:
        other.admitted_s = 0.0
        admission.running[other.id] = other
    assert not admission.has_ample_room(0.0, request(8))
    others[0].first_token_s = others[1].first_token_s = 0.01
    assert not admission.has_ample_room(0.01, request(8))  # the queue was not told
    admission.capacity_changed()
    assert admission.has_ample_room(0.01, request(8))


def test_has_ample_room_counts_the_requests_that_were_queued_since() -> None:
    admission = paced_engine(max_num_seqs=8)
    asked = []
    for number in range(6):
        arriving = request(number, prompt=1)
        asked.append(admission.has_ample_room(0.0, arriving))
        admission.submit(arriving)
    assert asked == [True, True, True, True, False, False]


def test_sums_that_has_ample_room_uses_again_grow_old() -> None:
    admission = paced_engine()
    assert admission.has_ample_room(0.0, request(8))
    # Its memory is not noted, as that of a request whose context grows.
    other = request(1, prompt=15_000)
    other.first_token_s = 0.0
    admission.running[other.id] = other
    assert admission.has_ample_room(0.5 * ROOM_S, request(8))
    assert not admission.has_ample_room(ROOM_S, request(8))


def test_replace_prediction_revises_a_length_that_is_exceeded() -> None:
    one = request(0, max_tokens=500.0)
    one.advance(5)
    pace_s = one.pace_s = 0.123
    one.replace_prediction(3.0, 6.0)
    assert one.predicted_at_arrival == 3.0
    assert one.predicted_tokens > 5
    assert one.pace_s == pace_s


SCORPIO_MARGIN_S = 0.1
"""Twice its margin before a TTFT deadline: up to half of a bound may be needed for the request's own work."""
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
def test_output_length_decides_nothing_about_a_request_that_has_ample_room(policy: str, data: st.DataObject) -> None:
    state = EngineState(max_num_seqs=64, kv_tokens=100_000)
    state.step_time.start_over(StepTimes(b=1e-6, d=0.01, alpha=1e-4))
    admission = AdmissionController(make_policy(policy), state)
    others = data.draw(st.lists(st.sampled_from(["decodes", "prefills", "waits"]), max_size=8))
    for number, what in enumerate(others):
        other = data.draw(requests(number))
        if what == "waits":
            admission.submit(other)
            continue
        other.admitted_s, other.first_token_s = 0.0, 0.0 if what == "decodes" else None
        admission.running[other.id] = other
    arriving = data.draw(requests(99))
    assume(admission.has_ample_room(0.0, arriving))
    admission.submit(arriving)
    decision = admission.decide(0.0)
    # SCORPIO rejects the others whatever their length, since its fixed margin exceeds their bound.
    rejected = [one.request for one in decision.reject if one.request.ttft_slo_s > SCORPIO_MARGIN_S]
    assert rejected == []
    if set(others) <= {"decodes"} and arriving.ttft_slo_s > SCORPIO_MARGIN_S:
        assert decision.admit == [arriving]
    elif "prefills" not in others:
        assert decision.admit or policy in ("scorpio", "ttft_guard_only")


async def test_late_prediction_keeps_no_request_in_memory_and_counts_as_no_wait() -> None:
    async with held(output_tokens=300) as (service, antares):
        for _ in range(5):
            answer = await antares.ask(chat(max_tokens=300))
        gc.collect()
        # The engine may remember who observed its last request.
        assert len([each for each in gc.get_objects() if isinstance(each, Call)]) <= 1
        service.release.set()
        await eventually(lambda: antares.gateway.predictor.reports.sent)
        record = (await antares.http.get(f"/v1/requests/{answer.headers['x-request-id']}")).json()
        assert b'"predicting_ms":null' in orjson.dumps(record)
