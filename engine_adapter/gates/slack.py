"""The step gate of the `slack` policy: prefill gets the time that running requests can spare, and no more.

TPOT is an average, so a running request may be late on one token and recover. With its first token at f_i and g tokens
out, token g + 1 is due at

    due_i = f_i + g * P_i.

A step that ends by min over i of due_i makes nobody late. When nothing waits for prefill, or all of it fits,

    T(decodes, all that waits) <= min_i due_i - now,

the step is stock vLLM's. Else it takes the chunk on which the slack is spent best, now or later (`StepCurve.chunk`); a
fifth of the time that is there for it is kept back, since what a chunk takes is known less well than what decodes take.
A request that is late already (whatever the reason) holds nobody up: only those that can still be on time are counted.

While prompts wait, steps use what there is to use up to the pace, also where prompt tokens are believed to be dear. So
a gate that believes too much of them sees soon that they take less; no step needs to be made for the sake of learning.

Requests without a pace take what is left. Where a step of all of them, prefill included, would make somebody late, they
sit it out, and those that follow, until 1/`BEST_EFFORT_SHARE` steps in a row would have had time for all: slack that
they use in
a quiet moment is not there for the prompts of the next. But they never sit out more than so many, so that they have at
least that share of steps. Where places or memory are short they make way (`make_way`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine_adapter.gates.base import Decoding, Paced, StepPlan
from engine_adapter.step_time.model import StepTimeModel

BEST_EFFORT_SHARE = 0.05
"""The share of steps, and of the engine's places, that requests without a pace have however full the engine is."""

TURN = round(1 / BEST_EFFORT_SHARE)

PATIENT_S = 1.0
"""A bound of so many seconds a token or more is no pace that a step could break."""


class SlackGate:
    """Sizes each step's prefill by the least slack among the decoding. Learns step times as it goes."""

    def __init__(self, step_time: StepTimeModel | None = None) -> None:
        self._step_time = step_time or StepTimeModel(forms=False)
        self._due: dict[str, float] = {}
        """For each request, due_i less its length times P_i (s), which stays the same as it grows."""
        self._at_ease = TURN
        """Steps in a row that had time for all, or would have had."""
        self._sat_out = 0
        """Steps that those without a pace have sat out in a row."""

    def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
        """Everyone decodes who can; prefill is cut to what the least slack leaves."""
        plan = StepPlan()
        dues = self._due
        due, strictest, paced, paced_length, length = math.inf, math.inf, 0, 0, 0
        for request in decoding:
            tokens = request.length
            length += tokens
            bound = request.tpot_slo_s
            if bound is None or bound >= PATIENT_S:
                continue
            if bound < strictest:  # noqa: PLR1730  # Each request of each step comes by: min() takes three times as long.
                strictest = bound
            paced += 1
            paced_length += tokens
            begun = dues.get(request.request_id)
            if begun is None:
                dues[request.request_id] = begun = now - (tokens - 1) * bound
            own = begun + tokens * bound
            if now <= own < due:
                due = own
        if due == math.inf:
            return plan
        least, curve = due - now, self._step_time.curve
        decodes = len(decoding)
        all_fit = curve.step_s(decodes, length, prefill_backlog) <= least
        self._at_ease = self._at_ease + 1 if all_fit else 0
        if all_fit and self._at_ease >= TURN:
            self._sat_out = 0
            return plan
        if self._sits_out(plan, decoding, paced):
            decodes, length = paced, paced_length
        if all_fit:
            return plan
        if prefill_backlog:
            chunk = curve.chunk(decodes, length, least, strictest, prefill_backlog)
            if chunk < prefill_backlog:
                plan.max_prefill_tokens = chunk
        return plan

    def _sits_out(self, plan: StepPlan, decoding: Sequence[Decoding], paced: int) -> bool:
        """Whether those without a pace let this step pass: there are any, and it is not their turn."""
        if paced == len(decoding):
            return False
        self._sat_out += 1
        if self._sat_out >= TURN:
            self._sat_out = 0
            return False
        plan.sit_out.update([r.request_id for r in decoding if r.tpot_slo_s is None or r.tpot_slo_s >= PATIENT_S])
        return True

    def preemptible(self, request: Paced) -> bool:
        """Who has no bound at all does."""
        return request.tpot_slo_s is None or request.tpot_slo_s == math.inf

    def forget(self, request_id: str) -> None:
        """Drop what was kept for the request."""
        self._due.pop(request_id, None)

    def observe(self, decode_requests: int, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """Learn from a step."""
        self._step_time.observe(decode_requests, prefill_tokens, mean_context, elapsed_s)
