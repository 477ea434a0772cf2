"""What an `HttpEngine` counts in streams: tokens, cached tokens, sequences, step times."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fixtures.live_server import Recorder
from tests.fixtures.scripted_server import (
    CHAT,
    DONE,
    HELLO,
    ScriptedStream,
    answer_of,
    ask,
    chunk,
    proxied,
    usage_chunk,
)


async def test_batched_tokens_with_usage_have_the_right_total() -> None:
    recorder = Recorder()
    batches = [chunk(" w w w w") for _ in range(20)]
    await answer_of(*batches, chunk("", "stop"), usage_chunk(81), DONE, recorder=recorder, stream=True)
    assert recorder.count() == 81
    assert recorder.tokens[-1][2] >= recorder.tokens[0][2]


@pytest.mark.parametrize("stream", [True, False])
async def test_batched_tokens_without_usage_are_counted_from_the_text(stream: bool) -> None:
    recorder = Recorder()
    batches = [chunk(" words and then more") for _ in range(60)]
    await answer_of(*batches, chunk("", "stop"), DONE, recorder=recorder, stream=stream)
    assert recorder.count() == pytest.approx(240, rel=0.1)


async def test_single_tokens_without_usage_are_counted_as_events() -> None:
    recorder = Recorder()
    words = [" international", " the", ".", "\n\n", " don", "'t", " {", "東京", "()", "::", "1234", " "] * 10
    await answer_of(*map(chunk, words), chunk("", "stop"), DONE, recorder=recorder, stream=True)
    assert recorder.count() == len(words)


@pytest.mark.process
async def test_step_times_of_batched_tokens_are_per_token() -> None:
    steps: list[bytes | float] = []
    for _ in range(16):
        steps += [chunk(" a b c d e f g h"), 0.08]
    async with proxied(ScriptedStream([*steps, chunk("", "stop"), DONE])) as (engine, client):
        await client.post(CHAT, json=ask(stream=True))
    model = engine.state.step_time
    model.refit()
    assert model.itl(1, 64) == pytest.approx(0.01, rel=0.6), "a gap of 80 ms is eight steps"


@pytest.mark.parametrize("cached", [-1, True, "3", 2.0, None, 6, 1 << 40, []])
@pytest.mark.parametrize("stream", [True, False])
async def test_impossible_cached_tokens_are_ignored(cached: Any, stream: bool) -> None:
    recorder = Recorder()
    await answer_of(*HELLO, usage_chunk(2, 5, cached_tokens=cached), DONE, recorder=recorder, stream=stream)
    assert (recorder.cached, recorder.prompts) == ({}, {"0": 5})


@pytest.mark.parametrize("cached", [0, 4, 5])
async def test_cached_tokens_are_reported(cached: int) -> None:
    recorder = Recorder()
    await answer_of(*HELLO, usage_chunk(2, 5, cached_tokens=cached), DONE, recorder=recorder, stream=True)
    assert recorder.cached == {"0": cached}


@pytest.mark.parametrize("count", [-4, "9", True, 1 << 40, None, 1.5])
async def test_impossible_usage_leaves_the_count_of_events(count: Any) -> None:
    recorder = Recorder()
    await answer_of(*HELLO, usage_chunk(count, count), DONE, recorder=recorder, stream=True)
    assert (recorder.count(), recorder.prompts) == (2, {})


async def test_server_cannot_invent_sequences() -> None:
    recorder = Recorder()
    odd = [chunk("x", index=i) for i in (0, 1, 7, 10**9)]
    await answer_of(*odd, chunk("y", "stop"), chunk("y", "stop", index=1), DONE, recorder=recorder, n=2, stream=True)
    assert {name for name, _, _ in recorder.tokens} == {"0", "1"}
