"""Several engines behind one gateway: which one a request goes to, and what happens when one is down."""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.app import Gateway
from gateway.policies.base import Decision
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.admission import AdmissionController
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.placement import Load, load, ranks
from gateway.scheduling.router import Router
from gateway.scheduling.routing import ROUTINGS
from tests.fixtures.live_gateway import CHAT, chat, fast_engine, gateway_config, serving
from tests.fixtures.live_server import eventually
from tests.fixtures.policy_builders import NOW, engine, make_request

# --- load of an engine ------------------------------------------------------------------------------------------------


def load_with(policy: str, requests: list[Request], kv_tokens: int = 0) -> tuple[float, int]:
    admission = AdmissionController(make_policy(policy), engine(kv_tokens=kv_tokens))
    for request in requests:
        admission.submit(request)
    return load(admission, make_request("next"), 0.0)


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

    def load_of(cached: bool, waiting: int) -> Load:
        return load(queue_with(cached, waiting), chat, 0.0)

    assert load_of(cached=True, waiting=0) < load_of(cached=False, waiting=0)
    assert load_of(cached=True, waiting=1) < load_of(cached=False, waiting=1)
    assert load_of(cached=True, waiting=2) > load_of(cached=False, waiting=0)


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


@pytest.mark.parametrize("name", ROUTINGS)
async def test_every_routing_serves_and_survives_a_dead_engine(name: str) -> None:
    async with two_engines(restart_s=30) as (gateway, engines, http):
        gateway.reload(gateway_config(routing={"name": name}))
        assert (await http.post(CHAT, json=chat())).status_code == 200
        engines[0].crash()
        answers = [await http.post(CHAT, json=chat(), headers={"x-slo-report": "1"}) for _ in range(3)]
        assert {answer.json()["antares"]["engine"] for answer in answers} == {"right"}
        await eventually(lambda: gateway.ledger.open_count == 0)


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


# --- engines whose estimates differ -----------------------------------------------------------------------------------


def model_of(fixed_s: float, token_s: float, seed: int = 0, tokens: int = 1) -> StepTimeModel:
    """Return a model that has learned from lone prompts of ``tokens`` tokens, with 20% noise."""
    model, noise = StepTimeModel(), random.Random(seed)
    for _ in range(64):
        model.observe(0, tokens, 0.0, (fixed_s + token_s * tokens) * noise.lognormvariate(0, 0.2))
    return model


def shares(service_s: list[float], models: list[StepTimeModel], clients: int, prompt: int) -> list[float]:
    """Return each engine's share of 1000 requests by ``clients`` clients, as the router and `load` place them.

    An engine serves its requests side by side, each in its ``service_s`` seconds.
    """
    queues = [
        EngineQueue(SimulatedEngine(name=str(at)), make_policy("slack"), {"chat": SloClass("chat", Slo())})
        for at in range(len(models))
    ]
    for queue, model in zip(queues, models, strict=True):
        queue.engine.state.alive, queue.engine.state.step_time = True, model
    router, served = Router(queues), [0] * len(queues)
    ends: list[tuple[float, int, str]] = [(0.001 * number, -1, "") for number in range(clients)]
    for number in range(1000):
        now, at, name = heapq.heappop(ends)
        if name:
            del queues[at].admission.running[name]
        request = make_request(str(number), prompt=prompt, at=now, first_token_s=now)
        chosen = router.place(request)
        router.on_sent(chosen, request)
        at = queues.index(chosen)
        served[at] += 1
        chosen.admission.running[request.id] = request
        heapq.heappush(ends, (now + service_s[at], at, request.id))
    router.close()
    return [count / 1000 for count in served]


@pytest.mark.parametrize("clients", [2, 8, 40])
async def test_equal_engines_share_requests_although_only_one_has_learned(clients: int) -> None:
    for models in ([StepTimeModel(), model_of(1e-3, 1e-4)], [model_of(1e-3, 1e-4), StepTimeModel()]):
        assert min(shares([0.01, 0.01], models, clients, prompt=1)) > 0.4


@given(st.integers(1, 1000), st.integers(1, 400), st.floats(1e-5, 1e-3))
@settings(max_examples=15, deadline=None)
async def test_equal_engines_share_requests_although_their_estimates_differ(
    seed: int, tokens: int, token_s: float
) -> None:
    models = [model_of(2e-3, token_s, seed + at, tokens) for at in range(2)]
    assert min(shares([0.05, 0.05], models, clients=8, prompt=tokens)) > 0.4


@pytest.mark.parametrize("factor", [2, 4, 10])
async def test_slower_engine_gets_fewer_requests_but_is_not_forgotten(factor: int) -> None:
    models = [model_of(0.02, 1e-3, tokens=200), model_of(0.02 * factor, 1e-3 * factor, tokens=200)]
    fast, slow = shares([0.3, 0.3 * factor], models, clients=8, prompt=200)
    assert 0 < slow <= fast / factor * 1.2


async def test_estimate_that_no_request_tests_goes_out_of_date() -> None:
    models = [model_of(5.0, 1e-3), model_of(1e-3, 1e-4)]
    assert 0 < shares([0.01, 0.01], models, clients=1, prompt=1)[0] < 0.01


def test_passed_over_engine_is_not_tried_by_a_request_that_would_miss_its_deadline() -> None:
    admission = AdmissionController(make_policy("slack"), engine())
    requests = [make_request(prompt=1000, ttft=ttft) for ttft in (None, 5, 0.5)]
    loads = [load(admission, request, NOW, passed_over=10_000).work for request in requests]
    assert loads == pytest.approx([0, 0, 1])


@given(st.lists(st.builds(Load, st.floats(0, 10), st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=6))
def test_ranks_prefer_fewer_requests_only_within_the_errors(loads: list[Load]) -> None:
    keys = ranks(loads)
    best = loads[min(range(len(loads)), key=keys.__getitem__)]
    least = min(loads)
    assert best.work - least.work <= math.hypot(best.error, least.error)
    assert best.requests <= least.requests
    exact = [Load(work, requests) for work, requests, _ in loads]
    assert exact[min(range(len(exact)), key=ranks(exact).__getitem__)] == min(exact)
