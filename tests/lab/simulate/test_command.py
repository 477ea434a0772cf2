"""`antares simulate`: output, exit codes and error messages."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from engine_adapter.step_time.profile import Profile, Regime, profile_names, save_profile
from gateway.policies.registry import POLICIES
from lab.cli import app

# Whole simulations are four times slower under a coverage tracer; unit tests cover the same code.
pytestmark = pytest.mark.no_cover

QUICK = ("--workload", "small", "--requests", "20", "--max-output", "40", "--qps", "30")
KEYS = (
    "policy", "qps", "seed", "requests", "duration_s", "goodput", "slo_adherence", "rejected", "ttft_violations",
    "tpot_violations", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "per_class", "count_bound", "fair_bound",
    "scheduling_s", "wall_s",
)  # fmt: skip
METRICS = KEYS[6:14]


def antares(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def document(*arguments: str) -> dict[str, Any]:
    result = antares(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def message(result: Result) -> str:
    """Return stderr as one line, because the console wraps long lines."""
    return " ".join(result.stderr.split())


@pytest.fixture
def slow(tmp_path: Path) -> str:
    path = tmp_path / "slow.json"
    regime = Regime(math.inf, 0.02, 0.0, 2e-4, 1e-3, 0.0, 0.0)
    save_profile(Profile("slow", "", {}, (regime,), 4, 512, 1024, 4096), path)
    return str(path)


# --- output -----------------------------------------------------------------------------------------------------------


def test_json_has_all_metrics_of_every_run() -> None:
    runs = document(*QUICK, "--qps", "90", "--seed", "0", "--seed", "5", "--policy", "scorpio", "--policy", "s3")[
        "runs"
    ]
    assert [(r["policy"], r["qps"], r["seed"]) for r in runs] == [
        (policy, qps, seed) for policy in ("scorpio", "s3") for qps in (30, 90) for seed in (0, 5)
    ]
    for run in runs:
        assert set(KEYS) <= set(run)
        assert run["requests"] == 20
        assert run["slo_adherence"] <= run["count_bound"]
        assert set(run["per_class"]) <= set("123456")
        assert all(set(METRICS) <= set(group) for group in run["per_class"].values())
        assert all(isinstance(run[key], float) for key in (*METRICS[:4], "scheduling_s", "wall_s"))


def test_output_without_timings_is_deterministic() -> None:
    command = (*QUICK, "--policy", "scorpio", "--json", "--no-timings")
    first, second = antares(*command), antares(*command)
    assert first.stdout_bytes == second.stdout_bytes
    assert antares(*command, "--seed", "1").stdout_bytes != first.stdout_bytes
    (run,) = json.loads(first.stdout)["runs"]
    assert (run["scheduling_s"], run["wall_s"]) == (None, None)


def test_output_does_not_depend_on_jobs() -> None:
    command = (*QUICK, "--seed", "0", "--seed", "1", "--policy", "mooncake", "--json", "--no-timings")
    assert antares(*command, "--jobs", "2").stdout_bytes == antares(*command).stdout_bytes


@pytest.mark.process
def test_program_prints_only_the_document_to_stdout() -> None:
    command = [sys.executable, "-m", "lab.cli", "simulate", *QUICK, "--policy", "fcfs", "--json", "--no-timings"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == antares(*QUICK, "--policy", "fcfs", "--json", "--no-timings").stdout


def test_default_output_is_table_of_fcfs_and_slack() -> None:
    result = antares(*QUICK, "--seed", "0", "--seed", "1")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("fcfs", "slack", "adherence", "count bound", "Means over seeds"))
    assert "scorpio" not in result.stdout


def test_engine_options_change_the_run() -> None:
    def duration(*more: str) -> float:
        return document(*QUICK, "--policy", "fcfs", *more)["runs"][0]["duration_s"]

    plain = duration()
    assert duration("--max-num-seqs", "1") > plain
    assert duration("--max-num-seqs", "1", "--replicas", "2") < duration("--max-num-seqs", "1")
    assert duration("--step-mode", "prefill-first") != plain
    assert duration("--predictor", "oracle") == plain, "fcfs does not use predictions"


def test_duration_limits_arrivals() -> None:
    runs = document("--workload", "small", "--qps", "30", "--duration", "1", "--policy", "fcfs")["runs"]
    assert 15 < runs[0]["requests"] < 45


def test_trace_is_replayed_and_its_rate_recorded() -> None:
    trace = ("--workload", "small", "--arrivals", "trace", "--trace", "azure-code", "--requests", "15")
    (own,) = document(*trace, "--policy", "fcfs")["runs"]
    (fast,) = document(*trace, "--policy", "fcfs", "--speed", "4")["runs"]
    assert (own["requests"], fast["requests"]) == (15, 15)
    assert fast["qps"] == pytest.approx(4 * own["qps"], rel=1e-2)


def test_mix_selects_categories() -> None:
    (run,) = document(*QUICK, "--policy", "fcfs", "--mix", "2=3,6=1")["runs"]
    assert set(run["per_class"]) == {"2", "6"}


# --- --hold and --plot ------------------------------------------------------------------------------------------------


def test_hold_finds_highest_rate_that_keeps_adherence(slow: str) -> None:
    command = ("--profile", slow, "--workload", "small", "--duration", "4", "--max-output", "20", "--hold", "0.9",
               "--policy", "fcfs", "--policy", "ttft_guard_only")  # fmt: skip
    found = document(*command)
    for policy, rate in found["capacity_qps"].items():
        kept = [run["qps"] for run in found["runs"] if run["policy"] == policy and run["slo_adherence"] >= 0.9]
        assert 0 < rate == pytest.approx(max(kept), abs=0.01)
    assert list(found["capacity_qps"]) == ["fcfs", "ttft_guard_only"]


def test_hold_prints_rate_and_adherence(slow: str) -> None:
    result = antares("--profile", slow, "--workload", "small", "--duration", "2", "--hold", "0.8", "--policy", "fcfs")
    assert "requests/s at 80% SLO adherence" in result.stdout


def test_plot_writes_file_and_prints_path(tmp_path: Path) -> None:
    plot = tmp_path / "curve.png"
    result = antares(*QUICK, "--qps", "60", "--plot", str(plot), "--json")
    assert result.exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {plot}".replace(" ", "") in result.stderr.replace("\n", "").replace(" ", "")
    assert json.loads(result.stdout)["runs"], "stdout has only the document"


@pytest.mark.parametrize(("name", "error"), [("nowhere/curve.png", "does not exist"), ("curve.xyz", ".png, .svg")])
def test_unwritable_plot_fails_before_the_run(tmp_path: Path, name: str, error: str) -> None:
    result = antares(*QUICK, "--policy", "fcfs", "--plot", str(tmp_path / name))
    assert (result.exit_code, error in message(result)) == (2, True)


@pytest.mark.parametrize("other", [("--qps", "3"), ("--arrivals", "trace"), ("--requests", "9")])
def test_hold_rejects_options_that_fix_rate_or_requests(other: tuple[str, str]) -> None:
    result = antares("--hold", "0.9", *other)
    assert (result.exit_code, "--hold" in message(result)) == (2, True)


# --- bad usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "errors"),
    [
        (("--profile", "b200"), (f"no profile 'b200': choose one of {', '.join(profile_names())}",)),
        (("--profile", "/nowhere/x.json"), ("/nowhere/x.json", "choose one of")),
        (("--workload", "chat"), ("unknown workload 'chat'", "sharegpt", "lmsys-like", "azure-conv", "small")),
        (("--policy", "best"), ("no policy is called 'best'", *POLICIES)),
        (("--policy", "scorpio:etta=1"), ("has no option 'etta'; did you mean 'eta'?",)),
        (("--policy", "scorpio:eta=x"), ("eta must be a number",)),
        (("--step-mode", "odd"), ("unknown step mode 'odd': choose one of chunked, prefill-first",)),
        (("--predictor", "tarot"), ("unknown predictor 'tarot'", "shipped", "oracle", "noise:SIGMA", "constant")),
        (("--predictor", "noise:x"), ("noise:SIGMA needs a number",)),
        (("--slo-table", "gpt"), ("unknown SLO table 'gpt'", "llama-3.1-8b", "gemma-2-27b")),
        (("--arrivals", "uniform"), ("unknown arrivals 'uniform'", "poisson", "gamma", "trace")),
        (("--arrivals", "trace", "--trace", "mine", "--qps", "3"), ("unknown trace 'mine'", "azure-code")),
        (("--mix", "fast"), ("--mix must have the form CATEGORY=WEIGHT",)),
        (("--mix", "9=1"), ("unknown category 9",)),
        (("--qps", "-3"), ("qps must be a positive number",)),
        (("--burstiness", "-3"), ("burstiness must be a positive number",)),
        (("--seed", "-1"), ("--seed must be at least 0",)),
        (("--hold", "1.5"), ("--hold is a fraction of all requests",)),
        (("--hold", "0"), ("--hold is a fraction of all requests",)),
        (("--max-num-seqs", "0"), ("--max-num-seqs",)),
        (("--replicas", "0"), ("--replicas",)),
        (("--routing", "nearest"), ("no routing is called 'nearest'", "least_load", "headroom")),
        (("--gateways", "4", "--replicas", "2"), ("--gateways 4 needs --replicas 4 or more",)),
        (("--gateways", "2", "--replicas", "search"), ("finds the engines of one gateway",)),
        (("--profiles", "h200-llama3.1-8b"), ("--profiles needs --replicas 2 or more",)),
        (("--replicas", "2", "--profiles", "b200"), ("b200",)),
        (("--kv-tokens", "50"), ("kv_tokens (50) must hold one sequence",)),
        (("--workload", "azure-conv", "--profile", "SLOW"), ("--max-prompt and --max-output",)),
        (("--frobnicate",), ("No such option",)),
    ],
)
def test_bad_usage_exits_2_and_lists_accepted_values(
    arguments: Sequence[str], errors: Sequence[str], slow: str
) -> None:
    result = antares(*QUICK, *(slow if argument == "SLOW" else argument for argument in arguments))
    assert result.exit_code == 2
    assert all(error in message(result) for error in errors), message(result)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_help_lists_hold_and_hides_old_options() -> None:
    result = antares("--help")
    assert result.exit_code == 0
    assert "--hold" in result.stdout
    assert "--apart" not in result.stdout


def test_old_gateway_options_work_and_warn() -> None:
    command = (*QUICK, "--policy", "s3", "--max-num-seqs", "2", "--json", "--no-timings")
    separate, colocated = antares(*command), antares(*command, "--colocated-gateway")
    apart, inside = antares(*command, "--apart"), antares(*command, "--inside")
    assert separate.stdout == apart.stdout != colocated.stdout == inside.stdout
    assert "--apart is deprecated: leave it out" in message(apart)
    assert "--inside is deprecated: use --colocated-gateway" in message(inside)


def test_accepted_drafts_shorten_tpot() -> None:
    def tpot_s(*options: str) -> float:
        arguments = ("--policy", "slack", "--qps", "4", "--duration", "5")
        return float(document(*arguments, *options)["runs"][0]["tpot_p50_s"])

    drafts = ("--draft-tokens", "3", "--draft-acceptance")
    plain_s, few_s, all_s = tpot_s(), tpot_s(*drafts, "0.3"), tpot_s(*drafts, "1")
    assert all_s < 0.5 * plain_s
    assert all_s < few_s < plain_s


@pytest.mark.parametrize("wrong", [("--draft-tokens", "-1"), ("--draft-acceptance", "1.2"), ("--draft-ms", "-1")])
def test_impossible_speculation_is_refused(wrong: tuple[str, str]) -> None:
    assert antares(*wrong).exit_code == 2
