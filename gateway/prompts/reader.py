"""Reads the pieces of a prompt from a request's messages, as OpenAI's and Anthropic's APIs write them.

Nothing here raises for an odd piece: the engine checks its request, and what is not known counts as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gateway.prompts.content import Part, PromptContent
from gateway.prompts.media import audio_seconds, read_image

_MAX_NESTING = 4
"""Lists of parts inside parts (a tool result with text and images) that are read. Anything deeper counts as text."""

_TEXT_FIELDS = ("text", "refusal", "thinking", "transcript")
_BINARY_CHARS = 1024
"""Shortest string that can count as binary data, in characters; convention."""
_BASE64_START = re.compile(r"data:[^,]{0,128};base64,|[A-Za-z0-9+/_-]{256}")
"""How binary data begins. No text has a word of 256 characters without punctuation."""
_VIDEO_S = 30.0
"""Assumed seconds of a video, for its share among the blocks; its tokens are learned."""


def read_message(message: dict[str, Any], content: PromptContent) -> None:
    """Add a chat message: its content, its reasoning, and its tool calls."""
    content.add_message(str(message.get("role", "")))
    for field in ("reasoning_content", "reasoning"):
        if field in message:
            content.add_json(message[field], Part.REASONING)
    read_parts(message.get("content"), content)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        _read_call((call.get("function") or call.get("custom")) if isinstance(call, dict) else call, content)
    if message.get("function_call") is not None:
        _read_call(message["function_call"], content)
    name = message.get("name")
    if isinstance(name, str):
        content.add_text(name)


def read_tools(tools: Any, content: PromptContent) -> None:
    """Add the tools that a request offers, each as the schema that a template renders."""
    for tool in tools if isinstance(tools, list) else ():
        content.add_tool(tool)


def read_parts(value: Any, content: PromptContent, nesting: int = 0) -> None:
    """Add a message's content: a string, or a list of parts."""
    if isinstance(value, str):
        content.add_text(value)
    elif isinstance(value, list) and nesting < _MAX_NESTING:
        for part in value:
            _read_part(part, content, nesting)
    elif isinstance(value, dict):
        _read_part(value, content, nesting)
    elif value is not None:
        _read_unknown(value, content)


def last_text(value: Any) -> str:
    """Return the text of a message's content, without its other parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(p["text"] for p in value if isinstance(p, dict) and isinstance(p.get("text"), str))
    return ""


def _read_part(part: Any, content: PromptContent, nesting: int) -> None:
    if not isinstance(part, dict):
        _read_unknown(part, content)
        return
    kind = part.get("type")
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is not None:
        reader(part, content, nesting)
        return
    for name in _TEXT_FIELDS:
        if isinstance(part.get(name), str):
            content.add_text(part[name], Part.REASONING if name == "thinking" else Part.TEXT)
            return
    _read_unknown(part, content)


def _read_unknown(value: Any, content: PromptContent) -> None:
    """Add a value of a form that is not known: its text, and each piece of binary data as a file."""
    content.add_json(_without_binary(value, content), Part.TEXT)


def _without_binary(value: Any, content: PromptContent, nesting: int = 0) -> Any:
    """Return ``value`` without its binary data, which is added to ``content``."""
    if isinstance(value, str):
        if len(value) < _BINARY_CHARS or not _BASE64_START.match(value):
            return value
        content.add_image(read_image(value))
        return None
    if nesting < _MAX_NESTING and isinstance(value, list):
        return [_without_binary(item, content, nesting + 1) for item in value]
    if nesting < _MAX_NESTING and isinstance(value, dict):
        return {key: _without_binary(item, content, nesting + 1) for key, item in value.items()}
    return value


def _read_image_url(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    given = part.get("image_url")
    url, detail = (given.get("url"), given.get("detail")) if isinstance(given, dict) else (given, part.get("detail"))
    content.add_image(read_image(url if isinstance(url, str) else "", detail))


def _read_source(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    """Add Anthropic's ``image`` or ``document``."""
    source = part.get("source")
    source = source if isinstance(source, dict) else {}
    data = source.get("data") or source.get("url") or source.get("file_id") or ""
    if source.get("type") in ("text", "content"):
        read_parts(source.get("data") or source.get("content"), content, nesting + 1)
    elif source.get("type") == "base64":
        content.add_image(read_image(f"data:{source.get('media_type')};base64,{data}"))
    else:
        content.add_image(read_image(str(data)))


def _read_file(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    """Add a file: ``file`` of the chat API, or ``input_file`` of the Responses API. Its pages are not counted."""
    nested = part.get("file")
    given = nested if isinstance(nested, dict) else part
    data = given.get("file_data") or given.get("file_url") or given.get("file_id") or ""
    content.add_image(read_image(str(data)))


def _read_audio(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    given = part.get("input_audio") or part.get("audio_url") or {}
    given = given if isinstance(given, dict) else {}
    data = given.get("data") or given.get("url") or ""
    content.add_audio(str(data), audio_seconds(str(data).rpartition(",")[2], given.get("format")))


def _read_video(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    given = part.get("video_url")
    content.add_audio(str(given.get("url") if isinstance(given, dict) else given), _VIDEO_S)


def _read_tool_use(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    _read_call(part, content)


def _read_tool_result(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    read_parts(part.get("content", part.get("output")), content, nesting + 1)


def _read_reasoning(part: dict[str, Any], content: PromptContent, nesting: int) -> None:
    """Add a reasoning item of the Responses API. Its encrypted content is not part of the prompt."""
    for name in ("summary", "content"):
        content.add_json(last_text(part.get(name)) or None, Part.REASONING)


def _read_call(call: Any, content: PromptContent) -> None:
    """Add a call of a tool: ``arguments`` (OpenAI) or ``input`` (Anthropic), as text or as an object."""
    if isinstance(call, dict):
        content.add_call(call.get("name"), call.get("arguments", call.get("input")))
    else:
        content.add_call(None, call)


_READERS: dict[str, Callable[[dict[str, Any], PromptContent, int], None]] = {
    "image_url": _read_image_url,
    "input_image": _read_image_url,
    "image": _read_source,
    "document": _read_source,
    "file": _read_file,
    "input_file": _read_file,
    "computer_screenshot": _read_image_url,
    "input_audio": _read_audio,
    "audio_url": _read_audio,
    "video_url": _read_video,
    "tool_use": _read_tool_use,
    "function_call": _read_tool_use,
    "custom_tool_call": _read_tool_use,
    "tool_result": _read_tool_result,
    "function_call_output": _read_tool_result,
    "custom_tool_call_output": _read_tool_result,
    "computer_call_output": _read_tool_result,
    "reasoning": _read_reasoning,
}
