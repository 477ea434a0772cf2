"""Two engines of one model, one of which fails: requests are served by the other, and the first rests."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from benchmarks.faults.server import FaultyServer
from engine_adapter.engine import EngineLost, EngineUnreachable, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from gateway.scheduling.retry_budget import RetryBudget
from tests.fixtures.live_gateway import Live, fast_engine, live, serving
from tests.fixtures.live_server import eventually

FAST_FAULTS = ["429", "500", "502", "503", "504", "401", "403", "404", "close"]
CLASSES = {
    "chat": {"ttft_ms": 60_000},
    "free": {},
    "tight": {"ttft_ms": 3000},
    "brief": {"ttft_ms": 400},
    "soft": {"ttft_ms": 400, "on_unattainable": "best_effort"},
}


@dataclass
class Pair:
    """A gateway with the engines A and B, and their servers ``a`` and ``b``. Requests go to A first."""

    antares: Live
    a: FaultyServer
    b: FaultyServer

    async def ask(self, stream: bool = False, model: str = "m", **headers: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "stream": stream, "max_tokens": 5}
        return await self.antares.ask(body, **headers)

    async def ask_many(self, requests: int, clients: int = 8) -> Counter[int]:
        """Send ``requests`` requests by ``clients`` clients and count the statuses. A broken stream counts as 0."""
        left, statuses = iter(range(requests)), Counter[int]()

        async def client() -> None:
            for number in left:
                answer = await self.ask(stream=number % 2 == 0)
                broken = answer.status_code == 200 and b"error" in answer.content
                statuses[0 if broken else answer.status_code] += 1

        await asyncio.gather(*(client() for _ in range(clients)))
        return statuses

    def circuit(self, index: int = 0) -> str:
        return self.antares.gateway.engine_queues[index].circuit.current(time.monotonic())

    async def metric(self, line: str) -> bool:
        return line in (await self.antares.http.get("/metrics")).text


@asynccontextmanager
async def pair(fault: str = "", fault_b: str = "", **config: Any) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        a, b = FaultyServer(fault=fault), FaultyServer(fault=fault_b)
        urls = [await stack.enter_async_context(serving(server)) for server in (a, b)]
        engines = [HttpEngine(name, url) for name, url in zip("AB", urls, strict=True)]
        antares = await stack.enter_async_context(
            live(engines[0], more_engines=engines[1:], **{"classes": CLASSES, **config})
        )
        yield Pair(antares, a, b)


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
        async with asyncio.timeout(10):
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
        async with asyncio.timeout(10):
            while engines.circuit() != "recovering":
                await engines.ask()
                await asyncio.sleep(0.02)
        text = caplog.text
        assert "engine A rests for 1.0 s: its last failure was http_502" in text
        assert "engine A serves again" in text


async def test_status_and_metrics_show_the_circuit() -> None:
    async with pair("500") as engines:
        await engines.ask_many(20)
        first, second = (await engines.antares.http.get("/status")).json()["engines"]
        assert (first["circuit"], first["circuit_reason"]) == ("open", "http_500")
        assert 0 < first["rests_for_s"] <= 1
        assert (second["circuit"], second["rests_for_s"]) == ("closed", 0)
        assert await engines.metric('antares_engine_circuit{engine="A",state="open"} 1.0')
        assert await engines.metric('antares_engine_circuit{engine="A",state="closed"} 0.0')


async def test_overloaded_engine_rests_as_long_as_it_asks() -> None:
    async with pair("429") as engines:
        engines.a.headers = ((b"retry-after", b"7"),)
        assert (await engines.ask()).status_code == 200
        (first, _) = (await engines.antares.http.get("/status")).json()["engines"]
        assert 6 < first["rests_for_s"] <= 7


async def test_rejection_that_forbids_a_retry_is_not_a_failure() -> None:
    async with pair("429") as engines:
        engines.a.headers = ((b"x-should-retry", b"false"),)
        assert (await engines.ask()).status_code == 429
        assert (engines.circuit(), engines.b.asked) == ("closed", [])


@pytest.mark.parametrize("status", ["400", "413", "422"])
async def test_error_of_the_clients_own_making_passes_and_opens_nothing(status: str) -> None:
    async with pair(status) as engines:
        answers = [await engines.ask() for _ in range(8)]
        assert {(a.status_code, a.json()["error"]["message"]) for a in answers} == {(int(status), f"scripted {status}")}
        assert (engines.circuit(), engines.b.asked) == ("closed", [])


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
        async with asyncio.timeout(10):
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


# --- hanging engines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_engine_is_left_after_the_timeout(stream: bool) -> None:
    async with pair("hang", failover={"first_token_timeout_s": 0.3}) as engines:
        started = time.monotonic()
        assert (await engines.ask(stream)).status_code == 200
        assert time.monotonic() - started < 3
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
        assert time.monotonic() - started < 3, "served within its bound, although the timeout is 20 s"


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
        async with asyncio.timeout(10):
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
