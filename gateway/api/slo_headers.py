"""From request headers to an SLO: `x-slo-class`, `x-slo-ttft-ms`, `x-slo-tpot-ms`, `x-slo-e2e-ms`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gateway.api.auth import ApiKey
from gateway.api.errors import ApiError, bad_request
from gateway.requests.request import E2E_MOST_FOR_TTFT
from gateway.requests.slo import Slo, SloClass

ALIASES: dict[str, tuple[str, ...]] = {
    "ttft": ("x-slo-ttft-ms", "x-llm-d-slo-ttft-ms"),
    "tpot": ("x-slo-tpot-ms", "x-llm-d-slo-tpot-ms"),
    "e2e": ("x-slo-e2e-ms",),
}
HEADER = {bound: names[0] for bound, names in ALIASES.items()}
"""Bound to the header that sets it: how answers name a bound."""

SHORTEST_MS, LONGEST_MS = 1e-3, 24 * 3600 * 1000.0
"""What a bound may be. Below a microsecond nothing is meant by it, and policies divide by bounds."""


def read_slo(headers: Mapping[str, str], key: ApiKey, classes: Mapping[str, SloClass]) -> tuple[SloClass, Slo]:
    """The class and the bounds a request carries.

    A header overrides the class's bound of the same kind; the class fills in the others. Raises `ApiError`: 400 for a
    malformed header or unknown class (naming it), 403 for a class or bound that the key may not ask for. A class's own
    bounds are not compared with the key's: the operator wrote both, and says who may use which (``allowed_classes``).
    """
    name = headers.get("x-slo-class", key.default_class)
    if name not in classes:
        raise bad_request(
            f"x-slo-class: no class is called {name[:64]!r}; choose one of {', '.join(sorted(classes))}.",
            "x-slo-class",
            "unknown_slo_class",
        )
    if key.allowed_classes is not None and name not in key.allowed_classes:
        raise _forbidden(f"x-slo-class: this API key may not use class {name!r}.", "x-slo-class")
    slo_class = classes[name]
    asked = {bound: _read_bound(headers, bound) for bound in ALIASES}
    for bound, seconds in asked.items():
        least = key.least_bounds.get(bound)
        if seconds is not None and least is not None and seconds < least:
            raise _forbidden(
                f"{HEADER[bound]}: this API key may not ask for less than {least * 1000:g} ms.", HEADER[bound]
            )
    if asked["e2e"] is not None and "e2e" not in key.least_bounds:
        _check_implied(asked["e2e"], key)
    base = slo_class.slo
    ttft, tpot, e2e = asked["ttft"], asked["tpot"], asked["e2e"]
    return slo_class, Slo(
        ttft_s=base.ttft_s if ttft is None else ttft,
        tpot_s=base.tpot_s if tpot is None else tpot,
        e2e_s=base.e2e_s if e2e is None else e2e,
    )


def _check_implied(e2e_s: float, key: ApiKey) -> None:
    """`ApiError` 403 for an end-to-end bound (s) that asks for less TTFT or TPOT than the key may, however it is spent.

    The first token is planned at no more than `E2E_MOST_FOR_TTFT` of it, and a second one within it. How many tokens
    are to share it is not known here, so that only the operator can say more, with ``min_e2e_ms``.
    """
    ttft, tpot = key.least_bounds.get("ttft", 0.0), key.least_bounds.get("tpot", 0.0)
    least = max(ttft / E2E_MOST_FOR_TTFT, tpot)
    if e2e_s < least:
        raise _forbidden(
            f"{HEADER['e2e']}: by its least TTFT and TPOT this API key may not ask for less than {least * 1000:g} ms; "
            "the gateway's operator can set its min_e2e_ms.",
            HEADER["e2e"],
        )


def _read_bound(headers: Mapping[str, str], bound: str) -> float | None:
    for name in ALIASES[bound]:
        text = headers.get(name)
        if text is None:
            continue
        try:
            # Python would read "1_000" as a number; nobody else does.
            value = math.nan if "_" in text else float(text)
        except ValueError:
            value = math.nan
        # NaN fails every comparison, so this also refuses "nan".
        if not SHORTEST_MS <= value <= LONGEST_MS:
            raise bad_request(
                f"{name}: must be a positive number of milliseconds ({SHORTEST_MS:g} to {LONGEST_MS:.0f}), "
                f"but it is {text[:32]!r}.",
                name,
            )
        return value / 1000
    return None


def _forbidden(message: str, param: str) -> ApiError:
    return ApiError(403, message, "permission_error", "slo_not_permitted", param)
