"""An engine's queue asks its policy after changes, and by itself while requests wait."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine_adapter.engine import EngineState
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.curve import StepCurve
from gateway.policies.base import MAX_DECISION_INTERVAL_S, Decision, Rejection, reject_tpot
from gateway.requests.request import Request
from gateway.requests.slo import Slo, SloClass
from gateway.scheduling.decision_schedule import MAX_DECIDING_SHARE
from gateway.scheduling.engine_queue import PROBE_INTERVAL_S, Clock, EngineQueue
from gateway.scheduling.queue_outcome import Admitted, Draining, EngineDown, QueueFull
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.policy_builders import make_request

NOW = 1000.0


@dataclass
class Closed:
    """Keeps all requests waiting until ``opens``, and then admits them all. Records how many waited at each call."""

    opens: bool = False
    hold_s: float = 0.0
    calls: list[int] = field(default_factory=list)
    name: str = "closed"
    gate: str = "open"

    def order(self, request: Request) -> tuple[float, ...]:
        return (request.arrival_s,)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        self.calls.append(len(waiting))
        if self.opens:
            return Decision(admit=list(waiting))
        return Decision(hold_s=self.hold_s, max_hold_s=0.5 * MAX_DECISION_INTERVAL_S)


def queue_of(policy: Closed, clock: Clock = time.monotonic) -> EngineQueue:
    engine = SimulatedEngine()
    engine.state.alive = True
    return EngineQueue(engine, policy, {"chat": SloClass("chat", Slo())}, clock=clock)


def busy_queue(policy: Closed) -> EngineQueue:
    """Return a queue with one running and one waiting request. Its clock stands still at `NOW`."""
    engine_queue = queue_of(policy, clock=lambda: NOW)
    engine_queue.admission.running["running"] = make_request("running", at=0.0)
    engine_queue.submit(make_request("a", at=0.0))
    return engine_queue


async def turns(engine_queue: EngineQueue, count: int = 5) -> None:
    """Wake the queue in each of ``count`` iterations of the event loop."""
    for _ in range(count):
        engine_queue.wake()
        await asyncio.sleep(0)


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the delay (s) of each timer that is set."""
    loop, delays = asyncio.get_running_loop(), []
    call_later = loop.call_later

    def recorded(delay: float, *args: Any, **options: Any) -> asyncio.TimerHandle:
        delays.append(delay)
        return call_later(delay, *args, **options)

    monkeypatch.setattr(loop, "call_later", recorded)
    return delays


@pytest.fixture
def deciding_takes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that sets how many seconds each decision takes."""

    def set_cost(seconds: float) -> None:
        ticks = itertools.count(7.0, seconds)
        monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))

    return set_cost


async def test_engine_queue_decides_once_for_all_events_of_an_iteration() -> None:
    policy = Closed()
    engine_queue = queue_of(policy)
    for name in "abc":
        engine_queue.submit(make_request(name, at=0.0))
    await asyncio.sleep(0)
    assert policy.calls == [3]
    engine_queue.close()


async def test_engine_queue_does_not_decide_without_a_change(deciding_takes: Any) -> None:
    deciding_takes(0.0)
    policy = Closed()
    engine_queue = busy_queue(policy)
    await turns(engine_queue)
    assert policy.calls == [1]
    engine_queue.submit(make_request("b", at=0.0))
    await turns(engine_queue)
    assert policy.calls == [1, 2]
    engine_queue.on_first_token(engine_queue.running["running"])
    await turns(engine_queue)
    assert policy.calls == [1, 2, 2]
    engine_queue.close()


async def test_waiting_request_is_decided_again_without_a_change() -> None:
    policy = Closed()
    engine_queue = queue_of(policy)
    outcome = engine_queue.submit(make_request(at=0.0))
    await asyncio.sleep(0)
    assert policy.calls == [1]
    policy.opens = True
    assert isinstance(await asyncio.wait_for(outcome, HANG_S), Admitted)
    engine_queue.close()


async def test_arrival_at_an_empty_queue_is_decided_at_once_despite_a_hold() -> None:
    policy = Closed(hold_s=60.0)
    engine_queue = busy_queue(policy)
    await turns(engine_queue)
    engine_queue.withdraw(engine_queue.waiting[0])
    policy.opens = True
    outcome = engine_queue.submit(make_request("new", at=0.0))
    await turns(engine_queue)
    assert isinstance(outcome.result(), Admitted)
    engine_queue.close()


async def test_change_during_a_hold_is_decided_when_it_ends(deciding_takes: Any, timers: list[float]) -> None:
    deciding_takes(0.0)
    policy = Closed(hold_s=0.3 * MAX_DECISION_INTERVAL_S)
    engine_queue = busy_queue(policy)
    await turns(engine_queue)
    assert timers == [pytest.approx(MAX_DECISION_INTERVAL_S)]
    engine_queue.on_first_token(engine_queue.running["running"])
    await turns(engine_queue)
    assert policy.calls == [1]
    assert timers[1:] == [pytest.approx(0.3 * MAX_DECISION_INTERVAL_S)]
    engine_queue.on_first_token(engine_queue.running["running"])
    await turns(engine_queue)
    assert len(timers) == 2, "the timer is set already"
    engine_queue.close()


@pytest.mark.parametrize(
    ("cost_s", "hold_s"),
    [
        (0.3 * MAX_DECISION_INTERVAL_S * MAX_DECIDING_SHARE, 0.3 * MAX_DECISION_INTERVAL_S),
        (1.0, 0.5 * MAX_DECISION_INTERVAL_S),  # the policy's max_hold_s
    ],
)
async def test_deciding_takes_a_bounded_share_of_time(
    deciding_takes: Any, timers: list[float], cost_s: float, hold_s: float
) -> None:
    deciding_takes(cost_s)
    policy = Closed()
    engine_queue = busy_queue(policy)
    await turns(engine_queue)
    engine_queue.on_first_token(engine_queue.running["running"])
    await turns(engine_queue)
    assert policy.calls == [1]
    assert timers[-1] == pytest.approx(hold_s)
    assert (engine_queue.decisions, engine_queue.deciding_s) == (1, pytest.approx(cost_s))
    engine_queue.close()


class RejectsOthers(Closed):
    """Admits the request called ``accepted`` and rejects all others."""

    accepted = "accepted"

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        rejections = [
            reject_tpot(request, 1.0, 0.0, infeasible=True) for request in waiting if not self._takes(request)
        ]
        return Decision(admit=[request for request in waiting if self._takes(request)], reject=rejections)

    def _takes(self, request: Request) -> bool:
        return request.id == self.accepted


async def test_idle_engine_that_rejects_is_probed_unless_step_times_just_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, probes = [NOW], [0]
    engine_queue = queue_of(RejectsOthers(), clock=lambda: now[0])

    async def probe() -> None:
        probes[0] += 1

    monkeypatch.setattr(engine_queue.engine, "probe", probe)

    async def outcome_of(name: str) -> object:
        outcome = engine_queue.submit(make_request(name, at=now[0], tpot=0.001))
        await turns(engine_queue)
        return outcome.result()

    for _ in range(2):
        assert isinstance(await outcome_of("impossible"), Rejection)
        assert probes == [1], "one probe in each interval"
    step_time = engine_queue.engine.state.step_time
    for _ in range(5):
        now[0] += 0.9 * PROBE_INTERVAL_S
        assert isinstance(await outcome_of("accepted"), Admitted)
        step_time.curve = StepCurve.of(step_time.times)
        engine_queue.leave(engine_queue.running["accepted"])
        assert isinstance(await outcome_of("impossible"), Rejection)
        assert probes == [1], "the model learned from the request that was served"
    now[0] += 0.9 * PROBE_INTERVAL_S
    assert isinstance(await outcome_of("accepted"), Admitted)
    engine_queue.leave(engine_queue.running["accepted"])
    now[0] += 0.2 * PROBE_INTERVAL_S
    await outcome_of("impossible")
    assert probes == [2], "the model learned nothing from that request"
    engine_queue.close()


@pytest.mark.parametrize("overdue", [False, True])
async def test_request_waits_for_an_engine_that_may_be_back_before_its_deadline(overdue: bool) -> None:
    engine_queue = queue_of(Closed(opens=True))
    engine_queue.engine.state.alive, engine_queue.engine.state.ready_in_s = False, 0.1
    engine_queue.on_alive(False)
    outcome = engine_queue.submit(make_request(at=time.monotonic(), ttft=0.8))
    await turns(engine_queue)
    assert not outcome.done()
    if overdue:
        down = await asyncio.wait_for(outcome, HANG_S)
        assert isinstance(down, EngineDown)
        assert down.retry_after_s == 1.0
    else:
        engine_queue.engine.state.alive = True
        engine_queue.on_alive(True)
        assert isinstance(await asyncio.wait_for(outcome, HANG_S), Admitted)
    engine_queue.close()


async def test_closed_queue_answers_waiting_and_later_requests_with_draining() -> None:
    engine_queue = queue_of(Closed())
    waiting = engine_queue.submit(make_request("waiting", at=time.monotonic()))
    await turns(engine_queue)
    engine_queue.close()
    later = engine_queue.submit(make_request("later", at=time.monotonic()))
    assert [waiting.result(), later.result()] == [Draining(), Draining()]
    assert not engine_queue.waiting


# --- a policy that raises ---------------------------------------------------------------------------------------------


@dataclass
class Raises(Closed):
    """Raises, once."""

    raised: bool = False

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        if not self.raised:
            self.raised = True
            raise ZeroDivisionError
        return super().decide(now, waiting, running, engine)


async def test_requests_that_a_policy_failed_on_leave_the_prefix_index() -> None:
    """It kept them, with their prompts, for ever."""
    engine_queue = queue_of(Raises(opens=True))
    prefixes = engine_queue.admission.prefixes
    request = make_request("a", at=0.0)
    request.blocks, request.block_tokens, request.content = (1, 2), 16.0, b"x" * 128
    with pytest.raises(ZeroDivisionError):
        await engine_queue.submit(request)
    prefixes.stored((1,), 16.0)
    assert prefixes.update_waiting() == []
    assert not engine_queue.waiting


async def test_requests_that_were_being_admitted_when_a_decision_failed_do_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine_queue = queue_of(Closed(opens=True))

    def fail(request: Request) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine_queue.shadows, "admitted", fail)
    outcomes = [engine_queue.submit(make_request(name, at=0.0)) for name in "ab"]
    assert isinstance(await outcomes[0], Admitted)
    with pytest.raises(ZeroDivisionError):
        await outcomes[1]
    assert list(engine_queue.running) == ["a"], "its caller has its outcome, and removes it"


async def test_shadow_sees_the_hit_that_is_predicted_for_a_request() -> None:
    seen: list[tuple[int, int]] = []

    class Records(Closed):
        def decide(
            self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
        ) -> Decision:
            seen.extend((request.prompt_tokens, request.uncached_tokens) for request in waiting)
            return Decision()

    engine = SimulatedEngine()
    engine.state.alive = True
    classes = {"chat": SloClass("chat", Slo())}
    engine_queue = EngineQueue(engine, Closed(), classes, shadow={"other": Records(name="other")})
    engine_queue.admission.prefixes.stored((1, 2), 16.0)
    request = make_request("a", prompt=100)
    request.blocks, request.block_tokens = (1, 2, 3), 16.0
    engine_queue.submit(request)
    await eventually(lambda: seen)
    assert seen[0] == (100, 68)
    engine_queue.close()


async def test_full_class_answers_the_flooding_tenant_and_queues_its_neighbour() -> None:
    engine_queue = queue_of(Closed())
    engine_queue.classes = {"chat": SloClass("chat", Slo(), max_waiting=3)}
    flood = [engine_queue.submit(make_request(f"f{i}", tenant="flood")) for i in range(4)]
    assert [outcome.done() for outcome in flood] == [False, False, False, True]
    victim = engine_queue.submit(make_request("v", tenant="victim"))
    assert not victim.done()
    assert isinstance(flood[2].result(), QueueFull)
    assert len(engine_queue.waiting) == 3
    engine_queue.close()
    assert isinstance(victim.result(), Draining)


async def test_engine_without_prompts_to_prefill_is_not_kept_idle_by_a_slow_decision(
    deciding_takes: Any, timers: list[float]
) -> None:
    deciding_takes(0.01 * MAX_DECISION_INTERVAL_S)
    policy = Closed()
    engine_queue = busy_queue(policy)
    second = make_request("second", at=0.0)
    engine_queue.admission.running["second"] = second
    await turns(engine_queue)
    engine_queue.admission.running["running"].first_token_s = NOW
    engine_queue.on_first_token(engine_queue.running["running"])
    await turns(engine_queue)
    assert timers[-1] == pytest.approx(0.5 * MAX_DECISION_INTERVAL_S), "the other prompt keeps the engine busy"
    second.first_token_s = NOW
    engine_queue.on_first_token(second)
    await turns(engine_queue)
    assert timers[-1] == pytest.approx(0.02 * MAX_DECISION_INTERVAL_S)
    assert policy.calls == [1]
    engine_queue.close()
