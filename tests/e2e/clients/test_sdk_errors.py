"""What each SDK makes of the gateway's errors: rejections, too long prompts, wrong keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest

from tests.fixtures.sdk_requests import QUESTION, ask
from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import CONTEXT, KEY, MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TOO_LONG = "word " * 9000
COUNTER = "antares_http_requests_total"

Call = Callable[[str, str, dict[str, str], str], object]
"""Sends one request: address of the gateway, key, headers, text. Every SDK keeps its default number of retries."""


def _openai_chat(base: str, key: str, headers: dict[str, str], text: str) -> object:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=key)
    return client.chat.completions.create(model=MODEL, messages=ask(text), max_tokens=4, extra_headers=headers)


def _openai_stream(base: str, key: str, headers: dict[str, str], text: str) -> object:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=key)
    return client.chat.completions.create(model=MODEL, messages=ask(text), stream=True, extra_headers=headers)


def _openai_completion(base: str, key: str, headers: dict[str, str], text: str) -> object:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=key)
    return client.completions.create(model=MODEL, prompt=text, max_tokens=4, extra_headers=headers)


def _openai_response(base: str, key: str, headers: dict[str, str], text: str) -> object:
    client = openai.OpenAI(base_url=f"{base}/v1", api_key=key)
    return client.responses.create(model=MODEL, input=text, max_output_tokens=4, extra_headers=headers)


def _anthropic_message(base: str, key: str, headers: dict[str, str], text: str) -> object:
    client = anthropic.Anthropic(base_url=base, api_key=key)
    return client.messages.create(model=MODEL, messages=ask(text), max_tokens=4, extra_headers=headers)


def _litellm_openai(base: str, key: str, headers: dict[str, str], text: str) -> object:
    import litellm

    return litellm.completion(
        f"openai/{MODEL}", ask(text), api_base=f"{base}/v1", api_key=key, max_tokens=4, extra_headers=headers
    )


def _litellm_anthropic(base: str, key: str, headers: dict[str, str], text: str) -> object:
    import litellm

    return litellm.completion(
        f"anthropic/{MODEL}", ask(text), api_base=base, api_key=key, max_tokens=4, extra_headers=headers
    )


def _langchain(base: str, key: str, headers: dict[str, str], text: str) -> object:
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"model": MODEL, "base_url": f"{base}/v1", "api_key": key, "max_tokens": 4}
    return ChatOpenAI(**options, default_headers=headers).invoke(text)


def _agent(base: str, key: str, headers: dict[str, str], text: str) -> object:
    import agents

    async def run() -> object:
        async with openai.AsyncOpenAI(base_url=f"{base}/v1", api_key=key) as client:
            model = agents.OpenAIChatCompletionsModel(model=MODEL, openai_client=client)
            settings = agents.ModelSettings(max_tokens=4, extra_headers=headers)
            return await agents.Runner.run(agents.Agent(name="agent", model=model, model_settings=settings), text)

    agents.set_tracing_disabled(True)
    return asyncio.run(run())


CALLS: list[Call] = [
    _openai_chat,
    _openai_stream,
    _openai_completion,
    _openai_response,
    _anthropic_message,
    _litellm_openai,
    _litellm_anthropic,
    _langchain,
    _agent,
]


def raised(call: Call, name: str) -> type[Exception]:
    """The SDK's exception. Those of litellm, langchain and the agents are subclasses of openai's."""
    return getattr(anthropic if call is _anthropic_message else openai, name)  # type: ignore[no-any-return]


def name_of(call: object) -> str:
    return getattr(call, "__name__", "").strip("_")


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_rejection_is_a_rate_limit_error_and_not_retried(served: Served, litellm: Any, call: Call) -> None:
    before = served.metric(COUNTER, status="429")
    with pytest.raises(raised(call, "RateLimitError")) as caught:
        call(served.base, KEY, {"x-slo-ttft-ms": "1"}, QUESTION)
    # litellm has no body for the Anthropic API, but quotes it.
    assert "ttft_unattainable" in f"{caught.value} {getattr(caught.value, 'body', None)}"
    assert served.count(COUNTER, before + 1, status="429") == before + 1, (
        "x-should-retry is false, so the SDK does not try again"
    )


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@pytest.mark.parametrize("headers", [{}, {"x-slo-ttft-ms": "1"}], ids=["no bounds", "impossible bound"])
def test_too_long_prompt_is_a_bad_request_error(
    served: Served, litellm: Any, call: Call, headers: dict[str, str]
) -> None:
    with pytest.raises(raised(call, "BadRequestError"), match=f"maximum context length is {CONTEXT} tokens"):
        call(served.base, KEY, headers, TOO_LONG)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_wrong_key_is_an_authentication_error(served: Served, litellm: Any, call: Call) -> None:
    before = served.metric(COUNTER, status="401")
    with pytest.raises(raised(call, "AuthenticationError")):
        call(served.base, "sk-wrong", {}, QUESTION)
    assert served.count(COUNTER, before + 1, status="401") == before + 1
