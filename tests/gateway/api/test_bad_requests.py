"""Bad requests get an error that names the mistake, and leave no open ledger entry."""

from __future__ import annotations

import asyncio
import json
import string
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers as HeaderView

from engine_adapter.engine import Receive
from gateway.api import request_body
from gateway.api.body_memory import BodyMemory
from gateway.api.errors import ApiError
from gateway.api.limits import Limits
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, live
from tests.fixtures.live_server import HANG_S, eventually


async def read_parts(receive: Receive, max_bytes: int) -> bytes:
    """Read a body that has not arrived as a whole, with the default limits."""
    memory = BodyMemory(Limits().body_memory_bytes).reservation()
    return await request_body.read_limited_body(HeaderView(), receive, max_bytes, memory, Limits(), lambda most: None)


@pytest.mark.parametrize(
    "body", [b"", b"hello", b"{", b"[1, 2]", b"null", b'"text"', b"\xff\xfe", b'{"a": NaN}', b'"\\ud800"']
)
async def test_body_that_is_not_a_json_object_gets_400(antares: Live, body: bytes) -> None:
    answer = await antares.http.post(CHAT, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", "invalid_json")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": None}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": ["hi"]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        (CHAT, chat(model=7), "model"),
        (CHAT, chat(stream="yes"), "stream"),
        (CHAT, chat(n=0), "n"),
        (CHAT, chat(n=-1), "n"),
        (CHAT, chat(n="2"), "n"),
        (CHAT, chat(n=True), "n"),
        (CHAT, chat(n=1.5), "n"),
        (CHAT, chat(max_tokens=-1), "max_tokens"),
        (CHAT, chat(max_completion_tokens="many"), "max_completion_tokens"),
        (CHAT, chat(min_tokens=-1), "min_tokens"),
        (TEXT, {}, "prompt"),
        (TEXT, {"prompt": 7}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": ["a", 1]}, "prompt"),
        (TEXT, {"prompt": {"a": 1}}, "prompt"),
    ],
)
async def test_wrong_field_gets_400_naming_the_field(antares: Live, path: str, fields: Any, param: str) -> None:
    answer = await antares.ask(fields, path)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert antares.gateway.ledger.accepted == 0


async def test_content_length_above_the_limit_gets_413() -> None:
    async with live(server={"max_body_bytes": 2048}) as antares:
        answer = await antares.ask(chat("x" * 3000))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert (await antares.ask()).status_code == 200


async def test_chunked_body_above_the_limit_gets_413() -> None:
    async def chunks() -> Any:
        for _ in range(8):
            yield b"x" * 1000

    async with live(server={"max_body_bytes": 2048}) as antares:
        answer = await antares.http.post(CHAT, content=chunks())
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_body_above_the_limit_is_refused_before_its_end() -> None:
    chunks = [b"aa", b"b"]

    async def receive() -> Any:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": True}

    with pytest.raises(ApiError) as raised:
        await read_parts(receive, 2)
    assert (raised.value.status, raised.value.code, chunks) == (413, "body_too_large", [])


async def test_chunked_body_within_the_limit_is_served(antares: Live) -> None:
    async def chunks() -> Any:
        yield b'{"messages": [{"role": "user",'
        yield b' "content": "hi"}]}'

    assert (await antares.http.post(CHAT, content=chunks())).status_code == 200


@pytest.mark.parametrize("declared", [b"9" * 5000, "²".encode("latin-1"), b"-5", b"1e3"])
async def test_malformed_content_length_gets_4xx_without_an_http_server(antares: Live, declared: bytes) -> None:
    statuses: list[int] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [(b"content-length", declared)]}
    await antares.gateway(scope, receive, send)
    assert 400 <= statuses[0] < 500


@pytest.mark.parametrize("first_bytes", [b"", b'{"messages": '])
async def test_client_that_stalls_inside_its_body_gets_408_and_is_closed(
    antares: Live, monkeypatch: pytest.MonkeyPatch, first_bytes: bytes
) -> None:
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(request_body, "BODY_BYTES_PER_S", 1 << 40)
    host, port = antares.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n" + first_bytes)
    async with asyncio.timeout(HANG_S):
        answer = await reader.read()  # until the gateway closes the connection
    assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer
    assert antares.gateway.proxy.in_flight == 0
    assert antares.gateway.ledger.accepted == 0
    writer.close()


async def test_body_timeout_covers_all_chunks_and_grows_with_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_body, "BODY_TIMEOUT_S", 0.05)
    sent = 0

    async def receive() -> Any:
        nonlocal sent
        await asyncio.sleep(0.02)
        sent += 1
        return {"type": "http.request", "body": b"x", "more_body": sent < 8}

    with pytest.raises(ApiError) as raised:
        await read_parts(receive, 100)
    assert (raised.value.status, raised.value.code) == (408, "body_timeout")
    sent = 0
    assert await read_parts(receive, 8 << 20) == b"x" * 8


async def test_too_many_headers_get_431(antares: Live) -> None:
    answer = await antares.ask(**{f"x-number-{i}": "1" for i in range(140)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (431, "too_many_headers")


async def test_engine_400_passes_through_and_counts_as_rejected(antares: Live) -> None:
    answer = await antares.ask(chat(max_tokens=100_000))
    assert answer.status_code == 400
    assert "maximum context length" in answer.json()["error"]["message"]
    assert antares.outcomes["rejected"] == 1


async def test_client_that_disconnects_inside_its_body_counts_as_499(antares: Live) -> None:
    host, port = antares.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{")
    await writer.drain()
    writer.close()
    await eventually(lambda: 'status="499"' in antares.gateway.metrics.exposition().decode())
    assert antares.gateway.ledger.accepted == 0


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(string.printable, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["model", "messages", "prompt", "stream", "n", "max_tokens", "max_completion_tokens", "min_tokens",
          "vllm_xargs", "stream_options", "temperature", "stop", "tools"]  # fmt: skip
MESSAGE = st.fixed_dictionaries({"role": JSON, "content": st.text(max_size=20) | st.lists(JSON, max_size=2) | JSON})
NEARLY_RIGHT = st.fixed_dictionaries(
    {
        "messages": st.lists(MESSAGE, max_size=3),
        "prompt": st.text(max_size=9) | st.lists(st.text(max_size=9), max_size=3),
    },
    optional={name: JSON for name in FIELDS if name not in ("messages", "prompt")},
)
BODIES = JSON | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6) | NEARLY_RIGHT
HEADERS = st.dictionaries(
    st.sampled_from(["x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms", "x-slo-report", "x-request-id"]),
    st.sampled_from(["chat", "free", "batch", "1", "0.01", "100", "1e5", "nan", "", "x" * 200]),
    max_size=3,
)


async def test_any_body_and_header_get_no_5xx_and_the_ledger_balances(antares: Live) -> None:
    loop = asyncio.get_running_loop()

    async def post(path: str, body: Any, headers: dict[str, str]) -> httpx.Response:
        return await antares.http.post(path, json=body, headers=headers)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.sampled_from([CHAT, TEXT]), BODIES, HEADERS)
    def check_status(path: str, body: Any, headers: dict[str, str]) -> None:
        answer = asyncio.run_coroutine_threadsafe(post(path, body, headers), loop).result(5)
        assert answer.status_code < 500, answer.text

    await asyncio.to_thread(check_status)
    await eventually(antares.is_idle)
    assert antares.gateway.ledger.accepted == sum(antares.outcomes.values())
    assert antares.outcomes["finished"] > 0
    assert antares.outcomes["failed"] == 0


@pytest.mark.parametrize(
    "bad",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n{bad",
        b"POST /v1/nothing HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nunread",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nX-Slo-Ttft-Ms: soon\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /v1/chat/completions HTTP/1.1\r\nHost: a\r\n\r\n",
        b"HEAD /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
    ],
)
async def test_connection_is_usable_after_an_error(antares: Live, bad: bytes) -> None:
    url = httpx.URL(antares.url)
    body = json.dumps(chat()).encode()
    good = b"POST %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" % CHAT.encode()
    reader, writer = await asyncio.open_connection(url.host, url.port)
    # Pipelined: the second request is in the buffer before the first one is answered.
    writer.write(bad + good + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    answer = await asyncio.wait_for(reader.read(), HANG_S)
    writer.close()
    assert answer.count(b"HTTP/1.1 ") == 2
    assert answer.split(b"HTTP/1.1 ")[2].startswith(b"200 OK")
    assert b'"chat.completion"' in answer
