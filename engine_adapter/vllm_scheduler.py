"""The public path of vLLM's `--scheduler-cls`: ``engine_adapter.vllm_scheduler.SloScheduler``."""

from engine_adapter.vllm.scheduler import SloScheduler

__all__ = ["SloScheduler"]
