"""The step gate of `slack`: prefill gets the time that running requests can spare, and no more.

TPOT is an average, so a request may be late on one token and recover. With its first token at f_i, its token g + 1 is
due at f_i + g * P_i, and a step that ends before the earliest due token makes no request late. If all waiting prefill
fits, the step is stock vLLM's; otherwise it takes the chunk that spends the slack best (`StepCurve.chunk`). A request
that is already late does not limit the step.

Yielding requests (of tenants above their share) have a pace too, but it limits only their own prompts, which wait for
those of the others. They sit out a step of all decodes that would make a paced request late, even without prompts.

If a step of all requests and prompts would make a paced request late, requests without a pace sit out. They take part
in one of `steps_per_turn` steps, until that many in a row had time for all: the next prompt may need the slack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

from engine_adapter.gates.base import Decoding, GatedRequest, StepPlan
from engine_adapter.gates.constants import SLACK
from engine_adapter.gates.drafts import best_drafts
from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_report import Acceptance, StepReport
from engine_adapter.step_time.model import StepTimeModel

_PACED, _YIELDING = ServiceKind.PACED, ServiceKind.YIELDING
_DRAFTS = attrgetter("drafts")


class SlackGate:
    """Sizes each step's prefill by the least slack among the paced requests. Learns step times from `observe`."""

    def __init__(self, step_time: StepTimeModel | None = None, choose_drafts: bool = True) -> None:
        self._step_time = step_time or StepTimeModel(forms=False)
        self._acceptance, self._choose_drafts = Acceptance(), choose_drafts
        self._due_offset: dict[str, float] = {}  # due time minus length * P_i (s): constant while a request grows
        self._steps_with_slack = SLACK.steps_per_turn
        """Steps in a row that had, or would have had, time for all requests."""
        self._sat_out = 0
        """Steps in a row that the requests without a pace sat out."""

    def plan(
        self, now: float, decoding: Sequence[Decoding], prefill_backlog: int, yielding_prompts: bool = False
    ) -> StepPlan:
        """Return the requests that sit out, and the prefill tokens that fit before the earliest due token."""
        plan, curve, unpaced = StepPlan(), self._step_time.curve, list[Decoding]()
        if self._choose_drafts and any(map(_DRAFTS, decoding)):
            plan.drafts = best_drafts(decoding, self._acceptance, curve, prefill_backlog)
        paced, decodes, context, due, strictest = self._of_kind(now, decoding, _PACED, plan.drafts)
        if paced < len(decoding):
            _, yielding, yielding_context, yielding_due, yielding_strictest = self._of_kind(
                now, decoding, _YIELDING, plan.drafts
            )
            unpaced = [r for r in decoding if r.pace_s is None or (r.kind is not _PACED and r.kind is not _YIELDING)]
            if yielding and curve.step_s(decodes + yielding, context + yielding_context) > due - now:
                plan.sit_out.update([r.request_id for r in decoding if r.kind is _YIELDING])
            else:
                decodes, context = decodes + yielding, context + yielding_context
                if yielding_prompts or not prefill_backlog:
                    due, strictest = min(due, yielding_due), min(strictest, yielding_strictest)
        if due == math.inf:
            return plan
        all_decodes = decodes + sum([1 + plan.drafts.get(r.request_id, r.drafts) for r in unpaced])
        all_context = context + sum([r.length for r in unpaced])
        all_fit = curve.step_s(all_decodes, all_context, prefill_backlog) <= due - now
        self._steps_with_slack = self._steps_with_slack + 1 if all_fit else 0
        if all_fit and self._steps_with_slack >= SLACK.steps_per_turn:
            self._sat_out = 0
            return plan
        self._sat_out = (self._sat_out + bool(unpaced)) % SLACK.steps_per_turn
        if unpaced and self._sat_out:
            plan.sit_out.update([r.request_id for r in unpaced])
        else:
            decodes, context = all_decodes, all_context
        if prefill_backlog and not all_fit:
            chunk = curve.chunk(decodes, context, due - now, strictest, prefill_backlog)
            if chunk < prefill_backlog:
                plan.max_prefill_tokens = chunk
        return plan

    def _of_kind(
        self, now: float, decoding: Sequence[Decoding], kind: ServiceKind, kept: dict[str, int]
    ) -> tuple[int, int, int, float, float]:
        """Return of the requests of ``kind`` that have a pace: number, tokens, context, due time, longest steady step.

        The drafts that they keep are ``kept``, or all. A request with drafts is due when the last token is that a step
        is expected to bring.
        """
        offsets, due, strictest, count, drafts, context = self._due_offset, math.inf, math.inf, 0, 0, 0
        expected = self._acceptance.expected
        for request in decoding:
            pace = step_s = request.pace_s
            if request.kind is not kind or pace is None or step_s is None:
                continue
            length = request.length
            count += 1
            context += length
            if request.drafts:
                own_drafts = kept.get(request.request_id, request.drafts)
                drafts += own_drafts
                step_s += expected(own_drafts) * pace
            if step_s < strictest:  # noqa: PLR1730  # min() takes three times as long, for each request in each step.
                strictest = step_s
            since_first_s = (length - 1) * pace
            offset = offsets.get(request.request_id)
            if offset is None:
                offsets[request.request_id] = offset = now - since_first_s
            own = offset + since_first_s + step_s
            if now <= own < due:
                due = own
        return count, count + drafts, context, due, strictest

    def preemptible(self, request: GatedRequest) -> bool:
        """Whether the request is best-effort or yielding."""
        return request.kind is ServiceKind.BEST_EFFORT or request.kind is _YIELDING

    def forget(self, request_id: str) -> None:
        """Drop the request's due times."""
        self._due_offset.pop(request_id, None)

    def observe(self, step: StepReport) -> None:
        """Learn from a step."""
        self._acceptance.observe(step)
        # A draft costs what a decode does, but reads no context of its own.
        tokens = step.decode_requests + step.draft_tokens
        mean_context = step.mean_context * step.decode_requests / tokens if tokens else 0.0
        self._step_time.observe(tokens, step.prefill_tokens, mean_context, step.elapsed_s)
