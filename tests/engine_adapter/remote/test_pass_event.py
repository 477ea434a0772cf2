"""Events that are passed on when their bytes arrive: none is lost, repeated or overtaken, and each is counted."""

from __future__ import annotations

import asyncio
import zlib
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine_adapter.engine import PassEvent
from engine_adapter.remote.assembled import assembled
from engine_adapter.remote.client_request import BadUpstreamError
from engine_adapter.remote.connection import Connection
from engine_adapter.remote.counting.completions import CompletionCounter
from engine_adapter.remote.counting.messages import MessagesCounter
from engine_adapter.remote.counting.responses import ResponsesCounter
from engine_adapter.remote.counting.token_counter import TokenCounter
from engine_adapter.remote.events import EventReader
from engine_adapter.remote.response import Response
from tests.fixtures.live_server import Recorder
from tests.fixtures.scripted_server import DONE, chunk, usage_chunk

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%btransfer-encoding: chunked\r\n\r\n"
ROLE = chunk("", role="assistant")


class FakeTransport(asyncio.Transport):
    """A transport of a connection that a test feeds."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        pass


class FakeOwner:
    """A client with one response."""

    where, read_timeout_s, head_timeout_s = "e", 60.0, 60.0

    def on_released(self, response: Response) -> None:
        pass


def opened(headers: bytes = b"") -> tuple[Connection, Response]:
    """Return a connection, and its response whose head has arrived."""
    connection = Connection(lambda connection: None)
    connection.connection_made(FakeTransport())
    response = Response(FakeOwner(), connection, is_head=False)
    connection.send(response, b"")
    connection.data_received(HEAD % headers)
    return connection, response


def feed(connection: Connection, data: bytes) -> None:
    connection.data_received(b"%x\r\n%b\r\n" % (len(data), data))


class Stream:
    """The events of a stream that a test feeds, as they leave: read by a task, or passed (``passed``)."""

    def __init__(self, counter: type[TokenCounter], passes: PassEvent | None, headers: bytes = b"") -> None:
        self.recorder = Recorder()
        self.left: list[bytes] = []
        self.passed: list[bytes] = []
        self._passes = passes
        self.connection, self.response = opened(headers)
        self._counter = counter(self.recorder)
        passing = None if passes is None else self._pass
        self._reader = EventReader(self.response, self._counter, self._counter.see_all, self._on_read, passing)
        self.reads: list[int] = []
        self.reading = asyncio.create_task(self._read())

    def _pass(self, event: bytes, at: float) -> bool:
        assert at == self.response.read_at
        if self._passes is None or not self._passes(event, at):
            return False
        self.left.append(event)
        self.passed.append(event)
        return True

    def _on_read(self, tokens: int) -> None:
        self.reads.append(tokens)

    async def _read(self) -> None:
        while batch := await self._reader.next():
            for _, event in batch:
                # As a client that reads slowly: other bytes arrive meanwhile.
                await asyncio.sleep(0)
                self.left.append(event)

    def feed(self, data: bytes) -> None:
        feed(self.connection, data)

    async def end(self) -> None:
        self.connection.data_received(b"0\r\n\r\n")
        await self.reading


def delta(text: str) -> bytes:
    return b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"%b"}}\n\n' % text.encode()


EVENTS = st.sampled_from(
    [
        chunk("a"), chunk(" token"), chunk('"quoted" \\ text'), chunk(""), ROLE, chunk("b", reasoning="c"),
        chunk("with \"error\" in it"), b": comment\n\n", chunk("CRLF").replace(b"\n", b"\r\n"),
        chunk("lone CR").replace(b"\n", b"\r"),
        b"data: {\"choices\":\ndata: [{\"index\":0,\"delta\":{\"content\":\"x\"}}]}\n\n",
        usage_chunk(7), b"data: not JSON\n\n", b"\n\n", b"event: ping\ndata: {}\n\n",
    ]
)  # fmt: skip


@given(
    st.lists(EVENTS, max_size=30),
    st.lists(st.integers(1, 200), min_size=1, max_size=40),
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.lists(st.booleans(), min_size=1, max_size=40),
)
async def test_bytes_and_counts_are_those_of_a_stream_that_passes_nothing(
    events: list[bytes], cuts: list[int], accepts: list[bool], waits: list[bool]
) -> None:
    whole = b"".join([*events, DONE])
    pieces: list[bytes] = []
    # Whole events, which can be passed, between events that are cut.
    for number, event in enumerate([*events, DONE]):
        cut = cuts[number % len(cuts)]
        pieces += [event] if cut > 100 else [piece for piece in (event[:cut], event[cut:]) if piece]
    turn = iter(range(10_000))
    offered = Stream(CompletionCounter, lambda event, at: accepts[next(turn) % len(accepts)])
    plain = Stream(CompletionCounter, None)
    for number, piece in enumerate(pieces):
        for stream in (offered, plain):
            stream.feed(piece)
        for _ in range(3 if waits[number % len(waits)] else 0):
            await asyncio.sleep(0)
    for stream in (offered, plain):
        await stream.end()
        assert b"".join(stream.left) == whole
    assert offered.recorder.count() == plain.recorder.count()
    assert sum(offered.reads) == sum(plain.reads)


@example([ROLE, *(chunk(f" {number}") for number in range(9)), usage_chunk(9)], [3])
@given(st.lists(EVENTS, max_size=30), st.lists(st.integers(0, 3), min_size=1, max_size=40))
async def test_assembled_response_is_the_same_however_its_events_arrive(events: list[bytes], waits: list[int]) -> None:
    found = []
    for pieces in ([b"".join([*events, DONE])], [*events, DONE]):
        connection, response = opened()
        recorder = Recorder()
        counter = CompletionCounter(recorder)
        assembling = asyncio.create_task(assembled(response, counter, lambda tokens: None))
        for number, piece in enumerate(pieces):
            feed(connection, piece)
            for _ in range(waits[number % len(waits)]):
                await asyncio.sleep(0)
        connection.data_received(b"0\r\n\r\n")
        try:
            found.append((await assembling, recorder.count()))
        except BadUpstreamError as error:
            found.append((str(error), recorder.count()))
    assert found[0] == found[1]


async def fed(stream: Stream, *events: bytes) -> Stream:
    """``stream`` after ``events``, one at a time."""
    for event in events:
        stream.feed(event)
        for _ in range(4):
            await asyncio.sleep(0)
    return stream


async def test_tokens_are_passed_and_everything_else_is_read() -> None:
    tokens = [chunk(f" {number}") for number in range(60)]
    stream = Stream(CompletionCounter, lambda event, at: True)
    await fed(stream, ROLE, *tokens, chunk("", "stop"), usage_chunk(60), DONE)
    # The first token is parsed to learn what surrounds the text of the others.
    assert stream.passed == tokens[1:]
    assert stream.recorder.count() == 60
    assert all(count == 1 for _, count, _ in stream.recorder.tokens)
    assert len(stream.reads) == 64


@pytest.mark.parametrize(
    ("counter", "token"),
    [
        (MessagesCounter, delta("a")),
        (ResponsesCounter, b'event: response.output_text.delta\ndata: {"delta":"a"}\n\n'),
    ],
)
async def test_tokens_of_other_apis_are_passed(counter: type[TokenCounter], token: bytes) -> None:
    stream = await fed(Stream(counter, lambda event, at: True), *[token] * 20)
    # The first tokens are measured by their text, for which they are parsed.
    assert (len(stream.passed), stream.recorder.count()) == (11, 20)


async def test_several_tokens_in_one_read_are_not_passed() -> None:
    stream = await fed(Stream(CompletionCounter, lambda event, at: True), chunk("a"), chunk("b") + chunk("c"))
    assert (stream.passed, stream.recorder.count()) == ([], 3)


async def test_choices_of_several_sequences_are_not_passed() -> None:
    class TwoSequences(CompletionCounter):
        def __init__(self, observer: Recorder) -> None:
            super().__init__(observer, 2)

    stream = Stream(cast(type[TokenCounter], TwoSequences), lambda event, at: True)
    await fed(stream, *[chunk("a", index=number % 2) for number in range(20)])
    assert stream.passed == []
    assert (stream.recorder.count("0"), stream.recorder.count("1")) == (10, 10)


async def test_tokens_that_are_refused_are_read() -> None:
    stream = await fed(Stream(CompletionCounter, lambda event, at: False), *[chunk("a")] * 20)
    assert (stream.passed, len(stream.left), stream.recorder.count()) == ([], 20, 20)


async def test_compressed_bytes_are_not_passed() -> None:
    stream = Stream(CompletionCounter, lambda event, at: True, b"content-encoding: gzip\r\n")
    compressor = zlib.compressobj(wbits=31)
    for _ in range(20):
        await fed(stream, compressor.compress(chunk("a")) + compressor.flush(zlib.Z_SYNC_FLUSH))
    assert (stream.passed, stream.recorder.count()) == ([], 20)


async def test_nothing_is_passed_after_the_response_is_closed() -> None:
    stream = await fed(Stream(CompletionCounter, lambda event, at: True), *[chunk("a")] * 20)
    before = len(stream.passed)
    stream.response.close()
    stream.response.on_body(chunk("a"))
    assert len(stream.passed) == before


async def test_what_passing_raises_is_raised_to_the_reader_and_nothing_is_sent_again() -> None:
    def broken(event: bytes, at: float) -> bool:
        if len(stream.left) == 20:
            stream.left.append(event)
            raise KeyError("scripted")
        return True

    stream = Stream(CompletionCounter, broken)
    tokens = [chunk(f" {number}") for number in range(24)]
    # The end of the body arrives with the last token.
    await fed(stream, *tokens[:20])
    stream.connection.data_received(b"%x\r\n%b\r\n0\r\n\r\n" % (len(tokens[20]), tokens[20]))
    with pytest.raises(KeyError, match="scripted"):
        await stream.reading
    assert stream.left == tokens[:21]
