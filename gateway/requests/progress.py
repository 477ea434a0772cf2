"""How far one admitted request has come, as its engine tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.requests.request import Request


@dataclass(slots=True)
class _Sequence:
    first: float
    last: float
    tokens: int


@dataclass(slots=True)
class Progress:
    """Implements `engine_adapter.engine.TokenObserver`. ``on_first_token`` is called once.

    On the hot path: one call per sequence and engine step.
    """

    request: Request
    on_first_token: Callable[[], None]
    prompt_tokens: int = 0
    _sequences: dict[str, _Sequence] = field(default_factory=dict)

    def on_prompt(self, sequence: str, tokens: int) -> None:
        """The engine's own count replaces the estimate."""
        self.prompt_tokens = max(self.prompt_tokens, tokens)
        self.request.prompt_tokens = self.prompt_tokens

    def on_unobserved(self) -> None:
        """Its prompt must not count as unprefilled for as long as it runs."""
        self.request.unobserved = True

    def on_tokens(self, sequence: str, count: int, at: float) -> None:
        """New output tokens."""
        request = self.request
        request.advance(count)
        seen = self._sequences.get(sequence)
        if seen is not None:
            seen.tokens += count
            seen.last = at
            return
        self._sequences[sequence] = _Sequence(at, at, count)
        if request.first_token_s is None:
            request.first_token_s = at
            self.on_first_token()

    @property
    def tpot_s(self) -> float:
        """TPOT by the times at which tokens left the engine; of several sequences, the slowest's. 0 up to one token."""
        return max((tpot(s.first, s.last, s.tokens) for s in self._sequences.values()), default=0.0)


def tpot(first_s: float, last_s: float, tokens: int) -> float:
    """(time of last token - time of first token) / (tokens - 1); 0 when there is at most one token."""
    return (last_s - first_s) / (tokens - 1) if tokens > 1 else 0.0
