"""The keys file: reading, mistakes with their place, and writing in one step."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.api.auth import hash_key
from gateway.config.file import load
from gateway.config.keys_file import read_keys, write_keys
from gateway.config.mistakes import ConfigError

CONFIG = """\
engines: [{kind: simulated}]
predictor: {enabled: false}
classes: {chat: {}, batch: {}}
default_class: chat
keys_file: keys.json
"""

DIGEST = hash_key("alice-0123456789abcdef")


def configured(folder: Path, keys: Any, config: str = CONFIG) -> Path:
    file = folder / "gateway.yaml"
    file.write_text(config)
    (folder / "keys.json").write_text(keys if isinstance(keys, str) else json.dumps({"keys": keys}, indent=1))
    return file


def test_load_reads_the_keys_file_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = configured(tmp_path, [{"sha256": DIGEST, "tenant": "alice", "allowed_classes": ["chat"]}])
    monkeypatch.chdir("/")
    config = load(file)
    assert [(key.tenant, key.allowed_classes) for key in config.api_keys()] == [("alice", {"chat"})]
    assert config.requires_key


def test_gateway_without_keys_in_its_keys_file_requires_one(tmp_path: Path) -> None:
    config = load(configured(tmp_path, [], CONFIG + "server: {host: 0.0.0.0}\n"))
    assert (config.api_keys(), config.requires_key) == ([], True)


@pytest.mark.parametrize(
    ("keys", "line", "key", "reason"),
    [
        ([{"tenant": "a"}], 3, "keys[0].sha256", "is missing"),
        ([{"sha256": "the-key-itself-0123456789", "tenant": "a"}], 4, "keys[0].sha256", "hash-key"),
        ([{"sha256": DIGEST, "tenant": "a", "wieght": 2}], 6, "keys[0].wieght", "unknown key; did you mean `weight`?"),
        ([{"sha256": DIGEST, "tenant": "a"}, {"sha256": DIGEST, "tenant": "b"}], 7, "keys[1]", "same digest"),
        ([{"sha256": DIGEST, "tenant": "a", "default_class": "foo"}], 3, "keys[0]", "no class is called 'foo'"),
        ([1], 3, "keys[0]", "valid dictionary"),
        ("{", 1, "", "not JSON"),
        ('{"keys": [],\n "keys": []}', 1, "", "duplicate key 'keys'"),
        ('{"keys": [{"a": 1, "a": 2}]}', 1, "", "duplicate key 'a'"),
        ('{"keys": {}}', 1, "", "a list"),
        ('{"keys": [], "more": 1}', 1, "", "one member"),
        ("[]", 1, "", "must be an object"),
        ("[" * 100_000, 1, "", "not JSON"),
        ("{}", 1, "", "one member"),
        ("", 1, "", "not JSON"),
    ],
)
def test_load_names_file_line_and_key_of_a_mistake(tmp_path: Path, keys: Any, line: int, key: str, reason: str) -> None:
    file = configured(tmp_path, keys)
    with pytest.raises(ConfigError) as raised:
        load(file)
    (mistake,) = raised.value.mistakes
    assert raised.value.path == tmp_path / "keys.json"
    assert (mistake.line, mistake.key) == (line, key)
    assert reason in mistake.reason
    assert "the-key-itself" not in str(raised.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"keys": ["\xff"]}'])
def test_keys_file_that_is_no_text_is_a_mistake(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys.json").write_bytes(content)
    with pytest.raises(ConfigError, match="not JSON"):
        read_keys(tmp_path / "keys.json")


def test_absent_keys_file_says_how_to_make_it(tmp_path: Path) -> None:
    file = configured(tmp_path, [])
    (tmp_path / "keys.json").unlink()
    with pytest.raises(ConfigError, match="antares key new"):
        load(file)


@pytest.mark.parametrize("named", ["{path: keys.json, keys: []}", "[keys.json]", "7"])
def test_keys_file_must_be_a_path(tmp_path: Path, named: str) -> None:
    with pytest.raises(ConfigError, match="keys_file: must be the path of a file"):
        load(configured(tmp_path, [], CONFIG.replace("keys.json", named)))


def test_mistake_between_both_files_is_in_the_keys_file(tmp_path: Path) -> None:
    config = CONFIG + f"keys: [{{sha256: {DIGEST}, tenant: alice, weight: 2}}]\n"
    with pytest.raises(ConfigError, match=r"line 3: .*another key has the same digest"):
        load(configured(tmp_path, [{"sha256": DIGEST, "tenant": "bob"}], config))
    with pytest.raises(ConfigError, match="has another weight"):
        load(configured(tmp_path, [{"sha256": hash_key("another"), "tenant": "alice"}], config))


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_write_keys_replaces_the_file_in_one_step_for_its_owner_only(tmp_path: Path) -> None:
    target, link = tmp_path / "real.json", tmp_path / "keys.json"
    target.write_text("{}")
    target.chmod(0o644)
    link.symlink_to(target)
    with target.open() as before:
        write_keys(link, [{"tenant": "a"}])
        assert before.read() == "{}", "who reads the file meanwhile sees the old one whole"
    assert link.is_symlink()
    assert read_keys(link) == [{"tenant": "a"}]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert sorted(file.name for file in tmp_path.iterdir()) == ["keys.json", "real.json"]


def test_write_keys_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.json"
    write_keys(file, [])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_keys(file, [{"tenant": "a"}])
    assert (read_keys(file), list(tmp_path.iterdir())) == ([], [file])
