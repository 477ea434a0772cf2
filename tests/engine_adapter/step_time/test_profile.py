from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_adapter.step_time.profile import (
    Profile,
    Regime,
    load_profile,
    profile_document,
    profile_names,
    save_profile,
)

SHIPPED = profile_names()
FITTED = [name for name in SHIPPED if load_profile(name).quality]
coefficients = st.floats(0, 1e-2, allow_subnormal=False)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    bounds = sorted(draw(st.sets(st.integers(1, 4096), max_size=5)))
    regimes = tuple(Regime(b, *draw(st.tuples(*[coefficients] * 9))) for b in [*map(float, bounds), math.inf])
    limits = (64, 512, 2048, 10_000, draw(st.booleans()))
    return Profile("made up", "for a test", {"source": "hypothesis"}, regimes, *limits, {"itl": {"r2": 1}})


def linear(**coefficients: float) -> Profile:
    fields = ("base", "per_token", "per_prefill_token", "per_decode", "per_decode_context", "per_prefill_context")
    regime = Regime(math.inf, *(coefficients.pop(name, 0.0) for name in fields), **coefficients)
    return Profile("linear", "", {}, (regime,), 256, 2048, 8192, 400_000)


@given(st.integers(0, 256), st.integers(0, 2000), st.integers(0, 2048), st.integers(0, 8192))
def test_niyama_profile_equals_the_published_formula(decodes: int, length: int, prefill: int, before: int) -> None:
    tokens, context = decodes + prefill, decodes * length
    if tokens <= 512:
        expected = 0.014936 + 5.882e-5 * tokens + 2.248e-5 * prefill + 3.635e-5 * decodes + 1.111e-7 * context
        expected += 7.555e-7 * before if prefill else 0.0
    else:
        expected = 0.005004 + 2.719e-5 * tokens + 6.863e-5 * prefill - 4.144e-5 * decodes + 1.663e-7 * context
        expected += 2.727e-6 * before if prefill else 0.0
    seconds = load_profile("niyama-a100").step_seconds(decodes, context, prefill, before)
    assert seconds == pytest.approx(expected if tokens else 0.0, rel=1e-12)


@given(st.integers(1, 256), st.integers(0, 2048), st.integers(0, 400_000))
def test_blis_profile_equals_the_published_formula(decodes: int, prefill: int, context: int) -> None:
    seconds = load_profile("blis-a100").step_seconds(decodes, context, prefill, 0)
    assert seconds * 1e6 == pytest.approx(16441.5315 + 47.837412 * prefill + 18.205606 * decodes, rel=1e-6)


@pytest.mark.parametrize("name", SHIPPED)
def test_step_without_tokens_takes_no_time(name: str) -> None:
    assert load_profile(name).step_seconds(0, 0, 0, 0) == 0.0


@given(
    profiles(), st.integers(0, 300), st.integers(0, 9000), st.integers(0, 4000), st.integers(0, 9000), st.integers(0, 3)
)
def test_more_work_in_a_regime_never_takes_less_time(
    profile: Profile, decodes: int, context: int, prefill: int, before: int, which: int
) -> None:
    less = [decodes, context, prefill, before]
    more = [value + (index == which) for index, value in enumerate(less)]
    bounds = [regime.up_to_tokens for regime in profile.regimes]
    if sum(b < less[0] + less[2] for b in bounds) == sum(b < more[0] + more[2] for b in bounds):
        assert profile.step_seconds(*less) <= profile.step_seconds(*more) * (1 + 1e-12)


@pytest.mark.parametrize("name", FITTED)
@given(st.integers(0, 256), st.integers(0, 400_000), st.integers(0, 2048), st.integers(0, 8192))
def test_one_more_token_never_makes_a_fitted_step_faster(
    name: str, decodes: int, context: int, prefill: int, before: int
) -> None:
    profile = load_profile(name)
    seconds = profile.step_seconds(decodes, context, prefill, before)
    assert seconds <= profile.step_seconds(decodes + 1, context, prefill, before) + 1e-12
    assert seconds <= profile.step_seconds(decodes, context, prefill + 1, before) + 1e-12


def test_regime_bound_is_inclusive() -> None:
    slow, fast = Regime(10, 1.0, 0, 0, 0, 0, 0), Regime(math.inf, 2.0, 0, 0, 0, 0, 0)
    profile = replace(linear(), regimes=(slow, fast))
    assert (profile.step_seconds(0, 0, 10, 0), profile.step_seconds(1, 0, 10, 0)) == (1.0, 2.0)


def test_chunk_cost_counts_its_query_key_pairs() -> None:
    profile = linear(per_prefill_pair=1e-9)
    assert profile.step_seconds(0, 0, 100, 400) == pytest.approx(1e-9 * 100 * (400 + 50))
    # Each of four prompts of 25 tokens attends to its own 100 computed tokens and to itself.
    assert profile.step_seconds(0, 0, 100, 400, 4) == pytest.approx(1e-9 * 4 * 25 * (100 + 12.5))


def test_decode_and_prefill_have_fixed_costs() -> None:
    profile = linear(base=1.0, per_decode_step=0.25, per_prefill_step=0.5)
    steps = [(1, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0)]
    assert [profile.step_seconds(*step) for step in steps] == [1.25, 1.5, 1.75]


# --- SCORPIO's two forms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_step_times_follow_the_profile_over_its_operating_range(name: str) -> None:
    profile = load_profile(name)
    times = profile.step_times()
    for batch in (1, 8, 32, 100, 256):
        for length in (100, 1000):
            assert times.itl(batch, length) == pytest.approx(profile.step_seconds(batch, batch * length, 0, 0), rel=0.2)
    for tokens in (256, 700, 2000):
        assert times.prefill(tokens) == pytest.approx(profile.step_seconds(0, 0, tokens, 0), rel=0.12)


@pytest.mark.parametrize("name", SHIPPED)
def test_fixed_itl_is_that_of_one_short_sequence(name: str) -> None:
    profile = load_profile(name)
    assert profile.step_times().d == pytest.approx(profile.step_seconds(1, 32, 0, 0), rel=0.1)


def test_step_times_are_fitted_once() -> None:
    profile = load_profile("blis-a100")
    assert profile.step_times() is profile.step_times()


# --- files ----------------------------------------------------------------------------------------------------------


@given(profiles())
def test_saved_profile_loads_unchanged(tmp_path_factory: pytest.TempPathFactory, profile: Profile) -> None:
    path = tmp_path_factory.mktemp("profiles") / "made-up.json"
    save_profile(profile, path)
    assert load_profile(path) == profile
    assert "Infinity" not in path.read_text()


def test_profile_can_be_pickled() -> None:
    profile = load_profile("niyama-a100")
    copy = pickle.loads(pickle.dumps(profile))
    assert copy == profile
    assert copy.step_seconds(3, 900, 100, 0) == profile.step_seconds(3, 900, 100, 0)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profile_has_provenance_and_its_file_name(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert {"source", "date", "units", "licence", "kv_tokens"} <= profile.provenance.keys()


@pytest.mark.parametrize(
    "name", [name for name in FITTED if "aiconfigurator" in load_profile(name).provenance["source"]]
)
def test_kernel_timing_profiles_fit_better_than_the_papers(name: str) -> None:
    quality = load_profile(name).quality
    assert min(quality[kind]["r2"] for kind in ("prefill", "itl")) > 0.994
    assert max(quality[kind]["mape"] for kind in ("prefill", "itl")) < 0.022


@pytest.mark.parametrize("name", FITTED)
def test_documented_quality_equals_the_profile_quality(name: str) -> None:
    fits = [load_profile(name).quality[kind] for kind in ("prefill", "itl", "mixed")]
    cells = [f"{fit['r2']:.4f} | {fit['rmse_ms']:.3f} | {100 * fit['mape']:.2f}%" for fit in fits]
    page = Path(__file__).parents[3] / "docs" / "profiles.md"
    assert f"| `{name}` | {' | '.join(cells)} |" in page.read_text()


def test_unknown_profile_error_lists_shipped_profiles() -> None:
    with pytest.raises(ValueError, match=r"no profile 'h900'.*niyama-a100"):
        load_profile("h900")
    with pytest.raises(ValueError, match=r"no profile 'nowhere/x\.json'"):
        load_profile("nowhere/x.json")


def without(key: str) -> Any:
    return lambda document: document.pop(key)


def with_regime(**values: Any) -> Any:
    return lambda document: document["regimes"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("name"), "a profile needs name"),
        (without("format"), "format is None"),
        (lambda d: d.update(colour="red"), "a profile has no field 'colour'; its fields: name, description"),
        (lambda d: d.update(kv_token=d.pop("kv_tokens")), r"no field 'kv_token'; did you mean 'kv_tokens'\?"),
        (with_regime(bse=1), r"regimes\[0\] has no field 'bse'; did you mean 'base'\?"),
        (lambda d: d.update(max_num_seqs=1.5), "max_num_seqs must be a whole number, not float"),
        (lambda d: d.update(kv_tokens=True), "kv_tokens must be a whole number, not bool"),
        (lambda d: d.update(plans_ahead=1), "plans_ahead must be true or false"),
        (lambda d: d.update(kv_tokens=0), "kv_tokens must be positive"),
        (lambda d: d.update(regimes=[]), "regimes need increasing up_to_tokens"),
        (lambda d: d.update(regimes={}), "regimes must be a list"),
        (lambda d: d["regimes"].reverse(), "regimes need increasing up_to_tokens, the last one infinite"),
        (lambda d: d["regimes"].append(3), r"regimes\[2\] must be an object, not int"),
        (lambda d: d["regimes"][0].pop("base"), r"regimes\[0\] needs base"),
        (with_regime(base="1"), r"regimes\[0\].base must be a number, not str"),
        (with_regime(base=math.nan), r"regimes\[0\].base must be a finite number"),
        (with_regime(base=math.inf), r"regimes\[0\].base must be a finite number"),
    ],
)
def test_invalid_profile_error_names_path_and_fault(tmp_path: Path, change: Any, message: str) -> None:
    document = json.loads(json.dumps(profile_document(load_profile("niyama-a100"))))
    change(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
        load_profile(path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b'"text"'])
def test_unreadable_profile_error_names_the_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json: "):
        load_profile(path)
