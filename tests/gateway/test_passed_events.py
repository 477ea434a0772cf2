"""Tokens of a server's stream that are written to the client when they arrive, without the request's task."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine_adapter.engine import ASGIApp, Message, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from gateway.api.http_protocol import HttpProtocol
from gateway.api.http_request import HttpRequest
from gateway.api.response_relay import ResponseRelay
from tests.fixtures.live_gateway import CHAT, Live, chat, live
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.raw_client import a_chat, raw
from tests.fixtures.scripted_server import DONE, ScriptedStream, chunk, usage_chunk

TOKENS = [chunk(f" {number}") for number in range(40)]
PACED = [step for token in TOKENS for step in (token, 0.002)]
STREAM = [chunk("", role="assistant"), *PACED, chunk("", "stop"), usage_chunk(40), DONE]
"""So slow that each event arrives alone."""

WHOLE = b"".join(step for step in STREAM if isinstance(step, bytes))


class Passes:
    """Counts the events that the relays passed (``yes``) and refused (``no``)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.yes = self.no = 0
        inner = ResponseRelay.pass_event

        def pass_event(relay: ResponseRelay, event: bytes, at: float) -> bool:
            passed = inner(relay, event, at)
            self.yes, self.no = self.yes + passed, self.no + (not passed)
            return passed

        monkeypatch.setattr(ResponseRelay, "pass_event", pass_event)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


@asynccontextmanager
async def gateway_before(upstream: ASGIApp, **changes: Any) -> AsyncIterator[Live]:
    async with serve(upstream) as url, live(HttpEngine("remote", url), **changes) as antares:
        yield antares


@pytest.mark.parametrize("server", [{}, {"sse_keep_alive_s": 5.0}], ids=["", "keep-alive"])
async def test_client_gets_the_stream_and_the_ledger_its_times(passes: Passes, server: dict[str, Any]) -> None:
    async with gateway_before(ScriptedStream(STREAM), server=server) as antares:
        answer = await antares.ask(chat(stream=True, stream_options={"include_usage": True}), x_slo_report="1")
        assert answer.content.replace(answer.content[answer.content.index(b": antares ") : -len(DONE)], b"") == WHOLE
        await eventually(antares.is_idle)
        assert antares.outcomes["finished"] == 1
    assert passes.yes > 30
    (report,) = [
        json.loads(line.removeprefix(": antares "))
        for line in answer.text.splitlines()
        if line.startswith(": antares ")
    ]
    assert report["output_tokens"] == 40
    # Each token takes at least two milliseconds.
    assert report["e2e_ms"] > report["ttft_ms"] + 78
    assert report["tpot_ms"] == pytest.approx((report["e2e_ms"] - report["ttft_ms"]) / 39, rel=0.05)


async def test_what_stands_between_server_and_app_sees_every_event(passes: Passes) -> None:
    seen: list[bytes] = []
    async with gateway_before(ScriptedStream(STREAM)) as antares:

        async def upper(scope: Scope, receive: Receive, send: Send) -> None:
            async def changed(message: Message) -> None:
                if message["type"] == "http.response.body":
                    seen.append(message["body"])
                    message = {**message, "body": message["body"].replace(b"content", b"CONTENT")}
                await send(message)

            await antares.gateway(scope, receive, changed)

        async with serve(upper, protocol=HttpProtocol) as url:
            antares.http.base_url = url
            answer = await antares.ask(chat(stream=True))
    assert passes.yes == 0
    assert passes.no > 30
    assert len(seen) > 40
    assert answer.content.count(b"CONTENT") == 42
    assert b'"content' not in answer.content


@pytest.mark.process
async def test_client_that_reads_nothing_makes_the_server_wait(passes: Passes) -> None:
    upstream = ScriptedStream([chunk("x" * 50_000), 0.001] * 2000)
    limits = {"stall_s": 2.0, "response_buffer_bytes": 1 << 20}
    async with gateway_before(upstream, limits=limits) as antares, raw(antares, 4096) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(a_chat(stream=True))
        await eventually(lambda: antares.outcomes["cancelled"] == 1)
        await eventually(antares.is_idle)
        assert antares.gateway.connections.buffered <= 2 << 20
    assert passes.yes > 0
    assert passes.no > 0


async def test_client_that_leaves_ends_a_stream_whose_events_are_passed(passes: Passes) -> None:
    upstream = ScriptedStream([chunk("a"), 0.002] * 20_000)
    async with gateway_before(upstream) as antares:
        async with antares.http.stream("POST", CHAT, json=chat(stream=True)) as answer:
            lines = answer.aiter_lines()
            for _ in range(60):
                await anext(lines)
            assert passes.yes > 10
        await eventually(lambda: antares.outcomes["cancelled"] == 1)
        await eventually(antares.is_idle)


async def test_server_that_breaks_after_passed_events_is_reported(passes: Passes) -> None:
    async with gateway_before(ScriptedStream([*PACED, -1.0])) as antares:
        answer = await antares.ask(chat(stream=True))
        await eventually(antares.is_idle)
        assert antares.outcomes["failed"] == 1
    assert passes.yes > 30
    assert answer.content.startswith(b"".join(TOKENS))
    assert b'"code":"engine_lost"' in answer.content.replace(b" ", b"")


async def test_passed_events_leave_no_reference_cycle(passes: Passes) -> None:
    def kept() -> list[object]:
        return [each for each in gc.get_objects() if isinstance(each, ResponseRelay | HttpRequest)]

    async with gateway_before(ScriptedStream(STREAM)) as antares:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                await antares.ask(chat(stream=True))
            assert passes.yes > 100
            await eventually(lambda: len(kept()) <= 1)
        finally:
            gc.enable()


async def test_two_requests_on_one_connection_get_their_own_events(passes: Passes) -> None:
    async with gateway_before(ScriptedStream(STREAM)) as antares, raw(antares) as client:
        client.writer.write(a_chat(stream=True) * 2)
        for _ in range(2):
            async with asyncio.timeout(20):
                text = await client.reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert text.startswith(b"HTTP/1.1 200")
            assert text.count(b'"content"') == 42
    assert passes.yes > 60
