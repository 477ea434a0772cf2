"""KV blocks with prefix caching: sharing, reference counts, eviction order, and no block lost."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine_adapter.simulated.kv_blocks import KvBlocks


def computed(kv: KvBlocks, *hashes: int) -> list[int]:
    """Allocate a block per hash, fill them, and return the hashes that were published."""
    kv.allocate(len(hashes))
    return [block for block in hashes if kv.publish(block)]


def test_hit_is_longest_cached_prefix_within_the_limit() -> None:
    kv = KvBlocks(10)
    computed(kv, 1, 2, 4)
    assert kv.hit((1, 2, 3, 4), 9) == (2, 0), "block 4 does not follow a cached block"
    assert kv.hit((1, 2, 4), 1) == (1, 0)
    assert kv.hit((3, 1), 9) == (0, 0)


def test_block_is_free_after_its_last_holder_and_stays_cached() -> None:
    kv = KvBlocks(10)
    computed(kv, 1, 2)
    kv.hold((1,))
    kv.release((1, 2), 0)
    assert (kv.free, kv.hit((1, 2), 9)) == (9, (2, 1)), "block 1 has another holder"
    kv.release((1,), 0)
    assert (kv.free, kv.hit((1, 2), 9)) == (10, (2, 2))


def test_least_recently_used_block_is_evicted_first_and_tail_before_head() -> None:
    kv = KvBlocks(6)
    for first in (1, 3, 5):
        computed(kv, first, first + 1)
        kv.release((first, first + 1), 0)
    kv.hold((1, 2))  # The oldest prefix is used again.
    kv.release((1, 2), 0)
    evicted = []
    for _ in range(6):
        before = {block for block in range(1, 7) if block in kv}
        kv.allocate(1)
        evicted += before - {block for block in range(1, 7) if block in kv}
    assert evicted == [4, 3, 6, 5, 2, 1]


def test_free_blocks_without_content_are_used_before_cached_ones() -> None:
    kv = KvBlocks(3)
    computed(kv, 1)
    kv.release((1,), 0)
    kv.allocate(2)
    assert 1 in kv
    kv.allocate(1)
    assert 1 not in kv


def test_second_copy_of_a_block_is_not_cached() -> None:
    kv = KvBlocks(4)
    assert computed(kv, 1) == [1]
    assert computed(kv, 1) == []
    kv.release((1,), 0)
    assert computed(kv, 1) == [1], "the new copy replaces the one that no sequence holds"
    assert (kv.free, kv.hit((1,), 1)) == (2, (1, 0))
    kv.release((), 1)
    kv.release((1,), 0)
    assert (kv.free, kv.hit((1,), 1)) == (4, (1, 1))


def test_clear_frees_all_blocks_and_empties_the_cache() -> None:
    kv = KvBlocks(4)
    computed(kv, 1, 2)
    kv.release((1, 2), 0)
    computed(kv, 3)
    kv.clear()
    assert (kv.free, kv.hit((1, 2), 2), 3 in kv) == (4, (0, 0), False)


class KvBlocksMachine(RuleBasedStateMachine):
    """Random sequences of blocks of three prefixes, against a list of the blocks that each sequence holds."""

    TOTAL = 12
    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.kv = KvBlocks(self.TOTAL)
        self.live: list[tuple[list[int], int]] = []

    @rule(target=sequences, prefix=st.integers(0, 2), length=st.integers(1, 6), tail=st.integers(0, 3))
    def admit(self, prefix: int, length: int, tail: int) -> tuple[list[int], int] | None:
        hashes = [100 * prefix + block for block in range(length)]
        hit, idle = self.kv.hit(hashes, length)
        if length - hit + idle + tail > self.kv.free:
            return None
        self.kv.hold(hashes[:hit])
        self.kv.allocate(length - hit + tail)
        held = hashes[:hit] + [block for block in hashes[hit:] if self.kv.publish(block)]
        sequence = held, length + tail - len(held)
        self.live.append(sequence)
        return sequence

    @rule(sequence=consumes(sequences))
    def finish(self, sequence: tuple[list[int], int] | None) -> None:
        if sequence is not None:
            self.live.remove(sequence)
            self.kv.release(*sequence)

    @invariant()
    def blocks_are_conserved(self) -> None:
        held = {block for hashes, _ in self.live for block in hashes}
        assert self.kv.free == self.TOTAL - len(held) - sum(uncached for _, uncached in self.live)
        assert 0 <= self.kv.free <= self.TOTAL

    @invariant()
    def held_blocks_stay_cached(self) -> None:
        assert all(block in self.kv for hashes, _ in self.live for block in hashes)

    @invariant()
    def cached_free_blocks_fit_in_free_memory(self) -> None:
        held = {block for hashes, _ in self.live for block in hashes}
        cached = [100 * prefix + block for prefix in range(3) for block in range(6)]
        assert sum(block in self.kv and block not in held for block in cached) <= self.kv.free


TestKvBlocksMachine = KvBlocksMachine.TestCase
