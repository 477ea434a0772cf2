"""Whether an engine has so much room that the output length of one more request decides nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine_adapter.engine import EngineState
from gateway.requests.request import Request

AMPLE = 0.5
"""Share of an engine's slots and KV memory, and of a request's bounds, up to which no request waits for its prediction.
It leaves a factor of two for errors of the step-time model. Convention."""

ROOM_S = 0.05
"""Seconds for which the sums over an engine's requests are used again. Contexts grow by a few tokens in that time."""


class Room:
    """What the waiting and the running requests of one engine need together, as of the time when it was made.

    Requests that are queued later are added. One that ends is not removed, so the sums err on the safe side.
    """

    __slots__ = ("_context", "_deadline_s", "_engine", "_memory", "_pace_s", "_prefill_s", "_sequences", "until_s")

    def __init__(self, now: float, engine: EngineState, requests: Iterable[Request]) -> None:
        self.until_s = now + ROOM_S
        """When the sums are too old (monotonic s)."""
        self._engine = engine
        self._sequences = engine.foreign_sequences
        self._context = self._memory = engine.foreign_tokens
        self._prefill_s = 0.0
        self._pace_s = self._deadline_s = math.inf
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        """Count ``request`` too."""
        sequences = request.sequences
        self._sequences += sequences
        self._context += request.prompt_tokens * sequences + request.generated
        self._memory += _memory(request)
        if request.pace_s is not None and request.pace_s < self._pace_s:
            self._pace_s = request.pace_s
        if request.first_token_s is None and not request.unobserved:
            self._prefill_s += self._engine.step_time.prefill(request.uncached_tokens)
            self._deadline_s = min(self._deadline_s, request.deadline_s)

    def is_ample_for(self, request: Request, prefill_s: float, now: float) -> bool:
        """Whether the engine needs at most `AMPLE` of what it has for all of them and ``request``, in any order.

        It has sequences, KV memory, the time of each pace and the time until each deadline. ``prefill_s``: seconds that
        the prompt of ``request`` takes. While all decode, prompts get the share 1 - step / pace of the time.
        """
        engine, sequences = self._engine, self._sequences + request.sequences
        if sequences > AMPLE * engine.max_num_seqs:
            return False
        if engine.kv_tokens and self._memory + _memory(request) > AMPLE * engine.kv_tokens:
            return False
        context = self._context + request.prompt_tokens * request.sequences
        step_s = engine.step_time.curve.step_s(sequences, context)
        pace_s = self._pace_s if request.pace_s is None else min(self._pace_s, request.pace_s)
        if step_s > AMPLE * pace_s:
            return False
        needed_s = step_s + (self._prefill_s + prefill_s) / (1 - step_s / pace_s)
        return needed_s <= AMPLE * (min(self._deadline_s, request.deadline_s) - now)


def _memory(request: Request) -> float:
    """Return the tokens of KV memory that ``request`` probably needs in the end."""
    p50, p90 = request.predicted_tokens, request.predicted_p90
    # NOTE: `max` costs as much as three calls of Python functions, and a room is made of hundreds of requests.
    return (request.prompt_tokens + (p90 if p90 > p50 else p50)) * request.sequences
