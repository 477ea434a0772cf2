"""A plain `vllm serve` with tensor parallelism and vLLM's priority policy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.live.dummy_model import write_dummy_model
from tests.fixtures.plain_vllm import plain_vllm

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

SLOTS = 2


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("parallel")
    flags = ["--tensor-parallel-size", "2", "--max-num-seqs", str(SLOTS), "--scheduling-policy", "priority"]
    # vLLM on CPU binds each worker to a NUMA node, unless told not to.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with plain_vllm(folder, write_dummy_model(folder / "model"), flags, environment) as url:
        yield url


async def test_paced_requests_of_two_workers_answer_as_stock(vllm: str) -> None:
    """Requests without a pace are scheduled as by stock vLLM. All slots are taken, so the others wait by priority."""
    async with httpx.AsyncClient(base_url=vllm, timeout=300, trust_env=False) as http:
        ended: list[str] = []

        async def text(name: str, tokens: int, priority: int, **xargs: object) -> str:
            document = {"model": "small", "prompt": "one two three", "max_tokens": tokens, "ignore_eos": True}
            document |= {"temperature": 0, "priority": priority, "vllm_xargs": xargs}
            response = await http.post("/v1/completions", json=document)
            assert response.status_code == 200, response.text
            ended.append(name)
            return str(response.json()["choices"][0]["text"])

        stock = await text("stock", 30, 0)
        paced = {"antares_tpot_ms": 2000, "antares_gate": "slack"}
        running = [asyncio.create_task(text("running", 30, 0, **paced)) for _ in range(SLOTS)]
        await asyncio.sleep(0.3)
        waiting = [
            asyncio.create_task(text(f"priority {priority}", 30, priority, **paced)) for priority in (9, 8, 2, 1)
        ]
        texts = await asyncio.gather(*running, *waiting)
    assert set(texts) == {stock}
    assert set(ended[-2:]) == {"priority 9", "priority 8"}
