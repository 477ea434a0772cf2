"""vLLM's scheduler for simulated engines: plans each step and applies its result.

It has no clock: `engine_adapter.simulated.engine` runs its steps in real time, the simulator in virtual time.
There are two step modes. ``chunked`` is today's vLLM: decodes first, then prompts, which may be split, up to the token
budget. ``prefill-first`` is vLLM 0.6 without chunked prefill: whole prompts, and no decodes while a prompt fits.

Prefix caching works as in vLLM (`engine_adapter.simulated.kv_blocks`). A prompt takes the longest run of its leading
blocks that is cached, but never its last token, which is computed to sample the first output token. Blocks are cached
in the step that fills them, so a prompt admitted later in that step finds them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain

from engine_adapter.gates.base import OpenGate, StepGate, StepPlan
from engine_adapter.gates.best_effort_preemption import BestEffortPreemption, Capacity, Member
from engine_adapter.gates.drafts import fit_drafts
from engine_adapter.service_kind import ServiceKind
from engine_adapter.simulated.kv_blocks import KvBlocks
from engine_adapter.simulated.sequence import BLOCK_TOKENS, SimulatedSequence, member
from engine_adapter.simulated.speculation import RandomAcceptance, Speculation
from engine_adapter.simulated.step import Finished, Step

__all__ = ["BLOCK_TOKENS", "STEP_MODES", "SimulatedScheduler"]

STEP_MODES = ("chunked", "prefill-first")


class SimulatedScheduler:
    """The queue, the batch and the KV memory of one engine.

    Call `plan` and `finish` in turn. Limits as in vLLM; sizes in tokens. ``prefix_caching``: whether sequences share
    the blocks whose hashes they give. ``speculation``: none by default.

    Raises:
        ValueError: the step mode is unknown, or the KV memory does not hold one sequence of ``max_model_len``.
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
        prefix_caching: bool = True,
        speculation: Speculation | None = None,
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
        self._budget, self._max_model_len = max_num_batched_tokens, max_model_len
        self._speculation = speculation or RandomAcceptance()
        self._drafts = self._speculation.draft_tokens
        self._kv = KvBlocks(-(-kv_tokens // BLOCK_TOKENS))
        self._prefix_caching = prefix_caching
        self._prefill_first = step_mode == "prefill-first"
        self._waiting: deque[SimulatedSequence] = deque()
        self._waiting_tokens = 0
        self._prefilling, self._decoding = list[SimulatedSequence](), list[SimulatedSequence]()
        self._preemption = BestEffortPreemption(Capacity(max_num_seqs, self._kv.total))
        self._preemptible = 0
        """Number of sequences here that may be preempted for others."""
        self._yielding = 0
        """Number of yielding sequences here."""
        self._blocked = False
        """Whether the last step computed nothing, because only held sequences run."""

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def decoding(self) -> Sequence[SimulatedSequence]:
        """Running sequences past their prefill, oldest first."""
        return self._decoding

    @property
    def running(self) -> int:
        """Number of sequences in the batch."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def waiting(self) -> int:
        """Number of sequences in the engine's own queue."""
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that sequences hold; a shared block counts once, a cached free one does not."""
        return 1 - self._kv.free / self._kv.total

    def sequences(self) -> Iterable[SimulatedSequence]:
        """Return all sequences in the engine: decoding, prefilling, waiting."""
        return chain(self._decoding, self._prefilling, self._waiting)

    # --- arrivals and departures --------------------------------------------------------------------------------------

    def submit(self, sequence: SimulatedSequence) -> None:
        """Append ``sequence`` to the engine's queue."""
        sequence.preemptible = self.gate.preemptible(sequence)
        self._preemptible += sequence.preemptible
        self._yielding += sequence.kind is ServiceKind.YIELDING
        self._waiting.append(sequence)
        self._count_backlog(sequence)

    def drop_abandoned(self) -> None:
        """Remove abandoned sequences and free their memory."""
        abandoned = [s for s in self.sequences() if s.abandoned]
        for sequence in abandoned:
            self._remove(sequence)
        if abandoned:
            self._decoding = [s for s in self._decoding if not s.abandoned]
            self._prefilling = [s for s in self._prefilling if not s.abandoned]
            self._waiting = deque(s for s in self._waiting if not s.abandoned)
            self._waiting_tokens = sum([s.backlog for s in self._waiting])

    def clear(self) -> list[SimulatedSequence]:
        """Remove all sequences, as a crash does, and return them."""
        lost = list(self.sequences())
        self._decoding, self._prefilling = [], []
        self._waiting.clear()
        self._waiting_tokens = self._preemptible = self._yielding = 0
        self._kv.clear()
        return lost

    # --- steps ------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Step:
        """Plan the step that starts at ``now`` (s). It is empty if no sequence is there or all sit out."""
        if self._prefill_first:
            step = Step()
            self._admit_prompts(step, self._budget, whole=True)
            return self._plan_decodes(now, step) if step.empty else step
        return self._plan_decodes(now, Step())

    def _plan_decodes(self, now: float, step: Step) -> Step:
        """Add the decodes that the gate allows and, in chunked mode, prompts up to the token budget."""
        prefill_backlog = 0
        held, yielding_prompts = list[SimulatedSequence](), False
        if not self._prefill_first:
            held = self._preempt_best_effort(now)
            yielding_prompts = self._yielding > 0 and self._hold_yielding(held)
            unfinished = sum([s.left for s in self._prefilling if not s.held])
            prefill_backlog = min(self._waiting_tokens + unfinished, self._budget)
        plan, before = self.gate.plan(now, self._decoding, prefill_backlog, yielding_prompts), self.preemptions
        step.sat_out = plan.sit_out
        if self._drafts:
            fit_drafts(self._decoding, plan, self._budget)
        budget = self._select_decodes(step, plan)
        preempted = self.preemptions > before
        if not self._prefill_first:
            if plan.max_prefill_tokens is not None:
                budget = min(budget, self._least_prefill(plan.max_prefill_tokens))
            budget = self._continue_prompts(step, budget)
            if not preempted:
                self._admit_prompts(step, budget, whole=False)
        self._waiting.extend(held)
        self._waiting_tokens += sum([s.backlog for s in held])
        self._blocked = step.empty and not self._decoding and any(s.held for s in self._prefilling)
        return step

    def _preempt_best_effort(self, now: float) -> list[SimulatedSequence]:
        """Apply best-effort preemption; return the sequences that are held out of the queue for this step."""
        free = Capacity(self._max_num_seqs - self.running, self._kv.free)
        running, waiting = list[Member](), list[Member]()
        if self._preemptible:
            running = [member(s) for s in self._decoding if s.preemptible]
            running += [member(s, prefilling=True) for s in self._prefilling]
            waiting = [member(s) for s in self._waiting if s.preemptible or s.kind is not ServiceKind.BEST_EFFORT]
        plan = self._preemption.plan(now, free, running, waiting)
        if plan is None:
            return []
        for sequence in plan.preempt:
            self.best_effort_preemptions += 1
            self._decoding.remove(sequence)
            self._preempt(sequence)
        self._waiting = deque([*plan.front, *(s for s in self._waiting if not s.preemptible), *plan.back])
        self._waiting_tokens = sum([s.backlog for s in self._waiting])
        return plan.held

    def _hold_yielding(self, held: list[SimulatedSequence]) -> bool:
        """Hold the prompts of yielding sequences while paced or deadline-only ones have any.

        Waiting ones move from the queue to ``held``. Return whether no such prompt is there, or none can be computed.
        """
        self._prefilling.sort(key=lambda sequence: sequence.kind is ServiceKind.YIELDING)
        prompts = [*self._prefilling, *self._waiting]
        others = any(s.kind < ServiceKind.BEST_EFFORT for s in prompts)
        for sequence in self._prefilling:
            sequence.held = others and not self._blocked and sequence.kind is ServiceKind.YIELDING
        moved = [s for s in self._waiting if others and s.kind is ServiceKind.YIELDING]
        if moved:
            held += moved
            self._waiting = deque(s for s in self._waiting if s.kind is not ServiceKind.YIELDING)
            self._waiting_tokens = sum([s.backlog for s in self._waiting])
        return self._blocked or not others

    def _select_decodes(self, step: Step, plan: StepPlan) -> int:
        """Add the decodes that do not sit out, with their drafts. Return the budget that is left."""
        decodes, sat_out, context, budget, has_drafts = step.decodes, step.sat_out, 0, self._budget, self._drafts > 0
        # Preempted sequences leave the end of the list, so the iteration ends before them.
        for sequence in self._decoding:
            if budget <= 0:
                break
            if sat_out and sequence.request_id in sat_out:
                continue
            length, drafts = sequence.length, sequence.drafts
            if drafts:
                kept = plan.drafts.get(sequence.request_id, drafts)
                drafts = min(kept, budget - 1, self._max_model_len - length - 1)
            budget -= 1 + drafts
            if length + drafts > sequence.capacity and not self._grow(sequence, length + drafts):
                break  # it was the newest of the batch, and preempted itself
            if length == sequence.capacity or has_drafts:
                self._publish(sequence, length)
            decodes.append(sequence)
            context += length
            if has_drafts:
                step.drafts.append(drafts)
                step.offered += sequence.drafts > 0
        step.decode_context = context
        return budget

    def _grow(self, sequence: SimulatedSequence, tokens: int) -> bool:
        """Allocate blocks for ``tokens``, if necessary by preempting the newest; return False if that is itself."""
        blocks = -(-(tokens - sequence.capacity) // BLOCK_TOKENS)
        while self._kv.free < blocks:
            victim = self._prefilling.pop() if self._prefilling else self._decoding.pop()
            self._preempt(victim)
            if victim is sequence:
                return False
        self._kv.allocate(blocks)
        sequence.capacity += blocks * BLOCK_TOKENS
        return True

    def _preempt(self, victim: SimulatedSequence) -> None:
        """Free the memory of ``victim`` and put it in front of the queue; all its tokens are computed again later."""
        self._release(victim)
        victim.computed = victim.drafts = 0
        victim.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(victim)
        self._count_backlog(victim)

    def _continue_prompts(self, step: Step, budget: int) -> int:
        """Add chunks of the prompts that are already in the batch; return the budget that is left."""
        for sequence in self._prefilling:
            if budget <= 0:
                break
            if sequence.held:
                continue
            budget -= self._add_chunk(step, sequence, budget)
        return budget

    def _admit_prompts(self, step: Step, budget: int, *, whole: bool) -> None:
        """Admit prompts from the queue, in order, while slots, budget and memory suffice.

        ``whole``: prompts are not split, and a prompt longer than the budget gets a step of its own.
        """
        continued = bool(step.chunks)
        while self._waiting and budget > 0 and self.running < self._max_num_seqs:
            sequence = self._waiting[0]
            hit, idle = self._hit(sequence)
            uncached = sequence.length - hit * BLOCK_TOKENS
            if whole and uncached > budget and step.chunks:
                break
            padding = 0 if continued else self._padding(step, sequence, uncached)
            if padding >= budget:
                break
            blocks = -(-(sequence.length + padding) // BLOCK_TOKENS)
            if blocks - hit + idle > self._kv.free:
                break
            self._waiting.popleft()
            self._waiting_tokens -= sequence.backlog
            self._allocate(sequence, blocks, hit)
            self._prefilling.append(sequence)
            budget -= self._add_chunk(step, sequence, uncached if whole else budget) + padding
            if padding:
                step.padding[sequence.request_id] = padding

    def _least_prefill(self, most: int) -> int:
        """Return the gate's limit of ``most`` prefill tokens, or what the padding of the next prompt takes."""
        if not (most and self._drafts and self._waiting) or any(not s.held for s in self._prefilling):
            return most
        padded = self._waiting[0].length - self._hit(self._waiting[0])[0] * BLOCK_TOKENS == 1
        return max(most, 1 + self._drafts) if padded else most

    def _padding(self, step: Step, sequence: SimulatedSequence, uncached: int) -> int:
        """Return the drafts that pad the only token of an admitted ``sequence``, so that all decodes have one size."""
        padded = uncached == 1 and (step.decodes or sequence.length > 1)
        return self._drafts if padded and sequence.length + self._drafts < self._max_model_len else 0

    def _hit(self, sequence: SimulatedSequence) -> tuple[int, int]:
        """Return how many leading blocks of ``sequence`` are cached, and how many of these no sequence holds."""
        if not (self._prefix_caching and sequence.blocks):
            return 0, 0
        return self._kv.hit(sequence.blocks, (sequence.length - 1) // BLOCK_TOKENS)

    def _count_backlog(self, sequence: SimulatedSequence) -> None:
        """Count the tokens that a queued ``sequence`` would compute if it were admitted now."""
        sequence.backlog = sequence.length - self._hit(sequence)[0] * BLOCK_TOKENS
        self._waiting_tokens += sequence.backlog

    def _allocate(self, sequence: SimulatedSequence, blocks: int, hit: int) -> None:
        """Give ``blocks`` blocks to an admitted ``sequence``; the first ``hit`` of them are cached."""
        # NOTE: the cached blocks must be held first, or the allocation might evict them.
        if hit:
            sequence.held_hashes = list(sequence.blocks[:hit])
            self._kv.hold(sequence.held_hashes)
        self._kv.allocate(blocks - hit)
        sequence.capacity = blocks * BLOCK_TOKENS
        sequence.full_blocks = hit
        sequence.computed = hit * BLOCK_TOKENS
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
            sequence.on_cached(sequence.computed)

    def _add_chunk(self, step: Step, sequence: SimulatedSequence, max_tokens: int) -> int:
        chunk = min(sequence.left, max_tokens)
        step.chunks.append((sequence, chunk))
        step.prefill_tokens += chunk
        if sequence.preemptions:
            step.recomputed_tokens += chunk
        step.prefill_context += sequence.computed
        self._publish(sequence, sequence.computed + chunk)
        return chunk

    def _publish(self, sequence: SimulatedSequence, tokens: int) -> None:
        """Cache the blocks of ``sequence`` that its first ``tokens`` tokens fill."""
        if not (self._prefix_caching and sequence.blocks):
            return
        full = min(tokens // BLOCK_TOKENS, len(sequence.blocks))
        for block_hash in sequence.blocks[sequence.full_blocks : full]:
            if self._kv.publish(block_hash):
                sequence.held_hashes.append(block_hash)
        sequence.full_blocks = max(full, sequence.full_blocks)

    def finish(self, step: Step) -> Finished:
        """Apply the result of ``step``."""
        done: list[SimulatedSequence] = []
        if step.drafts:
            self._accept(step)
        for sequence, tokens in step.tokens():
            sequence.computed += tokens
            sequence.length += tokens
            if sequence.length >= sequence.final_length:
                done.append(sequence)
        prefilled: list[SimulatedSequence] = []
        if step.chunks:
            for sequence, chunk in step.chunks:
                sequence.computed += chunk
                # The step that completes a prefill also samples a token.
                if not sequence.left:
                    sequence.length += 1
                    sequence.drafts = self._drafts
                    prefilled.append(sequence)
                    if sequence.length >= sequence.final_length:
                        done.append(sequence)
            self._decoding += [s for s in self._prefilling if not s.prefilling]
            self._prefilling = [s for s in self._prefilling if s.prefilling]
        if done:
            for sequence in done:
                self._remove(sequence)
            self._decoding = [s for s in self._decoding if s.length < s.final_length]
        return Finished(prefilled, done)

    def _accept(self, step: Step) -> None:
        """Find the accepted drafts of each decode, and give each sequence new drafts."""
        for sequence, drafts in zip(step.decodes, step.drafts, strict=True):
            sequence.drafts = self._drafts
            accepted = self._speculation.accepted(sequence, drafts) if drafts else 0
            step.accepted_tokens += accepted
            step.gained.append(min(1 + accepted, sequence.final_length - sequence.length))
            self._publish(sequence, sequence.computed + step.gained[-1])

    def _remove(self, sequence: SimulatedSequence) -> None:
        """Drop the state of a sequence that leaves the engine."""
        self._release(sequence)
        self.gate.forget(sequence.request_id)
        self._preemptible -= sequence.preemptible
        self._yielding -= sequence.kind is ServiceKind.YIELDING

    def _release(self, sequence: SimulatedSequence) -> None:
        self._publish(sequence, sequence.computed)
        hashes = sequence.held_hashes
        self._kv.release(hashes, sequence.capacity // BLOCK_TOKENS - len(hashes))
        sequence.held_hashes = []
        sequence.capacity = sequence.full_blocks = 0
