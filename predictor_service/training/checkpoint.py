"""Checkpoints, so that an interrupted training run resumes.

A checkpoint is one safetensors file in the output folder. It holds tensors and, in its header, the state and a
fingerprint of recipe and data. The file is replaced as a whole, so that an interruption leaves the previous checkpoint
intact. Another recipe or other data have another fingerprint and start from the beginning.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECKPOINT_FILE = "checkpoint.safetensors"

Tensors = dict[str, NDArray[Any]]
State = dict[str, Any]


def fingerprint(recipe: dict[str, Any], *data: NDArray[Any]) -> str:
    """Return an id of a recipe and its data, the same in every process."""
    digest = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=16)
    for array in data:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Checkpoint:
    """The checkpoint in ``folder`` of the run with the fingerprint ``key``."""

    def __init__(self, folder: Path, key: str) -> None:
        self._file, self._key = folder / CHECKPOINT_FILE, key

    def load(self) -> tuple[Tensors, State] | None:
        """Return what `save` wrote last; None if there is no file, a damaged one, or one of another run."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._file, framework="numpy") as stored:
                header = stored.metadata() or {}
                if header.get("key") != self._key:
                    return None
                names = stored.keys()
                return {name: stored.get_tensor(name) for name in names}, json.loads(header["state"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return None

    def save(self, tensors: Tensors, state: State) -> None:
        """Replace the checkpoint."""
        from safetensors.numpy import save

        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".unfinished")
        temporary.write_bytes(save(tensors, metadata={"key": self._key, "state": json.dumps(state)}))
        temporary.replace(self._file)


def remove_checkpoint(folder: Path) -> None:
    """Delete the checkpoint in ``folder``, if there is one."""
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
