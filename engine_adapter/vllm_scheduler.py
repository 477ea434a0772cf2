"""Public import path of the scheduler class, for vLLM's `--scheduler-cls`."""

from engine_adapter.vllm.versions import UnsupportedVllmError

try:
    from engine_adapter.vllm.scheduler import SloScheduler
except UnsupportedVllmError as error:
    # NOTE: vLLM prints a traceback for every other exception.
    raise SystemExit(f"Antares: {error}") from None

__all__ = ["SloScheduler"]
