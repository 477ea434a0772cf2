"""Routes that are not scheduled: requests pass through unchanged, except for fields that only the gateway may set."""

from __future__ import annotations

import pytest

from tests.fixtures.live_gateway import CHAT, Live


async def test_forged_xargs_are_removed_on_other_routes(antares: Live) -> None:
    antares.echo_bodies()
    forged = {"input": "hi", "vllm_xargs": {"antares_tpot_ms": 0.001, "mine": 1}}
    assert (await antares.ask(forged, path="/v1/responses")).json() == {"input": "hi", "vllm_xargs": {"mine": 1}}
    plain = b'{ "input" :  "unchanged" }'
    assert (await antares.http.post("/v1/responses", content=plain)).content == plain


FORGED = '{"input": "hi", "vllm_xargs": {"antares_tpot_ms": 1}}'


@pytest.mark.parametrize(
    "content_types",
    [
        ["Application/JSON"],
        ["APPLICATION/json ; charset=utf-8"],
        ["application/vnd.api+json"],
        [""],
        ["text/plain", "application/json"],
    ],
)
async def test_body_is_checked_whenever_an_engine_may_read_it_as_json(antares: Live, content_types: list[str]) -> None:
    antares.echo_bodies()
    headers = [("content-type", given) for given in content_types]
    answer = await antares.http.post("/v1/responses", content=FORGED.encode(), headers=headers)
    assert answer.json() == {"input": "hi"}


@pytest.mark.parametrize(
    "body",
    [
        FORGED.replace("1", "NaN").encode(),
        FORGED.replace("1", "1e999").encode(),
        FORGED.replace("hi", "\\ud800").encode(),
        b"\xef\xbb\xbf" + FORGED.encode(),
        FORGED.encode("utf-16"),
        FORGED.encode("utf-32"),
        FORGED.replace('"hi"', "[" * 1100 + "]" * 1100).encode(),
        FORGED.encode() + b"x",
    ],
)
@pytest.mark.parametrize("path", ["/v1/responses", CHAT])
async def test_json_that_only_a_lenient_parser_accepts_gets_400(antares: Live, body: bytes, path: str) -> None:
    antares.echo_bodies()
    answer = await antares.http.post(path, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_last_of_two_equal_members_counts(antares: Live) -> None:
    antares.echo_bodies()
    body = b'{"vllm_xargs": {"mine": 1}, "vllm_xargs": {"antares_tpot_ms": 1}, "input": "hi"}'
    assert (await antares.http.post("/v1/responses", content=body)).json() == {"input": "hi"}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/octet-stream"])
async def test_empty_and_non_json_bodies_pass_through_unchanged(antares: Live, content_type: str) -> None:
    antares.echo_bodies()
    body = b"" if content_type == "application/json" else b"\xff{ no"
    headers = {"content-type": content_type}
    answer = await antares.http.post("/v1/responses/1/cancel", content=body, headers=headers)
    assert (answer.status_code, answer.content) == (200, body)


def form(disposition: str, value: str = "1") -> bytes:
    parts = ["content-disposition: form-data; name=\"file\"; filename*=UTF-8''a.wav\r\n\r\nnoise"]
    parts += [f"Content-Disposition: form-data;{disposition}\r\n\r\n{value}"]
    return "".join(f"--xx\r\n{part}\r\n" for part in parts).encode() + b"--xx--\r\n"


@pytest.mark.parametrize(
    ("disposition", "charset", "param"),
    [
        (' name="vllm_xargs"', "", "vllm_xargs"),
        (' name="vllm_xargs"', "; charset=UTF-8", "vllm_xargs"),
        ("NAME = vllm_xargs", "", "vllm_xargs"),
        (" name*=utf-8''vllm%5Fxargs", "", "vllm_xargs"),
        (' name*0="vllm_"; name*1="xargs"', "", "vllm_xargs"),
        (' name="+AHY-llm+AF8-xargs"', "; charset=utf-7", "content-type"),
        (' name="+AHY-llm+AF8-xargs"', "; Charset*=utf-8''utf-7", "content-type"),
        (' name="+AHY-llm+AF8-xargs"', "; charset=utf-8; charset = utf-7", "content-type"),
    ],
)
async def test_form_with_xargs_gets_400(antares: Live, disposition: str, charset: str, param: str) -> None:
    headers = {"content-type": f"Multipart/form-data; boundary=xx{charset}"}
    body = form(disposition, '{"antares_tpot_ms": 1}')
    answer = await antares.http.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("charset", ["", "; charset=UTF-8", '; charset="utf8" ; x=y'])
@pytest.mark.parametrize(("name", "rejected"), [("seed", True), ("seeds", False), ("prompt", False)])
async def test_form_passes_through_unless_the_engine_rejects_a_field(
    antares: Live, name: str, rejected: bool, charset: str
) -> None:
    antares.echo_bodies()
    antares.forbid_seed()
    headers = {"content-type": f"multipart/form-data; boundary=xx{charset}"}
    answer = await antares.http.post("/v1/audio/transcriptions", content=form(f' name="{name}"'), headers=headers)
    assert answer.status_code == (400 if rejected else 200), answer.text


async def test_engine_checks_apply_to_other_routes(antares: Live) -> None:
    antares.forbid_seed()
    answer = await antares.ask({"input": "hi", "seed": 1}, path="/v1/responses")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "seed")
