"""Saves corrections to disk, in one JSON file of a state folder.

    {"format": 1, "predictor": <id of the length model>,
     "windows": [{"model", "slo_class", "rows"}, ...]}        (`predictor_service.calibration.online.OnlineCalibration`)

The file is replaced as a whole, so that a kill at any time leaves the previous one intact. Answers are stored relative
to the predictions of one length model, so another length model starts without them.
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


class StateUnusable(Exception):  # noqa: N818
    """The state folder cannot be written. The message names the folder and the reason."""


class CalibrationState:
    """The state file in ``folder``, which is created if needed. ``predictor``: the id of the length model.

    Raises:
        StateUnusable: the folder cannot be written.
    """

    def __init__(self, folder: Path, predictor: str) -> None:
        self._file = folder / STATE_FILE
        self._predictor = predictor
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{STATE_FILE}.probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StateUnusable(f"the state folder {folder} cannot be written: {error.strerror}") from None

    def load(self, calibration: OnlineCalibration) -> bool:
        """Restore the saved windows into ``calibration``. Return False if there are none for this length model.

        Never raises: a service without corrections is better than no service.
        """
        try:
            document = orjson.loads(self._file.read_bytes())
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise ValueError(f"not of format {FORMAT}")
            if document.get("predictor") != self._predictor:
                log.info("the corrections in %s belong to another length model: starting without them", self._file)
                return False
            calibration.restore(document.get("windows"))
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            log.warning("the corrections in %s cannot be read (%s): starting without them", self._file, error)
            return False
        return True

    def save(self, calibration: OnlineCalibration) -> None:
        """Write the windows of ``calibration``.

        Raises:
            OSError: writing failed; the previous file is unchanged.
        """
        document = {"format": FORMAT, "predictor": self._predictor, "windows": calibration.to_document()}
        temporary = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as out:
                out.write(orjson.dumps(document))
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self._file)
        finally:
            temporary.unlink(missing_ok=True)


def fingerprint(name: str, folder: Path) -> str:
    """Return ``name`` with a digest of the model cards in ``folder``, so that a retrained model has another id."""
    digest = hashlib.blake2b(digest_size=8)
    for card in sorted(folder.glob("*.json")):
        digest.update(card.read_bytes())
    return f"{name}:{digest.hexdigest()}"
