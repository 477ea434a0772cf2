"""The length model as it is served: a linear score over hashed n-grams, read as quantiles of the answer's
length.

    score(x) = intercept + sum over blocks B of  <v_B, w_B> / ||v_B||  +  z' u,      v_j = (1 + ln count_j) *
    idf_j

with blocks words and character n-grams (`predictor_service.features`), z the standardised lexical measures
clipped to +-`LEXICAL_CLIP`. The score estimates the answer's rank among all answers (0 shortest, 1 longest);
a calibration curve (`predictor_service.calibration`) turns it into tokens. Served with numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictor_service.calibration import Calibration
from predictor_service.features import (
    BUCKETS,
    FEATURES_VERSION,
    LEXICAL_SIZE,
    WORD_BUCKETS,
    Features,
)

SHIPPED_MODEL = Path(__file__).parent / "model"
"""The model that comes with the package; ``antares predictor train`` makes another."""

WEIGHTS_FILE, CARD_FILE = "length_model.safetensors", "model_card.json"
LEXICAL_CLIP = 4.0
MAX_TOKENS = 1 << 30
"""Token counts above this are not counts; also the widest clamp."""

Floats = NDArray[np.float64]
Card = dict[str, Any]


class ModelUnusable(Exception):  # noqa: N818 - it names what happened
    """No model in this folder, or one that this version cannot serve; the message says what to do."""


@dataclass(slots=True, frozen=True)
class Prediction:
    """How long an answer will be, in tokens.

    ``length`` is the point estimate: the calibrated median, which minimises the expected absolute error.
    ``p50`` and ``p90`` are quantiles; a model may one day put ``length`` elsewhere than ``p50``. ``p50 <=
    p90`` always.
    """

    length: float
    p50: float
    p90: float

    def clamped(self, min_tokens: int | None, max_tokens: int | None) -> Prediction:
        """All three within [``min_tokens``, ``max_tokens``], as the engine will hold the answer there."""
        low = float(min_tokens) if min_tokens is not None else 0.0
        high = float(max_tokens) if max_tokens is not None else float(MAX_TOKENS)
        return Prediction(*(min(max(x, low), high) for x in (self.length, self.p50, self.p90)))


@dataclass(slots=True, frozen=True)
class LengthModel:
    """Weights, calibration and card.

    ``idf`` and ``weight``: shape (BUCKETS,); ``lexical_mean``, ``lexical_scale`` and ``lexical_weight``:
    shape (LEXICAL_SIZE,). Immutable, so one instance serves any number of threads.
    """

    idf: NDArray[np.float32]
    weight: NDArray[np.float32]
    lexical_mean: Floats
    lexical_scale: Floats
    lexical_weight: Floats
    intercept: float
    calibration: Calibration
    card: Card

    @property
    def name(self) -> str:
        """The predictor model's id, from its card."""
        return str(self.card["model"])

    def score(self, rows: Sequence[Features]) -> Floats:
        """Rank scores, shape (len(rows),); see the module's equation."""
        scores = np.empty(len(rows))
        for at, row in enumerate(rows):
            values = (1.0 + _LOG[row.counts]) * self.idf[row.indices]
            products = values * self.weight[row.indices]
            cut = int(np.searchsorted(row.indices, WORD_BUCKETS))
            scores[at] = sum(
                float(products[block].sum()) / (float(np.sqrt(values[block] @ values[block])) or 1.0)
                for block in (slice(0, cut), slice(cut, None))
            )
        lexical = np.array([row.lexical for row in rows], dtype=np.float64).reshape(len(rows), LEXICAL_SIZE)
        scores += standardised(lexical, self.lexical_mean, self.lexical_scale) @ self.lexical_weight
        return scores + self.intercept

    def predict(self, rows: Sequence[Features]) -> list[Prediction]:
        """One `Prediction` a row, before any clamp; at least one token each."""
        return self.quantiles(self.score(rows))

    def quantiles(self, scores: Floats) -> list[Prediction]:
        """The calibration curve at ``scores`` (shape (rows,))."""
        curve = self.calibration
        middle = np.maximum(np.interp(scores, curve.score, curve.p50), 1.0)
        tail = np.maximum(np.interp(scores, curve.score, curve.p90), middle)
        return [
            Prediction(length=p50, p50=p50, p90=p90) for p50, p90 in zip(middle.tolist(), tail.tolist(), strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write weights and card into ``folder``, made if need be. Plain data: nothing in it is executed on
        load."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, NDArray[Any]] = {
            "idf": self.idf.astype(np.float16),
            "weight": self.weight.astype(np.float16),
            "lexical_mean": self.lexical_mean,
            "lexical_scale": self.lexical_scale,
            "lexical_weight": self.lexical_weight,
            "intercept": np.array([self.intercept]),
            "calibration_score": self.calibration.score,
            "calibration_p50": self.calibration.p50,
            "calibration_p90": self.calibration.p90,
        }
        (folder / WEIGHTS_FILE).write_bytes(save(tensors))  # the umask decides who reads it, not safetensors
        self.save_card(folder, self.card)

    @staticmethod
    def save_card(folder: Path, card: Card) -> None:
        """Write ``card`` beside the weights."""
        text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def standardised(lexical: Floats, mean: Floats, scale: Floats) -> Floats:
    """(lexical - mean) / scale, clipped; shapes (rows, LEXICAL_SIZE), (LEXICAL_SIZE,), (LEXICAL_SIZE,)."""
    return np.clip((lexical - mean) / scale, -LEXICAL_CLIP, LEXICAL_CLIP)


def load_model(folder: Path = SHIPPED_MODEL) -> LengthModel:
    """Read a model that `LengthModel.save` wrote. Raises `ModelUnusable`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as missing:
        raise ModelUnusable(
            f"no length model in {folder}: {missing.filename or WEIGHTS_FILE} is missing. "
            "Train one with  antares predictor train --output DIR"
        ) from None
    except (OSError, ValueError, SafetensorError) as broken:
        raise ModelUnusable(f"the length model in {folder} cannot be read: {broken}") from None
    if not isinstance(card, dict) or card.get("features_version") != FEATURES_VERSION or "model" not in card:
        raise ModelUnusable(
            f"the length model in {folder} needs another version of Antares (features version "
            f"{FEATURES_VERSION} is served here). Train it anew with  antares predictor train"
        )
    _check(folder, tensors)
    return LengthModel(
        idf=tensors["idf"].astype(np.float32),
        weight=tensors["weight"].astype(np.float32),
        lexical_mean=tensors["lexical_mean"].astype(np.float64),
        lexical_scale=tensors["lexical_scale"].astype(np.float64),
        lexical_weight=tensors["lexical_weight"].astype(np.float64),
        intercept=float(tensors["intercept"][0]),
        calibration=Calibration(
            *(tensors[f"calibration_{name}"].astype(np.float64) for name in ("score", "p50", "p90"))
        ),
        card=card,
    )


def _check(folder: Path, tensors: dict[str, NDArray[Any]]) -> None:
    knots = len(tensors.get("calibration_score", ()))
    shapes = {
        **dict.fromkeys(("idf", "weight"), (BUCKETS,)),
        **dict.fromkeys(("lexical_mean", "lexical_scale", "lexical_weight"), (LEXICAL_SIZE,)),
        **dict.fromkeys(("calibration_score", "calibration_p50", "calibration_p90"), (max(knots, 1),)),
        "intercept": (1,),
    }
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or not np.isfinite(tensor).all():
            raise ModelUnusable(f"the length model in {folder} is damaged: tensor {name!r}. Train it anew")


_LOG = np.log(np.maximum(np.arange(256), 1)).astype(np.float32)
"""ln of every possible count."""
