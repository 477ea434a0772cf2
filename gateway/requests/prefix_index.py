"""Predicts how much of a prompt an engine finds in its prefix cache.

vLLM keeps the KV memory of computed prompt blocks until it needs the space. A prompt that begins with the same blocks
does not compute them again. The gateway sees every prompt that it sends, so it keeps an index of the same blocks. A
block's hash covers its content and the block before it, so equal hashes mean equal beginnings.

As in vLLM, a block is *held* while running requests use it. Blocks that none holds stay cached until space is needed,
least recently used first, the tail of a prompt before its head. What the index says is a prediction. The engine's own
counts (`PrefixIndex.learn`) and events (`PrefixIndex.stored`, `PrefixIndex.removed`) correct it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine_adapter.engine import RenderedPrompt
from gateway.requests.request import Request

DEFAULT_CAPACITY_TOKENS = 1_000_000
"""Tokens while an engine's KV memory is unknown. `PrefixIndex.learn` corrects a value that is too high."""

MAX_BLOCKS = 1 << 18
"""Bounds the memory of an index to about 60 MB: 4 million tokens in blocks of 16."""

LEARNING_RATE = 0.2
"""Weight of the newest request in `PrefixIndex.reliability`. Convention: a few requests decide."""

RELIABILITY_STEP = 0.05
"""Change of the reliability after which the hits of all waiting requests are predicted again. It changes a little with
each request, and a thousand long prompts take 15 ms."""


TOKEN_BYTES = array("I").itemsize
"""Bytes of a token id in a prompt's content."""


def prefix_root(adapter: str, salt: str) -> int:
    """Return a hash of what cached blocks depend on besides their content: the LoRA adapter, and the cache salt."""
    return hash((adapter, salt))


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Return token ids as the content of a prompt."""
    return array("I", token_ids).tobytes()


def prompt_bytes(prompt: RenderedPrompt) -> bytes:
    """Return a prompt's content. Images differ by their own content, not by their placeholder tokens."""
    if not prompt.media:
        return token_bytes(prompt.token_ids)
    token_ids = list(prompt.token_ids)
    for offset, content in prompt.media:
        token_ids[offset] = hash(content) & 0xFFFFFFFF
    return token_bytes(token_ids)


def hash_blocks(root: int, data: bytes, block_bytes: int) -> tuple[int, ...]:
    """Return the chained hashes of the whole blocks of ``block_bytes`` bytes of ``data``.

    ``root`` stands for what precedes them. NOTE: the hashes are valid in this process only, because Python salts its
    hash of bytes.
    """
    hashes = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        root = hash((root, data[start : start + block_bytes]))
        hashes.append(root)
    return tuple(hashes)


@dataclass(slots=True, frozen=True)
class _Tail:
    """What follows the last whole block of a prompt: the rest of the prompt, and the answer to it."""

    rest: bytes
    tokens: float


@dataclass(slots=True)
class _Held:
    """A block that ``holders`` running requests use, and its size in tokens. ``stored``: the engine says it has it."""

    tokens: float
    holders: int = 0
    stored: bool = False


class PrefixIndex:
    """The prompt blocks that one engine probably has in its KV memory.

    INVARIANT: ``tokens`` is the sum of all blocks and tails: at most ``capacity_tokens``, unless held ones exceed it.

    Attributes:
        capacity_tokens: the engine's KV memory.
        tokens: tokens of all blocks.
        shared_tokens: tokens that several running requests share, beyond the first copy.
        reliability: share of the predicted hits that the engine confirmed lately. It falls to 0 for an engine without
            prefix caching.
    """

    def __init__(self, capacity_tokens: float = DEFAULT_CAPACITY_TOKENS) -> None:
        self.capacity_tokens = capacity_tokens
        self.tokens = self.shared_tokens = 0.0
        self.reliability = self._applied_reliability = 1.0
        self._held: dict[int, _Held] = {}
        self._free: OrderedDict[int, float] = OrderedDict()
        # The blocks of each running request, and how many of them were there before it.
        self._running: dict[str, tuple[tuple[int, ...], int]] = {}
        # By the hash of the block before. A chat continues with the answer, which the engine has in its cache too.
        self._tails: dict[int, _Tail] = {}
        self._waiting: dict[str, tuple[Request, set[int]]] = {}
        # The waiting requests to predict again once the state of a block changes, by the block's hash.
        self._watchers: dict[int, set[str]] = {}
        self._outdated: set[str] = set()

    def __len__(self) -> int:
        return len(self._held) + len(self._free)

    def cached_tokens(self, request: Request) -> int:
        """Return the predicted hit (tokens) of ``request``, less than its prompt: its last token is always computed."""
        return self._hit(request, self._leading(request.blocks)[0])

    # --- requests -------------------------------------------------------------------------------------------------

    def wait(self, request: Request) -> None:
        """Predict the hit of a request that begins to wait. `update_waiting` keeps it up to date.

        A request without blocks keeps the hit that it came with.
        """
        if request.blocks:
            self._waiting[request.id] = request, set()
            self._predict(request.id)

    def withdraw(self, request: Request) -> None:
        """Stop updating a request that no longer waits."""
        _, watched = self._waiting.pop(request.id, (request, ()))
        self._unwatch(request.id, watched)

    def update_waiting(self) -> list[Request]:
        """Predict again the hits of waiting requests whose blocks came, went or are held now. Return those changed."""
        if not self._outdated:
            return []
        outdated, self._outdated = self._outdated, set()
        return [self._waiting[name][0] for name in outdated if name in self._waiting and self._predict(name)]

    def admit(self, request: Request) -> None:
        """Note that the engine computes the blocks of ``request`` and holds them until `release`."""
        self.withdraw(request)
        blocks = request.blocks
        if not blocks:
            return
        self._running[request.id] = blocks, self._leading(blocks)[0]
        held = self._held
        for key in blocks:
            block = held.get(key)
            if block is not None:
                self.shared_tokens += block.tokens
                block.holders += 1
                continue
            tokens = self._free.pop(key, None)
            if tokens is None:
                tokens = request.block_tokens
                self.tokens += tokens
            held[key] = _Held(tokens, 1)
            if key in self._watchers:
                self._changed(key)
        self._evict(self.capacity_tokens)

    def release(self, request: Request) -> None:
        """Note that ``request`` ended. Its blocks stay cached, unless it ended before the engine computed them."""
        blocks, before = self._running.pop(request.id, ((), 0))
        kept = before if request.prefilling and not request.generated else len(blocks)
        for at in range(len(blocks) - 1, -1, -1):
            key = blocks[at]
            block = self._held.get(key)
            if block is None:
                continue
            block.holders -= 1
            if block.holders:
                self.shared_tokens -= block.tokens
            else:
                del self._held[key]
                self._free[key] = block.tokens
                if key in self._watchers:
                    self._changed(key)
            if at >= kept and not block.stored:
                self._remove(key)
        one_answer = request.sequences == 1 and request.generated > 0
        # The content of a request that was queued again is not known any more.
        forgotten = request.block_bytes > 0 and not request.content
        if blocks and one_answer and not forgotten and blocks[-1] not in self._held:
            rest = request.content[len(blocks) * request.block_bytes :]
            # The blocks have estimated sizes, but the prompt has the engine's count now.
            tokens = max(0.0, request.prompt_tokens - len(blocks) * request.block_tokens) + request.generated
            self._drop_tail(blocks[-1])
            self._tails[blocks[-1]] = _Tail(rest, tokens)
            self.tokens += tokens
        request.content = b""
        self._evict(self.capacity_tokens)

    def learn(self, request: Request, predicted: int, actual: int) -> None:
        """Correct the index: the engine found ``actual`` tokens of ``request`` in its cache instead of ``predicted``.

        A hit that fell short by more than two blocks says that the engine has less memory for its cache than the index
        thought, so the oldest blocks are forgotten, as many tokens as were missing.
        """
        if predicted <= 0:
            return
        missing = predicted - actual
        confirmed = 1.0 if missing <= 2 * request.block_tokens else actual / predicted
        self.reliability += LEARNING_RATE * (confirmed - self.reliability)
        if abs(self.reliability - self._applied_reliability) >= RELIABILITY_STEP:
            self._applied_reliability = self.reliability
            self._outdated.update(self._waiting)
        if confirmed < 1.0:
            self._evict(self.tokens - missing)

    def clear(self) -> None:
        """Forget all blocks: the engine lost its memory."""
        for key in (*self._held, *self._free):
            self._changed(key)
        self._held.clear()
        self._free.clear()
        self._tails.clear()
        self._running.clear()
        self.tokens = self.shared_tokens = 0.0

    # --- the engine's own events ------------------------------------------------------------------------------------

    def stored(self, keys: Iterable[int], block_tokens: float) -> None:
        """Note that the engine stored the blocks ``keys``, first to last, of ``block_tokens`` tokens each."""
        for key in reversed(list(keys)):
            block = self._held.get(key)
            if block is None:
                self._add_free(key, block_tokens)
            else:
                block.stored = True
        self._evict(self.capacity_tokens)

    def removed(self, keys: Iterable[int]) -> None:
        """Note that the engine removed the blocks ``keys``."""
        for key in keys:
            self._remove(key)

    # --- internals --------------------------------------------------------------------------------------------------

    def _leading(self, blocks: Sequence[int]) -> tuple[int, int]:
        """Return how many leading ``blocks`` are cached, and how many of these are held."""
        held, free, cached = self._held, self._free, len(blocks)
        still_held: int | None = None
        for at, key in enumerate(blocks):
            if key in held:
                continue
            if still_held is None:
                still_held = at
            if key not in free:
                cached = at
                break
        return cached, cached if still_held is None else still_held

    def _hit(self, request: Request, blocks: int) -> int:
        if not blocks:
            return 0
        tokens = blocks * request.block_tokens
        tail = self._tails.get(request.blocks[blocks - 1]) if blocks < len(request.blocks) else None
        if tail is not None and request.content.startswith(tail.rest, blocks * request.block_bytes):
            # An engine caches whole blocks only.
            tokens += tail.tokens // request.block_tokens * request.block_tokens
        return max(0, min(int(tokens * self.reliability), request.prompt_tokens - 1))

    def _predict(self, name: str) -> bool:
        """Predict the hit of a waiting request and watch the blocks that limit it. Return whether the hit changed."""
        request, watched = self._waiting[name]
        blocks = request.blocks
        cached, held = self._leading(blocks)
        self._unwatch(name, watched)
        watched.clear()
        watched.update([blocks[at] for at in (cached - 1, cached, held - 1, held) if 0 <= at < len(blocks)])
        for key in watched:
            self._watchers.setdefault(key, set()).add(name)
        before = request.cached_tokens, request.shared_tokens
        request.cached_tokens = self._hit(request, cached)
        request.shared_tokens = min(int(held * request.block_tokens), request.cached_tokens)
        return before != (request.cached_tokens, request.shared_tokens)

    def _unwatch(self, name: str, watched: Iterable[int]) -> None:
        for key in watched:
            watchers = self._watchers[key]
            watchers.discard(name)
            if not watchers:
                del self._watchers[key]

    def _changed(self, key: int) -> None:
        watchers = self._watchers.get(key)
        if watchers:
            self._outdated |= watchers

    def _add_free(self, key: int, tokens: float) -> None:
        if key in self._free:
            self._free.move_to_end(key)
        else:
            self._free[key] = tokens
            self.tokens += tokens
            self._changed(key)

    def _evict(self, limit: float) -> None:
        """Forget the least recently used blocks until at most ``limit`` tokens are left, or all others are held."""
        while self._free and (self.tokens > limit or len(self._free) + len(self._held) > MAX_BLOCKS):
            self._remove(next(iter(self._free)))

    def _remove(self, key: int) -> None:
        """Forget an idle block, and what follows it."""
        tokens = self._free.pop(key, None)
        if tokens is not None:
            self.tokens -= tokens
            self._drop_tail(key)
            self._changed(key)

    def _drop_tail(self, key: int) -> None:
        tail = self._tails.pop(key, None)
        if tail is not None:
            self.tokens -= tail.tokens
