"""SLO headers: classes, bounds, and the limits of the API key."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.auth import ApiKey
from gateway.api.errors import ApiError
from gateway.api.slo_headers import ALIASES, read_slo
from gateway.requests.slo import Slo, SloClass
from tests.fixtures.live_gateway import CHAT, Live, chat

CLASSES = {
    "chat": SloClass("chat", Slo(ttft_s=1.0, tpot_s=0.05)),
    "batch": SloClass("batch", Slo(ttft_s=60.0)),
}
ANY_KEY = ApiKey("tenant", "chat")
NAMES = [name for names in ALIASES.values() for name in names]


def test_request_without_headers_gets_default_class_of_its_key() -> None:
    assert read_slo({}, ANY_KEY, CLASSES) == (CLASSES["chat"], Slo(1.0, 0.05, None))


def test_class_header_replaces_the_default_class() -> None:
    assert read_slo({"x-slo-class": "batch"}, ANY_KEY, CLASSES) == (CLASSES["batch"], Slo(60.0, None, None))


def test_bound_header_overrides_one_bound_of_the_class() -> None:
    _, slo = read_slo({"x-slo-ttft-ms": "250", "x-slo-e2e-ms": "9e3"}, ANY_KEY, CLASSES)
    assert slo == Slo(0.25, 0.05, 9.0)


def test_llm_d_aliases_set_the_same_bounds() -> None:
    _, slo = read_slo({"x-llm-d-slo-ttft-ms": "250", "x-llm-d-slo-tpot-ms": "20"}, ANY_KEY, CLASSES)
    assert slo == Slo(0.25, 0.02, None)


def test_own_header_name_has_precedence_over_its_alias() -> None:
    _, slo = read_slo({"x-slo-ttft-ms": "100", "x-llm-d-slo-ttft-ms": "900"}, ANY_KEY, CLASSES)
    assert slo.ttft_s == 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "text",
    [
        "abc",
        "-1",
        "0",
        "-0",
        "nan",
        "inf",
        "-inf",
        "",
        " ",
        "1e999",
        "1e12",
        "5e-324",
        "1e-300",
        "1_000",
        "0x10",
        "1,5",
    ],
)
def test_malformed_bound_gets_400_naming_the_header(name: str, text: str) -> None:
    with pytest.raises(ApiError) as raised:
        read_slo({name: text}, ANY_KEY, CLASSES)
    assert (raised.value.status, raised.value.param) == (400, name)
    assert name in raised.value.message


def test_unknown_class_gets_400_listing_the_classes() -> None:
    with pytest.raises(ApiError) as raised:
        read_slo({"x-slo-class": "gold"}, ANY_KEY, CLASSES)
    assert (raised.value.status, raised.value.param, raised.value.code) == (400, "x-slo-class", "unknown_slo_class")
    assert "batch, chat" in raised.value.message


def test_class_not_allowed_for_the_key_gets_403() -> None:
    key = ApiKey("tenant", "chat", allowed_classes=frozenset({"chat"}))
    with pytest.raises(ApiError) as raised:
        read_slo({"x-slo-class": "batch"}, key, CLASSES)
    assert (raised.value.status, raised.value.param) == (403, "x-slo-class")


@pytest.mark.parametrize("bound", ["ttft", "tpot", "e2e"])
def test_bound_stricter_than_the_key_allows_gets_403(bound: str) -> None:
    key = ApiKey("tenant", "chat", least_bounds={bound: 0.1})
    assert read_slo({f"x-slo-{bound}-ms": "100"}, key, CLASSES)
    with pytest.raises(ApiError) as raised:
        read_slo({f"x-slo-{bound}-ms": "99.9"}, key, CLASSES)
    assert (raised.value.status, raised.value.param) == (403, f"x-slo-{bound}-ms")


@pytest.mark.parametrize(
    ("least_bounds", "minimum_ms"),
    [
        ({"ttft": 1.0, "tpot": 0.05}, 2000),  # at most half of an end-to-end bound is for the first token
        ({"tpot": 0.05}, 50),
        ({"ttft": 1.0, "e2e": 0.3}, 300),  # an explicit limit replaces the implied one
    ],
)
def test_e2e_bound_respects_the_ttft_and_tpot_limits_of_the_key(
    least_bounds: dict[str, float], minimum_ms: float
) -> None:
    key = ApiKey("tenant", "chat", least_bounds=least_bounds)
    assert read_slo({"x-slo-e2e-ms": f"{minimum_ms}"}, key, CLASSES)[1].e2e_s == minimum_ms / 1000
    with pytest.raises(ApiError) as raised:
        read_slo({"x-slo-e2e-ms": f"{minimum_ms - 1}"}, key, CLASSES)
    assert (raised.value.status, raised.value.param) == (403, "x-slo-e2e-ms")
    assert f"less than {minimum_ms} ms" in raised.value.message
    assert ("min_e2e_ms" in raised.value.message) == ("e2e" not in least_bounds)


def test_class_bounds_are_not_limited_by_the_key() -> None:
    key = ApiKey("tenant", "batch", least_bounds={"ttft": 10.0, "tpot": 1.0})
    assert read_slo({"x-slo-class": "chat"}, key, CLASSES)[1] == Slo(1.0, 0.05, None)


@given(st.sampled_from(NAMES), st.text(max_size=40) | st.floats().map(str) | st.integers().map(str))
def test_any_header_text_gives_a_positive_finite_bound_or_400(name: str, text: str) -> None:
    try:
        _, slo = read_slo({name: text}, ANY_KEY, CLASSES)
    except ApiError as raised:
        assert (raised.status, raised.param) == (400, name)
    else:
        assert all(0 < bound < math.inf for bound in (slo.ttft_s, slo.tpot_s, slo.e2e_s) if bound is not None)


@given(st.text(max_size=40))
def test_any_class_name_is_known_or_gets_400(name: str) -> None:
    try:
        assert read_slo({"x-slo-class": name}, ANY_KEY, CLASSES)[0].name == name
    except ApiError as raised:
        assert raised.status == 400


@settings(max_examples=20)
@given(ttft=st.floats(1e-3, 8e7), tpot=st.floats(1e-3, 8e7), e2e=st.floats(1e-3, 8e7))
def test_bounds_are_converted_to_seconds(ttft: float, tpot: float, e2e: float) -> None:
    headers = {"x-slo-ttft-ms": repr(ttft), "x-slo-tpot-ms": repr(tpot), "x-slo-e2e-ms": repr(e2e)}
    assert read_slo(headers, ANY_KEY, CLASSES)[1] == Slo(ttft / 1000, tpot / 1000, e2e / 1000)


async def test_malformed_header_gets_an_openai_error_over_http(antares: Live) -> None:
    answer = await antares.ask(x_slo_ttft_ms="soon")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "x-slo-ttft-ms")
    assert antares.gateway.ledger.accepted == 0


async def test_first_of_two_equal_headers_counts(antares: Live) -> None:
    headers = [("x-slo-ttft-ms", "9000"), ("x-slo-ttft-ms", "0.001"), ("X-SLO-Class", "free"), ("x-slo-class", "none")]
    answer = await antares.http.post(CHAT, json=chat(), headers=[*headers, ("x-slo-report", "1")])
    report = answer.json()["antares"]
    assert (report["slo_ttft_ms"], report["slo_class"]) == (9000, "free")
