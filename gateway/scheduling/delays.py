"""What delays a first token beside the prompts ahead of it: the gateway's own time, and the step under way."""

from __future__ import annotations

from collections.abc import Collection

from engine_adapter.engine import EngineState
from gateway.policies.base import prefill_backlog
from gateway.requests.request import Request

RISE, FALL = 1.2, 0.98
"""Factors on the estimate after a longer and after a shorter time. They balance if one time in ten is longer, because
ln(1.2) = -9 * ln(0.98). So the estimate follows the 90th percentile, and one stall changes it little."""

LEAST_S = 1e-4
"""Least estimate (s) of the gateway's own time, from which it can grow."""

OVERDUE_S, OVERDUE_FACTOR = 0.5, 4.0
"""A step is overdue after this time (s), and this multiple of its predicted time. Generous by convention."""


def note_handover(engine: EngineState, seconds: float) -> None:
    """Note that ``engine`` had a request ``seconds`` after its admission: the gateway's own time."""
    if seconds > engine.handover_s:
        engine.handover_s = max(LEAST_S, min(seconds, engine.handover_s * RISE))
    else:
        engine.handover_s = max(LEAST_S, engine.handover_s * FALL)


def overdue_s(now: float, running: Collection[Request], engine: EngineState) -> float:
    """Return the expected remaining time (s) of a step that is overdue, 0 of any other.

    Such a step may take as long again as it has taken: the engine compiles, is starved of CPU time, or hangs.
    """
    if engine.last_step_at is None or not running or now - engine.last_step_at <= OVERDUE_S:
        return 0.0
    began = min(request.admitted_s for request in running if request.admitted_s is not None)
    silent_s = now - max(began, engine.last_step_at)
    step_s = decode_step_s(running, engine) + prefill_backlog(running, engine)
    return silent_s if silent_s > max(OVERDUE_S, OVERDUE_FACTOR * step_s) else 0.0


def decode_step_s(running: Collection[Request], engine: EngineState) -> float:
    """Return the seconds of a step in which all ``running`` requests decode, 0 if there are none."""
    sequences = context = 0
    for request in running:
        sequences += request.sequences
        # Its length times its sequences.
        context += request.prompt_tokens * request.sequences + request.generated
    return engine.step_time.curve.step_s(sequences, context) if sequences else 0.0


def work_ahead_s(now: float, running: Collection[Request], engine: EngineState) -> float:
    """Return the seconds until a request that is admitted now gets its first token, without its own prefill.

    The gateway hands the request over, the step under way ends, the prompts of ``running`` requests are prefilled, and
    the decodes of the request's own step take their time.
    """
    step_s = decode_step_s(running, engine)
    left_s = step_s / 2
    if engine.last_step_at is not None and engine.last_step_at <= now:
        left_s = max(0.0, step_s - (now - engine.last_step_at), overdue_s(now, running, engine))
    return engine.handover_s + left_s + prefill_backlog(running, engine) + step_s
