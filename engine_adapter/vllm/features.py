"""The features of vLLM that work with the step gate, and the check at start, which refuses unsupported ones.

`python -m engine_adapter.vllm.features` prints the table of docs/vllm-features.md. A test compares the two.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("antares.engine.vllm")

DOCS = "docs/vllm-features.md"


class UnsupportedFeatureError(RuntimeError):
    """vLLM was configured with a feature that does not work beside the step gate."""


class Part(enum.Enum):
    """Where vLLM runs, with its title in the table."""

    IN_PROCESS = "`kind: vllm`"
    SERVER = "server"


class Support(enum.StrEnum):
    """Whether a feature works."""

    WORKS = "works"
    REFUSED = "refused"
    UNTESTED = "untested"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a feature works in one part.

    ``text``: the test that shows it, why it is refused and what to do instead, or what is not known.
    """

    support: Support
    text: str


def _works(test: str) -> Verdict:
    return Verdict(Support.WORKS, test)


def _refused(message: str) -> Verdict:
    return Verdict(Support.REFUSED, message)


def _untested(text: str) -> Verdict:
    return Verdict(Support.UNTESTED, text)


@dataclass(frozen=True, slots=True)
class Feature:
    """One row of the table.

    ``flag``: how `vllm serve` enables it. ``in_use``: whether a `VllmConfig` has it enabled; None if requests ask for
    it, so that there is nothing to check at start. ``in_process``: default: as ``server``.
    """

    name: str
    flag: str
    in_use: Callable[[Any], bool] | None
    server: Verdict
    in_process: Verdict | None = None

    def verdict(self, part: Part) -> Verdict:
        """Return whether the feature works in ``part``."""
        return self.in_process or self.server if part is Part.IN_PROCESS else self.server


def _speculates(*methods: str) -> Callable[[Any], bool]:
    return lambda config: config.speculative_config is not None and config.speculative_config.method in methods


_NAMED_METHODS = ("ngram", "ngram_gpu", "eagle", "eagle3", "mtp", "draft_model")

_HISTORIES = (
    "tests/engine_adapter/vllm/test_scheduler_histories.py::test_histories_keep_tokens_memory_budgets_and_reports"
)
_DRAFTS = "the scheduler is tested with drafts of any origin, but no engine ran with this method"
_STEPPED = "tests/engine_adapter/vllm/test_scheduler_features.py"
_PLAIN = "tests/e2e/test_plain_vllm.py"
_NGRAM = "tests/engine_adapter/vllm/test_ngram_answers.py::test_answers_with_drafts_equal_stock_ones"
_PARALLEL = "tests/e2e/test_tensor_parallel.py::test_paced_requests_of_two_workers_answer_as_stock"

FEATURES = (
    Feature(
        "speculative decoding, n-gram",
        "`speculative-config: {method: ngram}`",
        _speculates("ngram", "ngram_gpu"),
        _works(_NGRAM),
    ),
    Feature(
        "speculative decoding, EAGLE",
        "`speculative-config: {method: eagle3}`",
        _speculates("eagle", "eagle3"),
        _untested(_DRAFTS),
    ),
    Feature(
        "speculative decoding, MTP",
        "`speculative-config: {method: mtp}`",
        _speculates("mtp"),
        _untested(_DRAFTS),
    ),
    Feature(
        "speculative decoding, draft model",
        "`speculative-config: {method: draft_model}`",
        _speculates("draft_model"),
        _untested(_DRAFTS),
    ),
    Feature(
        "speculative decoding, other methods",
        "`speculative-config`",
        lambda config: config.speculative_config is not None and config.speculative_config.method not in _NAMED_METHODS,
        _untested(_DRAFTS),
    ),
    Feature(
        "prefix caching",
        "`enable-prefix-caching` (default)",
        lambda config: bool(config.cache_config.enable_prefix_caching),
        _works("tests/e2e/clients/test_prefix_cache.py::test_growing_chat_is_served_whole"),
    ),
    Feature(
        "prefix caching off",
        "`enable-prefix-caching: false`",
        lambda config: not config.cache_config.enable_prefix_caching,
        _works(f"{_PLAIN}::test_gate_paces_requests_of_a_plain_vllm_server"),
    ),
    Feature(
        "chunked prefill off",
        "`enable-chunked-prefill: false`",
        lambda config: not config.scheduler_config.enable_chunked_prefill,
        _works(f"{_PLAIN}::test_whole_prompts_are_computed_beside_paced_decodes"),
    ),
    Feature(
        "asynchronous scheduling",
        "`async-scheduling` (default, except on CPU)",
        lambda config: bool(config.scheduler_config.async_scheduling),
        _works(_HISTORIES),
    ),
    Feature(
        "asynchronous scheduling off",
        "`async-scheduling: false`",
        lambda config: not config.scheduler_config.async_scheduling,
        _works("tests/e2e/test_quickstart.py::test_streamed_response_has_slo_headers"),
    ),
    Feature(
        "structured output",
        "`response_format`, `structured_outputs` of a request",
        None,
        _works("tests/e2e/test_quickstart.py::test_engine_features_work_through_the_gateway"),
    ),
    Feature(
        "LoRA",
        "`enable-lora`",
        lambda config: config.lora_config is not None,
        _works(f"{_PLAIN}::test_lora_adapter_is_served_with_a_pace"),
    ),
    Feature(
        "multimodal",
        "a multimodal model",
        lambda config: bool(config.model_config.is_multimodal_model),
        _untested(
            "the CPU installation lacks torchvision; what a step must allow for an image is tested in "
            "`tests/engine_adapter/vllm/test_unsplittable.py`"
        ),
    ),
    Feature(
        "KV connectors",
        "`kv-transfer-config`",
        lambda config: config.kv_transfer_config is not None,
        _untested("[tried](results/vllm_features.md) with one connector; best-effort preemption is off"),
    ),
    Feature(
        "encoder (EC) connectors",
        "`ec-transfer-config`",
        lambda config: config.ec_transfer_config is not None,
        _untested("best-effort preemption is off"),
    ),
    Feature(
        "priority policy",
        "`scheduling-policy: priority`",
        lambda config: config.scheduler_config.policy == "priority",
        _works(f"{_STEPPED}::test_priority_policy_orders_paced_and_held_prompts"),
    ),
    Feature(
        "sleep mode",
        "`enable-sleep-mode`",
        lambda config: bool(config.model_config.enable_sleep_mode),
        _untested("vLLM on CPU has no sleep mode, so it could not be tried"),
        in_process=_refused("the gateway has no route for sleeping. Run vLLM as a server, and use `kind: http`"),
    ),
    Feature(
        "sessions (resumable streaming input)",
        "`/v1/realtime`",
        None,
        _works(f"{_STEPPED}::test_second_turn_of_a_session_keeps_its_pace"),
        in_process=_refused("the gateway has no route `/v1/realtime`, and answers 501 (400 to a WebSocket upgrade)"),
    ),
    Feature(
        "tensor parallel (TP)",
        "`tensor-parallel-size`",
        lambda config: config.parallel_config.tensor_parallel_size > 1,
        _works(_PARALLEL),
    ),
    Feature(
        "pipeline parallel (PP)",
        "`pipeline-parallel-size`",
        lambda config: config.parallel_config.pipeline_parallel_size > 1,
        _refused(
            "with stages several steps run at once, but the step gate plans and times one. Use `tensor-parallel-size`, "
            "or run a server without `--scheduler-cls`, with `kind: http` and `send_slo: false`"
        ),
    ),
    Feature(
        "data parallel (DP)",
        "`data-parallel-size`",
        lambda config: config.parallel_config.data_parallel_size > 1,
        _untested("[tried](results/vllm_features.md); each rank has its own gate"),
        in_process=_refused(
            "the gateway counts one rank's slots and step times, so it would use 1/N of the ranks. "
            "Use one engine per rank: a `vllm serve` for each, with `kind: http`"
        ),
    ),
    Feature(
        "expert parallel (EP)",
        "`enable-expert-parallel`",
        lambda config: bool(config.parallel_config.enable_expert_parallel),
        _untested("vLLM on CPU crashes in its own expert-parallel kernel, so it could not be tried"),
    ),
)


def check(config: Any, part: Part) -> None:
    """Refuse what does not work, and log what was not tested. ``config``: vLLM's `VllmConfig`.

    Raises:
        UnsupportedFeatureError: the message names each refused feature, the reason, and what to do instead.
    """
    refused, untested = [], []
    for feature, verdict in in_use(config, part):
        if verdict.support is Support.REFUSED:
            refused.append(f"{feature.flag} is not supported: {verdict.text}.")
        elif verdict.support is Support.UNTESTED:
            untested.append(feature.name)
    if refused:
        raise UnsupportedFeatureError(" ".join(refused).replace("`", ""))
    if untested:
        log.warning("not tested with Antares: %s (%s)", ", ".join(untested), DOCS)


def check_server(config: Any) -> None:
    """Check as `check`, in an EngineCore that no gateway started. Ends the process if a feature is refused."""
    try:
        check(config, Part.SERVER)
    except UnsupportedFeatureError as error:
        # NOTE: vLLM prints a traceback for every other exception.
        raise SystemExit(f"Antares: {error}") from None


def in_use(config: Any, part: Part) -> Iterator[tuple[Feature, Verdict]]:
    """Yield the features that ``config`` enables, and whether they work."""
    for feature in FEATURES:
        if feature.in_use is not None and feature.in_use(config):
            yield feature, feature.verdict(part)


def table() -> str:
    """Return the table of the docs, in Markdown."""
    rows = [["feature", "enabled by", *(part.value for part in Part), "test, reason or what is not known"], ["---"] * 5]
    for feature in FEATURES:
        verdicts = [feature.verdict(part) for part in Part]
        texts = [_cell(verdict) for verdict in verdicts]
        if feature.in_process is not None:
            texts = [f"{part.value.capitalize()}: {text}" for part, text in zip(Part, texts, strict=True)]
        row = [feature.name, feature.flag, *(verdict.support for verdict in verdicts)]
        rows.append([*row, " ".join(dict.fromkeys(texts))])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(verdict: Verdict) -> str:
    if verdict.support is Support.WORKS:
        return f"`{verdict.text}`"
    return f"{verdict.text.removesuffix('.')}."


if __name__ == "__main__":
    print(table(), end="")  # noqa: T201
