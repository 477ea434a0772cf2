"""Writes ``held_out.npz``: hashed features and output lengths of some test rows of the shipped model.

    python tests/predictor_service/make_held_out.py

Run it after a new model is shipped; needs the extra 'train'. The file holds no text, only bucket numbers (as
differences, which compress better), counts, lexical measures and token counts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from predictor_service.model.length_model import load_model
from predictor_service.training.datasets import read_dataset

ROWS = 300
TARGET = Path(__file__).with_name("held_out.npz")


def main() -> None:
    data = read_dataset(load_model().card["seed"], lambda stage, share: None)
    rows = np.sort(np.random.default_rng(0).choice(data.split.test, ROWS, replace=False))
    examples = data.examples(rows)
    np.savez_compressed(
        TARGET,
        steps=np.concatenate([np.diff(f.indices, prepend=np.uint16(0)) for f in examples.features]),
        counts=np.concatenate([f.counts for f in examples.features]),
        stored=np.array([len(f.indices) for f in examples.features], dtype=np.int32),
        lexical=np.stack([f.lexical for f in examples.features]),
        length=examples.length.astype(np.int32),
        censored=examples.censored,
        train_median=np.median(data.lengths(data.split.train)),
        train_longest=data.lengths(data.split.train).max(),
    )


if __name__ == "__main__":
    main()
