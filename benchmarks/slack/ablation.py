"""The components of `slack`, and how to remove each of them for an ablation.

A component is removed by a policy option, a subclass or a patch, so that the product has no switches for this study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np

from engine_adapter.engine import EngineState
from engine_adapter.gates.base import GatedRequest
from engine_adapter.gates.composite import GATES
from engine_adapter.gates.constants import SLACK
from engine_adapter.gates.slack import SlackGate
from engine_adapter.step_time import curve as step_curve
from engine_adapter.step_time.curve import StepCurve
from engine_adapter.step_time.model import StepTimeModel
from gateway.policies.base import UNGATED, Decision, PrefillLookahead
from gateway.policies.registry import POLICIES
from gateway.policies.slack.batch import WaitingBatch
from gateway.policies.slack.policy import Slack, _Round
from gateway.requests.request import Request

_POSTPONED_S = 1e6
"""Seconds by which `NoLateRejection` postpones deadlines; longer than any run."""


class NoMemoryCheck(Slack):
    """Ignores how much KV memory the engine has."""

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Decide as `slack` does for an engine that does not report its KV memory."""
        return super().decide(now, waiting, running, replace(engine, kv_tokens=0))


class NoHold(Slack):
    """Decides again after every change."""

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Decide as `slack` does, without a hold."""
        decision = super().decide(now, waiting, running, engine)
        decision.hold_s = 0.0
        return decision


class NoLateRejection(Slack):
    """Rejects no request as late, and admits late ones too, in the order of `slack`.

    NOTE: needs an infinite ``max_wait_s``, or all requests would be due `max_wait_s` after their arrival.
    """

    def _reject_late(self, this: _Round, queue: WaitingBatch) -> WaitingBatch:
        arrays = queue.arrays
        return replace(queue, arrays=arrays._replace(deadline=arrays.deadline + _POSTPONED_S))


class NoSkipOver(Slack):
    """Admits in order, until the first request that does not fit."""

    def _admit(self, this: _Round, queue: WaitingBatch) -> bool:
        batch = this.batch
        # `_order` omits prompts longer than the lookahead; here they must block the ones behind them.
        order = self._order(replace(this, lookahead=PrefillLookahead(0, math.inf)), queue)
        for at in order.tolist():
            request = queue.requests[at]
            fits = this.lookahead.fits(request) and queue.fit(batch, this.now, np.array([at]))[0]
            if batch.free_slots <= 0 or (batch.slots and not fits):
                return True
            this.admit(request, float(queue.pace_s[at]))
        return False


class NonPreemptingGate(SlackGate):
    """The step gate of `slack`, without best-effort preemption."""

    def preemptible(self, request: GatedRequest) -> bool:
        """Return False."""
        return False


def _no_preemption() -> AbstractContextManager[Any]:
    """Patch the gate. The engine then reports no preemption, so the policy does not count on it either."""
    return patch.dict(GATES, {"slack": NonPreemptingGate})


@contextmanager
def _linear_step_times() -> Iterator[None]:
    """Derive the step curves of policy and gate from SCORPIO's two linear forms (eq. 4 and 6), also after a fit."""

    def linear(update: Callable[[StepTimeModel], None]) -> Callable[[StepTimeModel], None]:
        def update_and_replace_curve(model: StepTimeModel) -> None:
            update(model)
            model.forms = True
            model.curve = StepCurve.of(model.times)

        return update_and_replace_curve

    with (
        patch.object(StepTimeModel, "__post_init__", linear(StepTimeModel.__post_init__)),
        patch.object(StepTimeModel, "refit", linear(StepTimeModel.refit)),
    ):
        yield


@contextmanager
def _slack_constant(name: str, value: float) -> Iterator[None]:
    """Set a field of `SLACK`, which is frozen and which several modules import by name."""
    before = getattr(SLACK, name)
    object.__setattr__(SLACK, name, value)
    try:
        yield
    finally:
        object.__setattr__(SLACK, name, before)


@dataclass(frozen=True, slots=True)
class Removal:
    """How to remove a component.

    Attributes:
        effect: what `slack` does without the component, for the page.
        policy, options: the class and the options that replace `slack`.
        patched: returns a context manager that applies patches.
        needs: what a workload must have for the component to matter; "" if it matters in every setting.
    """

    effect: str
    policy: type[Slack] = Slack
    options: Mapping[str, Any] = field(default_factory=dict)
    patched: Callable[[], AbstractContextManager[Any]] = nullcontext
    needs: str = ""


FULL = "nothing"
"""The row of complete `slack`."""

MEMORY_CHECK = "KV memory check"
E2E_PACE_FACTOR = "e2e_pace_factor"
STEP_CURVE = "step curve"
MIN_ADMISSION_SHARE = "min_admission_share"
BEST_EFFORT_PREEMPTION = "best-effort preemption"

REMOVALS: dict[str, Removal] = {
    FULL: Removal("complete `slack`"),
    "cost_weight": Removal("0: admits by deadline alone", options={"cost_weight": 0.0}),
    MIN_ADMISSION_SHARE: Removal("0: no class goes first", options={MIN_ADMISSION_SHARE: 0.0}),
    "queue_discount": Removal("1: counts all work that is queued ahead", options={"queue_discount": 1.0}),
    MEMORY_CHECK: Removal("admits regardless of KV memory", NoMemoryCheck),
    "prefill lookahead": Removal(
        "infinite: the engine gets every prompt that has a slot", options={"prefill_lookahead_steps": math.inf}
    ),
    "step gate": Removal("the engine sizes prefill as stock vLLM does", options={"gate": UNGATED}),
    "late rejection": Removal("rejects no request as late", NoLateRejection, {"max_wait_s": math.inf}),
    "skip-over": Removal("the first request that does not fit blocks the rest", NoSkipOver),
    "hold": Removal("decides at every change", NoHold),
    E2E_PACE_FACTOR: Removal(
        "1.0: plans with the exact pace that an end-to-end bound leaves",
        patched=lambda: _slack_constant("e2e_pace_factor", 1.0),
        needs="end-to-end bounds",
    ),
    BEST_EFFORT_PREEMPTION: Removal(
        "best-effort requests keep their slots and memory", patched=_no_preemption, needs="best-effort requests"
    ),
    STEP_CURVE: Removal("linear step times in policy and gate", patched=_linear_step_times),
    "chunk pricing": Removal(
        "the gate fills all slack with prefill", patched=lambda: patch.object(step_curve, "WORTH", 0.0)
    ),
    "chunk margin": Removal(
        "prefill chunks have no margin for slower steps", patched=lambda: patch.object(step_curve, "SPENT", 1.0)
    ),
}
"""How to remove each component of `slack`, by the component's name."""


@contextmanager
def without(component: str) -> Iterator[None]:
    """Make the policy ``slack`` lack ``component``, a key of `REMOVALS`, for policies and engines created meanwhile."""
    removal = REMOVALS[component]
    with patch.dict(POLICIES, {"slack": (removal.policy, dict(removal.options))}), removal.patched():
        yield
