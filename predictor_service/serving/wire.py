"""What travels over ``POST /v1/predict`` and ``POST /v1/observe``: reading and checking bodies, writing answers.

    predict    {"model": str | null, "slo_class": str | null,
                "inputs": [{"prompt": str  or  "features": see `predictor_service.model.features`,
                            "prompt_tokens": int | null, "max_tokens": int | null, "min_tokens": int | null,
                            "model": str | null, "slo_class": str | null, "id": str | null}, ...]}

               {"model": <this predictor>,
                "predictions": [{"length": tokens, "p50": tokens, "p90": tokens,
                                 "raw_p50": tokens, "raw_p90": tokens}, ...]}

    observe    {"observations": [{"model": str | null, "slo_class": str | null, "raw_p50": tokens, "raw_p90": tokens,
                                  "tokens": int, "censored": bool | null, "id": str | null}, ...]}

               {"observed": <how many>}, with status 202

``model`` is the served model whose answers are predicted, ``slo_class`` the request's class: an input's own, else the
body's, else none. The raw quantiles are the length model's own, before the correction for model and class and before
the clamp to min and max tokens; whoever reports a finished request hands them back. ``censored`` says that
``max_tokens`` stopped the answer. ``id`` joins the two where lengths are collected.

Request header ``x-deadline-ms``: milliseconds from the call's arrival after which the answer is of no use. Errors are
OpenAI-shaped: 400 (malformed, names the field), 404 (a model that this service is not to predict for), 413 (body or
prompt too large), 503 (queue full, with ``retry-after``), 504 (deadline passed), 500.

A message here names the field that is wrong and never repeats its value: values may be prompts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from predictor_service.calibration.online import Finished
from predictor_service.model.features import Features, MalformedFeatures, features_from_wire, prompt_features
from predictor_service.model.length_model import MAX_TOKENS, Prediction

MAX_INPUTS = 256
"""Inputs in one call."""

MAX_OBSERVATIONS = 1024
"""Observations in one call."""

MAX_BODY_BYTES = 8 * 1024 * 1024
"""Bytes of one call's body."""

MAX_PROMPT_CHARS = 128 * 1024
"""Characters of one prompt. A longer one is better sent as its two ends or as ``features``: no more of it is read."""

MAX_NAME_CHARS = 256
"""Characters of a model's or a class's name."""

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class BadRequest(Exception):  # noqa: N818 - it names the answer that it becomes
    """A request that cannot be served, as an OpenAI-shaped error: status, message, and the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_request"):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(slots=True, frozen=True)
class Input:
    """One prompt to predict for: its text or its features, the caller's bounds on the answer (tokens), and for which
    model and class ("": none named). ``id`` is given where the request's end will be reported."""

    prompt: str | None
    features: Features | None
    min_tokens: int | None
    max_tokens: int | None
    model: str = ""
    slo_class: str = ""
    id: str | None = None

    def to_features(self) -> Features:
        """The given features, or the prompt's. Costs a fraction of a millisecond for a prompt."""
        return self.features if self.features is not None else prompt_features(self.prompt or "")


@dataclass(slots=True, frozen=True)
class Predicted:
    """``raw`` is the length model's own word, ``served`` that with the correction and the clamp."""

    raw: Prediction
    served: Prediction


@dataclass(slots=True, frozen=True)
class Observation:
    """A finished request, and the ``id`` that it was predicted under."""

    answer: Finished
    id: str | None


def parse_request(
    body: bytes, known_models: frozenset[str] = frozenset(), *, takes_features: bool = True
) -> list[Input]:
    """Read a predict body. Raises `BadRequest` naming the field.

    Without ``takes_features`` every input must be a prompt: the length model reads text. With ``known_models``, another
    name is refused; without, every well-formed name is taken. ``prompt_tokens`` is checked and kept for models that use
    it; the shipped one does not. Unknown fields are ignored.
    """
    document = _document(body)
    names = _names(document, "", known_models, ("", ""))
    entries = _entries(document, "inputs", MAX_INPUTS)
    inputs = [_input(entry, f"inputs[{place}]", known_models, names) for place, entry in enumerate(entries)]
    for place, one in enumerate(inputs):
        if one.features is not None and not takes_features:
            where = f"inputs[{place}].features"
            raise BadRequest(f"'{where}': the length model served here reads prompts only.", where)
    return inputs


def parse_observations(body: bytes, known_models: frozenset[str] = frozenset()) -> list[Observation]:
    """Read an observe body. Raises `BadRequest` naming the field; then nothing of the body counts."""
    observations = _entries(_document(body), "observations", MAX_OBSERVATIONS)
    return [_observation(one, f"observations[{place}]", known_models) for place, one in enumerate(observations)]


def _document(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(document, dict):
        raise BadRequest("The body must be a JSON object.")
    return document


def _entries(document: dict[str, Any], field: str, most: int) -> list[Any]:
    entries = document.get(field)
    if not isinstance(entries, list) or not entries:
        raise BadRequest(f"'{field}' must be a non-empty array.", field)
    if len(entries) > most:
        raise BadRequest(f"'{field}' may hold at most {most} entries.", field)
    return entries


def _input(entry: Any, where: str, known_models: frozenset[str], names: tuple[str, str]) -> Input:
    if not isinstance(entry, dict):
        raise BadRequest(f"'{where}' must be an object.", where)
    prompt, wire = entry.get("prompt"), entry.get("features")
    if (prompt is None) == (wire is None):
        raise BadRequest(f"'{where}' must carry either 'prompt' or 'features'.", where)
    features = None
    if wire is not None:
        try:
            features = features_from_wire(wire)
        except MalformedFeatures as wrong:
            raise BadRequest(f"'{where}': {wrong}.", f"{where}.features") from None
    elif not isinstance(prompt, str):
        raise BadRequest(f"'{where}.prompt' must be a string.", f"{where}.prompt")
    elif len(prompt) > MAX_PROMPT_CHARS:
        raise BadRequest(
            f"'{where}.prompt' may hold at most {MAX_PROMPT_CHARS} characters; send its two ends, or its features.",
            f"{where}.prompt",
            status=413,
            code="prompt_too_large",
        )
    _count(entry, "prompt_tokens", where, least=0)
    low, high = _count(entry, "min_tokens", where, least=0), _count(entry, "max_tokens", where, least=1)
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
    tokens = _count(entry, "tokens", where, least=0)
    if tokens is None:
        raise BadRequest(f"'{where}.tokens' must be a whole number of at least 0.", f"{where}.tokens")
    censored = entry.get("censored")
    if not isinstance(censored, bool | None):
        raise BadRequest(f"'{where}.censored' must be true or false.", f"{where}.censored")
    return Observation(Finished(model, slo_class, p50, p90, tokens, bool(censored)), _id(entry, where))


def _names(
    entry: dict[str, Any], where: str, known_models: frozenset[str], otherwise: tuple[str, str]
) -> tuple[str, str]:
    """Model and class of an entry, or else of the body."""
    model, slo_class = _name(entry, "model", where), _name(entry, "slo_class", where)
    if model is not None and known_models and model not in known_models:
        field = _path(where, "model")
        raise BadRequest(f"'{field}' is none of the models that are served here.", field, 404, "model_not_found")
    return otherwise[0] if model is None else model, otherwise[1] if slo_class is None else slo_class


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


def _count(entry: dict[str, Any], field: str, where: str, least: int) -> int | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_TOKENS:
        raise BadRequest(f"'{where}.{field}' must be a whole number of at least {least}.", f"{where}.{field}")
    return value


def _tokens(entry: dict[str, Any], field: str, where: str) -> float:
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_TOKENS:
        raise BadRequest(f"'{where}.{field}' must be a number of tokens.", f"{where}.{field}")
    return float(value)


def parse_deadline_ms(header: str | None) -> float | None:
    """Seconds that the caller still waits, from ``x-deadline-ms``: milliseconds counted from the call's arrival.

    None without the header; 0 or less means that it has passed. Raises `BadRequest`.
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
    """The body of a predict answer, in the inputs' order; see the module."""
    found = [
        {
            "length": one.served.length,
            "p50": one.served.p50,
            "p90": one.served.p90,
            "raw_p50": one.raw.p50,
            "raw_p90": one.raw.p90,
        }
        for one in predictions
    ]
    return orjson.dumps({"model": model, "predictions": found})


def render_observed(observed: int) -> bytes:
    """The body of an observe answer."""
    return orjson.dumps({"observed": observed})


def render_health(model: str) -> bytes:
    """The body of ``GET /health``: the process serves ``model``."""
    return orjson.dumps({"status": "ok", "model": model})


def render_error(message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """An OpenAI-shaped error body."""
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": param}})
