"""Reads the events of one upstream stream, and counts their tokens."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine_adapter.engine import EngineLost, PassEvent
from engine_adapter.remote.counting.token_counter import Batch, TokenCounter
from engine_adapter.remote.response import Response
from engine_adapter.remote.sse import MAX_EVENT_BYTES, EventTooLarge, SSESplitter


class EventReader:
    """The events of a stream with their kinds, one batch per network read.

    Args:
        response: the stream, whose head has arrived.
        counter: knows when the response is complete.
        see: has ``counter`` count events that arrived together at a time (monotonic s), and returns them with their
            kinds, up to the stream's last one.
        on_read: called after each read with the number of new tokens.
        pass_event: sends an event that is known to be a token without a batch, when its bytes arrive. This is the usual
            event of a long stream, and then no task runs for it.
    """

    def __init__(
        self,
        response: Response,
        counter: TokenCounter,
        see: Callable[[list[bytes], float], Batch],
        on_read: Callable[[int], None],
        pass_event: PassEvent | None = None,
    ) -> None:
        self._response = response
        self._read = response.plain_reader()
        self._counter = counter
        self._see = see
        self._on_read = on_read
        self._splitter = SSESplitter()
        self._pass_event = pass_event
        if pass_event is not None:
            response.on_awaited_body(self._pass)

    def _pass(self, data: bytes) -> bool:
        """Send ``data`` at once if it is one event with one token; return whether it was. Called while `next` waits."""
        assert self._pass_event is not None
        counter, at = self._counter, self._response.read_at
        if self._splitter.is_one_event(data) and counter.is_plain_token(data) and self._pass_event(data, at):
            counter.see_plain_token(data, at)
            self._on_read(1)
            return True
        return False

    async def next(self) -> Batch:
        """The next events; none after the last one, although the server may keep the connection open.

        Raises `EngineLost` if the stream ends before the response is complete.
        """
        counter, splitter = self._counter, self._splitter
        while not counter.ended:
            try:
                chunk = await self._read()
                events = splitter.feed(chunk)
            except EventTooLarge:
                raise EngineLost(
                    f"{self._response.where}: an event is larger than {MAX_EVENT_BYTES >> 20} MiB"
                ) from None
            except EngineLost:
                if not counter.complete:
                    raise
                break
            if not chunk:
                return self._last()
            before = counter.total
            batch = self._see(events, self._response.read_at)
            self._on_read(counter.total - before)
            if batch:
                return batch
        return []

    def _last(self) -> Batch:
        """What follows the last blank line of a stream that has ended."""
        rest = self._splitter.take_rest()
        batch = self._see([rest], time.monotonic()) if rest else []
        if not (batch or self._counter.complete):
            raise EngineLost(f"{self._response.where}: the stream ended before the response was complete")
        return batch
