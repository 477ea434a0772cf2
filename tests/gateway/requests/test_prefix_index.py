"""`PrefixIndex`: hits, least recently used order, sharing, and what the engine reports."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from gateway.requests.prefix_index import TOKEN_BYTES, PrefixIndex, hash_blocks, token_bytes
from gateway.requests.request import Request
from gateway.requests.slo import Slo

BLOCK = 16


def a_request(name: str, tokens: list[int]) -> Request:
    """Return a request whose prompt is ``tokens``."""
    request = Request(name, "chat", 0.0, Slo(ttft_s=1.0), len(tokens), 10.0)
    request.content, request.block_tokens, request.block_bytes = token_bytes(tokens), BLOCK, BLOCK * TOKEN_BYTES
    request.blocks = hash_tokens(0, tokens)
    return request


def hash_tokens(root: int, tokens: list[int]) -> tuple[int, ...]:
    """Return the block hashes of token ids."""
    return hash_blocks(root, token_bytes(tokens), BLOCK * TOKEN_BYTES)


def serve(index: PrefixIndex, request: Request) -> int:
    """Take ``request`` through the index, and return the hit that was predicted."""
    index.wait(request)
    index.update_waiting()
    index.admit(request)
    index.release(request)
    return request.cached_tokens


def test_index_predicts_whole_blocks_of_the_common_beginning() -> None:
    index = PrefixIndex()
    first = list(range(100))
    assert serve(index, a_request("a", first)) == 0
    assert serve(index, a_request("b", [*first, *range(500, 600)])) == 96
    assert serve(index, a_request("c", [*first[:40], 7, 7, 7, *first[43:]])) == 32
    assert serve(index, a_request("d", [1, *first])) == 0


def test_index_always_leaves_the_last_token_to_compute() -> None:
    index = PrefixIndex()
    serve(index, a_request("a", list(range(64))))
    again = a_request("b", list(range(64)))
    assert serve(index, again) == 63
    assert again.uncached_tokens == 1


def test_index_forgets_the_least_recently_used_prompt_and_its_tail_first() -> None:
    index = PrefixIndex(capacity_tokens=8 * BLOCK)
    old, kept, new = ([base + i for i in range(4 * BLOCK)] for base in (0, 1000, 2000))
    for name, tokens in (("a", old), ("b", kept), ("c", old[: 2 * BLOCK]), ("d", new[: 2 * BLOCK])):
        serve(index, a_request(name, tokens))
    # Two blocks had to go: the unused tail of the oldest prompt.
    assert index.cached_tokens(a_request("e", old)) == 2 * BLOCK
    assert index.cached_tokens(a_request("f", kept)) == 4 * BLOCK - 1
    assert index.tokens == 8 * BLOCK


def test_index_keeps_the_blocks_of_running_requests() -> None:
    index = PrefixIndex(capacity_tokens=4 * BLOCK)
    running = a_request("a", list(range(4 * BLOCK)))
    index.wait(running)
    index.admit(running)
    serve(index, a_request("b", list(range(1000, 1000 + 4 * BLOCK))))
    assert index.cached_tokens(a_request("c", list(range(5 * BLOCK)))) == 4 * BLOCK
    index.release(running)
    serve(index, a_request("d", list(range(2000, 2000 + 4 * BLOCK))))
    assert index.cached_tokens(a_request("e", list(range(5 * BLOCK)))) == 0


def test_index_counts_memory_that_running_requests_share_once() -> None:
    index = PrefixIndex()
    system = list(range(10 * BLOCK))
    requests = [a_request(str(i), [*system, *range(1000 * i, 1000 * i + BLOCK)]) for i in range(1, 4)]
    for request in requests:
        index.wait(request)
        index.admit(request)
    assert index.shared_tokens == 2 * 10 * BLOCK
    index.release(requests[0])
    assert index.shared_tokens == 10 * BLOCK
    index.release(requests[1])
    assert index.shared_tokens == 0


def test_index_updates_waiting_requests_when_a_prompt_is_admitted_or_ends() -> None:
    index = PrefixIndex()
    system = list(range(10 * BLOCK))
    first, second = a_request("a", [*system, *range(700, 800)]), a_request("b", [*system, *range(800, 900)])
    index.wait(first)
    index.wait(second)
    assert (second.cached_tokens, second.shared_tokens) == (0, 0)
    index.admit(first)
    assert index.update_waiting() == [second]
    assert (second.cached_tokens, second.shared_tokens) == (10 * BLOCK, 10 * BLOCK)
    assert index.update_waiting() == []
    index.release(first)
    assert index.update_waiting() == [second]
    assert (second.cached_tokens, second.shared_tokens) == (10 * BLOCK, 0)


def test_index_forgets_the_oldest_blocks_when_the_engine_has_less_memory() -> None:
    index = PrefixIndex(capacity_tokens=10_000)
    for number in range(10):
        serve(index, a_request(str(number), list(range(1000 * number, 1000 * number + 10 * BLOCK))))
    oldest = a_request("again", list(range(10 * BLOCK + 5)))
    index.learn(oldest, predicted=10 * BLOCK, actual=0)
    assert index.tokens == 9 * 10 * BLOCK
    assert index.cached_tokens(oldest) == 0
    newest = a_request("newest", list(range(9000, 9000 + 10 * BLOCK + 5)))
    assert 0.75 * 10 * BLOCK <= index.cached_tokens(newest) <= 10 * BLOCK


def test_index_stops_predicting_hits_of_an_engine_without_a_prefix_cache() -> None:
    index = PrefixIndex()
    tokens = list(range(100 * BLOCK))
    for number in range(20):
        request = a_request(str(number), tokens)
        index.learn(request, serve(index, request), actual=0)
    assert serve(index, a_request("last", tokens)) < 0.02 * len(tokens)


def test_index_ignores_a_hit_that_is_short_by_the_engines_own_block_size() -> None:
    index = PrefixIndex()
    request = a_request("a", list(range(10 * BLOCK)))
    index.learn(request, predicted=10 * BLOCK, actual=8 * BLOCK)
    assert index.reliability == 1.0


def test_index_follows_the_engines_events() -> None:
    index = PrefixIndex()
    waiting = a_request("a", list(range(4 * BLOCK + 1)))
    index.wait(waiting)
    index.stored(waiting.blocks, BLOCK)
    assert index.update_waiting() == [waiting]
    assert waiting.cached_tokens == 4 * BLOCK
    index.removed(waiting.blocks[2:])
    assert index.update_waiting() == [waiting]
    assert waiting.cached_tokens == 2 * BLOCK
    index.clear()
    index.update_waiting()
    assert (waiting.cached_tokens, index.tokens) == (0, 0)


def test_hashes_depend_on_the_root_and_on_all_that_precedes() -> None:
    data = bytes(range(200))
    hashes = hash_blocks(1, data, 50)
    assert len(hashes) == 4
    assert not set(hashes) & set(hash_blocks(2, data, 50))
    changed = hash_blocks(1, b"x" + data[1:], 50)
    assert not set(hashes) & set(changed)
    assert hash_blocks(1, data[:149], 50) == hashes[:2]
    assert hash_tokens(1, [70_000] * 33) == hash_tokens(1, [70_000] * 40)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.sampled_from("wardle")), max_size=60))
def test_index_keeps_its_sums(actions: list[tuple[int, int, str]]) -> None:
    """After any sequence of events the sums equal those of the blocks, and idle blocks fit the capacity."""
    index = PrefixIndex(capacity_tokens=8 * BLOCK)
    live: dict[str, Request] = {}
    admitted: dict[str, Request] = {}
    for number, (family, length, action) in enumerate(actions):
        name = f"{number}"
        if action in "wa":
            request = live[name] = a_request(name, list(range(100 * family, 100 * family + length * BLOCK)))
            index.wait(request)
            if action == "a":
                index.admit(request)
                admitted[name] = live.pop(name)
        elif action == "r" and admitted:
            index.release(admitted.pop(min(admitted)))
        elif action == "d" and live:
            index.withdraw(live.pop(min(live)))
        elif action == "l" and admitted:
            index.learn(admitted[min(admitted)], 5 * BLOCK, length)
        elif action == "e":
            index.removed(hash_tokens(0, list(range(100 * family, 100 * family + length * BLOCK))))
        index.update_waiting()
        held = sum(len(set(r.blocks)) for r in admitted.values())
        distinct = len({key for r in admitted.values() for key in r.blocks})
        assert index.shared_tokens == (held - distinct) * BLOCK
        assert index.tokens <= max(8, distinct) * BLOCK
        assert index.tokens == len(index) * BLOCK
        for request in live.values():
            assert request.cached_tokens == index.cached_tokens(request)
    for request in admitted.values():
        index.release(request)
    assert index.shared_tokens == 0


def test_removed_block_ends_the_hit_of_longer_prompts() -> None:
    index = PrefixIndex()
    prompts = [a_request(str(n), list(range(n * BLOCK))) for n in (2, 4, 6)]
    for request in prompts:
        serve(index, request)
    index.removed(prompts[0].blocks[1:2])
    hits = [index.cached_tokens(request) for request in prompts]
    assert hits == [BLOCK] * 3
    assert all(first <= second for first, second in pairwise(hits))


def test_index_predicts_the_answer_of_a_chat_that_goes_on() -> None:
    index = PrefixIndex()
    first, answer = list(range(40)), list(range(900, 930))
    request = a_request("a", first)
    index.wait(request)
    index.admit(request)
    request.generated = len(answer)
    index.release(request)
    assert index.tokens == 70
    assert index.cached_tokens(a_request("next turn", [*first, *answer, *range(50)])) == 64
    # The same whole blocks, but another end of the prompt: the answer to that one is of no use.
    assert index.cached_tokens(a_request("other", [*first[:35], *range(500, 600)])) == 32
    # The same prompt again: its last token must be computed.
    assert index.cached_tokens(a_request("again", first)) == 32
    index.removed(request.blocks)
    assert index.tokens == 0


def test_index_forgets_an_answer_with_the_block_before_it() -> None:
    index = PrefixIndex(capacity_tokens=100)
    old = a_request("a", list(range(40)))
    index.wait(old)
    index.admit(old)
    old.generated = 30
    index.release(old)
    serve(index, a_request("b", list(range(1000, 1064))))
    assert index.tokens <= 100
    assert index.cached_tokens(a_request("c", [*range(40), *range(900, 1000)])) == 16
