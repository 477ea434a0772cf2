"""A real gateway over a simulated engine on a free port, and small words to talk about it."""

from __future__ import annotations

import asyncio
import json
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx
import uvicorn

from engine_adapter.engine import ASGIApp
from engine_adapter.simulated import SimulatedEngine
from engine_adapter.step_time import StepTimes
from gateway.app import Gateway
from gateway.config import GatewayConfig, parse
from gateway.ledger import OUTCOMES

FAST = StepTimes(b=1e-6, d=1e-3, alpha=1e-6)
"""A step takes a millisecond."""

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"

CLASSES: dict[str, Any] = {
    "chat": {"ttft_ms": 5000, "tpot_ms": 1000},
    "tight": {"ttft_ms": 500, "tpot_ms": 50},
    "free": {},
    "batch": {"ttft_ms": 5000, "tpot_ms": 1000, "on_unattainable": "best_effort"},
}


def gateway_config(**changes: Any) -> GatewayConfig:
    """A configuration as from a file, with whole sections replaced by ``changes``."""
    document: dict[str, Any] = {
        "engines": [{"kind": "simulated"}],
        "predictor": {"enabled": False, "expected_tokens": 8},
        "classes": CLASSES,
        "default_class": "chat",
    }
    return parse({**document, **changes})


def fast_engine(**changes: Any) -> SimulatedEngine:
    return SimulatedEngine(**{"times": FAST, "output_tokens": 8, "restart_s": 0.3, **changes})


def chat(text: str = "tell me a story", **fields: Any) -> dict[str, Any]:
    return {"model": "simulated", "messages": [{"role": "user", "content": text}], **fields}


@dataclass
class Live:
    """A gateway that serves at ``url``; ``http`` talks to it."""

    gateway: Gateway
    engine: SimulatedEngine
    url: str
    http: httpx.AsyncClient

    async def ask(self, body: Any = None, path: str = CHAT, **headers: str) -> httpx.Response:
        """POST ``body`` (a plain chat by default); ``x_slo_class="a"`` becomes the header ``x-slo-class: a``."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.http.post(path, json=chat() if body is None else body, headers=named)
        # The last byte arrives a turn or two of the loop, which both ends share, before the ledger entry closes.
        for _ in range(5):
            await asyncio.sleep(0)
        return answer

    async def hang_up_after(self, events: int, text: str = "a story") -> None:
        """Open a stream that would take long, and leave after so many lines."""
        body = chat(text, stream=True, max_tokens=4000, ignore_eos=True)
        async with self.http.stream("POST", CHAT, json=body) as response:
            lines = response.aiter_lines()
            for _ in range(events):
                await anext(lines)

    @property
    def outcomes(self) -> dict[str, int]:
        return {outcome: self.gateway.ledger.closed[outcome] for outcome in OUTCOMES}

    def is_idle(self) -> bool:
        """The ledger balances, no lane holds anything, the engine is empty."""
        lanes_empty = all(not lane.running and not lane.waiting for lane in self.gateway.lanes)
        engine_empty = self.engine.state.engine_running == self.engine.state.engine_waiting == 0
        return self.gateway.ledger.open_count == 0 and lanes_empty and engine_empty


class Load(ABC):
    """A request (`ask`) every ten milliseconds for as long as the block lasts."""

    _stop = False

    @abstractmethod
    async def ask(self) -> None:
        """Send one, and note how it ended."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stop = True
        await self._task

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while not self._stop:
                group.create_task(self.ask())
                await asyncio.sleep(0.01)


@asynccontextmanager
async def live(
    engine: SimulatedEngine | None = None, predictor_url: str | None = None, **config: Any
) -> AsyncIterator[Live]:
    """Serve a gateway; ``config`` as in `gateway_config`."""
    engine = engine or fast_engine()
    gateway = Gateway(gateway_config(**config), [engine], predictor_url)
    await engine.start(_events(gateway))
    try:
        async with (
            serving(gateway) as url,
            httpx.AsyncClient(base_url=url, timeout=10, trust_env=False, verify=False) as http,
        ):
            yield Live(gateway, engine, url, http)
    finally:
        await gateway.stop()


def _events(gateway: Gateway) -> Any:
    # As `Gateway.start`, without waiting for a predictor that a test may have broken on purpose.
    from engine_adapter.engine import EngineEvents

    lane = gateway.lanes[0]
    return EngineEvents(on_step=lane.wake, on_alive=lane.on_alive)


@asynccontextmanager
async def serving(app: ASGIApp | Any) -> AsyncIterator[str]:
    """Serve an ASGI app on a free port of 127.0.0.1; gives its base URL."""
    # The protocol is named so that asyncio sets TCP_NODELAY, as `gateway.serve` does.
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


async def eventually(condition: Callable[[], Any], within_s: float = 2.0) -> None:
    """Wait until ``condition()`` holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


def events(stream: str) -> list[Any]:
    """The JSON objects of a finished event stream, without ``[DONE]``."""
    data = [line.removeprefix("data: ") for line in stream.split("\n") if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"]
