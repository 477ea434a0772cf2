"""The table of vLLM's features, the check at start, and what a user sees of a refusal."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.engine import EngineStartError
from engine_adapter.vllm import features, launch, versions
from engine_adapter.vllm.features import FEATURES, Part, Support, UnsupportedFeatureError, check, check_server, in_use
from tests.fixtures.stub_modules import stub_modules

ROOT = Path(__file__).parents[3]


def vllm_config(**changes: Any) -> SimpleNamespace:
    """What the check reads of a `VllmConfig`: vLLM's defaults, with ``changes`` ("section__member")."""
    sections: dict[str, dict[str, Any]] = {
        "cache_config": {"enable_prefix_caching": True},
        "scheduler_config": {"enable_chunked_prefill": True, "async_scheduling": True, "policy": "fcfs"},
        "model_config": {"is_multimodal_model": False, "enable_sleep_mode": False},
        "parallel_config": {
            "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1,
            "enable_expert_parallel": False,
        },
    }  # fmt: skip
    whole: dict[str, Any] = dict.fromkeys(
        ("speculative_config", "lora_config", "kv_transfer_config", "ec_transfer_config")
    )
    for name, value in changes.items():
        section, _, member = name.partition("__")
        if member:
            sections[section][member] = value
        else:
            whole[section] = value
    return SimpleNamespace(**whole, **{name: SimpleNamespace(**members) for name, members in sections.items()})


def names(config: Any) -> set[str]:
    return {feature.name for feature, _ in in_use(config, Part.SERVER)}


DEFAULTS = {"prefix caching", "asynchronous scheduling"}


def test_default_configuration_uses_what_works() -> None:
    assert names(vllm_config()) == DEFAULTS


def speculative(method: str) -> SimpleNamespace:
    return SimpleNamespace(method=method)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"speculative_config": speculative("ngram")}, "speculative decoding, n-gram"),
        ({"speculative_config": speculative("eagle3")}, "speculative decoding, EAGLE"),
        ({"speculative_config": speculative("mtp")}, "speculative decoding, MTP"),
        ({"speculative_config": speculative("draft_model")}, "speculative decoding, draft model"),
        ({"speculative_config": speculative("medusa")}, "speculative decoding, other methods"),
        ({"cache_config__enable_prefix_caching": False}, "prefix caching off"),
        ({"scheduler_config__enable_chunked_prefill": False}, "chunked prefill off"),
        ({"scheduler_config__async_scheduling": False}, "asynchronous scheduling off"),
        ({"scheduler_config__policy": "priority"}, "priority policy"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"ec_transfer_config": object()}, "encoder (EC) connectors"),
        ({"model_config__is_multimodal_model": True}, "multimodal"),
        ({"model_config__enable_sleep_mode": True}, "sleep mode"),
        ({"parallel_config__tensor_parallel_size": 2}, "tensor parallel (TP)"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallel (PP)"),
        ({"parallel_config__data_parallel_size": 2}, "data parallel (DP)"),
        ({"parallel_config__enable_expert_parallel": True}, "expert parallel (EP)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_feature_is_recognised(change: dict[str, Any], name: str) -> None:
    assert names(vllm_config(**change)) - DEFAULTS == {name}


def test_every_feature_is_recognised_by_a_test_or_asked_for_by_requests() -> None:
    recognised = {each for _, each in test_each_feature_is_recognised.pytestmark[0].args[1]} | DEFAULTS  # type: ignore[attr-defined]
    assert {feature.name for feature in FEATURES if feature.in_use is not None} == recognised


PP = (
    "pipeline-parallel-size is not supported: with stages several steps run at once, but the step gate plans and times "
    "one. Use tensor-parallel-size, or run a server without --scheduler-cls, with kind: http and send_slo: false."
)
DP = (
    "data-parallel-size is not supported: the gateway counts one rank's slots and step times, so it would use 1/N of "
    "the ranks. Use one engine per rank: a vllm serve for each, with kind: http."
)
SLEEP = (
    "enable-sleep-mode is not supported: the gateway has no route for sleeping. "
    "Run vLLM as a server, and use kind: http."
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, PP),
        ({"parallel_config__data_parallel_size": 2}, DP),
        ({"model_config__enable_sleep_mode": True}, SLEEP),
        ({"parallel_config__pipeline_parallel_size": 2, "parallel_config__data_parallel_size": 4}, f"{PP} {DP}"),
    ],
)
def test_in_process_engine_refuses_with_the_alternative(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedFeatureError) as caught:
        check(vllm_config(**change), Part.IN_PROCESS)
    assert str(caught.value) == message


def test_every_refusal_of_a_flag_has_a_test_of_its_message() -> None:
    refused = {
        (part, feature.name)
        for feature in FEATURES
        for part in Part
        if feature.in_use is not None and feature.verdict(part).support is Support.REFUSED
    }
    tested = {
        (Part.IN_PROCESS, "pipeline parallel (PP)"),
        (Part.IN_PROCESS, "data parallel (DP)"),
        (Part.IN_PROCESS, "sleep mode"),
        (Part.SERVER, "pipeline parallel (PP)"),
    }
    assert refused == tested


def test_server_ends_with_a_message_and_no_traceback() -> None:
    """`SystemExit` with a text: the process prints it to standard error, and its exit code is 1."""
    with pytest.raises(SystemExit) as caught:
        check_server(vllm_config(parallel_config__pipeline_parallel_size=2))
    assert caught.value.code == f"Antares: {PP}"
    assert caught.value.__suppress_context__


def test_server_accepts_ranks_and_sleep_mode(caplog: pytest.LogCaptureFixture) -> None:
    check_server(vllm_config(parallel_config__data_parallel_size=2, model_config__enable_sleep_mode=True))
    assert [record.getMessage() for record in caplog.records] == [
        "not tested with Antares: sleep mode, data parallel (DP) (docs/vllm-features.md)"
    ]


def test_what_works_starts_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        check(vllm_config(parallel_config__tensor_parallel_size=2, lora_config=object()), Part.IN_PROCESS)
    assert caplog.records == []


def test_in_process_engine_does_not_start_with_a_refused_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    config = vllm_config(parallel_config__data_parallel_size=2)
    parser = SimpleNamespace(parse_args=lambda arguments: None)
    arguments = SimpleNamespace(from_cli_args=lambda args: SimpleNamespace(create_engine_config=lambda: config))
    stub_modules(
        monkeypatch,
        {
            "vllm": {"__version__": "0.32.0"},
            "vllm.engine.arg_utils": {"AsyncEngineArgs": arguments},
            "vllm.entrypoints.launchers.cli_args": {
                "make_arg_parser": lambda given: parser,
                "validate_parsed_serve_args": lambda args: None,
            },
            "vllm.utils.argparse_utils": {"FlexibleArgumentParser": lambda: None},
            "vllm.v1.engine.async_llm": {"AsyncLLM": None},
        },
    )
    monkeypatch.setattr(versions, "require_in_process", lambda version: None)
    with pytest.raises(EngineStartError) as caught:
        launch.create_llm([], lambda stats: None, lambda: False)
    assert str(caught.value) == DP


# --- the table in the docs -------------------------------------------------------------------------------------------

DOCS = (ROOT / features.DOCS).read_text(encoding="utf-8")


def test_table_in_the_docs_is_the_one_that_is_enforced() -> None:
    assert features.table() in DOCS, "run `python -m engine_adapter.vllm.features` and paste its output"


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_what_works_names_a_test(feature: features.Feature) -> None:
    for part in Part:
        verdict = feature.verdict(part)
        if verdict.support is Support.WORKS:
            file, _, test = verdict.text.partition("::")
            assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")
