"""engine_adapter.vllm.cpu_server: the flags that vLLM gets."""

from __future__ import annotations

import pytest

from engine_adapter.vllm import cpu_server


def test_given_flags_come_after_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_server, "resolve_model", lambda name: f"/folder of {name}")
    words = cpu_server.command_line(["--port", "8001", "--max-num-seqs", "4"])
    assert words[:3] == ["vllm", "serve", "/folder of builtin:smollm2-135m-instruct"]
    assert words[-4:] == ["--port", "8001", "--max-num-seqs", "4"]
    assert words[words.index("--scheduler-cls") + 1] == "engine_adapter.vllm_scheduler.SloScheduler"
    assert words[words.index("--served-model-name") + 1] == "smollm2-135m-instruct"
