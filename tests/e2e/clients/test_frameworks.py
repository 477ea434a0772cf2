"""litellm, LangChain and OpenAI's agents against a real vLLM.

They are imported inside the tests, because some of them take seconds to import.
"""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest

from tests.fixtures.sdk_requests import QUESTION, STRICT_TOOLS, City, ask, paced, result_of, slo
from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import KEY, MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


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
