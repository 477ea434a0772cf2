"""Mutations of valid requests: of their JSON, of its bytes, of the head, and of the framing."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "simulated",
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "tell me a story"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ],
        "tools": [_TOOL],
        "response_format": {"type": "json_object"},
        "stream_options": {"include_usage": True},
        "max_tokens": 4,
        "n": 1,
        "temperature": 0.5,
        "stop": ["a"],
        "logit_bias": {"1": 1.0},
        "vllm_xargs": {"a": 1},
        "nvext": {"agent_hints": {"osl": 8}},
        "metadata": {"a": "b"},
        "cache_salt": "s",
    },
    "/v1/completions": {"model": "simulated", "prompt": ["a story", "another"], "max_tokens": 4, "n": 1,
                        "stream": False, "best_of": 1, "echo": False, "seed": 1, "priority": 0},
    "/v1/messages": {"model": "simulated", "max_tokens": 4, "system": [{"type": "text", "text": "be short"}],
                     "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
                     "tools": [{"name": "f", "input_schema": {"type": "object"}}], "stream": False},
    "/v1/responses": {"model": "simulated", "max_output_tokens": 4, "instructions": "be short", "stream": False,
                      "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
                      "store": False, "previous_response_id": None},
    "/v1/embeddings": {"model": "simulated", "input": ["a", "b"], "encoding_format": "float"},
}  # fmt: skip
"""A valid body for each route."""

HEADERS: dict[str, str] = {
    "content-type": "application/json",
    "x-slo-ttft-ms": "5000",
    "x-slo-tpot-ms": "500",
    "x-slo-e2e-ms": "20000",
    "x-slo-class": "chat",
    "x-slo-output-tokens": "8",
    "x-slo-report": "1",
    "x-request-id": "mutation",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "accept-encoding": "identity",
}

_NESTED = 100_000
_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda r: None,
    lambda r: r.choice([True, False]),
    lambda r: r.choice([0, -1, 1, 2, 64, 1 << 31, 1 << 63, -(1 << 63), 1 << 64, 10**30]),
    lambda r: r.choice([0.5, -0.0, 1e308, -1e308, 5e-324]),
    lambda r: r.choice(["", " ", "\0", "a" * r.choice([10, 5000]), "é\U0001f600", "true", "1", "null", "{}"]),
    lambda r: r.choice([[], [None], [[]], [1, "a", {}], ["x"] * 300, [[1, 2], [3]], [0] * 2000]),
    lambda r: r.choice([{}, {"": ""}, {"type": None}, {"a": {"b": [1]}}, {str(n): n for n in range(300)}]),
)
_RAW_VALUES = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" + b"0" * 400, b"0x10", b"01", b"1.", b".5", b"+1",
    b'"\\ud800"', b'"\\udc00\\ud800"', b'"\\u0000"', b'"\\x"', b'"\xff\xfe"', b'"\xc0\x80"', b'"\xed\xa0\x80"',
    b'"\x00"', b"'a'", b"undefined", b"[1,]", b'{"a":1,}', b'{"a":1,"a":2}', b"//", b"[" * 300 + b"]" * 300,
)  # fmt: skip
_MARK = "@@mutated@@"


@dataclass(frozen=True, slots=True)
class Mutation:
    """Bytes to send on one connection. ``what``: the mutations, for the report. ``path``: the route before them."""

    path: str
    what: str
    data: bytes


def mutation(r: random.Random, model: str = "simulated") -> Mutation:
    """Return a request for ``model`` with one to three mutations."""
    path = r.choice(list(VALID))
    head = [(name.encode(), value.encode()) for name, value in HEADERS.items() if r.random() < 0.5]
    done: list[str] = []
    document, body = {**copy.deepcopy(VALID[path]), "model": model}, b""
    if r.random() < 0.5:
        document["stream"] = r.choice([True, False])
    if r.random() < 0.75:
        done += [_change_value(r, document) for _ in range(r.choice([1, 1, 2]))]
    body = _serialised(r, document, done)
    if r.random() < 0.3:
        kind = r.choice(list(_BODIES))
        body = _BODIES[kind](r, body)
        done.append(kind)
    if r.random() < 0.4:
        kind = r.choice(list(_HEADS))
        _HEADS[kind](r, head)
        done.append(kind)
    framing = r.choice(list(_FRAMINGS)) if r.random() < 0.3 else "content-length"
    if framing != "content-length":
        done.append(framing)
    return Mutation(path, ", ".join(done) or "none", _FRAMINGS[framing](r, path.encode(), head, body))


# --- values in the document -------------------------------------------------------------------------------------------


def _places(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((node, key))
        if isinstance(value, dict | list):
            _places(value, found)
    return found


def _change_value(r: random.Random, document: dict[str, Any]) -> str:
    node, key = r.choice(_places(document, []) or [(document, "model")])
    kind = r.choice(["value", "value", "raw", "delete", "add", "swap"])
    if kind == "value":
        node[key] = r.choice(_VALUES)(r)
    elif kind == "raw":
        node[key] = _MARK
    elif kind == "delete":
        del node[key]
    elif kind == "add" and isinstance(node, dict):
        node[r.choice(["", "antares_gate", "vllm_xargs", "priority", "n", "stream_options", "x" * 2000, "\0"])] = (
            r.choice(_VALUES)(r)
        )
    else:
        node[key] = [node[key]] if r.random() < 0.5 else {"a": node[key]}
    return f"{kind} of {key!r:.40}"


def _serialised(r: random.Random, document: Any, done: list[str]) -> bytes:
    body = json.dumps(document, ensure_ascii=r.random() < 0.5).encode("utf-8", "surrogatepass")
    mark = f'"{_MARK}"'.encode()
    if mark in body:
        value = r.choice(_RAW_VALUES)
        done.append(f"raw {value[:16]!r}")
        body = body.replace(mark, value)
    return body


# --- bytes of the body ------------------------------------------------------------------------------------------------


def _flip(r: random.Random, body: bytes) -> bytes:
    changed = bytearray(body or b"{}")
    for _ in range(r.choice([1, 3, 20])):
        changed[r.randrange(len(changed))] = r.randrange(256)
    return bytes(changed)


def _insert(r: random.Random, body: bytes) -> bytes:
    at = r.randrange(len(body) + 1)
    return body[:at] + r.randbytes(r.choice([1, 8])) + body[at:]


def _deep(r: random.Random, body: bytes) -> bytes:
    left, right = r.choice([(b"[", b"]"), (b'{"a":', b"}")])
    depth = r.choice([200, 1100, _NESTED])
    return b'{"model":"simulated","messages":' + left * depth + b"1" + right * depth + b"}"


_BODIES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "truncated": lambda r, body: body[: r.randrange(len(body) + 1)],
    "flipped bytes": _flip,
    "inserted bytes": _insert,
    "random bytes": lambda r, body: r.randbytes(r.choice([1, 100, 5000])),
    "empty": lambda r, body: b"",
    "deep": _deep,
    "duplicate keys": lambda r, body: b'{"messages":[],"stream":true,"n":2,' + body[1:],
    "byte order mark": lambda r, body: b"\xef\xbb\xbf" + body,
    "UTF-16": lambda r, body: body.decode("latin-1").encode("utf-16"),
    "twice": lambda r, body: body + body,
    "not an object": lambda r, body: r.choice([b"[]", b"null", b"1", b'"a"', b"true", b"[" + body + b"]"]),
    "huge string": lambda r, body: b'{"a":"' + b"x" * 200_000 + b'",' + body[1:],
    "trailing bytes": lambda r, body: body + r.choice([b"\0", b"}", b" \n", b"GET / HTTP/1.1\r\n\r\n"]),
}

# --- headers ----------------------------------------------------------------------------------------------------------

Head = list[tuple[bytes, bytes]]
_BAD_VALUES = (
    b"", b" ", b"nan", b"inf", b"-1", b"1e400", b"1_000", b"0", b"5000, 100", b"\xff\xfe", b"a" * 3000, b"a\0b",
    b"a\rb", b"a\nx-slo-class: free", b"a\r\nx-injected: 1", b"a\r\n folded", b"\t1\t", b"\xd9\xa5", b"0x10", b"1e3",
    b"${jndi:x}", b"';--", b"../../x",
)  # fmt: skip
_BAD_NAMES = (b"", b" x", b"x ", b"x y", b"x\0", b"\xc3\xa9", b"x:y", b"x(", b"X-SLO-TTFT-MS ", b":path", b"a" * 3000)


def _bad_value(r: random.Random, head: Head) -> None:
    head.append((r.choice(list(HEADERS)).encode(), r.choice(_BAD_VALUES)))


def _replace(r: random.Random, head: Head) -> None:
    head[:] = [(name, r.choice(_BAD_VALUES) if r.random() < 0.5 else value) for name, value in head]


def _duplicate(r: random.Random, head: Head) -> None:
    name = r.choice(["x-slo-ttft-ms", "x-slo-class", "x-slo-tpot-ms", "x-request-id", "content-type", "host"]).encode()
    head += [(name, b"100"), (name, b"5000")]


def _encoding(r: random.Random, head: Head) -> None:
    head.append(
        (b"content-encoding", r.choice([b"gzip", b"deflate", b"br", b"zstd", b"gzip, gzip", b"identity", b"x"]))
    )


def _hop(r: random.Random, head: Head) -> None:
    head.append(
        r.choice([
            (b"connection", b"x-slo-class, content-length"), (b"upgrade", b"h2c"), (b"expect", b"100-continue"),
            (b"expect", b"x"), (b"te", b"trailers"), (b"trailer", b"content-length"), (b"keep-alive", b"timeout=0"),
            (b"proxy-connection", b"x"), (b"host", b""), (b"authorization", b"Bearer \xff"), (b"cookie", b"a=b"),
            (b"x-http-method-override", b"GET"), (b"origin", b"http://evil"), (b"range", b"bytes=0-1"),
        ])
    )  # fmt: skip


_HEADS: dict[str, Callable[[random.Random, Head], None]] = {
    "bad header value": _bad_value,
    "bad header values": _replace,
    "bad header name": lambda r, head: head.insert(0, (r.choice(_BAD_NAMES), b"1")),
    "duplicate header": _duplicate,
    "content encoding": _encoding,
    "hop-by-hop header": _hop,
    "many headers": lambda r, head: head.extend((b"x-%d" % n, b"v" * 20) for n in range(r.choice([100, 5000]))),
    "random header": lambda r, head: head.append((r.randbytes(5), r.randbytes(30))),
}

# --- framing ----------------------------------------------------------------------------------------------------------


def _head(path: bytes, head: Head, *more: bytes, line: bytes = b"POST %b HTTP/1.1", end: bytes = b"\r\n") -> bytes:
    lines = [line % path if b"%b" in line else line, b"host: gateway", b"connection: close", *more]
    return end.join([*lines, *(name + b": " + value for name, value in head), b"", b""])


def _length(body: bytes, change: int = 0) -> bytes:
    return b"content-length: %d" % max(0, len(body) + change)


def _plain(r: random.Random, path: bytes, head: Head, body: bytes) -> bytes:
    return _head(path, head, _length(body)) + body


def _chunks(r: random.Random, body: bytes) -> bytes:
    parts, at = [], 0
    while at < len(body):
        part = body[at : at + r.choice([1, 7, 1000])]
        parts.append(b"%x\r\n%b\r\n" % (len(part), part))
        at += len(part)
    return b"".join(parts) + b"0\r\n\r\n"


def _chunked(r: random.Random, path: bytes, head: Head, body: bytes) -> bytes:
    return _head(path, head, b"transfer-encoding: chunked") + _chunks(r, body)


def _bad_chunks(r: random.Random, path: bytes, head: Head, body: bytes) -> bytes:
    chunks = _chunks(r, body)
    at = r.randrange(len(chunks))
    chunks = r.choice([
        chunks[:at], chunks[:-5], b"zz\r\n" + chunks, b"-1\r\n" + chunks, b"ffffffffffffffff\r\n" + chunks,
        chunks[:at] + r.randbytes(3) + chunks[at:], chunks.replace(b"\r\n", b"\n"),
        b"5;" + b"a" * 3000 + b"\r\n" + chunks,
        chunks[:-2] + b"x-slo-class: free\r\n\r\n", b"0x5\r\nhello\r\n" + chunks, chunks + b"\0" * 50,
    ])  # fmt: skip
    return _head(path, head, b"transfer-encoding: chunked") + chunks


def _bad_length(r: random.Random, path: bytes, head: Head, body: bytes) -> bytes:
    value = r.choice([
        b"-1", b"+5", b"0", b"1e3", b"0x10", b"", b"a", b"5 5", b"5,5", b"99999999999999999999999",
        b"18446744073709551616", b"%d" % (len(body) + 10), b"%d" % max(0, len(body) - 5),
        b"%d\r\ncontent-length: 0" % len(body), b"\xd9\xa5",
    ])  # fmt: skip
    return _head(path, head, b"content-length: " + value) + body


def _smuggled(r: random.Random, path: bytes, head: Head, body: bytes) -> bytes:
    lines = [_length(body), r.choice([
        b"transfer-encoding: chunked", b"transfer-encoding : chunked", b"transfer-encoding: xchunked",
        b"transfer-encoding:\tchunked", b"transfer-encoding: chunked, identity", b"Transfer-Encoding: identity",
        b"x: y\r\ntransfer-encoding:\x0bchunked", b"transfer_encoding: chunked",
    ])]  # fmt: skip
    r.shuffle(lines)
    return _head(path, head, *lines) + _chunks(r, body) + b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"


def _start_line(r: random.Random, path: bytes, head: Head, body: bytes) -> bytes:
    line = r.choice([
        b"POST %b HTTP/1.0", b"POST %b HTTP/2.0", b"POST %b HTTP/1.1 x", b"POST  %b HTTP/1.1", b"post %b HTTP/1.1",
        b"GET %b HTTP/1.1", b"PUT %b HTTP/1.1", b"DELETE %b HTTP/1.1", b"PATCH %b HTTP/1.1", b"TRACE %b HTTP/1.1",
        b"OPTIONS * HTTP/1.1", b"POST %b", b"\x16\x03\x01\x02\x00", b"PRI * HTTP/2.0", b"POST //x%b HTTP/1.1",
        b"POST /v1/../metrics HTTP/1.1", b"POST %b?a=\xff HTTP/1.1", b"POST %b%%00 HTTP/1.1", b"POST %b/../x HTTP/1.1",
        b"POST http://x%b HTTP/1.1", b"POST /" + b"a" * 20_000 + b" HTTP/1.1", b"POST %b#f HTTP/1.1",
        b"CONNECT x:1 HTTP/1.1",
    ])  # fmt: skip
    line = line.replace(b"%%", b"%25") if b"%b" not in line else line
    return _head(path, head, _length(body), line=line) + body


def _cut(r: random.Random, path: bytes, head: Head, body: bytes) -> bytes:
    whole = _plain(r, path, head, body)
    return whole[: r.randrange(1, len(whole))]


_FRAMINGS: dict[str, Callable[[random.Random, bytes, Head, bytes], bytes]] = {
    "content-length": _plain,
    "chunked": _chunked,
    "bad chunks": _bad_chunks,
    "bad content-length": _bad_length,
    "both lengths": _smuggled,
    "start line": _start_line,
    "bare LF": lambda r, path, head, body: _head(path, head, _length(body), end=b"\n") + body,
    "cut": _cut,
    "random head": lambda r, path, head, body: r.randbytes(r.choice([4, 60, 400])),
}
