"""The command line of vLLM for a configuration."""

from __future__ import annotations

from engine_adapter.vllm.launch import SCHEDULER, command_line


def test_command_line_has_flags_of_every_kind() -> None:
    flags = {
        "enforce-eager": True,
        "enable-prefix-caching": False,
        "seed": None,
        "max-num-seqs": 8,
        "lora-modules": ["a=/a", "b=/b"],
        "speculative-config": {"method": "ngram", "num_speculative_tokens": 3},
    }
    assert command_line("/model", ["one", "two"], flags) == [
        "--scheduler-cls", SCHEDULER, "--enforce-eager", "--no-enable-prefix-caching", "--max-num-seqs", "8",
        "--lora-modules", "a=/a", "b=/b",
        "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}',
        "--model", "/model", "--served-model-name", "one", "two",
    ]  # fmt: skip


def test_configured_scheduler_class_replaces_ours() -> None:
    assert "--scheduler-cls" not in command_line("/model", [], {"scheduler-cls": None})
    assert command_line("/model", [], {"scheduler-cls": "a.B"})[:2] == ["--scheduler-cls", "a.B"]
