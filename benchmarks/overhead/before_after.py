"""Compares the gateway's cost of two source trees: CPU time per request, and per streamed token.

    python -m benchmarks.overhead.before_after --before TREE --json > docs/results/hot_path.json
    python -m benchmarks.overhead.before_after --page docs/results/hot_path.json

``TREE`` is another checkout of the project (`git worktree add TREE COMMIT`). Each tree serves twice: around a simulated
engine, and as a proxy (``kind: http``) in front of one. All four servers run at the same time and take turns, so that
they share whatever else the machine does. One connection sends one request after the other. The predictor is off.

The cost is the CPU time of the server's process. Around an engine it includes the simulated engine. The proxies use
the same server, which runs the code of this tree.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import aiohttp
import typer
import yaml
from rich.console import Console
from rich.progress import track

from benchmarks.command import AsJson, PageOf, print_results, write_page
from benchmarks.markdown import table, wrapped
from benchmarks.overhead.gateway_cost import (
    MODEL,
    Server,
    free_port,
    gateway_config,
    start_process,
    step_times,
    until_up,
)
from benchmarks.overhead.peers.processes import own_thread_cpu_ns

KINDS = ("around", "in front")
TREES = ("before", "after")
STEP_MS = 1.0
WARM_UP = 100
"""Requests before the first turn: imports, caches and connections."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Requests of one kind: ``requests`` of them in a turn, with ``words`` of prompt and ``tokens`` of answer."""

    name: str
    requests: int
    words: int
    tokens: int
    stream: bool

    def body(self) -> dict[str, Any]:
        """The JSON body. The prompt is the same each time, so its blocks are found in the prefix index."""
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": "time people year " * (self.words // 3)}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            **options,
        }


SHAPES = (
    Shape("short prompt, one token", 40, 24, 1, stream=False),
    Shape("short prompt, one token, streamed", 40, 24, 1, stream=True),
    Shape("3,000-word prompt, one token", 20, 3000, 1, stream=False),
    Shape("short prompt, 400 tokens, streamed", 2, 24, 400, stream=True),
)
"""The last one also gives the cost per token: its cost beyond that of a one-token stream, over the further tokens."""


def cpu_s(pid: int) -> float:
    """Return the CPU seconds so far of the threads of ``pid``, without its child processes."""
    return sum(own_thread_cpu_ns(pid).values()) / 1e9


@contextlib.asynccontextmanager
async def servers(trees: dict[str, Path], folder: Path) -> AsyncIterator[dict[tuple[str, str], Server]]:
    """Start the gateway of each tree in both `KINDS`. Stops all of them when the block ends."""
    async with contextlib.AsyncExitStack() as stack:
        port = free_port()
        command = ["-m", "benchmarks.overhead.gateway_cost", "--engine-alone", str(port), "--step-ms", str(STEP_MS)]
        upstream = Server(f"http://127.0.0.1:{port}", await start_process(stack, command, Path.cwd()))
        await until_up(upstream, "/health")
        engines = {
            "around": {"kind": "simulated", "model": MODEL, "step_times": step_times(STEP_MS)},
            "in front": {"kind": "http", "base_url": upstream.url, "step_times": step_times(STEP_MS)},
        }
        found = {}
        for tree, path in trees.items():
            for kind in KINDS:
                port = free_port()
                config = folder / f"{tree}-{kind.replace(' ', '-')}.yaml"
                config.write_text(yaml.safe_dump(gateway_config(engines[kind], port)), encoding="utf-8")
                start = ["-c", "from gateway.cli import main; main()", "serve", "--config", str(config)]
                process = await start_process(stack, start, path)
                found[tree, kind] = Server(f"http://127.0.0.1:{port}", process)
        for serving in found.values():
            await until_up(serving, "/ready")
        yield found


async def turn(session: aiohttp.ClientSession, server: Server, shape: Shape, requests: int) -> float:
    """Send ``requests`` requests one after the other. Return CPU microseconds of the server for each."""
    body, url = shape.body(), server.url + "/v1/chat/completions"
    before = cpu_s(server.measured.pid)
    for _ in range(requests):
        async with session.post(url, json=body) as response:
            answer = await response.read()
            if response.status != 200 or (shape.stream and b"[DONE]" not in answer):
                raise RuntimeError(f"{url}: status {response.status}, {answer[:200]!r}")
    return 1e6 * (cpu_s(server.measured.pid) - before) / requests


async def measure(trees: dict[str, Path], rounds: int, shapes: Iterable[Shape] = SHAPES) -> list[dict[str, Any]]:
    """Return one record for each round, shape, kind of server and tree."""
    runs = []
    with tempfile.TemporaryDirectory(prefix="antares-cost-") as folder:
        async with servers(trees, Path(folder)) as found, aiohttp.ClientSession() as session:
            for server in found.values():
                for shape in shapes:
                    await turn(session, server, shape, max(1, WARM_UP // shape.tokens))
            for round_ in track(range(rounds), "Serving", console=Console(stderr=True)):
                # The order alternates, so that neither tree always runs first.
                order = list(found.items())[:: 1 if round_ % 2 == 0 else -1]
                for shape in shapes:
                    for (tree, kind), server in order:
                        cost = round(await turn(session, server, shape, shape.requests), 1)
                        runs.append({"round": round_, "shape": shape.name, "kind": kind, "tree": tree, "cpu_us": cost})
    return runs


def differences(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each kind and shape: medians of both trees, and quartiles of the rounds' differences."""
    by_run = {(run["kind"], run["shape"], run["tree"], run["round"]): run["cpu_us"] for run in runs}
    rows = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        for shape in dict.fromkeys(run["shape"] for run in runs):
            rounds = sorted({run["round"] for run in runs})
            before, after = ([by_run[kind, shape, tree, at] for at in rounds] for tree in TREES)
            rows.append(_row(kind, shape, before, after))
    return rows


def token_differences(
    runs: list[dict[str, Any]], one: Shape = SHAPES[1], many: Shape = SHAPES[3]
) -> list[dict[str, Any]]:
    """Return a row for each kind: the cost per token of a stream, beyond its first token."""
    by_run = {(run["kind"], run["shape"], run["tree"], run["round"]): run["cpu_us"] for run in runs}
    rows = []
    for kind in dict.fromkeys(run["kind"] for run in runs):
        rounds = sorted({run["round"] for run in runs})
        before, after = (
            [
                (by_run[kind, many.name, tree, at] - by_run[kind, one.name, tree, at]) / (many.tokens - one.tokens)
                for at in rounds
            ]
            for tree in TREES
        )
        rows.append(_row(kind, "per streamed token", before, after))
    return rows


def _row(kind: str, shape: str, before: list[float], after: list[float]) -> dict[str, Any]:
    added = [new - old for old, new in zip(before, after, strict=True)]
    low, _, high = quantiles(added, n=4, method="inclusive") if len(added) > 1 else added * 3
    return {
        "kind": kind,
        "shape": shape,
        "before": median(before),
        "after": median(after),
        "added": median(added),
        "low": low,
        "high": high,
    }


def page(found: dict[str, Any]) -> str:
    """Return the page: what was compared, the command, and the table."""
    rows = [*differences(found["runs"]), *token_differences(found["runs"])]
    cells = [
        [
            row["kind"],
            row["shape"],
            *(f"{row[key]:,.0f}" if row["before"] > 200 else f"{row[key]:,.1f}" for key in ("before", "after")),
            f"{row['added']:+,.1f} ({row['low']:+,.1f} to {row['high']:+,.1f})",
        ]
        for row in rows
    ]
    text = f"""# Cost of one request, before and after

**CPU.** CPU microseconds of the gateway's process for each request, at commit `{found["before"]}` (before: no prompt
features, no prefix index, no failover, no records, windows or edge limits) and `{found["after"]}` (after). Medians of
{found["rounds"]} rounds; in brackets the quartiles of the rounds' differences. All servers run at once and take turns
on a machine that is shared with other work. Each request therefore starts with cold CPU caches, as on a gateway with
few requests. One process that serves one request after another costs less. The predictor is off.

- *around*: a simulated engine in the gateway's process, whose cost is part of the number. Since then it tells the
  gateway the tokens of each prompt and has a prefix cache.
- *in front*: the gateway is a proxy of a server, as with `kind: http`.

```
git worktree add TREE {found["before"]}
python -m benchmarks.overhead.before_after --before TREE --json > docs/results/hot_path.json
python -m benchmarks.overhead.before_after --page docs/results/hot_path.json
```

{table(("gateway", "request", "before, µs", "after, µs", "added, µs"), cells)}
"""
    return wrapped(text) + "\n"


async def _commit(tree: Path) -> str:
    git = await asyncio.create_subprocess_exec(
        "git", "-C", str(tree), "rev-parse", "--short", "HEAD", stdout=asyncio.subprocess.PIPE
    )
    return (await git.communicate())[0].decode().strip()


async def compared(before: Path, rounds: int) -> dict[str, Any]:
    """Return the JSON document of the study."""
    trees = {"before": before, "after": Path.cwd()}
    commits = {name: await _commit(tree) for name, tree in trees.items()}
    runs = await measure(trees, rounds)
    return {**commits, "rounds": rounds, "cpus": os.cpu_count(), "shapes": [asdict(s) for s in SHAPES], "runs": runs}


def main(
    before: Annotated[Path | None, typer.Option(help="Checkout of the commit to compare with.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the servers take turns.")] = 40,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Compare the gateway's CPU time per request with that of another checkout."""
    if page_of is not None:
        write_page(page_of, page)
        return
    if before is None:
        raise typer.BadParameter("the other checkout is required", param_hint="--before")
    found = asyncio.run(compared(before.resolve(), rounds))
    print_results(found, as_json, page)


if __name__ == "__main__":
    typer.run(main)
