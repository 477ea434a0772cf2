"""`slack` without one of its parts, for `benchmarks.slack.study`: what is missed then is what the part is worth.

Most parts are taken out by an option of `Slack`. For the others there are replacements here, rather than switches in
the product that nobody should touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import numpy as np

from engine_adapter.engine import EngineState, GateReport
from engine_adapter.gates.best_effort_preemption import RecentPeak
from engine_adapter.gates.slack import SlackGate
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import UNGATED, Decision, Policy, PrefillLookahead, Rejection
from gateway.policies.slack import batch
from gateway.policies.slack.batch import Load, Queue
from gateway.policies.slack.policy import Slack
from gateway.requests.request import Request


class Forgetful(Slack):
    """Does not know how much KV memory there is."""

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """As `slack`, for an engine that does not tell."""
        return super().decide(now, waiting, running, replace(engine, kv_tokens=0))


class NeverTooLate(Slack):
    """Refuses nobody as late: whoever waits is served some time. Earlier deadlines still go first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.max_wait_s = math.inf

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """As `slack`, with all deadlines put off."""
        for request in waiting:
            request.deadline_s = request.arrival_s + request.ttft_slo_s + _NEVER_S
        return super().decide(now, list(waiting), running, engine)  # without the queue's columns, which know them not


_NEVER_S = 1e6
"""By so much all deadlines are put off."""


class Blocking(Slack):
    """The first that does not fit blocks those behind it."""

    def _admit_bounded(
        self, now: float, queue: Queue, load: Load, lookahead: PrefillLookahead, engine: EngineState, decision: Decision
    ) -> bool:
        order, _ = self._in_turn(now, queue, np.arange(len(queue.requests)), load, engine)
        for request in [queue.requests[at] for at in order.tolist()]:
            alone = queue.only(np.array([other is request for other in queue.requests]))
            if super()._admit_bounded(now, alone, load, lookahead, engine, decision):
                return True
        return False


class AllPaces(Slack):
    """Holds no pace off, whatever it costs the others."""

    def _hold_off(
        self, now: float, queue: Queue, running: Collection[Request], engine: EngineState
    ) -> tuple[Queue, list[Rejection]]:
        return queue, []


class AtOnce(Slack):
    """Decides at once whenever there is news."""

    def _stands_s(self, load: Load, lookahead: PrefillLookahead, engine: EngineState) -> float:
        return 0.0


class InTheWay(Slack):
    """Counts on nobody to make way, and leaves nothing free for others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._wanted = RecentPeak(lasts_s=0.0)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """As `slack`, for an engine in which nobody does."""
        return super().decide(now, waiting, running, replace(engine, gate=GateReport(preemptible=False)))


@contextmanager
def nobody_makes_way() -> Iterator[None]:
    """Whoever has a place in an engine keeps it."""
    with patch.object(SlackGate, "preemptible", lambda self, request: False):
        yield


@contextmanager
def straight_lines() -> Iterator[None]:
    """Policy and gate believe the two linear forms (SCORPIO eq. 4 and 6), and nothing else, of step times."""

    def then_straight(learn: Callable[[StepTimeModel], None]) -> Callable[[StepTimeModel], None]:
        def learn_and_forget_the_curve(model: StepTimeModel) -> None:
            learn(model)
            model.forms = True
            model.curve = StepCurve.of(model.times)

        return learn_and_forget_the_curve

    with (
        patch.object(StepTimeModel, "__post_init__", then_straight(StepTimeModel.__post_init__)),
        patch.object(StepTimeModel, "refit", then_straight(StepTimeModel.refit)),
    ):
        yield


@contextmanager
def paces_to_the_letter() -> Iterator[None]:
    """The pace that an end-to-end bound leaves at the door is the request's for as long as it runs."""
    with patch.object(batch, "E2E_EASE", 1.0):
        yield


@dataclass(frozen=True, slots=True)
class Without:
    """What takes a part out: a policy, and what holds around its run. ``says``: in words."""

    says: str
    make: Callable[[], Policy] = Slack
    around: Callable[[], AbstractContextManager[None]] = nullcontext


FULL = "nothing"

MAKING_WAY = "making way"
"""Of worth only beside requests that nobody insists on."""

WITHOUT: dict[str, Without] = {
    FULL: Without("`slack` as it is"),
    "cost_weight": Without("deadlines alone say who goes first", partial(Slack, cost_weight=0.0)),
    "min_admission_share": Without(
        "no class or tenant goes first for being behind", partial(Slack, min_admission_share=0.0)
    ),
    "queue_discount": Without("the queue ahead is not expected to thin out", partial(Slack, queue_discount=1.0)),
    "memory": Without("the KV memory is not looked at", Forgetful),
    "runway": Without(
        "prompts are handed to the engine as soon as there is a place", partial(Slack, prefill_lookahead_steps=math.inf)
    ),
    "step gate": Without("the engine sizes its prefill as stock vLLM does", partial(Slack, gate=UNGATED)),
    "refusing": Without("nobody is refused as late", NeverTooLate),
    "standing": Without("news is decided on at once, and not among all that came in a step", AtOnce),
    "holding off": Without("paces that are all but the engine's own are kept, whatever they cost", AllPaces),
    "easing": Without("the pace that an end-to-end bound leaves is kept to the letter", around=paces_to_the_letter),
    MAKING_WAY: Without("whoever has a place keeps it, and takes all that are free", InTheWay, nobody_makes_way),
    "skip-over": Without("the first that does not fit blocks the rest", Blocking),
    "curve": Without("step times are linear, for policy and gate", around=straight_lines),
}
"""Each part of `slack` by name, and what takes it out."""
