"""The request side of ASGI: read a body, pass it on to an engine's app, and notice that the client disconnected.

The gateway and the engines' apps share this module, so that bodies are read and disconnects are watched in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import orjson

from engine_adapter.engine import Message, Receive, Scope

BODY_KEY = "antares.body"
"""ASGI scope key under which the gateway passes a request's `JsonBody` to the engine's app."""


class ClientDisconnected(Exception):  # noqa: N818 - it names an event, not an error
    """The client disconnected before its request was complete, or before it received the whole response."""


class BodyTooDeep(Exception):  # noqa: N818 - as above
    """The document nests deeper than the JSON encoder supports (254 levels). The parser accepts up to 1,024."""


async def receive_chunk(receive: Receive) -> tuple[bytes, bool]:
    """Return the next chunk of the request body, and whether it is the last. Raises `ClientDisconnected`."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnected
    return message.get("body", b""), not message.get("more_body", False)


async def read_body(receive: Receive) -> bytes:
    """Return the whole request body. Raises `ClientDisconnected`."""
    chunks: list[bytes] = []
    complete = False
    while not complete:
        chunk, complete = await receive_chunk(receive)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def encode_json(document: dict[str, Any]) -> bytes:
    """Return ``document`` as JSON. Raises `BodyTooDeep`."""
    try:
        return orjson.dumps(document)
    except orjson.JSONEncodeError as error:
        raise BodyTooDeep from error


@dataclass(slots=True, eq=False)
class JsonBody:
    """A parsed request body that is encoded only when the engine's app reads it from ``receive``.

    An app that knows `BODY_KEY` calls `take_document` instead; ``receive`` then delivers no body. So a body is parsed
    once and encoded once on its way to an engine, whichever engine that is.

    INVARIANT: an app never changes the document. The gateway sends it to another engine if this one is unreachable. An
    app that needs changes makes a copy of every dict that it changes.
    """

    document: dict[str, Any]
    taken: bool = False

    def take_document(self) -> dict[str, Any]:
        """Return the document, and leave nothing for ``receive`` to deliver."""
        self.taken = True
        return self.document

    def encoded(self) -> bytes:
        """Return the document as JSON. Raises `BodyTooDeep`."""
        return encode_json(self.document)


async def read_document_or_body(scope: Scope, receive: Receive) -> tuple[dict[str, Any] | None, bytes]:
    """Return (the document in ``scope``, b""), or (None, the body's bytes) if the caller did not parse the body.

    Raises `ClientDisconnected`.
    """
    body: JsonBody | None = scope.get(BODY_KEY)
    if body is not None:
        return body.take_document(), b""
    return None, await read_body(receive)


class DisconnectWatch:
    """Watches whether the client disconnects after its request body was read.

    Args:
        receive: tells of the disconnect, if ``disconnected`` does not.
        disconnected: the server's future for that, which saves a task.

    ``disconnected``: a future that is done when the client is gone or has its whole response.
    """

    def __init__(self, receive: Receive, disconnected: asyncio.Future[None] | None = None) -> None:
        self._watching: asyncio.Task[None] | None = None
        if disconnected is None:
            disconnected = self._watching = asyncio.create_task(_wait_for_disconnect(receive))
        self.disconnected: asyncio.Future[None] = disconnected

    def receive_for(self, body: bytes | JsonBody) -> Receive:
        """Return a ``receive`` for an engine's app: ``body`` once, then ``http.disconnect`` when the client leaves."""
        pending = [body]

        async def receive() -> Message:
            if pending:
                content = pending.pop()
                if isinstance(content, bytes):
                    return {"type": "http.request", "body": content, "more_body": False}
                if not content.taken:
                    return {"type": "http.request", "body": content.encoded(), "more_body": False}
            await asyncio.wait({self.disconnected})
            return {"type": "http.disconnect"}

        return receive

    def close(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()


async def run_until_disconnect(work: Coroutine[object, object, None], receive: Receive) -> None:
    """Run ``work``. If the client disconnects or the caller is cancelled, cancel it and wait for its clean-up.

    Raises what ``work`` raises. Returns normally if the client disconnects. Call it after the body has been read.
    """
    client = DisconnectWatch(receive)
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait((working, client.disconnected), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
        elif client.disconnected.exception() is not None:
            await client.disconnected
    finally:
        await cancel_and_wait(working, client.disconnected)


async def cancel_and_wait(*tasks: asyncio.Future[None]) -> None:
    """Cancel the tasks that still run and wait for their clean-up. What they raise meanwhile is dropped."""
    unfinished = [task for task in tasks if not task.done()]
    for task in unfinished:
        task.cancel()
    for task in unfinished:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
