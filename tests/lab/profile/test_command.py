"""`antares profile`: output, exit codes and error messages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from engine_adapter.step_time.profile import load_profile, profile_document, profile_names
from lab.profile import from_engine as profile_from_engine
from lab.profile.cli import profile

CONFIG = """
engines: [{kind: simulated, max_num_batched_tokens: 256, step_times: {b: 1.0e-5, d: 1.0e-4, alpha: 1.0e-6}}]
classes: {chat: {ttft_ms: 5000, tpot_ms: 300}}
default_class: chat
"""
app = typer.Typer()
app.command()(profile)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_show_prints_provenance_and_quality() -> None:
    result = run("--show", "a100-llama3.1-8b")
    assert result.exit_code == 0
    for words in ("aiconfigurator-core", "held-out itl", "MAPE", "430,432", "SCORPIO forms"):
        assert words in result.stdout


def test_show_tells_when_no_steps_were_held_out() -> None:
    assert "published coefficients" in run("--show", "blis-a100").stdout


def test_json_prints_only_the_profile_document() -> None:
    result = run("--show", "niyama-a100", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(profile_document(load_profile("niyama-a100"))))


@pytest.mark.parametrize("arguments", [[], ["--show", "blis-a100", "--from-engine", "http://x"]])
def test_command_needs_exactly_one_source(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert all(name in result.stderr for name in ["--from-engine", *profile_names()])


def test_unknown_profile_lists_known_profiles() -> None:
    result = run("--show", "h900")
    assert result.exit_code == 2
    assert "no profile 'h900'" in result.stderr
    assert "niyama-a100" in result.stderr


def test_missing_config_exits_2_and_dead_server_exits_1() -> None:
    assert run("--from-engine", "nowhere.yaml").exit_code == 2
    result = run("--from-engine", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "does not answer" in result.stderr


def test_missing_kernel_timings_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    result = run("--from-aiconfigurator", "meta-llama/Meta-Llama-3.1-8B", "a100_sxm")
    assert result.exit_code == 1
    assert "pip install -e '.[profile]' in your clone" in result.stderr


def test_missing_matplotlib_fails_before_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--from-engine", "http://127.0.0.1:9", "--plot", "x.png")
    assert result.exit_code == 2
    assert "pip install -e '.[bench]' in your clone" in result.stderr


def test_measured_profile_is_written_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_from_engine, "_SETTLE_S", 0.0)
    config, output = tmp_path / "gateway.yaml", tmp_path / "mine.json"
    config.write_text(CONFIG)
    result = run("--from-engine", config, "--max-batch", "2", "--name", "mine", "--output", output, "--json")
    assert result.exit_code == 0, result.stderr
    written = load_profile(output)
    assert json.loads(result.stdout) == json.loads(output.read_text())
    assert (written.name, written.max_num_batched_tokens) == ("mine", 256)
    assert written.provenance["source"] == "simulated engine of gateway.yaml"
    assert written.quality["itl"]["mape"] < 0.05
