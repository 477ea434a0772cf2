"""A lane has its policy decide when there is news, and looks again by itself while anybody waits."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import pytest

from engine_adapter.engine import EngineState
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.curve import StepCurve
from gateway.policies.base import LOOK_AGAIN_S, Decision, Rejection, reject_tpot
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.engine_queue import DECIDING_SHARE, PROBE_EVERY_S, Admitted, Clock, EngineDown, EngineQueue


@dataclass
class Waits:
    """Admits all that waits once ``opens``; until then the engine is full."""

    opens: bool = False
    stands_s: float = 0.0
    asked: list[int] = field(default_factory=list)
    name: str = "waits"
    gate: str = "open"

    def order(self, request: Request) -> tuple[float, ...]:
        return (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        self.asked.append(len(waiting))
        if self.opens:
            return Decision(admit=list(waiting))
        return Decision(fits=lambda request: False, stands_s=self.stands_s, lasts_s=0.5 * LOOK_AGAIN_S)


def lane_of(policy: Waits, clock: Clock = time.monotonic) -> EngineQueue:
    engine = SimulatedEngine()
    engine.state.alive = True
    return EngineQueue(engine, policy, {"chat": SloClass("chat", Slo())}, clock=clock)


async def turns(engine_queue: EngineQueue, count: int = 5) -> None:
    for _ in range(count):
        engine_queue.wake()
        await asyncio.sleep(0)


async def test_steps_without_news_cost_no_decision() -> None:
    policy = Waits()
    engine_queue = lane_of(policy)
    engine_queue.submit(Request("a", "chat", 0.0, Slo(), 10, 10))
    await turns(engine_queue)
    engine_queue.submit(Request("b", "chat", 0.0, Slo(), 10, 10))
    await turns(engine_queue)
    assert policy.asked == [1], "a full engine has no place for a newcomer either"
    engine_queue.on_first_token()
    await turns(engine_queue)
    assert policy.asked == [1, 2]
    engine_queue.close()


async def test_whoever_waits_is_looked_at_again_before_long_even_if_nothing_happens() -> None:
    policy = Waits()
    engine_queue = lane_of(policy)
    first = engine_queue.submit(Request("a", "chat", 0.0, Slo(), 10, 10))
    await turns(engine_queue)
    policy.opens = True
    assert isinstance(await asyncio.wait_for(first, 20 * LOOK_AGAIN_S), Admitted)
    engine_queue.close()


async def test_who_comes_to_a_full_engine_where_nobody_waits_is_looked_at_before_long() -> None:
    policy = Waits()
    engine_queue = lane_of(policy)
    gone = Request("gone", "chat", 0.0, Slo(), 10, 10)
    engine_queue.submit(gone)
    await turns(engine_queue)
    engine_queue.admission.waiting.remove(gone)  # not as one who leaves: that would be news
    slo_report = engine_queue.submit(Request("new", "chat", 0.0, Slo(), 10, 10))
    await turns(engine_queue)
    policy.opens = True
    assert isinstance(await asyncio.wait_for(slo_report, 20 * LOOK_AGAIN_S), Admitted)
    engine_queue.close()


def standing_lane(policy: Waits) -> EngineQueue:
    """One runs, one waits; the lane's clock stands still."""
    engine_queue = lane_of(policy, clock=lambda: 1000.0)
    running = Request("running", "chat", 0.0, Slo(), 10, 10)
    engine_queue.admission.running[running.id] = running
    engine_queue.submit(Request("a", "chat", 0.0, Slo(), 10, 10))
    return engine_queue


async def test_news_while_a_decision_stands_is_seen_to_once_it_stands_no_more_not_only_when_one_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 7.0)
    policy = Waits(stands_s=0.3 * LOOK_AGAIN_S)
    engine_queue = standing_lane(policy)
    await turns(engine_queue)
    assert engine_queue._timer_due_s == 1000.0 + LOOK_AGAIN_S
    engine_queue.on_first_token()
    await turns(engine_queue)
    assert policy.asked == [1], "it stands"
    assert engine_queue._timer_due_s == pytest.approx(1000.0 + 0.3 * LOOK_AGAIN_S)
    engine_queue.close()


async def test_deciding_takes_a_share_of_the_time_unless_the_engine_needs_it_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for took_s, rest_s in ((0.3 * LOOK_AGAIN_S * DECIDING_SHARE, 0.3 * LOOK_AGAIN_S), (1.0, 0.5 * LOOK_AGAIN_S)):
        ticks = itertools.count(7.0, took_s)
        monkeypatch.setattr(time, "perf_counter", lambda ticks=ticks: next(ticks))
        policy = Waits()
        engine_queue = standing_lane(policy)
        await turns(engine_queue)
        engine_queue.on_first_token()
        await turns(engine_queue)
        assert policy.asked == [1]
        assert engine_queue._timer_due_s == pytest.approx(1000.0 + rest_s)
        engine_queue.close()


class Refuses(Waits):
    """Admits ``who``, and refuses everybody else."""

    who = "welcome"

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        refused = [reject_tpot(request, 1.0, 0.0, infeasible=True) for request in waiting if request.id != self.who]
        return Decision(admit=[request for request in waiting if request.id == self.who], reject=refused)


async def test_an_idle_engine_that_refuses_is_doubted_but_not_if_it_has_just_learnt_from_somebody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, probes = [1000.0], [0]
    engine_queue = lane_of(Refuses(), clock=lambda: now[0])

    async def probe() -> None:
        probes[0] += 1

    monkeypatch.setattr(engine_queue.engine, "probe", probe)

    async def ask(name: str) -> object:
        slo_report = engine_queue.submit(Request(name, "chat", now[0], Slo(tpot_s=0.001), 10, 10))
        await turns(engine_queue)
        return slo_report.result()

    for _ in range(2):
        assert isinstance(await ask("impossible"), Rejection)
        assert probes == [1], "once in a while"
    step_time = engine_queue.engine.state.step_time
    for _ in range(5):
        now[0] += 0.9 * PROBE_EVERY_S
        assert isinstance(await ask("welcome"), Admitted)
        step_time.curve = StepCurve.of(step_time.times)
        engine_queue.leave(engine_queue.running["welcome"])
        assert isinstance(await ask("impossible"), Rejection)
        assert probes == [1], "it learns from whom it serves"
    now[0] += 0.9 * PROBE_EVERY_S
    assert isinstance(await ask("welcome"), Admitted)
    engine_queue.leave(engine_queue.running["welcome"])
    now[0] += 0.2 * PROBE_EVERY_S
    await ask("impossible")
    assert probes == [2], "it served somebody, but learnt nothing"
    engine_queue.close()


@pytest.mark.parametrize("slips", [False, True])
async def test_who_has_less_than_a_second_waits_for_an_engine_that_is_back_sooner_as_long_as_that_may_be(
    slips: bool,
) -> None:
    engine_queue = lane_of(Waits(opens=True))
    engine_queue.engine.state.alive, engine_queue.engine.state.ready_in_s = False, 0.1
    engine_queue.on_alive(False)
    slo_report = engine_queue.submit(Request("a", "chat", time.monotonic(), Slo(ttft_s=0.8), 10, 10))
    await turns(engine_queue)
    assert not slo_report.done()
    if slips:
        down = await asyncio.wait_for(slo_report, 5)
        assert isinstance(down, EngineDown)
        assert down.retry_after_s == 1.0
    else:
        engine_queue.engine.state.alive = True
        engine_queue.on_alive(True)
        assert isinstance(await asyncio.wait_for(slo_report, 5), Admitted)
    engine_queue.close()
