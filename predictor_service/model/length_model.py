"""The CPU length model: linear scores over hashed n-grams, boosted trees on top, then quantiles. Served by numpy.

    s_k(x) = intercept_k + sum over blocks B of  <v_B, w_Bk> / ||v_B||  +  z' u_k,      v_j = (1 + ln count_j) * idf_j
    estimate(x) = sum over trees of  leaf(s(x), lexical measures of x)

There are two blocks: words and character n-grams (`predictor_service.model.features`). z holds the standardised lexical
measures, clipped to +-`LEXICAL_CLIP`. The estimate is the median of the output length in tokens;
`predictor_service.model.quantiles` turns it into p50 and p90. `predictor_service.training.fit` fits the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from predictor_service.model.features import BUCKETS, FEATURES_VERSION, WORD_BUCKETS, Features
from predictor_service.model.lexical import LEXICAL_SIZE
from predictor_service.model.quantiles import Calibration
from predictor_service.model.trees import FIELDS as TREE_FIELDS
from predictor_service.model.trees import Trees

SHIPPED_MODEL = Path(__file__).parent / "shipped"
"""Folder of the model that comes with the package."""

WEIGHTS_FILE, CARD_FILE = "length_model.safetensors", "model_card.json"

CLASSIFIER = "classifier"
"""Value of ``family`` in the card of a `predictor_service.model.classifier.LengthClassifier`."""

LINEAR_FIELDS = ("idf", "weight", "lexical_mean", "lexical_scale", "lexical_weight", "intercept")
CALIBRATION_FIELDS = ("middle", "estimate", "tail")
LEXICAL_CLIP = 4.0
"""Largest magnitude of a standardised lexical measure, in standard deviations: limits the effect of unusual prompts."""

MAX_TOKENS = 1 << 30
"""Largest token count that is accepted or predicted. A sanity bound, far above any context length."""

Floats = NDArray[np.float64]
Card = dict[str, Any]


class ModelUnusable(Exception):  # noqa: N818
    """The folder holds no model that this version can serve. The message says what to do."""


@dataclass(slots=True, frozen=True)
class Prediction:
    """A predicted output length, in tokens.

    ``length``: the point estimate. Today it equals ``p50``, the calibrated median, which minimises the expected
    absolute error. ``p50`` and ``p90``: quantiles.

    INVARIANT: ``p50`` <= ``p90``.
    """

    length: float
    p50: float
    p90: float

    def clamped(self, min_tokens: int | None, max_tokens: int | None) -> Prediction:
        """Return this prediction with all three values limited to [``min_tokens``, ``max_tokens``]."""
        low = float(min_tokens) if min_tokens is not None else 0.0
        high = float(max_tokens) if max_tokens is not None else float(MAX_TOKENS)
        return Prediction(*(min(max(x, low), high) for x in (self.length, self.p50, self.p90)))


class LengthPredictor(Protocol):
    """Interface of a length model, independent of its family."""

    reads_text: ClassVar[bool]
    """Whether `predict` takes prompts (str) rather than `Features`."""

    @property
    def card(self) -> Card:
        """The model card: what the model is, its training data and its metrics."""

    @property
    def name(self) -> str:
        """The length model's id, from its card."""

    def predict(self, rows: Sequence[Any]) -> list[Prediction]:
        """Return one `Prediction` for each prompt, before any clamp."""


@dataclass(slots=True, frozen=True)
class Linear:
    """The linear scores.

    ``idf``: shape (BUCKETS,); ``weight``: shape (BUCKETS, scores); ``lexical_mean`` and ``lexical_scale``: shape
    (LEXICAL_SIZE,); ``lexical_weight``: shape (LEXICAL_SIZE, scores); ``intercept``: shape (scores,).
    """

    idf: NDArray[np.float32]
    weight: NDArray[np.float32]
    lexical_mean: Floats
    lexical_scale: Floats
    lexical_weight: Floats
    intercept: Floats

    def scores(self, rows: Sequence[Features], lexical: Floats) -> Floats:
        """Return s_k of each row, shape (rows, scores), given their measures, shape (rows, LEXICAL_SIZE)."""
        scores = np.empty((len(rows), len(self.intercept)))
        for at, row in enumerate(rows):
            values = (1.0 + _LOG[row.counts]) * self.idf[row.indices]
            cut = int(np.searchsorted(row.indices, WORD_BUCKETS))
            for block in (slice(0, cut), slice(cut, None)):
                values[block] /= float(np.sqrt(values[block] @ values[block])) or 1.0
            scores[at] = values @ self.weight[row.indices]
        scores += standardised(lexical, self.lexical_mean, self.lexical_scale) @ self.lexical_weight
        return scores + self.intercept


@dataclass(slots=True, frozen=True)
class LengthModel:
    """Scores, trees, calibration and card. Immutable, so that threads may share an instance."""

    linear: Linear
    trees: Trees
    calibration: Calibration
    card: Card
    reads_text: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The length model's id, from its card."""
        return str(self.card["model"])

    def estimate(self, rows: Sequence[Features]) -> Floats:
        """Return uncalibrated medians in tokens, shape (rows,); see the equation of the module."""
        lexical = np.array([row.lexical for row in rows], dtype=np.float64).reshape(len(rows), LEXICAL_SIZE)
        opening = np.zeros(len(rows), dtype=np.bool_)
        return self.trees.predict(tree_inputs(self.linear.scores(rows, lexical), lexical, opening))

    def predict(self, rows: Sequence[Features]) -> list[Prediction]:
        """Return one `Prediction` of at least one token for each row, before any clamp."""
        p50, p90 = self.calibration.quantiles(self.estimate(rows))
        return [Prediction(length=a, p50=a, p90=b) for a, b in zip(p50.tolist(), p90.tolist(), strict=True)]

    def save(self, folder: Path) -> None:
        """Write weights and card into ``folder``, which is created if needed. No content is executable."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, NDArray[Any]] = {name: getattr(self.linear, name) for name in LINEAR_FIELDS}
        tensors |= {name: tensors[name].astype(np.float16) for name in ("idf", "weight")}
        tensors |= {f"tree_{name}": getattr(self.trees, name) for name in TREE_FIELDS}
        tensors["tree_depth"] = np.array([self.trees.depth])
        tensors |= {f"calibration_{name}": getattr(self.calibration, name) for name in CALIBRATION_FIELDS}
        # Python writes the file, not safetensors, so that the umask sets its permissions.
        (folder / WEIGHTS_FILE).write_bytes(save(tensors))
        write_card(folder, self.card)


def write_card(folder: Path, card: Card) -> None:
    """Write ``card`` into ``folder``, as JSON."""
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def tree_inputs(scores: Floats, lexical: Floats, later: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the input columns of the trees, shape (rows, scores + LEXICAL_SIZE + 1).

    They are the scores, the lexical measures and ``later``, which is True for turns that do not open a conversation.
    The service always predicts for opening turns.
    """
    return np.column_stack([scores, lexical, later]).astype(np.float32)


def standardised(lexical: Floats, mean: Floats, scale: Floats) -> Floats:
    """Return (lexical - mean) / scale, clipped; shape (rows, LEXICAL_SIZE), ``mean`` and ``scale`` (LEXICAL_SIZE,)."""
    return np.clip((lexical - mean) / scale, -LEXICAL_CLIP, LEXICAL_CLIP)


def load_model(folder: Path = SHIPPED_MODEL) -> LengthPredictor:
    """Return the model in ``folder``, of the family that its card names.

    Raises:
        ModelUnusable: there is no model, it is damaged, or this installation cannot serve it.
    """
    card = _read_card(folder)
    if card.get("family") != CLASSIFIER:
        return load_hashed(folder, card)
    try:
        from predictor_service.model.classifier import load_classifier
    except ImportError as missing:
        raise ModelUnusable(
            f"the model in {folder} is a classifier and needs torch and transformers: {missing.name} is not installed"
        ) from None
    return load_classifier(folder, card)


def _read_card(folder: Path) -> Card:
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing_file(folder, CARD_FILE) from None
    except (OSError, ValueError) as error:
        raise ModelUnusable(f"the length model in {folder} cannot be read: {error}") from None
    if not isinstance(card, dict) or "model" not in card:
        raise ModelUnusable(f"the card of the length model in {folder} names no model. Train the model again")
    return card


def _missing_file(folder: Path, file: str) -> ModelUnusable:
    return ModelUnusable(
        f"no length model in {folder}: {file} is missing. Train one with  antares predictor train --output DIR"
    )


def load_hashed(folder: Path, card: Card) -> LengthModel:
    """Read what `LengthModel.save` wrote.

    Raises:
        ModelUnusable: a file is missing or damaged, or the model needs another version of the features.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if card.get("features_version") != FEATURES_VERSION:
        raise ModelUnusable(
            f"the length model in {folder} needs another version of Antares (this one serves features version "
            f"{FEATURES_VERSION}). Train it again with  antares predictor train"
        )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise _missing_file(folder, WEIGHTS_FILE) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelUnusable(f"the length model in {folder} cannot be read: {error}") from None
    try:
        model = LengthModel(
            linear=Linear(
                idf=tensors["idf"].astype(np.float32),
                weight=tensors["weight"].astype(np.float32),
                **{name: tensors[name].astype(np.float64) for name in LINEAR_FIELDS[2:]},
            ),
            trees=Trees(**{name: tensors[f"tree_{name}"] for name in TREE_FIELDS}, depth=int(tensors["tree_depth"][0])),
            calibration=Calibration(
                **{name: tensors[f"calibration_{name}"].astype(np.float64) for name in CALIBRATION_FIELDS}
            ),
            card=card,
        )
        _check(model, tensors)
    except (KeyError, ValueError) as error:
        raise ModelUnusable(f"the length model in {folder} is damaged: {error}. Train the model again") from None
    return model


def _check(model: LengthModel, tensors: dict[str, NDArray[Any]]) -> None:
    """Raise ValueError if a tensor has another shape than `LengthModel.save` writes, or is not finite."""
    scores, knots = len(model.linear.intercept), len(model.calibration.estimate)
    shapes = {
        "idf": (BUCKETS,),
        "weight": (BUCKETS, scores),
        "lexical_mean": (LEXICAL_SIZE,),
        "lexical_scale": (LEXICAL_SIZE,),
        "lexical_weight": (LEXICAL_SIZE, scores),
        "calibration_middle": (1,),
        **{f"calibration_{name}": (max(knots, 1),) for name in ("estimate", "tail")},
    }
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"tensor {name!r} has the wrong shape")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} is not finite")
    model.trees.check(columns=scores + LEXICAL_SIZE + 1)


_LOG = np.log(np.maximum(np.arange(256), 1)).astype(np.float32)
"""ln(count) for every count that `Features` can hold."""
