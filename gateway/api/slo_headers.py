"""Read a request's SLO and length hint from the `x-slo-*` headers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from gateway.api.auth import ApiKey
from gateway.api.errors import ApiError, bad_request
from gateway.requests.request import E2E_MOST_FOR_TTFT
from gateway.requests.slo import Bound, Slo, SloClass

ALIASES: dict[str, tuple[str, ...]] = {
    "ttft": ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"),
    "tpot": ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
    "e2e": ("x-slo-e2e-ms",),
}
HEADER = {bound: names[0] for bound, names in ALIASES.items()}
"""The header that sets each bound, as error responses name it."""

_BOUNDS: tuple[Bound, ...] = ("ttft", "tpot", "e2e")
_UNSET = {
    unset: frozenset(bound for bound, is_unset in zip(_BOUNDS, unset, strict=True) if is_unset)
    for unset in product((False, True), repeat=len(_BOUNDS))
}
"""The bounds that a request leaves to its class, by whether each one is unset."""

SHORTEST_MS, LONGEST_MS = 1e-3, 24 * 3600 * 1000.0
"""Limits of a bound (ms): one microsecond, because policies divide by bounds, to one day."""


LENGTH_HEADER, LENGTH_FIELD = "x-slo-output-tokens", "nvext.agent_hints.osl"
"""Where a client may state the output length that it expects, in tokens per sequence. The header comes first."""

LONGEST_OUTPUT = 10_000_000
"""Largest output length that a client may state, in tokens: beyond every context length."""


def read_output_tokens(headers: Mapping[str, str], document: Mapping[str, Any]) -> int | None:
    """Return the output length (tokens per sequence) that the client expects; None if it does not say.

    Raises `ApiError` 400 for one that is not a whole number from 1 to `LONGEST_OUTPUT`.
    """
    text = headers.get(LENGTH_HEADER)
    if text is not None:
        text = text.strip()
        is_number = text.isascii() and text.isdigit() and len(text) <= len(str(LONGEST_OUTPUT))
        return _checked_length(int(text) if is_number else text, LENGTH_HEADER)
    extension = document.get("nvext")
    hints = extension.get("agent_hints") if isinstance(extension, dict) else None
    length = hints.get("osl") if isinstance(hints, dict) else None
    return None if length is None else _checked_length(length, LENGTH_FIELD)


def _checked_length(value: Any, name: str) -> int:
    # NOTE: bool is a subclass of int, but JSON's true is not a number.
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LONGEST_OUTPUT:
        return value
    shown = repr(value)[:32] if isinstance(value, int | float | str) else "that"
    raise bad_request(f"{name}: must be a whole number of tokens, 1 to {LONGEST_OUTPUT}, not {shown}.", name)


def read_slo(headers: Mapping[str, str], key: ApiKey, classes: Mapping[str, SloClass]) -> tuple[SloClass, Slo]:
    """Return the request's SLO class and its bounds. A header overrides the bound of the same kind in the class.

    Raises `ApiError`: 400 for a malformed header or an unknown class, 403 for a class or bound that the key may not
    use. The bounds of a class are not compared with those of the key, because the operator configures both, and which
    key may use which class (``allowed_classes``).
    """
    name = headers.get("x-slo-class", key.default_class).strip()
    if name not in classes:
        raise bad_request(
            f"x-slo-class: unknown class {name[:64]!r}; choose one of {', '.join(sorted(classes))}.",
            "x-slo-class",
            "unknown_slo_class",
        )
    if key.allowed_classes is not None and name not in key.allowed_classes:
        raise _forbidden(f"x-slo-class: this API key may not use class {name!r}.", "x-slo-class")
    slo_class = classes[name]
    ttft, tpot, e2e = _read_bound(headers, "ttft"), _read_bound(headers, "tpot"), _read_bound(headers, "e2e")
    if key.least_bounds:
        _check_rights({"ttft": ttft, "tpot": tpot, "e2e": e2e}, key)
    base = slo_class.slo
    return slo_class, Slo(
        ttft_s=base.ttft_s if ttft is None else ttft,
        tpot_s=base.tpot_s if tpot is None else tpot,
        e2e_s=base.e2e_s if e2e is None else e2e,
        from_class=_UNSET[ttft is None, tpot is None, e2e is None],
    )


def _check_rights(bounds: Mapping[str, float | None], key: ApiKey) -> None:
    """Raise `ApiError` 403 for a bound (s) that is stricter than ``key`` may set."""
    for bound, seconds in bounds.items():
        strictest_s = key.least_bounds.get(bound)
        if seconds is not None and strictest_s is not None and seconds < strictest_s:
            raise _forbidden(
                f"{HEADER[bound]}: this API key may not set less than {strictest_s * 1000:g} ms.", HEADER[bound]
            )
    e2e_s = bounds["e2e"]
    if e2e_s is not None and "e2e" not in key.least_bounds:
        _check_implied(e2e_s, key)


def _check_implied(e2e_s: float, key: ApiKey) -> None:
    """Raise `ApiError` 403 for an end-to-end bound (s) that implies a stricter TTFT or TPOT than ``key`` may set.

    At most `E2E_MOST_FOR_TTFT` of the bound is planned for the first token, and the second token must fit as well. The
    output length is not known here, so the operator sets a higher minimum with ``min_e2e_ms`` if one is needed.
    """
    ttft_s, tpot_s = key.least_bounds.get("ttft", 0.0), key.least_bounds.get("tpot", 0.0)
    strictest_s = max(ttft_s / E2E_MOST_FOR_TTFT, tpot_s)
    if e2e_s < strictest_s:
        raise _forbidden(
            f"{HEADER['e2e']}: the TTFT and TPOT limits of this API key imply a minimum: it may not set less than "
            f"{strictest_s * 1000:g} ms. The gateway's operator can set min_e2e_ms for the key.",
            HEADER["e2e"],
        )


def _read_bound(headers: Mapping[str, str], bound: str) -> float | None:
    for name in ALIASES[bound]:
        text = headers.get(name)
        if text is None:
            continue
        try:
            # NOTE: Python reads "1_000" as a number, other HTTP software does not.
            value = math.nan if "_" in text else float(text)
        except ValueError:
            value = math.nan
        # NaN fails every comparison, so this rejects "nan" too.
        if not SHORTEST_MS <= value <= LONGEST_MS:
            raise bad_request(
                f"{name}: must be a positive number of milliseconds ({SHORTEST_MS:g} to {LONGEST_MS:.0f}), "
                f"not {text[:32]!r}.",
                name,
            )
        return value / 1000
    return None


def _forbidden(message: str, param: str) -> ApiError:
    return ApiError(403, message, "permission_error", "slo_not_permitted", param)
