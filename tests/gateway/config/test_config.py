"""Loading of configuration files, and the line, key and reason of every mistake."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.config.file import load
from gateway.config.mistakes import ConfigError
from gateway.config.schema import GatewayConfig
from tests.fixtures.live_gateway import gateway_config

SHIPPED = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
VALID = """\
server:
  port: 8100
engines:
  - kind: simulated
    name: one
policy:
  name: scorpio
  options: {eta: 1.3}
classes:
  chat: {ttft_ms: 500, tpot_ms: 50}
default_class: chat
"""


def write(path: Path, text: str) -> Path:
    file = path / "antares.yaml"
    file.write_text(textwrap.dedent(text))
    return file


def mistakes(file: Path, **options: Any) -> list[tuple[int, str, str]]:
    with pytest.raises(ConfigError) as wrong:
        load(file, **{"env": {}, **options})
    return [(m.line, m.key, m.reason) for m in wrong.value.mistakes]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_load_accepts_every_shipped_configuration(file: Path) -> None:
    config = load(file, env={})
    assert config.default_class in config.slo_classes()


@pytest.mark.parametrize(
    ("text", "replacement", "line", "key", "reason"),
    [
        ("port: 8100", "prot: 8100", 2, "server.prot", "unknown key; did you mean `port`?"),
        ("port: 8100", "port: many", 2, "server.port", "valid integer"),
        ("port: 8100", "port: 70000", 2, "server.port", "less than or equal to 65535"),
        ("kind: simulated", "kind: guess", 4, "engines[0]", "'vllm', 'http', 'simulated'"),
        ("kind: simulated", "model: x", 4, "engines[0].kind", "is missing"),
        ("kind: simulated", "kind: http\n    base_url: 10.0.0.1:8000", 5, "engines[0].base_url", "must begin with http://"),
        ("kind: simulated", "kind: http\n    base_url: http://a:80a0", 5, "engines[0].base_url", "must be an http"),
        ("kind: simulated", "kind: http\n    base_url: http://", 5, "engines[0].base_url", "must be an http or https"),
        ("kind: simulated", "kind: http\n    base_url: http://u:p@a", 5, "engines[0].base_url", "into api_key_env"),
        ("default_class", "predictor: {url: 'http://a:99999'}\ndefault_class", 11, "predictor.url", "must be an http"),
        ("name: one", "nmae: one", 5, "engines[0].nmae", "unknown key; did you mean `name`?"),
        ("name: one", "name: no spaces please", 5, "engines[0].name", "match pattern"),
        ("name: scorpio", "name: best", 6, "policy", "no policy is called 'best'"),
        ("policy:", "routing: {name: best}\npolicy:", 6, "routing", "no routing is called 'best'"),
        ("eta: 1.3", "etta: 1.3", 8, "policy.options.etta", "no option 'etta'; did you mean 'eta'?"),
        ("eta: 1.3", "eta: much", 6, "policy", "eta must be a number"),
        ("eta: 1.3", "eta: .nan", 6, "policy", "eta must be a number"),
        ("eta: 1.3", "eta: [1]", 8, "policy.options.eta", "should be a valid"),
        ("ttft_ms: 500", "ttft_ms: 0", 10, "classes.chat.ttft_ms", "greater than or equal to 0.001"),
        ("ttft_ms: 500", "ttft_ms: .inf", 10, "classes.chat.ttft_ms", "finite number"),
        ("ttft_ms: 500", "ttft: 500", 10, "classes.chat.ttft", "unknown key; did you mean `ttft_ms`?"),
        ("default_class: chat", "default_class: gold", 11, "default_class", "no class is called 'gold'; classes: chat"),
        ("default_class: chat", "", 1, "default_class", "is missing"),
        ("default_class: chat", "default_class: chat\ndefault_class: chat", 12, "default_class", "duplicate key"),
        ("  port: 8100", "  port: 8100\n  port: 8200", 3, "port", "duplicate key"),
        ("  port: 8100", "  host: 0.0.0.0", 2, "server.host", "no keys are configured"),
        ("  port: 8100", "  host: ''", 2, "server.host", "no keys are configured"),
        ("name: one", "name: one\n  - kind: simulated\n    name: one", 3, "engines", "names must be unique"),
        ("policy:", "keys: [{sha256: mine, tenant: t}]\npolicy:", 6, "keys[0].sha256", "antares config hash-key"),
        ("classes:\n  chat:", "classes:\n  http: {ttft_ms: -1}\n  chat:", 10, "classes.http.ttft_ms", "greater"),
    ],
)  # fmt: skip
def test_load_reports_line_key_and_reason_of_a_mistake(
    tmp_path: Path, text: str, replacement: str, line: int, key: str, reason: str
) -> None:
    assert text in VALID
    (mistake,) = mistakes(write(tmp_path, VALID.replace(text, replacement)))
    assert mistake[:2] == (line, key)
    assert reason in mistake[2]


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("section", "key", "reason"),
    [
        ("polices: {}", "polices", "did you mean `policy`?"),
        ("colour: red", "colour", "the keys here are server, limits, engines,"),
        ("limits: {stall: 3}", "limits.stall", "did you mean `stall_s`?"),
        ("tracing: {colour: red}", "tracing.colour", "the keys here are enabled, endpoint, sample_ratio"),
        (f"keys: [{{sha256: '{DIGEST}', tenant: t, wieght: 1}}]", "keys[0].wieght", "did you mean `weight`?"),
        ("shadow: [fcfs, {name: s3, optoins: {}}]", "shadow[1].optoins", "did you mean `options`?"),
        ("shadow: [fcfs, {name: slack, options: {max_wait: 1}}]", "shadow[1].options.max_wait", "mean 'max_wait_s'?"),
        ("shadow: [{name: scorpio, options: {x: 1}}]", "shadow[0].options.x", "its options: eta, prefill_lookahead"),
    ],
)
def test_unknown_key_is_reported_with_the_most_similar_key_or_all(
    tmp_path: Path, section: str, key: str, reason: str
) -> None:
    (mistake,) = mistakes(write(tmp_path, VALID + section + "\n"))
    assert mistake[:2] == (12, key)
    assert reason in mistake[2]


@pytest.mark.parametrize(
    ("engine", "key", "reason"),
    [
        ("kind: simulated, step_times: {gamma: 1}", "step_times.gamma", "keys here are a, b, c, d, alpha, beta"),
        ("kind: http, base_url: 'http://a', discover: {fil: x}", "discover.fil", "did you mean `file`?"),
        (
            "kind: http, base_url: 'http://a', prifile: x",
            "prifile",
            "the keys here are kind, name, base_url, discover,",
        ),
        ("kind: vllm, model: m, hang_timeout: 9", "hang_timeout", "did you mean `hang_timeout_s`?"),
    ],
)
def test_unknown_key_of_an_engine_is_compared_with_those_of_its_kind(
    tmp_path: Path, engine: str, key: str, reason: str
) -> None:
    (mistake,) = mistakes(write(tmp_path, VALID.replace("    name: one\n", f"    name: one\n  - {{{engine}}}\n")))
    assert mistake[:2] == (6, f"engines[1].{key}")
    assert reason in mistake[2]


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        (f"[{{sha256: '{DIGEST}', tenant: t, default_class: gold}}]", "keys[0]", "no class is called 'gold'"),
        (f"[{{sha256: '{DIGEST}', tenant: t, allowed_classes: [gold]}}]", "keys[0]", "no class is called 'gold'"),
        (f"[{{sha256: '{DIGEST}', tenant: a}}, {{sha256: '{DIGEST}', tenant: b}}]", "keys[1]", "same digest"),
        (
            f"[{{sha256: '{DIGEST}', tenant: a}}, {{sha256: '{'0' * 64}', tenant: a, weight: 2}}]",
            "keys[1]",
            "another weight",
        ),
        (f"[{{sha256: '{DIGEST}', tenant: t, allowed_classes: []}}]", "keys[0]", "is not in allowed_classes"),
    ],
)
def test_load_rejects_inconsistent_keys(tmp_path: Path, keys: str, key: str, reason: str) -> None:
    (mistake,) = mistakes(write(tmp_path, VALID + f"keys: {keys}\n"))
    assert mistake[:2] == (12, key)
    assert reason in mistake[2]


def test_load_reports_all_mistakes(tmp_path: Path) -> None:
    text = VALID.replace("port: 8100", "prot: 1").replace("500", "-1").replace("name: one", "max_num_seqs: 0")
    assert [line for line, _, _ in mistakes(write(tmp_path, text))] == [2, 5, 10]


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b", "hello", "a: [", "a: \x01", "a: 2024-99-99", "? [a]\n: b", "a: &a [*a]\n" + VALID, "[" * 500,
     "a: !!python/object:os.x {}"],
)  # fmt: skip
def test_load_reports_invalid_yaml_as_a_mistake(tmp_path: Path, text: str) -> None:
    file = tmp_path / "antares.yaml"
    file.write_text(text)
    assert mistakes(file)


def test_load_reports_a_file_that_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "antares.yaml"
    file.write_text(VALID + "#" * (16 << 20))
    with pytest.raises(ConfigError, match="is larger than 16 MiB"):
        load(file)
    with pytest.raises(ConfigError, match="is larger than 16 MiB"):
        load(Path("/dev/zero"))


def test_load_reports_an_unreadable_file_as_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        assert "cannot be read" in mistakes(file)[0][2]


def test_load_prefers_overrides_then_environment_then_file(tmp_path: Path) -> None:
    file = write(tmp_path, VALID)
    env = {"ANTARES_PORT": "8200", "ANTARES_PREDICTOR_URL": "http://p:1", "ANTARES_HOST": ""}
    assert load(file, env={}).server.port == 8100
    assert load(file, env=env).server.port == 8200
    assert load(file, env=env).predictor.url == "http://p:1"
    assert load(file, env=env).server.host == "127.0.0.1"
    assert load(file, env=env, overrides={"server.port": 8300}).server.port == 8300
    assert load(file, env={}, overrides={"policy": {"name": "fcfs"}}).policy.name == "fcfs"


def test_load_names_the_environment_variable_of_a_mistake(tmp_path: Path) -> None:
    ((_, key, reason),) = mistakes(write(tmp_path, VALID), env={"ANTARES_PORT": "many"})
    assert key == "server.port"
    assert "ANTARES_PORT" in reason


def test_api_keys_convert_bounds_to_seconds(tmp_path: Path) -> None:
    keys = f"keys: [{{sha256: '{DIGEST}', tenant: t, min_ttft_ms: 100, allowed_classes: [chat]}}]\n"
    (key,) = load(write(tmp_path, VALID + keys), env={}).api_keys()
    assert (key.default_class, key.least_bounds, key.allowed_classes) == ("chat", {"ttft": 0.1}, frozenset({"chat"}))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [("min_ttft_ms: 100", True), ("min_tpot_ms: 9", True), ("min_tpot_ms: 9, min_e2e_ms: 500", False),
     ("min_e2e_ms: 500", False), ("default_class: chat", False)],
)  # fmt: skip
def test_cautions_name_a_key_without_min_e2e_ms(tmp_path: Path, bounds: str, expected: bool) -> None:
    cautions = load(
        write(tmp_path, VALID + f"keys: [{{sha256: '{DIGEST}', tenant: t, {bounds}}}]\n"), env={}
    ).cautions()
    assert [("keys[0]" in text, "min_e2e_ms" in text) for text in cautions] == [(True, True)] * expected


def test_load_accepts_a_public_address_only_if_protected_or_allowed(tmp_path: Path) -> None:
    public = VALID.replace("port: 8100", "host: 0.0.0.0")
    assert load(write(tmp_path, public + f"keys: [{{sha256: '{DIGEST}', tenant: t}}]\n"), env={})
    assert load(write(tmp_path, public.replace("0.0.0.0", "0.0.0.0\n  allow_anonymous: true")), env={})
    assert load(write(tmp_path, public.replace("0.0.0.0", "'::1'")), env={})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


OLD_NAMES = "name: slack, options: {thrift: 0.1, runway_steps: 2}"


@pytest.mark.parametrize("section", [f"policy: {{{OLD_NAMES}}}", f"shadow: [{{{OLD_NAMES}}}]"])
def test_load_accepts_old_option_names_with_one_warning_each(tmp_path: Path, section: str) -> None:
    file = write(tmp_path, f"engines: [{{kind: simulated}}]\n{section}\nclasses: {{chat: {{}}}}\ndefault_class: chat\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = load(file, env={})
        config.shadow_policies()
    assert [w.category for w in caught] == [FutureWarning, FutureWarning]
    assert ["cost_weight" in str(w.message) for w in caught] == [True, False]
    options = (config.shadow or [config.policy])[0].options
    assert options == {"cost_weight": 0.1, "prefill_lookahead_steps": 2}


@given(st.dictionaries(st.sampled_from([*GatewayConfig.model_fields, "other"]), VALUES))
def test_load_reports_any_invalid_document_as_mistakes(tmp_path_factory: Any, document: dict[str, Any]) -> None:
    import yaml

    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    assert mistakes(file)


def test_models_and_failover_are_read() -> None:
    engine = {
        "kind": "http",
        "base_url": "http://a",
        "aliases": {"gpt": "llama"},
        "models": ["llama"],
        "any_model": True,
    }
    vllm = {"kind": "vllm", "model": "m", "served_model_name": ["a", "b"]}
    config = gateway_config(engines=[engine, vllm], failover={"retry_ratio": 0.5, "first_token_timeout_s": None})
    assert (config.engines[0].aliases, config.engines[1].served_model_name) == ({"gpt": "llama"}, ["a", "b"])
    assert (config.failover.retry_ratio, config.failover.first_token_timeout_s) == (0.5, None)


@pytest.mark.parametrize(
    ("engine", "key"),
    [
        ({"aliases": {"": "x"}}, "aliases"),
        ({"aliases": {"x": "y" * 300}}, "aliases"),
        ({"aliases": ["x"]}, "aliases"),
        ({"models": [""]}, "models"),
    ],
)
def test_bad_model_names_are_mistakes(engine: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        gateway_config(engines=[{"kind": "simulated", **engine}])


@pytest.mark.parametrize("failover", [{"retry_ratio": 1.5}, {"max_rest_s": 0}, {"first_token_timeout_s": 0}, {"x": 1}])
def test_bad_failover_settings_are_mistakes(failover: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        gateway_config(failover=failover)
