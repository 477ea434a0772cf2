"""Recognises the events of a stream that differ in their text only, without parsing them.

A server writes the same bytes around the text of each event: id, model, index and so on. Once one event is parsed,
those that follow are known by comparing these bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

from engine_adapter.remote.sse import ParsedEvent

Json = dict[str, Any]

Place = tuple[int, str]
"""Where a text belongs: the index of its choice, and ``content`` (of a chat) or ``text``."""

_SPECIAL = re.compile(rb'["\\\x00-\x1f]')
"""What ends a text, begins an escape, or makes JSON invalid."""

_START = {key: re.compile(rb'"%b"\s*:\s*"' % key.encode()) for key in ("content", "text")}


_TOGETHER = 64
"""Events that are compared together: those of most reads. Bounds the work for an event that is something else."""


class TextEvents:
    """The bytes around the text of a stream's events.

    INVARIANT: an event with a text, if it is parsed, equals the learned event but for this text.

    Attributes:
        place: where the text of the learned event belongs.
    """

    def __init__(self) -> None:
        self.place: Place = (0, "")
        self._before = self._after = b""
        self._around = 0

    def text_of(self, event: bytes) -> bytes | None:
        """The text of ``event`` as it is in the JSON, if it needs no unescaping; None if it may be something else."""
        texts = self.texts_of((event,)) if self._around else None
        return texts[0] if texts else None

    def texts_of(self, events: Sequence[bytes], first: int = 0) -> list[bytes]:
        """The texts of ``events`` from number ``first`` on, as `text_of`, up to one that may be something else.

        At most `_TOGETHER`.
        """
        before, after = self._before, self._after
        if not self._around or not events[first].startswith(before):
            return []
        # Hot path: no bytecode for each event.
        together = b"".join(events[first : first + _TOGETHER])
        texts = together[len(before) :].split(after + before)
        texts[-1], end, _ = texts[-1].partition(after)
        if not end:
            texts.pop()
        if b"" in texts or _SPECIAL.search(b"".join(texts)):
            for number, text in enumerate(texts):
                if not text or _SPECIAL.search(text):
                    return texts[:number]
        # Without line ends in the texts, and with one only at the end of ``after``, each is that of one event.
        return texts

    def learn(self, event: ParsedEvent) -> None:
        """Take the bytes around the text of ``event``, if it has one and nothing else that is generated."""
        raw, chunk = event.raw, event.chunk
        if chunk is None or (self._around and raw.startswith(self._before) and raw.endswith(self._after)):
            return
        self._around = 0
        found = _holder(chunk)
        if found is None or not raw.startswith(b"data:") or raw.find(b"\n") != len(raw) - 2:
            return
        holder, place = found
        starts = list(_START[place[1]].finditer(raw))
        if len(starts) != 1:
            return
        start = starts[0].end()
        end = raw.find(b'"', start)
        before, after, text = raw[:start], raw[end:], holder[place[1]]
        holder[place[1]] = "x"
        try:
            same = orjson.loads(before[5:] + b"x" + after) == chunk
        except orjson.JSONDecodeError:
            same = False
        holder[place[1]] = text
        if same:
            self.place, self._before, self._after, self._around = place, before, after, len(before) + len(after)


def _holder(chunk: Json) -> tuple[Json, Place] | None:
    """The object with the text of a chunk, and its place, if merging the chunk's other fields twice changes nothing."""
    choices = chunk.get("choices")
    if chunk.get("usage") or not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        return None
    choice: Json = choices[0]
    index = choice.get("index", 0)
    if type(index) is not int or any(
        value is not None for key, value in choice.items() if key not in ("index", "delta", "text")
    ):
        return None
    if "delta" not in choice:
        return (choice, (index, "text")) if isinstance(choice.get("text"), str) else None
    delta = choice["delta"]
    if not isinstance(delta, dict) or "text" in choice or not isinstance(delta.get("content"), str):
        return None
    others = [value for key, value in delta.items() if key not in ("content", "role")]
    return None if any(value is not None for value in others) else (delta, (index, "content"))
