"""OpenAI's SDK against a real vLLM: chats, completions, responses, tools and structured output."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.fixtures.sdk_requests import QUESTION, STRICT_TOOLS, TOOLS, City, ask, estimated_prompts, result_of, slo
from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import KEY, MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TWO_CALLS = "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    for name, city in (("get_weather", "Paris"), ("get_time", "Rome"))
)
PARALLEL = {"structured_outputs": {"choice": [TWO_CALLS]}}
"""Makes the model write two calls. NOTE: it has no effect together with strict tools."""


def test_openai_chat_streams_and_reports(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": ask(), "temperature": 0, "max_tokens": 24}
    completion = client.chat.completions.create(**options, extra_headers=slo(4001))
    assert "Paris" in (completion.choices[0].message.content or "")
    report = completion.model_extra["antares"]  # type: ignore[index]
    assert completion.usage is not None
    assert (report["attained"], report["output_tokens"]) == (True, completion.usage.completion_tokens)
    assert (report["slo_ttft_ms"], report["slo_tpot_ms"]) == (60000, 4001)

    raw = client.chat.completions.with_raw_response.create(
        **options, stream=True, stream_options={"include_usage": True}, extra_headers=slo(4001)
    )
    chunks = list(raw.parse())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == completion.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        completion.usage.prompt_tokens,
        completion.usage.completion_tokens,
    )
    assert float(raw.headers["x-antares-predicted-ttft-ms"]) > 0


async def test_openai_asynchronous_client_runs_chats_at_once(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.base}/v1", api_key=KEY, timeout=120) as client:
        chats = (
            client.chat.completions.create(model=MODEL, messages=ask(), max_tokens=8, extra_headers=slo(4002))
            for _ in range(6)
        )
        for completion in await asyncio.gather(*chats):
            assert completion.model_extra["antares"]["attained"]  # type: ignore[index]


def test_openai_completions(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
    completion = client.completions.create(**options, extra_headers=slo(4003))
    assert "Paris" in completion.choices[0].text
    assert completion.model_extra["antares"]["attained"]  # type: ignore[index]
    stream = client.completions.create(**options, stream=True, extra_headers=slo(4003))
    assert "".join(chunk.choices[0].text for chunk in stream) == completion.choices[0].text


def test_openai_responses_continue_a_stored_one(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 24}
    first = client.responses.create(input=QUESTION, **options, extra_headers=slo(4004))
    assert "Paris" in first.output_text
    assert first.model_extra["antares"]["attained"]  # type: ignore[index]
    with client.responses.stream(input=QUESTION, **options) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_response().output_text == first.output_text
    assert {"response.created", "response.output_text.delta", "response.completed"} <= kinds
    second = client.responses.create(input="And of Italy?", previous_response_id=first.id, **options)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens


def test_openai_parallel_calls_are_the_same_streamed_and_plain(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": ask(), "tools": TOOLS, "temperature": 0, "max_tokens": 80}
    message = client.chat.completions.create(**options, extra_body=PARALLEL).choices[0].message
    with client.chat.completions.stream(**options, extra_body=PARALLEL) as stream:
        streamed = stream.get_final_completion().choices[0].message
    for calls in (message.tool_calls, streamed.tool_calls):
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls or ()] == [  # type: ignore[union-attr]
            ("get_weather", {"city": "Paris"}),
            ("get_time", {"city": "Rome"}),
        ]
        assert len({call.id for call in calls or ()}) == 2


def test_openai_tool_loop_answers_from_the_results(served: Served, client: openai.OpenAI) -> None:
    estimated = estimated_prompts(served)
    options: dict[str, Any] = {"model": MODEL, "tools": TOOLS, "temperature": 0, "max_tokens": 80}
    messages = ask("How is the weather in Paris, and what time is it in Rome?")
    first = client.chat.completions.create(messages=messages, **options, extra_body=PARALLEL, extra_headers=slo(4005))
    assert first.choices[0].finish_reason == "tool_calls"
    calls: list[Any] = first.choices[0].message.tool_calls or []
    assert len(calls) == 2
    messages.append(first.choices[0].message.to_dict())
    for call in calls:
        content = result_of(call.function.name, json.loads(call.function.arguments)["city"])
        messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    second = client.chat.completions.create(messages=messages, **options, tool_choice="none", extra_headers=slo(4005))
    assert second.choices[0].message.content
    # The history, its calls and their results are part of the prompt.
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens + first.usage.completion_tokens
    for completion in (first, second):
        assert completion.model_extra["antares"]["attained"]  # type: ignore[index]
    assert estimated_prompts(served) == estimated, "vLLM itself measures the prompts"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_openai_forced_call_follows_the_schema(client: openai.OpenAI, choice: Any) -> None:
    completion = client.chat.completions.create(
        model=MODEL, messages=ask(), tools=STRICT_TOOLS, tool_choice=choice, temperature=0, max_tokens=80
    )
    calls: list[Any] = completion.choices[0].message.tool_calls or []
    assert calls
    for call in calls:
        City.model_validate_json(call.function.arguments)


def test_openai_responses_tool_loop(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in STRICT_TOOLS]
    options: dict[str, Any] = {"model": MODEL, "tools": tools, "temperature": 0, "max_output_tokens": 80}
    items: list[Any] = ask("How is the weather in Paris?")
    first = client.responses.create(input=items, **options, tool_choice="required")
    calls = [item for item in first.output if item.type == "function_call"]
    assert calls
    for call in calls:
        output = result_of(call.name, City.model_validate_json(call.arguments).city)
        items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": output}]
    second = client.responses.create(input=items, **options, tool_choice="none")
    assert second.output_text
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.input_tokens


def test_openai_structured_output_is_parsed(client: openai.OpenAI) -> None:
    chat = client.chat.completions.parse(
        model=MODEL, messages=ask(), response_format=City, temperature=0, max_tokens=40, extra_headers=slo(4006)
    )
    assert chat.choices[0].message.parsed == City(city="Paris")
    response = client.responses.parse(
        model=MODEL, input=QUESTION, text_format=City, temperature=0, max_output_tokens=40
    )
    assert response.output_parsed == City(city="Paris")
