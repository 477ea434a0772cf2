"""Routes that are not scheduled: requests pass through unchanged, except for fields that only the gateway may set."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine_adapter.engine import EngineLost, Receive, Scope, Send
from gateway.api import pass_through
from tests.fixtures.live_gateway import CHAT, Live, chat, live
from tests.fixtures.live_server import eventually


async def test_forged_xargs_are_removed_on_other_routes(antares: Live) -> None:
    antares.echo_bodies()
    forged = {"input": "hi", "vllm_xargs": {"antares_tpot_ms": 0.001, "mine": 1}}
    assert (await antares.ask(forged, path="/v1/embeddings")).json() == {"input": "hi", "vllm_xargs": {"mine": 1}}
    plain = b'{ "input" :  "unchanged" }'
    assert (await antares.http.post("/v1/embeddings", content=plain)).content == plain


FORGED = '{"input": "hi", "vllm_xargs": {"antares_tpot_ms": 1}}'


@pytest.mark.parametrize(
    "content_types",
    [
        ["Application/JSON"],
        ["APPLICATION/json ; charset=utf-8"],
        ["application/vnd.api+json"],
        [""],
        ["text/plain", "application/json"],
    ],
)
async def test_body_is_checked_whenever_an_engine_may_read_it_as_json(antares: Live, content_types: list[str]) -> None:
    antares.echo_bodies()
    headers = [("content-type", given) for given in content_types]
    answer = await antares.http.post("/v1/embeddings", content=FORGED.encode(), headers=headers)
    assert answer.json() == {"input": "hi"}


@pytest.mark.parametrize(
    "body",
    [
        FORGED.replace("1", "NaN").encode(),
        FORGED.replace("1", "1e999").encode(),
        FORGED.replace("hi", "\\ud800").encode(),
        b"\xef\xbb\xbf" + FORGED.encode(),
        FORGED.encode("utf-16"),
        FORGED.encode("utf-32"),
        FORGED.replace('"hi"', "[" * 1100 + "]" * 1100).encode(),
        FORGED.encode() + b"x",
    ],
)
@pytest.mark.parametrize("path", ["/v1/embeddings", CHAT])
async def test_json_that_only_a_lenient_parser_accepts_gets_400(antares: Live, body: bytes, path: str) -> None:
    antares.echo_bodies()
    answer = await antares.http.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_last_of_two_equal_members_counts(antares: Live) -> None:
    antares.echo_bodies()
    body = b'{"vllm_xargs": {"mine": 1}, "vllm_xargs": {"antares_tpot_ms": 1}, "input": "hi"}'
    assert (await antares.http.post("/v1/embeddings", content=body)).json() == {"input": "hi"}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream"])
async def test_empty_and_non_json_bodies_pass_through_unchanged(antares: Live, content_type: str) -> None:
    antares.echo_bodies()
    body = b"" if content_type == "application/json" else b"\xff{ no"
    headers = {"content-type": content_type}
    answer = await antares.http.post("/v1/responses/1/cancel", content=body, headers=headers)
    assert (answer.status_code, answer.content) == (200, body)


def form(disposition: str, value: str = "1") -> bytes:
    parts = ["content-disposition: form-data; name=\"file\"; filename*=UTF-8''a.wav\r\n\r\nnoise"]
    parts += [f"Content-Disposition: form-data;{disposition}\r\n\r\n{value}"]
    return "".join(f"--xx\r\n{part}\r\n" for part in parts).encode() + b"--xx--\r\n"


@pytest.mark.parametrize(
    ("disposition", "charset", "param"),
    [
        (' name="vllm_xargs"', "", "vllm_xargs"),
        (' name="vllm_xargs"', "; charset=UTF-8", "vllm_xargs"),
        ("NAME = vllm_xargs", "", "vllm_xargs"),
        (" name*=utf-8''vllm%5Fxargs", "", "vllm_xargs"),
        (' name*0="vllm_"; name*1="xargs"', "", "vllm_xargs"),
        (' name="+AHY-llm+AF8-xargs"', "; charset=utf-7", "content-type"),
        (' name="+AHY-llm+AF8-xargs"', "; Charset*=utf-8''utf-7", "content-type"),
        (' name="+AHY-llm+AF8-xargs"', "; charset=utf-8; charset = utf-7", "content-type"),
    ],
)
async def test_form_with_xargs_gets_400(antares: Live, disposition: str, charset: str, param: str) -> None:
    headers = {"content-type": f"Multipart/form-data; boundary=xx{charset}"}
    body = form(disposition, '{"antares_tpot_ms": 1}')
    answer = await antares.http.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("charset", ["", "; charset=UTF-8", '; charset="utf8" ; x=y'])
@pytest.mark.parametrize(("name", "rejected"), [("seed", True), ("seeds", False), ("prompt", False)])
async def test_form_passes_through_unless_the_engine_rejects_a_field(
    antares: Live, name: str, rejected: bool, charset: str
) -> None:
    antares.echo_bodies()
    antares.forbid_seed()
    headers = {"content-type": f"multipart/form-data; boundary=xx{charset}"}
    answer = await antares.http.post("/v1/audio/transcriptions", content=form(f' name="{name}"'), headers=headers)
    assert answer.status_code == (400 if rejected else 200), answer.text


async def test_engine_checks_apply_to_other_routes(antares: Live) -> None:
    antares.forbid_seed()
    answer = await antares.ask({"input": "hi", "seed": 1}, path="/v1/embeddings")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")


class Held:
    """An engine's app that holds every call until `finish`, and counts those that it serves."""

    def __init__(self) -> None:
        self.calls = self.most = 0
        self.finish = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        self.most = max(self.most, self.calls)
        await self.finish.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})
        self.calls -= 1


@asynccontextmanager
async def held(limit: int) -> AsyncIterator[tuple[Live, Held]]:
    async with live(server={"max_pass_through": limit}) as antares:
        antares.engine.stub = app = Held()
        yield antares, app
        app.finish.set()


async def test_calls_beyond_the_limit_wait_while_chats_are_served() -> None:
    async with held(2) as (antares, app):
        calls = [asyncio.create_task(antares.ask({"input": "hi"}, "/v1/embeddings")) for _ in range(5)]
        await eventually(lambda: antares.gateway.proxy.in_flight == 5 and app.calls == 2)
        assert 'antares_pass_through_requests{engine="simulated"} 2.0' in (await antares.http.get("/metrics")).text
        antares.engine.stub = None
        assert (await antares.ask(chat())).status_code == 200
        antares.engine.stub = app
        app.finish.set()
        assert [(await call).status_code for call in calls] == [200] * 5
        assert app.most == 2
        assert 'antares_pass_through_requests{engine="simulated"} 0.0' in (await antares.http.get("/metrics")).text


async def test_waiting_call_that_disconnects_leaves_its_turn_to_the_next() -> None:
    async with held(1) as (antares, app):
        first, second, third = (asyncio.create_task(antares.ask({}, "/v1/embeddings")) for _ in range(3))
        await eventually(lambda: antares.gateway.proxy.in_flight == 3 and app.calls == 1)
        second.cancel()
        await eventually(lambda: antares.gateway.proxy.in_flight == 2)
        app.finish.set()
        assert ((await first).status_code, (await third).status_code) == (200, 200)
        assert 'route="/v1/embeddings",status="499"} 1.0' in (await antares.http.get("/metrics")).text


async def test_call_that_waits_too_long_gets_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_through, "WAIT_S", 0.05)
    async with held(1) as (antares, app):
        first = asyncio.create_task(antares.ask({}, "/v1/embeddings"))
        await eventually(lambda: app.calls == 1)
        answer = await antares.ask({}, "/v1/embeddings")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        app.finish.set()
        assert (await first).status_code == 200
        assert (await antares.ask({}, "/v1/embeddings")).status_code == 200, "the turn of the second call is not lost"


async def test_get_requests_do_not_wait_for_a_turn() -> None:
    async with held(1) as (antares, app):
        calls = [asyncio.create_task(antares.ask({}, "/v1/embeddings"))]
        calls += [asyncio.create_task(antares.http.get("/v1/responses/resp_1")) for _ in range(3)]
        await eventually(lambda: app.calls == 4)
        app.finish.set()
        assert [(await call).status_code for call in calls] == [200] * 4


@pytest.mark.parametrize("wrapped", [False, True])
async def test_client_that_stalls_gives_its_turn_back(wrapped: bool) -> None:
    async def floods(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 1_000_000, "more_body": True})
        except Exception as error:
            if wrapped:
                raise ExceptionGroup("of a task group", [error]) from None
            raise

    async with held(1) as (antares, _):
        antares.gateway.proxy._unscheduled.pass_through._stall_s = 0.2
        antares.engine.stub = floods
        async with antares.http.stream("POST", "/v1/embeddings", json={}):
            await eventually(lambda: antares.gateway.proxy.in_flight == 0)
        assert 'antares_pass_through_requests{engine="simulated"} 0.0' in (await antares.http.get("/metrics")).text
        assert 'route="/v1/embeddings",status="499"} 1.0' in (await antares.http.get("/metrics")).text


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
async def test_forged_xargs_are_removed_whatever_the_method(method: str) -> None:
    async with live(server={"pass_through_routes": ["/v1/things"]}) as antares:
        antares.echo_bodies()
        answer = await antares.http.request(method, "/v1/things", json={"vllm_xargs": {"antares_kind": "paced"}})
        assert answer.json() == {}


async def test_stream_of_an_engine_that_dies_ends_with_an_error_event(antares: Live) -> None:
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: {}\n\ndata: {", "more_body": True})
        raise EngineLost("gone")

    antares.engine.stub = dies
    answer = await antares.http.get("/v1/responses/resp_1?stream=true")
    *_, cut, error, end = answer.text.split("\n\n")
    assert (cut, error.split("\n")[0], end) == ("data: {", "event: error", "")
    assert json.loads(error.split("data: ")[1])["code"] == "engine_lost"
    assert 'route="/v1/responses/{id}",status="503"} 1.0' in (await antares.http.get("/metrics")).text


@pytest.mark.parametrize("is_draining", [False, True])
async def test_answer_of_an_engine_that_dies_before_it_is_503(antares: Live, is_draining: bool) -> None:
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        antares.gateway.proxy.stopping = is_draining
        raise EngineLost("gone")

    antares.engine.stub = dies
    answer = await antares.ask({}, "/v1/messages/count_tokens")
    error = answer.json()["error"]
    code = "draining" if is_draining else "engine_lost"
    assert (answer.status_code, error["type"], error["code"]) == (503, "overloaded_error", code)
    assert "x-request-id" in answer.headers
