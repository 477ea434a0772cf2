"""Reads a vLLM server's queue, KV memory and accepted drafts from its ``/metrics``, for want of the report channel."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine_adapter.report_channel.messages import QueueReport
from engine_adapter.step_report import StepReport

_NAMES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "generation_tokens_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
)
_LINE = re.compile(rb"^vllm:(%s)(?:\{(.*)\})? ([^ \n]+)" % "|".join(_NAMES).encode(), re.MULTILINE)
_KV_TOKENS = re.compile(rb'kv_cache_size_tokens="(\d{1,15})"')

MAX_COUNT = 1 << 53
"""Larger counts are ignored: a float does not hold them exactly."""


@dataclass(slots=True, frozen=True)
class ServerMetrics:
    """One reading of a server's ``/metrics``. Engines of one server (data parallelism) are added up.

    Attributes:
        queue: requests that run and wait, and the mean usage of KV memory.
        kv_tokens: tokens that fit in the KV memory, 0 if the server does not say so.
        tokens, drafting, draft_tokens, accepted_tokens: counters: tokens generated, decodes with drafts, drafts
            verified and drafts accepted.
    """

    queue: QueueReport
    kv_tokens: int = 0
    tokens: int = 0
    drafting: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def steps_since(self, before: ServerMetrics) -> StepReport | None:
        """Return the decodes since ``before`` as if one step had computed them, for `Acceptance`.

        None if there are none, or if the counters are not of one server: it was restarted in between, or the address
        leads to several.
        """
        drafting, accepted = self.drafting - before.drafting, self.accepted_tokens - before.accepted_tokens
        drafts, decodes = self.draft_tokens - before.draft_tokens, self.tokens - before.tokens - accepted
        if min(drafting, drafts) < 0 or not 0 <= accepted <= drafts or not drafting <= drafts or decodes <= 0:
            return None
        drafting = min(drafting, decodes)
        return StepReport(decodes, 0, 0.0, 0.0, drafting, drafts, accepted, 0, drafting)


def read_metrics(text: bytes) -> ServerMetrics | None:
    """Return what ``text``, in the format of Prometheus, says of vLLM; None if it says nothing of vLLM's queue."""
    sums: dict[bytes, float] = {}
    usages: list[float] = []
    kv_tokens = 0
    for name, labels, value in _LINE.findall(text):
        if name == b"cache_config_info":
            found = _KV_TOKENS.search(labels)
            kv_tokens += int(found[1]) if found else 0
            continue
        try:
            number = float(value)
        except ValueError:
            continue
        if not 0 <= number <= MAX_COUNT:
            continue
        sums[name] = sums.get(name, 0.0) + number
        if name == b"kv_cache_usage_perc":
            usages.append(min(1.0, number))
    if b"num_requests_running" not in sums:
        return None

    def count(name: bytes) -> int:
        return int(sums.get(name, 0.0))

    usage = sum(usages) / len(usages) if usages else 0.0
    return ServerMetrics(
        QueueReport(count(b"num_requests_running"), count(b"num_requests_waiting"), usage),
        kv_tokens,
        count(b"generation_tokens_total"),
        count(b"spec_decode_num_drafts_total"),
        count(b"spec_decode_num_draft_tokens_total"),
        count(b"spec_decode_num_accepted_tokens_total"),
    )
