"""`antares serve` with vLLM in its process, on two workers (tensor parallel), with n-gram speculation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.live.dummy_model import write_dummy_model
from tests.fixtures.served import Served, serve, still_running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


TOKENS = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("parallel")
    engine = {
        "kind": "vllm",
        "name": "two-workers",
        "model": str(write_dummy_model(folder / "model")),
        "served_model_name": "small",
        # No bound here depends on the step times, and on two busy cores two workers take half a minute for it.
        "calibrate": False,
        "flags": {
            "tensor-parallel-size": 2, "load-format": "dummy", "dtype": "float32",
            "speculative-config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
            "enforce-eager": True, "max-model-len": 1024, "max-num-seqs": 4, "max-num-batched-tokens": 256,
            # The workers wait for each other in every layer.
            "hf-overrides": {"num_hidden_layers": 2},
        },
        # vLLM on CPU binds each worker to a NUMA node, unless told not to.
        "env": {
            "HF_HUB_OFFLINE": 1, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": 1,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": 1,
        },
    }  # fmt: skip
    classes = {"paced": {"ttft_ms": 120_000, "tpot_ms": 20_000}, "free": {}}
    running = serve(folder, {"engines": [engine], "classes": classes, "default_class": "free"})
    yield running
    running.stop()


async def test_paced_requests_of_two_workers_answer_as_stock(served: Served) -> None:
    """Requests without a pace are scheduled as by stock vLLM. Only four of the six fit at a time."""
    async with httpx.AsyncClient(base_url=served.base, timeout=300, trust_env=False) as http:

        async def text(slo_class: str) -> str:
            document = {"model": "small", "prompt": "one two three " * 60, "max_tokens": TOKENS, "ignore_eos": True}
            document |= {"temperature": 0}
            response = await http.post("/v1/completions", json=document, headers={"x-slo-class": slo_class})
            assert response.status_code == 200, response.text
            return str(response.json()["choices"][0]["text"])

        stock = await text("free")
        texts = await asyncio.gather(*[text(slo_class) for slo_class in ["paced", "free"] * 3])
    assert set(texts) == {stock}
    decodes = 0.8 * 3 * (TOKENS - 1)
    assert served.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
    assert served.count("antares_gate_batched_total", decodes) >= decodes, "the gate reports those of three requests"


def test_both_workers_end_with_the_gateway(served: Served) -> None:
    processes = list(served.children())
    assert len(processes) >= 3, "the EngineCore and two workers"
    served.stop()
    assert still_running(processes) == []
