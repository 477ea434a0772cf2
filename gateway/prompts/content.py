"""What a request's prompt consists of, piece by piece in the order in which a chat template renders it.

The pieces serve two purposes: `PromptContent.features` are what `gateway.prompts.size_model` counts tokens from, and
`PromptContent.rendered` is what `gateway.requests.prefix_index` recognises a repeated beginning by.
"""

from __future__ import annotations

import contextlib
import hashlib
from enum import IntEnum
from typing import Any

import numpy as np
import orjson

from gateway.prompts.media import LARGE_IMAGE_PATCHES, TOKENS_PER_AUDIO_S, Image
from gateway.requests.prefix_index import TOKEN_BYTES, token_bytes

Features = list[float]

BLOCK_BYTES = 256
"""Bytes of text in one block of the prefix index: about 64 tokens of English."""

TOKEN_BLOCK = 64
"""Tokens in one block of a prompt that is given as token ids."""

_BYTES_PER_TOKEN = 4
"""Weight of an image or of audio among the blocks of a prompt, in bytes of text for each of its tokens."""

_MAX_OPAQUE_BYTES = 4 << 20
"""Bounds the blocks of all images and audio of a prompt, to a million tokens. Without it, 100 bytes of a body that
claim a large image would take 65 KB."""

_CLASSES = (
    *("lower", "upper", "digit", "space", "line", "punctuation"),
    *("accented", "greek_cyrillic", "hebrew_arabic", "kana", "han", "hangul", "other"),
)
"""Kinds of character. Tokenizers differ most by script: one token covers a word, or one character, or less."""

_TEXT = len(_CLASSES)


def _class_table() -> bytes:
    """Return the kind of character for each first byte of a UTF-8 sequence; `_TEXT` for the other bytes."""
    table = bytearray([_TEXT]) * 256
    for byte in range(128):
        character = chr(byte)
        if character.isalpha():
            table[byte] = 0 if character.islower() else 1
        elif character.isdigit():
            table[byte] = 2
        else:
            table[byte] = 3 if character == " " else 4 if character in "\n\r\t" else 5
    # NOTE: first bytes do not divide scripts exactly. Kana come with punctuation, "other" has Thai, Hindi and emoji.
    for first, last, name in (
        (0xC2, 0xCC, "accented"),
        (0xCD, 0xD4, "greek_cyrillic"),
        (0xD5, 0xDF, "hebrew_arabic"),
        (0xE0, 0xE2, "other"),
        (0xE3, 0xE3, "kana"),
        (0xE4, 0xE9, "han"),
        (0xEA, 0xED, "hangul"),
        (0xEE, 0xF7, "other"),
    ):
        table[first : last + 1] = bytes([_CLASSES.index(name)]) * (last + 1 - first)
    return bytes(table)


_CLASS_OF = _class_table()
_SHORT_TEXT = 400
"""Bytes below which Python counts. Between other work numpy's calls take 20 us, because the CPU has not cached them."""

_ONLY = [bytes(ord("x" if kind == only else " ") for kind in range(256)) for only in range(_TEXT)]
"""For each kind of character, a translation after which only runs of that kind are words."""

_CONTINUATIONS = bytes(byte for byte in range(256) if _CLASS_OF[byte] == _TEXT)


class Part(IntEnum):
    """What a piece of text is. Templates and servers differ in whether and how they render the parts after `TEXT`."""

    TEXT = 0
    TOOLS = 1
    CALLS = 2
    SCHEMA = 3
    REASONING = 4


# Looking a member up in its class costs more than comparing it.
_PLAIN, _SCHEMA = Part.TEXT, Part.SCHEMA


class Feature(IntEnum):
    """Positions of a prompt's features after its character counts and runs; the unit of each is in `size_model`."""

    REQUEST = 2 * _TEXT
    MESSAGES = REQUEST + 1
    TOOLS = REQUEST + 2
    CALLS = REQUEST + 3
    IMAGES = REQUEST + 4
    IMAGE_PATCHES = REQUEST + 5
    LARGE_PATCHES = REQUEST + 6
    """The patches of each image beyond `LARGE_IMAGE_PATCHES`: servers scale large images down, to different sizes."""
    AUDIO_S = REQUEST + 7
    PART = REQUEST + 8
    """The first of one feature for each `Part` after `TEXT`: rough tokens of its text, which is counted above too."""


FEATURES = Feature.PART + len(Part) - 1


def text_features(data: bytes) -> Features:
    """Return the number of characters of each kind in ``data`` (UTF-8), then the number of runs of each kind.

    A run is a sequence of characters of one kind, so a run of letters is a word. Takes about 5 ns per byte.
    """
    kinds = data.translate(_CLASS_OF, _CONTINUATIONS)
    if len(kinds) < _SHORT_TEXT:
        counts = [*map(kinds.count, range(_TEXT))]
        # A text has few kinds, and a kind that occurs at most once has as many runs.
        runs_of = [n if n < 2 else len(kinds.translate(only).split()) for n, only in zip(counts, _ONLY, strict=True)]
        return [*counts, *runs_of]
    array = np.frombuffer(kinds, dtype=np.uint8)
    runs = np.bincount(array[1:][array[1:] != array[:-1]], minlength=_TEXT)
    runs[array[0]] += 1
    return [*np.bincount(array, minlength=_TEXT).tolist(), *runs.tolist()]


class PromptContent:
    """The pieces of one prompt. Add them in the order in which a template renders them.

    Attributes:
        token_ids: the whole prompt, where the client gave it as token ids; the size is then known.
        images, audio_s, messages, tools, calls: how many there are, and seconds of audio.
    """

    def __init__(self) -> None:
        self.token_ids: list[int] | None = None
        self.messages = 0
        self.tools = self.calls = 0
        self.images: list[Image] = []
        self.audio_s = 0.0
        self._text: list[bytes] = []
        self._other: dict[Part, list[bytes]] = {}
        self._rendered: list[bytes] = []
        self._opaque_left = _MAX_OPAQUE_BYTES

    # --- pieces -----------------------------------------------------------------------------------------------------

    def add_message(self, role: str) -> None:
        """Begin a message."""
        self.messages += 1
        self._rendered.append(role[:32].encode(errors="replace"))

    def add_text(self, text: str, part: Part = Part.TEXT) -> None:
        """Add a piece of text."""
        # NOTE: JSON may hold half a surrogate pair, which is not UTF-8.
        self._add(text.encode("utf-8", "surrogatepass"), part)

    def add_json(self, value: Any, part: Part) -> None:
        """Add a JSON value as text."""
        if isinstance(value, str):
            self.add_text(value, part)
        elif value is not None:
            # A value that nests too deeply counts as nothing: encoding the body for the engine fails, with a 400.
            with contextlib.suppress(orjson.JSONEncodeError):
                self._add(orjson.dumps(value), part)

    def add_tool(self, schema: Any) -> None:
        """Add one tool that the model may call."""
        self.tools += 1
        self.add_json(schema, Part.TOOLS)

    def add_call(self, name: Any, arguments: Any) -> None:
        """Add one call of a tool."""
        self.calls += 1
        self.add_json(name, Part.CALLS)
        self.add_json(arguments, Part.CALLS)

    def add_image(self, image: Image) -> None:
        """Add an image."""
        self.images.append(image)
        self._add_opaque(image.source, image.patches)

    def add_audio(self, source: str, seconds: float) -> None:
        """Add a piece of audio or video."""
        self.audio_s += seconds
        self._add_opaque(source, seconds * TOKENS_PER_AUDIO_S)

    def _add(self, data: bytes, part: Part) -> None:
        if part is _PLAIN:
            self._text.append(data)
        else:
            self._other.setdefault(part, []).append(data)
        # A template does not render the schema of a response.
        if part is not _SCHEMA:
            self._rendered.append(data)

    def _add_opaque(self, source: str, tokens: float) -> None:
        digest = hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=32).digest()
        size = min(round(tokens * _BYTES_PER_TOKEN), self._opaque_left)
        self._opaque_left -= size
        self._rendered.append(digest * max(1, size // len(digest)))

    @property
    def size_bytes(self) -> int:
        """The bytes of the prompt's text, to compare prompts by."""
        return sum(map(len, self._rendered))

    # --- results ----------------------------------------------------------------------------------------------------

    def features(self) -> Features:
        """Return the `FEATURES` features."""
        text = text_features(b"\n".join(self._text))
        parts = [0.0] * (len(Part) - 1)
        for part, pieces in self._other.items():
            counted = text_features(b"\n".join(pieces))
            text = [a + b for a, b in zip(text, counted, strict=True)]
            parts[part - 1] = 0.1 * sum(counted[:_TEXT]) + 0.5 * sum(counted[_TEXT:])
        images = self.images
        return [
            *text,
            1.0 if self.messages else 0.0,  # a text completion has no template
            self.messages,
            self.tools,
            self.calls,
            len(images),
            *(_patches(images) if images else (0, 0)),
            self.audio_s,
            *parts,
        ]

    def rendered(self) -> tuple[bytes, int]:
        """Return the whole prompt as bytes, and the size of a block. Only equal beginnings of them mean anything."""
        if self.token_ids is not None:
            return token_bytes(self.token_ids), TOKEN_BLOCK * TOKEN_BYTES
        return b"\x00".join(self._rendered), BLOCK_BYTES


def _patches(images: list[Image]) -> tuple[float, float]:
    """Return the patches of all images, and those beyond `LARGE_IMAGE_PATCHES` of each."""
    large = sum(max(0.0, image.patches - LARGE_IMAGE_PATCHES) for image in images)
    return sum(image.patches for image in images), large
