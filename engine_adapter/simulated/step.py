"""One step of a simulated engine: what it computes, and its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import repeat

from engine_adapter.simulated.sequence import SimulatedSequence
from engine_adapter.step_report import StepReport


@dataclass(slots=True)
class Step:
    """One forward pass. Contexts are sums over its sequences (tokens).

    Attributes:
        decodes, decode_context: sequences that decode.
        drafts: drafts that each decode verifies; empty without speculative decoding.
        offered: decodes that had drafts before the gate.
        accepted_tokens: accepted drafts. Filled in when the step is finished, as ``gained``.
        gained: tokens that each decode brings; empty without speculative decoding, where it is one.
        padding: drafts without content, by id, beside prompts with one token to compute, as in vLLM.
        chunks, prefill_tokens, prefill_context: sequences that prefill, and tokens of each.
        sat_out: ids that the gate excluded.
    """

    decodes: list[SimulatedSequence] = field(default_factory=list)
    decode_context: int = 0
    drafts: list[int] = field(default_factory=list)
    offered: int = 0
    accepted_tokens: int = 0
    gained: list[int] = field(default_factory=list)
    padding: dict[str, int] = field(default_factory=dict)
    chunks: list[tuple[SimulatedSequence, int]] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_context: int = 0
    recomputed_tokens: int = 0
    sat_out: set[str] = field(default_factory=set)

    @property
    def empty(self) -> bool:
        """Whether the step has no work."""
        return not self.decodes and not self.chunks

    @property
    def draft_tokens(self) -> int:
        """Drafts that the step verifies."""
        return sum(self.drafts)

    @property
    def padding_tokens(self) -> int:
        """Tokens of all padding."""
        return sum(self.padding.values())

    def tokens(self) -> Iterator[tuple[SimulatedSequence, int]]:
        """Return each decoding sequence and the tokens that it gets. Call it once the step is finished."""
        return zip(self.decodes, self.gained or repeat(1), strict=False)

    def report(self, elapsed_s: float) -> StepReport:
        """Return the report of the finished step, which took ``elapsed_s``."""
        decodes = len(self.decodes)
        return StepReport(
            decodes,
            self.prefill_tokens + self.padding_tokens,
            self.decode_context / decodes if decodes else 0.0,
            elapsed_s,
            sum([n > 0 for n in self.drafts]),
            self.draft_tokens,
            self.accepted_tokens,
            self.recomputed_tokens,
            self.offered,
        )


@dataclass(slots=True)
class Finished:
    """Result of a step: sequences whose prefill it completed (they got a token too), and finished sequences."""

    prefilled: list[SimulatedSequence]
    done: list[SimulatedSequence]
