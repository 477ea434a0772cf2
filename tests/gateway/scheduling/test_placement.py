"""Several engines behind one gateway: which one a request goes to, and what happens when one is down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from gateway.app import Gateway
from gateway.policies.base import Decision
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.placement import load
from tests.fixtures.live_gateway import CHAT, chat, fast_engine, gateway_config, serving
from tests.fixtures.live_server import eventually
from tests.fixtures.policy_builders import engine, make_request

# --- load of an engine ------------------------------------------------------------------------------------------------


def load_with(policy: str, requests: list[Request], kv_tokens: int = 0) -> tuple[float, int]:
    admission = AdmissionController(make_policy(policy), engine(kv_tokens=kv_tokens))
    for request in requests:
        admission.submit(request)
    return load(admission, make_request("next"))


@pytest.mark.parametrize(("policy", "busier"), [("annealing", "answer"), ("scorpio", "prompt")])
def test_load_counts_kv_memory_under_annealing_and_prefill_otherwise(policy: str, busier: str) -> None:
    loads = {
        "answer": load_with(policy, [make_request("a", prompt=10, output=800)]),
        "prompt": load_with(policy, [make_request("b", prompt=500, output=10)]),
    }
    assert max(loads, key=loads.__getitem__) == busier


def test_chat_returns_to_the_engine_that_has_its_prompt_cached() -> None:
    def queue_with(cached: bool, waiting: int) -> AdmissionController:
        admission = AdmissionController(make_policy("slack"), engine())
        if cached:
            admission.prefixes.stored(range(60), 16)
        for number in range(waiting):
            admission.submit(make_request(f"{number}", prompt=900))
        return admission

    chat = make_request("chat", prompt=1000)
    chat.blocks, chat.block_tokens = tuple(range(60)), 16
    assert load(queue_with(cached=True, waiting=0), chat) < load(queue_with(cached=False, waiting=0), chat)
    assert load(queue_with(cached=True, waiting=1), chat) < load(queue_with(cached=False, waiting=1), chat)
    assert load(queue_with(cached=True, waiting=2), chat) > load(queue_with(cached=False, waiting=0), chat)


@given(
    st.lists(st.lists(st.integers(1, 2000), max_size=10), min_size=1, max_size=4),
    st.lists(st.integers(1000, 50_000), min_size=4, max_size=4),
)
def test_annealing_load_is_least_where_most_kv_memory_is_left(outputs: list[list[int]], totals: list[int]) -> None:
    requests = [[make_request(f"{i}", output=output) for i, output in enumerate(queue)] for queue in outputs]
    loads = [load_with("annealing", queue, total) for queue, total in zip(requests, totals, strict=False)]
    left = [
        total - sum(r.prompt_tokens + r.predicted_tokens for r in queue)
        for queue, total in zip(requests, totals, strict=False)
    ]
    assert left[loads.index(min(loads))] == max(left)


# --- routing in a live gateway ----------------------------------------------------------------------------------------


class AdmitNone:
    """A policy that lets every request wait."""

    name, gate = "admit_none", "open"

    def decide(self, now: float, waiting: object, running: object, engine: object) -> Decision:
        return Decision()


@asynccontextmanager
async def two_engines(**changes: object) -> AsyncIterator[tuple[Gateway, list[SimulatedEngine], httpx.AsyncClient]]:
    engines = [fast_engine(name=name, **changes) for name in ("left", "right")]
    gateway = Gateway(gateway_config(), list(engines))
    await gateway.start()
    async with serving(gateway) as url, httpx.AsyncClient(base_url=url, verify=False) as http:
        yield gateway, engines, http
    await gateway.stop()
    await gateway.stop()


async def test_router_spreads_requests_by_load() -> None:
    async with two_engines(times=StepTimes(d=0.01)) as (gateway, _, http):
        tasks = [asyncio.create_task(http.post(CHAT, json=chat())) for _ in range(8)]
        await eventually(lambda: sum(len(engine_queue.running) for engine_queue in gateway.engine_queues) == 8)
        assert [len(engine_queue.running) for engine_queue in gateway.engine_queues] == [4, 4]
        assert {(await task).status_code for task in tasks} == {200}


async def test_router_skips_a_dead_engine() -> None:
    async with two_engines(restart_s=30) as (_, engines, http):
        engines[0].crash()
        answers = [await http.post(CHAT, json=chat(), headers={"x-slo-report": "1"}) for _ in range(3)]
        assert {answer.json()["antares"]["engine"] for answer in answers} == {"right"}
        assert (await http.get("/ready")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200


async def test_waiting_request_moves_to_a_live_engine() -> None:
    async with two_engines(restart_s=30) as (gateway, engines, http):
        left = gateway.engine_queues[0]
        left.admission.policy = AdmitNone()
        task = asyncio.create_task(http.post(CHAT, json=chat(), headers={"x-slo-report": "1"}))
        await eventually(lambda: len(left.waiting) == 1)
        engines[0].crash()
        answer = await task
        assert (answer.status_code, answer.json()["antares"]["engine"]) == (200, "right")
        await eventually(lambda: gateway.ledger.open_count == 0)
