"""A file to which a thread appends lines, and which other programs may rotate."""

from __future__ import annotations

import contextlib
import os
import stat

from gateway.observability.recorder import ObservabilityError


class LineFile:
    """Appends to ``path``. ``key``: the setting that named the file, for errors.

    A file that was renamed or deleted is opened again before the next write, so log rotation needs no signal.
    Raises `ObservabilityError` if the file cannot be opened.
    """

    def __init__(self, path: str, key: str) -> None:
        self._path = path
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

    @property
    def size(self) -> int:
        """Bytes of the file that the next line goes to."""
        return os.fstat(self._current()).st_size

    def rename(self, path: str) -> None:
        """Rename the file to ``path``, which is replaced. The next line begins a new file."""
        os.replace(self._path, path)  # noqa: PTH105 - next to fstat

    def close(self) -> None:
        """Close the file. Idempotent; the next line would open it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _current(self) -> int:
        """Return the descriptor of the file that is called ``path`` now."""
        if self._descriptor is not None:
            opened = os.fstat(self._descriptor)
            try:
                named = os.stat(self._path)  # noqa: PTH116 - next to fstat
            except FileNotFoundError:
                named = None
            if named is not None and (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino):
                return self._descriptor
            self.close()
        self._descriptor = _open(self._path)
        return self._descriptor


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
