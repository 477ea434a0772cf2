"""The counter of each route that generates tokens."""

from __future__ import annotations

from engine_adapter.remote.counting.completions import BatchCounter, CompletionCounter
from engine_adapter.remote.counting.messages import MessagesCounter
from engine_adapter.remote.counting.responses import ResponsesCounter
from engine_adapter.remote.counting.token_counter import TokenCounter

_COUNTERS: tuple[tuple[str, type[TokenCounter]], ...] = (
    ("/completions", CompletionCounter),
    ("/chat/completions/batch", BatchCounter),
    ("/v1/responses", ResponsesCounter),
    ("/v1/messages", MessagesCounter),
)


def counter_for(path: str) -> type[TokenCounter] | None:
    """The counter for a route that generates tokens; None for any other route."""
    for suffix, counter in _COUNTERS:
        if path.endswith(suffix):
            return counter
    return None
