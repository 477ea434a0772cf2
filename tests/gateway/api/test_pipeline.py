"""The request pipeline: a body is parsed and encoded once, and judged with the engine that serves the request."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import orjson
import pytest

from engine_adapter.engine import EngineUnreachable, Receive, RenderedPrompt, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from gateway.prediction.lengths import Prediction
from tests.fixtures.live_gateway import CHAT, AdmitNothing, Live, chat, fast_engine, live, serving
from tests.fixtures.live_server import eventually

MARK = "zebra"
"""A word in the prompt, that identifies the request's body among the other JSON that is read and written."""


@pytest.fixture
def json_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often a body that contains `MARK` is parsed ("loads") and encoded ("dumps")."""
    calls: Counter[str] = Counter()
    loads, dumps = orjson.loads, orjson.dumps

    def counting_loads(data: Any) -> Any:
        calls["loads"] += MARK.encode() in bytes(data)
        return loads(data)

    def counting_dumps(document: Any, *options: Any) -> bytes:
        data = dumps(document, *options)
        calls["dumps"] += MARK.encode() in data
        return data

    monkeypatch.setattr(orjson, "loads", counting_loads)
    monkeypatch.setattr(orjson, "dumps", counting_dumps)
    return calls


async def read_and_answer(scope: Scope, receive: Receive, send: Send) -> None:
    """An engine's app that reads the body without parsing it."""
    body = (await receive()).get("body", b"") if scope["method"] == "POST" else b""
    assert not body or MARK.encode() in body
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


@asynccontextmanager
async def gateway_to_remote(app: Any) -> AsyncIterator[Live]:
    """A gateway with an engine of kind `http`, in front of a server that serves ``app``."""
    async with serving(app) as url, live(HttpEngine("remote", url)) as antares:
        yield antares


@pytest.mark.parametrize("stream", [False, True])
async def test_in_process_engine_gets_a_body_parsed_and_encoded_once(
    antares: Live, json_calls: Counter[str], stream: bool
) -> None:
    antares.engine.stub = read_and_answer
    assert (await antares.ask(chat(MARK, stream=stream, vllm_xargs={"a": 1}))).status_code == 200
    assert json_calls == {"loads": 1, "dumps": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_remote_engine_gets_a_body_parsed_and_encoded_once(json_calls: Counter[str], stream: bool) -> None:
    async with gateway_to_remote(read_and_answer) as antares:
        assert (await antares.ask(chat(MARK, stream=stream))).status_code == 200
        assert json_calls == {"loads": 1, "dumps": 1}


async def test_rejected_request_is_not_encoded(antares: Live, json_calls: Counter[str]) -> None:
    assert (await antares.ask(chat(MARK), x_slo_ttft_ms="0.1")).status_code == 429
    assert json_calls == {"loads": 1, "dumps": 0}


@pytest.mark.parametrize("remote", [False, True])
async def test_body_that_cannot_be_encoded_gets_400(remote: bool) -> None:
    """orjson parses 1,024 levels but encodes only 254."""
    nested = b"[" * 300 + b"]" * 300
    body = b'{"messages": [{"role": "user", "content": "hi"}], "nested": ' + nested + b"}"
    async with gateway_to_remote(read_and_answer) if remote else live() as antares:
        answer = await antares.http.post(CHAT, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
        assert antares.outcomes["rejected"] == 1


async def test_request_is_encoded_again_without_changes_after_an_unreachable_engine() -> None:
    second = fast_engine(name="second")
    async with AsyncExitStack() as server, AsyncExitStack() as stack:
        url = await server.enter_async_context(serving(read_and_answer))
        antares = await stack.enter_async_context(live(HttpEngine("remote", url), more_engines=[second]))
        bodies = Live(antares.gateway, second, antares.url, antares.http).record_bodies()
        await server.aclose()
        # The remote engine asks for a stream in its own copy of the body.
        answer = await antares.ask(x_slo_class="free", x_slo_report="1")
        assert answer.json()["antares"]["engine"] == "second"
        assert bodies == [chat(vllm_xargs={"antares_gate": "slack"})]


@pytest.mark.parametrize(("crashed", "status"), [("small", 200), ("large", 400)])
async def test_sequences_are_limited_by_the_engine_placed_on(crashed: str, status: int) -> None:
    engines = {name: fast_engine(name=name, max_num_seqs=n, restart_s=30) for name, n in [("small", 2), ("large", 8)]}
    for first, second in (("small", "large"), ("large", "small")):
        async with live(engines[first], more_engines=[engines[second]]) as antares:
            engines[crashed].crash()
            answer = await antares.ask(chat(n=4))
            assert answer.status_code == status, (first, second)
            if status == 400:
                assert "at most 2 sequences" in answer.json()["error"]["message"]


async def test_prompt_is_counted_by_the_engine_placed_on() -> None:
    first, second = fast_engine(name="first", restart_s=30), fast_engine(name="second")

    async def render_first(path: str, document: object) -> RenderedPrompt:
        return RenderedPrompt([7] * 1000, 16)

    async def render_second(path: str, document: object) -> RenderedPrompt:
        return RenderedPrompt([7] * 24, 16)

    first.render = render_first  # type: ignore[method-assign]
    second.render = render_second  # type: ignore[method-assign]
    async with live(first, more_engines=[second]) as antares:
        queue = antares.gateway.engine_queues[1]
        queue.admission.policy = AdmitNothing()
        first.crash()
        pending = asyncio.create_task(antares.ask())
        await eventually(lambda: queue.waiting)
        assert [request.prompt_tokens for request in queue.waiting] == [24]
        pending.cancel()
        await eventually(antares.is_idle)


@pytest.mark.parametrize(("fields", "status", "outcome"), [({"seed": 1}, 400, "rejected"), ({}, 200, "finished")])
async def test_rerouted_request_is_judged_with_its_new_engine(
    fields: dict[str, int], status: int, outcome: str
) -> None:
    first, second = fast_engine(name="first", restart_s=30), fast_engine(name="second")
    async with live(first, more_engines=[second]) as antares:
        Live(antares.gateway, second, antares.url, antares.http).forbid_seed()
        queue = antares.gateway.engine_queues[0]
        queue.admission.policy = AdmitNothing()
        pending = asyncio.create_task(antares.ask(chat(**fields)))
        await eventually(lambda: queue.waiting)
        first.crash()
        assert (await pending).status_code == status
        assert antares.outcomes[outcome] == 1


async def test_request_is_judged_again_when_its_engine_comes_up() -> None:
    async with live(fast_engine(restart_s=0.2)) as antares:
        antares.engine.crash()
        pending = asyncio.create_task(antares.ask(chat(seed=1)))
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        antares.forbid_seed()
        answer = await pending
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")
        assert antares.is_idle()
        assert antares.outcomes["rejected"] == 1


async def test_request_is_placed_by_the_loads_after_its_prediction() -> None:
    async with live(fast_engine(name="first"), more_engines=[fast_engine(name="second")]) as antares:
        queues = antares.gateway.engine_queues
        for queue in queues:
            queue.admission.policy = AdmitNothing()
        predicted = asyncio.Event()

        async def predict(*args: object, **kwargs: object) -> Prediction:
            await predicted.wait()
            return Prediction(8.0, 16.0, "fallback")

        antares.gateway.predictor.predict = predict  # type: ignore[method-assign]
        pending = [asyncio.create_task(antares.ask()) for _ in range(8)]
        await eventually(lambda: antares.gateway.ledger.open_count == 8)
        predicted.set()
        await eventually(lambda: sum(len(queue.waiting) for queue in queues) == 8)
        assert [len(queue.waiting) for queue in queues] == [4, 4]
        for task in pending:
            task.cancel()
        await eventually(antares.is_idle)


async def test_request_gets_503_after_three_unreachable_engines(antares: Live) -> None:
    calls = 0

    async def unreachable(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        raise EngineUnreachable("down")

    antares.engine.stub = unreachable
    answer = await antares.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert calls == 3
    assert antares.outcomes["failed"] == 1


async def test_prompt_is_rendered_from_what_the_engine_is_sent(antares: Live) -> None:
    """Members of ``vllm_xargs`` that the gateway drops could otherwise make a prompt invalid for the rendering only."""
    rendered: list[Any] = []

    async def render(path: str, document: Any) -> RenderedPrompt:
        rendered.append(document)
        return RenderedPrompt((), 0, invalid=True)

    antares.engine.render = render  # type: ignore[method-assign]
    await antares.ask(chat(vllm_xargs={"antares_gate": {"not": "allowed"}, "a": 1}))
    assert [document["vllm_xargs"] for document in rendered] == [{"a": 1}]


async def test_invalid_prompt_that_another_engine_accepts_waits_for_its_turn() -> None:
    """The load changes while the prompt is rendered, so the request may be placed on another engine next."""
    first, second = fast_engine(name="first", restart_s=30), fast_engine(name="second")

    async def render(path: str, document: object) -> RenderedPrompt:
        first.crash()
        return RenderedPrompt((), 0, invalid=True)

    first.render = render  # type: ignore[method-assign]
    async with live(first, more_engines=[second]) as antares:
        queue = antares.gateway.engine_queues[1]
        queue.admission.policy = AdmitNothing()
        pending = asyncio.create_task(antares.ask())
        await eventually(lambda: queue.waiting or pending.done())
        assert not pending.done()
        pending.cancel()
        await eventually(antares.is_idle)


async def test_prompt_that_is_not_known_before_it_is_served_counts_by_its_estimate(antares: Live) -> None:
    async def render(path: str, document: object) -> RenderedPrompt:
        return RenderedPrompt((), 0)

    antares.engine.render = render  # type: ignore[method-assign]
    queue = antares.gateway.engine_queues[0]
    queue.admission.policy = AdmitNothing()
    pending = asyncio.create_task(antares.ask(chat("word " * 500)))
    await eventually(lambda: queue.waiting)
    assert 400 < queue.waiting[0].prompt_tokens < 1000
    pending.cancel()
    await eventually(antares.is_idle)


async def test_waiver_of_one_engine_does_not_hold_for_another() -> None:
    """The bounds cannot be met by the first engine. The second could meet them, but served it as best-effort."""
    first, second = fast_engine(name="first", restart_s=30), fast_engine(name="second")
    async with live(first, more_engines=[second]) as antares:
        queues = antares.gateway.engine_queues
        for queue in queues:
            queue.admission.policy = AdmitNothing()
        pending = asyncio.create_task(antares.ask(x_slo_class="batch"))
        await eventually(lambda: queues[0].waiting)
        request = queues[0].waiting[0]
        request.serve_at_best_effort()
        first.crash()
        await eventually(lambda: queues[1].waiting)
        assert not request.bounds_waived
        assert request.deadline_s < math.inf
        pending.cancel()
        await eventually(antares.is_idle)
