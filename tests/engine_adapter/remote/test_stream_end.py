"""The end of a stream through an `HttpEngine`: what is complete, and what is a failure."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from engine_adapter.engine import EngineLost
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import Recorder, serve
from tests.fixtures.scripted_server import (
    BREAK,
    CHAT,
    DONE,
    HELLO,
    ScriptedStream,
    answer_of,
    ask,
    chunk,
    content,
    loss_of,
    proxied,
    usage_chunk,
)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [5.0, BREAK], ids=["stays open", "breaks"])
async def test_answer_is_complete_at_done(after: float, stream: bool) -> None:
    began = time.monotonic()
    recorder = Recorder()
    response = await answer_of(*HELLO, usage_chunk(2), DONE, after, recorder=recorder, stream=stream)
    assert time.monotonic() - began < 4
    assert response.status_code == 200
    assert recorder.count() == 2
    assert response.text.endswith("data: [DONE]\n\n") if stream else content(response) == "Hello you"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "steps",
    [
        (chunk("Hello"),),
        (chunk("Hello"), BREAK),
        (chunk(role="assistant", content=""),),
        (b": comment\n\n",),
        (),
        (chunk("Hello"), usage_chunk(1)),
        (chunk("Hello"), chunk(" you", "stop")[:-20]),
        (chunk("Hello", finish=""),),
    ],
    ids=["ends", "breaks", "role only", "comment only", "empty", "usage only", "half an event", "empty reason"],
)
async def test_stream_without_an_end_is_a_failure(steps: tuple[bytes | float, ...], stream: bool) -> None:
    await loss_of(*steps, stream=stream)


async def test_log_names_the_cause_of_a_lost_response_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serve(ScriptedStream([chunk("secret")])) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            for _ in range(3):
                with pytest.raises(EngineLost):
                    await client.post(CHAT, json=ask())
        await engine.stop()
    (line,) = [r.getMessage() for r in caplog.records if "lost" in r.getMessage()]
    assert line.startswith("lost a response: engine remote at http")
    assert line.endswith("the stream ended before the response was complete")
    assert "secret" not in line


@pytest.mark.parametrize("stream", [True, False])
async def test_one_unfinished_choice_of_two_is_a_failure(stream: bool) -> None:
    await loss_of(chunk("a", "stop"), chunk("b", index=1), stream=stream, n=2)
    await loss_of(chunk("a", "stop"), stream=stream, n=2)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("end", [(), (BREAK,), (usage_chunk(2),)], ids=["ends", "breaks", "usage"])
async def test_stream_without_done_is_complete_if_every_choice_is(end: tuple[bytes, ...], stream: bool) -> None:
    response = await answer_of(*HELLO, *end, stream=stream)
    assert response.status_code == 200
    assert response.content.startswith(HELLO[0]) if stream else content(response) == "Hello you"
    two = await answer_of(chunk("a", "stop"), chunk("b", "length", index=1), *end, stream=stream, n=2)
    assert two.status_code == 200


async def test_last_event_without_its_blank_line_counts() -> None:
    assert content(await answer_of(*HELLO, b"data: [DONE]")) == "Hello you"
    assert content(await answer_of(chunk("Hello"), chunk(" you", "stop").rstrip())) == "Hello you"


async def test_connection_is_reused_after_done() -> None:
    peers: list[Any] = []
    upstream = ScriptedStream([*HELLO, DONE])

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            peers.append(scope["client"])
        await upstream(scope, receive, send)

    async with proxied(recording) as (_, client):
        for stream in (True, False, True):
            await client.post(CHAT, json=ask(stream=stream))
    assert len(set(peers)) == 1


async def test_nothing_after_done_reaches_the_client() -> None:
    response = await answer_of(*HELLO, DONE + chunk("more"), chunk("more"), stream=True)
    assert response.content == b"".join(HELLO) + DONE
