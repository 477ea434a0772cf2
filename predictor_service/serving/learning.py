"""Handles finished requests: fits corrections, saves them to disk, and collects training data.

Observing is cheap and happens on the request path. Fitting, saving and writing run in a thread, once every
`WORK_INTERVAL_S`, so that no prediction waits for them. SIGTERM loses nothing. SIGKILL loses the observations since the
last save: at most `SAVE_INTERVAL_S` + `WORK_INTERVAL_S` and the time of the write.
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

WORK_INTERVAL_S, SAVE_INTERVAL_S = 0.25, 1.0
"""Seconds between two fits, and minimum seconds between two saves."""


class Learning:
    """Online learning. ``state`` None: corrections end with the process. ``collector`` None: no data is collected."""

    def __init__(self, state: CalibrationState | None = None, collector: Collector | None = None) -> None:
        self.calibration = OnlineCalibration()
        self.failures = 0
        """Number of failed writes, of corrections or of training data."""
        self._state, self._collector = state, collector
        self._saved, self._saved_at = 0, -SAVE_INTERVAL_S
        self._task: asyncio.Task[None] | None = None
        if state is not None and state.load(self.calibration):
            log.info("corrections restored")

    def correct(
        self, inputs: Sequence[Input], raw: Sequence[Prediction], features: Sequence[Features] | None = None
    ) -> list[Predicted]:
        """Return ``raw`` predictions and their corrections, clamped to min and max tokens of each input.

        Quantiles commute with a clamp, so that these are the quantiles of the answer that the engine clamps likewise.
        ``features``: the features of ``inputs``, if the caller has computed them.
        """
        if self._collector is not None:
            for index, entry in enumerate(inputs):
                if entry.id is not None:
                    self._collector.record_prediction(entry.id, features[index] if features else entry.to_features())
        return [
            Predicted(prediction, self._corrected(entry, prediction))
            for entry, prediction in zip(inputs, raw, strict=True)
        ]

    def _corrected(self, entry: Input, raw: Prediction) -> Prediction:
        corrected = self.calibration.correct(entry.model, entry.slo_class, raw)
        return corrected.clamped(entry.min_tokens, entry.max_tokens)

    def observe(self, observations: Sequence[Observation]) -> None:
        """Record finished requests."""
        self.calibration.observe(observation.answer for observation in observations)
        if self._collector is None:
            return
        for observation in observations:
            if observation.id is not None:
                answer = observation.answer
                self._collector.record_finish(
                    observation.id, answer.model, answer.slo_class, answer.tokens, answer.censored
                )

    async def start(self) -> None:
        """Start to fit, save and write in the background."""
        self._task = asyncio.create_task(self._run(), name="learn")

    async def stop(self) -> None:
        """Stop, then fit and save what is left. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None
            await asyncio.to_thread(self.work, last=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(WORK_INTERVAL_S)
            await asyncio.to_thread(self.work)

    def work(self, *, last: bool = False) -> None:
        """Fit, write training data, and save the corrections if due or if ``last``. Never raises."""
        try:
            self.calibration.refit()
        except Exception as error:  # must stop neither learning nor the service
            log.error("fitting corrections failed: %s", type(error).__name__, exc_info=error)
        for write in (self._write, partial(self._save, last)):
            try:
                write()
            except OSError as error:
                self.failures += 1
                if self.failures == 1:
                    log.warning("cannot write corrections or training data: %s", error.strerror)

    def _write(self) -> None:
        if self._collector is not None:
            self._collector.write()

    def _save(self, last: bool) -> None:
        observed, now = self.calibration.observed, time.monotonic()
        due = observed != self._saved and (last or now - self._saved_at >= SAVE_INTERVAL_S)
        if self._state is not None and due:
            self._saved_at = now
            self._state.save(self.calibration)
            self._saved = observed
