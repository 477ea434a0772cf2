"""Training data from live traffic: features and lengths of finished requests, never a word of their text.

One JSON object a line,

    {"features": {"indices": [...], "counts": [...], "lexical": [...]}, "features_version": N,
     "length": tokens, "censored": bool, "model": name, "slo_class": name}

in files ``lengths-<number>.jsonl`` of a folder. A prediction's features wait in a table for the finished request's id;
whoever is not reported within `EXPIRES_S`, or is pushed out by newer ones, is not collected. The newest file grows to
a sixteenth of the folder's limit; then another begins and the oldest goes, so the folder keeps to its limit.

Features are hashed n-grams. They hold no text, but they are not anonymous: whoever guesses a prompt can check the
guess. The files are readable by their owner only.
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

MOST_WAITING, EXPIRES_S = 4096, 1800.0
"""Predictions whose end is awaited, and for how long."""

MOST_UNWRITTEN = 1024
"""Finished requests not on disk yet; further ones are dropped."""

FILES = 16
_AT_ONCE = 32
_NAME = "lengths-{:08d}.jsonl"
_PATTERN = "lengths-*.jsonl"


class Collector:
    """Joins features to lengths and writes them into ``folder``, at most ``limit_bytes`` of them.

    `remember` and `finished` are called on requests' paths and do no I/O; `write` does. Any thread may call any.
    """

    def __init__(self, folder: Path, limit_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._file_bytes, self._clock = folder, max(limit_bytes // FILES, 1), clock
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, tuple[float, Features]] = OrderedDict()
        self._unwritten: deque[bytes] = deque(maxlen=MOST_UNWRITTEN)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def remember(self, request_id: str, features: Features) -> None:
        """These features were predicted for; the request may end one day."""
        now = self._clock()
        with self._lock:
            self._waiting[request_id] = (now, features)
            self._waiting.move_to_end(request_id)
            while self._waiting:
                oldest, (since, _) = next(iter(self._waiting.items()))
                if len(self._waiting) <= MOST_WAITING and now - since <= EXPIRES_S:
                    break
                del self._waiting[oldest]

    def finished(self, request_id: str, model: str, slo_class: str, tokens: int, censored: bool) -> bool:
        """The request ended with so many output tokens; False when its features are not at hand."""
        with self._lock:
            _, features = self._waiting.pop(request_id, (0.0, None))
            if features is None:
                return False
            self._unwritten.append(line(features, model, slo_class, tokens, censored))
        return True

    @property
    def waiting(self) -> int:
        """Predictions whose end is awaited."""
        return len(self._waiting)

    def write(self) -> int:
        """Append what finished to the files; answers how many lines. Raises OSError; those lines are lost."""
        with self._lock:
            lines = list(self._unwritten)
            self._unwritten.clear()
        for first in range(0, len(lines), _AT_ONCE):
            self._append(b"".join(lines[first : first + _AT_ONCE]))
        return len(lines)

    def _append(self, text: bytes) -> None:
        files = collected_files(self._folder)
        newest = files[-1] if files else self._folder / _NAME.format(1)
        if files and newest.stat().st_size + len(text) > self._file_bytes:
            newest = self._folder / _NAME.format(int(newest.stem.rpartition("-")[2]) + 1)
            for old in files[: max(len(files) - FILES + 1, 0)]:
                old.unlink(missing_ok=True)
        handle = os.open(newest, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "ab") as out:
            out.write(text)


def line(features: Features, model: str, slo_class: str, tokens: int, censored: bool) -> bytes:
    """One line of a file, with its line end."""
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


def collected_files(folder: Path) -> list[Path]:
    """The files of ``folder``, the oldest first."""
    return sorted(folder.glob(_PATTERN))


def collected(folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole entry of this version's features; what a kill cut short is left out."""
    for file in collected_files(folder):
        for text in file.read_bytes().splitlines():
            try:
                entry = orjson.loads(text)
            except orjson.JSONDecodeError:
                continue
            if isinstance(entry, dict) and entry.get("features_version") == FEATURES_VERSION:
                yield entry


def export(folder: Path, output: Path, model: str | None = None) -> dict[str, Any]:
    """Write what ``folder`` holds, of ``model`` or all, into one file, which appears whole or not at all.

    Answers ``{"rows", "censored", "models": {name: rows}}``. Raises OSError.
    """
    models: Counter[str] = Counter()
    censored = 0
    fresh = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            for entry in collected(folder):
                name = str(entry.get("model", ""))
                if model is None or name == model:
                    out.write(orjson.dumps(entry) + b"\n")
                    models[name] += 1
                    censored += entry.get("censored") is True
        fresh.replace(output)
    finally:
        fresh.unlink(missing_ok=True)
    return {"rows": models.total(), "censored": censored, "models": dict(models)}
