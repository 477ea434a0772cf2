"""vLLM's scheduler as the simulated engines know it: who takes part in the next step, and what a step leaves behind.

Without a clock: `engine_adapter.simulated.engine` lets its steps pass in real time, the simulator in virtual time.
Two step
modes: ``chunked`` is vLLM today (decodes first, the rest of the token budget goes to prompts, which may be cut),
``prefill-first`` is vLLM 0.6 without chunked prefill (whole prompts, nobody decodes while one waits that fits).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from engine_adapter.gates.base import OpenGate, StepGate
from engine_adapter.gates.best_effort_preemption import BestEffortPreemption, Capacity, Member
from engine_adapter.simulated.sequence import SimulatedSequence

BLOCK_TOKENS = 16
"""KV memory is handed out in blocks of so many tokens."""

STEP_MODES = ("chunked", "prefill-first")


@dataclass(slots=True)
class Step:
    """One forward pass. Contexts are sums over sequences (tokens); the gate held back the ids in ``sat_out``."""

    decodes: list[SimulatedSequence] = field(default_factory=list)
    decode_context: int = 0
    chunks: list[tuple[SimulatedSequence, int]] = field(default_factory=list)
    prefill_tokens: int = 0
    prefill_context: int = 0
    sat_out: set[str] = field(default_factory=set)

    @property
    def empty(self) -> bool:
        """Nobody takes part."""
        return not self.decodes and not self.chunks


@dataclass(slots=True)
class Finished:
    """What a step brought: sequences whose prompt is computed (which gave them a token), and those that are done."""

    prefilled: list[SimulatedSequence]
    done: list[SimulatedSequence]


class SimulatedScheduler:
    """The queue, the batch and the KV memory of one engine.

    Alternate `plan` and `finish`. Limits as in vLLM; sizes in tokens.

    Raises:
        ValueError: an unknown step mode, or a KV memory that does not hold one sequence of ``max_model_len``.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        kv_tokens: int,
        gate: StepGate | None = None,
        step_mode: str = "chunked",
    ) -> None:
        if step_mode not in STEP_MODES:
            raise ValueError(f"unknown step mode {step_mode!r}: use one of {', '.join(STEP_MODES)}")
        if kv_tokens < max_model_len:
            raise ValueError(
                f"kv_tokens ({kv_tokens}) must hold one sequence of max_model_len ({max_model_len}) tokens"
            )
        self.gate: StepGate = gate or OpenGate()
        self.preemptions = self.best_effort_preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._blocks = self._free_blocks = -(-kv_tokens // BLOCK_TOKENS)
        self._prefill_first = step_mode == "prefill-first"
        self._waiting: deque[SimulatedSequence] = deque()
        self._waiting_tokens = 0
        self._prefilling: list[SimulatedSequence] = []
        self._decoding: list[SimulatedSequence] = []
        self._preemption = BestEffortPreemption(Capacity(max_num_seqs, self._blocks))
        self._preemptible = 0
        """Number of sequences here that may be preempted for others."""
        self._paused: set[str] = set()
        """Ids whose prompts are not computed in the coming step."""

    # --- what is there ----------------------------------------------------------------------------------------------

    @property
    def decoding(self) -> Sequence[SimulatedSequence]:
        """The batch past its prefill, oldest first."""
        return self._decoding

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        """Sequences in the engine's own queue."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use."""
        return 1 - self._free_blocks / self._blocks

    def sequences(self) -> Iterable[SimulatedSequence]:
        """All that are here: decoding, prefilling, waiting."""
        return chain(self._decoding, self._prefilling, self._waiting)

    # --- coming and going -------------------------------------------------------------------------------------------

    def submit(self, sequence: SimulatedSequence) -> None:
        """``sequence`` joins the engine's queue."""
        sequence.preemptible = self.gate.preemptible(sequence)
        self._preemptible += sequence.preemptible
        self._waiting.append(sequence)
        self._waiting_tokens += sequence.to_prefill

    def drop_abandoned(self) -> None:
        """Sequences that nobody waits for leave, with their memory."""
        for sequence in [s for s in self.sequences() if s.abandoned]:
            self._leaves(sequence)
        if any(s.abandoned for s in self.sequences()):
            self._decoding = [s for s in self._decoding if not s.abandoned]
            self._prefilling = [s for s in self._prefilling if not s.abandoned]
            self._waiting = deque(s for s in self._waiting if not s.abandoned)
            self._waiting_tokens = sum([s.to_prefill for s in self._waiting])

    def clear(self) -> list[SimulatedSequence]:
        """The engine dies: everything is gone; answers what was lost."""
        lost = list(self.sequences())
        self._decoding, self._prefilling = [], []
        self._waiting.clear()
        self._waiting_tokens = self._preemptible = 0
        self._free_blocks = self._blocks
        return lost

    # --- steps ------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Step:
        """Who takes part in the step that starts at ``now`` (s). Empty when there is nobody, or the gate holds all."""
        if self._prefill_first:
            step = Step()
            self._admit_prompts(step, self._budget, whole=True)
            return self._plan_decodes(now, step) if step.empty else step
        return self._plan_decodes(now, Step())

    def _plan_decodes(self, now: float, step: Step) -> Step:
        """The gate's choice decodes; in chunked mode prompts get what is left of the budget."""
        prefill_backlog = 0
        held: list[SimulatedSequence] = []
        if not self._prefill_first:
            held = self._preempt_best_effort(now)
            unfinished = sum([s.to_prefill - s.prefilled for s in self._prefilling if not self._is_paused(s)])
            prefill_backlog = min(self._waiting_tokens + unfinished, self._budget)
        plan = self.gate.plan(now, self._decoding, prefill_backlog)
        step.sat_out = plan.sit_out
        preempted = self._select_decodes(step)
        if not self._prefill_first:
            budget = self._budget - len(step.decodes)
            if plan.max_prefill_tokens is not None:
                budget = min(budget, plan.max_prefill_tokens)
            budget = self._continue_prompts(step, budget)
            if not preempted:
                self._admit_prompts(step, budget, whole=False)
        self._waiting.extend(held)
        self._waiting_tokens += sum([s.to_prefill for s in held])
        return step

    def _preempt_best_effort(self, now: float) -> list[SimulatedSequence]:
        """Apply best-effort preemption; return the sequences that are held out of the queue for this step."""
        self._paused = set()
        free = Capacity(self._max_num_seqs - self.running, self._free_blocks)
        if not self._preemptible:
            self._preemption.note(now, Capacity(self.running + self.waiting, self._blocks - self._free_blocks))
            return []
        running = [
            _member(s, prefilling=prefilling)
            for batch, prefilling in ((self._decoding, False), (self._prefilling, True))
            for s in batch
        ]
        plan = self._preemption.plan(now, free, running, [_member(s) for s in self._waiting])
        if plan is None:
            return []
        for sequence in plan.preempt:
            self.best_effort_preemptions += 1
            self._decoding.remove(sequence)
            self._preempt(sequence)
        self._paused = {s.request_id for s in plan.paused}
        self._waiting = deque([*plan.front, *(s for s in self._waiting if not s.preemptible), *plan.back])
        self._waiting_tokens = sum([s.to_prefill for s in self._waiting])
        return plan.held

    def _select_decodes(self, step: Step) -> bool:
        """Decode all but those who sit out; whether somebody had to be preempted for their next blocks."""
        decodes, sat_out, context, at, before = step.decodes, step.sat_out, 0, 0, self.preemptions
        while at < len(self._decoding) and len(decodes) < self._budget:
            sequence = self._decoding[at]
            at += 1
            if sat_out and sequence.request_id in sat_out:
                continue
            if sequence.length > sequence.capacity and not self._grow(sequence):
                break  # it was the last of the batch, and gave way itself
            decodes.append(sequence)
            context += sequence.length
        step.decode_context = context
        return self.preemptions > before

    def _grow(self, sequence: SimulatedSequence) -> bool:
        """One more block for ``sequence``, if need be from the batch's youngest; False when that is itself."""
        while not self._free_blocks:
            victim = self._prefilling.pop() if self._prefilling else self._decoding.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        self._free_blocks -= 1
        sequence.capacity += BLOCK_TOKENS
        return True

    def _preempt(self, victim: SimulatedSequence) -> None:
        """Its memory goes; all it has is computed again once there is room."""
        self._release(victim)
        victim.to_prefill, victim.prefilled = victim.length, 0
        victim.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(victim)
        self._waiting_tokens += victim.to_prefill

    def _continue_prompts(self, step: Step, budget: int) -> int:
        for sequence in self._prefilling:
            if budget <= 0:
                break
            if self._is_paused(sequence):
                continue
            budget -= self._add_chunk(step, sequence, budget)
        return budget

    def _admit_prompts(self, step: Step, budget: int, *, whole: bool) -> None:
        """Prompts from the engine's queue, in order, while batch, budget and memory have room for them.

        ``whole``: none is cut; one that is longer than a step's budget goes by itself.
        """
        while self._waiting and budget > 0 and self.running < self._max_num_seqs:
            sequence = self._waiting[0]
            if whole and sequence.to_prefill > budget and step.chunks:
                break
            blocks = -(-sequence.to_prefill // BLOCK_TOKENS)
            if blocks > self._free_blocks:
                break
            self._waiting.popleft()
            self._waiting_tokens -= sequence.to_prefill
            self._free_blocks -= blocks
            sequence.capacity = blocks * BLOCK_TOKENS
            self._prefilling.append(sequence)
            budget -= self._add_chunk(step, sequence, sequence.to_prefill if whole else budget)

    def _is_paused(self, sequence: SimulatedSequence) -> bool:
        return sequence.request_id in self._paused

    @staticmethod
    def _add_chunk(step: Step, sequence: SimulatedSequence, most: int) -> int:
        chunk = min(sequence.to_prefill - sequence.prefilled, most)
        step.chunks.append((sequence, chunk))
        step.prefill_tokens += chunk
        step.prefill_context += sequence.prefilled
        return chunk

    def finish(self, step: Step) -> Finished:
        """The step is over: its tokens are out."""
        done: list[SimulatedSequence] = []
        for sequence in step.decodes:
            sequence.length += 1
            if sequence.length >= sequence.final_length:
                done.append(sequence)
        prefilled: list[SimulatedSequence] = []
        if step.chunks:
            for sequence, chunk in step.chunks:
                sequence.prefilled += chunk
                # The step that completes a prompt also samples the next token.
                if sequence.prefilled >= sequence.to_prefill:
                    sequence.length += 1
                    prefilled.append(sequence)
                    if sequence.length >= sequence.final_length:
                        done.append(sequence)
            if prefilled:
                self._prefilling = [s for s in self._prefilling if s.prefilled < s.to_prefill]
                self._decoding += prefilled
        if done:
            for sequence in done:
                self._leaves(sequence)
            self._decoding = [s for s in self._decoding if s.length < s.final_length]
        return Finished(prefilled, done)

    def _leaves(self, sequence: SimulatedSequence) -> None:
        self._release(sequence)
        self.gate.forget(sequence.request_id)
        self._preemptible -= sequence.preemptible

    def _release(self, sequence: SimulatedSequence) -> None:
        self._free_blocks += sequence.capacity // BLOCK_TOKENS
        sequence.capacity = 0


def _member(sequence: SimulatedSequence, *, prefilling: bool = False) -> Member:
    return Member(
        sequence,
        sequence.preemptible,
        held=sequence.capacity // BLOCK_TOKENS,
        needed=-(-sequence.to_prefill // BLOCK_TOKENS),
        prefilling=prefilling,
        preempted_before=sequence.preemptions > 0,
    )
