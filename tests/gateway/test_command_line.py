"""The `antares` command: usage, exit codes, imports and messages."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.api.auth import hash_key
from gateway.cli import app

pytestmark = pytest.mark.process

CONFIGS = Path(__file__).parents[2] / "configs"
HEAVY = ("vllm", "torch", "transformers", "ray", "fastapi", "uvicorn", "httpx", "aiohttp", "scipy", "lightgbm", "lab")
RUNNER = CliRunner()

RUN_MAIN = "import sys; sys.argv[0] = 'antares'; from gateway.cli import main; main()"
RUN_MAIN_AND_REPORT = f"""
import sys, time
sys.argv[0] = "antares"
from gateway.cli import main

try:
    main()
finally:
    print(*({set(HEAVY)!r} & set(sys.modules)), time.process_time(), file=sys.stderr)
"""
"""Runs `antares`, then prints the heavy modules that it imported and its CPU time (s) as the last line on stderr."""

OLD_OPTIONS = """\
server: {port: 0}
engines: [{kind: simulated, name: one}, {kind: simulated, name: two}]
predictor: {enabled: false}
policy: {name: slack, options: {thrift: 0.1, runway_steps: 2}}
shadow: [{name: slack, label: other, options: {thrift: 0.2}}]
classes: {chat: {}}
default_class: chat
"""
OLD_OPTION_MESSAGES = [
    "policy 'slack': option 'thrift' is now 'cost_weight'",
    "policy 'slack': option 'runway_steps' is now 'prefill_lookahead_steps'",
]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def plain(output: str) -> str:
    """Remove colors, which typer prints if variables such as GITHUB_ACTIONS are set."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output)


@pytest.fixture
def bad_config(tmp_path: Path) -> Path:
    file = tmp_path / "bad.yaml"
    file.write_text("engines: [{kind: simulated}]\nclasses: {chat: {ttft_ms: -1}}\ndefault_class: chat\n")
    return file


@pytest.fixture
def old_config(tmp_path: Path) -> Path:
    file = tmp_path / "old.yaml"
    file.write_text(OLD_OPTIONS)
    return file


@pytest.mark.parametrize("arguments", [["--help"], ["config", "check", str(CONFIGS / "quickstart.yaml")]])
def test_command_starts_fast_and_imports_nothing_heavy(arguments: list[str]) -> None:
    done = run_python(RUN_MAIN_AND_REPORT, *arguments)
    assert done.returncode == 0, done.stderr
    *heavy, cpu_s = done.stderr.splitlines()[-1].split()
    assert heavy == []
    assert float(cpu_s) < 1.5, "normally 0.3 s"


def test_serve_exits_2_on_a_bad_configuration_before_heavy_imports(bad_config: Path) -> None:
    done = run_python(RUN_MAIN_AND_REPORT, "serve", "-c", str(bad_config))
    assert (done.returncode, done.stdout) == (2, "")
    assert "line 2: classes.chat.ttft_ms" in done.stderr
    assert len(done.stderr.splitlines()[-1].split()) == 1


@pytest.mark.parametrize(
    "command",
    ["", "serve", "config", "config check", "simulate", "bench", "profile", "predictor", "predictor train"],
)
def test_help_shows_the_full_command_path(command: str) -> None:
    done = RUNNER.invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert f"Usage: {' '.join(['antares', *command.split()])} [OPTIONS]" in plain(done.output)


@pytest.mark.parametrize("command", ["simulate", "bench", "profile", "predictor", "predictor train"])
def test_unknown_option_exits_2_with_the_full_command_path(command: str) -> None:
    done = RUNNER.invoke(app, [*command.split(), "--no-such-option"])
    assert done.exit_code == 2
    assert f"Usage: antares {command} [OPTIONS]" in plain(done.output)


@pytest.mark.parametrize(
    "arguments",
    [[], ["serve"], ["serve", "-c", "/nowhere.yaml"], ["no-such-command"], ["serve", "-x"], ["config"], ["bench"],
     ["config", "check"], ["predictor"], ["predictor", "no-such-command"]],
)  # fmt: skip
def test_bad_usage_exits_2(arguments: list[str]) -> None:
    assert RUNNER.invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize("override", [["--port", "70000"], ["--policy", "best"], ["--log-level", "loud"]])
def test_serve_exits_2_on_a_bad_override(override: list[str]) -> None:
    assert RUNNER.invoke(app, ["serve", "-c", str(CONFIGS / "remote.yaml"), *override]).exit_code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_serve_logs_each_old_option_name_once(old_config: Path, log_format: str) -> None:
    old_config.write_text(f"{OLD_OPTIONS}logging: {{format: {log_format}}}\n")
    command = [sys.executable, "-c", RUN_MAIN, "serve", "-c", str(old_config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "Antares is ready" in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    logged = [line.rstrip() for line in lines if " is now " in line]
    if log_format == "json":
        logged = [json.loads(line)["message"] for line in logged]
    assert len(logged) == len(OLD_OPTION_MESSAGES)
    for line, message in zip(logged, OLD_OPTION_MESSAGES, strict=True):
        assert line.endswith(f"{old_config}: {message}")
    assert not any("FutureWarning" in line for line in lines)


def test_config_check_accepts_a_valid_file() -> None:
    done = RUNNER.invoke(app, ["config", "check", "--json", str(CONFIGS / "quickstart.yaml")])
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"ok": True, "mistakes": []})


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_config_check_prints_each_old_option_name_once(old_config: Path, options: list[str]) -> None:
    done = RUNNER.invoke(app, ["config", "check", *options, str(old_config)])
    assert done.exit_code == 0
    assert done.stderr.splitlines() == [f"{old_config}: {message}" for message in OLD_OPTION_MESSAGES]
    assert "ok" in done.stdout


def test_config_check_prints_cautions_on_stderr(tmp_path: Path) -> None:
    keys = [{"sha256": hash_key(f"key-{i}-of-some-length"), "tenant": "t", "min_ttft_ms": 300} for i in range(3)]
    file = tmp_path / "keys.yaml"
    file.write_text((CONFIGS / "remote.yaml").read_text() + f"\nkeys: {json.dumps(keys)}\n")
    done = RUNNER.invoke(app, ["config", "check", "--json", str(file)])
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (0, True)
    assert "keys[0] and 2 more: min_ttft_ms and min_tpot_ms only partly limit x-slo-e2e-ms" in done.stderr


def test_config_check_counts_processes_that_divide_too_few_engines(tmp_path: Path) -> None:
    file = tmp_path / "processes.yaml"
    engine = '{ kind: http, name: large, base_url: "http://127.0.0.1:1" }'
    file.write_text(
        f"server: {{ processes: 3 }}\nengines: [{engine}]\nclasses: {{ free: {{}} }}\ndefault_class: free\n"
    )
    done = RUNNER.invoke(app, ["config", "check", str(file)])
    assert (done.exit_code, "3 gateways divide 1 engines called 'large'" in done.stderr) == (0, True)


def test_config_check_exits_1_and_names_the_mistake(bad_config: Path) -> None:
    done = RUNNER.invoke(app, ["config", "check", "--json", str(bad_config)])
    (mistake,) = json.loads(done.stdout)["mistakes"]
    assert (done.exit_code, mistake["line"], mistake["key"]) == (1, 2, "classes.chat.ttft_ms")
    text = RUNNER.invoke(app, ["config", "check", str(bad_config)])
    assert (text.exit_code, text.stdout) == (1, "")
    assert "bad.yaml: line 2: classes.chat.ttft_ms: " in text.stderr


def test_hash_key_prints_the_digest() -> None:
    done = RUNNER.invoke(app, ["config", "hash-key"], input="a-key-of-some-length\n")
    assert (done.exit_code, done.stdout.strip()) == (0, hash_key("a-key-of-some-length"))


@pytest.mark.parametrize("key", ["", "short"])
def test_hash_key_rejects_a_short_key_without_repeating_it(key: str) -> None:
    done = RUNNER.invoke(app, ["config", "hash-key"], input=key + "\n")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "16 characters" in done.stderr


def test_version_option_prints_the_version() -> None:
    assert RUNNER.invoke(app, ["--version"]).stdout.startswith("antares ")
