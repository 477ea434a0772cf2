"""The gateway of the isolation study over HTTP: simulated engine, two tenants, tight limits. Serves until stdin closes.

    python -m benchmarks.isolation.http_gateway '{"stall_s": 5}'

The argument changes members of ``limits``. Prints the port. No model runs.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from typing import Any

import uvicorn

from engine_adapter.asgi import read_body
from engine_adapter.engine import ASGIApp, Receive, Scope, Send
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.api.auth import hash_key
from gateway.api.connections import raise_descriptor_limit
from gateway.api.http_protocol import HttpProtocol
from gateway.app import Gateway
from gateway.config.schema import parse
from gateway.listening import listen

VICTIM_KEY, ABUSER_KEY = "sk-victim", "sk-abuser"
STEP_TIMES, SLOTS, EMBEDDING_S = StepTimes(b=1e-4, d=0.015, alpha=1e-5), 64, 0.5
"""The engine: its step times (s), sequences in a batch, and seconds of a call to ``/v1/embeddings``."""

CONFIG: dict[str, Any] = {
    "engines": [{"kind": "simulated"}],
    "predictor": {"enabled": False, "expected_tokens": 60},
    "classes": {"chat": {"ttft_ms": 1000, "tpot_ms": 100}, "free": {}},
    "default_class": "chat",
    "server": {"max_open_requests": 1024, "max_pass_through": 32},
    "limits": {
        "max_connections": 1000,
        "body_memory_bytes": 64 << 20,
        "head_timeout_s": 5.0,
        "stall_s": 10.0,
    },
    "keys": [
        {"tenant": tenant, "sha256": hash_key(key)} for tenant, key in (("victim", VICTIM_KEY), ("abuser", ABUSER_KEY))
    ],
}


_EMBEDDING = b'{"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [%b]}]}'


class EmbeddingEngine(SimulatedEngine):
    """A simulated engine that also answers ``/v1/embeddings``, each call after `EMBEDDING_S`, with zeros."""

    @property
    def app(self) -> ASGIApp:
        """The routes of the simulated engine, and that one."""
        return self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/v1/embeddings":
            await super().app(scope, receive, send)
            return
        dimensions = json.loads(await read_body(receive)).get("dimensions", 1)
        await asyncio.sleep(EMBEDDING_S)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": _EMBEDDING % (b"0.0" + b",0.0" * (dimensions - 1))})


def engine() -> EmbeddingEngine:
    """Return the engine of the study."""
    return EmbeddingEngine(times=STEP_TIMES, max_num_seqs=SLOTS)


async def main(limits: dict[str, float]) -> None:
    """Serve until stdin closes, with changed ``limits``."""
    raise_descriptor_limit()
    listener = listen("127.0.0.1", 0)
    gateway = Gateway(parse({**CONFIG, "limits": {**CONFIG["limits"], **limits}}), [engine()])
    await gateway.start()
    protocol: Any = partial(HttpProtocol, gateway.connections)
    config = uvicorn.Config(
        gateway, http=protocol, ws="none", lifespan="off", log_level="critical", backlog=2048,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    print(listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.should_exit = True
    await serving
    await gateway.stop()


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}))
