"""No tenant can take all of what tenants share at the HTTP edge: open requests, pass-through slots, body memory."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Any

import pytest

from gateway.api import pass_through
from gateway.api.auth import hash_key
from tests.fixtures.live_gateway import AdmitNothing, Live, chat, live
from tests.fixtures.live_server import HANG_S, eventually

EMBEDDINGS = "/v1/embeddings"
ONE_CLASS: dict[str, Any] = {"chat": {"ttft_ms": 2000, "tpot_ms": 100}}
"""A class alone gets the whole part of its tenant."""
KEYS = [{"tenant": name, "sha256": hash_key(f"sk-{name}")} for name in ("abuser", "victim")]


def ask(antares: Live, tenant: str, body: Any = None, **options: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(antares.ask(body, authorization=f"Bearer sk-{tenant}", **options))


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_open_requests_of_one_tenant_leave_room_for_another() -> None:
    async with live(keys=KEYS, classes=ONE_CLASS, server={"max_open_requests": 9}) as antares:
        queue = antares.gateway.engine_queues[0]
        policy, queue.admission.policy = queue.admission.policy, AdmitNothing()
        flood = [ask(antares, "abuser") for _ in range(12)]
        await eventually(lambda: sum(task.done() for task in flood) == 4 and antares.gateway.ledger.open_count == 8)
        refused = next(task.result() for task in flood if task.done())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "This tenant has too many open requests (server.max_open_requests)" in refused.text
        assert int(refused.headers["retry-after"]) >= 1
        exposition = antares.gateway.metrics.exposition().decode()
        assert re.search(r'reason="tenant_full".*tenant="abuser".* 4\.0', exposition) is not None
        victim = ask(antares, "victim")
        await eventually(lambda: antares.gateway.ledger.open_count == 9)
        full = await ask(antares, "victim", {"input": "hi"}, path=EMBEDDINGS)
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert "The gateway has too many open requests" in full.text
        queue.admission.policy = policy
        await cancel(*flood)
        assert (await asyncio.wait_for(victim, HANG_S)).status_code == 200
        await eventually(lambda: antares.gateway.proxy.open_requests.used == 0)


async def test_tenant_alone_may_have_all_open_requests() -> None:
    async with live(keys=[KEYS[0]], classes=ONE_CLASS, server={"max_open_requests": 9}) as antares:
        antares.gateway.engine_queues[0].admission.policy = AdmitNothing()
        requests = [ask(antares, "abuser") for _ in range(9)]
        await eventually(lambda: antares.gateway.ledger.open_count == 9)
        await cancel(*requests)
        await eventually(antares.is_idle)


async def test_half_sent_bodies_are_no_open_requests() -> None:
    async with live(keys=KEYS, server={"max_open_requests": 2}) as antares:
        host, port = antares.url.removeprefix("http://").split(":")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-abuser\r\n"
        opened = []
        for _ in range(5):
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(head + b"content-length: 500\r\n\r\n{")
            opened.append(writer)
        await eventually(lambda: antares.gateway.proxy.in_flight == 5)
        assert (await ask(antares, "victim")).status_code == 200
        for writer in opened:
            writer.transport.abort()


@pytest.mark.parametrize("victims", ["victim", "abuser"])
async def test_pass_through_calls_of_one_tenant_leave_a_slot_for_another(
    monkeypatch: pytest.MonkeyPatch, victims: str
) -> None:
    monkeypatch.setattr(pass_through, "WAIT_S", 0.3)
    calls, finish = [0], asyncio.Event()

    async def held(scope: Any, receive: Any, send: Any) -> None:
        calls[0] += 1
        await finish.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async with live(keys=KEYS, server={"max_pass_through": 4}) as antares:
        antares.engine.stub = held
        flood = [ask(antares, "abuser", {"input": "hi"}, path=EMBEDDINGS) for _ in range(8)]
        await eventually(lambda: calls[0] == 3)
        other = ask(antares, victims, {"input": "hi"}, path=EMBEDDINGS)
        if victims == "victim":
            await eventually(lambda: calls[0] == 4)
            finish.set()
            assert (await other).status_code == 200
        else:
            refused = await other
            assert (refused.status_code, calls[0]) == (429, 3)
            assert "too many calls of this tenant that are not scheduled (server.max_pass_through)" in refused.text
            finish.set()
        await asyncio.gather(*flood)


async def test_reload_changes_the_pass_through_limit_of_calls_that_wait(antares: Live) -> None:
    finish, passing = asyncio.Event(), antares.gateway.proxy._passing

    async def held(scope: Any, receive: Any, send: Any) -> None:
        await finish.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    antares.engine.stub = held
    passing.set_limits(1, 30.0)
    calls = [asyncio.create_task(antares.ask({"input": "hi"}, EMBEDDINGS)) for _ in range(3)]
    await eventually(lambda: antares.gateway.proxy.in_flight == 3 and passing._slots["simulated"].used == 1)
    passing.set_limits(3, 30.0)
    await eventually(lambda: passing._slots["simulated"].used == 3)
    finish.set()
    assert [(await call).status_code for call in calls] == [200] * 3


async def stalled(antares: Live, tenant: str) -> asyncio.StreamWriter:
    """Ask for a large response and read nothing of it."""
    host, port = antares.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
    _, writer = await asyncio.open_connection(sock=client)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    key = f"authorization: Bearer sk-{tenant}"
    writer.write(f"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: x\r\n{key}\r\n\r\n".encode())
    return writer


async def test_buffered_responses_of_the_tenant_with_most_are_cut_first() -> None:
    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (6 << 20)})

    limits = {"response_memory_bytes": 12 << 20, "stall_s": 60.0}
    async with live(keys=KEYS, limits=limits) as antares:
        antares.engine.stub = large
        connections = antares.gateway.connections
        opened = [await stalled(antares, "victim")]
        # It is behind for longest.
        await eventually(lambda: connections.buffered > 1 << 20)
        opened += [await stalled(antares, "abuser") for _ in range(8)]
        await eventually(lambda: len(connections) <= 4 and 0 < connections.buffered <= 12 << 20)
        assert "victim" in {connection.sharer.name for connection in connections._open}
        for writer in opened:
            writer.transport.abort()


async def test_large_bodies_of_one_tenant_leave_memory_for_another() -> None:
    limits = {"body_memory_bytes": 9 << 20}
    async with live(keys=KEYS, limits=limits) as antares:
        queue = antares.gateway.engine_queues[0]
        policy, queue.admission.policy = queue.admission.policy, AdmitNothing()
        body = chat("hi", unused="x" * (1 << 20))
        flood = [ask(antares, "abuser", body) for _ in range(12)]
        await eventually(lambda: antares.gateway.ledger.open_count >= 7)
        await asyncio.sleep(0.2)
        assert antares.gateway.ledger.open_count < 9
        victim = ask(antares, "victim", body)
        await eventually(lambda: any(request.tenant == "victim" for request in queue.waiting))
        queue.admission.policy = policy
        await cancel(*flood)
        assert (await asyncio.wait_for(victim, HANG_S)).status_code == 200
        await eventually(lambda: antares.gateway.proxy.bodies.used == 0)
