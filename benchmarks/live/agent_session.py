"""Measures agent sessions with tools on a real vLLM with prefix caching: predicted TTFT, rejections and adherence.

    python -m benchmarks.live.agent_session --json > docs/results/agent_session.json
    python -m benchmarks.live.agent_session_page docs/results/agent_session.json

An agent sends 40 requests. Each resends the whole history: tools, parallel tool calls, and their results. Outputs have
a fixed length, and the history is scripted, so that all runs serve the same requests. A nonce at the start of a session
keeps its blocks apart from those of other sessions.

1. *Calibration*: stock vLLM (`fcfs`, which sends no pace) serves the sessions. A straight line is fitted to the TTFTs
   of the turns. The TTFT bound of a turn is a multiple of the line's value. The first turn has nothing cached, so its
   bound is the same multiple of its measured TTFT. The TPOT bound is the same multiple of the median TPOT.
2. *Rounds*: `fcfs` and `slack` take turns to serve new sessions under these bounds, on the same engine.

A rejection is *wrong* if stock vLLM met the bounds at that turn in the same round.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import typer
from rich.console import Console

from benchmarks import results_json
from benchmarks.command import AsJson
from benchmarks.live.real_engine import RealEngine
from engine_adapter.build import BUILDERS
from engine_adapter.engine import Engine

MODEL = "smollm2-135m-instruct"
POLICIES = ("fcfs", "slack")
OUTPUT_TOKENS = 16
THINK_S = 0.05
"""Seconds that an agent's tools take."""

_TEMPLATE = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else 'You are a helpful assistant.' -%}
<|im_start|>system
{{ system }}
{%- if tools %}

# Tools
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
{%- endif %}<|im_end|>
{% for message in messages if message['role'] != 'system' -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] or '' }}
{%- for call in message['tool_calls'] or [] %}
<tool_call>
{{ call['function'] | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""ChatML with tools in Hermes' format. SmolLM2's own template leaves out tools and calls."""

console = Console(stderr=True)


def flags(folder: Path) -> dict[str, Any]:
    """Return the flags of `vllm serve`."""
    template = folder / "hermes.jinja"
    template.write_text(_TEMPLATE, encoding="utf-8")
    return {
        "max-model-len": 8192,
        "max-num-seqs": 16,
        "max-num-batched-tokens": 512,
        "enable-prefix-caching": True,
        "enable-prompt-tokens-details": True,
        "chat-template": str(template),
        "enforce-eager": True,
        "dtype": "float32",
    }


def real_vllm(folder: Path) -> Engine:
    """Return vLLM on CPU with SmolLM2-135M-Instruct, not started."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "3", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    model = f"builtin:{MODEL}"
    return BUILDERS["vllm"](name=MODEL, model=model, served_model_name=MODEL, flags=flags(folder), env=env)


# --- the workload -----------------------------------------------------------------------------------------------------

_TOOLS = {
    "read_file": ("Read a file of the workspace.", ("path", "first_line", "last_line")),
    "search": ("Search the workspace for a regular expression.", ("pattern", "folder")),
    "run": ("Run a command in a shell and return its output.", ("command", "timeout_s")),
    "edit_file": ("Replace a text in a file.", ("path", "old", "new")),
    "fetch": ("Fetch a web page as text.", ("url",)),
    "note": ("Keep a note for later steps of the plan.", ("title", "text")),
}


def tools() -> list[dict[str, Any]]:
    """Return the agent's tools."""
    found = []
    for name, (description, arguments) in _TOOLS.items():
        properties = {
            a: {"type": "string", "description": f"The {a.replace('_', ' ')} of the call."} for a in arguments
        }
        parameters = {"type": "object", "properties": properties, "required": list(arguments)}
        function = {"name": name, "description": description, "parameters": parameters}
        found.append({"type": "function", "function": function})
    return found


def session(turns: int, seed: int, nonce: str) -> list[list[dict[str, Any]]]:
    """Return the messages of each turn: those of the turn before, then calls of one to four tools and their results."""
    rng = random.Random(seed)
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": f"Session {nonce}. You are a coding agent. Use the tools; answer briefly."},
        {
            "role": "user",
            "content": "The test suite of the service fails since this morning. Find the cause and fix it.",
        },
    ]
    found = [list(messages)]
    for turn in range(1, turns):
        calls = [_call(rng, turn, number) for number in range(rng.choice((1, 2, 3, 4)))]
        messages.append({"role": "assistant", "content": None, "tool_calls": calls})
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": _result(rng)} for call in calls]
        found.append(list(messages))
    return found


def _call(rng: random.Random, turn: int, number: int) -> dict[str, Any]:
    name = rng.choice(list(_TOOLS))
    arguments = {argument: f"{rng.choice(_WORDS)}_{rng.randrange(100)}" for argument in _TOOLS[name][1]}
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{turn:03d}_{number}", "type": "function", "function": function}


def _result(rng: random.Random) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(4, 30)))


_WORDS = (
    *("error", "test", "module", "value", "line", "file", "path", "retry", "queue", "timeout", "config"),
    *("worker", "request", "response", "passed", "failed"),
)


# --- one session ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of each turn (ms): ``first_ms`` for the first, then ``base_ms`` + ``turn_ms`` * turn; and TPOT."""

    first_ms: float
    base_ms: float
    turn_ms: float
    tpot_ms: float

    def ttft_ms(self, turn: int) -> float:
        """Return the TTFT bound of a turn."""
        return self.first_ms if turn == 0 else self.base_ms + self.turn_ms * turn


LOOSE = Bounds(600_000, 600_000, 0, 10_000)


async def run_agent(
    http: aiohttp.ClientSession, url: str, turns: list[list[dict[str, Any]]], bounds: Bounds, agent: int
) -> list[dict[str, Any]]:
    """Send the turns of one agent, one after the other. Return one record each."""
    found = []
    for turn, messages in enumerate(turns):
        record = await _send(http, url, messages, bounds.ttft_ms(turn), bounds.tpot_ms)
        found.append({"agent": agent, "turn": turn, "bound_ms": round(bounds.ttft_ms(turn)), **record})
        await asyncio.sleep(THINK_S)
    return found


async def _send(
    http: aiohttp.ClientSession, url: str, messages: list[dict[str, Any]], ttft_ms: float, tpot_ms: float
) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "messages": messages,
        "tools": tools(),
        # The template renders the tools, but no parser withholds the output while it may be a call.
        "tool_choice": "none",
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"x-slo-ttft-ms": f"{ttft_ms:.0f}", "x-slo-tpot-ms": f"{tpot_ms:.0f}", "x-slo-report": "1"}
    started = time.monotonic()
    async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        if response.status == 429:
            error = (await response.json())["error"]
            return {"status": 429, "code": error["code"], "predicted_ms": error.get("predicted_ms")}
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {(await response.text())[:300]}")
        report, usage = await _read_stream(response.content)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return {
        "status": 200,
        "attained": report["attained"],
        "ttft_ms": report["ttft_ms"],
        "predicted_ms": report["predicted_ttft_ms"],
        "tpot_ms": report["tpot_ms"],
        "e2e_ms": round(1e3 * (time.monotonic() - started), 1),
        "prompt": usage["prompt_tokens"],
        "cached": cached,
    }


async def _read_stream(lines: aiohttp.StreamReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the SLO report and the usage of a stream. Raises `RuntimeError` if one is missing."""
    report: dict[str, Any] = {}
    usage: dict[str, Any] = {}
    async for line in lines:
        if line.startswith(b": antares "):
            report = json.loads(line[len(b": antares ") :])
        elif line.startswith(b"data: {"):
            usage = json.loads(line[6:]).get("usage") or usage
    if not report or not usage:
        raise RuntimeError("the stream has no SLO report or no usage")
    return report, usage


# --- the study --------------------------------------------------------------------------------------------------------


async def run_sessions(
    real: RealEngine, policy: str, bounds: Bounds, agents: int, turns: int, seed: int, nonce: str
) -> list[dict[str, Any]]:
    """Serve ``agents`` concurrent sessions behind a new gateway with ``policy``. Return the records of all turns."""
    scripts = [session(turns, seed + agent, f"{nonce}-{agent}") for agent in range(agents)]
    timeout = aiohttp.ClientTimeout(total=600)
    async with real.gateway({"name": policy}) as (_, url), aiohttp.ClientSession(timeout=timeout) as http:
        runs = await asyncio.gather(
            *(run_agent(http, url, script, bounds, agent) for agent, script in enumerate(scripts))
        )
    return [record for run in runs for record in run]


def bounds_from(records: list[dict[str, Any]], multiple: float) -> Bounds:
    """Return bounds of ``multiple`` times what ``records`` achieved."""
    first = [r["ttft_ms"] for r in records if r["turn"] == 0]
    later = [r for r in records if r["turn"] > 0]
    slope, base = np.polyfit([r["turn"] for r in later], [r["ttft_ms"] for r in later], 1)
    tpot = float(np.median([r["tpot_ms"] for r in records]))
    return Bounds(*(round(multiple * float(x), 1) for x in (max(first), base, slope, tpot)))


async def measure(agents: tuple[int, ...], turns: int, rounds: int, multiple: float, seed: int) -> dict[str, Any]:
    """Return the document of the study."""
    runs: list[dict[str, Any]] = []
    groups = []
    with tempfile.TemporaryDirectory(prefix="antares-agents-") as folder:
        engine = real_vllm(Path(folder))
        real = RealEngine(engine)
        console.print("Starting vLLM…")
        await real.start()
        try:
            await run_sessions(real, "fcfs", LOOSE, 1, min(10, turns), seed, "warm-up")
            for count in agents:
                stock = await run_sessions(real, "fcfs", LOOSE, count, turns, seed, f"calibration-{count}")
                bounds = bounds_from(stock, multiple)
                groups.append({"agents": count, "bounds": asdict(bounds), "calibration": stock})
                for round_ in range(rounds):
                    for policy in POLICIES[:: 1 if round_ % 2 == 0 else -1]:
                        nonce = f"{policy}-{count}-{round_}"
                        records = await run_sessions(real, policy, bounds, count, turns, seed + 10 * round_, nonce)
                        run = {"agents": count, "round": round_, "policy": policy, "records": records}
                        console.print(line(run))
                        runs.append(run)
        finally:
            await engine.stop()
    calls = sum(len(m.get("tool_calls") or ()) for m in session(turns, seed, "")[-1])
    return {
        "seed": seed, "turns": turns, "calls": calls, "rounds": rounds, "multiple": multiple,
        "output_tokens": OUTPUT_TOKENS, "cpus": os.cpu_count(), "flags": flags_text(), "groups": groups,
        "runs": runs,
    }  # fmt: skip


def flags_text() -> str:
    """Return the flags of vLLM as text, for the page."""
    with tempfile.TemporaryDirectory() as folder:
        shown = flags(Path(folder))
    del shown["chat-template"]
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def prediction_errors(records: list[dict[str, Any]]) -> list[float]:
    """Return predicted over measured TTFT, less 1, of the requests that were served with a prediction."""
    served = [r for r in records if r["status"] == 200 and r["predicted_ms"]]
    return [r["predicted_ms"] / r["ttft_ms"] - 1 for r in served]


def adherence(records: list[dict[str, Any]]) -> float:
    """Return the share of requests that attained their bounds; rejected ones did not."""
    return sum(r.get("attained") is True for r in records) / len(records)


def line(run: dict[str, Any]) -> str:
    """Return one line about a run."""
    records = run["records"]
    errors = np.abs(prediction_errors(records) or [float("nan")])
    rejected = sum(r["status"] == 429 for r in records)
    return (
        f"{run['agents']} agents, round {run['round']}, {run['policy']}: adherence {adherence(records):.3f}, "
        f"{rejected} of {len(records)} rejected, prediction error p50 {np.quantile(errors, 0.5):.1%}, "
        f"p90 {np.quantile(errors, 0.9):.1%}"
    )


def main(
    agents: Annotated[list[int] | None, typer.Option(help="Concurrent sessions; repeat. [default: 1, 3]")] = None,
    turns: Annotated[int, typer.Option(min=3, help="Requests of a session.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the policies take turns.")] = 2,
    multiple: Annotated[float, typer.Option(help="Bounds as a multiple of what stock vLLM achieves.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of the sessions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Serve agent sessions on a real vLLM, with stock scheduling and with `slack`."""
    found = asyncio.run(measure(tuple(agents or (1, 3)), turns, rounds, multiple, seed))
    if as_json:
        sys.stdout.write(results_json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
