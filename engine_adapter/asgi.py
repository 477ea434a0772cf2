"""What every engine's ASGI app does with ``receive``: read the body, then notice that the client left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine

from engine_adapter.engine import Receive


class ClientGone(Exception):  # noqa: N818 - it names what happened, as an event does
    """The client disconnected before its request was complete."""


async def read_body(receive: Receive) -> bytes:
    """The whole request body. Raises `ClientGone` if the client leaves first."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def run_until_disconnect(work: Coroutine[object, object, None], receive: Receive) -> None:
    """Run ``work``; when the client leaves or the caller is cancelled, cancel it and wait for its clean-up.

    Raises what ``work`` raises. A client's leaving is not an error: this returns. Call it once the body has
    been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
        elif watching.exception() is not None:
            await watching
    finally:
        unfinished = [task for task in (working, watching) if not task.done()]
        for task in unfinished:
            task.cancel()
        for task in unfinished:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
