"""Prompts of the simulated engine: their tokens, and the hashes of their blocks for the prefix cache.

**The tokens of a text.** A word, as white space separates them, is one token. A word of more than 16 bytes (UTF-8) is
one token for each 4 bytes or part of them: long JSON, base64, and text without spaces.

**The tokens of a chat.** Everything counts that a client sends for the model, in this order: ``tools``, ``functions``
and ``response_format`` as compact JSON, then for each message its text, its other parts, and its other members (tool
calls, reasoning) as compact JSON. An image or another file counts `MEDIA_TOKENS`, whatever its size. The chat template
adds nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from engine_adapter.simulated.scheduler import BLOCK_TOKENS

MEDIA_TOKENS = 1000
"""Tokens of an image, a sound or a file. Convention: an image of about one megapixel."""

_LONG_WORD, _PIECE = 16, 4
"""Bytes of a word beyond which it is several tokens, and bytes of each of these."""

_MEDIA = frozenset(
    ("image", "image_url", "input_image", "audio_url", "input_audio", "video_url", "file", "input_file", "document")
)
"""Types of parts that count `MEDIA_TOKENS`."""

_BEFORE_MESSAGES = ("tools", "functions", "response_format")

Token = Hashable


@dataclass(slots=True, frozen=True)
class SimulatedPrompt:
    """One prompt. ``text`` determines the answer, ``tokens`` the size and the blocks."""

    text: str
    tokens: Sequence[Token]

    @property
    def size(self) -> int:
        """Tokens of the prompt, at least 1."""
        return max(1, len(self.tokens))


def text_tokens(text: str) -> list[Token]:
    """Return the tokens of ``text``."""
    tokens: list[Token] = []
    for word in text.split():
        if len(word) <= _PIECE:
            tokens.append(word)
            continue
        # NOTE: JSON may hold half a surrogate pair, which is not UTF-8.
        data = word.encode("utf-8", "surrogatepass")
        if len(data) <= _LONG_WORD:
            tokens.append(word)
        else:
            tokens += [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
    return tokens


def chat_prompt(body: dict[str, Any], messages: list[Any]) -> SimulatedPrompt:
    """Return the prompt of a chat. Members that are not understood count as JSON, or not at all."""
    tokens = [token for name in _BEFORE_MESSAGES for token in _json_tokens(body.get(name))]
    texts: list[str] = []
    for message in messages:
        if isinstance(message, dict):
            texts += _texts(message.get("content"))
            tokens += message_tokens(message.get("role"), _message_tokens(message))
    return SimulatedPrompt("\n".join(texts), tokens)


def message_tokens(role: object, tokens: Iterable[Token]) -> Iterator[Token]:
    """Yield ``tokens``, the first one marked with the role, as a chat template would mark the message."""
    for number, token in enumerate(tokens):
        yield token if number else (str(role), token)


def block_hashes(root: Hashable, tokens: Sequence[Token]) -> tuple[int, ...]:
    """Return the chained hashes of the full blocks of ``tokens``. ``root`` stands for what precedes them.

    NOTE: the hashes are valid in this process only, because Python salts its hash of strings.
    """
    chained, hashes = hash(root), []
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        chained = hash((chained, *tokens[end - BLOCK_TOKENS : end]))
        hashes.append(chained)
    return tuple(hashes)


def _texts(content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [str(part["text"]) for part in content if isinstance(part, dict) and "text" in part]
    return []


def _message_tokens(message: dict[str, Any]) -> list[Token]:
    tokens = _content_tokens(message.get("content"))
    for name, value in message.items():
        if name not in ("role", "content"):
            tokens += _json_tokens(value)
    return tokens


def _content_tokens(content: object) -> list[Token]:
    """Return the tokens of a message's content, or of that of a tool result in it."""
    if isinstance(content, str):
        return text_tokens(content)
    tokens: list[Token] = []
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            continue
        if "text" in part:
            tokens += text_tokens(str(part["text"]))
        elif part.get("type") in _MEDIA:
            tokens += [hash(_compact(part))] * MEDIA_TOKENS
        else:
            tokens += _json_tokens({name: value for name, value in part.items() if name != "content"})
            tokens += _content_tokens(part.get("content"))
    return tokens


def _json_tokens(value: object) -> list[Token]:
    if not value:
        return []
    return text_tokens(value if isinstance(value, str) else _compact(value).decode())


def _compact(value: object) -> bytes:
    return orjson.dumps(value)
