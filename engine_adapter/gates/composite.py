"""The step gates by name, and the one that a scheduler holds: each request is paced by the gate it names."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from engine_adapter.gates.base import CreditGate, Decoding, OpenGate, Paced, StepGate, StepPlan
from engine_adapter.gates.slack import SlackGate

GATES: dict[str, Callable[[], StepGate]] = {"open": OpenGate, "credit": CreditGate, "slack": SlackGate}

_RECENT_STEPS = 256


class Gates:
    """A gate of gates. ``default`` paces requests that name none, or one that is not known here.

    Usually all requests in an engine come from one policy and name one gate. Where several meet, each plans for its
    own, and there is as much prefill as the one that allows least.

    Raises:
        ValueError: ``default`` is no gate.
    """

    def __init__(self, default: str = "credit") -> None:
        if default not in GATES:
            raise ValueError(f"{default!r} is not a step gate; choose one of {', '.join(GATES)}")
        self._default = default
        self._gates: dict[str, StepGate] = {}
        self._recent: deque[tuple[int, int, float, float]] = deque(maxlen=_RECENT_STEPS)

    def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
        """Each gate's plan for its own requests, put together."""
        named = {request.gate for request in decoding}
        if len(named) <= 1:
            return self._gate(named.pop() if named else "").plan(now, decoding, prefill_backlog)
        together = StepPlan()
        for name in sorted(named):
            own = [request for request in decoding if request.gate == name]
            plan = self._gate(name).plan(now, own, prefill_backlog)
            together.sit_out |= plan.sit_out
            if plan.max_prefill_tokens is not None:
                least = together.max_prefill_tokens
                together.max_prefill_tokens = min(plan.max_prefill_tokens, prefill_backlog if least is None else least)
        return together

    def preemptible(self, request: Paced) -> bool:
        """As its own gate has it."""
        return self._gate(request.gate).preemptible(request)

    def forget(self, request_id: str) -> None:
        """Drop what any gate kept for the request."""
        for gate in self._gates.values():
            gate.forget(request_id)

    def observe(self, decode_requests: int, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """Tell every gate of a step; one that is first named later hears of the latest then."""
        self._recent.append((decode_requests, prefill_tokens, mean_context, elapsed_s))
        for gate in self._gates.values():
            gate.observe(decode_requests, prefill_tokens, mean_context, elapsed_s)

    def _gate(self, name: str) -> StepGate:
        if name not in GATES:
            name = self._default
        if name not in self._gates:
            self._gates[name] = gate = GATES[name]()
            for step in self._recent:
                gate.observe(*step)
        return self._gates[name]
