"""The router places each request on the least loaded engine that is alive."""

from __future__ import annotations

import asyncio

import pytest

from engine_adapter.simulated.engine import SimulatedEngine
from gateway.policies.registry import make_policy
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.engine_queue import Admitted, Draining, EngineDown, EngineQueue, Reroute
from gateway.scheduling.router import Router
from tests.fixtures.policy_builders import make_request


def router_of(count: int, policy: str = "fcfs") -> Router:
    queues = []
    for number in range(count):
        engine = SimulatedEngine(name=str(number))
        engine.state.alive = True
        queues.append(EngineQueue(engine, make_policy(policy), {"chat": SloClass("chat", Slo())}))
    return Router(queues)


def set_alive(engine_queue: EngineQueue, alive: bool) -> None:
    engine_queue.engine.state.alive = alive
    engine_queue.on_alive(alive)


def placed(router: Router) -> int:
    return router.engine_queues.index(router.place(make_request()))


@pytest.mark.parametrize("policy", ["fcfs", "slack"])
async def test_router_places_request_where_the_least_prefill_work_is(policy: str) -> None:
    router = router_of(3, policy)
    for engine_queue, prompt in zip(router.engine_queues, (300, 100, 200), strict=True):
        engine_queue.submit(make_request(str(prompt), prompt=prompt))
    assert placed(router) == 1
    router.engine_queues[1].submit(make_request("more", prompt=150))
    assert placed(router) == 2
    router.close()


async def test_router_compares_request_counts_when_the_work_is_equal() -> None:
    router = router_of(2)
    decoding = make_request("decoding", first_token_s=1.0)
    router.engine_queues[0].admission.running[decoding.id] = decoding
    assert placed(router) == 1
    router.close()


async def test_router_prefers_a_loaded_engine_to_one_that_is_down() -> None:
    router = router_of(2)
    router.engine_queues[0].submit(make_request(prompt=900))
    assert placed(router) == 1
    set_alive(router.engine_queues[1], False)
    assert (placed(router), router.alive) == (0, True)
    set_alive(router.engine_queues[0], False)
    assert not router.alive
    router.close()


@pytest.mark.parametrize("other_alive", [True, False])
async def test_requests_of_a_dead_engine_move_only_to_a_live_one(other_alive: bool) -> None:
    router = router_of(2)
    first, second = router.engine_queues
    set_alive(second, other_alive)
    set_alive(first, False)
    outcome = first.submit(make_request(at=-1000.0))
    assert isinstance(await asyncio.wait_for(outcome, 5), Reroute if other_alive else EngineDown)
    router.close()


async def test_queue_of_a_living_engine_serves_the_request() -> None:
    router = router_of(2)
    set_alive(router.engine_queues[0], False)
    engine_queue = router.place(request := make_request(at=0.0))
    outcome = engine_queue.submit(request)
    assert isinstance(await asyncio.wait_for(outcome, 5), Admitted)
    assert engine_queue is router.engine_queues[1]
    router.close()


async def test_close_answers_the_waiting_requests_of_every_engine() -> None:
    router = router_of(2)
    outcomes = [engine_queue.submit(make_request()) for engine_queue in router.engine_queues]
    router.close()
    assert [type(await outcome) for outcome in outcomes] == [Draining, Draining]
