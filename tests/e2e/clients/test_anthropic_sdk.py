"""Anthropic's SDK against a real vLLM: messages, token counts and tools."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.fixtures.sdk_requests import CITY, City, ask, paced, result_of, slo
from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def prompt_of(message: anthropic.types.Message) -> int:
    """Tokens of the prompt. Anthropic's API counts those read from the cache and written to it apart."""
    usage = message.usage
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


def test_anthropic_messages_stream_and_count(served: Served, claude: anthropic.Anthropic) -> None:
    conversation: dict[str, Any] = {"model": MODEL, "system": "Answer in one sentence.", "messages": ask()}
    options: dict[str, Any] = {"max_tokens": 24, "extra_body": {"temperature": 0}}
    message = claude.messages.create(**conversation, **options, extra_headers=slo(4007))
    assert message.content[0].type == "text"
    assert "Paris" in message.content[0].text
    assert message.model_extra["antares"]["attained"]  # type: ignore[index]
    with claude.messages.stream(**conversation, **options, extra_headers=slo(4007)) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
        assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens
    assert claude.messages.count_tokens(**conversation).input_tokens == prompt_of(message)
    assert paced(served, 4007)


def test_anthropic_tool_loop_with_parallel_calls_in_the_history(claude: anthropic.Anthropic) -> None:
    tools: list[Any] = [
        {"name": name, "description": "Returns it.", "input_schema": CITY, "strict": True}
        for name in ("get_weather", "get_time")
    ]
    options: dict[str, Any] = {"model": MODEL, "max_tokens": 80, "tools": tools, "extra_body": {"temperature": 0}}
    messages: list[Any] = ask("How is the weather in Paris?")
    forced: Any = {"type": "tool", "name": "get_weather"}
    plain = claude.messages.create(messages=messages, **options, tool_choice=forced)
    with claude.messages.stream(messages=messages, **options, tool_choice=forced) as stream:
        streamed = stream.get_final_message()
    for message in (plain, streamed):
        assert message.stop_reason == "tool_use"
        calls = [block for block in message.content if block.type == "tool_use"]
        assert calls
        assert all(City.model_validate(call.input) for call in calls)
    calls = [block for block in plain.content if block.type == "tool_use"]
    history = [call.to_dict() for call in calls]
    history.append({"type": "tool_use", "id": "another", "name": "get_time", "input": {"city": "Rome"}})
    results = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": result_of(str(call["name"]), "Rome")}
        for call in history
    ]
    messages += [{"role": "assistant", "content": history}, {"role": "user", "content": results}]
    answer = claude.messages.create(messages=messages, **options)
    counted = claude.messages.count_tokens(model=MODEL, tools=tools, messages=messages)
    assert answer.content
    assert prompt_of(answer) == counted.input_tokens > prompt_of(plain) + plain.usage.output_tokens
