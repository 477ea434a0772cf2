"""The client of the predictor service: timeouts, fallback, batching and reports."""

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

from gateway.prediction import client as prediction_client
from gateway.prediction.circuit_breaker import CircuitBreaker
from gateway.prediction.client import LengthPredictor, Question
from gateway.prediction.lengths import LengthStatistics, Prediction
from tests.fixtures.live_gateway import Live, chat, live, serving
from tests.fixtures.live_server import HANG_S, eventually


@asynccontextmanager
async def silent_server() -> AsyncIterator[str]:
    """A server that accepts connections, since the kernel does, but never responds."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


class Service:
    """A predictor that records (body, headers) of its calls. ``answer``: its response, or a function of the body."""

    def __init__(self, answer: Any, status: int = 200) -> None:
        self.answer, self.status, self.calls = answer, status, list[Any]()

    @property
    def inputs(self) -> list[list[Any]]:
        """The inputs of each prediction call."""
        return [body["inputs"] for body, _ in self.calls if "inputs" in body]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.calls.append((orjson.loads(raw), dict(scope["headers"])))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        answer = self.answer(self.calls[-1][0]) if callable(self.answer) else self.answer
        await send({"type": "http.response.body", "body": orjson.dumps(answer)})


def prediction(length: Any, p90: Any = 99.0) -> dict[str, Any]:
    return {"predictions": [{"length": length, "p90": p90}]}


async def eventually_down(antares: Live) -> None:
    """Send requests that wait for their predictions, until the failures open the breaker."""
    async with asyncio.timeout(HANG_S):
        while antares.gateway.predictor.up:
            assert (await antares.ask(x_slo_e2e_ms="60000")).status_code == 200
    assert "antares_predictor_up 0.0" in (await antares.http.get("/metrics")).text


def make_client(url: str | None, timeout_s: float = 0.5) -> LengthPredictor:
    return LengthPredictor(url, timeout_s, LengthStatistics(expected=40))


async def test_predict_returns_the_prediction_of_the_service() -> None:
    service = Service(prediction(12.5, 60))
    async with serving(service) as url:
        client = make_client(url)
        assert await client.predict(Question("hello", 3, "chat", 100)) == Prediction(12.5, 60.0, "service")
        ((body, headers),) = service.calls
        question = {"prompt": "hello", "prompt_tokens": 3, "max_tokens": 100}
        assert body == {"inputs": [{**question, "model": None, "slo_class": "chat", "id": None}]}
        assert int(headers[b"x-deadline-ms"]) > 0
        assert client.up
        await client.close()


async def test_predict_falls_back_after_its_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_client, "_CALL_TIMEOUT_S", 30.0)
    async with silent_server() as url:
        client = make_client(url, timeout_s=0.4)
        started = time.monotonic()
        assert (await client.predict(Question("hi", 1, "chat", None))).source == "fallback"
        assert time.monotonic() - started < 15, "not the time that a call may take"
        client.timeout_s = 30.0
        started = time.monotonic()
        await client.predict(Question("hi", 1, "chat", None))
        assert time.monotonic() - started < 15, "requests must not wait behind a late call"
        async with asyncio.timeout(HANG_S):
            while client.up:
                await client.predict(Question("hi", 1, "chat", None))
                await asyncio.sleep(0.05)
        await client.close()


@pytest.mark.parametrize(
    "answer",
    [{}, [], None, {"predictions": []}, {"predictions": [None]}, {"predictions": [{}]}, prediction("many"),
     prediction(None), prediction("nan"), prediction("inf"), prediction(1, "nan"),
     {"predictions": [{"length": 1, "p90": 2, "raw_p50": "nan", "raw_p90": 2}]},
     {"predictions": [{"length": 1, "p90": 2, "raw_p50": 1}]}],
)  # fmt: skip
async def test_predict_falls_back_on_an_invalid_response(answer: Any) -> None:
    async with serving(Service(answer)) as url:
        client = make_client(url)
        assert (await client.predict(Question("hi", 1, "chat", None))).source == "fallback"
        await client.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://[oops", "http://", "http://no host"])
async def test_predict_falls_back_on_an_unreachable_url(url: str) -> None:
    client = make_client(url)
    assert (await client.predict(Question("hi", 1, "chat", None))).source == "fallback"
    assert not await client.warm_up(max_wait_s=0.05)
    await client.close()


async def test_service_that_does_not_respond_at_the_start_is_down_until_it_responds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prediction_client, "PROBE_S", 0.05)
    caplog.set_level("INFO", "antares.prediction")
    service = Service({"error": {}}, 500)
    async with serving(service) as url:
        client = make_client(url)
        client._breaker._pause = 0.05
        assert not await client.warm_up(max_wait_s=0.05)
        assert not client.up
        said = [record.getMessage() for record in caplog.records if record.name == "antares.prediction"]
        assert said == [f"the predictor at {url} does not respond: it returned 500; recent lengths are the predictions"]
        service.answer, service.status = prediction(7), 200
        await eventually(lambda: client.up)
        await eventually(lambda: "responds again" in caplog.text)
        await client.close()


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_rejected_input_does_not_open_the_breaker(status: int) -> None:
    service = Service({"error": {}}, status)
    async with serving(service) as url:
        client = make_client(url)
        for _ in range(5):
            assert (await client.predict(Question("hi", 1, "chat", None))).source == "fallback"
        assert client.up
        service.answer, service.status = prediction(7), 200
        assert (await client.predict(Question("hi", 1, "chat", None))).tokens == 7
        await client.close()


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_predict_stops_calling_after_three_failures(status: int) -> None:
    service = Service({}, status)
    async with serving(service) as url:
        client = make_client(url)
        for _ in range(6):
            await client.predict(Question("hi", 1, "chat", None))
        assert (len(service.calls), client.up) == (3, False)
        await client.close()


async def test_client_notices_without_a_request_that_the_service_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_client, "PROBE_S", 0.05)
    service = Service({}, 503)
    async with serving(service) as url:
        client = make_client(url)
        client._breaker = CircuitBreaker(pause_s=0.01)
        for _ in range(3):
            await client.predict(Question("hi", 1, "chat", None))
        assert not client.up
        await eventually(lambda: len(service.calls) >= 6)
        assert not client.up
        service.answer, service.status = prediction(7), 200
        await eventually(lambda: client.up)
        calls = len(service.calls)
        await asyncio.sleep(0.2)
        assert len(service.calls) == calls, "a closed breaker needs no probe"
        await client.close()


async def test_failed_requests_share_one_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction_client, "PROBE_S", 60)
    client = make_client("http://127.0.0.1:1")
    client._breaker = CircuitBreaker(pause_s=0.0)
    for _ in range(10):
        await client.predict(Question("hi", 1, "chat", None))
    assert [task.get_name() for task in asyncio.all_tasks()].count("probe the predictor") == 1
    await client.close()
    assert "probe the predictor" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_predictor_up_returns_while_the_gateway_idles() -> None:
    service = Service({}, 500)
    async with serving(service) as url, live(predictor_url=url, predictor={"timeout_ms": 5000}) as antares:
        await eventually_down(antares)
        service.answer, service.status = prediction(7), 200
        async with asyncio.timeout(HANG_S):
            while "antares_predictor_up 1.0" not in (await antares.http.get("/metrics")).text:
                await asyncio.sleep(0.05)


async def test_predict_sends_only_both_ends_of_a_long_prompt() -> None:
    service = Service(prediction(7))
    async with serving(service) as url:
        client = make_client(url)
        await client.predict(Question("a" * 10_000 + "b" * 10_000, 5000, "chat", 10))
        ((question,),) = service.inputs
        assert question["prompt"] == "a" * 10_000 + "b" * 6_384
        await client.close()


async def test_predict_sends_model_and_class_and_keeps_raw_quantiles() -> None:
    service = Service({"predictions": [{"length": 7, "p90": 20, "raw_p50": 70, "raw_p90": 200}]})
    async with serving(service) as url:
        client = make_client(url)
        made = await client.predict(Question("hi", 1, "chat", None, model="llama", request_id="r1"))
        assert made == Prediction(7, 20, "service", (70, 200))
        ((question,),) = service.inputs
        assert (question["model"], question["slo_class"], question["id"]) == ("llama", "chat", "r1")


async def test_predict_leaves_out_an_unprintable_model_name() -> None:
    service = Service(prediction(7))
    async with serving(service) as url:
        client = make_client(url)
        await client.predict(Question("hi", 1, "chat", None, model="two\nlines" * 99))
        assert service.inputs[0][0]["model"] is None
        await client.close()


@pytest.mark.parametrize("limit", [0, 2**40])
async def test_predict_leaves_out_a_limit_that_the_service_rejects(limit: int) -> None:
    service = Service(prediction(7))
    async with serving(service) as url:
        client = make_client(url)
        await client.predict(Question("hi", 1, "chat", limit))
        assert service.inputs[0][0]["max_tokens"] is None
        await client.close()


async def test_predict_batches_questions_that_arrive_during_a_call() -> None:
    def length_from_prompt(body: Any) -> Any:
        return {"predictions": [{"length": int(question["prompt"]), "p90": 99} for question in body["inputs"]]}

    service = Service(length_from_prompt)
    async with serving(service) as url:
        client = make_client(url)
        first = asyncio.create_task(client.predict(Question("9", 1, "chat", None)))
        await asyncio.sleep(0)
        others = [client.predict(Question(str(i), 1, "chat", None)) for i in range(1, 6)]
        made = [*await asyncio.gather(*others)]
        assert (await first).tokens == 9
        assert [p.tokens for p in made] == [1, 2, 3, 4, 5]
        prompts = [[question["prompt"] for question in inputs] for inputs in service.inputs]
        assert prompts == [["9"], ["1", "2", "3", "4", "5"]]
        await client.close()


def test_breaker_opens_after_three_failures_and_allows_one_trial() -> None:
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


def test_breaker_allows_another_trial_if_one_never_ends() -> None:
    now = [0.0]
    breaker = CircuitBreaker(threshold=1, pause_s=1.0, clock=lambda: now[0])
    breaker.record(False)
    now[0] = 1.0
    assert breaker.allows()
    now[0] = 2.0
    assert breaker.allows()


def test_statistics_predict_recent_quantiles_of_the_class() -> None:
    statistics = LengthStatistics(expected=40, window=100)
    assert statistics.predict("chat") == Prediction(40, 80, "fallback")
    for tokens in [9999] * 50 + list(range(1, 101)):
        statistics.observe("chat", tokens)
    assert statistics.predict("chat") == Prediction(51, 91, "fallback")
    assert statistics.predict("code") == Prediction(40, 80, "fallback")


@given(st.none() | st.integers(0, 2**63), st.integers(0, 2**63))
def test_predict_respects_the_token_limits_of_the_request(max_tokens: int | None, min_tokens: int) -> None:
    made = asyncio.run(make_client(None).predict(Question("hi", 1, "chat", max_tokens, min_tokens)))
    assert made.tokens >= max(1, min_tokens)
    assert made.p90 >= made.tokens
    assert max_tokens is None or made.tokens <= max(1, max_tokens, min_tokens)


def corrected_predictions(body: Any) -> Any:
    """Respond like a predictor with online correction, to both kinds of calls."""
    corrected = {"length": 50, "p90": 90, "raw_p50": 40, "raw_p90": 80}
    return {"predictions": [corrected] * len(body["inputs"])} if "inputs" in body else {"observed": 1}


async def test_gateway_reports_lengths_with_the_raw_prediction() -> None:
    service = Service(corrected_predictions)
    async with serving(service) as url, live(predictor_url=url, predictor={"timeout_ms": 5000}) as antares:
        # End-to-end bounds, whose paces depend on the length: the requests wait for their predictions.
        await antares.ask(x_slo_e2e_ms="60000")
        await antares.ask(chat(max_tokens=3), x_slo_class="free", x_slo_e2e_ms="60000")
        await antares.ask(chat(n=2), x_slo_e2e_ms="60000")
        await eventually(lambda: antares.gateway.predictor.reports.sent == 2)
        ids = [inputs[0]["id"] for inputs in service.inputs]
        reported = [report for body, _ in service.calls for report in body.get("observations", [])]
    common = {"model": "simulated", "raw_p50": 40, "raw_p90": 80}
    assert reported == [
        {**common, "id": ids[0], "slo_class": "chat", "tokens": 8, "censored": False},
        {**common, "id": ids[1], "slo_class": "free", "tokens": 3, "censored": True},
    ]


async def test_service_is_asked_later_about_all_requests_that_do_not_wait() -> None:
    service = Service(corrected_predictions)
    found: list[Prediction | None] = []
    async with serving(service) as url:
        client = make_client(url)
        for number in range(3):
            client.predict_later(Question(str(number), 1, "chat", 45), lambda: True, found.append)
        assert service.calls == []
        await eventually(lambda: len(found) == 3)
        await client.close()
    assert [len(inputs) for inputs in service.inputs] == [3]
    assert found == [Prediction(45, 45, "service", (40, 80))] * 3


async def test_service_is_not_asked_later_about_requests_that_have_ended() -> None:
    service = Service(corrected_predictions)
    found: list[tuple[str, Prediction | None]] = []
    async with serving(service) as url:
        client = make_client(url)
        for name, open_ in (("ended", False), ("open", True)):
            question = Question(name, 1, "chat", None)
            client.predict_later(
                question, lambda open_=open_: open_, lambda made, name=name: found.append((name, made))
            )
        await eventually(lambda: len(found) == 2)
        await client.close()
    assert [[entry["prompt"] for entry in inputs] for inputs in service.inputs] == [["open"]]
    assert [(name, made is None) for name, made in found] == [("ended", True), ("open", False)]


async def test_question_that_may_be_asked_later_is_answered_at_once_without_a_service() -> None:
    found: list[Prediction | None] = []
    make_client(None).predict_later(Question("hi", 1, "chat", None), lambda: True, found.append)
    assert found == [None]


async def test_gateway_does_not_report_lengths_of_fallback_predictions() -> None:
    service = Service({}, 500)
    async with serving(service) as url, live(predictor_url=url, predictor={"timeout_ms": 5000}) as antares:
        assert (await antares.ask()).status_code == 200
        assert "report lengths" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_gateway_serves_requests_while_the_predictor_hangs() -> None:
    section = {"timeout_ms": 30, "expected_tokens": 8}
    async with silent_server() as url, live(predictor_url=url, predictor=section) as antares:
        # An end-to-end bound, whose pace depends on the length: the request waits for its prediction.
        answers = [await antares.ask(x_slo_e2e_ms="60000") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200] * 5
        metrics = (await antares.http.get("/metrics")).text
        assert 'antares_predictions_total{source="fallback"} 5.0' in metrics
        assert "antares_predictor_up 0.0" in metrics


async def test_gateway_updates_the_fallback_with_actual_lengths() -> None:
    async with live(predictor={"enabled": False, "expected_tokens": 500}) as antares:
        await antares.ask()
        slo_report = (await antares.ask(x_slo_report="1")).json()["antares"]
        assert slo_report["predicted_tokens"] == 8


@asynccontextmanager
async def endless_server(chunk: bytes, pause_s: float) -> AsyncIterator[str]:
    """A server whose answers never end: ``chunk`` every ``pause_s`` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 300000000\r\n\r\n")
        try:
            for _ in range(20_000):
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(pause_s)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("chunk", "pause_s"),
    [
        pytest.param(b" " * (1 << 16), 0.0, id="huge"),
        pytest.param(b" ", 0.05, id="trickle", marks=pytest.mark.process),
    ],
)
async def test_answer_without_end_is_cut_and_opens_the_breaker(chunk: bytes, pause_s: float) -> None:
    async with endless_server(chunk, pause_s) as url:
        client = make_client(url, timeout_s=0.05)
        async with asyncio.timeout(HANG_S):
            while client._breaker.closed:
                assert (await client.predict(Question("hi", 1, "chat", None))).source == "fallback"
                await asyncio.sleep(0.02)
        assert not client.up
        await client.close()


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_service_that_rejects_everything_counts_as_down(status: int) -> None:
    async with serving(Service({}, status)) as url:
        client = make_client(url)
        assert (await client.predict(Question("hi", 1, "chat", None))).source == "fallback"
        assert client.up, "one input may be at fault"
        for _ in range(20):
            assert (await client.predict(Question("hi", 1, "chat", None))).source == "fallback"
        assert not client.up
        await client.close()
