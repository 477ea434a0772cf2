"""A scripted upstream: an OpenAI chat server whose answers cost much less CPU time than any gateway.

It parses HTTP with httptools and writes prepared bytes. The prompt says how fast the stream is (`prompt`): the first
token leaves at once, the next ones every ``pace_ms``. With a pace of zero all of them leave in one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import httptools
import orjson
import uvloop

MODEL = "scripted"
_MODELS = orjson.dumps({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "scripted"}]})
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


_SIZES = [16 + 37 * number % 128 for number in range(128)]
"""Prompt sizes in words. They differ, as those of real traffic do: a gateway may learn from them."""

_WORDS = [" ".join(f"word{(place + 1) * size % 997}" for place in range(size - 2)) for size in _SIZES]


def prompt(pace_ms: float, number: int) -> str:
    """Return a prompt for which the upstream sends a token every ``pace_ms`` (ms). ``number`` makes it unique."""
    return f"{pace_ms} {number} {_WORDS[number % len(_WORDS)]}"


def _event(choice: dict[str, Any] | None, usage: dict[str, int] | None = None) -> bytes:
    """Return one SSE event as a chunk of a chunked body."""
    body: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    body["choices"] = [] if choice is None else [{"index": 0, "logprobs": None, "finish_reason": None, **choice}]
    if usage is not None:
        body["usage"] = usage
    return _chunk(b"data: " + orjson.dumps(body) + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _usage(words: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": words, "completion_tokens": tokens, "total_tokens": words + tokens}


_ROLE = _event({"delta": {"role": "assistant", "content": ""}})
_TOKEN = _event({"delta": {"content": " token"}})
_FINISH = _event({"delta": {}, "finish_reason": "length"})
_DONE = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def _stream_end(words: int, tokens: int, with_usage: bool) -> bytes:
    return _FINISH + (_event(None, _usage(words, tokens)) if with_usage else b"") + _DONE


def _plain(body: bytes, kind: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (status, kind, len(body), body)


def _whole_answer(words: int, tokens: int) -> bytes:
    message = {"role": "assistant", "content": " token" * tokens}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": MODEL}
    return _plain(orjson.dumps({**head, "choices": [choice], "usage": _usage(words, tokens)}))


class Upstream(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._body = bytearray()
        self._url = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # NOTE: uvloop's transports are no subclass of `asyncio.Transport`.
        self._transport = cast(asyncio.Transport, transport)
        self._write: Callable[[bytes], None] = self._transport.write

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the stream."""
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse a part of a request."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        """Keep a part of the target."""
        self._url += url

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer the request."""
        url, body = self._url.partition(b"?")[0], bytes(self._body)
        self._url = b""
        self._body.clear()
        if url.endswith(b"/chat/completions"):
            self._answer(orjson.loads(body))
        elif url == b"/v1/models":
            self._write(_plain(_MODELS))
        elif url == b"/metrics":
            self._write(_plain(b"", b"text/plain"))
        elif url in (b"/health", b"/version", b"/get_server_info", b"/get_model_info"):
            self._write(_plain(b"{}"))
        else:
            self._write(_plain(b"{}", status=b"404 Not Found"))

    def _answer(self, body: dict[str, Any]) -> None:
        tokens = int(body["max_tokens"])
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[0]["text"]
        words = text.count(" ") + 1
        if not body.get("stream"):
            self._write(_whole_answer(words, tokens))
            return
        pace_s = float(text.partition(" ")[0]) / 1e3
        end = _stream_end(words, tokens, bool((body.get("stream_options") or {}).get("include_usage")))
        if pace_s == 0 or tokens == 1:
            self._write(_STREAM_HEAD + _ROLE + _TOKEN * tokens + end)
            return
        self._write(_STREAM_HEAD + _ROLE + _TOKEN)
        self._next(tokens - 1, self._loop.time() + pace_s, pace_s, end)

    def _next(self, left: int, at: float, pace_s: float, end: bytes) -> None:
        """Schedule the next token for loop time ``at`` (s). A late token does not delay the ones after it."""
        self._timer = self._loop.call_at(at, self._token, left, at, pace_s, end)

    def _token(self, left: int, at: float, pace_s: float, end: bytes) -> None:
        if left == 1:
            self._timer = None
            self._write(_TOKEN + end)
        else:
            self._write(_TOKEN)
            self._next(left - 1, at + pace_s, pace_s, end)


async def serve(port: int) -> None:
    """Serve on 127.0.0.1 until the process is stopped."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


def run(port: int) -> None:
    """Serve with uvloop until the process is stopped."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(port))
