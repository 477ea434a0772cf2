"""Predictions arrive in time or not at all."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.prediction.client import CircuitBreaker, LengthPredictor, LengthStatistics, Prediction
from tests.fixtures.live_gateway import chat, eventually, live, serving


@asynccontextmanager
async def a_server_that_never_answers() -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        # The system accepts; nobody reads.
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class Service:
    """A predictor that remembers what it was asked; ``answer`` is its answer, or makes one of the question."""

    def __init__(self, answer: Any, status: int = 200) -> None:
        self.answer, self.status, self.asked = answer, status, list[Any]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.asked.append((orjson.loads(raw), dict(scope["headers"])))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        answer = self.answer(self.asked[-1][0]) if callable(self.answer) else self.answer
        await send({"type": "http.response.body", "body": orjson.dumps(answer)})


def answering(length: Any, p90: Any = 99.0) -> dict[str, Any]:
    return {"predictions": [{"length": length, "p90": p90}]}


def predictor(url: str | None, timeout_s: float = 0.5) -> LengthPredictor:
    return LengthPredictor(url, timeout_s, LengthStatistics(expected=40))


async def test_the_service_is_asked_and_its_answer_used() -> None:
    service = Service(answering(12.5, 60))
    async with serving(service) as url:
        asking = predictor(url)
        assert await asking.predict("hello", 3, "chat", 100) == Prediction(12.5, 60.0, "service")
        ((body, headers),) = service.asked
        question = {"prompt": "hello", "prompt_tokens": 3, "max_tokens": 100}
        assert body == {"inputs": [{**question, "model": None, "slo_class": "chat", "id": None}]}
        assert int(headers[b"x-deadline-ms"]) > 0
        assert asking.up
        await asking.close()


async def test_a_service_that_never_answers_costs_no_more_than_the_time_box() -> None:
    async with a_server_that_never_answers() as url:
        asking = predictor(url, timeout_s=0.05)
        started = time.monotonic()
        assert (await asking.predict("hi", 1, "chat", None)).source == "fallback"
        assert time.monotonic() - started < 0.2
        started = time.monotonic()
        await asking.predict("hi", 1, "chat", None)
        assert time.monotonic() - started < 0.02, "the call under way is late: nobody else waits behind it"
        async with asyncio.timeout(10):
            while asking.up:  # each call that goes unanswered counts once
                await asking.predict("hi", 1, "chat", None)
                await asyncio.sleep(0.05)
        await asking.close()


@pytest.mark.parametrize(
    "answer",
    [{}, [], None, {"predictions": []}, {"predictions": [None]}, {"predictions": [{}]}, answering("many"),
     answering(None), answering("nan"), answering("inf"), answering(1, "nan"),
     {"predictions": [{"length": 1, "p90": 2, "raw_p50": "nan", "raw_p90": 2}]},
     {"predictions": [{"length": 1, "p90": 2, "raw_p50": 1}]}],
)  # fmt: skip
async def test_a_nonsense_answer_falls_back(answer: Any) -> None:
    async with serving(Service(answer)) as url:
        asking = predictor(url)
        assert (await asking.predict("hi", 1, "chat", None)).source == "fallback"
        await asking.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[oops", "http://", "http://no host"])
async def test_a_url_where_nothing_is_never_raises(url: str) -> None:
    asking = predictor(url)
    assert (await asking.predict("hi", 1, "chat", None)).source == "fallback"
    assert not await asking.warm_up(max_wait_s=0.05)
    await asking.close()


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_an_input_that_the_service_refuses_does_not_cut_off_everybody_else(status: int) -> None:
    service = Service({"error": {}}, status)
    async with serving(service) as url:
        asking = predictor(url)
        for _ in range(5):
            assert (await asking.predict("hi", 1, "chat", None)).source == "fallback"
        assert asking.up
        service.answer, service.status = answering(7), 200
        assert (await asking.predict("hi", 1, "chat", None)).tokens == 7
        await asking.close()


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_a_service_that_fails_is_left_alone_after_three_tries(status: int) -> None:
    service = Service({}, status)
    async with serving(service) as url:
        asking = predictor(url)
        for _ in range(6):
            await asking.predict("hi", 1, "chat", None)
        assert (len(service.asked), asking.up) == (3, False)
        await asking.close()


async def test_only_the_two_ends_of_a_long_prompt_are_sent() -> None:
    service = Service(answering(7))
    async with serving(service) as url:
        asking = predictor(url)
        await asking.predict("a" * 10_000 + "b" * 10_000, 5000, "chat", 10)
        (asked,) = service.asked[0][0]["inputs"]
        assert asked["prompt"] == "a" * 10_000 + "b" * 6_384
        await asking.close()


async def test_the_service_hears_for_which_model_and_class_and_its_raw_quantiles_are_kept() -> None:
    service = Service({"predictions": [{"length": 7, "p90": 20, "raw_p50": 70, "raw_p90": 200}]})
    async with serving(service) as url:
        asking = predictor(url)
        made = await asking.predict("hi", 1, "chat", None, model="llama", request_id="r1")
        assert made == Prediction(7, 20, "service", (70, 200))
        (asked,) = service.asked[0][0]["inputs"]
        assert (asked["model"], asked["slo_class"], asked["id"]) == ("llama", "chat", "r1")
        await asking.predict("hi", 1, "chat", None, model="two\nlines" * 99)
        assert service.asked[1][0]["inputs"][0]["model"] is None
        await asking.close()


@pytest.mark.parametrize("limit", [0, 2**40])
async def test_a_limit_that_the_service_would_refuse_is_not_sent(limit: int) -> None:
    service = Service(answering(7))
    async with serving(service) as url:
        asking = predictor(url)
        await asking.predict("hi", 1, "chat", limit)
        assert service.asked[0][0]["inputs"][0]["max_tokens"] is None
        await asking.close()


async def test_what_is_asked_during_a_call_goes_out_together_in_the_next_one() -> None:
    def count_up(question: Any) -> Any:
        return {"predictions": [{"length": int(asked["prompt"]), "p90": 99} for asked in question["inputs"]]}

    service = Service(count_up)
    async with serving(service) as url:
        asking = predictor(url)
        first = asyncio.create_task(asking.predict("9", 1, "chat", None))
        await asyncio.sleep(0)
        others = [asking.predict(str(i), 1, "chat", None) for i in range(1, 6)]
        made = [*await asyncio.gather(*others)]
        assert (await first).tokens == 9
        assert [p.tokens for p in made] == [1, 2, 3, 4, 5]
        assert [[i["prompt"] for i in body["inputs"]] for body, _ in service.asked] == [
            ["9"],
            ["1", "2", "3", "4", "5"],
        ]
        await asking.close()


def test_the_breaker_opens_after_three_failures_and_lets_one_trial_through_after_its_pause() -> None:
    now = [0.0]
    breaker = CircuitBreaker(threshold=3, pause_s=1.0, clock=lambda: now[0])
    for _ in range(3):
        assert breaker.allows()
        breaker.record(False)
    assert not breaker.allows()
    now[0] = 1.0
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.record(False)
    now[0] = 1.9
    assert not breaker.allows()
    now[0] = 2.0
    assert breaker.allows()
    breaker.record(True)
    assert breaker.closed
    assert breaker.allows()


def test_a_trial_that_was_never_heard_of_again_does_not_keep_the_breaker_open_for_ever() -> None:
    now = [0.0]
    breaker = CircuitBreaker(threshold=1, pause_s=1.0, clock=lambda: now[0])
    breaker.record(False)
    now[0] = 1.0
    assert breaker.allows()
    now[0] = 2.0
    assert breaker.allows()


def test_the_fallback_is_the_classes_own_median_and_upper_quantile_of_late() -> None:
    statistics = LengthStatistics(expected=40, window=100)
    assert statistics.predict("chat") == Prediction(40, 80, "fallback")
    for tokens in [9999] * 50 + list(range(1, 101)):
        statistics.observe("chat", tokens)
    assert statistics.predict("chat") == Prediction(51, 91, "fallback")
    assert statistics.predict("code") == Prediction(40, 80, "fallback")


@given(st.none() | st.integers(0, 2**63), st.integers(0, 2**63))
def test_a_prediction_respects_the_requests_own_limits(most: int | None, least: int) -> None:
    made = asyncio.run(predictor(None).predict("hi", 1, "chat", most, least))
    assert made.tokens >= max(1, least)
    assert made.p90 >= made.tokens
    assert most is None or made.tokens <= max(1, most, least)


def raw_answers(question: Any) -> Any:
    """Of a predictor that learns: 200 predicted for a reported length of anything."""
    one = {"length": 50, "p90": 90, "raw_p50": 40, "raw_p90": 80}
    return {"predictions": [one] * len(question["inputs"])} if "inputs" in question else {"observed": 1}


async def test_what_finishes_is_reported_with_what_had_been_said_of_it() -> None:
    service = Service(raw_answers)
    async with serving(service) as url, live(predictor_url=url, predictor={"timeout_ms": 5000}) as antares:
        await antares.ask()
        await antares.ask(chat(max_tokens=3), x_slo_class="free")
        await antares.ask(chat(n=2))
        await eventually(lambda: antares.gateway.predictor.reports.sent == 2)
        asked = [body["inputs"][0] for body, _ in service.asked if "inputs" in body]
        reported = [one for body, _ in service.asked for one in body.get("observations", [])]
    common = {"model": "simulated", "raw_p50": 40, "raw_p90": 80}
    assert reported == [
        {**common, "id": asked[0]["id"], "slo_class": "chat", "tokens": 8, "censored": False},
        {**common, "id": asked[1]["id"], "slo_class": "free", "tokens": 3, "censored": True},
    ]


async def test_nothing_is_reported_that_the_service_had_not_predicted() -> None:
    service = Service({}, 500)
    async with serving(service) as url, live(predictor_url=url, predictor={"timeout_ms": 5000}) as antares:
        assert (await antares.ask()).status_code == 200
        assert antares.gateway.predictor.reports._sender is None


async def test_requests_are_served_while_the_predictor_hangs() -> None:
    predictor_section = {"timeout_ms": 30, "expected_tokens": 8}
    async with a_server_that_never_answers() as url, live(predictor_url=url, predictor=predictor_section) as antares:
        answers = [await antares.ask() for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5
        metrics = (await antares.http.get("/metrics")).text
        assert 'antares_predictions_total{source="fallback"} 5.0' in metrics
        assert "antares_predictor_up 0.0" in metrics


async def test_the_fallback_learns_from_what_finishes() -> None:
    async with live(predictor={"enabled": False, "expected_tokens": 500}) as antares:
        await antares.ask()
        slo_report = (await antares.ask(x_slo_report="1")).json()["antares"]
        assert slo_report["predicted_tokens"] == 8
