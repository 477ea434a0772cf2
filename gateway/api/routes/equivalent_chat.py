"""Rewrite a body of the Responses or the Messages API as the chat completion body of the same prompt.

Scheduling reads the prompt's size from it, so that each part counts as the same part of a chat does. The engine gets
the client's own body. Only the shape of what is read is checked; the engine checks everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from gateway.api.errors import bad_request
from gateway.api.request_body import too_deep

Json = dict[str, Any]


def chat_of_responses(body: Json) -> Json:
    """Return the equivalent chat of an OpenAI Responses body. Raises `ApiError` 400 that names the member.

    A stored conversation (``previous_response_id``) is not in the body, so it does not count here. Background
    responses get 400: they outlive their HTTP request, so their end could not be observed.
    """
    if body.get("background") not in (None, False):
        raise bad_request(
            "background: not supported, because the response would outlive its request. Send the request without it, "
            "and read the response as a stream.",
            "background",
            "unsupported_parameter",
        )
    messages = [*_instructions(body.get("instructions"), "instructions"), *_input_messages(body)]
    chat = _common(body, messages, "max_output_tokens")
    tools = body.get("tools")
    if isinstance(tools, list):
        chat["tools"] = [_nested_function(tool) for tool in tools]
    text = body.get("text")
    form = text.get("format") if isinstance(text, dict) else None
    if isinstance(form, dict):
        chat["response_format"] = {"type": form.get("type"), "json_schema": form}
    return chat


def chat_of_messages(body: Json) -> Json:
    """Return the equivalent chat of an Anthropic Messages body. Raises `ApiError` 400 that names the member."""
    messages = _instructions(body.get("system"), "system")
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise bad_request("messages: must be a non-empty list of messages.", "messages", "invalid_type")
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        _require_object(message, where)
        messages += _message_turns(message, where)
    chat = _common(body, messages, "max_tokens")
    tools = body.get("tools")
    if isinstance(tools, list):
        chat["tools"] = [
            {"type": "function", "function": {**tool, "parameters": tool.get("input_schema")}}
            if "name" in tool
            else tool
            for tool in tools
            if isinstance(tool, dict)
        ]
    config = body.get("output_config")
    form = config.get("format") if isinstance(config, dict) else None
    if isinstance(form, dict):
        chat["response_format"] = {"type": form.get("type"), "json_schema": form}
    return chat


def _common(body: Json, messages: list[Json], limit: str) -> Json:
    """The members that both APIs share. ``limit``: the member that limits the output length."""
    tokens = body.get(limit)
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise bad_request(f"{limit}: must be a whole number, at least 1.", limit)
    chat: Json = {"messages": messages or [{"role": "user", "content": ""}], "max_completion_tokens": tokens}
    chat.update((name, body[name]) for name in ("model", "stream") if name in body)
    return chat


def _instructions(given: Any, name: str) -> list[Json]:
    """The system message, if there is one: text, or a list of parts."""
    if given is None:
        return []
    if not isinstance(given, str | list):
        raise bad_request(f"{name}: must be a string or a list of parts.", name, "invalid_type")
    return [{"role": "system", "content": given if isinstance(given, str) else _parts(given)}]


# --- OpenAI Responses -------------------------------------------------------------------------------------------------


def _input_messages(body: Json) -> Iterator[Json]:
    given = body.get("input")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    if not isinstance(given, list):
        raise bad_request("input: must be a string or a list of items.", "input", "invalid_type")
    for index, item in enumerate(given):
        _require_object(item, f"input[{index}]")
        yield _item_message(item, f"input[{index}]")


def _item_message(item: Json, where: str) -> Json:
    """Return the chat message of one item: a message, a tool call, a tool's output, reasoning, or another item."""
    kind = item.get("type")
    if "role" in item:
        return {"role": item["role"], "content": _content(item.get("content"), f"{where}.content")}
    if kind in ("function_call", "custom_tool_call"):
        return _tool_calls([_function_call(item.get("name"), item.get("arguments", item.get("input")))])
    if kind in ("function_call_output", "custom_tool_call_output"):
        return {"role": "tool", "content": _content(item.get("output"), f"{where}.output")}
    if kind == "reasoning":
        parts = [part for name in ("content", "summary") if isinstance(item.get(name), list) for part in item[name]]
        return {"role": "assistant", "reasoning_content": _joined_text(parts)}
    # Results of built-in tools, and item types that are not known here: the model sees about their JSON.
    return {"role": "assistant", "content": _json_text(item)}


def _nested_function(tool: Any) -> Any:
    if isinstance(tool, dict) and tool.get("type") == "function" and "function" not in tool:
        return {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}
    return tool


# --- Anthropic Messages -----------------------------------------------------------------------------------------------


def _message_turns(message: Json, where: str) -> list[Json]:
    """Return the chat messages of one message: itself, and one for each tool result in it."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(content, list):
        return [{"role": role, "content": _content(content, f"{where}.content")}]
    blocks = [block for block in content if isinstance(block, dict)]
    results = [
        {"role": "tool", "content": _content(block.get("content"), f"{where}.content")}
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    turn: Json = {"role": role}
    if calls := [block for block in blocks if block.get("type") == "tool_use"]:
        turn |= _tool_calls([_function_call(call.get("name"), call.get("input")) for call in calls]) | {"role": role}
    if thoughts := [block for block in blocks if block.get("type") == "thinking"]:
        turn["reasoning_content"] = _joined_text(thoughts)
    if parts := [block for block in blocks if block.get("type") not in ("tool_result", "tool_use", "thinking")]:
        turn["content"] = _parts(parts)
    return [*results, turn] if len(turn) > 1 or not results else results


# --- both -------------------------------------------------------------------------------------------------------------


def _tool_calls(calls: list[Json]) -> Json:
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _function_call(name: Any, arguments: Any) -> Json:
    text = arguments if isinstance(arguments, str) else _json_text(arguments)
    return {"type": "function", "function": {"name": name, "arguments": text}}


def _content(given: Any, where: str) -> str | list[Json] | None:
    """Return a message's content with its parts as those of a chat."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, list):
        return _parts(given)
    raise bad_request(f"{where}: must be a string or a list of parts.", where, "invalid_type")


def _parts(given: Iterable[Any]) -> list[Json]:
    return [_part(part) for part in given if isinstance(part, dict)]


def _part(part: Json) -> Json:
    if isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") == "input_image":
        return {"type": "image_url", "image_url": {"url": part.get("image_url"), "detail": part.get("detail")}}
    source = part.get("source")
    if part.get("type") == "image" and isinstance(source, dict):
        url = source.get("url") or f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {"type": "image_url", "image_url": {"url": url}}
    return part


def _joined_text(parts: Iterable[Any]) -> str:
    texts = (part.get("text") or part.get("thinking") for part in parts if isinstance(part, dict))
    return "\n".join(text for text in texts if isinstance(text, str))


def _json_text(value: Any) -> str:
    """Return ``value`` as JSON. Raises `ApiError` 400 if it nests too deeply."""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise too_deep() from None


def _require_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise bad_request(f"{where}: must be an object.", where, "invalid_type")
