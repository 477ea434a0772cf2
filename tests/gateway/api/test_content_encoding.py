"""Compressed request bodies."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from typing import Any

import pytest
from starlette.datastructures import Headers

from gateway.api.content_encoding import TooLarge, content_coding, decompress
from gateway.api.errors import ApiError
from tests.fixtures.live_gateway import CHAT, Live, chat, live

BODY = json.dumps(chat("a long story " * 100)).encode()


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


ENCODED = {
    "gzip": gzip.compress(BODY, mtime=0),
    "GZIP": gzip.compress(BODY, mtime=0),
    "x-gzip": gzip.compress(BODY, mtime=0),
    "deflate": zlib.compress(BODY),
    "deflate ": raw_deflate(BODY),
    "identity": BODY,
    "identity, gzip": gzip.compress(BODY, mtime=0),
    "gzip ": gzip.compress(BODY[:50]) + gzip.compress(BODY[50:]),
}


async def post(antares: Live, path: str, body: bytes, coding: str) -> Any:
    headers = {"content-encoding": coding.strip(), "content-type": "application/json"}
    return await antares.http.post(path, content=body, headers=headers)


@pytest.mark.parametrize("coding", ENCODED)
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
async def test_engine_gets_the_plain_body(antares: Live, path: str, coding: str) -> None:
    seen: dict[bytes, bytes] = {}

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": (await receive())["body"]})

    antares.engine.stub = echo
    answer = await post(antares, path, ENCODED[coding], coding)
    sent = answer.json()
    sent.pop("vllm_xargs", None)
    assert sent == json.loads(BODY)
    assert b"content-encoding" not in seen
    assert seen.get(b"content-length", str(len(BODY)).encode()) == str(len(BODY)).encode()


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "gzip, br", "x" * 500])
async def test_unsupported_encoding_gets_415_with_the_supported_ones(antares: Live, path: str, coding: str) -> None:
    answer = await post(antares, path, BODY, coding)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert answer.headers["accept-encoding"] == "gzip, deflate"
    assert len(answer.json()["error"]["message"]) < 200


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", BODY),
        ("deflate", BODY),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9]),
        ("gzip", gzip.compress(BODY, mtime=0) + b"trailing"),
        ("gzip", gzip.compress(BODY, mtime=0)[:20] + b"\xff" * 30),
        ("deflate", zlib.compress(BODY)[:-5]),
        ("gzip", gzip.compress(b"", mtime=0) * 17),
    ],
)
async def test_invalid_compressed_data_gets_400(antares: Live, coding: str, body: bytes) -> None:
    answer = await post(antares, CHAT, body, coding)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_encoding")


async def test_doubly_compressed_body_is_decompressed_once(antares: Live) -> None:
    answer = await post(antares, CHAT, gzip.compress(gzip.compress(BODY, mtime=0)), "gzip")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings"])
@pytest.mark.parametrize("size", [4097, 64 << 20])
async def test_body_that_expands_beyond_the_limit_gets_413(path: str, size: int) -> None:
    async with live(server={"max_body_bytes": 4096 if size < 5000 else 1 << 20}) as antares:
        answer = await post(antares, path, gzip.compress(b"0" * size), "gzip")
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("members", [1, 8])
async def test_bomb_is_cut_at_the_limit(members: int) -> None:
    bomb = gzip.compress(b"0" * (32 << 20)) * members
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            await decompress(bomb, "gzip", 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


async def test_body_of_exactly_the_limit_is_accepted() -> None:
    assert len(await decompress(gzip.compress(b"0" * 5000), "gzip", 5000)) == 5000
    with pytest.raises(TooLarge):
        await decompress(gzip.compress(b"0" * 2500) * 2, "gzip", 4999)


async def test_encoding_of_an_empty_body_is_ignored(antares: Live) -> None:
    antares.echo_bodies()
    answer = await antares.http.post("/v1/responses/1/cancel", headers={"content-encoding": "gzip"})
    assert answer.status_code == 200


def test_several_content_encoding_headers_count_together() -> None:
    with pytest.raises(ApiError) as raised:
        content_coding(Headers(raw=[(b"content-encoding", b"gzip"), (b"content-encoding", b"br")]))
    assert raised.value.status == 415
