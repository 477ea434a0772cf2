"""The router places each request on the least loaded engine that is alive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

import pytest

from engine_adapter.engine import EngineState
from engine_adapter.model_card import ModelCard
from engine_adapter.simulated.engine import SimulatedEngine
from gateway.policies.base import Decision
from gateway.policies.fcfs import Fcfs
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.circuit_breaker import FAILURES_TO_OPEN
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.queue_outcome import Admitted, Draining, EngineDown, QueueOutcome, Reroute
from gateway.scheduling.router import MAX_OWNED, Router
from tests.fixtures.live_server import HANG_S
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
    assert isinstance(await asyncio.wait_for(outcome, HANG_S), Reroute if other_alive else EngineDown)
    router.close()


async def test_queue_of_a_living_engine_serves_the_request() -> None:
    router = router_of(2)
    set_alive(router.engine_queues[0], False)
    engine_queue = router.place(request := make_request(at=0.0))
    outcome = engine_queue.submit(request)
    assert isinstance(await asyncio.wait_for(outcome, HANG_S), Admitted)
    assert engine_queue is router.engine_queues[1]
    router.close()


async def test_close_answers_the_waiting_requests_of_every_engine() -> None:
    router = router_of(2)
    outcomes = [engine_queue.submit(make_request()) for engine_queue in router.engine_queues]
    router.close()
    assert [type(await outcome) for outcome in outcomes] == [Draining, Draining]


class Closed(Fcfs):
    """Admits nothing."""

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Return an empty decision."""
        return Decision()


def closed(router: Router) -> list[EngineQueue]:
    """Let requests wait for every engine."""
    for engine_queue in router.engine_queues:
        engine_queue.set_policy(Closed())
    return router.engine_queues


def joining(name: str, alive: bool = True, *models: str) -> EngineQueue:
    engine = SimulatedEngine(name=name)
    engine.state.alive = alive
    if models:
        engine.state.set_models([ModelCard(model) for model in models])
    return EngineQueue(engine, make_policy("fcfs"), {"chat": SloClass("chat", Slo())})


async def moved(outcomes: dict[str, asyncio.Future[QueueOutcome]]) -> set[str]:
    """Return the names of the requests that were told to move."""
    await asyncio.sleep(0.05)
    return {name for name, outcome in outcomes.items() if outcome.done() and isinstance(outcome.result(), Reroute)}


async def test_engine_that_joins_or_is_back_is_offered_its_share_of_the_waiting_requests() -> None:
    router = router_of(2)
    closed(router)
    queues = router.engine_queues
    outcomes = {str(n): queues[n % 2].submit(make_request(str(n), at=float(n))) for n in range(12)}
    third = joining("third", alive=False)
    router.join(third)
    assert await moved(outcomes) == set(), "it is not up yet"
    set_alive(third, True)
    router.offer(third)
    # Those of the first engine come first, in order: 0, 2, 4 and so on.
    assert await moved(outcomes) == {"4", "10", "5", "11"}
    router.offer(joining("not a member"))
    assert len(await moved(outcomes)) == 4
    router.close()


async def test_engine_is_not_offered_what_it_cannot_serve() -> None:
    router = router_of(2)
    closed(router)
    one, two = router.engine_queues
    one.engine.state.set_models([ModelCard("one")])
    two.engine.state.set_models([ModelCard("two")])
    requests = {
        "other model": (one, make_request("a", requested_model="one")),
        "model of no engine": (one, make_request("b", requested_model="none")),
        "failed there": (two, make_request("c", requested_model="two", failed_on=("third",))),
        "pinned": (two, make_request("d", requested_model="two", pinned_to=two.engine.name)),
        "first": (two, make_request("e", requested_model="two")),
        "second": (two, make_request("f", requested_model="two")),
    }
    outcomes = {name: queue.submit(request) for name, (queue, request) in requests.items()}
    router.join(joining("third", True, "two"))
    assert await moved(outcomes) == {"second"}
    router.close()


def test_models_of_the_same_engines_have_one_pool() -> None:
    router = router_of(3)
    for engine_queue in router.engine_queues:
        engine_queue.engine.state.set_models([ModelCard("llama"), ModelCard("adapter")])
        engine_queue.engine.state.aliases = {"chat": "llama"}
    router.engine_queues[2].engine.state.set_models([ModelCard("llama")])
    pools = {}
    for model in ("", "llama", "chat", "adapter"):
        request = make_request(model, requested_model=model)
        router.place(request)
        pools[model] = request.pool
    assert pools == {"": "llama", "llama": "llama", "chat": "llama", "adapter": "adapter"}
    pinned = make_request("pinned", requested_model="chat", pinned_to="1")
    router.place(pinned)
    assert pinned.pool == "llama"


def test_aliases_that_hide_the_names_of_models_still_have_pools() -> None:
    router = router_of(2)
    first, second = (queue.engine.state for queue in router.engine_queues)
    first.set_models([ModelCard("b"), ModelCard("a")])
    first.aliases = {"b": "not loaded", "base": "b"}
    second.set_models([ModelCard("a"), ModelCard("b")])
    for model, engines in (("a", 2), ("b", 1), ("base", 1)):
        request = make_request(model, requested_model=model)
        router.place(request)
        assert (len(router.pool(model)), request.pool != "") == (engines, True)


# --- engines that rest ------------------------------------------------------------------------------------------------


def rest(router: Router, index: int) -> None:
    now = time.monotonic()
    for _ in range(FAILURES_TO_OPEN):
        router.on_failure(router.engine_queues[index], "http_503", now)


async def test_router_avoids_an_idle_engine_that_rests() -> None:
    router = router_of(2)
    router.engine_queues[1].submit(make_request("busy", prompt=5000))
    assert placed(router) == 0
    rest(router, 0)
    assert placed(router) == 1
    router.close()


async def test_requests_waiting_for_an_engine_move_when_it_rests() -> None:
    router = router_of(2)
    first = router.engine_queues[0]
    outcome = first.submit(make_request("waits"))
    rest(router, 0)
    assert isinstance(await asyncio.wait_for(outcome, HANG_S), Reroute)
    assert not first.waiting
    router.close()


async def test_pool_that_rests_gets_requests_where_the_rest_ends_first() -> None:
    router = router_of(3)
    for index in (2, 0, 1):
        rest(router, index)
    router.engine_queues[0].circuit.back_at += 5
    assert placed(router) == 2
    outcome = router.engine_queues[2].submit(make_request())
    assert isinstance(await asyncio.wait_for(outcome, HANG_S), Admitted), "they are not sent around in a circle"
    router.close()


async def test_request_of_a_dead_engine_moves_to_one_that_rests() -> None:
    router = router_of(2)
    rest(router, 1)
    set_alive(router.engine_queues[0], False)
    outcome = router.engine_queues[0].submit(make_request(at=time.monotonic()))
    assert isinstance(await asyncio.wait_for(outcome, HANG_S), Reroute)
    assert placed(router) == 1
    router.close()


async def test_request_avoids_engines_that_failed_it_and_engines_of_other_models() -> None:
    router = router_of(3)
    router.engine_queues[1].engine.state.set_models([ModelCard("other")])
    request = make_request(requested_model="simulated")
    assert router.place(request) is router.engine_queues[0]
    request.failed_on = ("0",)
    assert router.place(request) is router.engine_queues[2]
    assert router.others(request) == [router.engine_queues[2]]
    request.failed_on = ("0", "2")
    assert router.place(request) in (router.engine_queues[0], router.engine_queues[2])
    assert router.others(request) == []
    router.close()


async def test_owners_of_stored_responses_are_bounded_and_pin_requests() -> None:
    router = router_of(2)
    for number in range(MAX_OWNED + 1):
        router.remember_owner(f"resp_{number}", "1")
    assert (router.owner_of("resp_0"), router.owner_of(f"resp_{MAX_OWNED}")) == ("", "1")
    request = make_request(pinned_to="1")
    assert router.place(request) is router.engine_queues[1]
    assert router.others(request) == [router.engine_queues[1]]
    router.close()
