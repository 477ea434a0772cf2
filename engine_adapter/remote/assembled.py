"""Reads the stream of a completion to its end, counts its tokens, and returns the response without streaming."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import repeat

import orjson

from engine_adapter.remote.assemble import Assembler
from engine_adapter.remote.client_request import BadUpstreamError
from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.token_counter import Batch, EventKind, Json
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
    assembler = Assembler()

    def see(events: list[bytes], at: float) -> Batch:
        batch: Batch = []
        while len(batch) < len(events) and not counter.ended:
            texts = counter.see_texts(events, at, len(batch))
            if texts:
                same = events[len(batch) : len(batch) + len(texts)]
                assembler.add_texts(counter.texts.place, texts, sum(map(len, same)))
                batch += zip(repeat(EventKind.TOKEN), same, strict=False)
            else:
                event = events[len(batch)]
                parsed = ParsedEvent.of(event)
                batch.append((counter.see_parsed(parsed, at), event))
                assembler.add(parsed)
        return batch

    def take_event(event: bytes, at: float) -> bool:
        text = counter.texts.text_of(event)
        if text is None:
            return False
        assembler.add_texts(counter.texts.place, [text], len(event))
        return True

    reader = EventReader(response, counter, see, on_read, take_event)
    try:
        while await reader.next():
            pass
        status, body = assembler.response()
        return status, _encoded(body)
    except UnreadableStream as error:
        raise BadUpstreamError(f"sent a stream that cannot be assembled: {error}") from error
    except orjson.JSONEncodeError as error:
        raise BadUpstreamError("sent a stream that cannot be assembled: it nests too deeply") from error


def _encoded(body: Json) -> bytes:
    """Return ``body`` as JSON. Raises `orjson.JSONEncodeError` if it nests too deeply."""
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        if "surrogates" not in str(error):
            raise
        # Half of a surrogate pair: UTF-8 cannot hold it, and JSON can escape it.
        return json.dumps(body, separators=(",", ":")).encode()
