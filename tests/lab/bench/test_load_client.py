"""The load client: correct measurements, and open-loop sending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from lab.bench.load_client import LoadResult, Target, send, send_from_another_process
from lab.records.run_record import run_record
from lab.workload import WorkloadRequest, make_workload
from tests.fixtures.live_gateway import fast_engine, live
from tests.fixtures.live_server import eventually, serve

pytestmark = pytest.mark.process

EASY = WorkloadRequest(at_s=0.0, prompt_tokens=5, output_tokens=6, ttft_slo_s=5.0, tpot_slo_s=1.0, category=1)

Put = Callable[[Any], Awaitable[None]]
Answer = Callable[[dict[str, Any], dict[str, str], Put], Awaitable[None]]


class Stub:
    """A server with a scripted answer. It records the bodies, headers, paths and times of requests."""

    def __init__(self, answer: Answer, status: int = 200) -> None:
        self.answer, self.status = answer, status
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.received_at: list[float] = []

    async def __call__(self, scope: Any, receive: Any, send_: Any) -> None:
        self.received_at.append(time.monotonic())
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.paths.append(scope["path"])
        self.bodies.append(orjson.loads(raw))
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        await send_({"type": "http.response.start", "status": self.status, "headers": []})

        async def put(event: Any) -> None:
            data = event if isinstance(event, bytes) else b"data: " + orjson.dumps(event) + b"\n\n"
            await send_({"type": "http.response.body", "body": data, "more_body": True})

        await self.answer(self.bodies[-1], self.headers[-1], put)
        await send_({"type": "http.response.body", "body": b"", "more_body": False})


def text(words: str, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": words, "finish_reason": None, **choice}]}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens}}


DONE = b"data: [DONE]\n\n"


async def measure(stub: Stub, *workload: WorkloadRequest, **target: Any) -> LoadResult:
    async with serve(stub) as url:
        return await send(Target(url, "m", **target), workload or [EASY], seed=0)


async def two_pairs_of_tokens(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await asyncio.sleep(0.05)
    await put(text("a b"))
    await asyncio.sleep(0.1)
    await put(text(" c d", finish_reason="length"))
    await put(usage(5))
    await put(DONE)


async def test_tpot_uses_token_count_from_usage() -> None:
    load = await measure(Stub(two_pairs_of_tokens))
    (result,) = load.results()
    assert result.outcome == "finished"
    assert result.ttft_s >= 0.05
    assert result.e2e_s - result.ttft_s >= 0.09
    assert result.tpot_s == pytest.approx((result.e2e_s - result.ttft_s) / 4)
    extras = load.extras()
    assert (extras["output_tokens"], extras["lengths_from_usage"], extras["short_answers"]) == (5, 1.0, 1.0)


async def test_without_usage_tokens_are_exact_length_or_estimated() -> None:
    async def no_usage(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(text("a b"))
        await asyncio.sleep(0.1)
        await put(text(" c", finish_reason="stop"))
        await put(DONE)

    exact, free = [await measure(Stub(no_usage), ignore_eos=ignore_eos) for ignore_eos in (True, False)]
    for load, tokens in ((exact, 6), (free, 3)):
        (answer,) = load.answers
        assert answer.tokens == tokens
        assert answer.tpot_s == pytest.approx((answer.e2e_s - answer.ttft_s) / (tokens - 1))
    assert exact.extras()["lengths_from_usage"] == free.extras()["lengths_from_usage"] == 0.0


async def test_role_chunk_is_not_the_first_token() -> None:
    async def role_first(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(delta(role="assistant", content=""))
        await asyncio.sleep(0.15)
        await put(delta(content="a"))
        await put(DONE)

    load = await measure(Stub(role_first), endpoint="chat", prompt_style="words")
    assert load.answers[0].outcome == "finished"
    assert load.answers[0].ttft_s >= 0.15


async def test_latency_is_measured_from_due_time() -> None:
    async def immediate_token(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(text("a"))
        await asyncio.sleep(0.2)
        await put(DONE)

    # With one connection, the second request is due immediately but waits for the first one.
    load = await measure(Stub(immediate_token), EASY, EASY, max_connections=1)
    first, second = load.answers
    assert first.late_s < 0.2 <= second.late_s <= second.ttft_s
    assert load.extras()["client_lateness_p99_s"] > 0.1


async def test_stalled_server_does_not_delay_sending() -> None:
    async def stalled(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await eventually(lambda: len(stub.received_at) == 30)
        await asyncio.sleep(0.6)
        await put(text("a"))
        await put(DONE)

    stub = Stub(stalled)
    load = await measure(stub, *(replace(EASY, at_s=0.01 * i) for i in range(30)))
    assert load.duration_s >= 0.29 + 0.6
    assert all(answer.outcome == "finished" for answer in load.answers)


async def test_429_is_a_rejection_with_its_error_code() -> None:
    async def rejected(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(b'{"error": {"code": "ttft_unattainable", "message": "no"}}')

    load = await measure(Stub(rejected, status=429), EASY, EASY)
    record = run_record("x", 1.0, 0, load.results(), load.duration_s, wall_s=1.0, **load.extras())
    assert (record["rejected"], record["failed"], record["slo_adherence"]) == (1.0, 0.0, 0.0)
    assert record["reasons"] == {"ttft_unattainable": 2}


async def fail_after_a_token(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(text("a"))
    await put({"error": {"message": "the engine died", "code": "engine_lost"}})
    await put(DONE)


async def end_early(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(text("a"))


async def send_no_tokens(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(DONE)


async def never_end(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(text("a"))
    await asyncio.sleep(30)


async def overloaded(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(b'{"error": {"message": "busy"}}')


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (fail_after_a_token, 200, "the engine died"),
        (end_early, 200, "the stream ended without [DONE]"),
        (send_no_tokens, 200, "the answer has no tokens"),
        (never_end, 200, "timed out"),
        (overloaded, 503, "HTTP 503: busy"),
    ],
)
async def test_incomplete_answer_fails_with_reason(answer: Answer, status: int, reason: str) -> None:
    load = await measure(Stub(answer, status), timeout_s=0.4 if answer is never_end else 60.0)
    assert (load.answers[0].outcome, load.answers[0].reason) == ("failed", reason)
    assert not load.results()[0].attained


async def test_unreachable_server_gives_failed_results() -> None:
    load = await send(Target("http://127.0.0.1:9", "m"), [EASY, EASY], seed=0)
    record = run_record("x", 1.0, 0, load.results(), load.duration_s, wall_s=1.0, **load.extras())
    assert record["failed"] == 1.0
    assert next(iter(record["reasons"])).startswith("unreachable")


async def test_request_has_slo_headers_and_body_fields() -> None:
    stub = Stub(two_pairs_of_tokens)
    request = replace(EASY, ttft_slo_s=0.5, tpot_slo_s=0.0305)
    await measure(stub, request, api_key="secret")
    assert stub.paths == ["/v1/completions"]
    assert stub.headers[0]["x-slo-ttft-ms"] == "500"
    assert stub.headers[0]["x-slo-tpot-ms"] == "30.5"
    assert stub.headers[0]["authorization"] == "Bearer secret"
    body = stub.bodies[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("m", 6, True, True)
    assert body["stream_options"] == {"include_usage": True}
    assert len(body["prompt"]) == 5
    assert "temperature" not in body
    await measure(stub, request, temperature=0.0)
    assert stub.bodies[1]["temperature"] == 0


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_words_prompt_has_one_word_per_token(endpoint: str) -> None:
    stub = Stub(two_pairs_of_tokens)
    await measure(stub, endpoint=endpoint, prompt_style="words", ignore_eos=False)
    body = stub.bodies[0]
    prompt = body["messages"][0]["content"] if endpoint == "chat" else body["prompt"]
    assert len(prompt.split()) == 5
    assert "ignore_eos" not in body


def test_prompts_differ_between_requests() -> None:
    random = np.random.default_rng(0)
    bodies = [orjson.loads(Target("http://x", "m").body(EASY, random))["prompt"] for _ in range(3)]
    assert len({tuple(prompt) for prompt in bodies}) == 3


async def test_client_process_agrees_with_gateway_and_reports_progress() -> None:
    engine = fast_engine(times=StepTimes(b=1e-5, d=2e-3, alpha=1e-5))
    async with live(engine, policy={"name": "scorpio"}) as served:
        workload = make_workload("small", qps=60, requests=24, slo_scale=100, max_output=24)
        progress: list[tuple[int, int]] = []
        load = await send_from_another_process(
            Target(served.url, "simulated"), workload, 0, lambda sent, done: progress.append((sent, done))
        )
        attained = sum(result.attained for result in load.results())
        assert attained == served.gateway.ledger.attained == 24
        extras = load.extras()
        assert (extras["short_answers"], extras["lengths_from_usage"]) == (0.0, 1.0)
        assert extras["output_tokens"] == sum(request.output_tokens for request in workload)
    assert progress[-1] == (24, 24)
    assert progress == sorted(progress)


async def test_failed_client_process_raises() -> None:
    with pytest.raises(RuntimeError, match="load client exited"):
        await send_from_another_process(Target("not a url", "m"), [EASY], seed=0)


# --- sessions ---------------------------------------------------------------------------------------------------------


def session_bodies(endpoint: str, style: str) -> list[tuple[WorkloadRequest, dict[str, Any]]]:
    target = Target("http://x", "m", endpoint, style)
    workload = make_workload("multi-turn", qps=5, duration_s=60)
    return [(r, orjson.loads(target.body(r, np.random.default_rng(i)))) for i, r in enumerate(workload)]


def test_chat_turns_repeat_the_messages_of_their_session() -> None:
    sent: set[bytes] = set()
    repeated = 0
    for request, body in session_bodies("chat", "words"):
        messages = body["messages"]
        assert [m["role"] for m in messages[:2]] == ["system", "user"]
        assert messages[-1]["role"] == "user"
        assert [len(m["content"].split()) for m in messages] == list(request.messages)
        repeated += len(messages) > 2
        assert len(messages) == 2 or orjson.dumps(messages[:-2]) in sent
        sent.add(orjson.dumps(messages))
    assert repeated > 100


def test_token_ids_are_equal_exactly_as_far_as_blocks_are() -> None:
    prompts = [(request.blocks, body["prompt"]) for request, body in session_bodies("completions", "ids")]
    (blocks, ids), *others = prompts
    for other_blocks, other_ids in others:
        shared = sum(1 for a, b in zip(blocks, other_blocks, strict=False) if a == b) * 16
        limit = min(shared, len(ids), len(other_ids))
        assert ids[:limit] == other_ids[:limit]
        assert ids[limit : limit + 16] != other_ids[limit : limit + 16] or limit == min(len(ids), len(other_ids))


async def test_sessions_hit_the_prefix_cache_of_a_server() -> None:
    workload = make_workload("multi-turn", qps=20, duration_s=3, max_output=40)
    # `slack` rejects requests of a slow machine.
    async with live(fast_engine(kv_tokens=400_000), policy={"name": "fcfs"}) as gateway:
        target = Target(gateway.url, "simulated", "chat", "words")
        result = await send_from_another_process(target, workload, 0)
    assert {answer.outcome for answer in result.answers} == {"finished"}
    assert result.extras()["hit_rate"] > 0.5
