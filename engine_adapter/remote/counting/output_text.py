"""Finds the generated text in events and documents."""

from __future__ import annotations

from typing import Any

from engine_adapter.remote.counting.token_counter import Json


def shows_output(choice: Json) -> bool:
    """Whether a chunk's choice has generated output: text, reasoning, a tool call or a refusal."""
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(value and key != "role" for key, value in delta.items())


def output_text(choice: Json) -> str:
    """The generated text of a choice of a chunk or of a document."""
    message = choice.get("delta") or choice.get("message")
    if not isinstance(message, dict):
        return str(choice.get("text") or "")
    return "".join(strings([value for key, value in message.items() if key != "role"]))


_NOT_GENERATED = frozenset(
    ("id", "type", "index", "role", "status", "object", "call_id", "signature", "encrypted_content")
)


def strings(items: list[Any]) -> list[str]:
    """All strings in JSON values, except the members that a server adds to the generated text."""
    found: list[str] = []
    pending = list(items)
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += [value for key, value in item.items() if key not in _NOT_GENERATED]
    return found
