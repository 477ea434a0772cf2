"""The step gates by name, and the gate of gates that a scheduler holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from engine_adapter.gates.base import Decoding, GatedRequest, OpenGate, StepGate, StepPlan
from engine_adapter.gates.credit import CreditGate
from engine_adapter.gates.slack import SlackGate
from engine_adapter.step_report import StepReport

GATES: dict[str, Callable[[], StepGate]] = {"open": OpenGate, "credit": CreditGate, "slack": SlackGate}

_RECENT_STEPS = 256
"""Steps replayed to a gate that is created late, so that it knows the engine's step times."""


class Gates:
    """Applies to each request the gate that it names, or ``default``.

    Usually all requests name the same gate. Otherwise each gate plans for its own requests, and the smallest prefill
    budget applies.

    Raises:
        ValueError: ``default`` is not a gate.
    """

    def __init__(self, default: str = "credit") -> None:
        if default not in GATES:
            raise ValueError(f"{default!r} is not a step gate; choose one of {', '.join(GATES)}")
        self._default = default
        self._gates: dict[str, StepGate] = {}
        self._recent: deque[StepReport] = deque(maxlen=_RECENT_STEPS)

    def plan(
        self, now: float, decoding: Sequence[Decoding], prefill_backlog: int, yielding_prompts: bool = False
    ) -> StepPlan:
        """Return the combined plan of all gates."""
        names = {request.gate for request in decoding}
        if len(names) <= 1:
            return self._gate(names.pop() if names else "").plan(now, decoding, prefill_backlog, yielding_prompts)
        combined = StepPlan()
        for name in sorted(names):
            own = [request for request in decoding if request.gate == name]
            plan = self._gate(name).plan(now, own, prefill_backlog, yielding_prompts)
            combined.sit_out |= plan.sit_out
            combined.drafts |= plan.drafts
            if plan.max_prefill_tokens is not None:
                least = prefill_backlog if combined.max_prefill_tokens is None else combined.max_prefill_tokens
                combined.max_prefill_tokens = min(plan.max_prefill_tokens, least)
        return combined

    def preemptible(self, request: GatedRequest) -> bool:
        """Ask the request's own gate."""
        return self._gate(request.gate).preemptible(request)

    def forget(self, request_id: str) -> None:
        """Drop the request's state in every gate."""
        for gate in self._gates.values():
            gate.forget(request_id)

    def observe(self, step: StepReport) -> None:
        """Report a step to every gate, and keep it for gates that are created later."""
        self._recent.append(step)
        for gate in self._gates.values():
            gate.observe(step)

    def _gate(self, name: str) -> StepGate:
        if name not in GATES:
            name = self._default
        if name not in self._gates:
            self._gates[name] = gate = GATES[name]()
            for step in self._recent:
                gate.observe(step)
        return self._gates[name]
