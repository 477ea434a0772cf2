"""Prefix caching of the simulated engine, as its clients and its observer see it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_server import Recorder, observed

CHAT = "/v1/chat/completions"
SYSTEM = {"role": "system", "content": " ".join(f"rule{number}" for number in range(64))}


@asynccontextmanager
async def serving(observer: Recorder | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    engine = SimulatedEngine(times=StepTimes(b=0, d=1e-4, alpha=0), **options)
    await engine.start(EngineEvents())
    transport = httpx.ASGITransport(observed(engine.app, observer or Recorder()))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=10) as client:
            yield client
    finally:
        await engine.stop()


def chat(*messages: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), "max_tokens": 20, "ignore_eos": True, **fields}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


async def cached(client: httpx.AsyncClient, body: dict[str, Any], path: str = CHAT) -> int:
    usage = (await client.post(path, json=body)).json()["usage"]
    tokens: int = usage["prompt_tokens_details"]["cached_tokens"]
    return tokens


async def test_next_turn_finds_the_history_with_the_answer() -> None:
    recorder = Recorder()
    async with serving(recorder) as client:
        first = (await client.post(CHAT, json=chat(SYSTEM, user("one two three")))).json()
        answer = first["choices"][0]["message"]
        second = chat(SYSTEM, user("one two three"), answer, user("and now " * 10))
        # 64 + 3 + 19 computed tokens: five full blocks.
        assert await cached(client, second) == 80
    assert recorder.cached == {"0": 80}
    assert recorder.prompts == {"0": 64 + 3 + 20 + 20}


async def test_other_conversation_finds_the_system_prompt() -> None:
    async with serving() as client:
        assert await cached(client, chat(SYSTEM, user("first question"))) == 0
        assert await cached(client, chat(SYSTEM, user("second question"))) == 64


@pytest.mark.parametrize("fields", [{"cache_salt": "tenant-b"}, {"model": "adapter"}, {"tools": [{"name": "search"}]}])
async def test_salt_model_and_tools_keep_prefixes_apart(fields: dict[str, Any]) -> None:
    async with serving() as client:
        await client.post(CHAT, json=chat(SYSTEM, user("hello")))
        assert await cached(client, chat(SYSTEM, user("hello"), **fields)) == 0
        assert await cached(client, chat(SYSTEM, user("hello"), **fields)) == 64


async def test_prefix_caching_can_be_switched_off() -> None:
    async with serving(prefix_caching=False) as client:
        for _ in range(2):
            assert await cached(client, chat(SYSTEM, user("hello"))) == 0


async def test_text_and_token_id_prompts_are_cached_per_prompt() -> None:
    async with serving() as client:
        body = {"model": "m", "max_tokens": 2, "prompt": [list(range(40)), list(range(100, 150))], "n": 2}
        assert await cached(client, body, "/v1/completions") == 0
        assert await cached(client, body, "/v1/completions") == 32 + 48
        text = {"model": "m", "max_tokens": 2, "prompt": "w " * 40}
        await cached(client, text, "/v1/completions")
        assert await cached(client, text, "/v1/completions") == 32


async def test_cached_prompt_takes_less_prefill_time() -> None:
    async with serving() as client:
        long = chat(user("w " * 4000))
        await client.post(CHAT, json=long)
        assert await cached(client, long) == 3984


async def test_responses_route_reports_cached_tokens() -> None:
    async with serving() as client:
        body = {"model": "m", "input": "w " * 40, "max_output_tokens": 4}
        for expected in (0, 32):
            usage = (await client.post("/v1/responses", json=body)).json()["usage"]
            assert usage["input_tokens_details"]["cached_tokens"] == expected


async def test_messages_route_counts_tools_and_tool_use() -> None:
    tool_use = {"type": "tool_use", "id": "t", "name": "search", "input": {"query": "x" * 4000}}
    history = [user("hello"), {"role": "assistant", "content": [tool_use]}]
    body = {"model": "m", "max_tokens": 4, "tools": [{"name": "y" * 4000}], "messages": history}
    async with serving() as client:
        counted = (await client.post("/v1/messages/count_tokens", json=body)).json()["input_tokens"]
    assert counted == pytest.approx(2000, abs=40)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "text"),
    [
        (120, None, "your prompt contains 120 input tokens, which exceeds this limit even without any output tokens"),
        (100, 1, "your prompt contains 100 input tokens, which exceeds this limit"),
        (60, 50, "you requested 50 output tokens and your prompt contains 60 input tokens, for a total of 110 tokens"),
    ],
)
async def test_context_error_has_the_body_of_vllm(prompt: int, max_tokens: int | None, text: str) -> None:
    async with serving(max_model_len=100) as client:
        response = await client.post(CHAT, json=chat(user("w " * prompt), max_tokens=max_tokens))
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["message"].startswith("This model's maximum context length is 100 tokens. However, " + text)
    assert error["message"].endswith(f"(parameter=input_tokens, value={prompt})")
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "input_tokens", 400)


@pytest.mark.parametrize("salt", ["", 5, "x" * 1025])
async def test_invalid_cache_salt_is_rejected(salt: Any) -> None:
    async with serving() as client:
        response = await client.post(CHAT, json=chat(user("hello"), cache_salt=salt))
    assert response.status_code == 400
    assert "cache_salt" in response.json()["error"]["message"]
