"""The head of a response goes out with the first bytes of its body."""

from __future__ import annotations

import asyncio

from gateway.api.head_buffer import HeadBuffer


class RecordingTransport(asyncio.Transport):
    """A scripted transport that records what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bytes | str] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if "eof" in self.calls:
            raise RuntimeError("Cannot call write() after write_eof()")
        self.calls.append(bytes(data))

    def write_eof(self) -> None:
        self.calls.append("eof")

    def close(self) -> None:
        self.calls.append("close")

    def is_closing(self) -> bool:
        return "close" in self.calls


def buffer() -> tuple[HeadBuffer, RecordingTransport]:
    transport = RecordingTransport()
    return HeadBuffer(transport, asyncio.get_running_loop()), transport


async def test_head_and_first_bytes_are_one_write() -> None:
    head, transport = buffer()
    head.write(b"head ")
    assert transport.calls == []
    head.write(b"body ")
    head.write(b"end")
    await asyncio.sleep(0)
    assert transport.calls == [b"head body ", b"end"]


async def test_head_of_a_slow_body_is_sent_alone() -> None:
    head, transport = buffer()
    head.write(b"head")
    await asyncio.sleep(0)
    assert transport.calls == [b"head"]
    head.write(b"body")
    assert transport.calls == [b"head", b"body"]


async def test_close_and_flush_send_what_is_held() -> None:
    head, transport = buffer()
    head.write(b"head")
    head.flush()
    head.flush()
    assert transport.calls == [b"head"]
    head, transport = buffer()
    head.write(b"head")
    head.close()
    await asyncio.sleep(0)
    assert transport.calls == [b"head", "close"]


async def test_nothing_is_sent_on_a_closed_connection() -> None:
    head, transport = buffer()
    head.write(b"head")
    transport.close()
    await asyncio.sleep(0)
    assert transport.calls == ["close"]


async def test_head_that_is_held_when_the_output_ends_is_dropped() -> None:
    head, transport = buffer()
    head.write(b"head")
    transport.write_eof()
    head.flush()
    assert transport.calls == ["eof"]
