"""Generation routes of a remote server (`kind: http`), which is a simulated engine behind a socket."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_gateway import CHAT, TEXT, Live, StubbedEngine, chat, fast_engine, live, serving

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat(),
    TEXT: {"model": "simulated", "prompt": "tell me a story"},
    RESPONSES: {"model": "simulated", "input": "tell me a story"},
    MESSAGES: {"model": "simulated", "max_tokens": 64, "messages": [{"role": "user", "content": "tell me a story"}]},
}


@asynccontextmanager
async def in_front() -> AsyncIterator[tuple[Live, StubbedEngine, list[dict[str, Any]]]]:
    """Yield a gateway in front of a served engine, that engine, and the bodies that reach it."""
    upstream = fast_engine()
    await upstream.start(EngineEvents())
    bodies: list[dict[str, Any]] = []

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        async def recorded() -> Any:
            message = await receive()
            if message.get("body"):
                bodies.append(json.loads(message["body"]))
            return message

        await upstream.app(scope, recorded, send)

    try:
        async with serving(recording) as url, live(HttpEngine("remote", url)) as antares:
            yield antares, upstream, bodies
    finally:
        await upstream.stop()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
async def test_request_is_counted_reported_and_paced(path: str, stream: bool) -> None:
    async with in_front() as (antares, _, bodies):
        answer = await antares.ask(
            {**BODIES[path], "stream": stream}, path, x_slo_report="1", x_slo_tpot_ms="900", x_request_id="mine"
        )
        assert (answer.status_code, answer.headers.get_list("x-request-id")) == (200, ["mine"])
        found = re.search(r"^: antares (\{.*\})$", answer.text, re.MULTILINE)
        report = json.loads(found[1]) if found else answer.json()["antares"]
        assert (report["attained"], report["output_tokens"], report["engine"]) == (True, 8, "remote")
        assert 0 <= report["ttft_ms"] <= report["e2e_ms"]
        assert bodies[-1]["vllm_xargs"] == {"antares_gate": "slack", "antares_tpot_ms": 900.0}
        assert antares.outcomes == {"finished": 1, "rejected": 0, "failed": 0, "cancelled": 0}


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_engine_that_dies_in_a_stream_gives_the_error_event_of_the_api(path: str) -> None:
    async with in_front() as (antares, upstream, _):
        limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
        body = {**BODIES[path], "stream": True, "ignore_eos": True, limit: 2000}
        async with antares.http.stream("POST", path, json=body) as response:
            lines = response.aiter_lines()
            for _ in range(20):
                await anext(lines)
            upstream.crash()
            rest = [line async for line in lines if line]
        assert rest[-2] == "event: error"
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
        assert antares.outcomes["failed"] == 1


async def test_count_tokens_is_answered_by_the_server() -> None:
    async with in_front() as (antares, _, _):
        answer = await antares.ask(BODIES[MESSAGES], MESSAGES + "/count_tokens")
        assert (answer.status_code, answer.json()) == (200, {"input_tokens": 4})
        assert antares.gateway.ledger.accepted == 0
