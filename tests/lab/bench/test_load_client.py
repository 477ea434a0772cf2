"""The load client: what it measures is what happened, and it never waits for an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest

from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from lab.bench.load_client import Sent, Target, send, send_from_another_process
from lab.records.run_record import run_record
from lab.workload import WorkloadRequest, make_workload
from tests.fixtures.live_gateway import fast_engine, live
from tests.fixtures.live_server import serve

EASY = WorkloadRequest(at_s=0.0, prompt_tokens=5, output_tokens=6, ttft_slo_s=5.0, tpot_slo_s=1.0, category=1)

Put = Callable[[Any], Awaitable[None]]
Answer = Callable[[dict[str, Any], dict[str, str], Put], Awaitable[None]]


class Stub:
    """A server of one script. Keeps the bodies and headers it was sent, and when."""

    def __init__(self, answer: Answer, status: int = 200) -> None:
        self.answer, self.status = answer, status
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.came: list[float] = []

    async def __call__(self, scope: Any, receive: Any, send_: Any) -> None:
        self.came.append(time.monotonic())
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


async def ask(stub: Stub, *workload: WorkloadRequest, **target: Any) -> Sent:
    async with serve(stub) as url:
        return await send(Target(url, "m", **target), workload or [EASY], seed=0)


async def two_pairs_of_tokens(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await asyncio.sleep(0.05)
    await put(text("a b"))
    await asyncio.sleep(0.1)
    await put(text(" c d", finish_reason="length"))
    await put(usage(5))
    await put(DONE)


async def test_tpot_divides_by_the_tokens_that_the_server_states() -> None:
    sent = await ask(Stub(two_pairs_of_tokens))
    (served,) = sent.served()
    assert served.outcome == "finished"
    assert served.ttft_s >= 0.05
    assert served.e2e_s - served.ttft_s >= 0.09
    assert served.tpot_s == pytest.approx((served.e2e_s - served.ttft_s) / 4)
    extras = sent.extras()
    assert (extras["output_tokens"], extras["lengths_from_usage"], extras["short_answers"]) == (5, 1.0, 1.0)


async def test_without_a_usage_the_length_asked_for_counts_if_it_was_to_be_exact_and_else_the_events() -> None:
    async def no_usage(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(text("a b"))
        await asyncio.sleep(0.1)
        await put(text(" c", finish_reason="stop"))
        await put(DONE)

    exact, free = [await ask(Stub(no_usage), ignore_eos=ignore_eos) for ignore_eos in (True, False)]
    for sent, tokens in ((exact, 6), (free, 2)):
        (answer,) = sent.answers
        assert answer.tokens == tokens
        assert answer.tpot_s == pytest.approx((answer.e2e_s - answer.ttft_s) / (tokens - 1))
    assert exact.extras()["lengths_from_usage"] == free.extras()["lengths_from_usage"] == 0.0


async def test_the_role_chunk_is_not_the_first_token() -> None:
    async def role_first(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(delta(role="assistant", content=""))
        await asyncio.sleep(0.15)
        await put(delta(content="a"))
        await put(DONE)

    sent = await ask(Stub(role_first), endpoint="chat", prompt_style="words")
    assert sent.answers[0].outcome == "finished"
    assert sent.answers[0].ttft_s >= 0.15


async def test_time_runs_from_the_moment_a_request_was_due_not_from_when_it_was_sent() -> None:
    async def at_once(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(text("a"))
        await asyncio.sleep(0.2)
        await put(DONE)

    # One connection: the second request is due at once but has to wait for the first.
    sent = await ask(Stub(at_once), EASY, EASY, max_connections=1)
    first, second = sent.answers
    assert first.late_s < 0.2 <= second.late_s <= second.ttft_s
    assert sent.extras()["client_lateness_p99_s"] > 0.1


async def test_a_stalled_server_delays_no_sending() -> None:
    async def stalled(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await asyncio.sleep(0.6)
        await put(text("a"))
        await put(DONE)

    stub = Stub(stalled)
    sent = await ask(stub, *(replace(EASY, at_s=0.01 * i) for i in range(30)))
    assert stub.came[-1] - stub.came[0] < 0.6, "all were sent before the first answer"
    assert sent.extras()["client_lateness_p99_s"] < 0.3
    assert sent.duration_s >= 0.29 + 0.6
    assert all(answer.outcome == "finished" for answer in sent.answers)


async def test_a_429_is_a_rejection_with_its_code_and_stays_in_the_denominator() -> None:
    async def unsupported_reason(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
        await put(b'{"error": {"code": "ttft_unattainable", "message": "no"}}')

    sent = await ask(Stub(unsupported_reason, status=429), EASY, EASY)
    record = run_record("x", 1.0, 0, sent.served(), sent.duration_s, wall_s=1.0, **sent.extras())
    assert (record["rejected"], record["failed"], record["slo_adherence"]) == (1.0, 0.0, 0.0)
    assert record["reasons"] == {"ttft_unattainable": 2}


async def fail_after_a_token(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(text("a"))
    await put({"error": {"message": "the engine died", "code": "engine_lost"}})
    await put(DONE)


async def end_early(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(text("a"))


async def say_nothing(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(DONE)


async def take_for_ever(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(text("a"))
    await asyncio.sleep(30)


async def apologise(body: dict[str, Any], headers: dict[str, str], put: Put) -> None:
    await put(b'{"error": {"message": "busy"}}')


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (fail_after_a_token, 200, "the engine died"),
        (end_early, 200, "the stream ended without [DONE]"),
        (say_nothing, 200, "an answer without tokens"),
        (take_for_ever, 200, "timed out"),
        (apologise, 503, "HTTP 503: busy"),
    ],
)
async def test_what_is_not_answered_in_full_has_failed_and_says_why(answer: Answer, status: int, reason: str) -> None:
    sent = await ask(Stub(answer, status), timeout_s=0.4)
    assert (sent.answers[0].outcome, sent.answers[0].reason) == ("failed", reason)
    assert not sent.served()[0].attained


async def test_nobody_at_the_other_end_gives_a_record_of_failures() -> None:
    sent = await send(Target("http://127.0.0.1:9", "m"), [EASY, EASY], seed=0)
    record = run_record("x", 1.0, 0, sent.served(), sent.duration_s, wall_s=1.0, **sent.extras())
    assert record["failed"] == 1.0
    assert next(iter(record["reasons"])).startswith("unreachable")


async def test_each_request_says_what_it_wants() -> None:
    stub = Stub(two_pairs_of_tokens)
    asked = replace(EASY, ttft_slo_s=0.5, tpot_slo_s=0.0305)
    await ask(stub, asked, api_key="secret")
    assert stub.paths == ["/v1/completions"]
    assert stub.headers[0]["x-slo-ttft-ms"] == "500"
    assert stub.headers[0]["x-slo-tpot-ms"] == "30.5"
    assert stub.headers[0]["authorization"] == "Bearer secret"
    body = stub.bodies[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["stream"]) == ("m", 6, True, True)
    assert body["stream_options"] == {"include_usage": True}
    assert len(body["prompt"]) == 5
    assert "temperature" not in body
    await ask(stub, asked, temperature=0.0)
    assert stub.bodies[1]["temperature"] == 0


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_words_are_text_of_about_as_many_tokens(endpoint: str) -> None:
    stub = Stub(two_pairs_of_tokens)
    await ask(stub, endpoint=endpoint, prompt_style="words", ignore_eos=False)
    body = stub.bodies[0]
    prompt = body["messages"][0]["content"] if endpoint == "chat" else body["prompt"]
    assert len(prompt.split()) == 5
    assert "ignore_eos" not in body


def test_prompts_differ_so_that_no_prefix_cache_helps() -> None:
    random = np.random.default_rng(0)
    bodies = [orjson.loads(Target("http://x", "m").body(EASY, random))["prompt"] for _ in range(3)]
    assert len({tuple(prompt) for prompt in bodies}) == 3


async def test_the_gateway_and_its_client_agree_on_what_was_attained() -> None:
    engine = fast_engine(times=StepTimes(b=1e-5, d=2e-3, alpha=1e-5))
    async with live(engine, policy={"name": "scorpio"}) as served:
        workload = make_workload("small", qps=60, requests=24, slo_scale=4, max_output=24)
        sent = await send_from_another_process(Target(served.url, "simulated"), workload, seed=0)
        attained = sum(one.attained for one in sent.served())
        assert attained == served.gateway.ledger.attained == 24
        extras = sent.extras()
        assert (extras["short_answers"], extras["lengths_from_usage"]) == (0.0, 1.0)
        assert extras["output_tokens"] == sum(asked.output_tokens for asked in workload)


async def test_the_client_in_another_process_tells_of_its_progress() -> None:
    engine = SimulatedEngine(times=StepTimes(d=1e-3))
    told: list[tuple[int, int]] = []
    async with live(engine) as served:
        workload = make_workload("small", qps=20, requests=10, max_output=5)
        await send_from_another_process(
            Target(served.url, "simulated"), workload, 0, lambda sent, done: told.append((sent, done))
        )
    assert told[-1] == (10, 10)
    assert told == sorted(told)


async def test_a_client_that_cannot_work_says_so() -> None:
    with pytest.raises(RuntimeError, match="load client ended"):
        await send_from_another_process(Target("not a url", "m"), [EASY], seed=0)
