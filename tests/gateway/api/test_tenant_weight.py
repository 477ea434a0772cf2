"""The weight of a key reaches the policy."""

from __future__ import annotations

import pytest

from gateway.api.auth import hash_key
from gateway.requests.request import Request
from tests.fixtures.live_gateway import live

KEY = "alice-0123456789abcdef"


@pytest.mark.parametrize(("options", "weight"), [({}, 1.0), ({"weight": 2.5}, 2.5)])
async def test_request_has_the_weight_of_its_key(
    options: dict[str, float], weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with live(keys=[{"sha256": hash_key(KEY), "tenant": "alice", **options}]) as antares:
        queue, submitted = antares.gateway.engine_queues[0], list[Request]()
        submit = queue.submit
        monkeypatch.setattr(queue, "submit", lambda request, *how: submitted.append(request) or submit(request, *how))
        assert (await antares.ask(x_api_key=KEY)).status_code == 200
    assert [request.weight for request in submitted] == [weight]
