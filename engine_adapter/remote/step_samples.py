"""Estimates step times of a remote engine from the timing of its streams.

A remote server without the report channel sends no step reports. Each of its streams gets one token per step, so the
time between two tokens is one step. With accepted drafts, a step brings several tokens. The time to first token is one
prefill, if no other prefill delayed it. With a step gate, only the streams with the strictest pace decode in every
step. Other streams count in the batch by their share of the steps (SCORPIO's virtual batch size).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from engine_adapter.engine import EngineState

SAMPLE_EVERY = 20
"""Tokens of one stream per decode sample."""

SILENCE_S = 60.0
"""Shortest silence (s) of all streams after which a server counts as hung."""

GAP_FACTOR, PREFILL_FACTOR = 10.0, 5.0
"""Silence may also last this multiple of the longest recent gap between two tokens of a stream, and this multiple of
the predicted prefill of the prompts that the server has. Generous by convention."""

GAP_DECAY = 0.99
"""Factor on the longest gap at each look, about every two seconds: it halves in two minutes."""


@dataclass(slots=True, eq=False)
class StreamTiming:
    """Token arrivals of one request. Lengths are in tokens, times in monotonic seconds.

    Attributes:
        alone: no other request was waiting for its first token at the same time.
        tpot_ms: pace (ms per token) by which the step gate makes the request skip steps; None if it skips none.
        may_pause: the server may hold its tokens back: those of a tool call, until the call is complete.
        batch_at_first, context_at_first: virtual batch size and mean context when the first token arrived.
    """

    sent_at: float
    prompt_tokens: float
    sequences: int
    alone: bool
    tpot_ms: float | None = None
    may_pause: bool = False
    first_at: float | None = None
    batch_at_first: float = 0.0
    context_at_first: float = 0.0
    tokens: float = 0.0
    _last_at: float = 0.0
    _gaps: list[float] = field(default_factory=list)
    _since_sample: float = 0.0

    @property
    def kv_tokens(self) -> float:
        """Its tokens in the KV cache."""
        return self.prompt_tokens * self.sequences + self.tokens


@dataclass(slots=True)
class _Decoding:
    """The sequences of the decoding streams with one pace, and their tokens in the KV cache."""

    sequences: int = 0
    kv_tokens: float = 0.0


class StepSampler:
    """Derives samples for one engine's step-time model from its streams.

    ``learns``: False while the engine reports its steps; then the model gets no samples from here.
    """

    def __init__(self, state: EngineState) -> None:
        self.learns = True
        self._state = state
        self._streams: set[StreamTiming] = set()
        self._prefilling = self._may_pause = 0
        self._alone: StreamTiming | None = None
        # By pace (ms per token). Sums, because each first token asks for them and there may be thousands of streams.
        self._decoding: dict[float | None, _Decoding] = {}
        self._longest_gap_s = 0.0

    def sent(
        self, at: float, prompt_tokens: float, sequences: int, tpot_ms: float | None = None, may_pause: bool = False
    ) -> StreamTiming:
        """Record that a request was sent.

        Args:
            at: when, in monotonic seconds.
            prompt_tokens: prompt length; may be an estimate.
            sequences: sequences that the request generates.
            tpot_ms: pace (ms per token) by which the step gate makes the request skip steps.
            may_pause: the server may hold its tokens back until a tool call is complete.
        """
        if self._alone is not None and self._prefilling:
            # Concurrent prompts share the engine's prefill, so none of their TTFTs measures a single prefill.
            self._alone.alone = False
        stream = StreamTiming(
            at, prompt_tokens, max(1, sequences), alone=not self._prefilling, tpot_ms=tpot_ms, may_pause=may_pause
        )
        self._alone = None if self._prefilling else stream
        self._prefilling += 1
        self._streams.add(stream)
        return stream

    def tokens(self, stream: StreamTiming, count: float, at: float) -> bool:
        """Record that ``count`` tokens of ``stream`` arrived at ``at``. Returns whether the model got a sample.

        ``count`` may be an estimate.
        """
        if count <= 0:
            return False
        stream.tokens += count
        if stream.first_at is None:
            self._prefilling -= 1
            self._may_pause += stream.may_pause
            stream.batch_at_first, stream.context_at_first = self._batch()
            stream.first_at = stream._last_at = at
            decoding = self._decoding.setdefault(stream.tpot_ms, _Decoding())
            decoding.sequences += stream.sequences
            decoding.kv_tokens += stream.kv_tokens
            return False
        self._decoding[stream.tpot_ms].kv_tokens += count
        gap = at - stream._last_at
        # NOTE: `max` costs as much as three calls of Python functions, for each event of each stream.
        self._longest_gap_s = gap if gap > self._longest_gap_s else self._longest_gap_s
        if not self.learns:
            stream._last_at = at
            return False
        stream._gaps.append(gap * stream.sequences / count)
        stream._last_at = at
        stream._since_sample += count
        if stream._since_sample < SAMPLE_EVERY:
            return False
        # The model needs decode-only steps. The median ignores steps lengthened by a prefill.
        step = median(stream._gaps) * self._state.tokens_per_step
        stream._gaps.clear()
        stream._since_sample = 0.0
        if stream.tpot_ms is not None and stream.tpot_ms > self._strictest():
            return False  # the request skips steps, so its gaps span several steps
        batch, context = self._batch()
        self._state.step_time.observe(batch, 0, context, step)
        return True

    def silence_limit_s(self, reports_progress: bool = False) -> float:
        """Return how long (s) the server may send nothing; infinite if it may be right to. Call it regularly.

        It is right while no stream has begun, and while each may pause, unless ``reports_progress``: then the server
        itself says whether it computes something.
        """
        self._longest_gap_s *= GAP_DECAY
        begun = len(self._streams) - self._prefilling
        if not begun or (begun == self._may_pause and not reports_progress):
            return math.inf
        prompt_tokens = sum(stream.prompt_tokens for stream in self._streams if stream.first_at is None)
        prefill_s = self._state.step_time.prefill(prompt_tokens) if prompt_tokens else 0.0
        return max(SILENCE_S, GAP_FACTOR * self._longest_gap_s, PREFILL_FACTOR * prefill_s)

    def finished(self, stream: StreamTiming, computed: int | None) -> bool:
        """Record the end of a request. Returns whether the model got a prefill sample.

        ``computed``: prompt tokens that the server computed; None if unknown.
        """
        self._streams.discard(stream)
        if stream.first_at is None:
            self._prefilling -= 1
            return False
        self._may_pause -= stream.may_pause
        decoding = self._decoding[stream.tpot_ms]
        decoding.sequences -= stream.sequences
        decoding.kv_tokens -= stream.kv_tokens
        if not decoding.sequences:
            del self._decoding[stream.tpot_ms]
        # A longer prompt takes several steps, and their decode time would count as prefill.
        if not self.learns or not stream.alone or not computed or computed > self._state.max_num_batched_tokens:
            return False
        elapsed = stream.first_at - stream.sent_at
        if stream.batch_at_first:
            # The request first waited for the current step to end: half a step on average.
            elapsed -= self._state.step_time.itl(stream.batch_at_first, stream.context_at_first) / 2
        self._state.step_time.observe(stream.batch_at_first, computed, stream.context_at_first, elapsed)
        return True

    def _strictest(self) -> float:
        """The strictest pace (ms per token) of the decoding streams; infinite if none has one."""
        return min((pace for pace in self._decoding if pace is not None), default=math.inf)

    def _batch(self) -> tuple[float, float]:
        """Current virtual batch size and mean context of the decoding streams."""
        strictest = self._strictest()
        batch, sequences, kv_tokens = 0.0, 0, 0.0
        for pace, decoding in self._decoding.items():
            batch += decoding.sequences * (1.0 if pace is None else strictest / pace)
            sequences += decoding.sequences
            kv_tokens += decoding.kv_tokens
        return batch, kv_tokens / sequences if sequences else 0.0
