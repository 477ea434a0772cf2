"""An `HttpEngine` in front of a server that says what the test wants, both over real sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
from live_server import Recorder, observed, serve

from engine_adapter.engine import ASGIApp, EngineEvents, Receive, Scope, Send
from engine_adapter.http_engine import HttpEngine

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "simulated", "messages": [{"role": "user", "content": "tell me something"}], **fields}


@dataclass
class Scripted:
    """An upstream that answers what the test says and remembers what it was asked."""

    answer: Callable[[dict[str, Any]], tuple[int, bytes, bytes]]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[bytes, bytes]] = field(default_factory=list)
    lines: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    targets: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = (await receive())["body"]
        target = scope["raw_path"] + b"?" + scope["query_string"]
        if target in (b"/health?", b"/v1/models?"):
            status, kind, data = 200, b"text/plain", b""
        else:
            self.bodies.append(orjson.loads(raw) if raw[:1] == b"{" else {})
            self.headers.append(dict(scope["headers"]))
            self.lines.append(sorted((name, value) for name, value in scope["headers"] if name != b"host"))
            self.targets.append(target)
            status, kind, data = self.answer(self.bodies[-1])
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": data})


def events(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps({"id": "1", **c}) for c in chunks) + b"data: [DONE]\n\n"


@asynccontextmanager
async def proxied(app: ASGIApp, observer: Recorder | None = None, **options: Any) -> AsyncIterator[Any]:
    """An `HttpEngine` in front of ``app`` and a client of it, both over real sockets; gives (engine, client)."""
    async with serve(app) as upstream:
        engine = HttpEngine("remote", upstream, **options)
        await engine.start(EngineEvents())
        async with (
            serve(observed(engine.app, observer or Recorder())) as url,
            httpx.AsyncClient(base_url=url, verify=False) as client,
        ):
            yield engine, client
        await engine.stop()
