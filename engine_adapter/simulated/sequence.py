"""One sequence of tokens inside a simulated engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine_adapter.gates.best_effort_preemption import Member
from engine_adapter.gates.phase import is_prefilling, tokens_left
from engine_adapter.service_kind import ServiceKind, default_kind

BLOCK_TOKENS = 16
"""Tokens in a block of KV memory."""


def _ignore(*_: object) -> None:
    pass


@dataclass(slots=True, eq=False)
class SimulatedSequence:
    """One sequence. Lengths are in tokens.

    Attributes:
        kind, pace_s, gate: as in `gates.base.GatedRequest`.
        on_token: ``on_token(generated, at)``, called by the real-time engine after each step that produced a token.
        on_cached: ``on_cached(tokens)``, called once, when the scheduler first admits the prompt: its prefix-cache hit.
        on_lost: called if the real-time engine dies.
        blocks: chained hashes of the token blocks of the prompt and the answer, from the first block on. Tokens after
            the last hash are never shared.
        abandoned: set by the app once the sequence is aborted.
        length: the context, that is, the prompt and the generated tokens.
        final_length: ``length`` of the finished sequence.
        drafts: draft tokens that the next decode may verify (speculative decoding).
        backlog: tokens to compute, by the prefix cache at the time the sequence was queued.
        computed: the part of ``length`` that is computed or was found in the prefix cache; 0 after a preemption.
        cached_tokens: prefix-cache hit of the prompt (tokens); None until the scheduler first admits it.
        capacity: tokens that fit in the KV blocks of the sequence.
        held_hashes: the cached blocks among them.
        full_blocks: leading blocks that are full and were offered to the prefix cache.
        preemptible: whether paced and deadline-only requests may preempt it (`gates.best_effort_preemption`).
        held: whether its prompt sits out this step.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    pace_s: float | None = None
    gate: str = ""
    kind: ServiceKind = None  # type: ignore[assignment]  # from the pace, in __post_init__
    on_token: Callable[[int, float], None] = _ignore
    on_lost: Callable[[], None] = _ignore
    on_cached: Callable[[int], None] = _ignore
    blocks: Sequence[int] = ()
    abandoned: bool = False
    length: int = field(init=False)
    final_length: int = field(init=False)
    backlog: int = 0
    drafts: int = 0
    computed: int = 0
    capacity: int = 0
    preemptions: int = 0
    preemptible: bool = False
    held: bool = False
    cached_tokens: int | None = None
    held_hashes: list[int] = field(default_factory=list)
    full_blocks: int = 0

    def __post_init__(self) -> None:
        if self.kind is None:
            self.kind = default_kind(self.pace_s)
        self.length = self.prompt_tokens
        self.final_length = self.prompt_tokens + self.output_tokens

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return self.length - self.prompt_tokens

    @property
    def left(self) -> int:
        """Tokens that remain to be computed."""
        return tokens_left(self.length, self.computed)

    @property
    def prefilling(self) -> bool:
        """Whether the next step computes a chunk of the sequence."""
        return is_prefilling(self.left, self.computed, self.prompt_tokens)


def member(sequence: SimulatedSequence, *, prefilling: bool = False) -> Member:
    """Return ``sequence`` as best-effort preemption sees it."""
    return Member(
        sequence,
        sequence.preemptible,
        held=sequence.capacity // BLOCK_TOKENS,
        needed=-(-sequence.length // BLOCK_TOKENS),
        prefilling=prefilling,
        preempted_before=sequence.preemptions > 0,
    )
