"""Calibrates the step-time model of an engine with a few seconds of synthetic requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from engine_adapter.step_time.model import StepTimeModel

CALIBRATION_S = 4.0
"""Approximate duration of a calibration: half for prefill, half for decode. No round starts after its half is over."""

PROBE_S = 1.5
"""Approximate duration of the calibration when an idle engine is probed."""

_PREFILLS = (8, 16, 24, 32, 48, 64, 96, 128)
"""Prompt lengths (tokens) of the prefill rounds."""
_BATCHES = (1, 2, 4, 8)
"""Concurrent requests of the decode rounds."""

RunRequest = Callable[[int, int, int], Awaitable[None]]
"""Runs one synthetic request. Arguments: prompt tokens, output tokens, and a salt that avoids prefix-cache hits."""


async def warm_up(run: RunRequest, model: StepTimeModel) -> None:
    """Run requests without learning from them: a new engine has one-time costs (allocation, kernel selection)."""
    model.learn = False
    try:
        await run(8, 4, 0)
        await run(64, 4, 1)
    finally:
        model.learn = True


async def calibrate(run: RunRequest, model: StepTimeModel, max_num_seqs: int, seconds: float = CALIBRATION_S) -> None:
    """Run prompts of increasing length, then batches of increasing size, and fit ``model`` to their steps."""
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
    # The gate's last report takes another channel than the tokens and may arrive later.
    await asyncio.sleep(0.05)
    model.refit()
