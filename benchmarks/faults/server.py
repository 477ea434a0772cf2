"""A scripted OpenAI-compatible server that answers completions after a delay, or with a fault. No model runs."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import orjson

from engine_adapter.engine import Receive, Scope, Send

FAULTS = (
    "429",
    "500",
    "502",
    "503",
    "504",
    "401",
    "403",
    "404",
    "close",
    "cut",
    "hang",
    "random",
    "random_close",
    "slow",
)
"""Number: that status. ``close``, ``cut``: the connection closes before or within the response. ``hang``: no response.
``random``, ``random_close``: a 500 or a closed connection for 30% of the requests. ``slow``: the first token takes
`SLOW_S`, and less with every request."""

RANDOM_SHARE, SLOW_S, SLOW_REQUESTS = 0.3, 2.0, 20


@dataclass
class FaultyServer:
    """An upstream server. It records the requests that it was asked to complete.

    Attributes:
        models: the models that it lists.
        fault: one of `FAULTS`; "" for none.
        token_s: seconds for each token, of ``tokens``.
        headers: further headers of an error response. ``padding``: bytes added to its message. ``delay_s``: its delay.
        healthy: whether ``/health`` says so.
        asked: the bodies of the requests, in order. ``paths``: their paths.
    """

    models: tuple[str, ...] = ("m",)
    fault: str = ""
    token_s: float = 0.002
    tokens: int = 5
    headers: tuple[tuple[bytes, bytes], ...] = ()
    padding: int = 0
    delay_s: float = 0.0
    healthy: bool = True
    seed: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._slow_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path: str = scope["path"]
        if path == "/health":
            await _json(send, 200 if self.healthy else 503, {})
        elif path == "/v1/models":
            await _json(
                send, 200, {"object": "list", "data": [{"id": model, "object": "model"} for model in self.models]}
            )
        else:
            message = await receive()
            while message.get("more_body"):
                more = await receive()
                message = {**more, "body": message["body"] + more.get("body", b"")}
            body = message.get("body", b"")
            self.asked.append(orjson.loads(body) if body[:1] == b"{" else {})
            self.paths.append(path)
            await self._answer(self.asked[-1], receive, send)

    async def _answer(self, asked: dict[str, Any], receive: Receive, send: Send) -> None:
        fault = self.fault
        if fault.startswith("random") and self._random.random() < RANDOM_SHARE:
            fault = "close" if fault == "random_close" else "500"
        if fault.isdigit():
            await asyncio.sleep(self.delay_s)
            document = {
                "error": {
                    "message": f"scripted {fault}" + "x" * self.padding,
                    "type": "scripted",
                    "param": None,
                    "code": fault,
                }
            }
            await _json(send, int(fault), document, self.headers)
        elif fault == "close":
            _transport(send).abort()
        elif fault == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
        else:
            if fault == "slow":
                await asyncio.sleep(SLOW_S * max(0.0, 1 - self._slow_requests / SLOW_REQUESTS))
                self._slow_requests += 1
            await self._complete(asked, send, cut=fault == "cut")

    async def _complete(self, asked: dict[str, Any], send: Send, cut: bool) -> None:
        model, streams = asked.get("model", "m"), bool(asked.get("stream"))
        if "messages" not in asked:
            await _json(send, 200, {"object": "other", "model": model})
            return
        kind = b"text/event-stream" if streams else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        text = ""
        for number in range(self.tokens):
            await asyncio.sleep(self.token_s)
            if cut and number == 2:
                _transport(send).abort()
                return
            text += f" {number}"
            if streams:
                await _event(send, _chunk(model, {"content": f" {number}"}))
        usage = {"prompt_tokens": 3, "completion_tokens": self.tokens, "total_tokens": 3 + self.tokens}
        if not streams:
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            whole = {"id": "c", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}
            await send({"type": "http.response.body", "body": orjson.dumps(whole)})
            return
        await _event(send, _chunk(model, {}, "stop"))
        await _event(send, {**_chunk(model, {}), "choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _chunk(model: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "model": model, "choices": [choice]}


async def _event(send: Send, document: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": b"data: %b\n\n" % orjson.dumps(document), "more_body": True})


async def _json(
    send: Send, status: int, document: dict[str, Any], headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    body = orjson.dumps(document)
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def _transport(send: Send) -> asyncio.Transport:
    """The connection of a request that uvicorn serves. ASGI itself cannot close one without a response."""
    transport: asyncio.Transport = send.__self__.transport  # type: ignore[attr-defined]
    return transport
