"""Bodies that the parser accepts and the encoder does not, and options of the wrong type, on the simulated engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fixtures.live_gateway import CHAT, chat, live


def deep() -> Any:
    value: Any = 1
    for _ in range(300):
        value = [value]
    return value


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": deep()}]},
        {"messages": [{"role": "user", "content": deep()}]},
        {"messages": [{"role": "assistant", "tool_calls": deep()}]},
        {"response_format": {"type": "json_schema", "json_schema": deep()}},
        {"vllm_xargs": {"a": deep()}},
        {"unknown": deep()},
        {"stream_options": ["include_usage"]},
        {"stream": True, "stream_options": "all"},
    ],
)
async def test_unusable_document_gets_400(fields: dict[str, Any]) -> None:
    async with live() as antares:
        answer = await antares.ask(chat(**fields), CHAT)
        assert answer.status_code == 400
        assert antares.is_idle()


async def test_deep_tools_get_400_from_count_tokens() -> None:
    async with live() as antares:
        body = {**chat(), "tools": [{"name": "f", "input_schema": deep()}]}
        assert (await antares.ask(body, "/v1/messages/count_tokens")).status_code == 400
