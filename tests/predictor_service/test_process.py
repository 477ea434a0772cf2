import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

import httpx
import pytest
from typer.testing import CliRunner

from predictor_service import cli
from predictor_service.model.buckets import PAPER_BINS, STRATEGIES
from predictor_service.model.length_model import CARD_FILE, WEIGHTS_FILE
from predictor_service.training import datasets
from predictor_service.training import run as training_run
from predictor_service.training.evaluate import REPORTED_METRICS
from predictor_service.training.fit import Recipe
from predictor_service.training.sharegpt import Turn
from tests.fixtures.ports import free_port

pytestmark = pytest.mark.process

SECRET = "xyzzy-private-prompt"


def serve_command(port: int, *more: str) -> list[str]:
    return [sys.executable, "-m", "predictor_service.cli", "serve", "--port", str(port), *more]


@pytest.fixture(scope="module")
def http():
    """One client for all tests, because each one loads TLS certificates for 40 ms."""
    with httpx.Client(trust_env=False, verify=False, headers={"connection": "close"}) as client:
        yield client


def wait_healthy(http: httpx.Client, port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            if http.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError("the predictor did not start")


def test_process_predicts_and_stops_gracefully_on_sigterm(http):
    port = free_port()
    process = subprocess.Popen(serve_command(port, "--log-level", "debug"), stderr=subprocess.PIPE, text=True)
    try:
        wait_healthy(http, port)
        url = f"http://127.0.0.1:{port}/v1/predict"
        result = http.post(url, json={"inputs": [{"prompt": SECRET, "max_tokens": 64}]})
        assert result.status_code == 200
        assert 1 <= result.json()["predictions"][0]["p50"] <= 64
        assert http.post(url, content=SECRET).status_code == 400
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert SECRET not in log
    assert "127.0.0.1" in log
    with pytest.raises(httpx.ConnectError):
        http.get(f"http://127.0.0.1:{port}/health")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no parent processes")
def test_process_exits_with_parent(http):
    port = free_port()
    starter = (
        "import subprocess, sys, time; child = subprocess.Popen(sys.argv[1:]); "
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter, *serve_command(port, "--exit-with-parent")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    child = int(parent.stdout.readline())
    try:
        wait_healthy(http, port)
        parent.kill()
        parent.wait()
        until = time.monotonic() + 60
        with suppress(httpx.TransportError):
            while time.monotonic() < until:
                http.get(f"http://127.0.0.1:{port}/health")
                time.sleep(0.02)
            raise AssertionError("the predictor outlived its parent")
    finally:
        parent.kill()
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_corrections_survive_sigkill_and_sigterm(http, tmp_path):
    finished = {"model": "m", "slo_class": "c", "raw_p50": 100.0, "raw_p90": 250.0, "tokens": 10}
    request = {"model": "m", "slo_class": "c", "inputs": [{"prompt": SECRET}]}
    file = tmp_path / "state" / "calibration.json"

    def saved_rows() -> int:
        windows = json.loads(file.read_bytes())["windows"] if file.exists() else []
        return sum(len(window["rows"]) for window in windows)

    def serve_once(observations: int, stop_signal: int) -> dict[str, float]:
        port = free_port()
        process = subprocess.Popen(serve_command(port, "--state", str(file.parent)), stderr=subprocess.DEVNULL)
        try:
            wait_healthy(http, port)
            result = http.post(f"http://127.0.0.1:{port}/v1/predict", json=request).json()["predictions"][0]
            body = {"observations": [finished] * observations}
            assert http.post(f"http://127.0.0.1:{port}/v1/observe", json=body).status_code == 202
            deadline = time.monotonic() + 60
            while stop_signal == signal.SIGKILL and saved_rows() < observations and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(stop_signal)
            process.wait(timeout=60)
        finally:
            process.kill()
            process.wait()
        return result

    before = serve_once(150, signal.SIGKILL)
    assert before["p50"] == before["raw_p50"]
    after = serve_once(7, signal.SIGTERM)
    assert after["raw_p50"] == before["raw_p50"]
    assert after["p50"] == pytest.approx(before["p50"] / 10, rel=0.2)
    assert saved_rows() == 157
    assert SECRET.encode() not in file.read_bytes()


@pytest.fixture
def signal_handlers():
    """Restores the signal handlers that `serve` replaces in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signal_handlers")
def test_serve_exits_1_on_taken_port_or_missing_model(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(cli.app, ["serve", "--port", str(taken.getsockname()[1])])
        assert result.exit_code == 1
        assert "cannot listen" in result.output
    result = CliRunner().invoke(cli.app, ["serve", "--model", str(tmp_path)])
    assert result.exit_code == 1
    assert "predictor train" in result.output
    (tmp_path / "file").write_text("")
    for option in ("--state", "--collect"):
        result = CliRunner().invoke(cli.app, ["serve", option, str(tmp_path / "file" / "folder")])
        assert result.exit_code == 1
        assert "error:" in result.output


def test_bad_usage_exits_2():
    assert CliRunner().invoke(cli.app, ["serve", "--port", "0"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["train"]).exit_code == 2


@pytest.mark.parametrize("command", [["train", "--output", "."], ["evaluate", "--json"]])
def test_commands_name_missing_training_extra(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1
    assert "pip install -e '.[train]' in your clone" in result.output


@pytest.mark.usefixtures("lightgbm")
def test_commands_train_evaluate_and_study_hashed_model(tmp_path, monkeypatch):
    lengths = {"define": 20, "explain": 300}
    turns = [
        Turn(f"c{n}", turn == 0, f"{verb} number {n} {SECRET} {turn}", length + n % 17, False)
        for n in range(300)
        for turn in range(2)
        for verb, length in [list(lengths.items())[(n + turn) % 2]]
    ]
    monkeypatch.setattr(datasets, "read_turns", lambda progress: turns)
    monkeypatch.setattr(training_run, "Recipe", lambda seed: Recipe(folds=2, trees=60, tree_rate=0.1, seed=seed))
    folder = tmp_path / "model"
    trained = CliRunner().invoke(cli.app, ["train", "--output", str(folder), "--seed", "5", "--json"])
    assert trained.exit_code == 0, trained.output
    evaluated = CliRunner().invoke(cli.app, ["evaluate", "--model", str(folder), "--json"])
    assert evaluated.exit_code == 0, evaluated.output
    metrics, card = json.loads(evaluated.stdout), json.loads(trained.stdout)
    assert tuple(metrics) == REPORTED_METRICS
    assert card["seed"] == 5
    assert metrics["mae_tokens"] < metrics["mae_constant"] / 2
    assert metrics["mae_tokens"] == pytest.approx(card["metrics"]["test"]["mae_tokens"], abs=0.01)
    assert SECRET not in trained.output + evaluated.output
    assert {file.name for file in folder.iterdir()} == {WEIGHTS_FILE, CARD_FILE}
    assert not any(SECRET.encode() in file.read_bytes() for file in folder.iterdir())

    studied = CliRunner().invoke(cli.app, ["evaluate", "--model", str(folder), "--bins", "--json"])
    assert studied.exit_code == 0, studied.output
    table = json.loads(studied.stdout)["buckets"]
    assert len(table) == len(PAPER_BINS) * len(STRATEGIES)
    assert {"strategy", "bins", "kendall_tau", "accuracy", "off_by_1", "off_by_2", "rmse_tokens"} <= table[0].keys()


def test_command_line_starts_fast():
    script = (
        "import time, typer, sys; started = time.perf_counter(); import predictor_service.cli; "
        "print(time.perf_counter() - started); assert not {'numpy', 'starlette', 'uvicorn'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script]
    runs = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(5))
    # The first starts may be slow on a loaded machine.
    assert any(float(ran.stdout) < 0.3 for ran in runs)
