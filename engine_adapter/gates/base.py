"""The interface of a step gate: which requests decode in the next engine step, and how many prefill tokens join.

Gates are pure: no clock, no I/O, no engine. The same objects run inside vLLM (`engine_adapter.vllm.scheduler`), in the
simulated engine and in tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine_adapter.service_kind import ServiceKind
from engine_adapter.step_report import StepReport


class GatedRequest(Protocol):
    """A request in the engine, and what it asks of the gate."""

    @property
    def request_id(self) -> str:
        """Unique among the requests in the engine."""

    @property
    def kind(self) -> ServiceKind:
        """What the request was promised."""

    @property
    def pace_s(self) -> float | None:
        """Seconds per output token to keep, P_i; None without a pace."""

    @property
    def gate(self) -> str:
        """The gate that plans for this request, a name in `composite.GATES`; "" for the engine's default."""


class Decoding(GatedRequest, Protocol):
    """A running request past its prefill."""

    @property
    def length(self) -> int:
        """Tokens of context: prompt and output. Scheduled drafts do not count, since they may be rejected."""

    @property
    def drafts(self) -> int:
        """Draft tokens that the next step would verify (speculative decoding)."""


@dataclass(slots=True)
class StepPlan:
    """The plan for one step.

    Attributes:
        sit_out: ids of requests that do not decode.
        drafts: how many drafts a request keeps, by id; the others keep all.
        max_prefill_tokens: the most prefill tokens; None: the engine's own budget.
    """

    sit_out: set[str] = field(default_factory=set)
    drafts: dict[str, int] = field(default_factory=dict)
    max_prefill_tokens: int | None = None


class StepGate(Protocol):
    """Plans each engine step before it is scheduled. May keep state per request id."""

    def plan(
        self, now: float, decoding: Sequence[Decoding], prefill_backlog: int, yielding_prompts: bool = False
    ) -> StepPlan:
        """Plan the step at ``now`` (s); ``prefill_backlog`` prompt tokens in the engine are not computed yet."""

    def preemptible(self, request: GatedRequest) -> bool:
        """Whether the request may be preempted for requests that are not best-effort."""

    def forget(self, request_id: str) -> None:
        """Drop the state of a request that left the engine."""

    def observe(self, step: StepReport) -> None:
        """Learn from a step."""


class OpenGate:
    """Stock vLLM: every request decodes, and the engine's own token budget applies."""

    def plan(
        self, now: float, decoding: Sequence[Decoding], prefill_backlog: int, yielding_prompts: bool = False
    ) -> StepPlan:
        """Return an empty plan."""
        return StepPlan()

    def preemptible(self, request: GatedRequest) -> bool:
        """Return False."""
        return False

    def forget(self, request_id: str) -> None:
        """Do nothing: there is no state."""

    def observe(self, step: StepReport) -> None:
        """Do nothing: step times do not matter here."""
