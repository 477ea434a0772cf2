"""Advice on a misspelled name, for error messages of profiles, policies and configuration files."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], all_of: str, quote: str = "'") -> str:
    """Return ``did you mean 'X'?`` for the ``known`` name most similar to ``name``, or else ``all_of`` and all of them.

    ``all_of`` introduces the list, such as ``its options:``. ``quote`` stands before and after the suggested name.
    """
    names = list(known)
    similar = get_close_matches(name, names, n=1)
    return f"did you mean {quote}{similar[0]}{quote}?" if similar else f"{all_of} {', '.join(names) or 'none'}"
