"""Public import path of the scheduler class, for vLLM's `--scheduler-cls`."""

from engine_adapter.vllm.scheduler import SloScheduler

__all__ = ["SloScheduler"]
