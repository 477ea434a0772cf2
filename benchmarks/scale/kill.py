"""Kills one of two servers under load, and checks what the clients see.

    python -m benchmarks.scale.kill --servers http
    python -m benchmarks.scale.kill --servers ray

Two real vLLM on CPU start behind one gateway with the default policy, so a run takes a few minutes. Exit code 1 if a
check fails.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from urllib.parse import urlsplit

import psutil
import typer
import yaml

from benchmarks.command import AsJson, PageOf, chosen, print_results, write_page
from benchmarks.faults.checks import Ends, Snapshot, snapshot, verdict
from benchmarks.faults.client import chat, exchange
from benchmarks.faults.rig import Rig, free_port, until
from benchmarks.scale import kill_page
from benchmarks.scale.servers import COUNT, LIMIT_S, MODELS, Engine, Servers, make_servers

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "replicas.yaml"
KINDS = ("http", "ray")

CLASSES: dict[str, Any] = {
    "interactive": {"ttft_ms": 20_000, "tpot_ms": 2000},
    "chat": {"ttft_ms": 40_000, "tpot_ms": 4000},
    "batch": {"ttft_ms": 60_000, "on_unattainable": "best_effort"},
}
"""Bounds that one server keeps for all clients while the other one loads its model on the same cores. Otherwise the
policy rejects requests, rightly, and the check could not say that all the others are served."""

CLIENTS, WARM_S, IN_FLIGHT = 12, 10.0, 3
"""Clients; seconds of load before the kill; streams that the killed server must have begun."""

TOKENS = (24, 96)
"""Shortest and longest answer."""

SHORT_REQUESTS, SHORT_EVERY_S, SHORT_TOKENS = 30, 0.1, 4
"""Short requests from the kill on, and the seconds between two: the clients alone send too few in a second."""

MOVED_S = 1.0
"""Seconds from the close of the killed server's sockets to the last request that may be sent to it. The kernel needs up
to seconds to end a killed process on busy cores."""

ENDED_S = 60.0
"""Seconds that the processes of the killed server may take to end."""

TAKEN = 5
"""Requests that the replacement must have served before the load ends."""

BROKEN = r"200, then (engine_lost|draining)"
"""How a stream in flight on the killed server ends."""


@dataclass(slots=True)
class Sent:
    """One request of a client. Times are seconds since 1970; ``end``: see `benchmarks.faults.client.Reply`."""

    id: str
    slo_class: str
    sent_at: float
    end: str = ""
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def arrived_at(self) -> float:
        """When the gateway received it."""
        return _timestamp(self.record["time"])

    def placed_on(self, engine: str) -> list[float]:
        """Return when it was sent to the queue of ``engine``."""
        attempts = [attempt for attempt in self.record["attempts"] if attempt["engine"] == engine]
        return [self.arrived_at + attempt["placed_ms"] / 1000 for attempt in attempts]

    def had_begun(self, at: float) -> bool:
        """Whether its response had begun, and not ended, at ``at``."""
        first, ended = (self.record["timeline"][name] for name in ("first_token_ms", "ended_ms"))
        since_ms = (at - self.arrived_at) * 1000
        return first is not None and first <= since_ms < ended


@dataclass(slots=True)
class Observed:
    """What the gateway showed after the kill. Times are seconds since 1970.

    ``engine``: the killed server's name. ``survivor``: the other one's.
    ``closed_at``: when the kernel had closed the sockets of the killed server.
    ``shown_at``: when `/status`, and so `antares top`, showed that it is down.
    ``down_until``: when `/status` was last asked and showed fewer live engines than before.
    ``back_at``: when it showed as many as before.
    """

    engine: str
    survivor: str
    killed_at: float
    closed_at: float = 0.0
    shown_at: float = 0.0
    down_until: float = 0.0
    back_at: float = 0.0


def say(line: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(f"{line}\n")


async def measure(kind: str, engine: Engine, seed: int, warm_s: float = WARM_S) -> dict[str, Any]:
    """Return what happened in one run."""
    with tempfile.TemporaryDirectory(prefix="antares-scale-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        servers, running = make_servers(kind, engine, folder), None
        try:
            say(f"==> {kind}: starting two servers (vLLM on CPU takes a minute)")
            await servers.start()
            say("==> starting the gateway")
            running = await _gateway(servers, engine, folder)
            before, ends = await _warmed_up(running), Ends()
            sent, observed, ended_s = await _kill_under_load(running, servers, ends, seed, warm_s)
            for each in sent:
                reply = await running.get(f"/v1/requests/{each.id}")
                each.record = json.loads(reply.body)
            return await _row(kind, seed, running, before, ends, sent, observed, ended_s)
        finally:
            say("==> stopping everything")
            if running is not None:
                await running.stop()
            await servers.stop()


async def _gateway(servers: Servers, engine: Engine, folder: Path) -> Rig:
    document = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    common = {name: value for name, value in document["engines"][0].items() if name not in ("name", "base_url")}
    document |= {
        "engines": [{**common, **section} for section in servers.engines()],
        "predictor": {"state_dir": str(folder / "state"), "expected_tokens": sum(TOKENS) // 2},
        "classes": CLASSES,
    }
    port = free_port()
    document["server"] |= {"port": port, "drain_s": 5}
    running = Rig("http", folder, document, port, common["max_num_seqs"], {}, model=MODELS[engine])
    await running.start()
    await until(lambda: _all_alive(running, COUNT), LIMIT_S)
    return running


async def _engines(running: Rig) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = (await running.status())["engines"]
    return engines


async def _all_alive(running: Rig, count: int) -> bool:
    engines = await _engines(running)
    return len(engines) == count and all(engine["alive"] for engine in engines)


async def _warmed_up(running: Rig) -> Snapshot:
    """Send some requests, so that pools and caches fill, and return the state of the gateway."""
    body = chat(model=running.model, max_tokens=4)
    await asyncio.gather(*(exchange(running.port, body, limit_s=LIMIT_S) for _ in range(2 * CLIENTS)))
    return await snapshot(running)


async def _kill_under_load(
    running: Rig, servers: Servers, ends: Ends, seed: int, warm_s: float
) -> tuple[list[Sent], Observed, float | None]:
    """Load the gateway, kill a server, and go on until its replacement has served requests.

    Returns also the seconds until the processes of the killed server had ended; None if one still runs.
    """
    sent: list[Sent] = []
    stop = asyncio.Event()
    clients = [asyncio.create_task(_client(running, number, seed, sent, ends, stop)) for number in range(CLIENTS)]
    try:
        say(f"==> {CLIENTS} clients send streams of {len(CLASSES)} classes")
        await asyncio.sleep(warm_s)
        # The first server, or another one for other seeds.
        url = servers.urls()[seed % 2]
        name, survivor = (_engine_at(running, each) for each in (url, servers.urls()[1 - seed % 2]))
        await until(lambda: _busy(running, name), LIMIT_S, 0.02)
        lost = await servers.kill(url)
        observed = Observed(name, survivor, time.time())
        gone = asyncio.create_task(asyncio.to_thread(_ended_s, lost))
        clients.append(asyncio.create_task(_short_requests(running, sent, ends)))
        say(f"==> killed the server of engine {name}")
        await until(lambda: _is_closed(url), 30, 0.01)
        observed.closed_at = time.time()
        await until(lambda: _is_down(running, name), 30, 0.02)
        observed.shown_at = time.time()
        say("==> waiting for its replacement")
        await until(lambda: _is_replaced(running, observed), LIMIT_S, 0.1)
        say(f"==> the replacement is up after {observed.back_at - observed.killed_at:.0f} s")
        await until(lambda: _serves(running, observed), LIMIT_S, 0.2)
    finally:
        stop.set()
        await asyncio.gather(*clients)
    return sent, observed, await gone


async def _client(running: Rig, number: int, seed: int, sent: list[Sent], ends: Ends, stop: asyncio.Event) -> None:
    """Send one stream after the other."""
    choices = random.Random(f"{seed} {number}")
    names = list(CLASSES)
    turn = 0
    while not stop.is_set():
        request = Sent(f"client-{number}-{turn}", names[(number + turn) % len(names)], time.time())
        text = f"Tell me story {choices.randrange(10**6)}."
        await _send(running, request, text, choices.randint(*TOKENS), sent, ends)
        turn += 1


async def _short_requests(running: Rig, sent: list[Sent], ends: Ends) -> None:
    """Send short streams at a constant rate."""
    tasks = []
    for number in range(SHORT_REQUESTS):
        request = Sent(f"short-{number}", "interactive", time.time())
        tasks.append(asyncio.create_task(_send(running, request, "Say hello.", SHORT_TOKENS, sent, ends)))
        await asyncio.sleep(SHORT_EVERY_S)
    await asyncio.gather(*tasks)


async def _send(running: Rig, request: Sent, text: str, tokens: int, sent: list[Sent], ends: Ends) -> None:
    """Send ``request`` as a stream and note its end."""
    sent.append(request)
    headers = {"x-request-id": request.id, "x-slo-class": request.slo_class}
    body = chat(text, headers, model=running.model, stream=True, max_tokens=tokens, ignore_eos=True, temperature=0)
    request.end = (await ends.add(exchange(running.port, body, limit_s=LIMIT_S))).end


def _engine_at(running: Rig, url: str) -> str:
    """Return the gateway's name of the server at ``url``, from its log."""
    names: list[str] = re.findall(rf"engine (\S+) at {re.escape(url)} is up", running.log)
    return names[-1]


async def _busy(running: Rig, name: str) -> bool:
    """Whether the clients have begun to receive enough streams of the engine."""
    reply = await running.get("/v1/requests?outcome=open&limit=100")
    records = json.loads(reply.body)["data"]
    begun = [r for r in records if r["engine"] == name and r["timeline"]["first_token_ms"] is not None]
    return len(begun) >= IN_FLIGHT


async def _is_down(running: Rig, name: str) -> bool:
    return not any(engine["name"] == name and engine["alive"] for engine in await _engines(running))


async def _is_replaced(running: Rig, observed: Observed) -> bool:
    """Whether there are as many live engines as before. Notes the time."""
    asked_at, replaced = time.time(), await _all_alive(running, COUNT)
    if replaced:
        observed.back_at = time.time()
    else:
        observed.down_until = asked_at
    return replaced


async def _serves(running: Rig, observed: Observed) -> bool:
    """Whether the replacement has served enough requests."""
    reply = await running.get("/v1/requests?outcome=finished&limit=100")
    records = json.loads(reply.body)["data"]
    served = [r for r in records if r["engine"] != observed.survivor and _timestamp(r["time"]) > observed.back_at]
    return len(served) >= TAKEN


async def _is_closed(url: str) -> bool:
    """Whether no process listens at ``url``."""
    address = urlsplit(url)
    try:
        _, writer = await asyncio.open_connection(address.hostname, address.port)
    except OSError:
        return True
    writer.close()
    return False


def _ended_s(lost: Sequence[psutil.Process]) -> float | None:
    """Return the seconds until all processes have ended; None if one still runs."""
    started = time.monotonic()
    _, left = psutil.wait_procs(lost, timeout=ENDED_S)
    return None if left else round(time.monotonic() - started, 1)


async def _row(
    kind: str, seed: int, running: Rig, before: Snapshot, ends: Ends, sent: Sequence[Sent], observed: Observed,
    ended_s: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the record of a run, with what is wrong in ``problems``."""
    name, killed_at, back_at = observed.engine, observed.killed_at, observed.back_at
    left = await verdict(running, before, ends)
    ledger = (await running.status())["ledger"]
    in_flight = [each for each in sent if _was_in_flight(each, name, killed_at)]
    others = [each for each in sent if each not in in_flight]
    moved = [each for each in others if len(each.record["attempts"]) > 1]
    late = [at for each in sent for at in each.placed_on(name) if killed_at < at <= observed.down_until]
    taken = [e for e in sent if e.arrived_at > back_at and e.end == "200" and e.record["engine"] != observed.survivor]
    rejected = [each for each in others if each.end.startswith("429")]
    new = [each for each in sent if 0 < each.arrived_at - killed_at <= MOVED_S]
    row = {
        "servers": kind,
        "seed": seed,
        "requests": len(sent),
        "in_flight": len(in_flight),
        "broken": len([each for each in in_flight if re.fullmatch(BROKEN, each.end)]),
        "broken_within_s": _longest_s(in_flight, killed_at),
        "others": len(others),
        "completed": len([each for each in others if each.end == "200"]),
        "moved": len(moved),
        "rejected": len(rejected),
        "new_first_s": len(new),
        "new_ttft_s": _median_ttft_s(new),
        "new_while_down": len([each for each in sent if killed_at < each.arrived_at < back_at]),
        "closed_s": round(observed.closed_at - killed_at, 3),
        "leaves_s": round(max(late, default=killed_at) - killed_at, 3),
        "shown_s": round(observed.shown_at - killed_at, 3),
        "back_s": round(back_at - killed_at, 1),
        "taken": len(taken),
        "ended_s": ended_s,
        "ledger": {key: ledger[key] for key in ("accepted", "open", "finished", "failed", "rejected", "cancelled")},
        "lost": left.lost,
        "leaked_requests": left.leaked_requests,
        "leaked_descriptors": left.leaked_descriptors,
        "memory_mb": left.memory_mb,
        "ends": dict(ends.seen.most_common()),
    }
    return {**row, "problems": [*problems(row), *left.problems()]}


def _was_in_flight(each: Sent, engine: str, killed_at: float) -> bool:
    """Whether the engine was sending the response when it was killed."""
    return each.record["attempts"][-1]["engine"] == engine and each.had_begun(killed_at)


def _median_ttft_s(new: Sequence[Sent]) -> float | None:
    """Return the median TTFT (s) of the requests that got a token; None if none did."""
    first = [each.record["timeline"]["first_token_ms"] for each in new]
    known = [ms / 1000 for ms in first if ms is not None]
    return round(median(known), 2) if known else None


def _longest_s(broken: Sequence[Sent], killed_at: float) -> float:
    ends = [each.arrived_at + each.record["timeline"]["ended_ms"] / 1000 - killed_at for each in broken]
    return round(max(ends, default=0.0), 3)


def problems(row: dict[str, Any]) -> list[str]:
    """Return the checks that a run fails, one line each."""
    ledger = row["ledger"]
    closed = sum(ledger[name] for name in ("finished", "failed", "rejected", "cancelled"))
    checks: list[tuple[bool, Callable[[], str]]] = [
        (row["in_flight"] > 0, lambda: "no stream was in flight on the killed server"),
        (
            row["broken"] == row["in_flight"],
            lambda: f"{row['in_flight'] - row['broken']} streams in flight did not end with a clear error",
        ),
        (
            row["completed"] + row["rejected"] == row["others"],
            lambda: f"{row['others'] - row['completed'] - row['rejected']} other requests did not complete",
        ),
        (
            row["leaves_s"] <= row["closed_s"] + MOVED_S,
            lambda: f"new requests went to the killed server {row['leaves_s']} s after the kill",
        ),
        (row["new_first_s"] > 0, lambda: f"no request was sent in {MOVED_S:g} s after the kill"),
        (row["taken"] >= TAKEN, lambda: f"the replacement served {row['taken']} requests"),
        (ledger["accepted"] == closed and ledger["open"] == 0, lambda: f"the ledger does not balance: {ledger}"),
        (row["ended_s"] is not None, lambda: "a process of the killed server still runs"),
    ]
    return [text() for holds, text in checks if not holds]


def _timestamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def main(
    servers: Annotated[list[str] | None, typer.Option(help="http or ray; repeat for both. [default: both]")] = None,
    engine: Annotated[str, typer.Option(help="vllm, or simulated for a check within seconds.")] = "vllm",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each, with the seeds 0, 1, ...")] = 1,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    as_json: AsJson = False,
    page_of: PageOf = None,
) -> None:
    """Kill one of two servers under load. Exit code 1 if a check fails."""
    if page_of is not None:
        write_page(page_of, kill_page.page)
        return
    kinds = chosen("--servers", servers, KINDS)
    (name,) = chosen("--engine", [engine], MODELS)
    rows = []
    for number in range(seed, seed + runs):
        for kind in kinds:
            try:
                rows.append(asyncio.run(measure(kind, name, number)))  # type: ignore[arg-type]
            except (TimeoutError, RuntimeError) as error:
                say(f"FAILED: {kind}, seed {number}: {error}")
                raise typer.Exit(1) from error
            say(f"{rows[-1]}")
    found = {"engine": name, "seed": seed, "runs": runs, "cpus": psutil.cpu_count(), "rows": rows}
    print_results(found, as_json, kill_page.page)
    failed = [f"{row['servers']}, seed {row['seed']}: {line}" for row in rows for line in row["problems"]]
    say("\n".join(f"FAILED: {line}" for line in failed) or "all checks hold")
    raise typer.Exit(int(bool(failed)))


if __name__ == "__main__":
    typer.run(main)
