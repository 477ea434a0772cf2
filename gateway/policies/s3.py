"""S3: shortest predicted job first (Jin et al., "S3: Increasing GPU Utilization during Generative Inference", 2023).

Implemented as in SCORPIO's evaluation (section 4.1): only the order of S3, on an engine that already has paged
attention and continuous batching.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from engine_adapter.engine import EngineState
from gateway.policies.base import UNGATED, Decision, PrefillLookahead
from gateway.requests.request import Request


@dataclass(slots=True)
class S3:
    """Admits the shortest predicted output first; rejects none; uses no step gate.

    Args:
        prefill_lookahead_steps: limit on the unprefilled prompt tokens inside the engine, in steps of
            ``max_num_batched_tokens``, beyond those that it plans before a reaction (`EngineState.reaction_steps`).
    """

    prefill_lookahead_steps: float = 2.0
    name: str = "s3"
    gate: str = UNGATED

    def order(self, request: Request) -> tuple[float, ...]:
        """Sort by predicted output length, then by arrival."""
        return (request.predicted_tokens, request.arrival_s)

    def decide(
        self, now: float, waiting: Sequence[Request], running: Collection[Request], engine: EngineState
    ) -> Decision:
        """Admit from the head of the queue until the slots or the prefill lookahead are used up."""
        decision = Decision()
        lookahead = PrefillLookahead.of(running, engine, self.prefill_lookahead_steps)
        sequences = sum([r.sequences for r in running])
        for request in waiting:
            slots = sequences == 0 or sequences + request.sequences <= engine.max_num_seqs
            if not (slots and lookahead.fits(request)):
                break
            decision.admit.append(request)
            lookahead.add(request)
            sequences += request.sequences
        return decision
