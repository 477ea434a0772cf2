"""What was decided about the last requests and why, without any text, for `GET /v1/requests/{id}`.

A `RequestRecord` is made once, when a request has ended, from its ledger entry. INVARIANT: it refers to no `Request`,
so no prompt stays in memory. Its size is bounded: by about 4 kB, and usually about 1.3 kB.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from gateway.observability.ledger import OUTCOMES, Attempt, Entry
from gateway.policies.base import Rejection
from gateway.requests.slo import Slo
from gateway.scheduling.queue_outcome import EngineDown, QueueFull

MAX_LISTED = 200
"""Records in one answer of `GET /v1/requests`. One takes about 10 us of the event loop's time."""

FILTERS = (*OUTCOMES, "late", "open")
"""Values of the ``outcome`` filter. ``late``: finished, but missed a bound. ``open``: has not ended."""

_LONGEST_MODEL = 128
"""Characters of a model's name that are kept."""


@dataclass(slots=True)
class RequestRecord:
    """One request, as it ended or as it is now. Durations are seconds; ``..._at`` are seconds after its arrival.

    Attributes:
        id, client_id: the ledger's id, and the ``x-request-id`` of the response.
        time: when the request arrived (seconds since 1970).
        outcome: "" while the request is open.
        bound, predicted_s, attainable_s, infeasible, retry_after_s, limit: of a rejection; see
            `gateway.policies.base.Rejection` and `gateway.scheduling.engine_queue.QueueFull`.
        arrival_s: monotonic seconds, which the times of ``attempts`` refer to.
    """

    id: str
    client_id: str
    tenant: str
    slo_class: str
    model: str
    route: str
    stream: bool
    time: float
    arrival_s: float
    status: int
    outcome: str
    reason: str
    slo: Slo
    kind: str
    bounds_waived: bool
    pace_s: float | None
    sequences: int
    prompt_tokens: int
    prompt_source: str
    predicted_cached_tokens: int
    cached_tokens: int | None
    output_tokens: int
    prediction_source: str
    predicted_tokens: float
    predicted_p90: float
    received_at: float | None
    predicting_at: tuple[float, float] | None
    attempts: tuple[Attempt, ...]
    engine: str
    queue_s: float | None
    predicted_ttft_s: float | None
    predicted_tpot_s: float | None
    first_token_at: float | None
    ttft_s: float | None
    tpot_s: float | None
    e2e_s: float | None
    ended_at: float | None
    violated: tuple[str, ...]
    bound: str
    predicted_s: float | None
    attainable_s: float | None
    infeasible: bool
    retry_after_s: float | None
    limit: int | None
    trace_id: str
    span_id: str
    parent_id: str
    trace_sampled: bool

    @classmethod
    def of(cls, entry: Entry, status: int, now: float | None = None) -> RequestRecord:
        """Return the record of ``entry``, whose response had ``status`` (0 if it has not begun)."""
        now = time.monotonic() if now is None else now
        request, prediction, answer, trace = entry.request, entry.prediction, entry.answer, entry.trace
        arrival_s, predicting_s = request.arrival_s, entry.predicting_s
        first = request.first_token_s
        finished = entry.outcome == "finished"
        bound, predicted_s, attainable_s, infeasible, retry_after_s, limit = "", None, None, False, None, None
        if isinstance(answer, Rejection):
            bound, predicted_s, attainable_s = answer.bound, answer.predicted_s, answer.attainable_s
            infeasible, retry_after_s = answer.infeasible, answer.retry_after_s
        elif isinstance(answer, QueueFull):
            limit, retry_after_s = answer.limit, answer.retry_after_s
        elif isinstance(answer, EngineDown):
            retry_after_s = answer.retry_after_s
        attempts = tuple(entry.attempts)
        # NOTE: by position, in the order of the fields. Keywords would double the cost of the call.
        return cls(
            request.id,
            entry.client_id,
            request.tenant,
            request.slo_class,
            request.model[:_LONGEST_MODEL],
            entry.route,
            entry.stream,
            time.time() - (now - arrival_s),
            arrival_s,
            status,
            entry.outcome or "",
            entry.reason,
            request.slo,
            request.kind.label,
            request.bounds_waived,
            request.pace_s,
            request.sequences,
            request.prompt_tokens,
            entry.prompt_source,
            entry.predicted_cached_tokens,
            entry.cached_tokens,
            request.generated,
            "" if prediction is None else prediction.source,
            request.predicted_at_arrival,
            0.0 if prediction is None else prediction.p90,
            None if entry.received_s is None else entry.received_s - arrival_s,
            None if predicting_s is None else (predicting_s[0] - arrival_s, predicting_s[1] - arrival_s),
            attempts,
            entry.engine,
            _queue_s(entry),
            entry.predicted_ttft_s,
            entry.predicted_tpot_s,
            None if first is None else first - arrival_s,
            entry.ttft_s,
            entry.tpot_s if finished else None,
            entry.e2e_s if finished else None,
            None if entry.closed_s is None else entry.closed_s - arrival_s,
            entry.violated,
            bound,
            predicted_s,
            attainable_s,
            infeasible,
            retry_after_s,
            limit,
            "" if trace is None else trace.trace_id,
            "" if trace is None else trace.span_id,
            "" if trace is None else trace.parent_id,
            trace is not None and trace.sampled,
        )

    @property
    def state(self) -> str:
        """``waiting``, ``running`` or ``ended``."""
        if self.outcome:
            return "ended"
        return "waiting" if self.queue_s is None else "running"

    def passes(self, outcome: str) -> bool:
        """Whether the record passes the filter ``outcome``, one of `FILTERS` or ""."""
        if outcome == "late":
            return bool(self.violated)
        return not outcome or (self.outcome or "open") == outcome

    def document(self) -> dict[str, Any]:
        """Return the record as a JSON object, with times in milliseconds."""
        slo, predicting = self.slo, self.predicting_at or (None, None)
        document: dict[str, Any] = {
            "object": "antares.request",
            "id": self.id,
            "request_id": self.client_id,
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds"),
            "state": self.state,
            "status": self.status or None,
            "outcome": self.outcome or None,
            "reason": self.reason or None,
            "attained": self.outcome == "finished" and not self.violated if self.outcome else None,
            "violated": list(self.violated),
            "tenant": self.tenant,
            "slo_class": self.slo_class,
            "model": self.model,
            "route": self.route,
            "stream": self.stream,
            "engine": self.engine or None,
            "trace_id": self.trace_id or None,
            "slo": {
                "ttft_ms": to_ms(slo.ttft_s),
                "tpot_ms": to_ms(slo.tpot_s),
                "e2e_ms": to_ms(slo.e2e_s),
                "from_class": sorted(b for b in slo.from_class if getattr(slo, f"{b}_s") is not None),
                "kind": self.kind,
                "waived": self.bounds_waived,
                "pace_ms": to_ms(self.pace_s),
            },
            "prompt": {
                "tokens": self.prompt_tokens,
                "source": self.prompt_source or None,
                "predicted_cached_tokens": self.predicted_cached_tokens,
                "cached_tokens": self.cached_tokens,
            },
            "output": {
                "tokens": self.output_tokens,
                "sequences": self.sequences,
                "predicted_tokens": round(self.predicted_tokens, 1) if self.prediction_source else None,
                "predicted_p90_tokens": round(self.predicted_p90, 1) if self.prediction_source else None,
                "prediction_source": self.prediction_source or None,
            },
            "latency": {
                "queue_ms": to_ms(self.queue_s),
                "predicted_ttft_ms": to_ms(self.predicted_ttft_s),
                "ttft_ms": to_ms(self.ttft_s),
                "predicted_tpot_ms": to_ms(self.predicted_tpot_s),
                "tpot_ms": to_ms(self.tpot_s),
                "e2e_ms": to_ms(self.e2e_s),
            },
            # Milliseconds after arrival.
            "timeline": {
                "received_ms": to_ms(self.received_at),
                "predicting_ms": to_ms(predicting[0]),
                "predicted_ms": to_ms(predicting[1]),
                "first_token_ms": to_ms(self.first_token_at),
                "ended_ms": to_ms(self.ended_at),
            },
            "attempts": [self._attempt(attempt) for attempt in self.attempts],
            "rejection": None,
        }
        if self.retry_after_s is not None:
            document["rejection"] = {
                "bound": self.bound or None,
                "predicted_ms": to_ms(self.predicted_s),
                "attainable_ms": to_ms(self.attainable_s),
                "infeasible": self.infeasible,
                "limit": self.limit,
                "retry_after_s": round(self.retry_after_s, 1),
            }
        return document

    def _attempt(self, attempt: Attempt) -> dict[str, Any]:
        def after(at: float | None) -> float | None:
            return None if at is None else to_ms(at - self.arrival_s)

        return {
            "engine": attempt.engine,
            "placed_ms": after(attempt.placed_s),
            "waiting_requests": attempt.waiting,
            "ahead": attempt.position,
            "running_requests": attempt.running,
            "admitted_ms": after(attempt.admitted_s),
            "predicted_ttft_ms": to_ms(attempt.predicted_ttft_s),
            "predicted_tpot_ms": to_ms(attempt.predicted_tpot_s),
            "ended_ms": after(attempt.ended_s),
            "end": attempt.end or None,
        }


class Decisions:
    """The records of the last ``keep`` requests that ended, and the requests that are open.

    A search for an operator reads all records, at about 0.1 us each. That limits `decisions.keep` in the configuration.
    """

    def __init__(self, keep: int = 10_000) -> None:
        self._keep = keep
        self._open: dict[str, Entry] = {}
        self._ended: deque[RequestRecord] = deque()
        self._by_id: dict[tuple[str, str], RequestRecord] = {}
        """By tenant and id, for both ids. Tenants may send the same ``x-request-id``; the latest request has it."""

    def __len__(self) -> int:
        return len(self._ended)

    def opened(self, entry: Entry) -> None:
        """Show ``entry`` among the open requests."""
        self._open[entry.request.id] = entry

    def ended(self, record: RequestRecord) -> None:
        """Keep ``record``, in place of the oldest one if there are enough."""
        self._open.pop(record.id, None)
        if self._keep == 0:
            return
        ended, by_id = self._ended, self._by_id
        if len(ended) >= self._keep:
            oldest = ended.popleft()
            for name in (oldest.id, oldest.client_id):
                key = oldest.tenant, name
                if by_id.get(key) is oldest:
                    del by_id[key]
        ended.append(record)
        by_id[record.tenant, record.client_id] = by_id[record.tenant, record.id] = record

    def snapshot(self) -> tuple[list[RequestRecord], list[Entry]]:
        """Return the records that are kept, and the entries of the open requests. Takes about 50 us."""
        return list(self._ended), list(self._open.values())

    @property
    def known_since_s(self) -> float:
        """Since when all requests that ended are kept (monotonic s); 0 if none was dropped yet."""
        return self._ended[0].arrival_s if len(self._ended) >= max(1, self._keep) else 0.0

    def find(self, request_id: str, tenant: str | None) -> RequestRecord | None:
        """Return the latest request with this id, scheduled or not, of ``tenant`` (None: of any)."""
        for entry in reversed(self._open.values()):
            if request_id in (entry.client_id, entry.request.id) and tenant in (None, entry.request.tenant):
                return RequestRecord.of(entry, 0)
        if tenant is not None:
            return self._by_id.get((tenant, request_id))
        return next((r for r in reversed(self._ended) if request_id in (r.client_id, r.id)), None)

    def latest(self, limit: int, outcome: str = "", tenant: str | None = None) -> list[RequestRecord]:
        """Return at most ``limit`` requests of ``tenant`` (None: of any), the open ones first, then the newest."""
        return list(islice(self._matching(outcome, tenant), limit))

    def _matching(self, outcome: str, tenant: str | None) -> Iterator[RequestRecord]:
        for entry in reversed(list(self._open.values())):
            # Checked first, because a record takes longer to make than to reject.
            if (outcome in ("", "open") or entry.outcome is not None) and tenant in (None, entry.request.tenant):
                record = RequestRecord.of(entry, 0)
                if record.passes(outcome):
                    yield record
        for record in reversed(self._ended):
            if tenant in (None, record.tenant) and record.passes(outcome):
                yield record


def _queue_s(entry: Entry) -> float | None:
    """Return the seconds from arrival to the latest admission, or to the queue's other answer; None while it waits."""
    admitted_s = entry.attempts[-1].admitted_s if entry.attempts else None
    if admitted_s is not None:
        return admitted_s - entry.request.arrival_s
    return None if entry.answer is None else entry.queue_s


def to_ms(seconds: float | None, digits: int = 3) -> float | None:
    """Return ``seconds`` in milliseconds with ``digits`` decimal places."""
    return None if seconds is None else round(seconds * 1000, digits)
