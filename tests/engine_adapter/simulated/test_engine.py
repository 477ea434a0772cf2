from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import Engine, EngineEvents, EngineLost
from engine_adapter.gates.pace_labels import MAX_LABELS
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from tests.fixtures.live_server import Recorder, eventually, observed, serve

FAST = StepTimes(b=0.0, d=2e-3, alpha=1e-5)
CHAT = "/v1/chat/completions"


class RecordedSteps(StepTimeModel):
    """Records (decoding requests, prefill tokens) of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, int]] = []

    def observe(self, decode_requests: int, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        self.steps.append((decode_requests, prefill_tokens))


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[SimulatedEngine]:
    engine = SimulatedEngine(**{"times": FAST, **options})
    await engine.start(EngineEvents())
    try:
        yield engine
    finally:
        await engine.stop()


@asynccontextmanager
async def client_of(engine: Engine, observer: Recorder | None = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(observed(engine.app, observer or Recorder()))
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        yield client


def ask(text: str = "say hello to everyone", **fields: Any) -> dict[str, Any]:
    return {"model": "simulated", "messages": [{"role": "user", "content": text}], **fields}


def chunks(stream: str) -> list[dict[str, Any]]:
    events = [event.removeprefix("data: ") for event in stream.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [orjson.loads(event) for event in events[:-1]]


async def test_chat_stream_has_vllm_format() -> None:
    async with running() as engine, client_of(engine) as client:
        options = {"include_usage": True}
        response = await client.post(CHAT, json=ask(stream=True, max_tokens=4, ignore_eos=True, stream_options=options))
    role, *tokens, usage = chunks(response.text)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [t["choices"][0]["finish_reason"] for t in tokens] == [None, None, None, "length"]
    assert all(t["choices"][0]["delta"]["content"] for t in tokens)
    assert usage["choices"] == []
    counts = {"prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8}
    assert usage["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    assert {c["system_fingerprint"] for c in (role, *tokens, usage)} == {"antares-simulated"}
    assert {c["object"] for c in tokens} == {"chat.completion.chunk"}


async def test_non_streaming_response_equals_the_streamed_one() -> None:
    async with running() as engine, client_of(engine) as client:
        plain = (await client.post(CHAT, json=ask())).json()
        streamed = chunks((await client.post(CHAT, json=ask(stream=True))).text)
    text = "".join(c["choices"][0]["delta"]["content"] for c in streamed)
    assert plain["choices"][0]["message"]["content"] == text
    assert plain["choices"][0]["finish_reason"] == streamed[-1]["choices"][0]["finish_reason"] == "stop"
    assert plain["usage"]["completion_tokens"] == len(streamed) - 1, "the role chunk is not a token, the end is one"
    assert 8 <= plain["usage"]["completion_tokens"] <= 128


async def test_text_completions_serve_several_prompts_and_n() -> None:
    async with running() as engine, client_of(engine) as client:
        body = {"prompt": ["one", "two three"], "n": 2, "max_tokens": 3, "ignore_eos": True}
        plain = (await client.post("/v1/completions", json=body)).json()
        streamed = chunks((await client.post("/v1/completions", json={**body, "stream": True})).text)
    assert [choice["index"] for choice in plain["choices"]] == [0, 1, 2, 3]
    assert plain["object"] == "text_completion"
    counts = {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
    assert plain["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 0}}
    for index, choice in enumerate(plain["choices"]):
        own = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in own) == choice["text"]


async def test_observer_receives_prompt_and_every_token() -> None:
    recorder = Recorder()
    async with running() as engine, client_of(engine, recorder) as client:
        started = time.monotonic()
        await client.post(CHAT, json=ask("four words are here", n=2, max_tokens=6, ignore_eos=True))
    assert recorder.prompts == {"0": 4, "1": 4}
    assert recorder.count("0") == recorder.count("1") == 6
    times = [at for sequence, _, at in recorder.tokens if sequence == "0"]
    assert times == sorted(times)
    assert times[-1] - started >= 5 * FAST.d


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 300, "ignore_eos": True}, 300),
        ({"max_completion_tokens": 5}, 5),
        ({"vllm_xargs": {"simulated_output_tokens": 17}}, 17),
        ({"vllm_xargs": {"simulated_output_tokens": 17}, "max_tokens": 9}, 9),
        ({}, 33),
    ],
)
async def test_output_length_follows_the_request(fields: dict[str, Any], tokens: int) -> None:
    engine = SimulatedEngine(times=StepTimes(b=0, d=1e-4), output_tokens=33)
    await engine.start(EngineEvents())
    async with client_of(engine) as client:
        usage = (await client.post(CHAT, json=ask(**fields))).json()["usage"]
    await engine.stop()
    assert usage["completion_tokens"] == tokens


async def test_steps_take_the_configured_time() -> None:
    times = StepTimes(b=0.0, d=10e-3, alpha=1e-4)
    recorder = Recorder()
    async with running(times=times) as engine, client_of(engine, recorder) as client:
        started = time.monotonic()
        await client.post(CHAT, json=ask("w " * 500, max_tokens=21, ignore_eos=True))
    first, last = recorder.tokens[0][2], recorder.tokens[-1][2]
    assert first - started == pytest.approx(0.05, abs=0.03)
    assert last - first == pytest.approx(0.2, abs=0.04), "late wake-ups do not accumulate"


async def test_long_prompt_is_prefilled_in_chunks_with_decodes() -> None:
    async with running(max_num_batched_tokens=100) as engine, client_of(engine) as client:
        engine.state.step_time = recorded = RecordedSteps()
        first = asyncio.create_task(client.post(CHAT, json=ask("a", max_tokens=30, ignore_eos=True)))
        await eventually(lambda: recorded.steps)
        await client.post(CHAT, json=ask("w " * 250, max_tokens=2, ignore_eos=True))
        await first
    assert sum(prefill for _, prefill in recorded.steps) == 251
    assert all(decodes + prefill <= 100 for decodes, prefill in recorded.steps)
    assert (1, 99) in recorded.steps


@pytest.mark.parametrize(("limits", "largest"), [({"max_num_seqs": 3}, 3), ({"kv_tokens": 64, "max_model_len": 64}, 4)])
async def test_batch_is_limited_by_sequences_and_kv_memory(limits: dict[str, int], largest: int) -> None:
    loads: list[tuple[int, float]] = []
    engine = SimulatedEngine(times=FAST, **limits)
    await engine.start(EngineEvents(on_step=lambda: loads.append((engine.state.engine_running, engine.state.kv_usage))))
    async with client_of(engine) as client:
        calls = [client.post(CHAT, json=ask("five words in this prompt", max_tokens=15)) for _ in range(8)]
        responses = await asyncio.gather(*calls)
    await engine.stop()
    assert all(response.status_code == 200 for response in responses)
    assert max(running for running, _ in loads) == largest
    assert max(usage for _, usage in loads) <= 1.0
    assert loads[-1] == (0, 0.0)


async def test_gate_gives_loose_requests_their_share_of_steps() -> None:
    async with running(times=StepTimes(b=0, d=1e-3, alpha=0)) as engine, client_of(engine) as client:

        def call(tpot_ms: float | None, tokens: int) -> Any:
            xargs = {} if tpot_ms is None else {"antares_tpot_ms": tpot_ms}
            return client.post(CHAT, json=ask(max_tokens=tokens, ignore_eos=True, vllm_xargs=xargs))

        strict = asyncio.create_task(call(30, 120))
        await asyncio.gather(call(60, 50), call(None, 110))
        await strict
    report = engine.state.gate
    assert set(report.eligible) == {"30", "60"}
    assert report.batched["30"] == report.eligible["30"]
    assert report.batched["60"] / report.eligible["60"] == pytest.approx(0.5, abs=0.05)
    assert 0 < report.gated_steps < report.steps


async def test_many_paces_share_a_bounded_number_of_labels() -> None:
    async with running(times=StepTimes(b=0, d=1e-4, alpha=0)) as engine, client_of(engine) as client:
        paces = [30 + number / 10 for number in range(200)]
        calls = [client.post(CHAT, json=ask(max_tokens=3, vllm_xargs={"antares_tpot_ms": pace})) for pace in paces]
        await asyncio.gather(*calls)
    report = engine.state.gate
    assert len(report.eligible) == MAX_LABELS + 1
    assert set(report.batched) == set(report.eligible)
    assert report.eligible["other"] > report.eligible["30"] > 0


@pytest.mark.parametrize(
    ("xargs", "preemptions"),
    [
        ({"antares_tpot_ms": 50}, 1),
        ({"antares_kind": "deadline_only"}, 1),
        ({"antares_kind": "best_effort", "antares_tpot_ms": 50}, 0),
        ({}, 0),
    ],
)
async def test_only_promised_requests_preempt_best_effort_ones(xargs: dict[str, Any], preemptions: int) -> None:
    async with running(max_num_seqs=2, gate="slack") as engine, client_of(engine) as client:
        best_effort = [
            asyncio.create_task(client.post(CHAT, json=ask(max_tokens=60, ignore_eos=True))) for _ in range(2)
        ]
        await eventually(lambda: engine.state.engine_running == 2)
        await client.post(CHAT, json=ask(max_tokens=2, ignore_eos=True, vllm_xargs=xargs))
        assert engine.state.gate.best_effort_preemptions == preemptions
        for task in best_effort:
            task.cancel()
        await asyncio.gather(*best_effort, return_exceptions=True)


async def test_client_disconnect_frees_its_slot_in_the_next_step() -> None:
    async with running() as engine, serve(engine.app) as url, httpx.AsyncClient(verify=False) as client:
        body = ask(stream=True, max_tokens=5000, ignore_eos=True)
        async with client.stream("POST", url + CHAT, json=body) as response:
            async for _ in response.aiter_raw():
                break
            assert engine.state.engine_running == 1
        await eventually(lambda: engine.state.engine_running == 0)
        assert engine.state.kv_usage == 0


async def test_cancelled_request_leaves_the_queue() -> None:
    async with running(max_num_seqs=1) as engine, client_of(engine) as client:
        first = asyncio.create_task(client.post(CHAT, json=ask(max_tokens=5000, ignore_eos=True)))
        await eventually(lambda: engine.state.engine_running == 1)
        second = asyncio.create_task(client.post(CHAT, json=ask()))
        await eventually(lambda: engine.state.engine_waiting == 1)
        for task in (second, first):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await eventually(lambda: engine.state.engine_waiting == engine.state.engine_running == 0)


async def test_crash_ends_all_requests_and_engine_restarts() -> None:
    alive: list[bool] = []
    engine = SimulatedEngine(times=FAST, restart_s=0.1)
    await engine.start(EngineEvents(on_alive=alive.append))
    async with client_of(engine) as client:
        calls = [client.post(CHAT, json=ask(stream=s, max_tokens=900)) for s in (True, False)]
        tasks = [asyncio.create_task(call) for call in calls]
        await eventually(lambda: engine.state.engine_running == 2)
        engine.crash()
        lost = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, EngineLost) for error in lost)
        assert not engine.state.alive
        with pytest.raises(EngineLost):
            await client.post(CHAT, json=ask())
        await eventually(lambda: engine.state.alive)
        assert (await client.post(CHAT, json=ask(max_tokens=3))).status_code == 200
    await engine.stop()
    assert engine.state.restarts == 1
    assert alive == [True, False, True]


async def test_stop_ends_requests_in_flight() -> None:
    async with running() as engine, client_of(engine) as client:
        task = asyncio.create_task(client.post(CHAT, json=ask(max_tokens=5000, ignore_eos=True)))
        await eventually(lambda: engine.state.engine_running)
        await engine.stop()
        with pytest.raises(EngineLost):
            await task
        assert not engine.state.alive


async def test_idle_engine_runs_no_steps() -> None:
    async with running() as engine, client_of(engine) as client:
        await client.post(CHAT, json=ask(max_tokens=2))
        steps = engine.state.gate.steps
        await asyncio.sleep(0.05)
        assert engine.state.gate.steps == steps


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("POST", CHAT, ask("w " * 9000), 400, "maximum context length is 8192"),
        ("POST", CHAT, ask(max_tokens=8190), 400, "maximum context length"),
        ("POST", CHAT, {"model": "m"}, 400, "messages"),
        ("POST", CHAT, ask(n=1.5), 400, "n must be a whole number"),
        ("POST", CHAT, ask(vllm_xargs={"antares_tpot_ms": -1}), 400, "antares_tpot_ms"),
        ("POST", CHAT, ask(stream_options={"include_usage": True}), 400, "stream_options"),
        ("POST", "/v1/completions", {"prompt": 5}, 400, "prompt must be"),
        ("GET", CHAT, None, 405, "requires POST"),
        ("POST", "/v1/models", {}, 405, "requires GET"),
        ("POST", "/v1/embeddings", {}, 404, "/v1/embeddings"),
    ],
)
async def test_errors_have_openai_format(method: str, path: str, body: Any, status: int, message: str) -> None:
    async with running() as engine, client_of(engine) as client:
        response = await client.request(method, path, json=body)
    error = response.json()["error"]
    assert response.status_code == error["code"] == status
    assert message in error["message"]


async def test_body_that_is_not_json_is_rejected() -> None:
    async with running() as engine, client_of(engine) as client:
        for raw in (b"{", b"[]"):
            assert (await client.post(CHAT, content=raw)).status_code == 400


async def test_models_route_reports_the_context_length() -> None:
    async with running(model="m", max_model_len=99) as engine, client_of(engine) as client:
        card = (await client.get("/v1/models")).json()["data"][0]
    assert (card["id"], card["max_model_len"]) == ("m", 99)


def test_unknown_gate_error_lists_known_gates() -> None:
    with pytest.raises(ValueError, match="open, credit"):
        SimulatedEngine(gate="nope")
