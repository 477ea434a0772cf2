"""The step gate of the `slack` policy: prefill gets the time that running requests can spare, and no more.

TPOT is an average, so a running request may be late on one token and recover. With its first token at f_i and g tokens
out, token g + 1 is due at

    due_i = f_i + g * P_i.

A step that ends by min over i of due_i makes nobody late. What it takes beyond its decodes is the prefill that fits:

    chunk = max p with  T(decodes, p) <= min_i due_i - now.

When nothing waits for prefill, or all of it fits, the step is stock vLLM's. A request that is late already (whatever
the reason) holds nobody up: only those that can still be on time are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine_adapter.step_gate import Decoding, StepPlan
from engine_adapter.step_time import StepTimeModel

LEAST_CHUNK = 32
"""Prompt tokens. A smaller chunk costs a step's fixed share of prefill for next to nothing; it then only decodes."""


class SlackGate:
    """Sizes each step's prefill by the least slack among the decoding. Learns step times as it goes."""

    def __init__(self, step_time: StepTimeModel | None = None) -> None:
        self._step_time = step_time or StepTimeModel()
        self._first: dict[str, tuple[float, int]] = {}
        """For each request: when it was first seen decoding (s), and its length then (tokens)."""

    def plan(self, now: float, decoding: Sequence[Decoding], prefill_backlog: int) -> StepPlan:
        """Everyone decodes; prefill is cut to what the least slack leaves."""
        plan = StepPlan()
        first = self._first
        least, length = math.inf, 0
        for request in decoding:
            tokens = request.length
            length += tokens
            bound = request.tpot_slo_s
            if bound is None:
                continue
            seen = first.get(request.request_id)
            if seen is None:
                first[request.request_id] = seen = (now, tokens)
            slack = seen[0] + (tokens - seen[1] + 1) * bound - now
            if 0 <= slack < least:
                least = slack
        if not prefill_backlog or least == math.inf:
            return plan
        spare = least - self._decode_seconds(len(decoding), length)
        chunk = self._step_time.prefill_tokens_within(spare)
        if chunk < min(LEAST_CHUNK, prefill_backlog):
            chunk = 0
        if chunk < prefill_backlog:
            plan.max_prefill_tokens = chunk
        return plan

    def forget(self, request_id: str) -> None:
        """Drop what was kept for the request."""
        self._first.pop(request_id, None)

    def observe(self, decode_requests: int, prefill_tokens: int, mean_context: float, elapsed_s: float) -> None:
        """Learn from a step."""
        self._step_time.observe(decode_requests, prefill_tokens, mean_context, elapsed_s)

    def _decode_seconds(self, decodes: int, length: int) -> float:
        return self._step_time.itl(decodes, length / decodes)
