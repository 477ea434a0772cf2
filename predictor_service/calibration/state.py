"""Corrections on disk: one JSON file in a state folder, replaced whole, so that a kill at any time leaves the old one.

    {"format": 1, "predictor": <which length model the answers were predicted by>,
     "windows": [{"model", "slo_class", "rows"}, ...]}        (`online_calibration.OnlineCalibration.to_document`)

The answers are relative to what one length model said of them; another length model starts without them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import orjson

from predictor_service.calibration.online import OnlineCalibration

log = logging.getLogger("antares.predictor")

STATE_FILE = "calibration.json"
FORMAT = 1


class StateUnusable(Exception):  # noqa: N818 - it names what happened
    """The state folder cannot be written; the message says which and why."""


class CalibrationState:
    """The file in ``folder``, which is made if need be. ``predictor`` names the length model.

    Raises `StateUnusable`.
    """

    def __init__(self, folder: Path, predictor: str) -> None:
        self._file = folder / STATE_FILE
        self._predictor = predictor
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{STATE_FILE}.probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as refused:
            raise StateUnusable(f"the state folder {folder} cannot be written: {refused.strerror}") from None

    def load(self, calibration: OnlineCalibration) -> bool:
        """Hand what was saved to ``calibration``; False when there is nothing that fits. Never raises: a service that
        starts without corrections is better than none."""
        try:
            document = orjson.loads(self._file.read_bytes())
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise ValueError(f"not of format {FORMAT}")
            if document.get("predictor") != self._predictor:
                log.info("the corrections in %s belong to another length model: starting without", self._file)
                return False
            calibration.restore(document.get("windows"))
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as damaged:
            log.warning("the corrections in %s cannot be read (%s): starting without", self._file, damaged)
            return False
        return True

    def save(self, calibration: OnlineCalibration) -> None:
        """Write ``calibration``'s windows. Raises OSError; the file is then as it was."""
        document = {"format": FORMAT, "predictor": self._predictor, "windows": calibration.to_document()}
        fresh = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            with fresh.open("wb") as out:
                out.write(orjson.dumps(document))
                out.flush()
                os.fsync(out.fileno())
            fresh.replace(self._file)
        finally:
            fresh.unlink(missing_ok=True)


def fingerprint(name: str, folder: Path) -> str:
    """``name`` with a digest of the model's cards in ``folder``: trained anew, it is another length model."""
    digest = hashlib.blake2b(digest_size=8)
    for card in sorted(folder.glob("*.json")):
        digest.update(card.read_bytes())
    return f"{name}:{digest.hexdigest()}"
