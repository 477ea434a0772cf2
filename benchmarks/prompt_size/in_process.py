"""Measures the error of the prompt size in-process (`kind: vllm`): a real vLLM renders each prompt with its tokenizer.

    python -m benchmarks.prompt_size.in_process --json > docs/results/prompt_size_in_process.json
    python -m benchmarks.prompt_size.page docs/results/prompt_size.json

Every request is served. The size that it was scheduled with is compared with the engine's ``usage.prompt_tokens``.
SmolLM2 reads no images. Its own template takes no tool calls, so that of `benchmarks.live.agent_session` is used.
Requests longer than the context are left out.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer
from rich.console import Console
from rich.progress import track

from benchmarks import results_json
from benchmarks.command import AsJson
from benchmarks.live.agent_session import MODEL, flags_text, real_vllm
from benchmarks.live.real_engine import RealEngine
from benchmarks.prompt_size.bodies import KINDS, make_bodies
from benchmarks.prompt_size.remote import summary
from gateway.app import Gateway
from gateway.requests.request import Request

TEXT_KINDS = tuple(kind for kind in KINDS if kind != "images")
MAX_BYTES = 12_000
"""Largest body (characters of its JSON): about 4,000 tokens, which two cores compute in seconds."""

console = Console(stderr=True)


class Scheduled:
    """Notes the prompt size of each request that is queued in ``gateway``. The engine's count replaces it later."""

    def __init__(self, gateway: Gateway) -> None:
        self.tokens = 0
        queue = gateway.engine_queues[0]
        self._submit = queue.submit
        queue.submit = self._note  # type: ignore[method-assign]

    def _note(self, request: Request, at_once: bool = False) -> asyncio.Future[Any]:
        self.tokens = request.prompt_tokens
        return self._submit(request, at_once)


async def served(url: str, gateway: Gateway, bodies: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Serve ``bodies`` one after the other. Return the kind, the scheduled and the true size of each."""
    scheduled, found = Scheduled(gateway), []
    options = {"model": MODEL, "max_tokens": 1, "temperature": 0}
    async with aiohttp.ClientSession() as http:
        for kind, body in track(bodies, "Serving", console=console):
            plain = {**body, **options, **({"tool_choice": "none"} if "tools" in body else {})}
            async with http.post(f"{url}/v1/chat/completions", json=plain) as response:
                answer = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"{kind}: status {response.status}, {answer}")
            found.append({"kind": kind, "scheduled": scheduled.tokens, "true": answer["usage"]["prompt_tokens"]})
    return found


async def study(requests: int, seed: int) -> dict[str, Any]:
    """Return the document of the study."""
    bodies = [body for body in make_bodies(TEXT_KINDS, 2 * requests, 1, seed) if len(str(body[1])) < MAX_BYTES]
    with tempfile.TemporaryDirectory(prefix="antares-prompts-") as folder:
        real = RealEngine(real_vllm(Path(folder)))
        console.print("Starting vLLM…")
        await real.start()
        try:
            async with real.gateway({"name": "fcfs"}) as (gateway, url):
                records = await served(url, gateway, bodies[:requests])
        finally:
            await real.engine.stop()
    rows = []
    for kind in (*TEXT_KINDS, "all"):
        errors = [r["scheduled"] / r["true"] - 1 for r in records if kind in (r["kind"], "all")]
        if errors:
            rows.append({"kind": kind, **summary(errors)})
    return {"seed": seed, "flags": flags_text(), "rows": rows, "records": records}


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests to serve.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of the requests.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Compare the prompt sizes that requests are scheduled with to the sizes that a real vLLM reports."""
    found = asyncio.run(study(requests, seed))
    if as_json:
        sys.stdout.write(results_json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
