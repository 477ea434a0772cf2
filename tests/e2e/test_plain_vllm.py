"""A plain `vllm serve` with our scheduler class, behind a gateway without an in-process engine.

It has features that the in-process engines of other tests do not have: docs/vllm-features.md.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.live.dummy_adapter import RANK, write_lora_adapter
from benchmarks.live.dummy_model import write_dummy_model
from tests.fixtures.plain_vllm import plain_vllm
from tests.fixtures.served import Served, free_port, serve

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SLOTS = 8
REPORT_KEY = "the key of the report channel of this test"


@pytest.fixture(scope="module")
def report_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory, report_port: int) -> Iterator[str]:
    """The base URL of a `vllm serve` with the report channel."""
    folder = tmp_path_factory.mktemp("plain")
    model = write_dummy_model(folder / "model")
    adapter = write_lora_adapter(folder / "adapter", model)
    flags = ["--max-num-seqs", str(SLOTS), "--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
    flags += ["--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"adapter={adapter}"]
    environment = {"ANTARES_REPORT_ADDRESS": f"127.0.0.1:{report_port}", "ANTARES_REPORT_KEY": REPORT_KEY}
    with plain_vllm(folder, model, flags, environment) as url:
        yield url


@pytest.fixture(scope="module")
def served(vllm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = {"kind": "http", "name": "plain", "base_url": vllm}
    classes = {"strict": {"ttft_ms": 60_000, "tpot_ms": 2000}, "loose": {"ttft_ms": 60_000, "tpot_ms": 4000}}
    # SCORPIO's gate shares steps by TPOT bounds, which the measured TPOT shows.
    config = {"engines": [engine], "classes": classes, "default_class": "loose", "policy": {"name": "scorpio"}}
    running = serve(tmp_path_factory.mktemp("light"), config)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def reporting(vllm: str, report_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway with the default policy, to which the server reports."""
    report = {"port": report_port, "key_env": "TEST_REPORT_KEY"}
    engine = {"kind": "http", "name": "plain", "base_url": vllm, "report": report}
    classes = {"paced": {"ttft_ms": 60_000, "tpot_ms": 900}, "free": {}}
    config = {"engines": [engine], "classes": classes, "default_class": "free"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_REPORT_KEY", REPORT_KEY)
        running = serve(tmp_path_factory.mktemp("reporting"), config)
    yield running
    running.stop()


USAGE_IN_EACH_EVENT = {"include_usage": True, "continuous_usage_stats": True}


def body(tokens: int) -> dict[str, object]:
    return {"model": "small", "prompt": "one two three", "max_tokens": tokens, "ignore_eos": True}


async def metric(http: httpx.AsyncClient, name: str) -> float:
    """Return the value of vLLM's metric ``name``, summed over all series."""
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


async def test_gate_paces_requests_of_a_plain_vllm_server(served: Served) -> None:
    """While the strict request runs, the loose ones decode in every other step. Tokens are counted, not timed."""
    tokens = dict.fromkeys(("strict", "loose 1", "loose 2"), 0)
    began, ended = dict(tokens), dict(tokens)
    async with httpx.AsyncClient(base_url=served.base, timeout=120, trust_env=False) as http:

        async def stream(name: str) -> None:
            request = {**body(100), "stream": True, "stream_options": USAGE_IN_EACH_EVENT}
            headers = {"x-slo-class": name.split(maxsplit=1)[0]}
            async with http.stream("POST", "/v1/completions", json=request, headers=headers) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        tokens[name] = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
                        if name == "strict":
                            ended.update(tokens)
                            if not began["strict"]:
                                began.update(tokens)

        await stream("strict")
        tokens.update(dict.fromkeys(tokens, 0))
        began.update(tokens)
        await asyncio.gather(*(stream(name) for name in tokens))
    assert set(tokens.values()) == {100}
    steps = ended["strict"] - began["strict"]
    for name in ("loose 1", "loose 2"):
        assert 0.25 * steps < ended[name] - began[name] < 0.75 * steps, (began, ended)


async def test_gateway_observes_first_token_of_non_streaming_request(served: Served) -> None:
    async with httpx.AsyncClient(base_url=served.base, timeout=120, trust_env=False) as http:
        completion = (await http.post("/v1/completions", json=body(30), headers={"x-slo-report": "1"})).json()
    report = completion["antares"]
    assert completion["usage"]["completion_tokens"] == report["output_tokens"] == 30
    assert 0 < report["ttft_ms"] < report["e2e_ms"]


CHATS = (
    "Write a friendly note to the neighbours about the street party next month, and ask who can bring chairs. " * 4,
    "def area(width: float, height: float) -> float:\n    return width * height\n" * 6,
    "老师让我们把昨天的实验结果写成一篇短文，下周一之前交。" * 5,
    "Завтра утром мы поедем на дачу и посадим картошку, если не будет дождя. " * 4,
)


async def test_sizes_of_chats_are_estimated_well_from_the_first_one(served: Served) -> None:
    """The server's own ``/tokenize`` counted the sample chats when the gateway found it."""

    def errors(text: str, limit: str) -> float:
        name = f'antares_prompt_size_error_ratio_bucket{{le="{limit}",model="small"}}'
        return float(text.split(name)[1].split(maxsplit=1)[0]) if name in text else 0.0

    async with httpx.AsyncClient(base_url=served.base, timeout=120, trust_env=False) as http:
        before = (await http.get("/metrics")).text
        for chat in CHATS:
            message = {"role": "user", "content": chat}
            answer = await http.post(
                "/v1/chat/completions", json={"model": "small", "messages": [message], "max_tokens": 2}
            )
            assert answer.status_code == 200, answer.text
        # A request ends a moment after its client has the response.
        async with asyncio.timeout(60):
            while errors(after := (await http.get("/metrics")).text, "+Inf") - errors(before, "+Inf") < len(CHATS):
                await asyncio.sleep(0.05)
    assert errors(after, "+Inf") - errors(before, "+Inf") == len(CHATS)
    assert errors(after, "0.2") - errors(before, "0.2") >= len(CHATS) - 1


def test_gateway_process_loads_neither_torch_nor_vllm(served: Served) -> None:
    maps = Path(f"/proc/{served.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "vllm" not in maps


async def test_gates_do_not_change_generated_text(vllm: str) -> None:
    async with httpx.AsyncClient(base_url=vllm, timeout=120, trust_env=False) as http:
        texts = []
        for gate in (None, "credit", "slack", "unknown gate"):
            xargs = {} if gate is None else {"vllm_xargs": {"antares_tpot_ms": 500, "antares_gate": gate}}
            response = await http.post("/v1/completions", json={**body(20), "temperature": 0, **xargs})
            assert response.status_code == 200
            texts.append(response.json()["choices"][0]["text"])
    assert len(set(texts)) == 1


async def test_lora_adapter_is_served_with_a_pace(vllm: str, served: Served) -> None:
    async with httpx.AsyncClient(timeout=120, trust_env=False) as http:

        async def text(base: str, model: str) -> str:
            request = {**body(20), "model": model, "temperature": 0}
            response = await http.post(f"{base}/v1/completions", json=request, headers={"x-slo-class": "strict"})
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["text"])

        paced = await text(served.base, "adapter")
        assert paced == await text(vllm, "adapter")
        assert paced != await text(vllm, "small")


async def test_whole_prompts_are_computed_beside_paced_decodes(vllm: str) -> None:
    """Chunked prefill is off."""
    async with httpx.AsyncClient(base_url=vllm, timeout=120, trust_env=False) as http:

        async def complete(prompt: str, tokens: int) -> int:
            xargs = {"antares_gate": "slack", "antares_tpot_ms": 300}
            request = {**body(tokens), "prompt": prompt, "vllm_xargs": xargs}
            response = await http.post("/v1/completions", json=request)
            assert response.status_code == 200, response.text
            return int(response.json()["usage"]["completion_tokens"])

        paced = asyncio.create_task(complete("one", 300))
        while await metric(http, "num_requests_running") < 1:
            await asyncio.sleep(0.02)
        assert await complete("two " * 600, 2) == 2
        assert not paced.done()
        assert await paced == 300


async def test_best_effort_preemption_loses_no_token(vllm: str) -> None:
    async with httpx.AsyncClient(base_url=vllm, timeout=300, trust_env=False) as http:

        async def complete(tokens: int, **xargs: object) -> dict[str, Any]:
            request = {**body(tokens), "temperature": 0, "vllm_xargs": {"antares_gate": "slack", **xargs}}
            response = await http.post("/v1/completions", json=request)
            assert response.status_code == 200, response.text
            return response.json()

        before = await metric(http, "num_preemptions_total")
        best_effort = [asyncio.create_task(complete(600)) for _ in range(SLOTS)]
        while await metric(http, "num_requests_running") < SLOTS:
            await asyncio.sleep(0.02)
        await asyncio.gather(*[complete(40, antares_tpot_ms=900) for _ in range(3)])
        assert not any(task.done() for task in best_effort), "the paced requests ran before any of the eight ended"
        completions = await asyncio.gather(*best_effort)
        # vLLM counts a preemption with the next token of the preempted request. On a busy machine, a paced request may
        # arrive once another one has ended, and take its slot.
        assert 1 <= await metric(http, "num_preemptions_total") - before <= 3
        assert {completion["usage"]["completion_tokens"] for completion in completions} == {600}
        assert len({completion["choices"][0]["text"] for completion in completions}) == 1, "five were not preempted"


async def steps_of(http: httpx.AsyncClient, tokens: int) -> dict[str, Any]:
    """Have the server generate ``tokens``, and return the status of the engine once it has reported these steps."""

    async def engine() -> dict[str, Any]:
        return (await http.get("/status")).json()["engines"][0]

    async with asyncio.timeout(60):
        while (await engine())["reports"] != "channel":
            await asyncio.sleep(0.05)
    before = (await engine())["steps_seen"]
    assert (await http.post("/v1/completions", json=body(tokens))).status_code == 200
    async with asyncio.timeout(60):
        # A step for each token, or more if a step computed nothing for the last one.
        while (found := await engine())["steps_seen"] < before + tokens:
            await asyncio.sleep(0.05)
    return found


async def test_server_reports_its_steps_and_limits_to_the_gateway(reporting: Served) -> None:
    async with httpx.AsyncClient(base_url=reporting.base, timeout=120, trust_env=False) as http:
        assert (await steps_of(http, 60))["slots"] == SLOTS, "the configuration does not say so"


async def test_gateway_preempts_best_effort_requests_of_a_remote_server(reporting: Served) -> None:
    """Paced requests run at once although best-effort ones have all slots, and these lose no token."""
    async with httpx.AsyncClient(base_url=reporting.base, timeout=300, trust_env=False) as http:

        async def complete(tokens: int, slo_class: str) -> dict[str, Any]:
            request = {**body(tokens), "temperature": 0}
            response = await http.post("/v1/completions", json=request, headers={"x-slo-class": slo_class})
            assert response.status_code == 200, response.text
            return response.json()

        # The server counts since its start, and the gateway knows the count from the first report.
        await steps_of(http, 2)
        before = reporting.metric("antares_best_effort_preemptions_total")
        best_effort = [asyncio.create_task(complete(900, "free")) for _ in range(SLOTS)]
        async with asyncio.timeout(60):
            # In a thread, so that the requests are sent meanwhile.
            while await asyncio.to_thread(reporting.metric, "antares_engine_running_sequences") < SLOTS:
                await asyncio.sleep(0.02)
        await asyncio.gather(*[complete(40, "paced") for _ in range(3)])
        assert not any(task.done() for task in best_effort), "the paced requests ran before any of the eight ended"
        texts = {completion["choices"][0]["text"] for completion in await asyncio.gather(*best_effort)}
        assert len(texts) == 1
        assert 1 <= reporting.metric("antares_best_effort_preemptions_total") - before <= 3
