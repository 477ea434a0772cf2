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
from gateway.scheduling.engine_queue import DECIDING_SHARE, PROBE_EVERY_S, Admitted, Clock, EngineDown, Lane


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


def lane_of(policy: Waits, clock: Clock = time.monotonic) -> Lane:
    engine = SimulatedEngine()
    engine.state.alive = True
    return Lane(engine, policy, {"chat": SloClass("chat", Slo())}, clock=clock)


async def turns(lane: Lane, count: int = 5) -> None:
    for _ in range(count):
        lane.wake()
        await asyncio.sleep(0)


async def test_steps_without_news_cost_no_decision() -> None:
    policy = Waits()
    lane = lane_of(policy)
    lane.submit(Request("a", "chat", 0.0, Slo(), 10, 10))
    await turns(lane)
    lane.submit(Request("b", "chat", 0.0, Slo(), 10, 10))
    await turns(lane)
    assert policy.asked == [1], "a full engine has no place for a newcomer either"
    lane.on_first_token()
    await turns(lane)
    assert policy.asked == [1, 2]
    lane.close()


async def test_whoever_waits_is_looked_at_again_before_long_even_if_nothing_happens() -> None:
    policy = Waits()
    lane = lane_of(policy)
    first = lane.submit(Request("a", "chat", 0.0, Slo(), 10, 10))
    await turns(lane)
    policy.opens = True
    assert isinstance(await asyncio.wait_for(first, 20 * LOOK_AGAIN_S), Admitted)
    lane.close()


async def test_who_comes_to_a_full_engine_where_nobody_waits_is_looked_at_before_long() -> None:
    policy = Waits()
    lane = lane_of(policy)
    gone = Request("gone", "chat", 0.0, Slo(), 10, 10)
    lane.submit(gone)
    await turns(lane)
    lane.admission.waiting.remove(gone)  # not as one who leaves: that would be news
    verdict = lane.submit(Request("new", "chat", 0.0, Slo(), 10, 10))
    await turns(lane)
    policy.opens = True
    assert isinstance(await asyncio.wait_for(verdict, 20 * LOOK_AGAIN_S), Admitted)
    lane.close()


def standing_lane(policy: Waits) -> Lane:
    """One runs, one waits; the lane's clock stands still."""
    lane = lane_of(policy, clock=lambda: 1000.0)
    running = Request("running", "chat", 0.0, Slo(), 10, 10)
    lane.admission.running[running.id] = running
    lane.submit(Request("a", "chat", 0.0, Slo(), 10, 10))
    return lane


async def test_news_while_a_decision_stands_is_seen_to_once_it_stands_no_more_not_only_when_one_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 7.0)
    policy = Waits(stands_s=0.3 * LOOK_AGAIN_S)
    lane = standing_lane(policy)
    await turns(lane)
    assert lane._timer_due_s == 1000.0 + LOOK_AGAIN_S
    lane.on_first_token()
    await turns(lane)
    assert policy.asked == [1], "it stands"
    assert lane._timer_due_s == pytest.approx(1000.0 + 0.3 * LOOK_AGAIN_S)
    lane.close()


async def test_deciding_takes_a_share_of_the_time_unless_the_engine_needs_it_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for took_s, rest_s in ((0.3 * LOOK_AGAIN_S * DECIDING_SHARE, 0.3 * LOOK_AGAIN_S), (1.0, 0.5 * LOOK_AGAIN_S)):
        ticks = itertools.count(7.0, took_s)
        monkeypatch.setattr(time, "perf_counter", lambda ticks=ticks: next(ticks))
        policy = Waits()
        lane = standing_lane(policy)
        await turns(lane)
        lane.on_first_token()
        await turns(lane)
        assert policy.asked == [1]
        assert lane._timer_due_s == pytest.approx(1000.0 + rest_s)
        lane.close()


class Refuses(Waits):
    """Admits ``who``, and refuses everybody else."""

    who = "welcome"

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        refused = [reject_tpot(request, 1.0, 0.0, hopeless=True) for request in waiting if request.id != self.who]
        return Decision(admit=[request for request in waiting if request.id == self.who], reject=refused)


async def test_an_idle_engine_that_refuses_is_doubted_but_not_if_it_has_just_learnt_from_somebody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, probes = [1000.0], [0]
    lane = lane_of(Refuses(), clock=lambda: now[0])

    async def probe() -> None:
        probes[0] += 1

    monkeypatch.setattr(lane.engine, "probe", probe)

    async def ask(name: str) -> object:
        verdict = lane.submit(Request(name, "chat", now[0], Slo(tpot_s=0.001), 10, 10))
        await turns(lane)
        return verdict.result()

    for _ in range(2):
        assert isinstance(await ask("impossible"), Rejection)
        assert probes == [1], "once in a while"
    step_time = lane.engine.state.step_time
    for _ in range(5):
        now[0] += 0.9 * PROBE_EVERY_S
        assert isinstance(await ask("welcome"), Admitted)
        step_time.curve = StepCurve.of(step_time.times)
        lane.leave(lane.running["welcome"])
        assert isinstance(await ask("impossible"), Rejection)
        assert probes == [1], "it learns from whom it serves"
    now[0] += 0.9 * PROBE_EVERY_S
    assert isinstance(await ask("welcome"), Admitted)
    lane.leave(lane.running["welcome"])
    now[0] += 0.2 * PROBE_EVERY_S
    await ask("impossible")
    assert probes == [2], "it served somebody, but learnt nothing"
    lane.close()


@pytest.mark.parametrize("slips", [False, True])
async def test_who_has_less_than_a_second_waits_for_an_engine_that_is_back_sooner_as_long_as_that_may_be(
    slips: bool,
) -> None:
    lane = lane_of(Waits(opens=True))
    lane.engine.state.alive, lane.engine.state.ready_in_s = False, 0.1
    lane.on_alive(False)
    verdict = lane.submit(Request("a", "chat", time.monotonic(), Slo(ttft_s=0.8), 10, 10))
    await turns(lane)
    assert not verdict.done()
    if slips:
        down = await asyncio.wait_for(verdict, 5)
        assert isinstance(down, EngineDown)
        assert down.retry_after_s == 1.0
    else:
        lane.engine.state.alive = True
        lane.on_alive(True)
        assert isinstance(await asyncio.wait_for(verdict, 5), Admitted)
    lane.close()
