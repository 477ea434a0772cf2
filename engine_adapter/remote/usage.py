"""Reads the token counts of a response from its ``usage``, and distrusts what cannot be true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_LARGEST_COUNT = 1 << 30
"""Largest token count that is believed; above any model's context."""


@dataclass(slots=True, frozen=True)
class Usage:
    """Token counts of one response; None where the server does not state one.

    Attributes:
        prompt: prompt tokens, cached ones included.
        completion: output tokens of all sequences.
        cached: prompt tokens from the prefix cache; at most ``prompt``.
    """

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None

    @property
    def computed(self) -> int | None:
        """Prompt tokens that the server computed, that is, without prefix-cache hits."""
        return None if self.prompt is None else self.prompt - (self.cached or 0)


def completions_usage(raw: dict[str, Any]) -> Usage:
    """The usage of ``/chat/completions`` or ``/completions``."""
    return _usage(raw.get("prompt_tokens"), raw.get("completion_tokens"), raw.get("prompt_tokens_details"))


def responses_usage(raw: dict[str, Any]) -> Usage:
    """The usage of ``/responses``."""
    return _usage(raw.get("input_tokens"), raw.get("output_tokens"), raw.get("input_tokens_details"))


def messages_usage(raw: dict[str, Any]) -> Usage:
    """The usage of ``/messages``, whose ``input_tokens`` exclude what was read from or written to the cache."""
    cached = _count(raw.get("cache_read_input_tokens"))
    uncached = _count(raw.get("input_tokens"))
    if uncached is None:
        return Usage(completion=_count(raw.get("output_tokens")))
    written = _count(raw.get("cache_creation_input_tokens"))
    prompt = uncached + (cached or 0) + (written or 0)
    return Usage(prompt, _count(raw.get("output_tokens")), cached)


def _usage(prompt: Any, completion: Any, details: Any) -> Usage:
    prompt, completion = _count(prompt), _count(completion)
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    if cached is not None and (prompt is None or cached > prompt):
        cached = None
    return Usage(prompt, completion, cached)


def _count(value: Any) -> int | None:
    """``value`` if it is a possible token count. NOTE: True is an int in Python."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_COUNT:
        return value
    return None
