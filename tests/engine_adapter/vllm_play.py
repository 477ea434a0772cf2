"""vLLM's scheduler with our step gate, stepped as vLLM steps it, without a model. Imports vLLM, which takes seconds."""

from __future__ import annotations

import json
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine_adapter.vllm_scheduler import SloScheduler

BLOCK = 16
STEP_S = 0.03


class Engine:
    """Steps a scheduler as vLLM does with asynchronous scheduling: each is decided on while the one before it runs."""

    def __init__(self, model: Path, clock: SimpleNamespace, *, seqs: int, blocks: int, budget: int = 512) -> None:
        self.clock, self.blocks = clock, blocks
        self.said: Counter[str] = Counter()
        self._running: deque[tuple[Any, set[str]]] = deque()
        # The dummy model's own limit.
        most = int(json.loads((model / "config.json").read_text())["max_position_embeddings"])
        config = VllmConfig(
            model_config=ModelConfig(model=str(model), dtype="float32", max_model_len=most, skip_tokenizer_init=True),
            cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=False),
            scheduler_config=SchedulerConfig(
                max_num_seqs=seqs,
                max_num_batched_tokens=budget,
                max_model_len=most,
                is_encoder_decoder=False,
                async_scheduling=True,
                enable_chunked_prefill=True,
            ),
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig(device="cpu"),
        )
        layer = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
        config.cache_config.num_gpu_blocks = blocks
        self.scheduler = SloScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)]
            ),
            block_size=BLOCK,
            log_stats=True,
            structured_output_manager=StructuredOutputManager(config),
        )

    @property
    def put_aside(self) -> int:
        return self.scheduler._reporter.report.put_aside

    def add(self, name: str, prompt: int, output: int, tpot_ms: float | None = None, gate: str = "slack") -> Request:
        xargs: dict[str, Any] = {"antares_gate": gate} | ({} if tpot_ms is None else {"antares_tpot_ms": tpot_ms})
        params = SamplingParams(max_tokens=output, ignore_eos=True, extra_args=xargs)
        params.update_from_generation_config({}, 2)
        request = Request(request_id=name, prompt_token_ids=[1] * prompt, sampling_params=params, pooling_params=None)
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        """Its client left."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Decide on a step; the one before it ends."""
        planned = self.scheduler.schedule()
        requests = self.scheduler.requests
        self._running.append((planned, {i for i in planned.num_scheduled_tokens if not requests[i].is_prefill_chunk}))
        self.clock.now += STEP_S
        if len(self._running) > 1:
            self._end()

    def drain(self, most_steps: int = 20_000) -> None:
        """Step until nobody is left. Fails where that takes too long."""
        for _ in range(most_steps):
            if not self.scheduler.requests:
                break
            self.step()
        while self._running:
            self._end()
        assert not self.scheduler.requests
        assert not (self.scheduler.running or self.scheduler.waiting)
        assert self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == self.blocks - 1, "one is vLLM's own"

    def _end(self) -> None:
        planned, sampled = self._running.popleft()
        names = list(planned.num_scheduled_tokens)
        came = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: at for at, name in enumerate(names)},
            sampled_token_ids=[[7] if name in sampled else [] for name in names],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        for outputs in self.scheduler.update_from_output(planned, came).values():
            for output in outputs.outputs:
                self.said[output.request_id] += len(output.new_token_ids)
