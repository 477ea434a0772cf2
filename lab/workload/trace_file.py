"""Reads traces of the gateway and of other projects: arrival times, lengths and shared prefixes, never text.

| format | file | recognised by |
|---|---|---|
| Mooncake, vLLM's `timed_trace`, AIPerf | one JSON object a line: ``timestamp``, ``input_length``, ``output_length``, ``hash_ids`` | `.jsonl` |
| Alibaba Bailian | the same with ``chat_id``; seconds, and 16 tokens for each hash | ``chat_id`` |
| the gateway's own recording | the same with ``block_tokens``, ``model``, ``slo_class`` and bounds | ``block_tokens`` |
| Azure 2023 and 2024 | CSV: ``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens`` | the header |
| BurstGPT | CSV: ``Timestamp``, ``Request tokens``, ``Response tokens`` | the header |
| ShareGPT | a JSON array of ``conversations``, without times; tokens are estimated | `.json` |

Any of them may be gzipped. Prompts with equal leading ``hash_ids`` begin with the same tokens.
"""  # noqa: E501 - a table

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_REQUESTS = 500_000
"""Most requests that are read, so that a long trace does not fill the memory: about 200 bytes each."""

MAX_BLOCKS = 5_000_000
"""Most ``hash_ids`` that are kept, over all requests: about 40 bytes each."""

MAX_TOKENS = 10_000_000
"""Longest prompt or answer of a line. A larger number is a mistake in the file."""

MAX_LINE = 8 << 20
"""Longest line, or conversation of ShareGPT, in characters. Mooncake's are below 10,000."""

CHARS_PER_TOKEN = 4
"""Characters per token by which ShareGPT's texts are measured. Convention for English text."""

MAX_SEQUENCES = 16
"""Most sequences of one request (``n``) that are replayed, as requests with the same prompt."""

UNITS = {"s": 1.0, "ms": 1e-3}
"""Units of the ``timestamp`` of a JSON line, in seconds."""

SUFFIXES = (".jsonl", ".csv", ".json")

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURST_GPT = ("Timestamp", "Request tokens", "Response tokens")


class TraceError(ValueError):
    """The file is not a trace. The message names the line and what to change."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        at_s: arrival, in seconds; None in a file without times.
        prompt_tokens, output_tokens: lengths, at least 1.
        prefix: numbers of the blocks of the prompt, of ``block_tokens`` tokens each. Equal numbers mean equal prefixes.
        block_ends: of the gateway's own recording, by the number of a block: the tokens of the prompt up to its end.
            The gateway estimates them from text, so the blocks of two prompts with a common beginning differ in size.
            Those of the first one count for all, so that the beginnings still agree.
        slo_class: its class in the gateway that recorded it, or "".
        bounds_s: TTFT, TPOT and end-to-end bounds in seconds; None if the file has no bounds.
    """

    at_s: float | None
    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...] = ()
    block_tokens: float = 0
    block_ends: Sequence[float] = field(default=(), repr=False, compare=False)
    slo_class: str = ""
    bounds_s: tuple[float, float, float] | None = None


def is_trace_file(name: str) -> bool:
    """Whether ``name`` is a file name and not the name of a shipped workload."""
    return name.removesuffix(".gz").endswith(SUFFIXES) or "/" in name


def read_trace(
    path: str | Path,
    *,
    unit: str | None = None,
    block_tokens: int | None = None,
    window_s: float | None = None,
    models: Collection[str] = (),
) -> tuple[TraceRequest, ...]:
    """Return the requests of the file ``path`` by arrival; the first one arrives at 0.

    Requests without an answer are left out: BurstGPT marks failures so.

    Args:
        path: a file in one of the formats above.
        unit: unit of the timestamps of JSON lines, one of `UNITS`. By default milliseconds, as in Mooncake's files.
        block_tokens: tokens for each of the ``hash_ids``; 512 by default, as in Mooncake's files.
        window_s: stop at the first line that arrives later than this (s) after the first one.
        models: only the requests of these. A recording of several models needs them, since others have other engines.

    Raises:
        TraceError: the file cannot be read, or a line is not valid.
    """
    path = Path(path)
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise TraceError(f"cannot read the trace {str(path)!r}: {error.strerror}") from error
    return _read(path, changed, unit, block_tokens, window_s, tuple(models))


@lru_cache(maxsize=2)
def _read(
    path: Path,
    changed: int,
    unit: str | None,
    block_tokens: int | None,
    window_s: float | None,
    models: tuple[str, ...],
) -> tuple[TraceRequest, ...]:
    rows: list[TraceRequest] = []
    blocks, first_s = 0, None
    try:
        with _open(path) as file:
            for row in _rows(path, file, unit, block_tokens, models):
                if row.at_s is not None:
                    first_s = row.at_s if first_s is None else first_s
                    if window_s is not None and row.at_s - first_s >= window_s:
                        if row.bounds_s is None:
                            break
                        # The gateway writes a request when it ends, so earlier ones may follow.
                        continue
                rows.append(row)
                blocks += len(row.prefix)
                if len(rows) > MAX_REQUESTS or blocks > MAX_BLOCKS:
                    raise TraceError(
                        f"{path}: more than {MAX_REQUESTS:,} requests or {MAX_BLOCKS:,} hash_ids: "
                        "replay a part of it with --window SECONDS"
                    )
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot read the trace: {error}") from error
    if not rows:
        raise TraceError(f"{path}: the trace has no requests with an answer")
    rows.sort(key=lambda row: row.at_s or 0.0)
    start_s = rows[0].at_s
    if start_s is None:
        return tuple(rows)
    return tuple(replace(row, at_s=(row.at_s or 0.0) - start_s) for row in rows)


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _rows(
    path: Path, file: IO[str], unit: str | None, block_tokens: int | None, models: tuple[str, ...]
) -> Iterator[TraceRequest]:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if models and kind != "jsonl":
        raise TraceError(f"{path}: only a recording of the gateway has models: remove --trace-model")
    if kind == "csv":
        yield from _csv_rows(path, file)
    elif kind == "json":
        yield from _conversations(path, file)
    elif kind == "jsonl":
        yield from _JsonLines(path, unit, block_tokens, models).rows(file)
    else:
        raise TraceError(f"{path}: the name of a trace must end in {', '.join(SUFFIXES)}, or one of them and .gz")


# --- JSON lines -------------------------------------------------------------------------------------------------------


class _JsonLines:
    """Reads one JSON object a line: Mooncake's format, and what others made of it."""

    def __init__(self, path: Path, unit: str | None, block_tokens: int | None, models: tuple[str, ...]) -> None:
        self._path, self._unit, self._block_tokens, self._models = path, unit, block_tokens, models
        self._numbers: dict[Any, int] = {}
        self._ends: list[float] = []
        self._seen: dict[str, None] = {}

    def rows(self, file: IO[str]) -> Iterator[TraceRequest]:
        """Yield the requests of ``file``."""
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            where = f"{self._path}:{number}"
            if len(line) > MAX_LINE:
                raise TraceError(f"{where}: a line of more than {MAX_LINE:,} characters is not a request")
            if not line.strip():
                continue
            try:
                document = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                if self._ends and not line.endswith("\n"):
                    # The gateway is writing it.
                    break
                raise TraceError(f"{where}: not JSON ({error}); each line must be one JSON object") from None
            if not isinstance(document, dict):
                raise TraceError(f"{where}: each line must be a JSON object, such as {_EXAMPLE}")
            model = str(document.get("model", ""))[:128]
            self._seen[model] = None
            if not self._models and len(self._seen) > 1:
                raise TraceError(
                    f"{where}: requests of the models {' and '.join(self._seen)}, which have engines of their own: "
                    "choose one with --trace-model; repeat it for the adapters of a model"
                )
            if self._models and model not in self._models:
                continue
            row = self._row(where, document)
            if row.output_tokens:
                yield from [row] * self._sequences(where, document)
        if self._models and not self._seen.keys() & set(self._models):
            known = ", ".join(list(self._seen)[:8])
            raise TraceError(f"{self._path}: no request of --trace-model {' '.join(self._models)}; it has {known}")

    def _sequences(self, where: str, document: dict[str, Any]) -> int:
        count = _whole(where, document, "sequences") if "sequences" in document else 1
        return min(max(1, count), MAX_SEQUENCES)

    def _row(self, where: str, document: dict[str, Any]) -> TraceRequest:
        bailian = "chat_id" in document
        unit = self._unit or ("s" if bailian else "ms")
        at = _number(where, document, "timestamp")
        prompt = _whole(where, document, "input_length")
        output = _whole(where, document, "output_length")
        tokens: float = self._block_tokens or (16 if bailian else 512)
        own = self._block_tokens is None and "block_tokens" in document
        if own:
            tokens = max(1.0, _number(where, document, "block_tokens"))
        prefix = self._prefix(where, document.get("hash_ids") or ())
        bounds = None
        if "slo_class" in document:
            bounds = tuple(_bound(where, document, key) for key in ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms"))
        return TraceRequest(
            at * UNITS[unit],
            max(1, prompt),
            output,
            prefix,
            tokens,
            self._block_ends(prefix, tokens) if own else (),
            str(document.get("slo_class", ""))[:64],
            bounds,  # type: ignore[arg-type]  # three bounds
        )

    def _prefix(self, where: str, ids: Any) -> tuple[int, ...]:
        """Return a small number for each of the ``ids``, which may be numbers or text."""
        if not isinstance(ids, list | tuple) or not all(isinstance(one, int | str) for one in ids):
            raise TraceError(f"{where}: hash_ids must be a list of numbers")
        numbers = self._numbers
        return tuple(numbers.setdefault(one, len(numbers)) for one in ids)

    def _block_ends(self, prefix: tuple[int, ...], tokens: float) -> list[float]:
        """Return the ends of all blocks so far. New ones of ``prefix`` have ``tokens`` tokens each."""
        end = 0.0
        for number in prefix:
            if number == len(self._ends):
                self._ends.append(end + tokens)
            end = self._ends[number]
        return self._ends


_EXAMPLE = '{"timestamp": 0, "input_length": 1000, "output_length": 100, "hash_ids": [0, 1]}'


def _number(where: str, document: dict[str, Any], key: str) -> float:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        got = "is missing" if key not in document else f"is {str(value)[:40]!r}"
        raise TraceError(f"{where}: {key} {got}; it must be a number of at least 0, as in {_EXAMPLE}")
    return float(value)


def _whole(where: str, document: dict[str, Any], key: str) -> int:
    value = _number(where, document, key)
    if value != int(value) or value > MAX_TOKENS:
        raise TraceError(f"{where}: {key} is {value:g}; it must be a whole number of tokens, at most {MAX_TOKENS:,}")
    return int(value)


def _bound(where: str, document: dict[str, Any], key: str) -> float:
    return math.inf if document.get(key) is None else _number(where, document, key) / 1000


# --- CSV --------------------------------------------------------------------------------------------------------------


def _csv_rows(path: Path, file: IO[str]) -> Iterator[TraceRequest]:
    reader = csv.reader(_lines(path, file))
    header = [name.strip() for name in next(reader, [])]
    when: Callable[[str], float]
    if set(_AZURE) <= set(header):
        names, when = _AZURE, _date
    elif set(_BURST_GPT) <= set(header):
        names, when = _BURST_GPT, float
    else:
        raise TraceError(
            f"{path}:1: unknown columns {', '.join(header)[:200]!r}; expected {', '.join(_AZURE)} (Azure) or "
            f"{', '.join(_BURST_GPT)} (BurstGPT)"
        )
    at, prompt, output = (header.index(name) for name in names)
    for row in reader:
        if not row:
            continue
        where = f"{path}:{reader.line_num}"
        try:
            values = when(row[at]), int(float(row[prompt])), int(float(row[output]))
        except (IndexError, ValueError, OverflowError):
            raise TraceError(
                f"{where}: {','.join(row)[:100]!r} does not have a time and two token counts in the columns "
                f"{', '.join(names)}"
            ) from None
        if not all(0 <= count <= MAX_TOKENS for count in values[1:]) or not math.isfinite(values[0]):
            raise TraceError(f"{where}: token counts must be from 0 to {MAX_TOKENS:,}, and times finite")
        if values[2]:
            yield TraceRequest(values[0], max(1, values[1]), values[2])


def _lines(path: Path, file: IO[str]) -> Iterator[str]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise TraceError(f"{path}: a line of more than {MAX_LINE:,} characters is not a request")
        yield line


def _date(text: str) -> float:
    """Return the seconds of an Azure timestamp. Its fractions have seven digits, of which six are read."""
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        return float(np.datetime64(text.strip().partition("+")[0], "us").astype(np.int64)) / 1e6


# --- ShareGPT ---------------------------------------------------------------------------------------------------------


def _conversations(path: Path, file: IO[str]) -> Iterator[TraceRequest]:
    """Yield the opening turn of each conversation, as vLLM's benchmark does, without the array in memory."""
    decoder, buffer = json.JSONDecoder(), file.read(1 << 20).lstrip()
    if not buffer.startswith("["):
        raise TraceError(f"{path}: a .json trace must be an array of ShareGPT conversations; name JSON lines .jsonl")
    buffer, count = buffer[1:], 0
    while True:
        buffer = buffer.lstrip(" \t\r\n,")
        if buffer.startswith("]"):
            return
        try:
            entry, end = decoder.raw_decode(buffer)
        except (json.JSONDecodeError, RecursionError) as error:
            more = file.read(1 << 20)
            if not more or len(buffer) > MAX_LINE:
                raise TraceError(f"{path}: conversation {count + 1} is not complete JSON ({error})") from None
            buffer += more
            continue
        buffer, count = buffer[end:], count + 1
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise TraceError(f"{path}: conversation {count} has no list 'conversations' with 'value' of each turn")
        if len(turns) >= 2 and turns[1].get("value"):
            prompt, answer = (-(-len(str(turn.get("value", ""))) // CHARS_PER_TOKEN) for turn in turns[:2])
            yield TraceRequest(None, max(1, prompt), answer)
