"""What an engine reports of its steps: each step as a sample, and the counters of its step gate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

_MEMORY_STEPS = 256
"""Steps with drafts over which `Acceptance` averages: acceptance follows the content of the answers. Convention."""


class StepReport(NamedTuple):
    """One forward pass of the engine. It computes ``decode_requests + draft_tokens + prefill_tokens`` tokens.

    Attributes:
        decode_requests: sequences that decoded. Each computes one token, and verifies its drafts in the same pass.
        prefill_tokens: tokens computed in chunks: of prompts, and of preempted requests again. Includes vLLM's padding.
        mean_context: mean context of the decoding sequences, in tokens; 0 if unknown.
        elapsed_s: duration of the step.
        drafting_requests: sequences that had drafts (speculative decoding).
        draft_tokens: their drafts.
        accepted_tokens: drafts that were accepted, so sequences got ``decode_requests + accepted_tokens`` tokens.
        recomputed_tokens: those of ``prefill_tokens`` that belong to preempted requests.
        offered_requests: decoding sequences that had drafts before the gate dropped any.
    """

    decode_requests: int
    prefill_tokens: int
    mean_context: float
    elapsed_s: float
    drafting_requests: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    recomputed_tokens: int = 0
    offered_requests: int = 0


@dataclass(slots=True)
class GateReport:
    """Counters of the step gate inside the engine, cumulative since the engine started.

    Attributes:
        steps: steps planned.
        gated_steps: steps in which at least one request sat out.
        gate_seconds: time spent in the gate.
        eligible: decode opportunities per pace. Keys are from `gates.pace_labels`.
        batched: the opportunities among ``eligible`` in which the request decoded.
        best_effort_preemptions: best-effort requests preempted for paced and deadline-only ones.
        preemptible: whether this engine supports best-effort preemption.
        kv_tokens: tokens that fit in the KV memory, over all KV cache groups; 0 if unknown.
    """

    steps: int = 0
    gated_steps: int = 0
    gate_seconds: float = 0.0
    eligible: dict[str, int] = field(default_factory=dict)
    batched: dict[str, int] = field(default_factory=dict)
    best_effort_preemptions: int = 0
    preemptible: bool = False
    kv_tokens: int = 0


@dataclass(slots=True)
class ReportLog:
    """Which reports of a remote engine arrive.

    Attributes:
        source: where they come from now: "channel" (the report channel), "metrics" (the server's ``/metrics``), or "".
        at: when the last one, or the last heartbeat, arrived (monotonic s); None before the first.
        counts: reports by source.
        dropped: reports that the server dropped on this connection, because they could not be sent in time.
    """

    source: str = ""
    at: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    dropped: int = 0

    def note(self, source: str, at: float) -> None:
        """Count a report from ``source`` that arrived at ``at``."""
        self.at = at
        self.counts[source] = self.counts.get(source, 0) + 1


@dataclass(slots=True)
class Acceptance:
    """Learns the rate at which drafts are accepted, as an average that forgets old steps.

    Each draft is accepted with probability r until the first that is not, so k drafts bring r + r^2 + ... + r^k tokens.

    Attributes:
        rate: r; 0 until a sequence had drafts.
        draft_tokens, accepted_tokens: drafts verified, and drafts accepted.
    """

    rate: float = 0.0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    _drafting: float = 0.0
    _drafts: float = 0.0
    _accepted: float = 0.0
    _decodes: float = 0.0
    _offered: float = 0.0

    def observe(self, step: StepReport) -> None:
        """Add a step."""
        kept = 1 - 1 / _MEMORY_STEPS
        self._decodes = kept * self._decodes + step.decode_requests
        self._offered = kept * self._offered + step.offered_requests
        if not step.drafting_requests:
            return
        self.draft_tokens += step.draft_tokens
        self.accepted_tokens += step.accepted_tokens
        self._drafting = kept * self._drafting + step.drafting_requests
        self._drafts = kept * self._drafts + step.draft_tokens
        self._accepted = kept * self._accepted + step.accepted_tokens
        # One step towards the rate that explains what was accepted: a larger rate explains more, in proportion or more.
        drafts, accepted = self._drafts / self._drafting, self._accepted / self._drafting
        rate = self.rate or 0.5
        self.rate = min(0.99, max(0.01, rate * (accepted / _expected(rate, drafts)) ** 0.5))

    @property
    def accepted(self) -> float:
        """Drafts that a sequence with drafts gets accepted in one step; 0 until one had drafts."""
        return self._accepted / self._drafting if self._drafting else 0.0

    @property
    def tokens_per_decode(self) -> float:
        """Tokens that a decode brings on average if all drafts are verified.

        Some drafters, such as n-grams, have drafts for few sequences.
        """
        if not self._drafting:
            return 1.0
        return 1 + self.accepted * (self._offered / self._decodes if self._decodes else 0.0)

    def expected(self, drafts: int) -> float:
        """Return how many of ``drafts`` drafts are accepted on average."""
        return _expected(self.rate, drafts) if drafts else 0.0


def _expected(rate: float, drafts: float) -> float:
    return float(rate * (1 - rate**drafts) / (1 - rate))
