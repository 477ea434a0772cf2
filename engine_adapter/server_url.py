"""The URL of a server, as a configuration states it."""

from __future__ import annotations

from urllib.parse import urlsplit


def server_url(text: str) -> str:
    """Return ``text`` as the URL of a server, without a trailing slash or ``/v1``. Raises ValueError if it is none.

    NOTE: messages quote nothing of the URL, which may hold a password.
    """
    try:
        url = urlsplit(text)
        host, _ = url.hostname, url.port  # Reading the port checks it.
    except ValueError:
        host = None
    if not host or "\\" in host or url.scheme not in ("http", "https"):
        raise ValueError("must be an http or https URL such as http://host:8000")
    if url.username is not None or url.password is not None:
        # Log lines and errors name the URL and would leak the credentials.
        raise ValueError(
            "must not contain a user or a password; the key of an engine's server belongs into api_key_env"
        )
    return text.rstrip("/").removesuffix("/v1")
