"""What the timing of streams tells about an engine's steps when the engine itself reports nothing.

A remote server sends no step reports. But each of its streams gets one token a step, so the time between a
stream's tokens is a step's duration, and the time to a first token that nobody else's prefill delayed is a
prefill's. Behind a step gate only the streams with the strictest TPOT bound decode in every step; the others count in
the batch with their share of the steps (the virtual batch size).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from engine_adapter.engine import EngineState

SAMPLE_EVERY = 20
"""Tokens of one stream per sample."""


@dataclass(slots=True, eq=False)
class StreamTiming:
    """One request's tokens as they arrive. Lengths in tokens, times in monotonic seconds."""

    sent_at: float
    prompt_tokens: float
    sequences: int
    alone: bool
    tpot_ms: float | None = None
    first_at: float | None = None
    batch_at_first: float = 0.0
    context_at_first: float = 0.0
    tokens: int = 0
    _last_at: float = 0.0
    _gaps: list[float] = field(default_factory=list)
    _since_sample: int = 0

    @property
    def context(self) -> float:
        """Mean tokens in the KV cache per sequence."""
        return self.prompt_tokens + self.tokens / self.sequences


class StepSampler:
    """Turns one engine's streams into samples for its step-time model, at a few additions per read."""

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._streams: set[StreamTiming] = set()
        self._unanswered = 0

    def sent(self, at: float, prompt_tokens: float, sequences: int, tpot_ms: float | None = None) -> StreamTiming:
        """A request was sent at ``at``, with ``tpot_ms`` for the step gate. ``prompt_tokens`` may be a guess."""
        if self._unanswered:
            # Two prompts share the engine's prefill: the time to either's first token is not its own.
            for other in self._streams:
                if other.first_at is None:
                    other.alone = False
        stream = StreamTiming(at, prompt_tokens, max(1, sequences), alone=not self._unanswered, tpot_ms=tpot_ms)
        self._unanswered += 1
        self._streams.add(stream)
        return stream

    def tokens(self, stream: StreamTiming, count: int, at: float) -> bool:
        """``count`` tokens of ``stream`` arrived together at ``at``. Returns whether the model learnt."""
        if count <= 0:
            return False
        stream.tokens += count
        if stream.first_at is None:
            self._unanswered -= 1
            stream.batch_at_first, stream.context_at_first = self._decoding()
            stream.first_at = stream._last_at = at
            return False
        stream._gaps.append((at - stream._last_at) * stream.sequences / count)
        stream._last_at = at
        stream._since_sample += count
        if stream._since_sample < SAMPLE_EVERY:
            return False
        # The median drops steps that somebody's prefill lengthened; the model wants those that only decode.
        step = median(stream._gaps)
        stream._gaps.clear()
        stream._since_sample = 0
        if stream.tpot_ms is not None and stream.tpot_ms > self._strictest():
            return False  # it sits out steps: its gaps are longer than they are
        batch, context = self._decoding()
        self._state.step_time.observe(batch, 0, context, step)
        return True

    def finished(self, stream: StreamTiming, computed: int | None) -> bool:
        """The request ended; the server may have said how many prompt tokens it ``computed``.

        Returns whether the model learnt from it.
        """
        self._streams.discard(stream)
        if stream.first_at is None:
            self._unanswered -= 1
            return False
        # A longer prompt takes several steps, whose decodes would be counted as prefill.
        if not stream.alone or not computed or computed > self._state.max_num_batched_tokens:
            return False
        elapsed = stream.first_at - stream.sent_at
        if stream.batch_at_first:
            # It first waited for the step under way, on average half of one.
            elapsed -= self._state.step_time.itl(stream.batch_at_first, stream.context_at_first) / 2
        self._state.step_time.observe(stream.batch_at_first, computed, stream.context_at_first, elapsed)
        return True

    def _strictest(self) -> float:
        """The least TPOT bound (ms) among the decoding streams; infinite without any."""
        bounds = (s.tpot_ms for s in self._streams if s.first_at is not None and s.tpot_ms is not None)
        return min(bounds, default=math.inf)

    def _decoding(self) -> tuple[float, float]:
        """Sequences in a step now (their virtual number, behind a gate), and their mean context."""
        strictest = self._strictest()
        batch, sequences, context = 0.0, 0, 0.0
        for stream in self._streams:
            if stream.first_at is not None:
                share = 1.0 if stream.tpot_ms is None else strictest / stream.tpot_ms
                batch += share * stream.sequences
                sequences += stream.sequences
                context += stream.context * stream.sequences
        return batch, context / sequences if sequences else 0.0
