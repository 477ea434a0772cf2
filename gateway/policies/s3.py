"""S3: shortest predicted job first (Jin et al., "S3: Increasing GPU Utilization during Generative Inference", 2023).

As in SCORPIO's evaluation: S3's ordering alone, over an engine with paged attention and continuous batching.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from gateway.policies.base import UNGATED, Decision, PrefillLookahead
from gateway.requests.request import Request


@dataclass(slots=True)
class S3:
    """Admits the shortest predicted output first, as long as the engine has room; rejects none; gates nothing.

    ``prefill_lookahead_steps``: how many steps' worth of prompt tokens may lie in the engine unprefilled.
    """

    prefill_lookahead_steps: float = 2.0
    name: str = "s3"
    gate: str = UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """Shortest predicted output first."""
        return (request.predicted_tokens, request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Admit from the head of the queue until a place in the batch or the runway is missing."""
        decision = Decision()
        lookahead = PrefillLookahead.of(running, self.prefill_lookahead_steps * engine.max_num_batched_tokens)
        sequences = sum([r.sequences for r in running])
        for request in waiting:
            slots = sequences == 0 or sequences + request.sequences <= engine.max_num_seqs
            if not (slots and lookahead.fits(request)):
                break
            decision.admit.append(request)
            lookahead.add(request)
            sequences += request.sequences
        return decision
