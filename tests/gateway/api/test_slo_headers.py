"""What a request asks for, by its headers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.auth import ApiKey
from gateway.api.errors import ApiError
from gateway.api.slo_headers import ALIASES, read_slo
from gateway.requests.slo import Slo, SloClass
from tests.fixtures.live_gateway import Live

CLASSES = {
    "chat": SloClass("chat", Slo(ttft_s=1.0, tpot_s=0.05)),
    "batch": SloClass("batch", Slo(ttft_s=60.0)),
}
ANYONE = ApiKey("someone", "chat")
NAMES = [name for names in ALIASES.values() for name in names]


def test_without_headers_the_keys_default_class_gives_every_bound() -> None:
    assert read_slo({}, ANYONE, CLASSES) == (CLASSES["chat"], Slo(1.0, 0.05, None))


def test_a_named_class_replaces_the_default() -> None:
    assert read_slo({"x-slo-class": "batch"}, ANYONE, CLASSES) == (CLASSES["batch"], Slo(60.0, None, None))


def test_a_header_overrides_its_bound_and_the_class_fills_in_the_others() -> None:
    _, slo = read_slo({"x-slo-ttft-ms": "250", "x-slo-e2e-ms": "9e3"}, ANYONE, CLASSES)
    assert slo == Slo(0.25, 0.05, 9.0)


def test_the_llm_d_names_mean_the_same() -> None:
    _, slo = read_slo({"x-llm-d-slo-ttft-ms": "250", "x-llm-d-slo-tpot-ms": "20"}, ANYONE, CLASSES)
    assert slo == Slo(0.25, 0.02, None)


def test_our_own_name_wins_over_its_alias() -> None:
    _, slo = read_slo({"x-slo-ttft-ms": "100", "x-llm-d-slo-ttft-ms": "900"}, ANYONE, CLASSES)
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
def test_a_malformed_bound_is_a_400_that_names_the_header(name: str, text: str) -> None:
    with pytest.raises(ApiError) as refused:
        read_slo({name: text}, ANYONE, CLASSES)
    assert (refused.value.status, refused.value.param) == (400, name)
    assert name in refused.value.message


def test_an_unknown_class_is_a_400_that_names_the_classes() -> None:
    with pytest.raises(ApiError) as refused:
        read_slo({"x-slo-class": "gold"}, ANYONE, CLASSES)
    assert (refused.value.status, refused.value.param, refused.value.code) == (400, "x-slo-class", "unknown_slo_class")
    assert "batch, chat" in refused.value.message


def test_a_class_the_key_may_not_use_is_a_403() -> None:
    key = ApiKey("someone", "chat", allowed_classes=frozenset({"chat"}))
    with pytest.raises(ApiError) as refused:
        read_slo({"x-slo-class": "batch"}, key, CLASSES)
    assert (refused.value.status, refused.value.param) == (403, "x-slo-class")


@pytest.mark.parametrize("bound", ["ttft", "tpot", "e2e"])
def test_a_bound_stricter_than_the_key_may_ask_for_is_a_403(bound: str) -> None:
    key = ApiKey("someone", "chat", least_bounds={bound: 0.1})
    assert read_slo({f"x-slo-{bound}-ms": "100"}, key, CLASSES)
    with pytest.raises(ApiError) as refused:
        read_slo({f"x-slo-{bound}-ms": "99.9"}, key, CLASSES)
    assert (refused.value.status, refused.value.param) == (403, f"x-slo-{bound}-ms")


@pytest.mark.parametrize(
    ("least_bounds", "least_ms"),
    [
        ({"ttft": 1.0, "tpot": 0.05}, 2000),  # of an end-to-end bound, the first token is given half at most
        ({"tpot": 0.05}, 50),
        ({"ttft": 1.0, "e2e": 0.3}, 300),  # the operator's own word counts
    ],
)
def test_an_end_to_end_bound_is_no_way_around_the_least_ttft_and_tpot(
    least_bounds: dict[str, float], least_ms: float
) -> None:
    key = ApiKey("someone", "chat", least_bounds=least_bounds)
    assert read_slo({"x-slo-e2e-ms": f"{least_ms}"}, key, CLASSES)[1].e2e_s == least_ms / 1000
    with pytest.raises(ApiError) as refused:
        read_slo({"x-slo-e2e-ms": f"{least_ms - 1}"}, key, CLASSES)
    assert (refused.value.status, refused.value.param) == (403, "x-slo-e2e-ms")
    assert f"less than {least_ms} ms" in refused.value.message
    assert ("min_e2e_ms" in refused.value.message) == ("e2e" not in least_bounds)


def test_a_classs_own_bounds_are_open_to_a_key_with_least_bounds() -> None:
    key = ApiKey("someone", "batch", least_bounds={"ttft": 10.0, "tpot": 1.0})
    assert read_slo({"x-slo-class": "chat"}, key, CLASSES)[1] == Slo(1.0, 0.05, None)


@given(st.sampled_from(NAMES), st.text(max_size=40) | st.floats().map(str) | st.integers().map(str))
def test_any_header_text_is_a_positive_finite_bound_or_a_400(name: str, text: str) -> None:
    try:
        _, slo = read_slo({name: text}, ANYONE, CLASSES)
    except ApiError as refused:
        assert (refused.status, refused.param) == (400, name)
    else:
        assert all(0 < bound < math.inf for bound in (slo.ttft_s, slo.tpot_s, slo.e2e_s) if bound is not None)


@given(st.text(max_size=40))
def test_any_class_name_is_known_or_a_400(name: str) -> None:
    try:
        assert read_slo({"x-slo-class": name}, ANYONE, CLASSES)[0].name == name
    except ApiError as refused:
        assert refused.status == 400


@settings(max_examples=20)
@given(ttft=st.floats(1e-3, 8e7), tpot=st.floats(1e-3, 8e7), e2e=st.floats(1e-3, 8e7))
def test_bounds_arrive_in_seconds(ttft: float, tpot: float, e2e: float) -> None:
    headers = {"x-slo-ttft-ms": repr(ttft), "x-slo-tpot-ms": repr(tpot), "x-slo-e2e-ms": repr(e2e)}
    assert read_slo(headers, ANYONE, CLASSES)[1] == Slo(ttft / 1000, tpot / 1000, e2e / 1000)


async def test_a_malformed_header_reaches_the_client_as_an_openai_error(antares: Live) -> None:
    answer = await antares.ask(x_slo_ttft_ms="soon")
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", "x-slo-ttft-ms")
    assert antares.gateway.ledger.accepted == 0
