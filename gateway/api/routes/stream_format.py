"""How an API's event stream marks its start, its end and an error. Events are recognised by prefix, never parsed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_EVENT_END = b"\n\n"

# NOTE: text of the client in the message cannot match, because JSON escapes its quotes.
_CLIENT_ERROR = re.compile(
    rb'"code": ?"?4(?!01|03|04|29)\d\d\b|"(?:type|code)": ?"(?:BadRequestError|invalid_request_error|invalid_prompt)"'
)


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """The markers of one API's stream.

    Args:
        ends: prefixes of the event after which the response is complete. It holds no token.
        errors: prefixes of an event that reports a failure.
        openings: prefixes of events that hold no token and precede the first one.
        openings_contain: text in each event that opens the stream, for an API whose events have no names. Empty if it
            does not apply.

    NOTE: generated text may contain a marker, but never after a bare newline, because JSON escapes newlines.
    """

    ends: tuple[bytes, ...]
    errors: tuple[bytes, ...]
    openings: tuple[bytes, ...] = ()
    openings_contain: tuple[bytes, ...] = ()
    _marked: tuple[bytes, ...] = field(init=False)
    _later_ends: tuple[bytes, ...] = field(init=False)
    _later_errors: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_marked", (*self.ends, *self.errors))
        object.__setattr__(self, "_later_ends", _after_newline(self.ends))
        object.__setattr__(self, "_later_errors", _after_newline(self.errors))

    def is_usual(self, body: bytes) -> bool:
        """Whether ``body`` is one event that neither reports a failure nor ends the stream. False: it may be another.

        So most events take one test.
        """
        return body.find(_EVENT_END) == len(body) - len(_EVENT_END) and not body.startswith(self._marked)

    def has_error(self, body: bytes, several: bool) -> bool:
        """Whether an event in ``body`` reports a failure. ``several``: it may hold more than one event."""
        if body.startswith(self.errors):
            return True
        return several and any(marker in body for marker in self._later_errors)

    def refuses(self, body: bytes) -> bool:
        """Whether the failure that ``body`` reports is the client's: such a type, or a status that no engine causes."""
        return _CLIENT_ERROR.search(body) is not None

    def end_in(self, body: bytes, several: bool) -> int:
        """Return where in ``body`` the event starts that ends the stream; -1 if there is none."""
        if body.startswith(self.ends):
            return 0
        if not several:
            return -1
        return max(body.rfind(marker) + 1 for marker in self._later_ends) or -1

    def opens(self, body: bytes) -> bool:
        """Whether ``body`` is one event that precedes the first token. A comment is one too."""
        if body.startswith(self.openings) or body.startswith(b":"):
            return not may_hold_several_events(body)
        contained = self.openings_contain
        return bool(contained) and body.count(b"data: ") == 1 and all(text in body for text in contained)


def may_hold_several_events(body: bytes) -> bool:
    """Whether ``body`` is not exactly one event with plain newlines, as an engine's app sends most of them."""
    return body.find(_EVENT_END) != len(body) - len(_EVENT_END)


def _after_newline(markers: Iterable[bytes]) -> tuple[bytes, ...]:
    return tuple(b"\n" + marker for marker in markers)


def _named(*events: str) -> tuple[bytes, ...]:
    """The first line of each event. The space after the colon is optional."""
    return tuple(f"event:{space}{event}".encode() for event in events for space in (" ", ""))


COMPLETIONS = StreamFormat(
    ends=(b"data: [DONE]", b"data:[DONE]"),
    errors=(b'data: {"error"', b'data:{"error"'),
    openings_contain=(b'"role":', b'"content":""'),
)
"""Chat and text completions. The role chunk opens a chat stream and is not a token."""

RESPONSES = StreamFormat(
    ends=_named("response.completed", "response.incomplete", "response.failed"),
    errors=_named("error", "response.failed"),
    openings=_named("response.created", "response.queued", "response.in_progress"),
)

MESSAGES = StreamFormat(ends=_named("message_stop"), errors=_named("error"), openings=_named("message_start", "ping"))
