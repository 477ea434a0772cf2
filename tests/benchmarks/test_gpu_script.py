"""benchmarks/gpu.sh without a GPU: its dry run, and its control flow around a fake `antares`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.live.dummy_model import SHAPES
from gateway.config.schema import parse
from gateway.policies.registry import POLICIES
from lab.bench.cli import bench
from tests.fixtures.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

FAKE_ANTARES = '''#!{python}
"""Serves /ready. `bench` attains all requests below 8/s and none above. Every call but `serve` is logged."""
import http.server, json, os, sys
out = os.environ["OUT"]
option = lambda name: sys.argv[sys.argv.index(name) + 1]
if sys.argv[1] == "serve":
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200), self.end_headers()
        def log_message(self, *args): pass
    http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Ready).serve_forever()
with open(f"{{out}}/calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
if sys.argv[1] == "bench":
    qps = float(option("--qps"))
    run = json.loads(os.environ["RUN"])
    run |= {{"policy": option("--policy"), "qps": qps, "seed": int(option("--seed")), "slo_adherence": float(qps < 8)}}
    print(json.dumps({{"made_with": {{}}, "runs": [run]}}))
if sys.argv[1] == "profile":
    open(option("--output"), "w").write("{{}}")
'''

FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *benchmarks.live.features*) echo features "$@" >>"$OUT/calls" ;;
  *) exec {python} "$@" ;;
esac
"""
"""Starts no engine."""


def run_script(*arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def fake_environment(tmp_path: Path) -> dict[str, object]:
    """An environment in which the script finds a fake `antares` and an existing model."""
    from lab.records.run_record import RequestResult, run_record
    from lab.workload import make_workload

    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "antares").write_text(FAKE_ANTARES.format(python=sys.executable))
    (folder / "python").write_text(FAKE_PYTHON.format(python=sys.executable))
    for program in folder.iterdir():
        program.chmod(0o755)
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "config.json").write_text("{}")
    workload = make_workload("small", qps=1.0, requests=3, seed=0)
    served = [RequestResult(request, "finished", 0.1, 0.01, 1.0) for request in workload]
    record = run_record("fcfs", 1.0, 0, served, 3.0, wall_s=3.0, client_lateness_p99_s=0.0, short_answers=0.0)
    locations = {"BIN": folder, "OUT": tmp_path / "out", "PORT": free_port()}
    return {**locations, "POLICIES": "fcfs slack", "RATES": "2 8 16", "RUN": json.dumps(record)}


def test_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_dry_run_prints_commands_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_script("--dry-run", OUT=out)
    assert result.returncode == 0
    assert not out.exists()
    lines = result.stdout.splitlines()
    assert lines[0] == f"python3 -m venv {out}/venv "
    for policy in ("fcfs", "scorpio", "mooncake", "slack"):
        assert policy in POLICIES
        assert sum(f"--policy {policy} " in line for line in lines) == 12 * 3, "each rate with each seed"
        assert any(line.startswith(f"{out}/venv/bin/antares serve --config {out}/{policy}.yaml") for line in lines)
    assert any("profile --from-engine" in line for line in lines)
    assert any("--shape llama-3.1-8b" in line for line in lines)
    assert sum("-m benchmarks.live.features" in line and "--only" not in line for line in lines) == 1


def test_bench_options_exist(tmp_path: Path) -> None:
    import inspect
    import shlex

    lines = run_script("--dry-run", OUT=tmp_path / "out").stdout.splitlines()
    command = shlex.split(next(line for line in lines if " bench " in line))
    known = {"--" + name.replace("_", "-") for name in inspect.signature(bench).parameters} | {"--json"}
    assert {word for word in command if word.startswith("--")} <= known


def test_script_resumes_and_stops_at_collapse(fake_environment: dict[str, object]) -> None:
    out = Path(str(fake_environment["OUT"]))
    (out / "runs").mkdir()
    (out / "runs" / "fcfs-2-0.json").write_text(json.dumps({"runs": [json.loads(str(fake_environment["RUN"]))]}))
    result = run_script("--smoke", **fake_environment)
    assert result.returncode == 0, result.stderr
    found = sorted(file.name for file in (out / "runs").iterdir())
    assert found == sorted(f"{policy}-{rate}-0.json" for policy in ("fcfs", "slack") for rate in (2, 8))
    assert "fcfs collapsed at 8/s" in result.stderr
    assert (out / "profile.json").exists()
    assert (out / "runs.png").stat().st_size > 1000
    calls = (out / "calls").read_text().splitlines()
    assert [line.split()[0] for line in calls] == ["bench", "bench", "bench", "profile", "features"]
    assert not any("--policy fcfs" in line and "--qps 2" in line for line in calls), "this result exists already"
    for policy in ("fcfs", "slack"):
        config = parse(yaml.safe_load((out / f"{policy}.yaml").read_text()))
        assert config.policy.name == policy
        assert getattr(config.engines[0], "model", None) == str(out / "model")
    (out / "runs" / "slack-8-0.json").unlink()
    resumed = run_script("--smoke", **fake_environment)
    assert resumed.returncode == 0, resumed.stderr
    new_calls = (out / "calls").read_text().splitlines()[len(calls) :]
    assert [line.split()[0] for line in new_calls] == ["bench", "features"]
    assert "--policy slack" in new_calls[0]


def test_script_exits_when_minutes_have_passed(fake_environment: dict[str, object]) -> None:
    result = run_script("--smoke", **{**fake_environment, "MINUTES": 0})
    assert result.returncode == 1
    assert "run this script again to resume" in result.stderr


def test_unknown_option_is_a_usage_error() -> None:
    result = run_script("--fast")
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage" in result.stderr


def test_large_shape_has_parameter_count_of_llama_3_1_8b() -> None:
    shape = SHAPES["llama-3.1-8b"]
    head = shape["hidden_size"] // shape["num_attention_heads"]
    attention = shape["hidden_size"] * head * 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layer = attention + 3 * shape["hidden_size"] * shape["intermediate_size"] + 2 * shape["hidden_size"]
    parameters = shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * shape["hidden_size"]
    assert parameters + shape["hidden_size"] == 8_030_261_248
