"""One request of a workload."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkloadRequest:
    """One request of a workload.

    Attributes:
        at_s: arrival time, in seconds after the start.
        prompt_tokens: length of the prompt.
        output_tokens: length of the answer.
        ttft_slo_s, tpot_slo_s, e2e_slo_s: bounds in seconds; infinite if the request has no such bound.
        category: row of the SLO table, from 1.
        blocks: chained hashes of the blocks of `sessions.BLOCK_TOKENS` tokens of the prompt and the answer. Requests
            with equal leading hashes begin with the same tokens. The last block may be partial; its hash is the one of
            the full block in a later turn. Empty if the request shares no prefix.
        messages: tokens of each message of the prompt: the system prompt, then user and assistant in turn. Empty if the
            prompt is one message.
        slo_class: name of its class in a recording or the configuration of a gateway, or "".
        best_effort: whether its class serves it although a bound cannot be met (``on_unattainable: best_effort``).
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_slo_s: float
    tpot_slo_s: float
    category: int
    e2e_slo_s: float = math.inf
    blocks: Sequence[int] = ()
    messages: tuple[int, ...] = ()
    slo_class: str = ""
    best_effort: bool = False
