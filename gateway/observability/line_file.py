"""A file to which a thread appends lines, and which other programs may rotate. Several processes may append to it."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from gateway.observability.recorder import ObservabilityError


class LineFile:
    """Appends to ``path``. ``key``: the setting that named the file, for errors.

    A file that was renamed or deleted is opened again before the next write, so log rotation needs no signal.
    Raises `ObservabilityError` if the file cannot be opened.

    Attributes:
        opened: how many files it has opened so far.
    """

    def __init__(self, path: str, key: str) -> None:
        self._path, self.opened = path, 1
        try:
            self._descriptor: int | None = _open(path)
        except OSError as error:
            raise ObservabilityError(f"{key}: cannot open {path}: {error.strerror}") from error

    def append(self, lines: bytes) -> None:
        """Write all of ``lines``. May block. If this raises OSError, as on a full disk, nothing is left of them."""
        descriptor = self._current()
        before, written = os.fstat(descriptor), 0
        try:
            while written < len(lines):
                written += os.write(descriptor, lines[written:])
        except OSError:
            # NOTE: half a line would make the next one unreadable too. Another writer's lines must stay.
            if written and stat.S_ISREG(before.st_mode) and os.fstat(descriptor).st_size == before.st_size + written:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before.st_size)
            raise

    def rotate(self, path: str, most: int) -> None:
        """Rename a file of more than ``most`` bytes to ``path``, which is replaced, and begin another.

        INVARIANT: of several processes that find it full, one renames it; a second one would rename the new file.
        """
        descriptor = self._current()
        if os.fstat(descriptor).st_size > max(0, most):
            # Closing the file unlocks it.
            _lock(descriptor)
            if self._is_named(descriptor):
                os.replace(self._path, path)  # noqa: PTH105 - next to fstat
            self._current()

    def close(self) -> None:
        """Close the file. Idempotent; the next line would open it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _current(self) -> int:
        """Return the descriptor of the file that is called ``path`` now."""
        if self._descriptor is not None:
            if self._is_named(self._descriptor):
                return self._descriptor
            self.close()
        self._descriptor = _open(self._path)
        self.opened += 1
        return self._descriptor

    def _is_named(self, descriptor: int) -> bool:
        """Return whether ``path`` still names the file of ``descriptor``."""
        opened = os.fstat(descriptor)
        try:
            named = os.stat(self._path)  # noqa: PTH116 - next to fstat
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def _lock(descriptor: int) -> None:
    """Wait until no other process has the file locked, and lock it."""
    if sys.platform != "win32":
        import fcntl

        # Some network file systems have no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
