"""Counts what the gateway's process executes for one request and for one event: function calls and instructions.

    python -m benchmarks.overhead.calls
    python -m benchmarks.overhead.calls --module gateway/api
    python -m benchmarks.overhead.calls --before EARLIER.json --json > docs/results/calls.json
    python -m benchmarks.overhead.calls --page docs/results/calls.json

Counts hardly depend on other load of the machine, unlike times. A real gateway process with an API key, the default
policy, the predictor and metrics serves the load of `benchmarks.overhead.peers` in front of the scripted upstream. It
runs twice: under cProfile, which counts calls of Python and of built-in functions, and under valgrind's callgrind,
which counts instructions in user space. Without valgrind the instructions are missing. The kernel's work is in neither.

What an idle gateway executes in the same time is subtracted. A paced event counts beyond a streamed answer. The gateway
is up to 50 times slower while it is measured. So the predictor is asked that much later for lengths that no request
waits for. Full garbage collections and refits of the step-time model are off. They happen about once in a hundred
requests and take about 5 ms, so they would make a few requests look expensive.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import json
import marshal
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
import yaml

from benchmarks.command import AsJson, PageOf, print_results, write_page
from benchmarks.markdown import table, wrapped
from benchmarks.overhead.peers import processes
from benchmarks.overhead.peers.measure import Shape, free_port, served, until_up
from benchmarks.overhead.peers.servers import TREE, antares_config

_LATER_S = 1.0
"""`gateway.prediction.client.LATER_S` in the measured process, which is up to 50 times slower, in seconds."""

_SETTLE_S = 2.2 * _LATER_S
"""Time after a load for what the gateway does once it has answered, in seconds."""

_NEVER_S = 1e6
"""Longer than a measurement, in seconds."""

_IDLE_S = 6.0
"""Seconds in which an idle gateway is observed."""

_DUMP_S = 30.0
"""Longest time for a profile to be written, in seconds."""

_BUILTIN = "~"
"""The file that cProfile names for built-in functions."""


@dataclass(frozen=True, slots=True)
class Case:
    """One load, and the unit that its counts are for: a request, or an event of one stream.

    ``beyond``: the counts are for one of its tokens, beyond those of a request in the case with this name.
    """

    name: str
    shape: Shape
    beyond: str = ""


CASES = (
    Case("whole answer", Shape("whole", 1, 8, stream=False, requests=60, seconds=60.0, limit_s=60.0)),
    Case("streamed answer", Shape("streamed", 1, 8, stream=True, requests=60, seconds=60.0, limit_s=60.0)),
    Case("paced event", Shape("paced", 1, 401, stream=True, pace_ms=10.0, over_s=0.001), beyond="streamed answer"),
    Case("start of one of 100 streams", Shape("burst", 100, 1, stream=True, pace_ms=1.0, limit_s=60.0)),
)
WARM_UPS = (
    Shape("warm-up", 1, 8, stream=True, requests=30, seconds=60.0, limit_s=60.0),
    Shape("warm-up", 4, 8, stream=False, requests=30, seconds=60.0, limit_s=60.0),
)


@dataclass(slots=True)
class Counts:
    """What a process executed: calls of Python and of built-in functions, instructions, calls by source file."""

    python: float = 0.0
    builtin: float = 0.0
    instructions: float | None = None
    by_file: dict[str, float] = field(default_factory=dict)

    def minus(self, other: Counts, times: float) -> Counts:
        """Return these counts without ``times`` those of ``other``."""
        left: float | None = None
        if self.instructions is not None and other.instructions is not None:
            left = self.instructions - times * other.instructions
        by_file = {name: count - times * other.by_file.get(name, 0.0) for name, count in self.by_file.items()}
        return Counts(self.python - times * other.python, self.builtin - times * other.builtin, left, by_file)

    def per(self, units: int) -> Counts:
        """Return the counts for one of ``units``."""
        left = None if self.instructions is None else self.instructions / units
        by_file = {name: count / units for name, count in self.by_file.items()}
        return Counts(self.python / units, self.builtin / units, left, by_file)


# --- the measured process -----------------------------------------------------------------------------------------


def serve(config: str, profile_to: str) -> None:
    """Run the gateway. With ``profile_to``, SIGUSR2 starts to count calls, or writes the counts to this file."""
    from engine_adapter.step_time.model import StepTimeModel
    from gateway import cli, heap
    from gateway.prediction import client

    client.LATER_S = _LATER_S
    heap.CHECK_S = _NEVER_S
    StepTimeModel.refit = lambda model: None  # type: ignore[assignment, method-assign]
    if profile_to:
        signal.signal(signal.SIGUSR2, _Profile(Path(profile_to)).toggle)
    sys.argv = ["antares", "serve", "--config", config]
    cli.main()


class _Profile:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._profile: cProfile.Profile | None = None

    def toggle(self, *_: object) -> None:
        """Start, or write what was counted."""
        if self._profile is None:
            self._profile = cProfile.Profile()
            self._profile.enable()
            return
        profile, self._profile = self._profile, None
        profile.create_stats()
        calls = {(file, line, name): stats[1] for (file, line, name), stats in profile.stats.items()}
        part = self._file.with_suffix(".part")
        part.write_bytes(marshal.dumps(calls))
        part.rename(self._file)


# --- the two instruments --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class CallCounter:
    """Counts the calls in a gateway process by cProfile."""

    pid: int
    file: Path

    async def start(self) -> None:
        """Count from now on."""
        self.file.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR2)
        await asyncio.sleep(0.1)

    async def stop(self) -> Counts:
        """Return what was counted since `start`. Raises `TimeoutError`."""
        os.kill(self.pid, signal.SIGUSR2)
        async with asyncio.timeout(_DUMP_S):
            while not self.file.exists():
                await asyncio.sleep(0.05)
        return call_counts(marshal.loads(self.file.read_bytes()))


def call_counts(calls: Mapping[tuple[str, int, str], int]) -> Counts:
    """Return the sums of ``calls`` by function: (file, line, name)."""
    by_file: Counter[str] = Counter()
    for (file, _, _), count in calls.items():
        by_file[short_name(file)] += count
    builtin = by_file.pop(_BUILTIN, 0)
    return Counts(float(sum(by_file.values())), float(builtin), by_file={k: float(v) for k, v in by_file.items()})


def short_name(file: str) -> str:
    """Return a source file without the folder of its distribution."""
    return re.sub(rf"^{re.escape(str(TREE))}/|.*/site-packages/|.*/lib/python3\.\d+/", "", file)


@dataclass(slots=True)
class InstructionCounter:
    """Counts the instructions of a gateway process by callgrind."""

    pid: int
    file: Path

    async def start(self) -> None:
        """Count from now on."""
        await self._control("--instr=on")
        await self._control("--zero")

    async def stop(self) -> Counts:
        """Return what was counted since `start`."""
        await self._control("--dump")
        await self._control("--instr=off")
        dumps = sorted(self.file.parent.glob(f"{self.file.name}.*"), key=lambda dump: dump.stat().st_mtime_ns)
        total = re.search(r"^(?:totals|summary): (\d+)", dumps[-1].read_text(errors="replace"), re.MULTILINE)
        return Counts(instructions=float(total[1]) if total else None)

    async def _control(self, option: str) -> None:
        control = await asyncio.create_subprocess_exec(
            "callgrind_control",
            option,
            str(self.pid),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.STDOUT,
        )
        await control.wait()


# --- the measurement ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _gateway(folder: Path, upstream: int, with_valgrind: bool) -> AsyncIterator[tuple[int, Any]]:
    """Start a gateway; give its port and the counter of its process."""
    port, kind = free_port(), "instructions" if with_valgrind else "calls"
    config, counted = folder / f"{kind}.yaml", folder / kind
    config.write_text(yaml.safe_dump(antares_config(port, f"http://127.0.0.1:{upstream}")))
    profile_to = "" if with_valgrind else str(counted)
    code = f"from benchmarks.overhead.calls import serve; serve({str(config)!r}, {profile_to!r})"
    command = [sys.executable, "-c", code]
    if with_valgrind:
        options = ["--instr-atstart=no", f"--callgrind-out-file={counted}"]
        command = ["valgrind", "--tool=callgrind", *options, *command]
    log = folder / f"{kind}.log"
    async with processes.running(command, log, {"PYTHONPATH": str(TREE)}) as process:
        await until_up(port, process, "antares", log)
        counter = InstructionCounter if with_valgrind else CallCounter
        yield port, counter(process.pid, counted)


async def _count(folder: Path, upstream: int, with_valgrind: bool) -> dict[str, Counts]:
    """Return the counts for one unit of each of `CASES`."""
    found: dict[str, Counts] = {}
    async with _gateway(folder, upstream, with_valgrind) as (port, counter):
        for number, shape in enumerate(WARM_UPS):
            await served(port, shape, 100_000 * number)
        await asyncio.sleep(_SETTLE_S)
        await counter.start()
        await asyncio.sleep(_IDLE_S)
        idle = await counter.stop()
        for number, case in enumerate(CASES, len(WARM_UPS)):
            began = time.monotonic()
            await counter.start()
            answers, _ = await served(port, case.shape, 100_000 * number)
            await asyncio.sleep(_SETTLE_S)
            counts = (await counter.stop()).minus(idle, (time.monotonic() - began) / _IDLE_S)
            answered = len(answers.whole_s)
            if answers.failures or not answered:
                raise RuntimeError(f"{case.name}: {answers.failures} requests failed: {dict(answers.errors)}")
            if case.beyond:
                counts = counts.minus(found[case.beyond], 1.0).per(case.shape.tokens)
            found[case.name] = counts.per(answered)
    return found


async def measure() -> dict[str, Any]:
    """Return the counts of each case, as JSON."""
    with tempfile.TemporaryDirectory(prefix="antares-calls-") as name:
        folder, upstream = Path(name), free_port()
        run = f"from benchmarks.overhead.peers.upstream import run; run({upstream})"
        here = {"PYTHONPATH": str(TREE)}
        async with processes.running([sys.executable, "-c", run], folder / "upstream.log", here):
            found = await _count(folder, upstream, with_valgrind=False)
            if shutil.which("valgrind"):
                for case, counts in (await _count(folder, upstream, with_valgrind=True)).items():
                    found[case].instructions = counts.instructions
    return {"cases": {case: _document(counts) for case, counts in found.items()}}


def _document(counts: Counts) -> dict[str, Any]:
    by_file = sorted(counts.by_file.items(), key=lambda item: -item[1])
    return {
        "python_calls": round(counts.python, 1),
        "builtin_calls": round(counts.builtin, 1),
        "instructions": None if counts.instructions is None else round(counts.instructions),
        "calls_by_file": {file: round(calls, 2) for file, calls in by_file if calls >= 0.05},
    }


# --- the page ---------------------------------------------------------------------------------------------------------


def rows(cases: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[list[str]]:
    """Return a row for each case: calls and instructions, after those of ``before`` if there are any."""
    found = []
    for case, counts in cases.items():
        cells, earlier = _cells(counts), _cells((before or {}).get(case, {}))
        found.append([case, *(f"{old} → {new}" if old else new for old, new in zip(earlier, cells, strict=True))])
    return found


def _cells(counts: Mapping[str, Any]) -> list[str]:
    """Return calls and thousands of instructions; "" for all if there are no counts."""
    if not counts:
        return ["", "", ""]
    instructions = counts["instructions"]
    thousands = "-" if instructions is None else f"{instructions / 1e3:,.0f}"
    return [f"{counts['python_calls']:,.0f}", f"{counts['builtin_calls']:,.0f}", thousands]


def module_rows(cases: Mapping[str, Any], depth: int = 2, most: int = 30) -> list[list[str]]:
    """Return a row for each folder of ``depth`` parts: its Python calls in each case, the largest first."""
    of_case = {case: _by_folder(counts["calls_by_file"], depth) for case, counts in cases.items()}
    folders = sorted(
        {folder for counted in of_case.values() for folder in counted},
        key=lambda folder: (-max(counted[folder] for counted in of_case.values()), folder),
    )
    return [[folder, *(f"{counted[folder]:.1f}" for counted in of_case.values())] for folder in folders[:most]]


def _by_folder(by_file: Mapping[str, float], depth: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for file, calls in by_file.items():
        found["/".join(file.split("/")[:depth])] += calls  # type: ignore[assignment]
    return found


_BUILDS = """## The interpreter's build

These counts are of a CPython that was built without profile-guided optimisation, as pyenv builds it by default.
Debian's own executes 8% fewer instructions for a whole answer, 9% for a streamed one and 3% for an event (version 3.11
of both). The image of the Dockerfile has a build with that optimisation."""


def page(found: Mapping[str, Any]) -> str:
    """Return the page of a measurement."""
    cases, before = found["cases"], found.get("before")
    command = "python -m benchmarks.overhead.calls" + (" --before EARLIER.json" if before else "")
    parts = [
        "# What the gateway executes for a request and for an event",
        """Counts in user space of the gateway's process, in front of a scripted upstream, with an API key, the default
policy, the predictor and metrics. They hardly depend on the machine's other load. Answers have 8 tokens. A paced event
arrives alone. The 100 streams start at once on new connections, and have one token each.""",
        f"""```
{command} --json > docs/results/calls.json
python -m benchmarks.overhead.calls --page docs/results/calls.json
```""",
        *(["Before the arrow: an earlier version of the gateway."] if before else []),
        table(["for one", "Python calls", "built-in calls", "instructions, thousands"], rows(cases, before)),
        "## Python calls by folder",
        table(["folder", *cases], module_rows(cases)),
        _BUILDS,
    ]
    return "\n\n".join(wrapped(part) for part in parts) + "\n"


def main(
    as_json: AsJson = False,
    page_of: PageOf = None,
    before: Annotated[Path | None, typer.Option(help="The JSON of an earlier measurement, to show beside.")] = None,
    module: Annotated[str, typer.Option(help="Also list the calls by file under this folder.")] = "",
) -> None:
    """Count calls and instructions of the gateway for each case."""
    if page_of is not None:
        write_page(page_of, page)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure())
    if before is not None:
        found["before"] = json.loads(before.read_text(encoding="utf-8"))["cases"]
    print_results(found, as_json, page)
    if module and not as_json:
        files = {
            case: {"calls_by_file": {f: n for f, n in counts["calls_by_file"].items() if f.startswith(module)}}
            for case, counts in found["cases"].items()
        }
        sys.stdout.write("\n" + table(["file", *files], module_rows(files, depth=9, most=60)) + "\n")


if __name__ == "__main__":
    typer.run(main)
