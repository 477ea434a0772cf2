"""Reads the stream of a completion to its end, counts its tokens, and returns the response without streaming."""

from __future__ import annotations

from collections.abc import Callable

import orjson

from engine_adapter.remote.assemble import Assembler
from engine_adapter.remote.client_request import BadUpstreamError
from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import EventKind
from engine_adapter.remote.events import EventReader
from engine_adapter.remote.response import Response
from engine_adapter.remote.sse import ParsedEvent
from engine_adapter.remote.tool_calls import UnreadableStream


async def assembled(
    response: Response, counter: CompletionCounter, on_read: Callable[[int], None]
) -> tuple[int, bytes]:
    """Return the status and the JSON body of the response whose stream is ``response``.

    ``on_read``: called after each read with the number of new tokens. Raises `BadUpstreamError` and `EngineLost`.
    """
    assembler, token = Assembler(), EventKind.TOKEN

    def see(event: bytes, at: float) -> EventKind:
        text = counter.see_text(event, at)
        if text is not None:
            assembler.add_text(counter.texts.place, text, len(event))
            return token
        parsed = ParsedEvent.of(event)
        kind = counter.see_parsed(parsed, at)
        assembler.add(parsed)
        return kind

    reader = EventReader(response, counter, see, on_read)
    try:
        while await reader.next():
            pass
        status, body = assembler.response()
        return status, orjson.dumps(body)
    except UnreadableStream as error:
        raise BadUpstreamError(f"sent a stream that cannot be assembled: {error}") from error
    except orjson.JSONEncodeError as error:
        raise BadUpstreamError("sent a stream that cannot be assembled: it nests too deeply") from error
