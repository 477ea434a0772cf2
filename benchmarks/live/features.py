"""Runs each feature of vLLM with the step gate on this machine's engine: the table of docs/vllm-features.md, tried.

    python -m benchmarks.live.dummy_model FOLDER
    python -m benchmarks.live.features FOLDER --output features.json

An engine starts for each row, so it takes minutes. Rows that the file has are kept, unless ``--only`` names them.

Each row starts an AsyncLLM with our scheduler class. It sends prompts without a pace, which run as in stock vLLM, and
then the same prompts with a pace under each gate. The tokens must be the same. Prompts have several lengths.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import results_json
from benchmarks.live.dummy_adapter import RANK, write_lora_adapter
from benchmarks.live.dummy_model import write_dummy_model
from benchmarks.markdown import table, wrapped
from engine_adapter.vllm.launch import SCHEDULER

GATES = ("credit", "slack")
PACE_MS = 2000.0
OUTPUT_TOKENS = 24
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
KV_CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@dataclass(frozen=True)
class Trial:
    """One row: vLLM's engine arguments, and what the requests ask for. ``ranks``: accelerators that it needs."""

    feature: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    shape: str | None = None
    asks_for: str = ""


TRIALS = (
    Trial("defaults"),
    Trial("prefix caching off", {"enable_prefix_caching": False}),
    Trial("chunked prefill off", {"enable_chunked_prefill": False}),
    Trial("asynchronous scheduling off", {"async_scheduling": False}),
    Trial("speculative decoding, n-gram", {"speculative_config": NGRAM}),
    Trial("structured output", asks_for="structured output"),
    Trial("LoRA", {"enable_lora": True, "max_lora_rank": RANK}, asks_for="LoRA"),
    Trial("priority policy", {"scheduling_policy": "priority"}),
    Trial("KV connectors", {"kv_transfer_config": KV_CONNECTOR}),
    Trial("sleep mode", {"enable_sleep_mode": True}, asks_for="sleep"),
    Trial("sessions (resumable streaming input)", asks_for="session"),
    Trial("tensor parallel (TP)", {"tensor_parallel_size": 2}, ranks=2),
    Trial("pipeline parallel (PP)", {"pipeline_parallel_size": 2}, ranks=2),
    Trial("data parallel (DP)", {"data_parallel_size": 2}, ranks=2),
    Trial(
        "expert parallel (EP)", {"tensor_parallel_size": 2, "enable_expert_parallel": True}, ranks=2, shape="experts"
    ),
)


def run_all(
    trials: Sequence[Trial], model: Path, flags: Mapping[str, Any], timeout_s: float
) -> Iterator[dict[str, Any]]:
    """Run each trial in a process of its own, and yield its row."""
    for trial in trials:
        print(f"==> {trial.feature}", file=sys.stderr, flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
            command = [sys.executable, "-m", "benchmarks.live.features", str(model), "--child", trial.feature]
            command += ["--flags", json.dumps(flags), "--output", f"{folder}/row.json"]
            try:
                code = subprocess.run(
                    command, stdout=log, stderr=log, timeout=timeout_s, check=False, env=_environment(trial)
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
            result = Path(folder, "row.json")
            row = json.loads(result.read_text()) if result.exists() else {"result": "failed", "why": _why(log, code)}
        row = {"feature": trial.feature, **row, "seconds": round(time.monotonic() - started)}
        print(f"    {row}", file=sys.stderr, flush=True)
        yield row


def _environment(trial: Trial) -> dict[str, str]:
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if trial.ranks > 1:
        # vLLM on CPU binds each worker to a NUMA node, unless told not to.
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, **settings}


def _why(log: Any, code: int) -> str:
    """Return the line of the log that says why vLLM failed."""
    log.seek(0)
    lines: list[str] = [line.strip() for line in log if line.strip()]
    ours = [line for line in lines if line.startswith("Antares: ")]
    # pydantic's errors say what is wrong in the lines below.
    errors = [
        " ".join(lines[at : at + 2]) for at, line in enumerate(lines) if re.search(r"(Error|Exception): \S", line)
    ]
    if any("Segfault" in line for line in lines):
        errors = ["a process of vLLM ended with a segmentation fault"]
    return (ours or errors or [f"exit code {code}"])[0][:300].partition(" [type=")[0]


# --- one trial, in a process of its own ----------------------------------------------------------------------------


async def run_one(trial: Trial, model: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Start an engine with the feature and return how it answers with each gate, compared to none."""
    import torch
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    if 0 < torch.cuda.device_count() < trial.ranks:
        return {"result": "skipped", "why": f"needs {trial.ranks} GPUs"}
    with tempfile.TemporaryDirectory() as folder:
        own = dict(trial.flags)
        if trial.shape is not None:
            model = write_dummy_model(Path(folder, "model"), trial.shape)
        if "kv_transfer_config" in own:
            own["kv_transfer_config"] = {**KV_CONNECTOR, "kv_connector_extra_config": {"shared_storage_path": folder}}
        adapter = write_lora_adapter(Path(folder, "adapter"), model) if trial.asks_for == "LoRA" else None
        started = time.monotonic()
        engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=str(model), scheduler_cls=SCHEDULER, **{**flags, **own})
        )
        start_s = time.monotonic() - started
        try:
            tokens = {gate: await _answers(engine, trial, gate, adapter) for gate in (None, *GATES)}
            if trial.asks_for == "sleep":
                await engine.sleep(1)
                await engine.wake_up()
                tokens["awake"] = await _answers(engine, trial, GATES[-1], adapter)
        finally:
            engine.shutdown()
    stock = tokens.pop(None)
    same = sum(answer == stock[at] for answers in tokens.values() for at, answer in enumerate(answers))
    total = sum(len(answers) for answers in tokens.values())
    complete = all(len(answer) == len(stock[at]) for answers in tokens.values() for at, answer in enumerate(answers))
    return {
        "result": "served" if complete else "lost tokens",
        "same_as_stock": f"{same} of {total}",
        "start_s": round(start_s),
    }


async def _answers(engine: Any, trial: Trial, gate: str | None, adapter: Path | None) -> list[list[int]]:
    """Return the tokens of every prompt, all of which run together."""
    prompts = [[7] * 5, list(range(20, 400)), [11, 12, 13] * 20, [5] * 90]
    return list(
        await asyncio.gather(
            *[_answer(engine, trial, gate, adapter, prompt, number) for number, prompt in enumerate(prompts)]
        )
    )


async def _answer(
    engine: Any, trial: Trial, gate: str | None, adapter: Path | None, prompt: list[int], number: int
) -> list[int]:
    from vllm import SamplingParams
    from vllm.engine.protocol import StreamingInput
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structured = trial.asks_for == "structured output"
    xargs = None if gate is None else {"antares_tpot_ms": PACE_MS * (1 + number % 2), "antares_gate": gate}
    params = SamplingParams(
        temperature=0,
        max_tokens=OUTPUT_TOKENS,
        ignore_eos=not structured,
        extra_args=xargs,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(regex="[a-z]{12}") if structured else None,
    )

    async def session() -> AsyncIterator[Any]:
        for part in (prompt, prompt[::-1]):
            yield StreamingInput({"type": "token", "prompt_token_ids": list(part)}, params)

    given = session() if trial.asks_for == "session" else {"prompt_token_ids": prompt}
    more: dict[str, Any] = {"priority": number} if "scheduling_policy" in trial.flags else {}
    if adapter is not None:
        more["lora_request"] = LoRARequest("adapter", 1, str(adapter))
    tokens: list[int] = []
    async for output in engine.generate(given, params, request_id=f"{gate}-{number}-{time.monotonic_ns()}", **more):
        tokens += output.outputs[0].token_ids
    return tokens


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of docs/results, with a table of ``rows``."""
    heads = ("feature", "result", "answers as without a pace", "start of the engine, s")
    cells = [
        (
            row["feature"],
            f"{row['result']}: {row['why']}" if "why" in row else row["result"],
            row.get("same_as_stock", ""),
            str(row.get("start_s", "")),
        )
        for row in rows
    ]
    text = f"""# Features of vLLM, tried with the step gate

Every row is a real vLLM engine with our scheduler class. Four prompts run together: without a pace, as stock vLLM
schedules them, then with a pace and the gates `credit` and `slack`. Answers at temperature 0 are compared by token.
`served`: no answer lacks a token. [The table](../vllm-features.md) says what the tests show and what is refused.

{table(heads, cells)}

vLLM on CPU has no sleep mode and no asynchronous scheduling, and its kernel for experts fails when they are spread.

Made by `python -m benchmarks.live.features MODEL --output docs/results/vllm_features.json`; the model is that of
`python -m benchmarks.live.dummy_model MODEL`. `bash benchmarks/gpu.sh` does the same on a GPU.
"""
    return wrapped(text) + "\n"


# --- command ---------------------------------------------------------------------------------------------------------

SMALL_ENGINE = {
    "load_format": "dummy",
    "dtype": "float32",
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "enforce_eager": True,
}


def main(
    model: Annotated[Path, typer.Argument(help="Folder of `benchmarks.live.dummy_model`.")],
    output: Annotated[Path, typer.Option(help="JSON file with a row per feature.")] = Path("features.json"),
    flags: Annotated[str, typer.Option(help="vLLM's engine arguments, as JSON.")] = json.dumps(SMALL_ENGINE),
    only: Annotated[str, typer.Option(help="Only features whose name contains this.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds for each engine.")] = 600,
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Try every feature on this machine and write the results."""
    if child:
        trial = next(trial for trial in TRIALS if trial.feature == child)
        output.write_text(json.dumps(asyncio.run(run_one(trial, model, json.loads(flags)))))
        return
    known = {row["feature"]: row for row in (json.loads(output.read_text())["features"] if output.exists() else [])}
    chosen = [t for t in TRIALS if (only.lower() in t.feature.lower() if only else t.feature not in known)]
    for row in run_all(chosen, model, json.loads(flags), timeout):
        known[row["feature"]] = row
        rows = [known[trial.feature] for trial in TRIALS if trial.feature in known]
        results_json.write({"flags": json.loads(flags), "features": rows}, output)
        output.with_suffix(".md").write_text(page(rows))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
