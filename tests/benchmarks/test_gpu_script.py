"""benchmarks/gpu.sh as far as it goes without a GPU: what it would run, and its course around a stand-in `antares`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.live.dummy_model import SHAPES
from gateway.config.schema import parse
from gateway.policies.registry import POLICIES
from lab.bench.cli import bench

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"

STAND_IN = '''#!{python}
"""Serves /ready; its benches attain everything up to 4/s, nothing from 8/s on, and note that they were asked."""
import http.server, json, os, sys
out = os.environ["OUT"]
option = lambda name: sys.argv[sys.argv.index(name) + 1]
if sys.argv[1] == "serve":
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200), self.end_headers()
        def log_message(self, *what): pass
    http.server.HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Ready).serve_forever()
with open(f"{{out}}/asked", "a") as asked:
    print(*sys.argv[1:], file=asked)
if sys.argv[1] == "bench":
    qps = float(option("--qps"))
    run = json.loads(os.environ["RUN"])
    run |= {{"policy": option("--policy"), "qps": qps, "seed": int(option("--seed")), "slo_adherence": float(qps < 8)}}
    print(json.dumps({{"made_with": {{}}, "runs": [run]}}))
if sys.argv[1] == "profile":
    open(option("--output"), "w").write("{{}}")
'''


def script(*arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, check=False)


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, object]:
    """The environment in which the script finds a stand-in for `antares`, and a model that is written already."""
    from lab.records.run_record import RequestResult, run_record
    from lab.workload import make_workload

    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "antares").write_text(STAND_IN.format(python=sys.executable))
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in folder.iterdir():
        program.chmod(0o755)
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "config.json").write_text("{}")
    asked = make_workload("small", qps=1.0, requests=3, seed=0)
    served = [RequestResult(one, "finished", 0.1, 0.01, 1.0) for one in asked]
    record = run_record("fcfs", 1.0, 0, served, 3.0, wall_s=3.0, client_lateness_p99_s=0.0, short_answers=0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slots = {"BIN": folder, "OUT": tmp_path / "out", "PORT": port}
    return {**slots, "POLICIES": "fcfs slack", "RATES": "2 8 16", "RUN": json.dumps(record)}


def test_it_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_a_dry_run_says_what_would_be_run_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = script("--dry-run", OUT=out)
    assert said.returncode == 0
    assert not out.exists()
    lines = said.stdout.splitlines()
    assert lines[0] == f"python3 -m venv {out}/venv "
    for policy in ("fcfs", "scorpio", "mooncake", "slack"):
        assert policy in POLICIES
        assert sum(f"--policy {policy} " in line for line in lines) == 12 * 3, "each rate with each seed"
        assert any(line.startswith(f"{out}/venv/bin/antares serve --config {out}/{policy}.yaml") for line in lines)
    assert any("profile --from-engine" in line for line in lines)
    assert any("--shape llama-3.1-8b" in line for line in lines)


def test_what_it_asks_of_antares_bench_are_options_that_it_has(tmp_path: Path) -> None:
    import inspect
    import shlex

    lines = script("--dry-run", OUT=tmp_path / "out").stdout.splitlines()
    command = shlex.split(next(line for line in lines if " bench " in line))
    known = {"--" + name.replace("_", "-") for name in inspect.signature(bench).parameters} | {"--json"}
    assert {word for word in command if word.startswith("--")} <= known


def test_it_goes_on_where_it_was_and_ends_at_the_collapse(stand_in: dict[str, object]) -> None:
    out = Path(str(stand_in["OUT"]))
    (out / "runs").mkdir()
    (out / "runs" / "fcfs-2-0.json").write_text(json.dumps({"runs": [json.loads(str(stand_in["RUN"]))]}))
    course = script("--smoke", **stand_in)
    assert course.returncode == 0, course.stderr
    found = sorted(file.name for file in (out / "runs").iterdir())
    assert found == sorted(f"{policy}-{rate}-0.json" for policy in ("fcfs", "slack") for rate in (2, 8))
    assert "fcfs collapsed at 8/s" in course.stderr
    assert (out / "profile.json").exists()
    assert (out / "runs.png").stat().st_size > 1000
    asked = (out / "asked").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["bench", "bench", "bench", "profile"]
    assert not any("--policy fcfs" in line and "--qps 2" in line for line in asked), "that is there already"
    for policy in ("fcfs", "slack"):
        config = parse(yaml.safe_load((out / f"{policy}.yaml").read_text()))
        assert config.policy.name == policy
        assert getattr(config.engines[0], "model", None) == str(out / "model")
    (out / "runs" / "slack-8-0.json").unlink()
    again = script("--smoke", **stand_in)
    assert again.returncode == 0, again.stderr
    more = (out / "asked").read_text().splitlines()[len(asked) :]
    assert [line.split()[0] for line in more] == ["bench"]
    assert "--policy slack" in more[0]


def test_it_stops_when_its_time_is_over(stand_in: dict[str, object]) -> None:
    said = script("--smoke", **{**stand_in, "MINUTES": 0})
    assert said.returncode == 1
    assert "run this again to go on" in said.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    said = script("--fast")
    assert (said.returncode, said.stdout) == (2, "")
    assert "usage" in said.stderr


def test_the_large_shape_is_the_one_of_llama_3_1_8b() -> None:
    shape = SHAPES["llama-3.1-8b"]
    head = shape["hidden_size"] // shape["num_attention_heads"]
    attention = shape["hidden_size"] * head * 2 * (shape["num_attention_heads"] + shape["num_key_value_heads"])
    layer = attention + 3 * shape["hidden_size"] * shape["intermediate_size"] + 2 * shape["hidden_size"]
    parameters = shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * shape["hidden_size"]
    assert parameters + shape["hidden_size"] == 8_030_261_248
