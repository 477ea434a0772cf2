"""Writes ``lab/workload/data/shipped_predictor.npz``: predictions of the shipped model for its test part, and lengths.

    python -m benchmarks.predictor.make_errors

Run it after a new model is shipped. Needs the extra 'train'. The file holds token counts only, no text.
"""

from __future__ import annotations

import sys

import numpy as np

from lab.simulate.predictions import SHIPPED


def main() -> None:
    """Predict the test part of the split in the model card, and write the file."""
    from predictor_service.model.length_model import load_model
    from predictor_service.training.datasets import read_dataset

    model = load_model()
    data = read_dataset(int(model.card["seed"]), lambda stage, share: None)
    test = data.examples(data.split.test)
    predicted = model.predict(test.features)
    np.savez_compressed(
        SHIPPED,
        length=test.length.astype(np.uint16),
        p50=np.array([round(p.p50) for p in predicted], dtype=np.uint16),
        p90=np.array([round(p.p90) for p in predicted], dtype=np.uint16),
        model=np.array(model.name),
    )
    sys.stdout.write(f"{SHIPPED.name}: {len(predicted)} held-out answers of {model.name}\n")


if __name__ == "__main__":
    main()
