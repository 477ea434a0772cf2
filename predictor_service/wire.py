"""What travels over ``POST /v1/predict``: reading and checking a body, writing an answer or an error.

    {"model": str | null,
     "inputs": [{"prompt": str  or  "features": see `predictor_service.features`,
                 "prompt_tokens": int | null, "max_tokens": int | null, "min_tokens": int | null}, ...]}

    {"model": <this predictor>, "predictions": [{"length": tokens, "p50": tokens, "p90": tokens}, ...]}

Request header ``x-deadline-ms``: milliseconds from the call's arrival after which the answer is of no use. Errors are
OpenAI-shaped: 400 (malformed, names the field), 413 (body too large), 503 (queue full, with ``retry-after``), 504
(deadline passed), 500.

A message here names the field that is wrong and never repeats its value: values may be prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from predictor_service.features import Features, MalformedFeatures, features_from_wire, prompt_features
from predictor_service.length_model import MAX_TOKENS, Prediction

MAX_INPUTS = 256
"""Inputs in one call."""

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Bytes of one call's body. A longer prompt is better sent as ``features``: only its two ends are read
anyway."""


class BadRequest(Exception):  # noqa: N818 - it names the answer that it becomes
    """A request that cannot be served, as an OpenAI-shaped error: status, message, and the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str = "invalid_request"):
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass(slots=True, frozen=True)
class Input:
    """One prompt to predict for: its text or its features, and the caller's bounds on the answer (tokens)."""

    prompt: str | None
    features: Features | None
    min_tokens: int | None
    max_tokens: int | None

    def to_features(self) -> Features:
        """The given features, or the prompt's. Costs a fraction of a millisecond for a prompt."""
        return self.features if self.features is not None else prompt_features(self.prompt or "")


def parse_request(body: bytes) -> list[Input]:
    """Read ``{"model": ..., "inputs": [...]}``. Raises `BadRequest` naming the field.

    ``model`` (the served model's name) and ``prompt_tokens`` are checked and kept for models that use them;
    the shipped one does not. Unknown fields are ignored.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not valid JSON.") from None
    if not isinstance(document, dict):
        raise BadRequest("The body must be a JSON object.")
    if not isinstance(document.get("model"), str | None):
        raise BadRequest("'model' must be a string or null.", "model")
    inputs = document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        raise BadRequest("'inputs' must be a non-empty array.", "inputs")
    if len(inputs) > MAX_INPUTS:
        raise BadRequest(f"'inputs' may hold at most {MAX_INPUTS} entries.", "inputs")
    return [_input(entry, f"inputs[{place}]") for place, entry in enumerate(inputs)]


def _input(entry: Any, where: str) -> Input:
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
    _count(entry, "prompt_tokens", where, least=0)
    low, high = _count(entry, "min_tokens", where, least=0), _count(entry, "max_tokens", where, least=1)
    if low is not None and high is not None and low > high:
        raise BadRequest(f"'{where}.min_tokens' must not exceed 'max_tokens'.", f"{where}.min_tokens")
    return Input(prompt, features, low, high)


def _count(entry: dict[str, Any], field: str, where: str, least: int) -> int | None:
    value = entry.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_TOKENS:
        raise BadRequest(f"'{where}.{field}' must be a whole number of at least {least}.", f"{where}.{field}")
    return value


def parse_deadline_ms(header: str | None) -> float | None:
    """Seconds that the caller still waits, from ``x-deadline-ms``: milliseconds counted from the call's
    arrival.

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


def render_predictions(model: str, predictions: Sequence[Prediction]) -> bytes:
    """``{"model": ..., "predictions": [{"length", "p50", "p90"}, ...]}``, in the inputs' order, tokens."""
    return orjson.dumps({"model": model, "predictions": predictions})


def render_health(model: str) -> bytes:
    """The body of ``GET /health``: the process serves ``model``."""
    return orjson.dumps({"status": "ok", "model": model})


def render_error(message: str, kind: str, code: str, param: str | None = None) -> bytes:
    """An OpenAI-shaped error body."""
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code, "param": param}})
