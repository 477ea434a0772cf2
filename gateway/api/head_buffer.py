"""Sends the head of a response together with the first bytes of its body: one system call instead of two."""

from __future__ import annotations

import asyncio
import contextlib


class HeadBuffer:
    """The part of a transport that a response needs. It holds the first write until the next one.

    A body that follows its head in the same iteration of the event loop goes out with it. Otherwise the head goes
    alone.
    """

    __slots__ = ("_flush", "_head", "_loop", "_transport", "_written")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self._written = False
        self._flush: asyncio.Handle | None = None

    def write(self, data: bytes) -> None:
        """Send ``data``, after what is held."""
        if not self._written:
            self._written, self._head = True, data
            self._flush = self._loop.call_soon(self.flush)
        elif self._flush is not None:
            head, self._head = self._head, b""
            self._flush.cancel()
            self._flush = None
            self._transport.write(head + data)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Send what is held, and close the connection."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether the connection is closing."""
        return self._transport.is_closing()

    def flush(self) -> None:
        """Send what is held."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
            head, self._head = self._head, b""
            if not self._transport.is_closing():
                # The output has ended if the client was answered with an error meanwhile.
                with contextlib.suppress(RuntimeError):
                    self._transport.write(head)
