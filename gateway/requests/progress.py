"""The progress of one admitted request, as its engine reports it."""

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
    """A `engine_adapter.engine.TokenObserver` that updates ``request``. ``on_first_token`` is called once.

    ``on_cache_hit`` is called with the predicted and the actual prefix-cache hit (tokens), once the engine reports it.
    NOTE: `on_tokens` is on the hot path: one call per sequence and engine step.
    """

    request: Request
    on_first_token: Callable[[], None]
    on_cache_hit: Callable[[int, int], None] = lambda predicted, actual: None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    _longest: str | None = None
    _sequences: dict[str, _Sequence] = field(default_factory=dict)

    def on_prompt(self, sequence: str, tokens: int) -> None:
        """Replace the estimated prompt size by the engine's count."""
        if tokens > self.prompt_tokens:
            self._longest, self.prompt_tokens = sequence, tokens
        self.request.prompt_tokens = self.prompt_tokens

    def on_cached(self, sequence: str, tokens: int) -> None:
        """Replace the predicted prefix-cache hit by the engine's count, of the first sequence of the longest prompt.

        The prediction is for that prompt, and its other sequences find it in the cache.
        """
        if self.cached_tokens is None and self._longest in (sequence, None):
            self.cached_tokens = tokens
            self.on_cache_hit(self.request.cached_tokens, tokens)
            self.request.cached_tokens = tokens

    def on_unobserved(self) -> None:
        """Note that no token is reported before the answer is complete, so the prompt does not count as unprefilled."""
        self.request.unobserved = True

    def on_tokens(self, sequence: str, count: int, at: float) -> None:
        """Count ``count`` new output tokens of ``sequence`` at ``at`` (monotonic s)."""
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
        """The TPOT (s) at the engine, of the slowest sequence; 0 with at most one token."""
        return max((tpot(s.first, s.last, s.tokens) for s in self._sequences.values()), default=0.0)


def tpot(first_s: float, last_s: float, tokens: int) -> float:
    """Return (time of last token - time of first token) / (tokens - 1); 0 with at most one token."""
    return (last_s - first_s) / (tokens - 1) if tokens > 1 else 0.0
