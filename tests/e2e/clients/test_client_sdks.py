"""The SDKs that applications use, against a real vLLM: chats, tools, structured output, errors, and docs/clients.md.

The SDKs are imported inside the tests, because some of them take seconds to import.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import CONTEXT, KEY, MODEL, ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

QUESTION = "What is the capital of France?"
TOO_LONG = "word " * 9000
COUNTER = "antares_http_requests_total"
LOOPBACK = {"127.0.0.1", "::1", "localhost"}

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Returns the {what} in a city.",
            "parameters": CITY,
            "strict": strict,
        },
    }
    for strict in (True, False)
    for name, what in (("get_weather", "weather"), ("get_time", "local time"))
]
STRICT_TOOLS, TOOLS = TOOLS[:2], TOOLS[2:]
"""vLLM makes a call of a strict tool follow its schema, so that even a tiny model calls it correctly."""

TWO_CALLS = "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"city": "{city}"}}}}\n</tool_call>'
    for name, city in (("get_weather", "Paris"), ("get_time", "Rome"))
)
PARALLEL = {"structured_outputs": {"choice": [TWO_CALLS]}}
"""Makes the model write two calls. NOTE: it has no effect together with strict tools."""


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]


@pytest.fixture(autouse=True)
def outside_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test whose SDK looks up or connects to another host."""
    calls: list[object] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            calls.append(address)
            raise OSError(f"a test must not connect to {address}")
        connect(self, address)

    def local_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in LOOPBACK:
            calls.append(host)
            raise OSError(f"a test must not look up {host}")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_look_up)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    yield
    assert calls == []


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key=KEY, timeout=120)


@pytest.fixture
def claude(served: Served) -> anthropic.Anthropic:
    """Sends the key as ``x-api-key``."""
    return anthropic.Anthropic(base_url=served.base, api_key=KEY, timeout=120)


@pytest.fixture
def litellm(outside_calls: None) -> Any:
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    return litellm


def ask(text: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": text}]


def slo(tpot_ms: int) -> dict[str, str]:
    return {"x-slo-ttft-ms": "60000", "x-slo-tpot-ms": str(tpot_ms), "x-slo-report": "1"}


def paced(served: Served, tpot_ms: int) -> bool:
    """Whether the engine received this pace, so that the SDK sent its SLO headers."""
    return served.count("antares_gate_eligible_total", 1, tpot_ms=str(tpot_ms)) > 0


def prompt_of(message: anthropic.types.Message) -> int:
    """Tokens of the prompt. Anthropic's API counts those read from the cache and written to it apart."""
    usage = message.usage
    return usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)


def result_of(name: str, city: str) -> str:
    return f"It is sunny in {city}." if name == "get_weather" else f"It is 14:05 in {city}."


# --- openai -----------------------------------------------------------------------------------------------------------


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
    assert served.metric("antares_prompt_size_error_ratio_count") == 0, "vLLM itself measures the prompts"


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


# --- anthropic --------------------------------------------------------------------------------------------------------


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


# --- litellm ----------------------------------------------------------------------------------------------------------


def test_litellm_chat_through_both_apis(served: Served, litellm: Any) -> None:
    options: dict[str, Any] = {"messages": ask(), "api_key": KEY, "temperature": 0, "max_tokens": 24}
    for model, base in ((f"openai/{MODEL}", f"{served.base}/v1"), (f"anthropic/{MODEL}", served.base)):
        completion = litellm.completion(model=model, api_base=base, **options, extra_headers=slo(4008))
        text = completion.choices[0].message.content
        assert "Paris" in text
        stream = litellm.completion(model=model, api_base=base, **options, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    assert paced(served, 4008)


def test_litellm_returns_the_slo_report_and_tool_calls(served: Served, litellm: Any) -> None:
    options = {"model": f"openai/{MODEL}", "api_base": f"{served.base}/v1", "api_key": KEY, "messages": ask()}
    completion = litellm.completion(**options, max_tokens=8, extra_headers=slo(4009))
    assert completion.antares["attained"]
    called = litellm.completion(**options, tools=STRICT_TOOLS, tool_choice="required", temperature=0, max_tokens=80)
    call = called.choices[0].message.tool_calls[0]
    City.model_validate_json(call.function.arguments)


# --- langchain --------------------------------------------------------------------------------------------------------


def test_langchain_invokes_streams_and_structures(served: Served) -> None:
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"model": MODEL, "base_url": f"{served.base}/v1", "api_key": KEY, "temperature": 0}
    chat = ChatOpenAI(**options, max_tokens=40, default_headers=slo(4010), include_response_headers=True)
    message = chat.invoke(QUESTION)
    assert "Paris" in message.text
    assert float(message.response_metadata["headers"]["x-antares-predicted-ttft-ms"]) > 0
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == message.text
    called = chat.bind_tools(STRICT_TOOLS, tool_choice="required").invoke(QUESTION)
    assert isinstance(called.tool_calls[0]["id"], str)
    City.model_validate(called.tool_calls[0]["args"])
    for method in ("json_schema", "function_calling"):
        structured = chat.with_structured_output(City, method=method, strict=True)
        assert isinstance(structured.invoke(QUESTION), City)
    assert paced(served, 4010)


# --- an agent framework -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_agent_calls_its_tool_and_answers(served: Served, api: str) -> None:
    import agents

    agents.set_tracing_disabled(True)
    asked: list[str] = []

    @agents.function_tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """Return the weather in a city."""
        asked.append(city)
        return result_of("get_weather", city)

    client = openai.AsyncOpenAI(base_url=f"{served.base}/v1", api_key=KEY, timeout=120)
    kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
    tpot_ms = 4011 if api == "chat" else 4012
    agent = agents.Agent(
        name="weather",
        instructions="Answer from the result of the tool.",
        model=kind(model=MODEL, openai_client=client),
        tools=[get_weather],
        # The framework drops `tool_choice` after the first call, so that the model then answers.
        model_settings=agents.ModelSettings(
            temperature=0, max_tokens=60, tool_choice="required", extra_headers=slo(tpot_ms)
        ),
    )
    async with client:
        result = await agents.Runner.run(agent, "How is the weather in Paris?", max_turns=6)
    assert asked
    assert result.final_output
    assert len(result.raw_responses) == len(asked) + 1
    assert paced(served, tpot_ms)


# --- errors -----------------------------------------------------------------------------------------------------------

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


# --- documentation ----------------------------------------------------------------------------------------------------

EXAMPLES = re.findall(
    r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```",
    (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


def test_documentation_has_an_example_for_each_sdk() -> None:
    assert {"openai", "anthropic", "litellm", "langchain-openai", "openai-agents"} <= {name for name, _ in EXAMPLES}


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_documented_example_runs(served: Served, litellm: Any, name: str, code: str) -> None:
    assert "http://127.0.0.1:8100" in code
    code = code.replace("http://127.0.0.1:8100", served.base).replace("<key>", KEY)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, f"docs/clients.md: {name}", "exec"), {"__name__": "__main__"})
    assert output.getvalue().strip()
