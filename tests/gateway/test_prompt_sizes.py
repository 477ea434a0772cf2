"""What a remote server's prompts cost: their size, what of them is cached, and whether they fit its context."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine_adapter.remote.engine import HttpEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.counting_server import CountingServer
from tests.fixtures.live_gateway import CLASSES, Live, live
from tests.fixtures.live_server import eventually, serve

PREFILL_MS = 0.1
"""Milliseconds that a prompt token takes."""

STEPS = StepTimes(d=1e-4, b=1e-6, alpha=PREFILL_MS / 1000)


@asynccontextmanager
async def in_front_of(server: CountingServer, prefix_caching: bool = True, **changes: Any) -> AsyncIterator[Live]:
    """Yield a gateway in front of ``server`` whose step times do not change."""
    async with serve(server) as url:
        engine = HttpEngine(
            "remote", url, step_times=STEPS, max_num_batched_tokens=100_000, prefix_caching=prefix_caching
        )
        async with live(engine, classes={**CLASSES, "default": {"ttft_ms": 0.5}}, **changes) as antares:
            engine.state.step_time.learn = False
            yield antares


def a_chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    return {"model": "m", "messages": turns, "max_tokens": 4, **fields}


def words(count: int, seed: int = 0) -> str:
    choice = random.Random(seed)
    return " ".join(choice.choices(["alpha", "beta", "gamma", "delta", "epsilon", "zeta"], k=count))


TOOLS = [
    {
        "type": "function",
        "function": {"name": f"tool_{n}", "description": words(150, n), "parameters": {"type": "object"}},
    }
    for n in range(45)
]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"text": "' + words(5000) + '"}'}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"description": words(3500)}}}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/picture.jpg"}}


@pytest.mark.parametrize(
    ("body", "bound_ms"),
    [
        (a_chat("hi", tools=TOOLS), 300),
        (a_chat("hi", tools=TOOLS, stream=True), 300),
        (a_chat("hi", functions=[tool["function"] for tool in TOOLS]), 300),
        (a_chat({"role": "assistant", "content": None, "tool_calls": [CALL]}, "go on"), 300),
        (a_chat({"role": "tool", "tool_call_id": "1", "content": words(5000)}), 300),
        (a_chat("hi", response_format=SCHEMA), 200),
        (a_chat({"role": "assistant", "content": "a", "reasoning_content": words(5000)}, "go on"), 300),
        (a_chat({"role": "user", "content": [{"type": "text", "text": "see"}, IMAGE]}), 80),
        (a_chat({"role": "user", "content": [IMAGE, IMAGE, IMAGE]}), 250),
        (a_chat({"role": "user", "content": [{"type": "text", "text": words(5000)}]}), 300),
        (a_chat({"role": "system", "content": words(5000)}, "hi"), 300),
        (a_chat("漢字" * 2000), 300),
        (a_chat("a" * 4096 + " w" * 6000), 400),
    ],
)
async def test_prompt_that_cannot_be_prefilled_in_time_is_rejected(body: dict[str, Any], bound_ms: int) -> None:
    server = CountingServer()
    async with in_front_of(server) as antares:
        answer = await antares.ask(body, x_slo_ttft_ms=str(bound_ms))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (429, "ttft_unattainable")
        assert bound_ms < error["predicted_ms"] < 30 * bound_ms
        assert server.prompts == []


async def test_prompt_of_cjk_characters_is_predicted_near_the_truth() -> None:
    async with in_front_of(CountingServer()) as antares:
        answer = await antares.ask(a_chat("漢字" * 2000), x_slo_ttft_ms="100")
        # 4,000 characters: 400 ms at one token for each.
        assert 300 < answer.json()["error"]["predicted_ms"] < 500


async def test_repeated_prompt_is_served_within_a_bound_between_cached_and_cold() -> None:
    server = CountingServer()
    async with in_front_of(server) as antares:
        body = a_chat(words(3000))
        cold = await antares.ask(body, x_slo_ttft_ms="200")
        assert cold.status_code == 429
        assert (await antares.ask(body, x_slo_ttft_ms="20000")).status_code == 200
        answers = [await antares.ask(body, x_slo_ttft_ms="200") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert server.prompts[1][1] > 0.9 * server.prompts[1][0]


@pytest.mark.parametrize("stream", [True, False])
async def test_chat_that_grows_is_served_whole_within_a_bound_on_its_new_part(stream: bool) -> None:
    server = CountingServer()
    async with in_front_of(server) as antares:
        history: list[Any] = [{"role": "system", "content": words(500)}]
        for turn in range(9):
            history.append({"role": "user", "content": words(200, turn)})
            bound = "2000" if turn == 0 else "120"
            answer = await antares.ask(a_chat(*history, stream=stream), x_slo_ttft_ms=bound)
            assert answer.status_code == 200, (turn, answer.text)
            history.append({"role": "assistant", "content": words(100, 100 + turn)})
        text = antares.gateway.metrics.exposition().decode()
        tokens = {
            kind: float(text.split(f'antares_prefix_cache_tokens_total{{engine="remote",kind="{kind}"')[1].split()[1])
            for kind in ("prompt", "predicted", "cached")
        }
        assert 0.7 * tokens["cached"] <= tokens["predicted"] <= 1.1 * tokens["cached"]


async def test_prompts_with_other_cache_salts_share_nothing() -> None:
    async with in_front_of(CountingServer()) as antares:
        body = a_chat(words(3000))
        assert (await antares.ask({**body, "cache_salt": "a"}, x_slo_ttft_ms="20000")).status_code == 200
        assert (await antares.ask({**body, "cache_salt": "a"}, x_slo_ttft_ms="200")).status_code == 200
        assert (await antares.ask({**body, "cache_salt": "b"}, x_slo_ttft_ms="200")).status_code == 429
        assert (await antares.ask(body, x_slo_ttft_ms="200")).status_code == 429


async def test_server_that_caches_nothing_is_not_trusted_for_long() -> None:
    async with in_front_of(CountingServer(caches=False)) as antares:
        prefixes = antares.gateway.engine_queues[0].admission.prefixes
        body = a_chat(words(3000))
        for _ in range(16):
            await antares.ask(body, x_slo_ttft_ms="20000")
        assert prefixes.reliability < 0.1
        assert (await antares.ask(body, x_slo_ttft_ms="200")).status_code == 429


async def test_server_configured_without_a_prefix_cache_is_never_expected_to_hit() -> None:
    async with in_front_of(CountingServer(caches=False, reports_cached=False), prefix_caching=False) as antares:
        body = a_chat(words(3000))
        assert (await antares.ask(body, x_slo_ttft_ms="20000")).status_code == 200
        assert (await antares.ask(body, x_slo_ttft_ms="200")).status_code == 429


async def test_server_that_does_not_report_hits_is_expected_to_cache() -> None:
    async with in_front_of(CountingServer(reports_cached=False)) as antares:
        body = a_chat(words(3000))
        assert (await antares.ask(body, x_slo_ttft_ms="20000")).status_code == 200
        assert (await antares.ask(body, x_slo_ttft_ms="200")).status_code == 200


@pytest.mark.parametrize("headers", [{}, {"x_slo_ttft_ms": "1"}])
async def test_prompt_beyond_the_context_gets_the_servers_own_error(headers: dict[str, str]) -> None:
    async with in_front_of(CountingServer(context=2048), default_class="default") as antares:
        answer = await antares.ask(a_chat(words(5000)), **headers)
        assert answer.status_code == 400
        assert "maximum context length is 2048 tokens" in answer.json()["error"]["message"]
        assert antares.outcomes["rejected"] == 1


async def test_rejection_says_where_a_bound_comes_from() -> None:
    async with in_front_of(CountingServer(), default_class="default") as antares:
        by_class = (await antares.ask(a_chat(words(1000)))).json()["error"]["message"]
        by_client = (await antares.ask(a_chat(words(1000)), x_slo_ttft_ms="0.5")).json()["error"]["message"]
        assert "of 0.5 ms (the default of SLO class 'default'; x-slo-ttft-ms overrides it) cannot be met" in by_class
        assert "of 0.5 ms cannot be met" in by_client


async def test_estimate_learns_the_servers_tokenizer() -> None:
    server = CountingServer(tokens_of=lambda text: 2 * len(text) + 100, caches=False)
    async with in_front_of(server) as antares:
        for turn in range(50):
            await antares.ask(a_chat(words(50 + 7 * turn, turn)), x_slo_class="free")
        before = within_ten_percent(antares)
        for turn in range(20):
            await antares.ask(a_chat(words(33 + 17 * turn, turn)), x_slo_class="free")
        assert within_ten_percent(antares) - before == 20
        assert antares.gateway.proxy.sizer.sizes.of("m").counts == len(server.prompts) == 70


async def test_tokenizer_of_a_vllm_server_is_known_before_the_first_request() -> None:
    server = CountingServer(tokens_of=lambda text: 2 * len(text) + 100, caches=False, owner="vllm")
    async with in_front_of(server) as antares:
        sizes = antares.gateway.proxy.sizer.sizes.of("m")
        await eventually(lambda: sizes.counts > 60 and not antares.gateway._calibrations)
        for turn in range(20):
            await antares.ask(a_chat(words(33 + 17 * turn, turn)), x_slo_class="free")
        assert within_ten_percent(antares) >= 18


@pytest.mark.parametrize("owner", ["", "somebody"])
async def test_servers_that_are_not_vllm_are_sent_no_samples(owner: str) -> None:
    server = CountingServer(owner=owner)
    async with in_front_of(server) as antares:
        await antares.ask(a_chat("hi"))
        assert server.counted == 0


def within_ten_percent(antares: Live) -> float:
    """Return the number of prompts whose size was estimated with at most ten percent of error."""
    text = antares.gateway.metrics.exposition().decode()
    return float(text.split('antares_prompt_size_error_ratio_bucket{le="0.1",model="m"}')[1].split()[0])
