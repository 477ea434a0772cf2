"""The end of a gateway with a real vLLM: streams that the drain cuts.

The test stops the gateway that it shares with the other modules, so it is alone in its module: see `served`. In the
order of names this module is the last one, so no second gateway is started.
"""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.fixtures.sdk_requests import LONG
from tests.fixtures.served import Served
from tests.fixtures.tools_gateway import KEY, MODEL

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_streams_open_after_the_drain_end_with_error_events(served: Served) -> None:
    # A stream that has not begun gets 503, not an event, and the drain takes 1 s: less than a prompt on a busy machine.
    begun = {path: threading.Event() for path in LONG}

    def stream(path: str) -> str:
        body = {"model": MODEL, "stream": True, **LONG[path]}
        headers = {"x-slo-class": "batch", "x-slo-report": "1", "authorization": f"Bearer {KEY}"}
        text = ""
        with httpx.stream("POST", f"{served.base}{path}", json=body, headers=headers, timeout=120) as response:
            for part in response.iter_text():
                text += part
                begun[path].set()
        return text

    with ThreadPoolExecutor(len(LONG)) as pool:
        answers = [pool.submit(stream, path) for path in LONG]
        assert all(event.wait(120) for event in begun.values())
        served.process.send_signal(signal.SIGTERM)
        texts = [answer.result(120) for answer in answers]
    assert all(": antares" not in text for text in texts)
    events = [next(line for line in reversed(text.splitlines()) if line.startswith("data: {")) for text in texts]
    assert [json.loads(event[6:])["error"]["code"] for event in events] == ["draining"] * len(LONG)
    assert [text.split("\n\n")[-2].startswith("event: error\n") for text in texts] == [True, True, False]
    served.process.wait(120)
