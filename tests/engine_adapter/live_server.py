"""Real servers on free ports, and an observer that remembers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from engine_adapter.engine import OBSERVER_KEY, ASGIApp, Receive, Scope, Send


@dataclass
class Recorder:
    """A `TokenObserver` that keeps what it is told."""

    prompts: dict[str, int] = field(default_factory=dict)
    tokens: list[tuple[str, int, float]] = field(default_factory=list)
    untold: bool = False

    def on_untold(self) -> None:
        self.untold = True

    def on_prompt(self, sequence: str, tokens: int) -> None:
        self.prompts[sequence] = tokens

    def on_tokens(self, sequence: str, count: int, at: float) -> None:
        self.tokens.append((sequence, count, at))

    def count(self, sequence: str = "0") -> int:
        return sum(count for name, count, _ in self.tokens if name == sequence)


def observed(app: ASGIApp, observer: Any) -> ASGIApp:
    """``app`` as the gateway calls it: with an observer in its scope."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, OBSERVER_KEY: observer}, receive, send)

    return wrapped


@asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[str]:
    """Serve an ASGI app on a free port of 127.0.0.1; gives its base URL."""
    # The protocol is named so that asyncio sets TCP_NODELAY, without which many an answer takes 40 ms more.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", log_level="critical")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        # Not `serve()`: its ticks would cost every test 0.3 s.
        await server.startup(sockets=[listening])
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            for accepting in server.servers:
                accepting.close()
            for connection in list(server.server_state.connections):
                connection.shutdown()
            tasks = list(server.server_state.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def eventually(condition: Callable[[], Any], within_s: float = 3.0) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)
