"""Observes every output token of an in-process vLLM, and tells its step gate about each request, on every route."""

from __future__ import annotations

import contextvars
import time
from typing import Any

from engine_adapter.engine import TokenObserver
from engine_adapter.vllm.rendering import current_rendering

current_observer: contextvars.ContextVar[TokenObserver | None] = contextvars.ContextVar(
    "antares_observer", default=None
)
"""Observer of the current request. vLLM's app adds sequences to its engine in tasks that inherit this context."""


current_xargs: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar("antares_xargs", default=None)
"""Members for the step gate of the current request; None outside a scheduled request."""


def observe_outputs(processor: Any, sequences: dict[str, TokenObserver]) -> None:
    """Hook ``processor``, vLLM's OutputProcessor. Every new sequence and every step's output tokens pass through it.

    A new sequence passes before it goes to the EngineCore, so it gets its members for the step gate here.

    Args:
        processor: the OutputProcessor of an AsyncLLM.
        sequences: updated to map vLLM's internal id of each unfinished sequence to its observer.
    """
    add_request, process_outputs = processor.add_request, processor.process_outputs

    def observed_add_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        rendering = current_rendering.get()
        if rendering is not None:
            rendering.check()
        observer = current_observer.get()
        if observer is not None:
            sequences[request.request_id] = observer
            observer.on_prompt(request.request_id, len(request.prompt_token_ids or ()))
        _set_xargs(request.sampling_params, current_xargs.get() or {})
        return add_request(request, *args, **kwargs)

    def observed_process_outputs(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        for output in outputs:
            observer = sequences.get(output.request_id)
            if observer is None:
                continue
            if output.prefill_stats is not None:
                observer.on_cached(output.request_id, output.prefill_stats.num_cached_tokens)
            if output.new_token_ids:
                observer.on_tokens(output.request_id, len(output.new_token_ids), now)
            if output.finish_reason is not None:
                del sequences[output.request_id]
        return process_outputs(outputs, *args, **kwargs)

    processor.add_request = observed_add_request
    processor.process_outputs = observed_process_outputs


def _set_xargs(params: Any, xargs: dict[str, Any]) -> None:
    """Set the gate's members of ``params.extra_args``, which are ``vllm_xargs``. ``params``: None if it pools."""
    if params is None:
        return
    given = params.extra_args or {}
    # INVARIANT: no such member comes from a client, whichever member of its body it came from.
    kept = {name: value for name, value in given.items() if not name.startswith("antares_")}
    params.extra_args = {**kept, **xargs} or None
