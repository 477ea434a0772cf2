"""A configuration file is right, or every mistake in it is named: line, key, reason."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.file import ConfigError, load
from gateway.config.schema import GatewayConfig

SHIPPED = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
GOOD = """\
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
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    config = load(file, env={})
    assert config.default_class in config.slo_classes()


@pytest.mark.parametrize(
    ("good", "bad", "line", "key", "reason"),
    [
        ("port: 8100", "prot: 8100", 2, "server.prot", "is not a key here"),
        ("port: 8100", "port: many", 2, "server.port", "valid integer"),
        ("port: 8100", "port: 70000", 2, "server.port", "less than or equal to 65535"),
        ("kind: simulated", "kind: guess", 4, "engines[0]", "'vllm', 'http', 'simulated'"),
        ("kind: simulated", "model: x", 4, "engines[0].kind", "is missing"),
        ("name: one", "nmae: one", 5, "engines[0].nmae", "is not a key here"),
        ("name: one", "name: no spaces please", 5, "engines[0].name", "match pattern"),
        ("name: scorpio", "name: best", 6, "policy", "no policy is called 'best'"),
        ("eta: 1.3", "etta: 1.3", 6, "policy", "no option 'etta'"),
        ("eta: 1.3", "eta: much", 6, "policy", "eta must be a number"),
        ("eta: 1.3", "eta: .nan", 6, "policy", "eta must be a number"),
        ("eta: 1.3", "eta: [1]", 8, "policy.options.eta", "should be a valid"),
        ("ttft_ms: 500", "ttft_ms: 0", 10, "classes.chat.ttft_ms", "greater than or equal to 0.001"),
        ("ttft_ms: 500", "ttft_ms: .inf", 10, "classes.chat.ttft_ms", "finite number"),
        ("ttft_ms: 500", "ttft: 500", 10, "classes.chat.ttft", "is not a key here"),
        ("default_class: chat", "default_class: gold", 11, "default_class", "no class is called 'gold'; classes: chat"),
        ("default_class: chat", "", 1, "default_class", "is missing"),
        ("default_class: chat", "default_class: chat\ndefault_class: chat", 12, "default_class", "a second time"),
        ("  port: 8100", "  port: 8100\n  port: 8200", 3, "port", "a second time"),
        ("  port: 8100", "  host: 0.0.0.0", 2, "server.host", "no keys are configured"),
        ("  port: 8100", "  host: ''", 2, "server.host", "no keys are configured"),
        ("name: one", "name: one\n  - kind: simulated\n    name: one", 3, "engines", "a name of its own"),
        ("policy:", "keys: [{sha256: mine, tenant: t}]\npolicy:", 6, "keys[0].sha256", "antares config hash-key"),
        ("classes:\n  chat:", "classes:\n  http: {ttft_ms: -1}\n  chat:", 10, "classes.http.ttft_ms", "greater"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_line_key_and_reason(
    tmp_path: Path, good: str, bad: str, line: int, key: str, reason: str
) -> None:
    assert good in GOOD
    ((found_line, found_key, found_reason),) = mistakes(write(tmp_path, GOOD.replace(good, bad)))
    assert (found_line, found_key) == (line, key)
    assert reason in found_reason


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("keys", "key", "reason"),
    [
        (f"[{{sha256: '{DIGEST}', tenant: t, default_class: gold}}]", "keys[0]", "no class is called 'gold'"),
        (f"[{{sha256: '{DIGEST}', tenant: t, allowed_classes: [gold]}}]", "keys[0]", "no class is called 'gold'"),
        (f"[{{sha256: '{DIGEST}', tenant: a}}, {{sha256: '{DIGEST}', tenant: b}}]", "keys[1]", "same digest"),
        (f"[{{sha256: '{DIGEST}', tenant: t, allowed_classes: []}}]", "keys[0]", "not among its allowed_classes"),
    ],
)
def test_keys_that_contradict_the_rest_are_mistakes(tmp_path: Path, keys: str, key: str, reason: str) -> None:
    ((line, found, why),) = mistakes(write(tmp_path, GOOD + f"keys: {keys}\n"))
    assert (line, found) == (12, key)
    assert reason in why


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("port: 8100", "prot: 1").replace("500", "-1").replace("name: one", "max_num_seqs: 0")
    assert [line for line, _, _ in mistakes(write(tmp_path, text))] == [2, 5, 10]


@pytest.mark.parametrize(
    "text",
    ["", "- a\n- b", "hello", "a: [", "a: \x01", "a: 2024-99-99", "? [a]\n: b", "a: &a [*a]\n" + GOOD, "[" * 500,
     "a: !!python/object:os.x {}"],
)  # fmt: skip
def test_what_is_no_usable_yaml_is_a_mistake_and_no_traceback(tmp_path: Path, text: str) -> None:
    file = tmp_path / "antares.yaml"
    file.write_text(text)
    assert mistakes(file)


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        assert "cannot be read" in mistakes(file)[0][2]


def test_overrides_win_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    env = {"ANTARES_PORT": "8200", "ANTARES_PREDICTOR_URL": "http://p:1", "ANTARES_HOST": ""}
    assert load(file, env={}).server.port == 8100
    assert load(file, env=env).server.port == 8200
    assert load(file, env=env).predictor.url == "http://p:1"
    assert load(file, env=env).server.host == "127.0.0.1"
    assert load(file, env=env, overrides={"server.port": 8300}).server.port == 8300
    assert load(file, env={}, overrides={"policy": {"name": "fcfs"}}).policy.name == "fcfs"


def test_a_mistake_in_the_environment_is_blamed_on_the_variable(tmp_path: Path) -> None:
    ((_, key, reason),) = mistakes(write(tmp_path, GOOD), env={"ANTARES_PORT": "many"})
    assert key == "server.port"
    assert "ANTARES_PORT" in reason


def test_keys_arrive_in_the_gateways_terms(tmp_path: Path) -> None:
    keys = f"keys: [{{sha256: '{DIGEST}', tenant: t, min_ttft_ms: 100, allowed_classes: [chat]}}]\n"
    (key,) = load(write(tmp_path, GOOD + keys), env={}).api_keys()
    assert (key.default_class, key.least_bounds, key.allowed_classes) == ("chat", {"ttft": 0.1}, frozenset({"chat"}))


@pytest.mark.parametrize(
    ("bounds", "cautious"),
    [("min_ttft_ms: 100", True), ("min_tpot_ms: 9", True), ("min_tpot_ms: 9, min_e2e_ms: 500", False),
     ("min_e2e_ms: 500", False), ("default_class: chat", False)],
)  # fmt: skip
def test_a_key_with_a_least_ttft_or_tpot_alone_is_cautioned_about(tmp_path: Path, bounds: str, cautious: bool) -> None:
    cautions = load(write(tmp_path, GOOD + f"keys: [{{sha256: '{DIGEST}', tenant: t, {bounds}}}]\n"), env={}).cautions()
    assert [("keys[0]" in text, "min_e2e_ms" in text) for text in cautions] == [(True, True)] * cautious


def test_a_reachable_address_is_fine_with_keys_or_by_declaration(tmp_path: Path) -> None:
    open_to_all = GOOD.replace("port: 8100", "host: 0.0.0.0")
    assert load(write(tmp_path, open_to_all + f"keys: [{{sha256: '{DIGEST}', tenant: t}}]\n"), env={})
    assert load(write(tmp_path, open_to_all.replace("0.0.0.0", "0.0.0.0\n  allow_anonymous: true")), env={})
    assert load(write(tmp_path, open_to_all.replace("0.0.0.0", "'::1'")), env={})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*GatewayConfig.model_fields, "other"]), VALUES))
def test_any_document_is_valid_or_a_list_of_mistakes(tmp_path_factory: Any, document: dict[str, Any]) -> None:
    import yaml

    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    assert mistakes(file)
