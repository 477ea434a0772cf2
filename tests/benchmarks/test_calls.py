"""benchmarks.overhead.calls: what is counted for one request, and its tables."""

from __future__ import annotations

import marshal
from pathlib import Path

import pytest

from benchmarks.overhead import calls
from benchmarks.overhead.calls import CASES, Counts, call_counts, module_rows, page, rows, short_name
from benchmarks.overhead.peers.servers import TREE

FOUND = {
    "cases": {
        case.name: {
            "python_calls": 1000.0,
            "builtin_calls": 1200.0,
            "instructions": instructions,
            "calls_by_file": {"gateway/api/proxy.py": 3.0, "gateway/api/call.py": 2.0, "engine_adapter/asgi.py": 1.0},
        }
        for case, instructions in zip(CASES, (2_500_000, None, 30_000, 2_400_000), strict=True)
    }
}


def test_call_counts_separates_builtin_functions() -> None:
    counts = call_counts(
        {
            ("~", 0, "<built-in method len>"): 7,
            (f"{TREE}/gateway/app.py", 1, "f"): 2,
            (f"{TREE}/gateway/app.py", 9, "g"): 1,
        }
    )
    assert (counts.python, counts.builtin, counts.by_file) == (3.0, 7.0, {"gateway/app.py": 3.0})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (f"{TREE}/gateway/app.py", "gateway/app.py"),
        ("/x/.venv/lib/python3.11/site-packages/numpy/f.py", "numpy/f.py"),
        ("/usr/lib/python3.11/asyncio/locks.py", "asyncio/locks.py"),
    ],
)
def test_short_name_drops_the_folder_of_the_distribution(file: str, name: str) -> None:
    assert short_name(file) == name


def test_counts_subtract_an_idle_process_and_divide_by_units() -> None:
    counts = Counts(100.0, 50.0, 9000.0, {"a": 100.0}).minus(Counts(10.0, 5.0, 1000.0, {"a": 10.0}), 2.0).per(4)
    assert counts == Counts(20.0, 10.0, 1750.0, {"a": 20.0})
    assert Counts(1.0, 1.0, None).minus(Counts(instructions=3.0), 1.0).instructions is None


def test_rows_show_thousands_of_instructions_or_none() -> None:
    assert rows(FOUND["cases"])[:2] == [
        [CASES[0].name, "1,000", "1,200", "2,500"],
        [CASES[1].name, "1,000", "1,200", "-"],
    ]


def test_rows_show_an_earlier_measurement_beside() -> None:
    earlier = {CASES[0].name: {**FOUND["cases"][CASES[0].name], "python_calls": 1500.0}}
    assert rows(FOUND["cases"], earlier)[0][1] == "1,500 → 1,000"
    assert rows(FOUND["cases"], earlier)[1][1] == "1,000"


def test_module_rows_sum_the_files_of_a_folder() -> None:
    assert module_rows(FOUND["cases"])[0] == ["gateway/api", *["5.0"] * len(CASES)]
    assert "| gateway/api | 5.0 |" in page(FOUND)


def test_profile_writes_the_calls_between_two_signals(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    profile = calls._Profile(file)
    profile.toggle()
    short_name("x")
    profile.toggle()
    counts = call_counts(marshal.loads(file.read_bytes()))
    assert counts.by_file["benchmarks/overhead/calls.py"] >= 1
