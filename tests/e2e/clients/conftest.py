"""One gateway for all tests of this folder, because a real vLLM takes most of a minute to start. Clients of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.fixtures.otlp_collector import StandInCollector, collecting
from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import KEY, serve_tools

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="package")
def collector() -> Iterator[StandInCollector]:
    with collecting() as stand_in:
        yield stand_in


@pytest.fixture(scope="package")
def started() -> Iterator[list[Served]]:
    """The gateways of this folder that were started. Only the last one may run."""
    gateways: list[Served] = []
    yield gateways
    for gateway in gateways:
        gateway.stop()


@pytest.fixture(scope="module")
def served(started: list[Served], tmp_path_factory: pytest.TempPathFactory, collector: StandInCollector) -> Served:
    """The gateway of all modules. If a module has stopped it, the next one starts another."""
    if not started or started[-1].process.poll() is not None:
        started.append(serve_tools(tmp_path_factory.mktemp("clients"), collector.url))
    return started[-1]


@pytest.fixture(autouse=True)
def outside_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test whose SDK looks up or connects to another host."""
    calls: list[object] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def local_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            calls.append(address)
            raise OSError(f"a test must not connect to {address}")
        connect(self, address)

    def local_look_up(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in LOOPBACK:
            calls.append(host)
            raise OSError(f"a test must not look up {host}")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket.socket, "connect", local_connect)
    monkeypatch.setattr(socket, "getaddrinfo", local_look_up)
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    yield
    assert calls == []


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key=KEY, timeout=120)


@pytest.fixture
def claude(served: Served) -> anthropic.Anthropic:
    """Sends the key as ``x-api-key``."""
    return anthropic.Anthropic(base_url=served.base, api_key=KEY, timeout=120)


@pytest.fixture
def litellm(outside_calls: None) -> Any:
    import litellm

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    return litellm
