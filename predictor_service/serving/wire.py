"""Request and response bodies of ``POST /v1/predict`` and ``POST /v1/observe``: parsing, validation, rendering.

    predict    {"model": str | null, "slo_class": str | null,
                "inputs": [{"prompt": str  or  "features": see `predictor_service.model.features`,
                            "prompt_tokens": int | null, "max_tokens": int | null, "min_tokens": int | null,
                            "model": str | null, "slo_class": str | null, "id": str | null}, ...]}

               {"model": <id of the length model>,
                "predictions": [{"length": tokens, "p50": tokens, "p90": tokens,
                                 "raw_p50": tokens, "raw_p90": tokens}, ...]}

    observe    {"observations": [{"model": str | null, "slo_class": str | null, "raw_p50": tokens, "raw_p90": tokens,
                                  "tokens": int, "censored": bool | null, "id": str | null}, ...]}

               {"observed": <count>}, with status 202

``model`` is the served model whose answers are predicted, and ``slo_class`` the class of the request. A value of an
input takes precedence over that of the body. The raw quantiles come from the length model, before the correction for
model and class and before the clamp to min and max tokens. A caller that reports a finished request sends them back.
``censored`` says that ``max_tokens`` truncated the answer. ``id`` joins prediction and observation for the collection
of training data.

Request header ``x-deadline-ms``: milliseconds after the arrival of the call at which its result is no longer needed.

Errors have the shape of the OpenAI API:

    400 malformed                      404 a model that this service does not predict for
    413 body or prompt too large       503 queue full, with ``retry-after``
    504 deadline passed                500 unexpected exception

INVARIANT: a message names the wrong field and never quotes its value, because values may be prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from predictor_service.calibration.online import FinishedAnswer
from predictor_service.model.features import Features, MalformedFeatures, features_from_wire, prompt_features
from predictor_service.model.length_model import MAX_TOKENS, Prediction

MAX_INPUTS = 256
"""Largest number of inputs in one call."""

MAX_OBSERVATIONS = 1024
"""Largest number of observations in one call."""

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Largest size of a body, in bytes."""

MAX_PROMPT_CHARS = 128 * 1024
"""Longest prompt, in characters. The model reads only the two ends of a long prompt, so that callers may cut it."""

MAX_NAME_CHARS = 256
"""Longest name of a model or a class, in characters."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class BadRequest(Exception):  # noqa: N818
    """An invalid request. It becomes an error response with this status, code, message and field (``param``)."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_request"):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(slots=True, frozen=True)
class Input:
    """One prompt to predict for.

    Either ``prompt`` or ``features`` is set. ``min_tokens`` and ``max_tokens`` bound the answer. ``model`` and
    ``slo_class`` are "" if the caller names none. ``id`` is set if the finished request will be reported under it.
    """

    prompt: str | None
    features: Features | None
    min_tokens: int | None
    max_tokens: int | None
    model: str = ""
    slo_class: str = ""
    id: str | None = None

    def to_features(self) -> Features:
        """Return the features. For a prompt, computing them takes a fraction of a millisecond."""
        return self.features if self.features is not None else prompt_features(self.prompt or "")


@dataclass(slots=True, frozen=True)
class Predicted:
    """A prediction of the length model (``raw``), and after correction and clamp (``corrected``)."""

    raw: Prediction
    corrected: Prediction


@dataclass(slots=True, frozen=True)
class Observation:
    """A finished request and the ``id`` of its prediction."""

    answer: FinishedAnswer
    id: str | None


def parse_request(
    body: bytes, known_models: frozenset[str] = frozenset(), *, takes_features: bool = True
) -> list[Input]:
    """Parse the body of a predict call. Unknown fields are ignored; ``prompt_tokens`` is checked and ignored.

    Args:
        body: JSON.
        known_models: the only served models that a call may name; empty allows every name.
        takes_features: False if the length model reads text, so that every input must have a prompt.

    Raises:
        BadRequest: a field is wrong.
    """
    document = _document(body)
    names = _names(document, "", known_models, ("", ""))
    entries = _entries(document, "inputs", MAX_INPUTS)
    inputs = [_input(entry, f"inputs[{index}]", known_models, names) for index, entry in enumerate(entries)]
    for index, parsed in enumerate(inputs):
        if parsed.features is not None and not takes_features:
            where = f"inputs[{index}].features"
            raise BadRequest(f"'{where}': this length model accepts prompts only.", where)
    return inputs


def parse_observations(body: bytes, known_models: frozenset[str] = frozenset()) -> list[Observation]:
    """Parse the body of an observe call.

    Raises:
        BadRequest: a field is wrong. No observation of the body is then recorded.
    """
    entries = _entries(_document(body), "observations", MAX_OBSERVATIONS)
    return [_observation(entry, f"observations[{index}]", known_models) for index, entry in enumerate(entries)]


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(document, dict):
        raise BadRequest("The body must be a JSON object.")
    return document


def _entries(document: dict[str, Any], field: str, limit: int) -> list[Any]:
    entries = document.get(field)
    if not isinstance(entries, list) or not entries:
        raise BadRequest(f"'{field}' must be a non-empty array.", field)
    if len(entries) > limit:
        raise BadRequest(f"'{field}' may hold at most {limit} entries.", field)
    return entries


def _input(entry: Any, where: str, known_models: frozenset[str], names: tuple[str, str]) -> Input:
    if not isinstance(entry, dict):
        raise BadRequest(f"'{where}' must be an object.", where)
    prompt, wire = entry.get("prompt"), entry.get("features")
    if (prompt is None) == (wire is None):
        raise BadRequest(f"'{where}' must have either 'prompt' or 'features'.", where)
    features = None
    if wire is not None:
        try:
            features = features_from_wire(wire)
        except MalformedFeatures as error:
            raise BadRequest(f"'{where}': {error}.", f"{where}.features") from None
    elif not isinstance(prompt, str):
        raise BadRequest(f"'{where}.prompt' must be a string.", f"{where}.prompt")
    elif len(prompt) > MAX_PROMPT_CHARS:
        raise BadRequest(
            f"'{where}.prompt' may hold at most {MAX_PROMPT_CHARS} characters; send its two ends, or its features.",
            f"{where}.prompt",
            status=413,
            code="prompt_too_large",
        )
    _count(entry, "prompt_tokens", where, minimum=0)
    low, high = _count(entry, "min_tokens", where, minimum=0), _count(entry, "max_tokens", where, minimum=1)
    if low is not None and high is not None and low > high:
        raise BadRequest(f"'{where}.min_tokens' must not exceed 'max_tokens'.", f"{where}.min_tokens")
    model, slo_class = _names(entry, where, known_models, names)
    return Input(prompt, features, low, high, model, slo_class, _id(entry, where))


def _observation(entry: Any, where: str, known_models: frozenset[str]) -> Observation:
    if not isinstance(entry, dict):
        raise BadRequest(f"'{where}' must be an object.", where)
    model, slo_class = _names(entry, where, known_models, ("", ""))
    p50, p90 = _tokens(entry, "raw_p50", where), _tokens(entry, "raw_p90", where)
    if p50 > p90:
        raise BadRequest(f"'{where}.raw_p50' must not exceed 'raw_p90'.", f"{where}.raw_p50")
    tokens = _count(entry, "tokens", where, minimum=0)
    if tokens is None:
        raise BadRequest(f"'{where}.tokens' must be a whole number of at least 0.", f"{where}.tokens")
    censored = entry.get("censored")
    if not isinstance(censored, bool | None):
        raise BadRequest(f"'{where}.censored' must be true or false.", f"{where}.censored")
    return Observation(FinishedAnswer(model, slo_class, p50, p90, tokens, bool(censored)), _id(entry, where))


def _names(
    entry: dict[str, Any], where: str, known_models: frozenset[str], defaults: tuple[str, str]
) -> tuple[str, str]:
    """Return model and class of an entry, or ``defaults`` where it names none."""
    model, slo_class = _name(entry, "model", where), _name(entry, "slo_class", where)
    if model is not None and known_models and model not in known_models:
        field = _path(where, "model")
        raise BadRequest(f"'{field}' is not a model that this service predicts for.", field, 404, "model_not_found")
    return defaults[0] if model is None else model, defaults[1] if slo_class is None else slo_class


def _name(entry: dict[str, Any], field: str, where: str) -> str | None:
    value, path = entry.get(field), _path(where, field)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadRequest(f"'{path}' must be a string or null.", path)
    if not 0 < len(value) <= MAX_NAME_CHARS or not value.isprintable():
        raise BadRequest(f"'{path}' must be 1 to {MAX_NAME_CHARS} printable characters.", path)
    return value


def _id(entry: dict[str, Any], where: str) -> str | None:
    value = entry.get("id")
    if value is not None and not (isinstance(value, str) and _ID.fullmatch(value)):
        raise BadRequest(f"'{where}.id' must be 1 to 128 letters, digits or any of ._:-", f"{where}.id")
    return value


def _path(where: str, field: str) -> str:
    return f"{where}.{field}" if where else field


def _count(entry: dict[str, Any], field: str, where: str, minimum: int) -> int | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= MAX_TOKENS:
        raise BadRequest(f"'{where}.{field}' must be a whole number of at least {minimum}.", f"{where}.{field}")
    return value


def _tokens(entry: dict[str, Any], field: str, where: str) -> float:
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_TOKENS:
        raise BadRequest(f"'{where}.{field}' must be a number of tokens.", f"{where}.{field}")
    return float(value)


def parse_deadline(header: str | None) -> float | None:
    """Return the seconds from arrival to the deadline, from the header ``x-deadline-ms``; None without the header.

    Zero or less means that the deadline has passed.

    Raises:
        BadRequest: the header is not a number.
    """
    if header is None:
        return None
    try:
        seconds = float(header) / 1e3
    except ValueError:
        seconds = float("nan")
    if not abs(seconds) < 1e9:
        raise BadRequest("'x-deadline-ms' must be a number of milliseconds.", "x-deadline-ms")
    return seconds


def render_predictions(model: str, predictions: Sequence[Predicted]) -> bytes:
    """Return the response body of a predict call; ``predictions`` are in the order of the inputs."""
    entries = [
        {
            "length": prediction.corrected.length,
            "p50": prediction.corrected.p50,
            "p90": prediction.corrected.p90,
            "raw_p50": prediction.raw.p50,
            "raw_p90": prediction.raw.p90,
        }
        for prediction in predictions
    ]
    return orjson.dumps({"model": model, "predictions": entries})


def render_observed(observed: int) -> bytes:
    """Return the response body of an observe call."""
    return orjson.dumps({"observed": observed})


def render_health(model: str) -> bytes:
    """Return the response body of ``GET /health``."""
    return orjson.dumps({"status": "ok", "model": model})


def render_error(message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """Return an error body in the shape of the OpenAI API."""
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": param}})
