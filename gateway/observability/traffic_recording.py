"""Records traffic without text, for `antares simulate --trace FILE` (docs/planning.md).

One JSON line for each request, in Mooncake's format with members of ours: arrival, lengths, class, bounds and outcome.
A request that was not served counts too, with its predicted length: it is part of the demand.

Prompts with the same beginning have the same leading ``hash_ids``. INVARIANT: these tell nothing else about the text.
They are BLAKE2b with a random salt that is never stored, and each file has its own, one for each process that writes
it. So a known text cannot be looked for among the prompts, not even by the gateway after a restart.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from gateway.observability.background import BackgroundQueue
from gateway.observability.decisions import RequestRecord, to_ms
from gateway.observability.ledger import Entry
from gateway.observability.line_file import LineFile

SUFFIX = ".jsonl"
"""End of the file's name, by which `lab.workload.trace_file` knows the format."""

CLOSE_S = 3.0
"""Seconds that a shutdown waits for the last lines to be written. Convention."""

BLOCK_BYTES = 256
"""Bytes of a prompt (of its text, or of its token ids) for each of the ``hash_ids``: about 64 tokens. Shorter blocks of
the prefix index are joined. A hit is cut by half of that on average, and a line of 2,000 tokens has 700 bytes."""

MAX_HASHES = 4096
"""Most ``hash_ids`` of a line: prompts of 262,144 tokens. What follows them counts as unshared."""

MAX_WAITING = 2048
"""Records that may wait for the disk: 0.3 GB if all have `MAX_HASHES`, and 2 MB with prompts of 2,000 tokens."""

NO_DEMAND = frozenset(("engine_refused", "invalid_json", "rate_limited", "draining"))
"""Reasons of requests that are not recorded: no number of engines would serve them."""


@dataclass(slots=True)
class _Traffic:
    """A request that ended. ``blocks``: keys of its prefix, of ``block_tokens`` tokens each."""

    record: RequestRecord
    blocks: tuple[int, ...]
    block_tokens: float
    max_tokens: float


class TrafficRecording:
    """Appends a line for each request to ``path``, in a thread.

    A file that reaches ``max_bytes`` is renamed (`previous_name`), and that name's file replaced. So both take at most
    twice as much. Raises `ObservabilityError` if the file cannot be opened.
    """

    name = "recording"

    def __init__(self, path: str, max_bytes: int) -> None:
        self._file = LineFile(path, "recording.path")
        self._previous, self._max_bytes = previous_name(path), max_bytes
        self._salt, self._salted = secrets.token_bytes(32), self._file.opened
        # Prompt and output tokens of the last request of each class whose lengths are known.
        self._usual: dict[str, tuple[int, int]] = {}
        self._queue: BackgroundQueue[_Traffic] = BackgroundQueue("recording", self._write, limit=MAX_WAITING)

    @property
    def dropped(self) -> int:
        """Requests that were not recorded, because the queue was full or a write failed."""
        return self._queue.dropped

    def put(self, record: RequestRecord, entry: Entry) -> None:
        """Record the request of ``entry``, which ended as ``record``. Called on the event loop."""
        request = entry.request
        if record.reason in NO_DEMAND:
            return
        joined = max(1, BLOCK_BYTES // (request.block_bytes or BLOCK_BYTES))
        # Each key covers the blocks before it, so one of several is enough.
        blocks = request.blocks[joined - 1 : joined * MAX_HASHES : joined]
        tokens = request.block_tokens * joined if blocks else 0.0
        if entry.estimated_prompt_tokens:
            # The blocks have estimated sizes, but the prompt may have the engine's count now.
            tokens *= request.prompt_tokens / entry.estimated_prompt_tokens
        self._queue.put(_Traffic(record, blocks, tokens, request.max_tokens))

    def close(self) -> None:
        """Write the waiting lines, within `CLOSE_S`, and accept no more."""
        if self._queue.close(CLOSE_S):
            self._file.close()

    def _write(self, batch: list[_Traffic]) -> None:
        lines = b"".join(map(self._line, batch))
        self._file.rotate(self._previous, self._max_bytes - len(lines))
        if self._salted != self._file.opened:
            self._salt, self._salted = secrets.token_bytes(32), self._file.opened
            lines = b"".join(map(self._line, batch))
        self._file.append(lines)

    def _line(self, traffic: _Traffic) -> bytes:
        """Return the line of a request, or nothing if no length is known."""
        record, slo = traffic.record, traffic.record.slo
        lengths = self._lengths(record)
        if lengths is None:
            return b""
        line: dict[str, Any] = {
            "timestamp": to_ms(record.time),
            "input_length": lengths[0],
            "output_length": lengths[1],
            "hash_ids": self._hashes(traffic.blocks),
            "block_tokens": round(traffic.block_tokens, 2) or BLOCK_BYTES // 4,
            "sequences": record.sequences,
            "max_tokens": int(traffic.max_tokens) if math.isfinite(traffic.max_tokens) else None,
            "model": record.model,
            "slo_class": record.slo_class,
            "slo_ttft_ms": to_ms(slo.ttft_s),
            "slo_tpot_ms": to_ms(slo.tpot_s),
            "slo_e2e_ms": to_ms(slo.e2e_s),
            "outcome": record.outcome,
        }
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)

    def _lengths(self, record: RequestRecord) -> tuple[int, int] | None:
        """Return the tokens of the prompt, and of the answer per sequence.

        An answer that did not end has its predicted length, unless its client ended it. What was never measured or
        predicted is as long as in the last request of the class.
        """
        usual = self._usual.get(record.slo_class)
        prompt, output = record.prompt_tokens, round(record.output_tokens / max(1, record.sequences))
        if record.outcome != "finished" and not (record.outcome == "cancelled" and output):
            output = round(record.predicted_tokens) if record.prediction_source else 0
        elif record.outcome == "finished":
            # An answer without a token takes the engine the time of its prompt.
            output = max(1, output)
        measured = is_measured(record)
        if measured and output:
            self._usual[record.slo_class] = prompt, output
        elif usual is None:
            return None
        else:
            prompt, output = prompt if measured else usual[0], output or usual[1]
        return prompt, output

    def _hashes(self, blocks: tuple[int, ...]) -> list[int]:
        """Return a hash of 53 bits for each of the ``blocks``: JSON numbers are exact up to there in every language."""
        salt = self._salt
        digests = [blake2b(salt + block.to_bytes(8, "little", signed=True), digest_size=8).digest() for block in blocks]
        return [int.from_bytes(digest, "little") >> 11 for digest in digests]


def is_measured(record: RequestRecord) -> bool:
    """Whether the length of the prompt is known: a request may be rejected before it is."""
    return bool(record.prompt_source) or record.prompt_tokens > 1


def previous_name(path: str) -> str:
    """Return the name that a full file of this ``path`` gets: ``traffic.1.jsonl`` for ``traffic.jsonl``."""
    return f"{path.removesuffix(SUFFIX)}.1{SUFFIX}"
