"""Which routes the gateway serves, and how: scheduled, passed through, or refused.

INVARIANT: only routes that are listed here, or in the configuration, reach an engine. An unknown route could generate
tokens, and would bypass scheduling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.api.errors import bad_request, method_not_allowed
from gateway.api.paths import unknown_path
from gateway.api.routes import error_shape
from gateway.api.routes.error_shape import ErrorShape
from gateway.api.routes.generation import GENERATION_ROUTES, GenerationRoute

_GET, _POST, _ANY = ("GET", "HEAD"), ("POST",), ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")

_PASSED_THROUGH: dict[str, tuple[str, ...]] = {
    "/v1/models": _GET,
    "/v1/models/{model}": _GET,
    "/v1/embeddings": _POST,
    "/v1/score": _POST,
    "/v1/rerank": _POST,
    "/v1/moderations": _POST,
    "/v1/audio/transcriptions": _POST,
    "/v1/audio/translations": _POST,
    "/v1/audio/speech": _POST,
    "/v1/messages/count_tokens": _POST,
    "/v1/responses/input_tokens": _POST,
    "/v1/responses/{id}": (*_GET, "DELETE"),
    "/v1/responses/{id}/cancel": _POST,
    "/v1/responses/{id}/input_items": _GET,
    "/v1/chat/completions/render": _POST,
    "/v1/chat/completions/derender": _POST,
    "/v1/completions/render": _POST,
    "/v1/completions/derender": _POST,
    "/v1/responses/render": _POST,
    "/v1/messages/render": _POST,
    "/v1/load_lora_adapter": _POST,
    "/v1/unload_lora_adapter": _POST,
}
"""Routes that generate no text, except transcription and translation, by path, with their methods."""

_OWN: dict[str, tuple[str, ...]] = {"/v1/requests": _GET, "/v1/requests/{id}": _GET}
"""Routes that the gateway answers itself, besides `/v1/models`."""

_REFUSED = ("/v1/realtime", "/v1/systemone")
"""Routes of vLLM that generate tokens and that the gateway cannot schedule."""

# NOTE: no "%", which a second decoding could turn into a slash or a dot.
_SEGMENT = {"{id}": r"[\w.:-]+", "{model}": r"[\w.:@+~/-]+"}
_DOT_SEGMENT = re.compile(r"(?:^|/)\.{1,2}(?:/|$)")


@dataclass(frozen=True, slots=True)
class Route:
    """One route under ``/v1``. ``label``: its name in metrics. ``generation``: None unless it is scheduled.

    ``refusal``: why the gateway does not serve the route. ``methods``: empty for a path that it does not know.
    """

    label: str
    methods: tuple[str, ...] = _POST
    errors: ErrorShape = error_shape.OPENAI
    generation: GenerationRoute | None = None
    refusal: str | None = None

    def check(self, method: str, path: str) -> None:
        """Raise `ApiError` 404 or 501 if the route is not served, 405 for a wrong method."""
        if self.refusal is not None:
            raise bad_request(self.refusal, None, "not_implemented", 501)
        if not self.methods:
            raise unknown_path(path)
        if method not in self.methods:
            raise method_not_allowed(method, self.label, ", ".join(self.methods))


UNKNOWN = Route("/v1/*", methods=())
_UNKNOWN_MESSAGES_ROUTE = Route("/v1/*", methods=(), errors=error_shape.ANTHROPIC)


class RouteTable:
    """Finds the route of a path. ``more``: paths that are passed through too, with any method."""

    def __init__(self, more: Iterable[str] = ()) -> None:
        self._exact: dict[str, Route] = {
            generation.path: Route(generation.path, errors=generation.errors, generation=generation)
            for generation in GENERATION_ROUTES
        }
        for path in _REFUSED:
            message = f"{path} generates tokens and is not supported by the gateway, because it cannot schedule it."
            self._exact[path] = Route(path, _ANY, refusal=message)
        self._patterns: list[tuple[re.Pattern[str], Route]] = []
        for path in more:
            self._exact.setdefault(path, Route(path, _ANY))
        for path, methods in {**_PASSED_THROUGH, **_OWN}.items():
            route = Route(path, methods, _shape_of(path))
            if "{" in path:
                self._patterns.append((_pattern(path), route))
            else:
                self._exact.setdefault(path, route)

    def find(self, path: str) -> Route:
        """Return the route of ``path`` (decoded, as in the ASGI scope), which may be one that is refused."""
        route = self._exact.get(path)
        if route is not None:
            return route
        # A server would resolve dot segments, and might then serve another route.
        if not _DOT_SEGMENT.search(path):
            for pattern, route in self._patterns:
                if pattern.fullmatch(path):
                    return route
        return _UNKNOWN_MESSAGES_ROUTE if path.startswith("/v1/messages") else UNKNOWN


def _shape_of(path: str) -> ErrorShape:
    """The error format of the API that ``path`` belongs to."""
    if path.startswith("/v1/messages"):
        return error_shape.ANTHROPIC
    return error_shape.RESPONSES if path.startswith("/v1/responses") else error_shape.OPENAI


def _pattern(path: str) -> re.Pattern[str]:
    for name, expression in _SEGMENT.items():
        path = path.replace(name, expression)
    return re.compile(path)
