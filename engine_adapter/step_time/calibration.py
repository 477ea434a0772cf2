"""A few seconds of known work for an engine, so that its step-time model knows the machine it runs on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from engine_adapter.step_time.model import StepTimeModel

CALIBRATION_S = 4.0
"""About how long a calibration takes: half of it for prefill, half for decode; no round starts later."""

PROBE_S = 1.5
"""The same for a probe of an idle engine."""

_PREFILLS = (8, 16, 24, 32, 48, 64, 96, 128)
_BATCHES = (1, 2, 4, 8)

RunRequest = Callable[[int, int, int], Awaitable[None]]
"""Has the engine answer one synthetic request: prompt tokens, output tokens, and a salt that keeps it out of caches."""


async def warm_up(run: RunRequest, model: StepTimeModel) -> None:
    """Pay the one-time costs of a new engine (allocation, kernel selection): nothing to learn from them."""
    model.learn = False
    try:
        await run(8, 4, 0)
        await run(64, 4, 1)
    finally:
        model.learn = True


async def calibrate(run: RunRequest, model: StepTimeModel, max_num_seqs: int, seconds: float = CALIBRATION_S) -> None:
    """Teach ``model`` prefill times of rising prompts, then decode times of rising batches."""
    until = time.monotonic() + seconds / 2
    for salt, tokens in enumerate(_PREFILLS, start=2):
        await run(tokens, 1, salt)
        if time.monotonic() > until:
            break
    until = time.monotonic() + seconds / 2
    for batch in _BATCHES:
        size = min(batch, max_num_seqs)
        await asyncio.gather(*(run(8 + 8 * i, 12, 100 * batch + i) for i in range(size)))
        if time.monotonic() > until:
            break
    # The gate's last report travels by another way than the tokens.
    await asyncio.sleep(0.05)
    model.refit()
