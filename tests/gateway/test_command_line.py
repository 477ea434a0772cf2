"""The `antares` command, as a shell sees it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.api.auth import hash_key
from gateway.cli import app

CONFIGS = Path(__file__).parents[2] / "configs"
HEAVY = "vllm torch transformers ray"
NO_HEAVY_IMPORTS = f"loaded = set('{HEAVY}'.split()) & set(sys.modules); assert not loaded, loaded"
RUNNER = CliRunner()


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=20, check=False
    )


@pytest.fixture
def bad_config(tmp_path: Path) -> Path:
    file = tmp_path / "bad.yaml"
    file.write_text("engines: [{kind: simulated}]\nclasses: {chat: {ttft_ms: -1}}\ndefault_class: chat\n")
    return file


def test_the_command_lines_module_loads_nothing_heavy() -> None:
    done = python(f"import sys, gateway.cli, gateway.app; {NO_HEAVY_IMPORTS}")
    assert done.returncode == 0, done.stderr


def test_help_comes_at_once() -> None:
    started = time.monotonic()
    done = python("import sys; sys.argv = ['antares', '--help']; from gateway.cli import main; main()")
    assert time.monotonic() - started < 5
    assert done.returncode == 0
    assert "serve" in done.stdout


def test_serving_a_bad_configuration_exits_2_before_anything_heavy_loads(bad_config: Path) -> None:
    code = f"""
import sys
sys.argv = ["antares", "serve", "-c", {str(bad_config)!r}]
from gateway.cli import main
try:
    main()
finally:
    {NO_HEAVY_IMPORTS}
"""
    done = python(code)
    assert done.returncode == 2
    assert "line 2: classes.chat.ttft_ms" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments", [["serve"], ["serve", "-c", "/nowhere.yaml"], ["no-such-command"], ["serve", "-x"]]
)
def test_bad_usage_exits_2(arguments: list[str]) -> None:
    assert RUNNER.invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize("override", [["--port", "70000"], ["--policy", "best"], ["--log-level", "loud"]])
def test_a_bad_override_exits_2(override: list[str]) -> None:
    assert RUNNER.invoke(app, ["serve", "-c", str(CONFIGS / "remote.yaml"), *override]).exit_code == 2


def test_checking_a_good_file_exits_0() -> None:
    done = RUNNER.invoke(app, ["config", "check", "--json", str(CONFIGS / "quickstart.yaml")])
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"ok": True, "mistakes": []})


def test_checking_says_what_is_hardly_meant_and_all_is_well_for_a_script(tmp_path: Path) -> None:
    keys = [{"sha256": hash_key(f"key-{i}-of-some-length"), "tenant": "t", "min_ttft_ms": 300} for i in range(3)]
    file = tmp_path / "loose.yaml"
    file.write_text((CONFIGS / "remote.yaml").read_text() + f"\nkeys: {json.dumps(keys)}\n")
    done = RUNNER.invoke(app, ["config", "check", "--json", str(file)])
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (0, True)
    assert "keys[0] and 2 more: min_ttft_ms and min_tpot_ms hardly bound" in done.stderr


def test_checking_a_bad_file_exits_1_and_names_the_mistake(bad_config: Path) -> None:
    done = RUNNER.invoke(app, ["config", "check", "--json", str(bad_config)])
    (mistake,) = json.loads(done.stdout)["mistakes"]
    assert (done.exit_code, mistake["line"], mistake["key"]) == (1, 2, "classes.chat.ttft_ms")
    text = RUNNER.invoke(app, ["config", "check", str(bad_config)])
    assert (text.exit_code, text.stdout) == (1, "")
    assert "bad.yaml: line 2: classes.chat.ttft_ms: " in text.stderr


def test_hash_key_prints_what_the_gateway_compares() -> None:
    done = RUNNER.invoke(app, ["config", "hash-key"], input="a-key-of-some-length\n")
    assert (done.exit_code, done.stdout.strip()) == (0, hash_key("a-key-of-some-length"))


@pytest.mark.parametrize("key", ["", "short"])
def test_hash_key_refuses_a_short_key_without_repeating_it(key: str) -> None:
    done = RUNNER.invoke(app, ["config", "hash-key"], input=key + "\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "16 characters" in done.stderr


def test_the_version_is_printed() -> None:
    assert RUNNER.invoke(app, ["--version"]).stdout.startswith("antares ")
