"""Two engines of one model, one of which fails: requests are served by the other, and the first rests."""

from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.faults.server import FaultyServer
from engine_adapter.engine import EngineLost, EngineUnreachable, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.engine_pair import CLASSES, FAST_FAULTS, pair
from tests.fixtures.live_gateway import fast_engine, live, serving
from tests.fixtures.live_server import HANG_S, eventually

pytestmark = pytest.mark.process

# --- fast failures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAST_FAULTS)
async def test_fast_failure_of_one_engine_fails_no_request(fault: str) -> None:
    async with pair(fault) as engines:
        assert await engines.ask_many(100) == {200: 100}
        assert len(engines.a.asked) < 20, "traffic leaves A within a few requests"
        assert engines.circuit() in ("open", "half_open")
        assert engines.circuit(1) == "closed"
        await eventually(engines.antares.is_idle)
        assert engines.antares.outcomes == {"finished": 100, "rejected": 0, "failed": 0, "cancelled": 0}


@pytest.mark.parametrize("stream", [False, True])
async def test_failed_over_request_is_reported_and_counted_once(stream: bool) -> None:
    async with pair("503") as engines:
        answer = await engines.ask(stream, x_slo_report="1")
        assert answer.status_code == 200
        assert '"engine":"B"' in answer.text
        assert await engines.metric('antares_failovers_total{engine="A",reason="http_503"} 1.0')
        assert engines.antares.gateway.ledger.accepted == 1


async def test_randomly_failing_engine_fails_hardly_any_request() -> None:
    for fault in ("random", "random_close"):
        async with pair(fault) as engines:
            statuses = await engines.ask_many(150)
            assert statuses[200] >= 149, statuses


async def test_traffic_returns_gradually_once_the_engine_is_well() -> None:
    async with pair("500") as engines:
        await engines.ask_many(40)
        assert engines.circuit() in ("open", "half_open")
        engines.a.fault, seen = "", len(engines.a.asked)
        async with asyncio.timeout(HANG_S):
            while engines.circuit() != "recovering":
                await engines.ask()
                await asyncio.sleep(0.02)
        probes = len(engines.a.asked) - seen
        assert probes <= 2, "one request probes the engine"
        await engines.ask_many(60, clients=2)
        returned = len(engines.a.asked) - seen - probes
        assert returned < 40, "only a share of the requests goes to an engine that recovers"


async def test_rest_and_return_are_logged_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "antares.router")
    async with pair("502") as engines:
        await engines.ask_many(20)
        engines.a.fault = ""
        async with asyncio.timeout(HANG_S):
            while engines.circuit() != "recovering":
                await engines.ask()
                await asyncio.sleep(0.02)
        text = caplog.text
        assert "engine A rests for 1.0 s: its last failure was http_502" in text
        assert "engine A serves again" in text


async def test_status_and_metrics_show_the_circuit() -> None:
    async with pair("500") as engines:
        async with asyncio.timeout(HANG_S):
            # The first rest is 1 s, each further one twice as long: on a loaded machine, some end before they are seen.
            while (first := (await engines.status())[0])["rests_for_s"] < 0.5:
                await engines.ask_many(20)
        assert await engines.metric('antares_engine_circuit{engine="A",state="open"} 1.0')
        assert await engines.metric('antares_engine_circuit{engine="A",state="closed"} 0.0')
        assert (first["circuit"], first["circuit_reason"]) == ("open", "http_500")
        assert 0 < first["rests_for_s"] <= 30
        second = (await engines.status())[1]
        assert (second["circuit"], second["rests_for_s"]) == ("closed", 0)


async def test_overloaded_engine_rests_as_long_as_it_asks() -> None:
    async with pair("429") as engines:
        engines.a.headers = ((b"retry-after", b"7"),)
        assert (await engines.ask()).status_code == 200
        first = (await engines.status())[0]
        assert 1 < first["rests_for_s"] <= 7, "not the 1 s of a first rest"


async def test_rejection_that_forbids_a_retry_is_not_a_failure() -> None:
    async with pair("429") as engines:
        engines.a.headers = ((b"x-should-retry", b"false"),)
        assert (await engines.ask()).status_code == 429
        assert (engines.circuit(), engines.b.asked) == ("closed", [])


@pytest.mark.parametrize("status", ["400", "413", "422"])
async def test_error_of_the_clients_own_making_passes_and_opens_nothing(status: str) -> None:
    async with pair(status, status) as engines:
        answers = [await engines.ask() for _ in range(8)]
        assert {(a.status_code, a.json()["error"]["message"]) for a in answers} == {(int(status), f"scripted {status}")}
        assert len(engines.a.asked) + len(engines.b.asked) == 8, "no request is sent twice"
        assert (engines.circuit(0), engines.circuit(1)) == ("closed", "closed")


@pytest.mark.parametrize("fault", ["500", "404", "401"])
async def test_request_that_fails_everywhere_makes_no_engine_rest(fault: str) -> None:
    async with pair(fault, fault) as engines:
        answers = [await engines.ask() for _ in range(8)]
        assert {answer.status_code for answer in answers} == {int(fault)}
        assert answers[0].json()["error"]["message"] == f"scripted {fault}"
        assert (engines.circuit(0), engines.circuit(1)) == ("closed", "closed")


@pytest.mark.parametrize("fault", ["503", "close"])
async def test_pool_whose_engines_all_fail_recovers_with_the_first_one(fault: str) -> None:
    async with pair(fault, fault) as engines:
        statuses = await engines.ask_many(30)
        assert set(statuses) == {503}
        engines.b.fault = ""
        async with asyncio.timeout(HANG_S):
            while (await engines.ask()).status_code != 200:
                await asyncio.sleep(0.05)
        assert await engines.ask_many(20) == {200: 20}


# --- a single engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [fault for fault in FAST_FAULTS if fault != "close"])
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_only_engine_pass_unchanged(fault: str, stream: bool) -> None:
    server = FaultyServer(fault=fault, headers=((b"retry-after", b"9"),))
    async with serving(server) as url, live(HttpEngine("A", url), classes=CLASSES) as antares:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream}
        answers = [await antares.ask(body) for _ in range(6)]
        assert {answer.status_code for answer in answers} == {int(fault)}
        assert answers[-1].json()["error"]["message"] == f"scripted {fault}"
        assert answers[-1].headers["retry-after"] == "9"
        assert len(server.asked) == 6, "the engine is asked however often it fails"


# --- engines in the gateway's process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [EngineLost, EngineUnreachable, RuntimeError])
@pytest.mark.parametrize("stream", [False, True])
async def test_simulated_engine_that_dies_before_the_first_byte_fails_no_request(
    error: type[Exception], stream: bool
) -> None:
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        raise error("scripted")

    engines = [fast_engine(name=name) for name in ("left", "right")]
    async with live(engines[0], more_engines=engines[1:]) as antares:
        engines[0].stub = dies
        answers = [await antares.ask(x_slo_report="1") for _ in range(6)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["antares"]["engine"] for answer in answers} == {"right"}
        assert antares.outcomes["finished"] == 6


async def test_error_event_before_the_first_token_moves_the_request() -> None:
    async def reports_an_error(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send(
            {"type": "http.response.body", "body": b'data: {"error": {"message": "boom"}}\n\n', "more_body": True}
        )
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    engines = [fast_engine(name=name) for name in ("left", "right")]
    async with live(engines[0], more_engines=engines[1:]) as antares:
        engines[0].stub = reports_an_error
        body = {"model": "simulated", "messages": [{"role": "user", "content": "x"}], "stream": True}
        assert "boom" not in (await antares.ask(body)).text
        engines[1].stub = reports_an_error
        answer = await antares.ask(body)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
        assert "boom" in answer.text
        await eventually(antares.is_idle)
        assert antares.outcomes == {"finished": 1, "rejected": 0, "failed": 1, "cancelled": 0}


@pytest.mark.parametrize(
    "error",
    [
        b'{"error": {"message": "bad \\"code\\": 500", "type": "BadRequestError", "param": null, "code": 400}}',
        b'{"error":{"message":"m","type":"invalid_request_error","code":"x"}}',
        b'{"error":{"message":"m","code":422}}',
    ],
)
async def test_error_event_about_the_request_blames_no_engine(error: bytes) -> None:
    """vLLM checks parts of a streamed request only after its 200. Three such requests made every engine rest."""
    asked: list[str] = []

    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await receive()
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": b"data: " + error + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    engines = [fast_engine(name=name) for name in ("left", "right")]
    async with live(engines[0], more_engines=engines[1:]) as antares:
        for engine in engines:
            engine.stub = refuses
        body = {"model": "simulated", "messages": [{"role": "user", "content": "x"}], "stream": True}
        answers = [await antares.ask(body) for _ in range(8)]
        assert all(error in answer.content for answer in answers)
        assert len(asked) == 8
        queues = antares.gateway.engine_queues
        assert [queue.circuit.state for queue in queues] == ["closed", "closed"]
        assert [queue.circuit.share(time.monotonic()) for queue in queues] == [1.0, 1.0]
        await eventually(antares.is_idle)
        assert antares.outcomes == {"finished": 0, "rejected": 8, "failed": 0, "cancelled": 0}


# --- requests that are not scheduled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["429", "500", "503", "close"])
async def test_embedding_is_served_by_another_engine(fault: str) -> None:
    async with pair(fault) as engines:
        answer = await engines.antares.http.post("/v1/embeddings", json={"model": "m", "input": "a"})
        assert (answer.status_code, answer.json()["model"]) == (200, "m")
        assert engines.b.paths == ["/v1/embeddings"]


async def test_request_with_an_effect_is_not_repeated_once_it_was_sent() -> None:
    async with pair("close") as engines:
        answer = await engines.antares.http.post("/v1/load_lora_adapter", json={"lora_name": "l"})
        assert answer.status_code == 503
        assert engines.b.asked == []


async def test_error_of_all_engines_passes_to_a_request_that_is_not_scheduled() -> None:
    async with pair("500", "500") as engines:
        answer = await engines.antares.http.post("/v1/embeddings", json={"model": "m", "input": "a"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "scripted 500")
