"""The comparison of vLLM in the gateway's process with `vllm serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.overhead import in_process
from benchmarks.overhead.in_process import FLAGS, HIGH, LOW, OURS, PLAIN, SHAPES, page, plain_command, ratios
from benchmarks.overhead.peers.upstream import MODEL
from gateway.config.schema import GatewayConfig


def record(server: str, round_: int, shape: str = LOW, **changed: Any) -> dict[str, Any]:
    times = {"ttft_p50_ms": 10.0, "ttft_p99_ms": 20.0, "itl_p50_ms": 5.0, "itl_p99_ms": 6.0}
    run = {"round": round_, "shape": shape, "server": server, "answers": 9, "failures": 0, "error": None, "per_s": 4.0}
    return run | times | changed


def test_ratios_pair_turns_that_follow_each_other() -> None:
    runs = [record(PLAIN, 0), record(OURS, 0, per_s=3.0), record(OURS, 0, per_s=5.0), record(PLAIN, 0, per_s=2.0)]
    runs += [record(OURS, 0, HIGH, per_s=1.0), record(PLAIN, 0, HIGH)]
    runs += [record(OURS, 1), record(PLAIN, 1), record(OURS, 1, per_s=None), record(PLAIN, 1)]
    assert ratios(runs, LOW, "per_s") == [0.75, 2.5, 1.0]
    assert ratios(runs, HIGH, "per_s") == [0.25]


def test_page_has_ratios_and_failures() -> None:
    runs = [record(PLAIN, 0), record(OURS, 0, per_s=3.0, failures=1, error="status 500")]
    text = page({"rounds": 1, "cpus": 2, "runs": runs + [record(name, 0, HIGH) for name in (PLAIN, OURS)]})
    assert "| ratio | 0.750 | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert f"- antares, {LOW}: 1 of 10 failed (status 500)" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 120


def test_both_servers_have_the_flags(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(in_process, "write_dummy_model", lambda folder: folder)
    command = plain_command(1234, "", tmp_path)
    ours = yaml.safe_load(Path(in_process.our_command(1235, "http://127.0.0.1:1", tmp_path)[-1]).read_text())
    (engine,) = GatewayConfig.model_validate(ours).model_dump()["engines"]
    assert engine["flags"] == FLAGS
    assert engine["served_model_name"] == MODEL
    assert {flag.removeprefix("--") for flag in command if flag.startswith("--")} > set(FLAGS)
    assert all(shape.tokens == SHAPES[0].tokens for shape in SHAPES)
