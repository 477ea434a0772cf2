"""Models behind one gateway: which engines a request goes to, aliases, LoRA adapters, unknown models, and the list."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import openai
import orjson
import pytest

from benchmarks.faults.server import FaultyServer
from engine_adapter.engine import EngineState
from engine_adapter.model_card import MAX_MODELS, ModelCard, read_cards
from engine_adapter.remote import engine as remote_engine
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_gateway import CHAT, TEXT, Live, chat, fast_engine, live, serving
from tests.fixtures.live_server import eventually

RESPONSES, MESSAGES, EMBEDDINGS = "/v1/responses", "/v1/messages", "/v1/embeddings"


@asynccontextmanager
async def two_models(**options: Any) -> AsyncIterator[Live]:
    """A gateway with the engine ``one`` that serves a and a-lora, and ``two`` that serves b; ``fast`` means b."""
    one = fast_engine(name="one", model="a", models=["a-lora"])
    two = fast_engine(name="two", model="b", aliases={"fast": "b", "gone": "not-there"})
    async with live(one, more_engines=[two], **options) as antares:
        yield antares


async def served_by(antares: Live, model: str | None, path: str = CHAT) -> str:
    """Return the name of the engine that serves a request for ``model``."""
    body: dict[str, Any] = {"model": model, "max_tokens": 3}
    if model is None:
        del body["model"]
    text = "a story"
    body |= {TEXT: {"prompt": text}, RESPONSES: {"input": text}}.get(
        path, {"messages": [{"role": "user", "content": text}]}
    )
    if path == RESPONSES:
        body["max_output_tokens"] = body.pop("max_tokens")
    answer = await antares.ask(body, path, x_slo_report="1")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["antares"]["engine"])


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, MESSAGES])
async def test_request_goes_to_an_engine_that_serves_its_model(path: str) -> None:
    async with two_models() as antares:
        asked = ["a", "b", "fast", "a-lora", "b", "", None]
        assert [await served_by(antares, model, path) for model in asked] == [
            "one",
            "two",
            "two",
            "one",
            "two",
            "one",
            "one",
        ]


async def test_alias_is_rewritten_and_the_clients_document_is_not() -> None:
    async with two_models() as antares:
        antares.engine = antares.gateway.engine_queues[1].engine  # type: ignore[assignment]
        bodies = antares.record_bodies()
        for model in ("fast", "b"):
            assert (await antares.ask(chat() | {"model": model, "stream": True})).status_code == 200
        assert [body["model"] for body in bodies] == ["b", "b"]


async def test_request_without_a_model_is_sent_unchanged() -> None:
    async with two_models() as antares:
        bodies = antares.record_bodies()
        document = chat()
        del document["model"]
        answer = await antares.ask(document)
        assert (answer.status_code, "model" in bodies[0]) == (200, False)


@pytest.mark.parametrize("model", ["c", "gone", "A", "a ", "x" * 10_000, "b\x00", "\x1b[31m"])
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
async def test_unknown_model_gets_404_before_anything_else(model: str, path: str) -> None:
    async with two_models() as antares:
        answer = await antares.ask({"model": model, "messages": "not checked", "input": 5}, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert error["type"] == "invalid_request_error"
        assert len(error["message"]) < 400
        assert error["message"].isprintable()
        assert antares.gateway.ledger.accepted == 0, "it is not queued"


async def test_unknown_model_has_the_shape_of_the_messages_api() -> None:
    async with two_models() as antares:
        answer = await antares.ask(chat() | {"model": "c", "max_tokens": 3}, MESSAGES)
        assert (answer.status_code, answer.json()["type"], answer.json()["error"]["type"]) == (
            404,
            "error",
            "not_found_error",
        )


@pytest.mark.parametrize("model", [5, ["a"], {"a": 1}, True])
async def test_model_that_is_not_text_gets_400(model: Any) -> None:
    async with two_models() as antares:
        answer = await antares.ask(chat() | {"model": model})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


async def test_official_client_lists_models_and_gets_its_error_for_an_unknown_one() -> None:
    async with two_models() as antares:
        client = openai.AsyncOpenAI(base_url=f"{antares.url}/v1", api_key="none", max_retries=0)
        assert [model.id async for model in client.models.list()] == ["a", "a-lora", "b", "fast"]
        assert (await client.models.retrieve("fast")).owned_by == "antares"
        with pytest.raises(openai.NotFoundError, match="model `c` does not exist"):
            await client.chat.completions.create(model="c", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("c")


async def test_list_has_one_card_for_a_model_of_several_engines_with_the_smallest_context() -> None:
    one = fast_engine(name="one", model="a", max_model_len=4096)
    two = fast_engine(name="two", model="a", max_model_len=2048)
    async with live(one, more_engines=[two]) as antares:
        (card,) = (await antares.http.get("/v1/models")).json()["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("a", "model", 2048)
        assert {await served_by(antares, "a") for _ in range(3)} <= {"one", "two"}


async def test_one_name_may_mean_different_models_of_different_engines() -> None:
    engines = [fast_engine(name=name, model=f"{name}-8b", aliases={"chat": f"{name}-8b"}) for name in ("one", "two")]
    async with live(engines[0], more_engines=engines[1:]) as antares:
        assert await served_by(antares, "chat") == "one"
        engines[0].crash()
        answer = await antares.ask(chat() | {"model": "chat"})
        assert (answer.status_code, answer.json()["model"]) == (200, "two-8b")


async def test_model_whose_only_engine_is_down_gets_503_with_retry_after() -> None:
    async with two_models() as antares:
        engine: Any = antares.gateway.engine_queues[1].engine
        engine._restart_s = 30
        engine.crash()
        for path, body in ((CHAT, chat() | {"model": "b"}), (EMBEDDINGS, {"model": "b", "input": "x"})):
            answer = await antares.ask(body, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
            assert int(answer.headers["retry-after"]) > 1
        assert await served_by(antares, "a") == "one"
        listed = (await antares.http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["a", "a-lora", "b", "fast"], "a dead engine still owns its models"


async def test_waiting_request_does_not_move_to_an_engine_without_its_model() -> None:
    async with two_models() as antares:
        engine: Any = antares.gateway.engine_queues[1].engine
        engine._restart_s = 0.3
        engine.crash()
        assert await served_by(antares, "b") == "two"


async def test_failure_moves_no_request_to_an_engine_without_its_model() -> None:
    a, b = FaultyServer(models=("a",), fault="503"), FaultyServer(models=("b",))
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serving(server)) for server in (a, b)]
        engines = [HttpEngine(name, url) for name, url in zip("AB", urls, strict=True)]
        antares = await stack.enter_async_context(live(engines[0], more_engines=engines[1:]))
        answers = [await antares.ask(chat() | {"model": "a"}) for _ in range(5)]
        assert {answer.status_code for answer in answers} == {503}
        assert b.asked == []
        assert (await antares.ask(chat() | {"model": "b"})).status_code == 200


# --- engines whose models are not known -------------------------------------------------------------------------------


async def test_unknown_model_may_be_that_of_an_engine_that_was_never_up() -> None:
    never_up = HttpEngine("never", "http://127.0.0.1:9")
    classes = {"chat": {"ttft_ms": 100}}
    async with live(fast_engine(name="one", model="a"), more_engines=[never_up], classes=classes) as antares:
        answer = await antares.ask(chat() | {"model": "b"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
        assert answer.headers["retry-after"]
        assert await served_by(antares, "a") == "one"
        assert await served_by(antares, None) == "one"


async def test_request_that_waited_for_an_engine_gets_404_if_it_does_not_serve_the_model() -> None:
    server = FaultyServer(models=("b",), healthy=False)
    async with serving(server) as url:
        late = HttpEngine("late", url)
        async with live(fast_engine(name="one", model="a"), more_engines=[late], classes={"chat": {}}) as antares:
            waiting = [asyncio.create_task(antares.ask(chat() | {"model": model})) for model in ("b", "c")]
            await eventually(lambda: len(antares.gateway.engine_queues[1].waiting) == 2)
            server.healthy = True
            answers = [await task for task in waiting]
            assert [answer.status_code for answer in answers] == [200, 404]
            await eventually(antares.is_idle)


async def test_list_says_that_no_engine_has_reported_its_models() -> None:
    async with live(HttpEngine("never", "http://127.0.0.1:9")) as antares:
        answer = await antares.http.get("/v1/models")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


async def test_engine_that_lists_no_models_gets_requests_for_any() -> None:
    server = FaultyServer(models=())
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(server))
        engines = [fast_engine(name="one", model="a"), HttpEngine("any", url)]
        antares = await stack.enter_async_context(live(engines[0], more_engines=engines[1:]))
        assert (await antares.ask(chat() | {"model": "whatever"})).status_code == 200
        assert server.asked[0]["model"] == "whatever"
        assert await served_by(antares, "a") == "one"
        assert "whatever" not in (await antares.http.get("/metrics")).text, "labels hold no value of a client"


async def test_configured_models_and_any_model_extend_what_a_server_lists() -> None:
    server = FaultyServer(models=("listed",))
    async with serving(server) as url:
        async with live(HttpEngine("fixed", url, models=("x", "y"))) as antares:
            statuses = [(await antares.ask(chat() | {"model": model})).status_code for model in ("x", "y", "listed")]
            assert statuses == [200, 200, 404]
        async with live(HttpEngine("open", url, any_model=True)) as antares:
            statuses = [(await antares.ask(chat() | {"model": model})).status_code for model in ("listed", "z")]
            assert statuses == [200, 200]


async def test_models_loaded_at_run_time_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "MODELS_EVERY_S", 0.01)
    monkeypatch.setattr(remote_engine, "PROBE_EVERY_S", 0.02)
    server = FaultyServer(models=("a",))
    async with serving(server) as url, live(HttpEngine("A", url)) as antares:
        assert (await antares.ask(chat() | {"model": "lora"})).status_code == 404
        server.models = ("a", "lora")
        await eventually(lambda: antares.gateway.engine_queues[0].engine.state.own_name("lora") == "lora")
        assert (await antares.ask(chat() | {"model": "lora"})).status_code == 200


# --- requests that are not scheduled ----------------------------------------------------------------------------------


@asynccontextmanager
async def two_servers() -> AsyncIterator[tuple[Live, FaultyServer, FaultyServer]]:
    """A gateway with the servers of the models a and b; ``fast`` means b."""
    a, b = FaultyServer(models=("a",)), FaultyServer(models=("b",))
    async with serving(a) as url_a, serving(b) as url_b:
        second = HttpEngine("B", url_b, aliases={"fast": "b"})
        async with live(HttpEngine("A", url_a), more_engines=[second]) as antares:
            yield antares, a, b


async def test_embeddings_go_to_an_engine_that_serves_their_model() -> None:
    async with two_servers() as (antares, a, b):
        for model in ("b", "fast", "a", None):
            body = {"input": "x"} | ({} if model is None else {"model": model})
            assert (await antares.http.post(EMBEDDINGS, json=body)).status_code == 200
        assert [body.get("model") for body in b.asked] == ["b", "b"]
        assert [body.get("model") for body in a.asked] == ["a", None]
        answer = await antares.http.post(EMBEDDINGS, json={"model": "c", "input": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_form_goes_to_an_engine_that_serves_its_model() -> None:
    async with two_servers() as (antares, a, b):
        files = {"file": ("a.wav", b'name="model"\r\n\r\na\r\n', "audio/wav")}
        answer = await antares.http.post("/v1/audio/transcriptions", data={"model": "fast"}, files=files)
        assert answer.status_code == 200
        assert (a.paths, b.paths) == ([], ["/v1/audio/transcriptions"])


async def test_stored_response_is_continued_and_read_where_it_was_created() -> None:
    created: dict[str, list[str]] = {"one": [], "two": []}

    def storing(name: str) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            message = await receive()
            created[name].append(f"{scope['method']} {scope['path']}")
            document = {"object": "response", "id": f"resp_{name}", "model": "m"}
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
            )
            await send({"type": "http.response.body", "body": orjson.dumps(document)})
            assert message["type"] == "http.request"

        return app

    engines = [fast_engine(name=name, model="m") for name in ("one", "two")]
    async with live(engines[0], more_engines=engines[1:]) as antares:
        for engine in engines:
            engine.stub = storing(engine.name)
        engines[0].state.alive = False
        assert (await antares.ask({"model": "m", "input": "x"}, RESPONSES)).json()["id"] == "resp_two"
        engines[0].state.alive = True
        assert (await antares.http.get(f"{RESPONSES}/resp_two")).json()["id"] == "resp_two"
        assert (await antares.http.post(f"{RESPONSES}/resp_two/cancel")).json()["id"] == "resp_two"
        body = {"model": "m", "input": "y", "previous_response_id": "resp_two"}
        assert (await antares.ask(body, RESPONSES)).json()["id"] == "resp_two"
        assert created["one"] == []
        assert (await antares.http.get(f"{RESPONSES}/resp_unknown")).json()["id"] == "resp_one"


async def test_missing_stored_response_is_no_failure_of_the_engine() -> None:
    async def missing(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "no such response"}}'})

    engines = [fast_engine(name=name, model="m") for name in ("one", "two")]
    async with live(engines[0], more_engines=engines[1:]) as antares:
        for engine in engines:
            engine.stub = missing
        body = {"model": "m", "input": "y", "previous_response_id": "resp_x"}
        answers = [await antares.ask(body, RESPONSES) for _ in range(5)]
        assert {answer.status_code for answer in answers} == {404}
        for queue in antares.gateway.engine_queues:
            assert queue.circuit.current(time.monotonic()) == "closed"


# --- cards ------------------------------------------------------------------------------------------------------------


def test_cards_leave_out_what_is_no_model() -> None:
    listing = {"data": [{"id": "a", "max_model_len": 8, "parent": "p"}, {"id": 5}, "x", {"id": ""}, {"id": "y" * 300}]}
    assert read_cards(listing) == [ModelCard("a", max_model_len=8, parent="p")]
    assert len(read_cards({"data": [{"id": str(n)} for n in range(MAX_MODELS + 5)]})) == MAX_MODELS


@pytest.mark.parametrize("listing", [None, [], {}, {"data": None}, {"data": {"id": "a"}}, "text"])
def test_cards_of_something_else_raise(listing: Any) -> None:
    with pytest.raises(ValueError, match="not a list of models"):
        read_cards(listing)


def test_alias_takes_precedence_over_a_model_of_the_same_name() -> None:
    state = EngineState(aliases={"a": "b", "c": "gone"})
    assert state.own_name("a") == "b", "it holds before the models are known"
    state.set_models([ModelCard("a"), ModelCard("b")])
    assert (state.own_name("a"), state.own_name("b"), state.own_name("c"), state.model) == ("b", "b", None, "a")
