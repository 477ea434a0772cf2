"""Bodies and disconnects at the ASGI boundary."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine_adapter.asgi import (
    BODY_KEY,
    BodyTooDeep,
    ClientDisconnected,
    DisconnectWatch,
    JsonBody,
    encode_json,
    read_body,
    read_document_or_body,
    run_until_disconnect,
)
from engine_adapter.engine import Receive
from engine_adapter.remote.request import CompletionPlan

DISCONNECT = {"type": "http.disconnect"}


def chunk(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def messages(*given: dict[str, Any]) -> Receive:
    """Return a ``receive`` that delivers ``given`` and then blocks."""
    pending = list(given)

    async def receive() -> dict[str, Any]:
        if not pending:
            await asyncio.Event().wait()
        return pending.pop(0)

    return receive


async def test_read_body_joins_chunks() -> None:
    assert await read_body(messages(chunk(b"a", more=True), chunk(b"b"))) == b"ab"


async def test_read_body_raises_when_the_client_disconnects() -> None:
    with pytest.raises(ClientDisconnected):
        await read_body(messages(chunk(b"a", more=True), DISCONNECT))


async def test_document_in_the_scope_replaces_the_body() -> None:
    client = DisconnectWatch(messages(DISCONNECT))
    body = JsonBody({"a": 1})
    receive = client.receive_for(body)
    assert await read_document_or_body({BODY_KEY: body}, receive) == ({"a": 1}, b"")
    assert await receive() == DISCONNECT


async def test_app_without_the_scope_key_reads_the_encoded_document() -> None:
    client = DisconnectWatch(messages(DISCONNECT))
    receive = client.receive_for(JsonBody({"a": 1}))
    assert await read_document_or_body({}, receive) == (None, b'{"a":1}')
    assert await receive() == DISCONNECT


def test_encode_json_rejects_deep_documents() -> None:
    document: dict[str, Any] = {}
    for _ in range(300):
        document = {"a": document}
    with pytest.raises(BodyTooDeep):
        encode_json(document)


@pytest.mark.parametrize("send_slo", [False, True])
def test_completion_plan_leaves_the_document_unchanged(send_slo: bool) -> None:
    document = {"messages": [], "vllm_xargs": {"antares_gate": "slack"}}
    plan = CompletionPlan.make(document, rewrite=True, ask_usage=True, send_slo=send_slo)
    assert plan.gives_up(400, b"unknown field stream_options")
    assert plan.body["stream"] is True
    assert document == {"messages": [], "vllm_xargs": {"antares_gate": "slack"}}


async def test_run_until_disconnect_cancels_the_work_and_waits_for_it() -> None:
    cleaned_up = False

    async def work() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned_up = True

    await run_until_disconnect(work(), messages(DISCONNECT))
    assert cleaned_up


async def test_run_until_disconnect_raises_what_the_work_raises() -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_until_disconnect(work(), messages())
