"""Whole answers of a server (`kind: http`) to prompts of equal size: its step-time model must not reject requests."""

from __future__ import annotations

import asyncio
from random import Random

from engine_adapter.engine import Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_gateway import chat, live
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.scripted_server import DONE, chunk, usage_chunk

REQUESTS = 300
EARLIER = 10
"""Answers that the model learns from between two requests: as from these requests, without the time for them."""

CLASSES = {"chat": {"ttft_ms": 1000, "tpot_ms": 1000}}
"""Bounds far above the scripted answer times, with margin for a busy machine."""


ANSWER = b"".join([chunk("Hello", "stop"), usage_chunk(1, prompt=32, cached_tokens=0), DONE])


class ScriptedAnswers:
    """A server that answers every POST with `ANSWER`, after an exponential time of 1 ms on average."""

    def __init__(self) -> None:
        self._random = Random(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        body = b""
        if scope["method"] == "POST":
            await asyncio.sleep(self._random.expovariate(1000))
            body = ANSWER
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": body})


async def test_whole_answers_to_equal_prompts_are_never_rejected() -> None:
    random = Random(0)
    async with serve(ScriptedAnswers()) as url, live(HttpEngine("remote", url), classes=CLASSES) as antares:
        (queue,) = antares.gateway.engine_queues
        model = queue.engine.state.step_time
        for at in range(REQUESTS):
            answer = await antares.ask(chat(stream=False))
            assert answer.status_code == 200, answer.text
            assert model.steps_seen == (at + 1) + at * EARLIER, "the model must learn from the answers"
            for _ in range(EARLIER):
                model.observe(0, 32, 0.0, random.expovariate(1 / 0.002) + 0.0002)
        await eventually(antares.is_idle)
        assert antares.outcomes["finished"] == REQUESTS
