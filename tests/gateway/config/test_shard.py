"""`shard`: which share of the engines a gateway has, and what it divides."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.config.file import load
from gateway.config.mistakes import ConfigError
from gateway.config.shard import ShardConfig
from gateway.scheduling.shards import Shard
from tests.fixtures.live_gateway import gateway_config

FILE = """\
engines: [{kind: simulated}]
shard: {index: 1, count: 3}
classes: {chat: {}}
default_class: chat
"""


def http(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "http", "name": name, "base_url": f"http://{name}.test:8000", **more}


def write(folder: Path, text: str = FILE) -> Path:
    (folder / "antares.yaml").write_text(text)
    return folder / "antares.yaml"


def test_gateway_without_section_has_all_engines() -> None:
    assert gateway_config().shard.shard() == Shard(0, 1)


def test_variables_of_the_environment_set_the_share(tmp_path: Path) -> None:
    assert load(write(tmp_path), env={}).shard.shard() == Shard(1, 3)
    env = {"ANTARES_SHARD_INDEX": "2", "ANTARES_SHARD_COUNT": "4"}
    assert load(write(tmp_path), env=env).shard.shard() == Shard(2, 4)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("3", "index is 3, but 3 gateways have the indexes 0 to 2"),
        ("-1", "greater than or equal to 0"),
        ("gateway-1", "valid integer"),
    ],
)
def test_bad_index_names_the_fix(tmp_path: Path, value: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as wrong:
        load(write(tmp_path), env={"ANTARES_SHARD_INDEX": value})
    assert wrong.value.mistakes[0].key.startswith("shard")


@pytest.mark.parametrize("count", [0, 65, "many"])
def test_bad_count_is_refused(count: Any) -> None:
    with pytest.raises(ValidationError, match=r"shard\.count"):
        gateway_config(shard={"index": 0, "count": count})


@pytest.mark.parametrize(
    ("host", "expected"), [("gateway-2", 2), ("gateway-0.antares.svc", 0), ("node07", 7), ("vm-10", 10)]
)
def test_index_is_the_number_at_the_end_of_the_host_name(host: str, expected: int) -> None:
    assert ShardConfig(count=16).shard(host) == Shard(expected, 16)


@pytest.mark.parametrize("host", ["gateway", "gateway-4", "7f3a9c-x", ""])
def test_host_without_usable_number_is_an_error_with_the_fix(host: str) -> None:
    with pytest.raises(ValueError, match=r"set shard\.index or ANTARES_SHARD_INDEX"):
        ShardConfig(count=4).shard(host)


def test_host_name_counts_only_when_the_share_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop")
    config = gateway_config(shard={"count": 2})
    with pytest.raises(ValueError, match="laptop"):
        config.shard.shard()


def test_limits_of_tenants_are_divided() -> None:
    key = {"sha256": "0" * 64, "tenant": "a", "requests_per_minute": 61, "tokens_per_minute": 1000, "max_concurrent": 2}
    parts = [gateway_config(keys=[key], shard={"index": index, "count": 4}).tenant_limits()["a"] for index in range(4)]
    assert [part.requests_per_minute for part in parts] == [16, 15, 15, 15]
    assert [part.tokens_per_minute for part in parts] == [250] * 4
    assert [part.max_concurrent for part in parts] == [1] * 4
    assert {part.largest_prompt for part in parts} == {1000}
    whole = gateway_config(keys=[key]).tenant_limits()["a"]
    assert (whole.requests_per_minute, whole.largest_prompt) == (61, None)


def test_pool_that_is_smaller_than_the_gateways_is_a_caution() -> None:
    engines = [http("main-1"), http("main-2"), http("large")]
    (caution,) = gateway_config(engines=engines, shard={"index": 0, "count": 2}).cautions()
    assert "2 gateways divide 1 engines called 'large'" in caution
    assert gateway_config(engines=engines).cautions() == []
    found = [http("large", discover={}), {"kind": "simulated", "name": "own"}]
    assert gateway_config(engines=found, shard={"index": 0, "count": 2}).cautions() == []
