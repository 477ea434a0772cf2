"""The CPU length model as it is served: linear scores over hashed n-grams, trees on top, read as quantiles of the
answer's length.

    s_k(x) = intercept_k + sum over blocks B of  <v_B, w_Bk> / ||v_B||  +  z' u_k,      v_j = (1 + ln count_j) * idf_j
    estimate(x) = sum over trees of  leaf(s(x), lexical measures of x)

with blocks words and character n-grams (`predictor_service.model.features`), z the standardised lexical measures
clipped to
+-`LEXICAL_CLIP`. The estimate is the answer's median in tokens; `predictor_service.model.quantiles` makes quantiles
of it,
and `predictor_service.training.fit` says how all of it is fitted. Served with numpy alone.
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
"""The model that comes with the package; ``antares predictor train`` makes another."""

WEIGHTS_FILE, CARD_FILE = "length_model.safetensors", "model_card.json"

CLASSIFIER = "classifier"
"""What the card of the other family says under ``family`` (`predictor_service.model.classifier`)."""

LINEAR_FIELDS = ("idf", "weight", "lexical_mean", "lexical_scale", "lexical_weight", "intercept")
CALIBRATION_FIELDS = ("middle", "estimate", "tail")
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


class LengthPredictor(Protocol):
    """What the service asks of a model, whatever its family."""

    reads_text: ClassVar[bool]
    """Whether `predict` takes prompts (str) instead of their `Features`."""

    @property
    def card(self) -> Card:
        """What it is, what it was trained on, how good it was."""

    @property
    def name(self) -> str:
        """The predictor model's id, from its card."""

    def predict(self, rows: Sequence[Any]) -> list[Prediction]:
        """One `Prediction` a prompt, before any clamp."""


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
        """s_k of each row, shape (len(rows), scores), given their lexical measures (rows, LEXICAL_SIZE)."""
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
    """Scores, trees, calibration and card. Immutable, so one instance serves any number of threads."""

    linear: Linear
    trees: Trees
    calibration: Calibration
    card: Card
    reads_text: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The predictor model's id, from its card."""
        return str(self.card["model"])

    def estimate(self, rows: Sequence[Features]) -> Floats:
        """Uncalibrated medians in tokens, shape (len(rows),); see the module's equation."""
        lexical = np.array([row.lexical for row in rows], dtype=np.float64).reshape(len(rows), LEXICAL_SIZE)
        opening = np.zeros(len(rows), dtype=np.bool_)
        return self.trees.predict(tree_inputs(self.linear.scores(rows, lexical), lexical, opening))

    def predict(self, rows: Sequence[Features]) -> list[Prediction]:
        """One `Prediction` a row, before any clamp; at least one token each."""
        p50, p90 = self.calibration.quantiles(self.estimate(rows))
        return [Prediction(length=a, p50=a, p90=b) for a, b in zip(p50.tolist(), p90.tolist(), strict=True)]

    def save(self, folder: Path) -> None:
        """Write weights and card into ``folder``, made if need be. Plain data: nothing in it is executed on
        load."""
        from safetensors.numpy import save

        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, NDArray[Any]] = {name: getattr(self.linear, name) for name in LINEAR_FIELDS}
        tensors |= {name: tensors[name].astype(np.float16) for name in ("idf", "weight")}
        tensors |= {f"tree_{name}": getattr(self.trees, name) for name in TREE_FIELDS}
        tensors["tree_depth"] = np.array([self.trees.depth])
        tensors |= {f"calibration_{name}": getattr(self.calibration, name) for name in CALIBRATION_FIELDS}
        (folder / WEIGHTS_FILE).write_bytes(save(tensors))  # the umask decides who reads it, not safetensors
        write_card(folder, self.card)


def write_card(folder: Path, card: Card) -> None:
    """Write ``card`` beside the weights."""
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def tree_inputs(scores: Floats, lexical: Floats, later: NDArray[np.bool_]) -> NDArray[np.float32]:
    """What the trees ask about: scores, lexical measures, and whether a turn is not its conversation's first, side by
    side; shape (rows, scores + LEXICAL_SIZE + 1). Predictions are for opening turns."""
    return np.column_stack([scores, lexical, later]).astype(np.float32)


def standardised(lexical: Floats, mean: Floats, scale: Floats) -> Floats:
    """(lexical - mean) / scale, clipped; shapes (rows, LEXICAL_SIZE), (LEXICAL_SIZE,), (LEXICAL_SIZE,)."""
    return np.clip((lexical - mean) / scale, -LEXICAL_CLIP, LEXICAL_CLIP)


def load_model(folder: Path = SHIPPED_MODEL) -> LengthPredictor:
    """Read the model in ``folder``; its card says which family it is. Raises `ModelUnusable`."""
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
        raise _nothing_in(folder, CARD_FILE) from None
    except (OSError, ValueError) as broken:
        raise ModelUnusable(f"the length model in {folder} cannot be read: {broken}") from None
    if not isinstance(card, dict) or "model" not in card:
        raise ModelUnusable(f"the card of the length model in {folder} names no model. Train it anew")
    return card


def _nothing_in(folder: Path, file: str) -> ModelUnusable:
    return ModelUnusable(
        f"no length model in {folder}: {file} is missing. Train one with  antares predictor train --output DIR"
    )


def load_hashed(folder: Path, card: Card) -> LengthModel:
    """Read what `LengthModel.save` wrote. Raises `ModelUnusable`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if card.get("features_version") != FEATURES_VERSION:
        raise ModelUnusable(
            f"the length model in {folder} needs another version of Antares (features version "
            f"{FEATURES_VERSION} is served here). Train it anew with  antares predictor train"
        )
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise _nothing_in(folder, WEIGHTS_FILE) from None
    except (OSError, ValueError, SafetensorError) as broken:
        raise ModelUnusable(f"the length model in {folder} cannot be read: {broken}") from None
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
    except (KeyError, ValueError) as damaged:
        raise ModelUnusable(f"the length model in {folder} is damaged: {damaged}. Train it anew") from None
    return model


def _check(model: LengthModel, tensors: dict[str, NDArray[Any]]) -> None:
    """Raises ValueError where a tensor's shape or value is none that `LengthModel.save` writes."""
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
            raise ValueError(f"tensor {name!r} has another shape")
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {name!r} is not finite")
    model.trees.check(columns=scores + LEXICAL_SIZE + 1)


_LOG = np.log(np.maximum(np.arange(256), 1)).astype(np.float32)
"""ln of every possible count."""
