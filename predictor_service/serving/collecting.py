"""Collects training data from live traffic: features and output lengths of finished requests, never text.

Files ``lengths-<number>.jsonl`` of one folder hold one JSON object per line:

    {"features": {"indices": [...], "counts": [...], "lexical": [...]}, "features_version": N,
     "length": tokens, "censored": bool, "model": name, "slo_class": name}

The features of a prediction stay in memory until a finished request with the same id is reported. They are dropped
after `PENDING_TTL_S`, or when newer ones exceed `MAX_PENDING`. The newest file grows to 1/`FILES` of the folder's
limit. Then a new file starts and the oldest one is deleted, so that the folder stays within its limit.

NOTE: features are hashed n-grams. They hold no text, but they are not anonymous: a reader who guesses a prompt can
verify the guess. Only the owner can read the files.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from predictor_service.model.features import FEATURES_VERSION, Features

MAX_PENDING, PENDING_TTL_S = 4096, 1800.0
"""Predictions that await their output length, and seconds until they are dropped. Both bound memory."""

MAX_BUFFERED = 1024
"""Lines that are not on disk yet. Beyond it, the oldest are dropped."""

FILES = 16
"""Number of files that the folder's limit is divided among."""

_LINES_PER_WRITE = 32
_NAME = "lengths-{:08d}.jsonl"
_PATTERN = "lengths-*.jsonl"


class Collector:
    """Joins features with output lengths and writes them into ``folder``, up to ``limit_bytes``.

    Thread-safe. `record_prediction` and `record_finish` run on the request path and do no I/O; `write` does the I/O.
    """

    def __init__(self, folder: Path, limit_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._file_bytes, self._clock = folder, max(limit_bytes // FILES, 1), clock
        self._lock = threading.Lock()
        self._pending: OrderedDict[str, tuple[float, Features]] = OrderedDict()
        self._buffered: deque[bytes] = deque(maxlen=MAX_BUFFERED)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def record_prediction(self, request_id: str, features: Features) -> None:
        """Keep the features of a prediction until its request finishes."""
        now = self._clock()
        with self._lock:
            self._pending[request_id] = (now, features)
            self._pending.move_to_end(request_id)
            while self._pending:
                oldest, (since, _) = next(iter(self._pending.items()))
                if len(self._pending) <= MAX_PENDING and now - since <= PENDING_TTL_S:
                    break
                del self._pending[oldest]

    def record_finish(self, request_id: str, model: str, slo_class: str, tokens: int, censored: bool) -> bool:
        """Buffer a line for a request that finished with ``tokens`` tokens; return False if its id is unknown."""
        with self._lock:
            _, features = self._pending.pop(request_id, (0.0, None))
            if features is None:
                return False
            self._buffered.append(encode_line(features, model, slo_class, tokens, censored))
        return True

    @property
    def pending(self) -> int:
        """Predictions that await their output length."""
        return len(self._pending)

    def write(self) -> int:
        """Append the buffered lines to the files and return their number.

        Raises:
            OSError: writing failed, and the lines are lost.
        """
        with self._lock:
            lines = list(self._buffered)
            self._buffered.clear()
        for first in range(0, len(lines), _LINES_PER_WRITE):
            self._append(b"".join(lines[first : first + _LINES_PER_WRITE]))
        return len(lines)

    def _append(self, text: bytes) -> None:
        files = list_files(self._folder)
        newest = files[-1] if files else self._folder / _NAME.format(1)
        if files and newest.stat().st_size + len(text) > self._file_bytes:
            newest = self._folder / _NAME.format(int(newest.stem.rpartition("-")[2]) + 1)
            for old in files[: max(len(files) - FILES + 1, 0)]:
                old.unlink(missing_ok=True)
        handle = os.open(newest, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "ab") as out:
            out.write(text)


def encode_line(features: Features, model: str, slo_class: str, tokens: int, censored: bool) -> bytes:
    """Return one line of a file, including the newline."""
    parts = {name: np.asarray(part) for name, part in asdict(features).items()}
    document = {
        "features": {
            name: [round(v, 5) for v in part.tolist()] if part.dtype.kind == "f" else part.tolist()
            for name, part in parts.items()
        },
        "features_version": FEATURES_VERSION,
        "length": tokens,
        "censored": censored,
        "model": model,
        "slo_class": slo_class,
    }
    return orjson.dumps(document) + b"\n"


def list_files(folder: Path) -> list[Path]:
    """Return the files of ``folder``, oldest first."""
    return sorted(folder.glob(_PATTERN))


def read_entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries with the current version of the features. Incomplete lines are skipped."""
    for file in list_files(folder):
        for text in file.read_bytes().splitlines():
            try:
                entry = orjson.loads(text)
            except orjson.JSONDecodeError:
                continue
            if isinstance(entry, dict) and entry.get("features_version") == FEATURES_VERSION:
                yield entry


def export(folder: Path, output: Path, model: str | None = None) -> dict[str, Any]:
    """Write all entries of ``folder``, or those of ``model``, into the file ``output``, atomically.

    Returns ``{"rows": count, "censored": count, "models": {name: rows}}``.

    Raises:
        OSError: reading or writing failed; ``output`` is unchanged.
    """
    models: Counter[str] = Counter()
    censored = 0
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            for entry in read_entries(folder):
                name = str(entry.get("model", ""))
                if model is None or name == model:
                    out.write(orjson.dumps(entry) + b"\n")
                    models[name] += 1
                    censored += entry.get("censored") is True
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return {"rows": models.total(), "censored": censored, "models": dict(models)}
