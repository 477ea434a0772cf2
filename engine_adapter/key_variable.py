"""API keys in environment variables."""

from __future__ import annotations

import os


def key_in(variable: str) -> str:
    """Return the key in the environment ``variable``; "" if it is not set. Raises ValueError if the value is no key.

    White space around the key is dropped: files and Secrets often end in a line break. No message contains a key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the key in {variable} has a line break or another character that no key has")
    return key
