"""The hooks on vLLM's OutputProcessor, with stubs in place of vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_adapter.vllm.rendering import Rendering, current_rendering
from engine_adapter.vllm.token_observation import current_observer, current_xargs, observe_outputs
from tests.fixtures.live_server import Recorder

OURS = {"antares_gate": "slack", "antares_tpot_ms": 50.0}


class StubProcessor:
    """Records the requests that vLLM would send to its EngineCore."""

    def __init__(self) -> None:
        self.added: list[Any] = []

    def add_request(self, request: Any, *_: Any) -> None:
        self.added.append(request)

    def process_outputs(self, outputs: list[Any]) -> None: ...


def a_request(extra_args: dict[str, Any] | None, pools: bool = False) -> SimpleNamespace:
    params = None if pools else SimpleNamespace(extra_args=extra_args)
    return SimpleNamespace(request_id="r", prompt_token_ids=[1, 2], sampling_params=params)


@pytest.mark.parametrize(
    ("given", "ours", "expected"),
    [
        (None, OURS, OURS),
        ({"mine": 1}, OURS, {"mine": 1, **OURS}),
        ({"antares_tpot_ms": 0.1, "antares_kind": "paced", "mine": 1}, OURS, {"mine": 1, **OURS}),
        ({"antares_tpot_ms": 0.1}, {}, None),
        ({"antares_tpot_ms": 0.1}, None, None),
        ({"kv_transfer_params": {"a": 1}}, None, {"kv_transfer_params": {"a": 1}}),
        (None, None, None),
    ],
)
def test_new_sequence_gets_the_gate_members_of_its_request(
    given: dict[str, Any] | None, ours: dict[str, Any] | None, expected: dict[str, Any] | None
) -> None:
    processor = StubProcessor()
    observe_outputs(processor, {})
    observer, xargs = current_observer.set(Recorder()), current_xargs.set(ours)
    try:
        processor.add_request(a_request(given))
        processor.add_request(a_request(None, pools=True))
    finally:
        current_observer.reset(observer)
        current_xargs.reset(xargs)
    assert processor.added[0].sampling_params.extra_args == expected
    assert processor.added[1].sampling_params is None


def test_sequence_outside_a_scheduled_request_has_no_gate_members() -> None:
    processor = StubProcessor()
    observe_outputs(processor, {})
    processor.add_request(a_request({"mine": 1, "antares_gate": "open"}))
    assert processor.added[0].sampling_params.extra_args == {"mine": 1}


def test_sequence_of_a_request_that_was_not_scheduled_is_refused() -> None:
    """Whatever way its prompt took through vLLM."""
    processor = StubProcessor()
    observe_outputs(processor, {})
    token = current_rendering.set(Rendering(refused=True))
    try:
        with pytest.raises(ValueError, match="Send it again"):
            processor.add_request(a_request(None))
    finally:
        current_rendering.reset(token)
    assert processor.added == []
