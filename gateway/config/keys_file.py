"""The keys file, which `antares key` writes: a JSON object with one entry per API key. It holds digests, never keys."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from gateway.config.mistakes import ConfigError, Mistake

MAX_BYTES = 16 << 20
"""Largest keys file in bytes: 10,000 keys with long lists of models take less."""

_MODE = 0o600


def keys_path(named: str, config: Path | None) -> Path:
    """Return where the keys file is that the file ``config`` names: relative to that file's folder."""
    return (config.parent if config is not None else Path()) / named


def read_keys(path: Path) -> list[Any]:
    """Return the entries of the keys file at ``path``, which are not validated. Raises `ConfigError`."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise _mistake(path, "does not exist; `antares key new` makes it with its first key") from error
    except OSError as error:
        raise _mistake(path, f"cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise _mistake(path, f"is larger than {MAX_BYTES >> 20} MiB")
    try:
        document = json.loads(content, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise _mistake(path, f"not JSON: {error.msg}", error.lineno) from error
    except (ValueError, RecursionError) as error:
        # Not UTF-8, a duplicate key, or nested too deeply.
        raise _mistake(path, f"not JSON: {error}") from error
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(document) > 1:
        raise _mistake(path, 'must be an object with one member, "keys", a list')
    return entries


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing the keys file at ``path``. Waits for one that does. Not on Windows."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    # NOTE: the folder is locked, because a new file replaces the keys file.
    folder = os.open(path.resolve().parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write_keys(path: Path, entries: Sequence[Any]) -> None:
    """Replace the keys file at ``path`` in one step. Only its owner can read it, who stays the same. Raises OSError."""
    # A link must stay one, so the file that it leads to is replaced.
    path = path.resolve()
    content = orjson.dumps({"keys": list(entries)}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    new = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(_MODE)
        _keep_owner(new, path)
        new.replace(path)
    except BaseException:
        new.unlink()
        raise


def _keep_owner(new: Path, path: Path) -> None:
    """Give the file ``new`` the owner of the one at ``path``, or of its folder: root may write a service's keys."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    owner = (path if path.exists() else path.parent).stat()
    os.chown(new, owner.st_uid, owner.st_gid)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)[:64]!r}")
    return found


def _mistake(path: Path, reason: str, line: int = 1) -> ConfigError:
    return ConfigError(path, [Mistake(line, "", reason)])
