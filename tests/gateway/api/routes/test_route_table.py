"""Which routes reach an engine. A route that is not known never does, because it could generate tokens."""

from __future__ import annotations

import pytest

from gateway.api.errors import ApiError
from gateway.api.routes.table import RouteTable
from tests.fixtures.live_gateway import CHAT, Live, live


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/chat/completions/batch"],
)
def test_generation_route_is_scheduled(path: str) -> None:
    route = RouteTable().find(path)
    route.check("POST", "/v1/x")
    assert (route.label, route.generation is not None) == (path, True)
    with pytest.raises(ApiError) as caught:
        route.check("GET", "/v1/x")
    assert (caught.value.status, caught.value.headers) == (405, [(b"allow", b"POST")])


@pytest.mark.parametrize(
    ("path", "method", "label"),
    [
        ("/v1/models", "GET", "/v1/models"),
        ("/v1/models/meta-llama/Llama-3.1-8B@main", "GET", "/v1/models/{model}"),
        ("/v1/embeddings", "POST", "/v1/embeddings"),
        ("/v1/responses/resp_1", "GET", "/v1/responses/{id}"),
        ("/v1/responses/resp_1", "DELETE", "/v1/responses/{id}"),
        ("/v1/responses/resp_1/cancel", "POST", "/v1/responses/{id}/cancel"),
        ("/v1/responses/render", "POST", "/v1/responses/render"),
        ("/v1/messages/count_tokens", "POST", "/v1/messages/count_tokens"),
        ("/v1/audio/transcriptions", "POST", "/v1/audio/transcriptions"),
    ],
)
def test_known_route_passes_through(path: str, method: str, label: str) -> None:
    route = RouteTable().find(path)
    route.check(method, path)
    assert (route.label, route.generation) == (label, None)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/",
        "/v1/anything",
        "/v1/chat/completions/",
        "/v1/Chat/Completions",
        "/v1//chat/completions",
        "/v1/chat/completions\n",
        "/v1/chat/completions%20",
        "/v1/../metrics",
        "/v1/x/../chat/completions",
        "/v1/models/../chat/completions",
        "/v1/models/./x",
        "/v1/models/..",
        "/v1/models/%2e%2e/chat/completions",
        "/v1/models/..\\chat\\completions",
        "/v1/models/x?y",
        "/v1/responses/..",
        "/v1/responses/a/b",
        "/v1/responses/a%2Fcancel",
        "/v1/responses/a/cancel/",
        "/v1/generate",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_route_gets_404(path: str, method: str) -> None:
    route = RouteTable().find(path)
    with pytest.raises(ApiError) as caught:
        route.check(method, path)
    assert (caught.value.status, caught.value.code, route.label) == (404, "not_found", "/v1/*")


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/realtime"])
def test_generation_route_that_cannot_be_scheduled_gets_501(path: str) -> None:
    with pytest.raises(ApiError) as caught:
        RouteTable().find(path).check("POST", path)
    assert (caught.value.status, caught.value.code) == (501, "not_implemented")


def test_configured_route_passes_through_but_never_a_generation_route() -> None:
    table = RouteTable(["/v1/images/generations", "/v1/responses", "/v1/systemone"])
    table.find("/v1/images/generations").check("POST", "/v1/x")
    assert table.find("/v1/responses").generation is not None
    with pytest.raises(ApiError):
        table.find("/v1/systemone").check("POST", "/v1/x")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/models", 200),
        ("GET", "/v1/models/simulated", 200),
        ("GET", "/v1/models/other", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/responses/resp_1", 404),
        ("GET", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("POST", "/v1/anything", 404),
        ("POST", "/v1/systemone", 501),
        ("GET", "/v1/messages/x", 404),
    ],
)
async def test_every_answer_has_one_request_id_and_is_counted(
    antares: Live, method: str, path: str, status: int
) -> None:
    answer = await antares.http.request(method, path, headers={"x-request-id": "mine-1"})
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["mine-1"])
    assert "error" in answer.json() or status == 200
    label = RouteTable().find(path).label
    metrics = (await antares.http.get("/metrics")).text
    assert f'antares_http_requests_total{{route="{label}",status="{status}"}} 1.0' in metrics
    assert antares.gateway.ledger.accepted == 0


@pytest.mark.parametrize("unsafe", ["a b", "x" * 129, "<script>", ""])
async def test_unsafe_request_id_is_replaced_on_other_routes(antares: Live, unsafe: str) -> None:
    (given,) = (await antares.http.get("/v1/models", headers={"x-request-id": unsafe})).headers.get_list("x-request-id")
    assert given not in ("", unsafe)


async def test_configured_route_reaches_the_engine() -> None:
    async with live(server={"pass_through_routes": ["/v1/images/generations"]}) as antares:
        antares.echo_bodies()
        assert (await antares.ask({"prompt": "a"}, "/v1/images/generations")).json() == {"prompt": "a"}
