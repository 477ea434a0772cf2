"""`antares simulate` as a shell sees it."""

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

pytestmark = (
    pytest.mark.no_cover
)  # whole simulations, four times slower under a tracer; the rooms have tests of their own

QUICK = ("--workload", "small", "--requests", "20", "--max-output", "40", "--qps", "30")
KEYS = (
    "policy", "qps", "seed", "requests", "duration_s", "goodput", "slo_adherence", "rejected", "ttft_violations",
    "tpot_violations", "ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "per_class", "count_bound", "fair_bound",
    "scheduling_s", "wall_s",
)  # fmt: skip
FIGURES = KEYS[6:14]


def antares(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def document(*arguments: str) -> dict[str, Any]:
    result = antares(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def said(result: Result) -> str:
    """What it told on stderr, as one line: a console breaks lines where it likes."""
    return " ".join(result.stderr.split())


@pytest.fixture
def slow(tmp_path: Path) -> str:
    path = tmp_path / "slow.json"
    regime = Regime(math.inf, 0.02, 0.0, 2e-4, 1e-3, 0.0, 0.0)
    save_profile(Profile("slow", "", {}, (regime,), 4, 512, 1024, 4096), path)
    return str(path)


# --- what it prints ---------------------------------------------------------------------------------------------------


def test_json_is_one_document_with_every_figure_of_every_run() -> None:
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
        assert all(set(FIGURES) <= set(group) for group in run["per_class"].values())
        assert all(isinstance(run[key], float) for key in (*FIGURES[:4], "scheduling_s", "wall_s"))


def test_without_timings_the_same_command_prints_the_same_bytes() -> None:
    command = (*QUICK, "--policy", "scorpio", "--json", "--no-timings")
    first, second = antares(*command), antares(*command)
    assert first.stdout_bytes == second.stdout_bytes
    assert antares(*command, "--seed", "1").stdout_bytes != first.stdout_bytes
    (run,) = json.loads(first.stdout)["runs"]
    assert (run["scheduling_s"], run["wall_s"]) == (None, None)


def test_several_jobs_print_what_one_does() -> None:
    command = (*QUICK, "--seed", "0", "--seed", "1", "--policy", "mooncake", "--json", "--no-timings")
    assert antares(*command, "--jobs", "2").stdout_bytes == antares(*command).stdout_bytes


def test_as_a_program_it_prints_the_document_alone_on_stdout() -> None:
    command = [sys.executable, "-m", "lab.cli", "simulate", *QUICK, "--policy", "fcfs", "--json", "--no-timings"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout == antares(*QUICK, "--policy", "fcfs", "--json", "--no-timings").stdout


def test_a_person_gets_a_table_of_fcfs_and_scorpio() -> None:
    result = antares(*QUICK, "--seed", "0", "--seed", "1")
    assert result.exit_code == 0
    assert all(word in result.stdout for word in ("fcfs", "scorpio", "adherence", "count bound", "Means over seeds"))


def test_limits_replicas_and_modes_reach_the_run() -> None:
    def duration(*more: str) -> float:
        return document(*QUICK, "--policy", "fcfs", *more)["runs"][0]["duration_s"]

    plain = duration()
    assert duration("--max-num-seqs", "1") > plain
    assert duration("--max-num-seqs", "1", "--replicas", "2") < duration("--max-num-seqs", "1")
    assert duration("--step-mode", "prefill-first") != plain
    assert duration("--predictor", "oracle") == plain, "fcfs asks no predictor"


def test_arrivals_end_after_so_many_seconds_or_requests() -> None:
    runs = document("--workload", "small", "--qps", "30", "--duration", "1", "--policy", "fcfs")["runs"]
    assert 15 < runs[0]["requests"] < 45


def test_a_trace_is_replayed_and_its_rate_recorded() -> None:
    trace = ("--workload", "small", "--arrivals", "trace", "--trace", "azure-code", "--requests", "15")
    (own,) = document(*trace, "--policy", "fcfs")["runs"]
    (fast,) = document(*trace, "--policy", "fcfs", "--speed", "4")["runs"]
    assert (own["requests"], fast["requests"]) == (15, 15)
    assert fast["qps"] == pytest.approx(4 * own["qps"], rel=1e-2)


def test_a_mix_chooses_the_categories() -> None:
    (run,) = document(*QUICK, "--policy", "fcfs", "--mix", "2=3,6=1")["runs"]
    assert set(run["per_class"]) == {"2", "6"}


# --- --hold and --plot ------------------------------------------------------------------------------------------------


def test_hold_finds_the_rate_that_keeps_the_adherence(slow: str) -> None:
    command = ("--profile", slow, "--workload", "small", "--duration", "4", "--max-output", "20", "--hold", "0.9",
               "--policy", "fcfs", "--policy", "ttft_guard_only")  # fmt: skip
    found = document(*command)
    for policy, rate in found["capacity_qps"].items():
        kept = [run["qps"] for run in found["runs"] if run["policy"] == policy and run["slo_adherence"] >= 0.9]
        assert 0 < rate == pytest.approx(max(kept), abs=0.01)
    assert list(found["capacity_qps"]) == ["fcfs", "ttft_guard_only"]


def test_hold_says_it_in_a_sentence(slow: str) -> None:
    result = antares("--profile", slow, "--workload", "small", "--duration", "4", "--hold", "0.8", "--policy", "fcfs")
    assert "requests/s with 80% of them attained" in result.stdout


def test_plot_writes_a_picture_and_says_where(tmp_path: Path) -> None:
    picture = tmp_path / "curve.png"
    result = antares(*QUICK, "--qps", "60", "--plot", str(picture), "--json")
    assert result.exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"Wrote {picture}".replace(" ", "") in result.stderr.replace("\n", "").replace(" ", "")
    assert json.loads(result.stdout)["runs"], "stdout is the document and nothing else"


@pytest.mark.parametrize(("name", "says"), [("nowhere/curve.png", "there is no folder"), ("curve.xyz", ".png, .svg")])
def test_a_picture_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path, name: str, says: str) -> None:
    result = antares(*QUICK, "--policy", "fcfs", "--plot", str(tmp_path / name))
    assert (result.exit_code, says in said(result)) == (2, True)


@pytest.mark.parametrize("other", [("--qps", "3"), ("--arrivals", "trace"), ("--requests", "9")])
def test_hold_goes_with_nothing_that_fixes_the_rate_or_the_number(other: tuple[str, str]) -> None:
    result = antares("--hold", "0.9", *other)
    assert (result.exit_code, "--hold" in said(result)) == (2, True)


# --- bad usage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--profile", "b200"), (f"no profile 'b200': choose one of {', '.join(profile_names())}",)),
        (("--profile", "/nowhere/x.json"), ("/nowhere/x.json", "choose one of")),
        (("--workload", "chat"), ("unknown workload 'chat'", "sharegpt", "lmsys-like", "azure-conv", "small")),
        (("--policy", "best"), ("no policy is called 'best'", *POLICIES)),
        (("--policy", "scorpio:etta=1"), ("has no option 'etta'", "eta", "slack_s")),
        (("--policy", "scorpio:eta=x"), ("eta must be a number",)),
        (("--step-mode", "odd"), ("unknown step mode 'odd': choose one of chunked, prefill-first",)),
        (("--predictor", "tarot"), ("no predictor is called 'tarot'", "shipped", "oracle", "noise:SIGMA", "constant")),
        (("--predictor", "noise:x"), ("noise:SIGMA needs a number",)),
        (("--slo-table", "gpt"), ("unknown SLO table 'gpt'", "llama-3.1-8b", "gemma-2-27b")),
        (("--arrivals", "uniform"), ("unknown arrivals 'uniform'", "poisson", "gamma", "trace")),
        (("--arrivals", "trace", "--trace", "mine", "--qps", "3"), ("unknown trace 'mine'", "azure-code")),
        (("--mix", "fast"), ("--mix is written CATEGORY=WEIGHT",)),
        (("--mix", "9=1"), ("no category 9",)),
        (("--qps", "-3"), ("qps must be a positive number",)),
        (("--burstiness", "-3"), ("burstiness must be a positive number",)),
        (("--seed", "-1"), ("--seed must be at least 0",)),
        (("--hold", "1.5"), ("--hold is a share of all requests",)),
        (("--hold", "0"), ("--hold is a share of all requests",)),
        (("--max-num-seqs", "0"), ("--max-num-seqs",)),
        (("--replicas", "0"), ("--replicas",)),
        (("--kv-tokens", "50"), ("kv_tokens (50) must hold one sequence",)),
        (("--workload", "azure-conv", "--profile", "SLOW"), ("--max-prompt and --max-output",)),
        (("--frobnicate",), ("No such option",)),
    ],
)
def test_bad_usage_ends_with_2_and_says_what_there_is(arguments: Sequence[str], says: Sequence[str], slow: str) -> None:
    result = antares(*QUICK, *(slow if argument == "SLOW" else argument for argument in arguments))
    assert result.exit_code == 2
    assert all(part in said(result) for part in says), said(result)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_help_shows_how_to_ask_for_the_capacity() -> None:
    result = antares("--help")
    assert result.exit_code == 0
    assert "--hold" in result.stdout
