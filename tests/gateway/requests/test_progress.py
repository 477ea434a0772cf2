"""`Progress`: what an engine reports about one request."""

from __future__ import annotations

import pytest

from gateway.requests.progress import Progress
from tests.fixtures.policy_builders import make_request


@pytest.mark.parametrize("order", [("short", "long"), ("long", "short")])
def test_cache_hit_of_several_prompts_is_that_of_the_longest(order: tuple[str, str]) -> None:
    """The hit of another one says nothing about the prediction, and counted against the index."""
    request, hits = make_request(cached_tokens=900), list[tuple[int, int]]()
    progress = Progress(request, lambda: None, lambda predicted, actual: hits.append((predicted, actual)))
    for sequence, prompt in [("short", 10), ("long", 1000), ("again", 1000)]:
        progress.on_prompt(sequence, prompt)
    for sequence in [*order, "again"]:
        progress.on_cached(sequence, {"short": 0, "long": 890, "again": 999}[sequence])
    assert hits == [(900, 890)]
    assert (request.prompt_tokens, request.cached_tokens, progress.cached_tokens) == (1000, 890, 890)
