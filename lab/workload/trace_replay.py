"""Replays the requests of a trace: at a multiple of their rate, and with the prefixes that they share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import overload

import numpy as np

from lab.workload.arrivals import Floats
from lab.workload.lengths import Ints
from lab.workload.request import WorkloadRequest
from lab.workload.trace_file import TraceRequest

BLOCK_TOKENS = 16
"""Tokens of a block: as `lab.workload.sessions.BLOCK_TOKENS`."""

_POSITIONS = 1 << 20
"""More than the blocks of any prompt, so that a prefix and a position in it make one number."""

_UNSHARED = 1 << 62
"""Hashes from here on are of blocks that no other request has."""


def superposed(at_s: Floats, scale: float, random: np.random.Generator) -> tuple[Floats, Ints, Ints]:
    """Return a trace at ``scale`` times its rate, on its own time scale: arrivals, rows and copies; shape (n,) each.

    Sessions keep their pauses and days keep their length, which a higher speed would change. The copies after the first
    one are shifted by equal parts of the trace, and wrap around. Of the last one, as many requests are drawn as
    ``scale`` asks for. ``rows`` are indices of ``at_s``, which is sorted; ``copies`` count from 0.
    """
    n = len(at_s)
    if scale == 1:
        return at_s, np.arange(n), np.zeros(n, dtype=np.int64)
    span = float(at_s[-1]) * n / max(1, n - 1)
    whole = int(np.ceil(scale - 1e-9))
    times, rows, copies = [], [], []
    for copy in range(whole):
        share = min(1.0, scale - copy)
        kept = np.arange(n) if share >= 1 else np.flatnonzero(random.random(n) < share)
        shifted = at_s[kept] + span * copy / whole
        times.append(np.where(shifted >= span, shifted - span, shifted) if copy and span else at_s[kept])
        rows.append(kept)
        copies.append(np.full(len(kept), copy))
    joined = np.concatenate(times)
    order = np.argsort(joined, kind="stable")
    return joined[order], np.concatenate(rows)[order], np.concatenate(copies)[order]


def arrival_times(recording: Sequence[TraceRequest], name: str) -> Floats:
    """Return the arrival times (s) of a recording. Raises ValueError if it has none."""
    times = [row.at_s for row in recording if row.at_s is not None]
    if len(times) < len(recording):
        raise ValueError(f"{name} has no arrival times: use --workload {name} --qps RATE instead of --trace")
    return np.array(times)


def recorded_workload(
    recording: Sequence[TraceRequest],
    at_s: Floats,
    chosen: Ints,
    copies: Ints | None,
    bounds: Sequence[tuple[float, float, int, float]],
    slo_scale: float,
    max_prompt: int | None,
    max_output: int | None,
) -> list[WorkloadRequest]:
    """Return the ``chosen`` requests of a recording at the times ``at_s`` (s), shape (n,).

    Args:
        recording: `lab.workload.trace_file.read_trace`.
        at_s, chosen: arrival time and index in ``recording`` of each request.
        copies: its copy of the trace. Requests share prefixes within a copy only, and none if this is None.
        bounds: TTFT and TPOT bound (s), category, and end-to-end bound (s) of each request. A recording of the gateway
            has its own, with a category for each of its classes in alphabetical order.
        slo_scale: factor on the bounds of the recording.
        max_prompt, max_output: longer ones are truncated (tokens).
    """
    categories = {name: number for number, name in enumerate(sorted({row.slo_class for row in recording}), 1)}
    offset = 1 + max((max(row.prefix, default=0) for row in recording), default=0)
    found = []
    for number, at in enumerate(at_s.tolist()):
        row, slo = recording[chosen[number]], bounds[number]
        prompt, output = min(row.prompt_tokens, max_prompt or row.prompt_tokens), row.output_tokens
        output = min(output, max_output or output)
        blocks: Sequence[int] = ()
        if row.prefix and copies is not None:
            copy = int(copies[number])
            blocks = PrefixBlocks(row, copy * offset, prompt, output, number)
        if row.bounds_s is not None:
            ttft_s, tpot_s, e2e_s = (bound * slo_scale for bound in row.bounds_s)
            slo = ttft_s, tpot_s, categories[row.slo_class], e2e_s
        found.append(WorkloadRequest(at, prompt, output, *slo, blocks, slo_class=row.slo_class))
    return found


class PrefixBlocks(Sequence[int]):
    """Hashes of the blocks of a prompt and its answer (`WorkloadRequest.blocks`), made from a trace when asked for.

    A trace has one number for many blocks, and long prompts have thousands of blocks, so keeping all of them would not
    fit in memory. ``first`` is added to the numbers of the ``row``, so that a copy of the trace has its own. The
    ``number`` of the request makes the hashes of the tokens that it does not share.
    """

    __slots__ = ("_first", "_number", "_prompt_tokens", "_row", "_tokens")

    def __init__(self, row: TraceRequest, first: int, prompt_tokens: int, output_tokens: int, number: int) -> None:
        self._row, self._first, self._prompt_tokens = row, first, prompt_tokens
        self._tokens, self._number = prompt_tokens + output_tokens, number

    def __len__(self) -> int:
        return (self._tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[int, ...]: ...
    def __getitem__(self, at: int | slice) -> int | tuple[int, ...]:
        if isinstance(at, slice):
            return tuple(self._hash(i) for i in range(*at.indices(len(self))))
        return self._hash(range(len(self))[at])

    def _hash(self, at: int) -> int:
        last = (at + 1) * BLOCK_TOKENS - 1
        row = self._row
        if row.block_ends:
            block = bisect_right(row.prefix, float(last), key=lambda number: row.block_ends[number])
        else:
            block = int(last // row.block_tokens)
        if last < self._prompt_tokens and block < len(row.prefix):
            return (row.prefix[block] + self._first) * _POSITIONS + at
        return _UNSHARED + self._number * _POSITIONS + at
