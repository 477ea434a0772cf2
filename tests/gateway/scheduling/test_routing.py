"""Routing policies: which engine each one prefers, and that `headroom` keeps paces apart."""

from __future__ import annotations

import collections

import pytest

from engine_adapter.model_card import ModelCard
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.registry import make_policy
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling import headroom
from gateway.scheduling.engine_queue import EngineQueue
from gateway.scheduling.headroom import COMPARED, MEMORY_S, UNTESTED_S, PaceBands
from gateway.scheduling.router import Router
from gateway.scheduling.routing import ROUTINGS, LeastLoad, PrefixAffinity, make_routing
from tests.fixtures.policy_builders import make_request

A100 = StepTimes(b=6e-5, d=0.0125, alpha=6e-5, beta=0.0125)
"""Step times like those of an A100."""


class ManualClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def router_of(routing: str, count: int, clock: ManualClock | None = None, times: StepTimes = A100) -> Router:
    clock = clock or ManualClock()
    queues = []
    for number in range(count):
        engine = SimulatedEngine(name=str(number))
        engine.state.alive, engine.state.step_time = True, StepTimeModel(times=times)
        queues.append(EngineQueue(engine, make_policy("slack"), {"chat": SloClass("chat", Slo())}, clock=clock))
    return Router(queues, make_routing(routing), clock)


def send(router: Router, request: Request, runs: bool = True) -> int:
    """Place ``request``, note that it was sent, and have it decode there. Returns the engine's number."""
    queue = router.place(request)
    router.on_sent(queue, request)
    if runs:
        request.first_token_s = request.admitted_s = request.arrival_s
        queue.admission.running[request.id] = request
        queue.admission.capacity_changed()
    return int(queue.engine.name)


def request_at(number: int, paces: tuple[float, ...], since: float = 0.0) -> Request:
    """Return one of 50 requests a second, whose paces take turns."""
    pace_s = paces[number % len(paces)]
    return make_request(f"r{number}", prompt=200, output=100, at=since + number / 50, ttft=5.0, tpot=pace_s)


@pytest.mark.parametrize("name", ROUTINGS)
def test_routing_uses_every_idle_engine_and_none_that_is_down(name: str) -> None:
    router = router_of(name, 4)
    router.engine_queues[2].engine.state.alive = False
    used = {send(router, make_request(f"{number}", prompt=100, tpot=0.05)) for number in range(60)}
    assert used == {0, 1, 3}


def test_make_routing_lists_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"no routing is called 'random'.*headroom"):
        make_routing("random")


def test_round_robin_takes_turns() -> None:
    router = router_of("round_robin", 3)
    assert [send(router, make_request(f"{number}")) for number in range(6)] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", ["least_requests", "most_free_memory", "least_load"])
def test_routing_avoids_the_engine_with_a_request(name: str) -> None:
    router = router_of(name, 2)
    request = make_request("waits", prompt=500)
    router.engine_queues[0].admission.submit(request)
    assert send(router, make_request("next")) == 1


def test_power_of_two_depends_on_the_request_alone() -> None:
    router = router_of("power_of_two", 8)
    places = {router.place(make_request("same")).engine.name for _ in range(5)}
    assert len(places) == 1


@pytest.mark.parametrize("name", ["prefix_affinity", "headroom", "least_load"])
def test_routing_returns_a_chat_to_the_engine_with_its_history(name: str) -> None:
    router = router_of(name, 4)
    router.engine_queues[2].admission.prefixes.stored(range(60), 16)
    chat = make_request("chat", prompt=1000, tpot=0.05)
    chat.blocks, chat.block_tokens = tuple(range(60)), 16
    assert send(router, chat) == 2


def test_prefix_affinity_balances_engines_that_differ_too_much() -> None:
    router = router_of("prefix_affinity", 2)
    router.engine_queues[0].admission.prefixes.stored(range(60), 16)
    for number in range(80):
        other = make_request(f"{number}", first_token_s=0.0)
        router.engine_queues[0].admission.running[other.id] = other
    chat = make_request("chat", prompt=1000)
    chat.blocks, chat.block_tokens = tuple(range(60)), 16
    assert send(router, chat) == 1


def test_prefix_affinity_can_balance_earlier() -> None:
    router = router_of("prefix_affinity", 2)
    router.routing = PrefixAffinity(balanced_requests=4, balanced_ratio=1.1)
    router.engine_queues[0].admission.prefixes.stored(range(60), 16)
    places = []
    for number in range(8):
        chat = make_request(f"{number}", prompt=1000)
        chat.blocks, chat.block_tokens = tuple(range(60)), 16
        places.append(send(router, chat))
    assert places == [0, 0, 0, 0, 0, 1, 0, 1]


def test_least_load_counts_requests_of_each_pool_apart() -> None:
    routing, router = LeastLoad(), router_of("least_load", 2)
    first, second = router.engine_queues
    asked = make_request("a", prompt=1000)
    before = routing.keys(asked, [first, second])
    for number in range(600):
        routing.on_sent(make_request(f"{number}", pool="other"), first)
    assert routing.keys(asked, [first, second]) == before
    for number in range(600):
        routing.on_sent(make_request(f"{number}"), first)
    assert routing.keys(asked, [first, second])[1] < before[1], "the estimate of the second engine is out of date"


# --- headroom ---------------------------------------------------------------------------------------------------------


def placed_by_pace(
    router: Router, clock: ManualClock, count: int, paces: tuple[float, ...], since: float = 0.0
) -> dict[float, set[int]]:
    """Send ``count`` requests, which end after 2 s; return the engines of each pace in the second half."""
    running: collections.deque[tuple[float, Request, int]] = collections.deque()
    engines: dict[float, set[int]] = {pace: set() for pace in paces}
    for number in range(count):
        request = request_at(number, paces, since)
        clock.now = request.arrival_s
        while running and running[0][0] <= clock.now:
            _, ended, at = running.popleft()
            router.engine_queues[at].admission.leave(ended)
        at = send(router, request)
        running.append((clock.now + 2.0, request, at))
        if number > count / 2:
            engines[request.pace_s or 0.0].add(at)
    return engines


def test_headroom_keeps_paces_apart() -> None:
    clock = ManualClock()
    engines = placed_by_pace(router_of("headroom", 8, clock), clock, 600, (0.03, 0.05))
    assert len(engines[0.03] & engines[0.05]) <= 1
    assert len(engines[0.03]) > len(engines[0.05]) - 1, "the tight pace needs more engines for the same tokens"
    assert engines[0.03] | engines[0.05] == set(range(8))


def bands_after(requests: list[Request]) -> list[tuple[int, int]]:
    """Return the bands of the last two of ``requests``, which 8 engines get at once: that of the last one first."""
    queues, bands = router_of("headroom", 8).engine_queues, PaceBands()
    for request in requests:
        bands.of(request, queues, 0.0)
        bands.note(request)
    return [bands.of(request, queues, 0.0) for request in requests[:-3:-1]]


def test_headroom_divides_the_engines_with_the_first_requests() -> None:
    tight, loose = make_request("tight", tpot=0.03), make_request("loose", tpot=0.05)
    assert bands_after([tight, loose] * 2) == [(4, 8), (0, 5)]


def test_headroom_gives_a_pace_that_is_new_a_band_at_once() -> None:
    clock = ManualClock()
    router = router_of("headroom", 8, clock)
    placed_by_pace(router, clock, 600, (0.05,))
    used = [send(router, make_request(f"tight {number}", tpot=0.03, at=clock.now)) for number in range(3)]
    assert used == [0, 0, 0], "the others keep their steps"
    many = {send(router, make_request(f"more {number}", tpot=0.03, at=clock.now)) for number in range(300)}
    assert len(many) > 1, "the band grows with its work"


def test_headroom_forgets_what_came_while_there_was_one_engine() -> None:
    clock = ManualClock()
    queues, bands = router_of("headroom", 8, clock).engine_queues, PaceBands()
    for number in range(1000):
        bands.note(make_request(f"{number}", tpot=0.05))
    tight = make_request("tight", tpot=0.03)
    bands.of(tight, queues, clock.now)
    bands.note(tight)
    assert bands.of(tight, queues, clock.now) == (0, 8)


def test_headroom_keeps_paces_apart_whatever_name_a_client_uses_for_the_model() -> None:
    clock = ManualClock()
    router = router_of("headroom", 8, clock)
    for queue in router.engine_queues:
        queue.engine.state.set_models([ModelCard("llama")])
        queue.engine.state.aliases = {"chat": "llama"}
    engines: dict[float, set[int]] = {0.03: set(), 0.05: set()}
    for number in range(600):
        request = request_at(number, (0.03, 0.05))
        request.requested_model = "chat" if request.pace_s == 0.03 else "llama"
        clock.now = request.arrival_s
        engines[request.pace_s or 0.0].add(send(router, request, runs=False))
    assert len(engines[0.03] & engines[0.05]) <= 1


def test_headroom_leaves_no_engines_to_a_pace_that_none_can_keep() -> None:
    impossible, tight = make_request("impossible", tpot=0.010), make_request("tight", tpot=0.03)
    assert bands_after([impossible, tight] * 20) == [(0, 8), (0, 1)]


def test_headroom_gives_a_single_pace_every_engine() -> None:
    clock = ManualClock()
    assert placed_by_pace(router_of("headroom", 4, clock), clock, 400, (0.05,))[0.05] == {0, 1, 2, 3}


def test_headroom_serves_a_tight_pace_on_the_engines_with_short_steps() -> None:
    clock = ManualClock()
    router = router_of("headroom", 4, clock)
    for number in (1, 3):
        router.engine_queues[number].engine.state.step_time = StepTimeModel(
            times=StepTimes(b=2e-5, d=0.006, alpha=2e-5, beta=0.006)
        )
    engines = placed_by_pace(router, clock, 400, (0.03, 0.05))
    assert engines[0.03] <= {1, 3}
    assert not engines[0.05] & {1}


def test_headroom_moves_the_edge_with_the_mix() -> None:
    clock = ManualClock()
    router = router_of("headroom", 8, clock)
    mostly_loose, mostly_tight = (0.03, 0.05, 0.05, 0.05, 0.05, 0.05), (0.03, 0.03, 0.03, 0.03, 0.03, 0.05)
    assert len(placed_by_pace(router, clock, 600, mostly_loose)[0.03]) <= 3
    for queue in router.engine_queues:
        queue.admission.running.clear()
        queue.admission.capacity_changed()
    # 60 s later in the same pool: the requests of the other mix have faded.
    assert len(placed_by_pace(router, clock, 3000, mostly_tight, since=clock.now)[0.03]) >= 6


def test_headroom_of_a_full_pool_takes_few_requests_but_no_looser_pace() -> None:
    clock = ManualClock()
    router = router_of("headroom", 2, clock)
    placed_by_pace(router, clock, 200, (0.03, 0.05, 0.05))
    tight, loose = router.engine_queues
    for queue, pace, count in ((tight, 0.03, 300), (loose, 0.05, 250)):
        for number in range(count):
            other = make_request(f"{pace} {number}", prompt=3000, tpot=pace, first_token_s=0.0)
            queue.admission.running[other.id] = other
        queue.admission.capacity_changed()
    loose.engine.state.max_num_seqs = tight.engine.state.max_num_seqs = 280
    waits = [make_request(f"waits {pace}", tpot=pace, at=clock.now) for pace in (0.03, 0.05)]
    assert [router.place(request).engine.name for request in waits] == ["0", "1"]
    for number in range(20):
        loose.admission.submit(make_request(f"more {number}", tpot=0.05, at=clock.now))
    assert [router.place(request).engine.name for request in waits] == ["0", "0"]


def test_headroom_takes_an_engine_outside_the_band_that_has_ample_room() -> None:
    clock = ManualClock()
    router = router_of("headroom", 2, clock)
    placed_by_pace(router, clock, 200, (0.03, 0.05))
    tight = router.engine_queues[0]
    for queue in router.engine_queues:
        queue.admission.running.clear()
        queue.admission.capacity_changed()
    tight.engine.state.max_num_seqs = 1
    busy = make_request("busy", tpot=0.03, first_token_s=0.0)
    tight.admission.running[busy.id] = busy
    tight.admission.capacity_changed()
    assert router.place(make_request("tight", tpot=0.03, at=clock.now)) is router.engine_queues[1]


def names_of(bands: PaceBands) -> list[str]:
    return [queue.engine.name for queue in bands.ordered]


def test_headroom_order_ignores_noise_of_equal_engines() -> None:
    clock = ManualClock()
    queues = router_of("headroom", 3, clock).engine_queues
    bands = PaceBands()
    bands.of(make_request(tpot=0.03), queues, clock.now)
    before = names_of(bands)
    for queue, factor in zip(queues, (1.1, 1.0, 0.95), strict=True):
        queue.engine.state.step_time = StepTimeModel(times=StepTimes(d=0.0125 * factor, b=6e-5, alpha=6e-5))
    clock.now += MEMORY_S
    bands.of(make_request(tpot=0.03), queues, clock.now)
    assert names_of(bands) == before


def test_headroom_gives_an_engine_that_was_missing_its_place_back() -> None:
    clock = ManualClock()
    queues = router_of("headroom", 4, clock).engine_queues
    bands, request = PaceBands(), make_request(tpot=0.03)
    bands.of(request, queues, clock.now)
    before = names_of(bands)
    bands.of(request, queues[1:], clock.now)
    assert names_of(bands) == ["1", "2", "3"]
    bands.of(request, queues, clock.now)
    assert names_of(bands) == before


def test_headroom_tries_an_idle_engine_whose_estimate_is_out_of_date() -> None:
    clock = ManualClock()
    router = router_of("headroom", 2, clock)
    slow = StepTimes(b=6e-5, d=0.04, alpha=6e-5, beta=0.04)
    router.engine_queues[0].engine.state.step_time = StepTimeModel(times=slow)
    used = []
    for number in range(100):
        clock.now = 1.0 * number
        used.append(send(router, make_request(f"{number}", prompt=100, tpot=0.1, at=clock.now), runs=False))
    assert 1 <= used.count(0) <= 4
    tight = make_request("tight", prompt=100, tpot=0.03, at=clock.now + 2 * UNTESTED_S)
    clock.now = tight.arrival_s
    assert send(router, tight, runs=False) == 1, "the slow engine cannot keep its pace by any estimate"


def test_headroom_compares_a_few_engines_and_the_one_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = headroom._judge
    router = router_of("headroom", 6 * COMPARED)
    chat = make_request("chat", prompt=1000, tpot=0.05)
    chat.blocks, chat.block_tokens = tuple(range(60)), 16
    at = send(router, chat, runs=False)
    router.engine_queues[at].admission.prefixes.stored(range(60), 16)
    compared: list[EngineQueue] = []

    def counting_judge(request: Request, queue: EngineQueue, now: float, looser: bool) -> headroom._Judged:
        compared.append(queue)
        return judge(request, queue, now, looser)

    monkeypatch.setattr(headroom, "_judge", counting_judge)
    for number in range(20):
        turn = make_request(f"turn {number}", prompt=1100, tpot=0.05)
        turn.blocks, turn.block_tokens = tuple(range(66)), 16
        compared.clear()
        assert router.engine_queues.index(router.place(turn)) == at
        assert len(compared) <= COMPARED
