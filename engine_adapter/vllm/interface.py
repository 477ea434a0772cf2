"""What we use of vLLM's private interface, by part, and what of it is missing in a version.

Each entry is a class or function of vLLM, and the members that we use. "name(_, key=_)" is a call of a member. "(_)" is
a call of the class or function itself. A name alone is a field, or a method that we override.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

from engine_adapter.vllm.sources import Members

Uses = Mapping[str, tuple[str, ...]]

_PARAMS = "vllm.sampling_params.SamplingParams"
_SCHED = "vllm.v1.core.sched"

GATE: Uses = {
    f"{_SCHED}.async_scheduler.AsyncScheduler": (
        "schedule()",
        "update_from_output(_, _)",
        "add_request(_)",
        "requests",
        "running",
        "waiting",
        "current_step",
        "max_num_scheduled_tokens",
        "num_spec_tokens",
        "kv_cache_manager",
        "block_size",
        "cache_config",
        "scheduler_config",
        "vllm_config",
        "need_mamba_block_aligned_split",
        "_update_request_as_session(_, _)",
    ),
    f"{_SCHED}.interface.PauseState": ("UNPAUSED",),
    f"{_SCHED}.output.SchedulerOutput": (
        "num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
        "total_num_scheduled_tokens",
    ),
    "vllm.v1.outputs.ModelRunnerOutput": ("req_id_to_index", "sampled_token_ids"),
    f"{_SCHED}.request_queue.RequestQueue": ("add_request(_)", "prepend_request(_)", "remove_requests(_)"),
    f"{_SCHED}.request_queue.SchedulingPolicy": ("FCFS",),
    "vllm.v1.core.kv_cache_manager.KVCacheManager": (
        "block_pool",
        "coordinator",
        "enable_caching",
    ),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": ("find_longest_cache_hit(_, _)",),
    "vllm.v1.core.block_pool.BlockPool": ("num_gpu_blocks", "get_num_free_blocks()"),
    "vllm.v1.request.Request": (
        "request_id",
        "status",
        "sampling_params",
        "max_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "num_computed_tokens",
        "num_output_placeholders",
        "spec_token_ids",
        "is_prefill_chunk",
        "block_hashes",
        "next_decode_eligible_step",
        "resumable",
        "has_encoder_inputs",
        "mm_features",
    ),
    "vllm.multimodal.inputs.MultiModalFeatureSpec": ("mm_position",),
    "vllm.multimodal.inputs.PlaceholderRange": ("offset", "length"),
    "vllm.config.CacheConfig": ("block_size", "enable_prefix_caching"),
    "vllm.config.ModelConfig": ("enable_sleep_mode", "is_multimodal_model", "max_model_len"),
    "vllm.config.ParallelConfig": (
        "data_parallel_size",
        "enable_expert_parallel",
        "pipeline_parallel_size",
        "tensor_parallel_size",
    ),
    "vllm.config.SchedulerConfig": (
        "async_scheduling",
        "disable_chunked_mm_input",
        "enable_chunked_prefill",
        "max_num_batched_tokens",
        "max_num_seqs",
        "policy",
    ),
    "vllm.config.SpeculativeConfig": ("method",),
    "vllm.config.VllmConfig": (
        "cache_config",
        "ec_transfer_config",
        "kv_transfer_config",
        "lora_config",
        "model_config",
        "parallel_config",
        "scheduler_config",
        "speculative_config",
    ),
    "vllm.v1.request.RequestStatus": ("WAITING", "PREEMPTED"),
    _PARAMS: ("extra_args",),
}
"""Step gate: `scheduler.py`, `gated.py`, `features.py` and `unsplittable.py`."""

PREEMPTION: Uses = {
    f"{_SCHED}.async_scheduler.AsyncScheduler": (
        "policy",
        "connector",
        "ec_connector",
        "max_num_active_reqs",
        "num_waiting_for_streaming_input",
        "_pause_state",
        "_preempt_request(_, _)",
    ),
    "vllm.v1.core.kv_cache_manager.KVCacheManager": ("watermark_blocks",),
    "vllm.v1.core.kv_cache_coordinator.KVCacheCoordinator": ("single_type_managers",),
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager": (
        "block_size",
        "get_num_skipped_tokens(_)",
        "kv_cache_spec",
        "req_to_blocks",
    ),
    "vllm.v1.kv_cache_interface.KVCacheSpec": ("max_memory_usage_bytes(_)", "page_size_bytes"),
    "vllm.v1.request.Request": ("num_in_flight_tokens", "num_preemptions"),
    "vllm.config.ModelConfig": ("max_model_len",),
}
"""Best-effort preemption: `scheduler.py` and `kv_groups.py`, beside `GATE`."""

IN_PROCESS: Uses = {
    "vllm.engine.arg_utils.AsyncEngineArgs": ("from_cli_args(_)", "create_engine_config()"),
    "vllm.entrypoints.launchers.cli_args.make_arg_parser": ("(_)",),
    "vllm.entrypoints.launchers.cli_args.validate_parsed_serve_args": ("(_)",),
    "vllm.utils.argparse_utils.FlexibleArgumentParser": ("parse_args(_)",),
    "vllm.v1.engine.async_llm.AsyncLLM": (
        "from_vllm_config(_, stat_loggers=_)",
        "generate(_, _, request_id=_)",
        "abort(_, internal=_)",
        "shutdown()",
        "get_supported_tasks()",
        "errored",
        "engine_core",
        "model_config",
        "output_handler",
        "output_processor",
        "vllm_config",
    ),
    "vllm.v1.engine.exceptions.EngineDeadError": ("()",),
    "vllm.v1.engine.output_processor.OutputProcessor": (
        "add_request",
        "process_outputs",
        "propagate_error(_)",
        "request_states",
    ),
    "vllm.v1.engine.output_processor.RequestState": ("prompt_len", "is_prefilling"),
    "vllm.v1.engine.core_client.MPClient": ("resources",),
    "vllm.v1.engine.core_client.BackgroundResources": ("engine_manager",),
    "vllm.v1.engine.utils.CoreEngineProcManager": ("processes",),
    "vllm.v1.engine.EngineCoreRequest": ("request_id", "prompt_token_ids", "sampling_params"),
    "vllm.v1.engine.EngineCoreOutput": ("request_id", "new_token_ids", "finish_reason", "prefill_stats"),
    "vllm.v1.metrics.stats.PrefillStats": ("num_cached_tokens",),
    "vllm.v1.metrics.stats.SchedulerStats": ("num_running_reqs", "num_waiting_reqs", "kv_cache_usage"),
    "vllm.v1.metrics.loggers.StatLoggerBase": ("record", "log_engine_initialized"),
    _PARAMS: ("(max_tokens=_, ignore_eos=_, detokenize=_)", "extra_args"),
    "vllm.config.VllmConfig": (
        "cache_config",
        "device_config",
        "kv_events_config",
        "model_config",
        "scheduler_config",
    ),
    "vllm.config.CacheConfig": ("block_size", "enable_prefix_caching", "num_gpu_blocks"),
    "vllm.config.DeviceConfig": ("device_type",),
    "vllm.config.ModelConfig": ("max_model_len",),
    "vllm.config.SchedulerConfig": ("async_scheduling", "max_num_batched_tokens", "max_num_seqs"),
    "vllm.config.KVEventsConfig": ("enable_kv_cache_events", "endpoint", "publisher", "topic"),
    "vllm.distributed.kv_events.KVEventBatch": ("events",),
    "vllm.distributed.kv_events.BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_name",
        "medium",
        "extra_keys",
    ),
    "vllm.distributed.kv_events.BlockRemoved": ("block_hashes", "medium"),
    "vllm.distributed.kv_events.AllBlocksCleared": (),
    "vllm.entrypoints.launchers.app.build_app": ("(_, _, _)",),
    "vllm.entrypoints.launchers.api_server.app_state.init_app_state": (
        "(_, _, _, _)",
        "online_renderer",
        "openai_serving_models",
    ),
    "vllm.entrypoints.generate.api_router.init_generate_state": (
        "anthropic_serving_messages",
        "openai_serving_chat",
        "openai_serving_completion",
        "openai_serving_responses",
    ),
    "vllm.entrypoints.scale_out.factories.init_render_state": ("serving_render",),
    "vllm.entrypoints.scale_out.render.serving.ServingRender": ("_merge_inline_system",),
    "vllm.renderers.online_renderer.OnlineRenderer": ("renderer",),
    "vllm.renderers.base.BaseRenderer": ("render_chat_async", "render_cmpl_async"),
    "vllm.entrypoints.openai.models.serving.OpenAIServingModels": ("show_available_models()",),
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": (),
    "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat": ("render_chat_request(_)",),
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest": (),
    "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion": ("render_completion_request(_)",),
    "vllm.entrypoints.openai.responses.protocol.ResponsesRequest": ("previous_response_id",),
    "vllm.entrypoints.openai.responses.serving.OpenAIServingResponses": (
        "response_store",
        "_render_resolved_response_inputs(_, _)",
    ),
    "vllm.entrypoints.anthropic.protocol.AnthropicMessagesRequest": (),
    "vllm.entrypoints.anthropic.serving.AnthropicServingMessages": (
        "to_chat_completion_request(_, merge_inline_system=_)",
        "render_chat_request(_)",
    ),
    "vllm.multimodal.inputs.PlaceholderRange": ("offset",),
    "vllm.entrypoints.serve.engine.protocol.ErrorInfo": ("code",),
    "vllm.entrypoints.serve.engine.protocol.ErrorResponse": ("error",),
    "vllm.entrypoints.serve.exception_handling.error_response.create_error_response": ("(_)",),
}
"""In-process engine: the other files of this folder."""


def missing(uses: Uses, members: Members) -> list[str]:
    """Return what of ``uses`` a version does not have, or cannot be called as we do; one line each."""
    return [line for path, used in uses.items() for line in _missing(path, used, members(path))]


def _missing(path: str, used: tuple[str, ...], found: dict[str, str] | None) -> Iterator[str]:
    if found is None:
        yield path
        return
    for use in used:
        name, _, call = use.partition("(")
        full = f"{path}.{name}" if name else path
        if name not in found:
            yield full
        elif call and not _accepts(found[name], f"({call}"):
            yield f"{full}{found[name]}, called as ({call}"


def _accepts(signature: str, call: str) -> bool:
    """Whether a function with ``signature`` can be called as ``call``: "(self, a, b=...)" as "(_, b=_)"."""
    if not signature:
        return True  # A field that holds a callable: nothing is known of its parameters.
    parameters = ast.parse(f"def f{signature}: ...").body[0]
    assert isinstance(parameters, ast.FunctionDef)
    called = ast.parse(f"f{call}", mode="eval").body
    assert isinstance(called, ast.Call)
    has = parameters.args
    positional = [each.arg for each in [*has.posonlyargs, *has.args]]
    required = set(positional[: len(positional) - len(has.defaults)])
    required |= {each.arg for each, default in zip(has.kwonlyargs, has.kw_defaults, strict=True) if default is None}
    if positional and positional[0] in ("self", "cls"):
        required.discard(positional.pop(0))
    given = len(called.args)
    keywords = {each.arg for each in called.keywords if each.arg}
    named = {*positional[given:], *(each.arg for each in has.kwonlyargs)}
    return (
        (given <= len(positional) or has.vararg is not None)
        and (keywords <= named or has.kwarg is not None)
        and required <= {*positional[:given], *keywords}
    )
