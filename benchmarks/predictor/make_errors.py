"""Writes ``lab/workload/data/shipped_predictor.npz``: what the shipped length model says of answers that its
training has not seen, beside what they were. Run by hand, with the extra `train`, after a new model is shipped.

    python -m benchmarks.predictor.make_errors

Token counts only: no text leaves the dataset.
"""

from __future__ import annotations

import sys

import numpy as np

from lab.simulate.predictions import SHIPPED


def main() -> None:
    """Predict the test part of the split that the model's card names."""
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
