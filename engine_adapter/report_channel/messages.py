"""The messages of the report channel, their frames, and the proof that both ends have the same key.

The scheduler class listens, and a gateway connects:

| from | message | content |
|---|---|---|
| server | `Challenge` | the version of the protocol, and a random nonce |
| gateway | `Answer` | a nonce of its own, and an HMAC of both under the key |
| server | `Welcome` | another HMAC of both, and the server's limits; or why it closes the connection |
| server | `Report`, again and again | what the engine has done since the report before |

The key never crosses the network. Each report has a tag under a key of this connection, so it cannot be forged,
replayed or moved. Reports are not secret: they hold counts and times, no names and no text.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import struct
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from engine_adapter.step_report import GateReport, StepReport

VERSION = 1
"""Version of the protocol. A gateway and a server with different versions do not talk."""

MAX_HANDSHAKE_BYTES = 1024
"""Largest message before the key is proved."""

MAX_REPORT_BYTES = 1 << 17
"""Largest report: 1,024 steps take less."""

HEARTBEAT_S = 0.5
"""Seconds between frames of a server whose engine has nothing new."""

STALE_S = 2.0
"""Seconds without a frame after which a gateway stops to rely on the server's reports: four heartbeats."""

LEAST_KEY_BYTES = 16
"""Shortest key. A recorded handshake lets its reader try keys offline, so the key must not be guessable."""

_NONCE_BYTES = 16
_TAG_BYTES = 16
_LENGTH = struct.Struct(">I")
_HEADER = struct.Struct(">IQ")
_COUNTER = struct.Struct(">QQ")

_Message = TypeVar("_Message")


class ChannelError(Exception):
    """The other end does not follow the protocol, or has another key. The message says what to do."""


@dataclass(slots=True)
class EngineLimits:
    """What a server's engine can do. It does not change while the server runs. Fields as in `EngineState`.

    ``preemptible``: the engine supports best-effort preemption.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int = 0
    prefix_caching: bool = True
    plans_ahead: bool = False
    preemptible: bool = False

    def __post_init__(self) -> None:
        sizes = (self.max_num_seqs, self.max_num_batched_tokens, self.max_model_len)
        if min(sizes) < 1 or self.kv_tokens < 0:
            raise ValueError("sizes must be positive")


@dataclass(slots=True)
class QueueReport:
    """The engine's queue: sequences that run and wait, and the fraction of KV memory in use."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0

    def __post_init__(self) -> None:
        if min(self.running, self.waiting) < 0 or not 0 <= self.kv_usage <= 1:
            raise ValueError("a queue has sizes of at least 0, and a KV usage between 0 and 1")


@dataclass(slots=True)
class Report:
    """The steps since the report before, the counters of the gate, and the queue after the last step."""

    steps: list[StepReport] = field(default_factory=list)
    gate: GateReport = field(default_factory=GateReport)
    queue: QueueReport = field(default_factory=QueueReport)

    def __post_init__(self) -> None:
        for step in self.steps:
            if not all(math.isfinite(number) and number >= 0 for number in step):
                raise ValueError("the numbers of a step are finite and at least 0")


@dataclass(slots=True)
class Challenge:
    """The first message."""

    version: int
    nonce: bytes


@dataclass(slots=True)
class Answer:
    """The gateway's proof that it has the key."""

    nonce: bytes
    proof: bytes


@dataclass(slots=True)
class Welcome:
    """The server's proof that it has the key, and its limits; or the ``error`` for which it ends the connection."""

    proof: bytes = b""
    limits: EngineLimits | None = None
    error: str = ""


def framed(message: Challenge | Answer | Welcome) -> bytes:
    """Return a message of the handshake as bytes to send."""
    content = msgspec.json.encode(message)
    return _LENGTH.pack(len(content)) + content


LENGTH_BYTES = _LENGTH.size


def handshake_length(prefix: bytes) -> int:
    """Return how many bytes follow the first `LENGTH_BYTES` of a message. Raises `ChannelError`."""
    (length,) = _LENGTH.unpack(prefix)
    if length > MAX_HANDSHAKE_BYTES:
        raise ChannelError("what answers there is no report channel")
    return int(length)


def decoded(content: bytes, kind: type[_Message]) -> _Message:
    """Return the message of type ``kind`` in ``content``. Raises `ChannelError`."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ChannelError(f"a message cannot be read: {error}") from None


def new_nonce() -> bytes:
    """Return random bytes that are used once."""
    return secrets.token_bytes(_NONCE_BYTES)


class Proofs:
    """What one connection proves with ``key``: the nonces of server and gateway are part of each proof."""

    def __init__(self, key: bytes, server_nonce: bytes, gateway_nonce: bytes) -> None:
        self._key = key
        self._nonces = b"|".join((b"%d" % VERSION, server_nonce.hex().encode(), gateway_nonce.hex().encode()))
        self.gateway, self.server, self.session = (self._mac(use) for use in (b"gateway", b"server", b"session"))

    def _mac(self, use: bytes) -> bytes:
        return hmac.digest(self._key, b"antares-report|" + use + b"|" + self._nonces, hashlib.sha256)


def is_same(proof: bytes, expected: bytes) -> bool:
    """Whether both are equal, in constant time."""
    return hmac.compare_digest(proof, expected)


class Frames:
    """Seals and opens the reports of one connection, in order. A frame counts the frames ``dropped`` before it."""

    PREFIX_BYTES = _HEADER.size + _TAG_BYTES

    def __init__(self, session_key: bytes) -> None:
        self._key = session_key
        self._number = 0

    def seal(self, content: bytes, dropped: int) -> bytes:
        """Return the frame of a report; without content, of a heartbeat."""
        return _HEADER.pack(len(content), dropped) + self._tag(content, dropped) + content

    def length(self, prefix: bytes) -> int:
        """Return how many bytes follow the first `PREFIX_BYTES` of a frame. Raises `ChannelError`."""
        length, _ = _HEADER.unpack_from(prefix)
        if length > MAX_REPORT_BYTES:
            raise ChannelError(f"a report of {length} bytes is too large")
        return int(length)

    def open(self, prefix: bytes, content: bytes) -> int:
        """Check the frame's tag, and return the frames that were dropped so far. Raises `ChannelError`."""
        _, dropped = _HEADER.unpack_from(prefix)
        if not hmac.compare_digest(prefix[_HEADER.size :], self._tag(content, dropped)):
            raise ChannelError("a report was forged or damaged")
        return int(dropped)

    def _tag(self, content: bytes, dropped: int) -> bytes:
        self._number += 1
        return hmac.digest(self._key, _COUNTER.pack(self._number, dropped) + content, hashlib.sha256)[:_TAG_BYTES]


def checked_key(key: str, variable: str) -> bytes:
    """Return the key in the environment variable ``variable``. Raises ValueError if it is too short.

    White space around the key is dropped, at both ends of the channel.
    """
    checked = key.strip().encode()
    if len(checked) < LEAST_KEY_BYTES:
        raise ValueError(f"{variable} must have at least {LEAST_KEY_BYTES} bytes: try `openssl rand -hex 24`")
    return checked
