"""Which engine created a stored response. Only that engine can retrieve, continue or cancel it."""

from __future__ import annotations

import re
from collections.abc import Callable

from engine_adapter.engine import Message, Send

RESPONSES_PATH = "/v1/responses"

_ID = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9_-]{1,120})"')
_SEARCHED_BYTES = 16 << 10
"""Bytes of a response's first part in which its id is searched. It is among the first members."""


def response_id_in_path(path: str) -> str:
    """Return the id in ``/v1/responses/{id}`` or below it; "" for any other path."""
    if not path.startswith(RESPONSES_PATH + "/resp_"):
        return ""
    return path[len(RESPONSES_PATH) + 1 :].partition("/")[0]


def noting_id(send: Send, note: Callable[[str], None]) -> Send:
    """Return a ``send`` that calls ``note`` with the id of the response that passes through it."""
    searching = True

    async def send_and_note(message: Message) -> None:
        nonlocal searching
        if searching and message.get("body"):
            searching = False
            found = _ID.search(message["body"], 0, _SEARCHED_BYTES)
            if found is not None:
                note(found.group(1).decode())
        await send(message)

    return send_and_note
