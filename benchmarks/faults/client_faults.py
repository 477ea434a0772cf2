"""Faults of clients: they disconnect, send slowly, nothing or garbage, and read nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random

from benchmarks.faults.checks import Ends
from benchmarks.faults.client import CHAT, CLOSED, HUNG_UP, Reply, chat, exchange, request
from benchmarks.faults.fault import Fault, load
from benchmarks.faults.rig import LIMITS, Rig

HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: gateway\r\n".encode()
_CUT_S = LIMITS["stall_s"] + LIMITS["head_timeout_s"] + 1.0
"""Seconds after which the gateway has cut a client that makes no progress."""


async def disconnect(running: Rig, ends: Ends) -> None:
    """200 clients disconnect at every stage of their request, half of them with a reset."""
    r = random.Random(0)

    async def client(number: int) -> None:
        body = chat(stream=number % 3 > 0, max_tokens=400, ignore_eos=True)
        sent = body if number % 4 else body[: r.randrange(1, len(body))]
        await asyncio.sleep(r.random() * 1.5)
        call = exchange(running.port, sent, hang_up_at=r.choice([0, 1, 300, 3000]), reset=number % 2 == 0)
        await ends.add_abuse(call)

    async with load(running, ends):
        await asyncio.gather(*(client(number) for number in range(200)))


async def half_open(running: Rig, ends: Ends) -> None:
    """60 clients send half a head or half a body, and then nothing."""
    body = chat("x" * 2000)
    cuts = [10, len(HEAD), len(body) - 2100, len(body) - 1000, len(body) - 1]
    calls = [exchange(running.port, body[: cuts[number % 5]]) for number in range(60)]
    async with load(running, ends):
        await asyncio.gather(*(ends.add_abuse(call) for call in calls))


async def send_slowly(running: Rig, ends: Ends) -> None:
    """60 clients send a head or a body byte by byte."""
    body = chat("x" * 2000)
    starts = (0, len(body) - 1500)

    def parts(start: int) -> list[bytes | float]:
        dripped: list[bytes | float] = [body[:start]] if start else []
        for at in range(start, start + 100):
            dripped += [body[at : at + 1], 0.1]
        return dripped

    calls = [exchange(running.port, *parts(starts[number % 2])) for number in range(60)]
    async with load(running, ends):
        await asyncio.gather(*(ends.add_abuse(call) for call in calls))


async def be_silent(running: Rig, ends: Ends) -> None:
    """300 clients connect and send nothing."""
    async with load(running, ends):
        await asyncio.gather(*(ends.add_abuse(exchange(running.port)) for _ in range(300)))


async def read_nothing(running: Rig, ends: Ends) -> None:
    """64 clients ask for long streams and read nothing."""

    async def client() -> Reply:
        _, writer = await asyncio.open_connection("127.0.0.1", running.port, limit=1024)
        writer.write(chat(stream=True, max_tokens=2000, ignore_eos=True, n=2))
        # The buffer of this reader and those of the sockets fill, and then nothing is read.
        await asyncio.sleep(_CUT_S)
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return Reply(end=HUNG_UP)

    async with load(running, ends):
        await asyncio.gather(*(ends.add_abuse(client()) for _ in range(64)))


# --- bodies and heads -------------------------------------------------------------------------------------------------

_VALID = json.dumps({"model": "simulated", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
_DEEP = 200_000
BAD_BODIES: tuple[bytes, ...] = (
    b"", b"{", b"null", b"[]", b'"a"', _VALID.encode()[:-1], _VALID.encode() + b"}", b"[" * _DEEP, b'{"a":' * _DEEP,
    b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}", _VALID.encode("utf-16"), b"\xff\xfe" + _VALID.encode(),
    _VALID.replace("hello", "\\ud800").encode(), _VALID.encode().replace(b"hello", b"\xc3\x28"),
    _VALID.replace("4", "NaN").encode(), _VALID.replace("4", "1e999").encode(), b"\x00" * 1000, b'{"messages": 1}',
    b'{"messages": [1]}', b'{"messages":[{"role":"user","content":"' + b"x" * (9 << 20) + b'"}]}',
)  # fmt: skip
"""Malformed, truncated, deep, huge and non-UTF-8 bodies."""


async def send_bad_bodies(running: Rig, ends: Ends) -> None:
    """Send each of `BAD_BODIES`, plain, in chunks and compressed, and a body that grows when it is decompressed."""
    calls = []
    for body in BAD_BODIES:
        chunked = HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
            len(body),
            body,
        )
        chunked = chunked if body else HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        packed = request(CHAT, gzip.compress(body), {"content-encoding": "gzip"})
        calls += [exchange(running.port, sent) for sent in (request(CHAT, body), chunked, packed)]
    bomb = gzip.compress(b'{"a":"' + b" " * (200 << 20) + b'"}')
    calls.append(exchange(running.port, request(CHAT, bomb, {"content-encoding": "gzip"})))
    async with load(running, ends):
        await asyncio.gather(*(ends.add_abuse(call) for call in calls))


_HIDDEN = chat(max_tokens=4)
SMUGGLED: tuple[bytes, ...] = tuple(
    HEAD + lines + b"\r\n\r\n" + body + _HIDDEN
    for lines, body in (
        (b"content-length: 5\r\ntransfer-encoding: chunked", b"0\r\n\r\n"),
        (b"transfer-encoding: chunked\r\ncontent-length: 5", b"0\r\n\r\n"),
        (b"content-length: 2\r\ncontent-length: 20", b"{}"),
        (b"content-length: 2\r\ncontent-length: 2", b"{}"),
        (b"content-length: +2", b"{}"),
        (b"content-length: 2, 2", b"{}"),
        (b"transfer-encoding: chunked\r\ntransfer-encoding: identity", b"0\r\n\r\n"),
        (b"transfer-encoding : chunked", b"0\r\n\r\n"),
        (b"transfer-encoding: xchunked", b"0\r\n\r\n"),
        (b"transfer-encoding: chunked", b"zz\r\n"),
        (b"transfer-encoding: chunked", b"ffffffffffffffff1\r\n"),
        (b"transfer-encoding: chunked", b"2\r\n{}0\r\n\r\n"),
        (b"a: b\ncontent-length: 2", b"{}"),
        (b"a: b\r\n content-length: 2", b""),
        (b"a: \0\r\ncontent-length: 2", b"{}"),
        (b"upgrade: websocket\r\nconnection: upgrade", b""),
    )
)
"""Requests that two servers could read differently, each with a hidden chat behind it."""


async def smuggle(running: Rig, ends: Ends) -> None:
    """Send each of `SMUGGLED` eight times. The hidden chat must not be served."""
    calls = [exchange(running.port, sent) for sent in SMUGGLED for _ in range(8)]
    async with load(running, ends):
        await asyncio.gather(*(ends.add_abuse(call) for call in calls))


SLO_LINES: tuple[str, ...] = (
    "x-slo-ttft-ms: 5000\r\nx-slo-ttft-ms: 1", "x-slo-ttft-ms: 5000\r\nx-llm-d-slo-ttft-ms: 1",
    "x-slo-ttft-ms: 5000, 1", "x-slo-ttft-ms: nan", "x-slo-ttft-ms: -1", "x-slo-ttft-ms: 1e400", "x-slo-ttft-ms:",
    "x-slo-tpot-ms: inf", "x-slo-tpot-ms: 0", "x-slo-e2e-ms: 1_000", "x-slo-class: chat\r\nx-slo-class: free",
    "x-slo-class: none", "x-slo-class: chat, free", "x-slo-class: \xff", "x-slo-output-tokens: 1.5",
    "x-slo-output-tokens: 99999999999999999999", "x-slo-e2e-ms: 1000\r\nx-slo-ttft-ms: 90000",
    "x-slo-ttft-ms: 0.001\r\nx-slo-class: batch", "x-slo-ttft-ms: " + "9" * 4000,
)  # fmt: skip
"""Duplicate, conflicting and malformed SLO headers."""


async def send_bad_bounds(running: Rig, ends: Ends) -> None:
    """Send each of `SLO_LINES` four times."""
    body = _VALID.encode()
    sent = [
        HEAD + f"{lines}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode("latin-1") + body
        for lines in SLO_LINES
    ]
    async with load(running, ends):
        await asyncio.gather(*(ends.add_abuse(exchange(running.port, each)) for each in sent * 4))


_REFUSED = r"4\d\d \w+|501 \w+"
CLIENT_FAULTS = (
    Fault("clients disconnect", "200 clients hang up at every stage, half of them with a reset", disconnect,
          abusive=f"200|{HUNG_UP}|{CLOSED}|408 \\w+"),
    Fault("half-open clients", "60 clients send half a request and then nothing", half_open, abusive=r"408 \w+"),
    Fault("slow clients", "60 clients send a byte every 0.1 s", send_slowly, abusive=r"408 \w+"),
    Fault("silent clients", "300 clients connect and send nothing", be_silent, abusive=CLOSED),
    Fault("clients that read nothing", "64 clients ask for two streams of 2,000 tokens and read nothing", read_nothing,
          abusive=HUNG_UP),
    Fault("bad bodies", f"{len(BAD_BODIES)} malformed, deep, huge and non-UTF-8 bodies in 3 framings, a gzip bomb",
          send_bad_bodies, abusive=_REFUSED),
    Fault("request smuggling", f"{len(SMUGGLED)} ambiguous requests with a hidden chat, 8 times each", smuggle,
          abusive=_REFUSED),
    Fault("bad SLO headers", f"{len(SLO_LINES)} duplicate, conflicting and malformed headers, 4 times each",
          send_bad_bounds, abusive=r"200|4\d\d \w+"),
)  # fmt: skip
