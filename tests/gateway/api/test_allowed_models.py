"""`allowed_models` of a key: what other models get, on every route."""

from __future__ import annotations

import pytest

from engine_adapter.engine import EngineState
from gateway.api.auth import hash_key
from tests.fixtures.live_gateway import Live, chat, live

KEY = "alice-0123456789abcdef"
AUTH = {"authorization": f"Bearer {KEY}"}


def keys(*models: str) -> list[dict[str, object]]:
    return [{"sha256": hash_key(KEY), "tenant": "alice", "allowed_models": list(models)}]


def model_of(antares: Live) -> str:
    state: EngineState = antares.gateway.engine_queues[0].engine.state
    return state.model


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"])
async def test_forbidden_model_gets_403_on_every_route(path: str) -> None:
    async with live(keys=keys("another")) as antares:
        body = {**chat(), "input": "hi", "max_tokens": 4, "model": model_of(antares)}
        answer = await antares.http.post(path, json=body, headers=AUTH)
        default = await antares.http.post(path, json={**body, "model": None}, headers=AUTH)
    assert (answer.status_code, default.status_code) == (403, 403)
    assert "model" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [b'{"\\u006dodel": "x"}', b"{}", b"[]", b"not json", b'{"model": 1}'])
async def test_body_without_a_readable_allowed_model_gets_403(body: bytes) -> None:
    async with live(keys=keys("x")) as antares:
        answer = await antares.http.post("/v1/embeddings", content=body, headers=AUTH)
    assert answer.status_code == 403


async def test_models_lists_what_the_key_may_use() -> None:
    async with live(keys=keys("another")) as antares:
        name = model_of(antares)
        assert (await antares.http.get("/v1/models", headers=AUTH)).json()["data"] == []
        assert (await antares.http.get(f"/v1/models/{name}", headers=AUTH)).status_code == 404


async def test_alias_gives_the_right_to_its_model() -> None:
    async with live(keys=keys("short")) as antares:
        state = antares.gateway.engine_queues[0].engine.state
        state.aliases = {"short": state.model}
        answer = await antares.http.post("/v1/chat/completions", json={**chat(), "model": state.model}, headers=AUTH)
    assert answer.status_code == 200


FORBIDDEN = b"forbidden"
DUPLICATES = [
    (b'{"model": "forbidden", "model": "simulated", "input": "hi"}', 200),
    (b'{"model": "simulated", "input": "hi", "model": "forbidden"}', 403),
    (b'{"\\u006dodel": "forbidden", "model": "simulated", "input": "hi"}', 200),
    (b'{"model": "simulated", "\\u006dodel": "forbidden", "input": "hi"}', 403),
    (b'{"model": "simulated", "Model": "forbidden", "input": "hi"}', 400),
    (b'{"MODEL": "forbidden", "model": "simulated", "input": "hi"}', 400),
    (b'{"model": "simulated", "moDe\\u006c": "forbidden", "input": "hi"}', 400),
    (b'{"model": "simulated", "model": null, "input": "hi"}', 403),
]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions"])
@pytest.mark.parametrize(("body", "status"), DUPLICATES)
async def test_engine_gets_only_the_model_that_was_checked(path: str, body: bytes, status: int) -> None:
    scheduled = path != "/v1/embeddings"
    if scheduled:
        body = body.replace(b'"input": "hi"', b'"messages": [{"role": "user", "content": "hi"}]')
    async with live(keys=keys("simulated")) as antares:
        antares.echo_bodies()
        answer = await antares.http.post(path, content=body, headers=AUTH)
        if scheduled and b"null" in body:
            # The default model is allowed.
            assert answer.status_code != 403
            return
        # The stub is no chat engine: its answer to a scheduled request is not what is tested.
        assert answer.status_code == status
        if status == 200:
            assert answer.content.lower().count(b'"model"') == 1
            assert answer.json()["model"] == "simulated"
            assert FORBIDDEN not in answer.content


async def test_body_of_a_key_for_all_models_is_not_encoded_anew() -> None:
    body = b'{"model":  "simulated", "input": 1.00}'
    async with live() as antares:
        antares.echo_bodies()
        assert (await antares.http.post("/v1/embeddings", content=body)).content == body
