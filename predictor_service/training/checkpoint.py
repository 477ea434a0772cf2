"""What a training run has done so far, so that one that was interrupted goes on instead of starting anew.

One safetensors file beside the model in the making: tensors, and in its header the state and a fingerprint of recipe
and data. It is replaced whole, never amended, so an interruption at any moment leaves the previous one. Another recipe
or other data have another fingerprint, and begin afresh.
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
    """Names a recipe on these data; the same ones give the same name in every process."""
    digest = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=16)
    for array in data:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Checkpoint:
    """The checkpoint of the run named ``key`` in ``folder``."""

    def __init__(self, folder: Path, key: str) -> None:
        self._file, self._key = folder / CHECKPOINT_FILE, key

    def load(self) -> tuple[Tensors, State] | None:
        """What `save` wrote last for this run; None where there is nothing, or another run's, or a damaged file."""
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
        """Replace what was there."""
        from safetensors.numpy import save

        self._file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_bytes(save(tensors, metadata={"key": self._key, "state": json.dumps(state)}))
        unfinished.replace(self._file)


def forget(folder: Path) -> None:
    """Remove whatever checkpoint ``folder`` holds: the run is done."""
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
