"""The models of all engines: the routes ``/v1/models`` and ``/v1/models/{id}``, and the ``model`` of a request."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import orjson
from starlette.datastructures import Headers as HeaderView

from engine_adapter.asgi import BodyTooDeep, encode_json
from engine_adapter.engine import EngineState
from engine_adapter.model_card import MAX_NAME
from gateway.api.auth import ApiKey
from gateway.api.errors import ApiError, bad_request, unavailable
from gateway.api.http_request import HttpRequest
from gateway.scheduling.router import Router

MODELS_PATH = "/v1/models"

_FORM_MODEL = re.compile(rb'name="?model"?[ \t]*(?:\r?\n[^\r\n]+)*\r?\n\r?\n([^\r\n]{1,256})\r?\n', re.IGNORECASE)
"""The value of the field ``model`` in a form, as a group."""

_OTHER_SPELLINGS = frozenset(map("".join, product(*zip("model", "MODEL", strict=True)))) - {"model"}
"""``model`` with capital letters."""

RETRY_UNKNOWN_S = 5.0
"""``Retry-After`` (s) while no engine has reported its models. Convention."""


def model_not_found(model: str) -> ApiError:
    """404: no engine serves ``model``."""
    name = "".join(c if c.isprintable() else "?" for c in model[:MAX_NAME])
    return bad_request(
        f"The model `{name}` does not exist. GET {MODELS_PATH} lists the models.", "model", "model_not_found", 404
    )


def check_model(model: str, key: ApiKey, router: Router) -> None:
    """Raise `ApiError` 403 if ``key`` may not use ``model``."""
    if key.allowed_models is not None and not _allows(key.allowed_models, model, router):
        raise _not_permitted("This API key may not use the requested model.")


def _allows(allowed: frozenset[str], model: str, router: Router) -> bool:
    """Whether ``allowed`` names ``model``, or another name of it on every engine that lists it."""
    if model in allowed:
        return True
    states = [queue.engine.state for queue in router.engine_queues]
    listing = [(state, own) for state in states if (own := state.own_name(model)) is not None]
    return bool(listing) and all(any(state.own_name(name) == own for name in allowed) for state, own in listing)


def permitted_body(http: HttpRequest, body: bytes, key: ApiKey, router: Router) -> bytes:
    """Return a body that the gateway does not schedule, once ``key`` may use its model.

    The key needs no right for a request without a body. A key with ``allowed_models`` must name its model in JSON: what
    the engine reads in another kind of body is not known. Its body is encoded anew, because engines differ in which of
    two members of one name they take. Raises `ApiError` 403, or 400 for a body that cannot be encoded.
    """
    if key.allowed_models is None or not body:
        return body
    document = _object(body)
    model = None if document is None or _is_form(http.headers) else document.get("model")
    if document is None or not isinstance(model, str) or not model:
        raise _not_permitted("This API key may use certain models only: send a JSON body that names one as 'model'.")
    _check_spelling(document)
    check_model(model, key, router)
    if model_in_body(http.headers, body) != model:
        raise _not_permitted("Write the name 'model' without escapes.")
    try:
        return encode_json(document)
    except BodyTooDeep:
        raise bad_request("The body nests too deeply.", None, "invalid_json") from None


def _check_spelling(document: dict[str, Any]) -> None:
    """Raise `ApiError` 400 for a member such as ``Model``, which an engine may take for ``model`` (Go does)."""
    if not _OTHER_SPELLINGS.isdisjoint(document):
        raise bad_request("model: write this name in lower case.", "model")


def _not_permitted(reason: str) -> ApiError:
    message = f"{reason} GET {MODELS_PATH} lists the models that it may use."
    return ApiError(403, message, "permission_error", "model_not_permitted", "model")


def requested_model(document: dict[str, Any]) -> str:
    """Return the ``model`` of a request; "" if it names none. Raises `ApiError` 400 if it is not text, or misspelt."""
    _check_spelling(document)
    model = document.get("model")
    if model is None:
        return ""
    if not isinstance(model, str):
        raise bad_request("model: must be a string.", "model", "invalid_type")
    return model


def for_engine(document: dict[str, Any], model: str, engine: EngineState) -> dict[str, Any]:
    """Return ``document`` with the engine's own name of ``model``: a copy if it differs from the client's."""
    own = engine.own_name(model)
    given = document.get("model")
    if own is None or own == given or (not given and own == engine.model):
        return document
    return {**document, "model": own}


# --- the model of a request that is not scheduled ---------------------------------------------------------------------


def model_in_body(headers: HeaderView, body: bytes) -> str:
    """Return the model that a JSON document or a form names; "" if it names none."""
    if b"model" not in body:
        return ""
    if _is_form(headers):
        found = _FORM_MODEL.search(body)
        return "" if found is None else found.group(1).decode("utf-8", "replace").strip()
    model = _member(body, "model")
    return model if isinstance(model, str) else ""


def member_of_body(headers: HeaderView, body: bytes, name: str) -> str:
    """Return the text member ``name`` of a JSON document; "" if there is none."""
    if name.encode() not in body or _is_form(headers):
        return ""
    value = _member(body, name)
    return value if isinstance(value, str) else ""


def body_with_model(headers: HeaderView, body: bytes, model: str) -> bytes:
    """Return ``body`` with ``model`` in place of the model that `model_in_body` found."""
    if _is_form(headers):
        found = _FORM_MODEL.search(body)
        return body if found is None else body[: found.start(1)] + model.encode() + body[found.end(1) :]
    try:
        return encode_json({**orjson.loads(body), "model": model})
    except (orjson.JSONDecodeError, TypeError, BodyTooDeep):
        return body


def _is_form(headers: HeaderView) -> bool:
    return headers.get("content-type", "").strip().lower().startswith("multipart/")


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _member(body: bytes, name: str) -> Any:
    document = _object(body)
    return None if document is None else document.get(name)


# --- the routes -------------------------------------------------------------------------------------------------------


def asks_for_models(http: HttpRequest) -> bool:
    """Whether the request reads the list of models, or one of them."""
    path: str = http.scope["path"]
    return http.scope["method"] in ("GET", "HEAD") and (path == MODELS_PATH or path.startswith(MODELS_PATH + "/"))


async def send_models(http: HttpRequest, router: Router, key: ApiKey) -> None:
    """Answer with the models that ``key`` may use, or with the one that the path names.

    Raises `ApiError` 404 if there is no such model, or 503 if no engine has reported its models yet.
    """
    if not router.knows_models:
        raise unavailable("No engine has reported its models yet.", "engine_unavailable", RETRY_UNKNOWN_S)
    cards, name = router.cards(), http.scope["path"][len(MODELS_PATH) + 1 :]
    if key.allowed_models is not None:
        cards = {card: value for card, value in cards.items() if _allows(key.allowed_models, card, router)}
    if name and name not in cards:
        raise model_not_found(name)
    document: dict[str, Any] = (
        cards[name].document() if name else {"object": "list", "data": [card.document() for card in cards.values()]}
    )
    body = orjson.dumps(document)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await http.send({"type": "http.response.start", "status": 200, "headers": headers})
    await http.send({"type": "http.response.body", "body": body})
