"""What the service does with finished requests: corrects by them, keeps what it learnt, collects training data.

Observing is cheap and happens at once. Fitting, saving and writing happen in a thread of their own, every `EVERY_S`
seconds at most, so that no prediction waits for them. A SIGKILL loses what came in since the last save: `SAVE_EVERY_S`,
`EVERY_S` and the write itself at most; a SIGTERM loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from functools import partial

from predictor_service.calibration.online import OnlineCalibration
from predictor_service.calibration.state import CalibrationState
from predictor_service.model.features import Features
from predictor_service.model.length_model import Prediction
from predictor_service.serving.collecting import Collector
from predictor_service.serving.wire import Input, Observation, Predicted

log = logging.getLogger("antares.predictor")

EVERY_S, SAVE_EVERY_S = 0.25, 1.0
"""How often to look whether there is something to fit, and how often at most to save it."""


class Learning:
    """``state`` None: corrections end with the process. ``collector`` None: nothing is collected."""

    def __init__(self, state: CalibrationState | None = None, collector: Collector | None = None) -> None:
        self.calibration = OnlineCalibration()
        self.failures = 0
        """Times that a file could not be written."""
        self._state, self._collector = state, collector
        self._saved, self._saved_at = 0, -SAVE_EVERY_S
        self._task: asyncio.Task[None] | None = None
        if state is not None and state.load(self.calibration):
            log.info("corrections restored")

    def served(
        self, inputs: Sequence[Input], raw: Sequence[Prediction], features: Sequence[Features] | None = None
    ) -> list[Predicted]:
        """``raw`` predictions corrected for their model and class, and within the inputs' bounds.

        Quantiles commute with a clamp, so the clamped ones are those of the answer as the engine will hold it.
        ``features``: the inputs', where they are at hand.
        """
        if self._collector is not None:
            for place, one in enumerate(inputs):
                if one.id is not None:
                    self._collector.remember(one.id, features[place] if features else one.to_features())
        return [Predicted(said, self._served(one, said)) for one, said in zip(inputs, raw, strict=True)]

    def _served(self, one: Input, raw: Prediction) -> Prediction:
        return self.calibration.correct(one.model, one.slo_class, raw).clamped(one.min_tokens, one.max_tokens)

    def observe(self, observations: Sequence[Observation]) -> None:
        """These requests have finished."""
        self.calibration.observe(one.answer for one in observations)
        if self._collector is not None:
            for one in observations:
                if one.id is not None:
                    answer = one.answer
                    self._collector.finished(one.id, answer.model, answer.slo_class, answer.tokens, answer.censored)

    async def start(self) -> None:
        """Begin to fit, save and write in the background."""
        self._task = asyncio.create_task(self._run(), name="learn")

    async def stop(self) -> None:
        """End, with everything saved. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            await asyncio.to_thread(self.work, last=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            await asyncio.to_thread(self.work)

    def work(self, *, last: bool = False) -> None:
        """Fit, write, and save if that is due or this is the ``last`` time. Never raises."""
        try:
            self.calibration.refit()
        except Exception as error:  # a bug here must not end learning, nor the service
            log.error("fitting corrections failed: %s", type(error).__name__, exc_info=error)
        for write in (self._write, partial(self._save, last)):
            try:
                write()
            except OSError as failed:
                self.failures += 1
                if self.failures == 1:
                    log.warning("what was learnt cannot be written: %s", failed.strerror)

    def _write(self) -> None:
        if self._collector is not None:
            self._collector.write()

    def _save(self, last: bool) -> None:
        observed, now = self.calibration.observed, time.monotonic()
        due = observed != self._saved and (last or now - self._saved_at >= SAVE_EVERY_S)
        if self._state is not None and due:
            self._saved_at = now
            self._state.save(self.calibration)
            self._saved = observed
