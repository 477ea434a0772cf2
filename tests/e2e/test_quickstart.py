"""The quickstart: `antares serve` with configs/quickstart.yaml, and official clients."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from tests.fixtures.served import VLLM_CLI, Served, serve, still_running

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
SLO = {"x-slo-ttft-ms": "20000", "x-slo-tpot-ms": "2000"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    running = serve(tmp_path_factory.mktemp("quickstart"), config)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.base}/v1", api_key="none", max_retries=0, timeout=120)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_streamed_response_has_slo_headers(served: Served, client: openai.OpenAI) -> None:
    response = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=ask("What is the capital of France?"),  # type: ignore[arg-type]
        stream=True,
        temperature=0,
        max_tokens=24,
        extra_headers={**SLO, "x-slo-report": "1"},
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in response.parse() if chunk.choices)
    assert "Paris" in text
    assert float(response.headers["x-antares-ttft-ms"]) > 0
    assert float(response.headers["x-antares-queue-ms"]) >= 0
    assert float(response.headers["x-antares-predicted-ttft-ms"]) > 0


def test_non_streaming_response_reports_ttft(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model=MODEL,
        messages=ask("What is the capital of France?"),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=24,
        extra_headers={**SLO, "x-slo-report": "1"},
    )
    assert "Paris" in (completion.choices[0].message.content or "")
    report = completion.model_extra["antares"]  # type: ignore[index]
    assert report["attained"] is True
    assert 0 < report["ttft_ms"] < report["e2e_ms"]
    assert report["output_tokens"] == completion.usage.completion_tokens  # type: ignore[union-attr]
    # n tokens have n - 1 gaps between the first and the last.
    total_ms = report["ttft_ms"] + report["tpot_ms"] * (report["output_tokens"] - 1)
    assert total_ms == pytest.approx(report["e2e_ms"], rel=0.1)


def test_slo_report_is_a_comment_before_the_end_of_a_stream(served: Served) -> None:
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 5, "stream": True}
    raw = httpx.post(f"{served.base}/v1/completions", json=body, headers={"x-slo-report": "1"}, timeout=120).text
    comment = re.search(r"^: antares (\{.*\})\n\ndata: \[DONE\]", raw, re.MULTILINE)
    assert comment is not None
    assert json.loads(comment[1])["output_tokens"] == 5


def test_unattainable_bound_is_rejected_with_attainable_value(served: Served) -> None:
    body = {"model": MODEL, "messages": ask("Hello"), "max_tokens": 5}
    response = httpx.post(f"{served.base}/v1/chat/completions", json=body, headers={"x-slo-ttft-ms": "1"}, timeout=120)
    error = response.json()["error"]
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["x-should-retry"] == "false"
    assert (error["type"], error["code"], error["param"]) == ("slo_unattainable", "ttft_unattainable", "x-slo-ttft-ms")
    assert 1 < error["predicted_ms"] < error["attainable_ms"]


@pytest.mark.parametrize(
    ("headers", "body", "param"),
    [
        ({"x-slo-tpot-ms": "fast"}, {"messages": ask("hi")}, "x-slo-tpot-ms"),
        ({"x-slo-class": "unknown"}, {"messages": ask("hi")}, "x-slo-class"),
        ({}, {"messages": "hi"}, "messages"),
        ({}, {"messages": ask("hi"), "n": 0}, "n"),
        ({}, {"messages": ask("hi"), "seed": 1, "temperature": 1}, "seed"),
    ],
)
def test_bad_input_gets_400_that_names_the_field(
    served: Served, headers: dict[str, str], body: dict[str, object], param: str
) -> None:
    response = httpx.post(
        f"{served.base}/v1/chat/completions", json={"model": MODEL, **body}, headers=headers, timeout=120
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_engine_errors_pass_through(served: Served) -> None:
    body = {"model": "no-such-model", "messages": ask("hi"), "max_tokens": 3}
    response = httpx.post(f"{served.base}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 404
    assert "no-such-model" in response.json()["error"]["message"]


def test_engine_features_work_through_the_gateway(client: openai.OpenAI) -> None:
    two = client.chat.completions.create(
        model=MODEL,
        messages=ask("Name a colour."),  # type: ignore[arg-type]
        n=2,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
        extra_headers=SLO,
    )
    assert len(two.choices) == 2
    assert all(len(choice.logprobs.content) > 0 for choice in two.choices)  # type: ignore[union-attr,arg-type]

    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    structured = client.chat.completions.create(
        model=MODEL,
        messages=ask("What is the capital of France? Answer in JSON."),  # type: ignore[arg-type]
        max_tokens=40,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {**schema, "additionalProperties": False}},
        },
        extra_headers=SLO,
    )
    assert json.loads(structured.choices[0].message.content or "")["city"] in ("Paris", "Rome")

    stream = client.chat.completions.create(
        model=MODEL,
        messages=ask("Count."),  # type: ignore[arg-type]
        stream=True,
        max_tokens=6,
        stream_options={"include_usage": True},
        extra_headers=SLO,
    )
    last = list(stream)[-1]
    assert last.usage is not None
    assert last.usage.completion_tokens <= 6


def test_other_engine_routes_pass_through(served: Served) -> None:
    assert served.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert served.get("/v1/no-such-route").status_code == 404


def test_vllm_bench_serve_runs_against_the_gateway(served: Served, tmp_path: Path) -> None:
    model = served.get("/v1/models").json()["data"][0]["root"]
    command = [sys.executable, "-c", VLLM_CLI, "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", served.base, "--endpoint", "/v1/chat/completions", "--model", MODEL, "--tokenizer", model]
    command += ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"]
    command += ["--num-prompts", "20", "--request-rate", "4", "--seed", "7", "--ignore-eos"]
    command += ["--goodput", "ttft:20000", "tpot:2000", "--save-result", "--result-dir", str(tmp_path)]
    command += ["--header", "x-slo-ttft-ms=60000", "x-slo-tpot-ms=5000"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Request goodput" in run.stdout
    result = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (result["completed"], result.get("failed", 0)) == (20, 0)


def test_metrics_include_gateway_and_engine(served: Served) -> None:
    text = served.get("/metrics").text
    assert "antares_requests_total{" in text
    assert "vllm:" in text
    assert served.metric("antares_ledger_open") == 0
    assert "<title>Antares</title>" in served.get("/dashboard").text


def test_killed_predictor_fails_no_request_and_restarts(served: Served, client: openai.OpenAI) -> None:
    def complete() -> None:
        # The predictor is asked about a request only if it is still open after `LATER_S`, so it must not be short.
        completion = client.completions.create(
            model=MODEL, prompt="One two", max_tokens=48, extra_body={"ignore_eos": True}, extra_headers=SLO
        )
        assert completion.usage.completion_tokens == 48  # type: ignore[union-attr]

    fallbacks = served.metric("antares_predictions_total", source="fallback")
    restarts = served.metric("antares_predictor_restarts_total")
    os.kill(served.child("predictor_service"), signal.SIGKILL)
    for _ in range(3):
        complete()
    assert served.count("antares_predictions_total", fallbacks + 1, source="fallback") > fallbacks
    assert served.count("antares_predictor_restarts_total", restarts + 1, timeout_s=60) > restarts
    predictions = served.metric("antares_predictions_total", source="service")
    until = time.monotonic() + 60
    while served.metric("antares_predictions_total", source="service") == predictions and time.monotonic() < until:
        complete()
    assert served.metric("antares_predictions_total", source="service") > predictions


def test_ctrl_c_drains_streams_and_leaves_no_process(served: Served, client: openai.OpenAI) -> None:
    """Must be the last test of the module, because it stops the server."""
    pids = [served.process.pid, *served.children()]
    assert len(pids) >= 3  # the gateway, its predictor, and vLLM's EngineCore
    finish_reasons: list[str] = []

    def read() -> None:
        stream = client.completions.create(
            model=MODEL,
            prompt="A story:",
            max_tokens=120,
            stream=True,
            extra_body={"ignore_eos": True},
            extra_headers=SLO,
        )
        finish_reasons.extend(chunk.choices[0].finish_reason or "" for chunk in stream)

    reader = threading.Thread(target=read)
    reader.start()
    while not finish_reasons:
        time.sleep(0.02)
    served.interrupt()
    while served.get("/ready").status_code == 200:
        time.sleep(0.02)
    rejected = httpx.post(f"{served.base}/v1/completions", json={"model": MODEL, "prompt": "late"}, timeout=120)
    assert (rejected.status_code, rejected.json()["error"]["code"]) == (503, "draining")
    reader.join(60)
    assert finish_reasons[-1] == "length"
    assert served.process.wait(60) == 0
    assert still_running(pids) == []
