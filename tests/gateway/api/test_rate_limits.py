"""Limits of tenants over HTTP: 429 with the limit, the `x-ratelimit-*` headers, and usage."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import openai
import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.auth import hash_key
from gateway.api.rate_limits import duration
from tests.fixtures.live_gateway import Live, chat, fast_engine, gateway_config, live
from tests.fixtures.live_server import HANG_S, eventually

KEY, SECOND, BOB = "alice-0123456789abcdef", "alice-second-0123456789", "bob-0123456789abcdef"


def keys(**limits: int) -> list[dict[str, Any]]:
    """Return two keys of a tenant with ``limits``, and one of a tenant without."""
    return [
        {"sha256": hash_key(KEY), "tenant": "alice", **limits},
        {"sha256": hash_key(SECOND), "tenant": "alice", **limits},
        {"sha256": hash_key(BOB), "tenant": "bob"},
    ]


def headers_of(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit")}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0004, "1ms"),
        (0.012, "12ms"),
        (0.999, "999ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (59.9996, "1m0s"),
        (86.4, "1m26.4s"),
        (360, "6m0s"),
        (3723.5, "1h2m3.5s"),
    ],
)
def test_duration_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_requests_beyond_the_limit_get_429_that_names_it() -> None:
    async with live(keys=keys(requests_per_minute=2)) as antares:
        first = await antares.ask(x_api_key=KEY)
        assert headers_of(first)["x-ratelimit-limit-requests"] == "2"
        assert headers_of(first)["x-ratelimit-remaining-requests"] == "1"
        assert re.fullmatch(r"(29\.\d+|30)s", headers_of(first)["x-ratelimit-reset-requests"])
        assert (await antares.ask(x_api_key=SECOND)).status_code == 200, "all keys of the tenant share the limit"
        answer = await antares.ask(x_api_key=KEY)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["code"]) == (429, "requests", "rate_limit_exceeded")
        assert error["limit"] == "requests_per_minute"
        assert "Limit 2, Used 2, Requested 1" in error["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 30
        assert answer.headers["x-should-retry"] == "true"
        assert headers_of(answer)["x-ratelimit-remaining-requests"] == "0"
        assert (await antares.ask(x_api_key=BOB)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat()),
        ("/v1/chat/completions", chat(stream=True)),
        ("/v1/messages", chat(max_tokens=4)),
        ("/v1/responses", {"model": "simulated", "input": "hi"}),
        ("/v1/embeddings", {"model": "simulated", "input": "hi"}),
    ],
)
async def test_limit_holds_on_every_route_in_the_shape_of_its_api(path: str, body: dict[str, Any]) -> None:
    async with live(keys=keys(requests_per_minute=1)) as antares:
        first = await antares.ask(body, path, x_api_key=KEY)
        assert first.status_code != 429
        assert "x-ratelimit-limit-requests" in first.headers
        answer = await antares.ask(body, path, x_api_key=KEY)
        assert (answer.status_code, answer.json()["error"]["message"][:10]) == (429, "Rate limit")
        if path == "/v1/messages":
            assert answer.json()["error"]["type"] == "rate_limit_error"
        models = await antares.http.get("/v1/models", headers={"x-api-key": KEY})
        assert (models.status_code, "x-ratelimit-limit-requests" in models.headers) == (200, True)


async def test_errors_carry_the_headers_too() -> None:
    async with live(keys=keys(requests_per_minute=10, tokens_per_minute=5000)) as antares:
        for body, status in (({"model": "simulated"}, 400), (chat(model="another"), 404)):
            answer = await antares.ask(body, x_api_key=KEY)
            assert answer.status_code == status
            assert len(headers_of(answer)) == 6
        assert headers_of(await antares.ask(x_api_key="unknown")) == {}
        assert headers_of(await antares.ask(x_api_key=BOB)) == {}


async def test_concurrent_requests_beyond_the_limit_get_429_until_one_ends() -> None:
    async with live(fast_engine(times=StepTimes(d=0.02)), keys=keys(max_concurrent=2)) as antares:
        body = chat(max_tokens=30, ignore_eos=True)
        tasks = [asyncio.create_task(antares.ask(body, x_api_key=KEY)) for _ in range(2)]
        await eventually(lambda: len(antares.gateway.engine_queues[0].running) == 2)
        answer = await antares.ask(x_api_key=SECOND)
        assert (answer.status_code, answer.json()["error"]["limit"]) == (429, "max_concurrent")
        assert (await antares.ask(x_api_key=BOB)).status_code == 200
        assert [(await task).status_code for task in tasks] == [200, 200]
        assert (await antares.ask(x_api_key=KEY)).status_code == 200


async def test_client_that_leaves_frees_its_place() -> None:
    async with live(fast_engine(times=StepTimes(d=0.02)), keys=keys(max_concurrent=1)) as antares:
        body = chat(max_tokens=4000, ignore_eos=True, stream=True)
        async with antares.http.stream("POST", "/v1/chat/completions", json=body, headers={"x-api-key": KEY}) as answer:
            await anext(answer.aiter_lines())
        await eventually(lambda: antares.gateway.ledger.open_count == 0)
        async with asyncio.timeout(HANG_S):
            while (await antares.ask(x_api_key=KEY)).status_code == 429:
                await asyncio.sleep(0.02)


async def tokens_left(antares: Live) -> int:
    usage = (await antares.http.get("/status")).json()["usage"]["alice"]
    return int(usage["limits"]["tokens_per_minute"]["remaining"])


async def test_tokens_are_settled_with_real_usage() -> None:
    async with live(keys=keys(tokens_per_minute=1000)) as antares:
        answer = await antares.ask(chat(max_tokens=500), x_api_key=KEY)
        used = answer.json()["usage"]["total_tokens"]
        left = await tokens_left(antares)
        assert 1000 - used <= left <= 1000 - used + 1000 / 60 * 5


async def test_request_that_overdraws_makes_the_next_one_wait() -> None:
    async with live(keys=keys(tokens_per_minute=60)) as antares:
        answer = await antares.ask(chat(max_tokens=200, ignore_eos=True), x_api_key=KEY)
        assert answer.status_code == 200
        answer = await antares.ask(x_api_key=KEY)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["limit"]) == (429, "tokens", "tokens_per_minute")
        assert int(answer.headers["retry-after"]) > 60
        assert headers_of(answer)["x-ratelimit-remaining-tokens"] == "0"
        assert antares.outcomes["rejected"] == 0, "it was rejected before its body was read"


async def test_prompt_beyond_the_limit_of_a_minute_is_not_to_be_retried() -> None:
    async with live(keys=keys(tokens_per_minute=50)) as antares:
        answer = await antares.ask(chat("word " * 200), x_api_key=KEY)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
        assert "larger than the limit" in answer.json()["error"]["message"]
        assert antares.outcomes["rejected"] == 1
        record = (await antares.http.get("/v1/requests", headers={"x-api-key": KEY})).json()["data"][0]
        assert (record["outcome"], record["reason"]) == ("rejected", "rate_limited")
        assert (await antares.ask(chat("hi", max_tokens=2), x_api_key=KEY)).status_code == 200


async def test_rejected_request_gets_its_tokens_back() -> None:
    async with live(keys=keys(tokens_per_minute=10_000), policy={"name": "slack"}) as antares:
        answer = await antares.ask(chat(max_tokens=100), x_api_key=KEY, x_slo_tpot_ms="0.01")
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "tpot_unattainable"
        assert await tokens_left(antares) == 10_000


async def test_engines_own_rate_limit_headers_are_replaced() -> None:
    async with live(keys=keys(requests_per_minute=5)) as antares:

        async def stub(scope: Any, receive: Any, send: Any) -> None:
            headers = [(b"x-ratelimit-limit-requests", b"999"), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"{}"})

        antares.engine.stub = stub
        answer = await antares.ask({"model": "simulated", "input": "hi"}, "/v1/embeddings", x_api_key=KEY)
        assert answer.headers.get_list("x-ratelimit-limit-requests") == ["5"]


async def test_reload_changes_limits() -> None:
    async with live(keys=keys(requests_per_minute=1)) as antares:
        assert (await antares.ask(x_api_key=KEY)).status_code == 200
        assert (await antares.ask(x_api_key=KEY)).status_code == 429
        antares.gateway.reload(gateway_config(keys=keys(requests_per_minute=100)))
        assert (await antares.ask(x_api_key=KEY)).status_code == 200
        antares.gateway.reload(gateway_config(keys=keys()))
        answer = await antares.ask(x_api_key=KEY)
        assert (answer.status_code, headers_of(answer)) == (200, {})


async def test_usage_of_tenants_is_in_status_and_metrics() -> None:
    async with live(keys=keys(requests_per_minute=3)) as antares:
        answer = await antares.ask(x_api_key=KEY)
        await antares.ask({"model": "simulated", "input": "hi"}, "/v1/embeddings", x_api_key=KEY)
        await antares.ask({}, x_api_key=KEY)
        await antares.ask(x_api_key=KEY)
        await antares.ask(x_api_key=BOB)
        status = (await antares.http.get("/status")).json()
        metrics = (await antares.http.get("/metrics")).text
    alice = status["usage"]["alice"]
    embedded = alice["requests"].pop("unscheduled", 0) + alice["requests"].pop("refused", 0)
    assert (alice["requests"], embedded) == ({"finished": 1, "rate_limited": 1}, 2)
    assert alice["prompt_tokens"] + alice["output_tokens"] == answer.json()["usage"]["total_tokens"]
    assert alice["limited"] == {"requests_per_minute": 1}
    assert status["usage"]["bob"]["requests"] == {"finished": 1}
    assert 'antares_tenant_requests_total{outcome="finished",tenant="alice"} 1.0' in metrics
    assert 'antares_rate_limited_requests_total{limit="requests_per_minute",tenant="alice"} 1.0' in metrics


async def test_openai_client_sees_a_rate_limit_error() -> None:
    async with live(keys=keys(requests_per_minute=1)) as antares:
        client = openai.AsyncOpenAI(base_url=f"{antares.url}/v1", api_key=KEY, max_retries=0)
        raw = await client.chat.completions.with_raw_response.create(**chat())
        assert raw.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as raised:
            await client.chat.completions.create(**chat())
        assert raised.value.code == "rate_limit_exceeded"


def test_keys_of_a_tenant_must_agree_in_their_limits() -> None:
    disagreeing = [*keys(requests_per_minute=1), {"sha256": hash_key("third"), "tenant": "alice"}]
    with pytest.raises(ValueError, match="another requests_per_minute"):
        gateway_config(keys=disagreeing)


@pytest.mark.parametrize(
    ("path", "body", "least", "most"),
    [
        ("/v1/completions", {"prompt": ["a b c d e f g h i j"] * 50, "max_tokens": 1, "ignore_eos": True}, 550, 600),
        ("/v1/completions", {"prompt": "a b c d e f g h i j", "n": 20, "max_tokens": 1, "ignore_eos": True}, 30, 40),
        # The simulated engine has no such route: it answers 404.
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "a b c"}]] * 50}, 0, 0),
    ],
)
async def test_several_prompts_of_a_request_all_count(path: str, body: dict[str, Any], least: int, most: int) -> None:
    async with live(keys=keys(tokens_per_minute=6000)) as antares:
        await antares.ask({"model": "simulated", **body}, path, x_api_key=KEY)
        assert 6000 - most <= await tokens_left(antares) <= 6000 - least + 300


async def test_several_prompts_are_rejected_if_together_they_exceed_the_limit() -> None:
    async with live(keys=keys(tokens_per_minute=100)) as antares:
        body = {"model": "simulated", "prompt": ["a b c d e f g h i j"] * 50, "max_tokens": 1}
        answer = await antares.ask(body, "/v1/completions", x_api_key=KEY)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
