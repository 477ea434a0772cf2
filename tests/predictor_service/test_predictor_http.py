import logging
import time

import httpx
import pytest

from predictor_service.app import create_app
from predictor_service.batching import BatchLimits
from predictor_service.features import prompt_features
from predictor_service.length_model import LengthModel, load_model
from predictor_service.wire import MAX_BODY_BYTES, MAX_INPUTS

SECRET = "xyzzy-private-prompt"
SHIPPED = load_model()


def predictor(model=SHIPPED, limits=None):
    app = create_app(model, limits)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://predictor"
    )
    return app.router.lifespan_context(app), client


async def test_prompts_and_their_features_predict_the_same():
    life, client = predictor()
    prompt = f"Summarise {SECRET} in one sentence"
    async with life, client:
        inputs = [{"prompt": prompt, "prompt_tokens": 7}, {"features": prompt_features(prompt).to_wire()}]
        answer = await client.post("/v1/predict", json={"model": "any/model", "inputs": inputs})
    assert answer.status_code == 200
    body = answer.json()
    assert body["model"] == SHIPPED.name
    first, second = body["predictions"]
    assert first == pytest.approx(second, rel=1e-3)
    assert first["p50"] <= first["p90"]


async def test_bounds_clamp_all_three():
    life, client = predictor()
    async with life, client:
        inputs = [
            {"prompt": "Write a novel", "max_tokens": 7},
            {"prompt": "hi", "min_tokens": 5000},
            {"prompt": "hi", "min_tokens": 3, "max_tokens": 3},
        ]
        answer = await client.post("/v1/predict", json={"model": None, "inputs": inputs})
    assert [set(p.values()) for p in answer.json()["predictions"]] == [{7.0}, {5000.0}, {3.0}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (f'{{"inputs": [{SECRET}', None),
        (b"\xff\xfe", None),
        ([SECRET], None),
        ({"model": 3, "inputs": [{"prompt": SECRET}]}, "model"),
        ({}, "inputs"),
        ({"inputs": SECRET}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"inputs": [{"prompt": SECRET}] * (MAX_INPUTS + 1)}, "inputs"),
        ({"inputs": [SECRET]}, "inputs[0]"),
        ({"inputs": [{"prompt": "a"}, {}]}, "inputs[1]"),
        ({"inputs": [{"prompt": SECRET, "features": {}}]}, "inputs[0]"),
        ({"inputs": [{"prompt": [SECRET]}]}, "inputs[0].prompt"),
        ({"inputs": [{"features": {"version": SECRET}}]}, "inputs[0].features"),
        ({"inputs": [{"prompt": SECRET, "max_tokens": 0}]}, "inputs[0].max_tokens"),
        ({"inputs": [{"prompt": SECRET, "max_tokens": SECRET}]}, "inputs[0].max_tokens"),
        ({"inputs": [{"prompt": SECRET, "max_tokens": True}]}, "inputs[0].max_tokens"),
        ({"inputs": [{"prompt": SECRET, "max_tokens": 1 << 60}]}, "inputs[0].max_tokens"),
        ({"inputs": [{"prompt": SECRET, "prompt_tokens": -1}]}, "inputs[0].prompt_tokens"),
        ({"inputs": [{"prompt": SECRET, "min_tokens": 9, "max_tokens": 8}]}, "inputs[0].min_tokens"),
    ],
)
async def test_a_malformed_body_is_a_400_that_names_the_field_and_quotes_nothing(body, param, caplog):
    caplog.set_level(logging.DEBUG)
    life, client = predictor()
    async with life, client:
        sent = {"content": body} if isinstance(body, str | bytes) else {"json": body}
        answer = await client.post("/v1/predict", **sent)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert SECRET not in answer.text + caplog.text


async def test_a_body_too_large_is_a_413_whether_or_not_it_says_its_size():
    async def unsized():
        for _ in range(5):
            yield b"x" * (MAX_BODY_BYTES // 4)

    life, client = predictor()
    async with life, client:
        for content in (b"x" * (MAX_BODY_BYTES + 1), unsized()):
            answer = await client.post("/v1/predict", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(("header", "status"), [("0", 504), ("-5", 504), ("1e5", 200), ("soon", 400), ("nan", 400)])
async def test_the_deadline_header(header, status):
    life, client = predictor()
    async with life, client:
        answer = await client.post("/v1/predict", json={"inputs": [{"prompt": "a"}]}, headers={"x-deadline-ms": header})
    assert answer.status_code == status
    if status != 200:
        assert answer.json()["error"]["param"] == "x-deadline-ms"


class Slow(LengthModel):
    """Takes its time."""

    def predict(self, rows):
        time.sleep(0.8)
        return super().predict(rows)


class Broken(LengthModel):
    """Fails, quoting what it should not."""

    def predict(self, rows):
        raise ValueError(SECRET)


def as_(kind: type[LengthModel]) -> LengthModel:
    return kind(**{name: getattr(SHIPPED, name) for name in SHIPPED.__dataclass_fields__})


async def test_an_answer_that_comes_too_late_is_a_504_on_time():
    life, client = predictor(as_(Slow))
    async with life, client:
        began = time.monotonic()
        answer = await client.post("/v1/predict", json={"inputs": [{"prompt": "a"}]}, headers={"x-deadline-ms": "30"})
        assert answer.status_code == 504
        assert time.monotonic() - began < 0.6


async def test_a_full_queue_is_a_503_with_retry_after():
    life, client = predictor(limits=BatchLimits(max_waiting=2))
    async with life, client:
        answer = await client.post("/v1/predict", json={"inputs": [{"prompt": "a"}] * 3})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "queue_full"


async def test_a_failure_is_a_500_whose_log_holds_no_prompt(caplog):
    life, client = predictor(as_(Broken))
    async with life, client:
        answer = await client.post("/v1/predict", json={"inputs": [{"prompt": SECRET}]})
    assert answer.status_code == 500
    assert "ValueError" in caplog.text
    assert SECRET not in answer.text + caplog.text


async def test_health_and_metrics():
    life, client = predictor()
    async with life, client:
        await client.post("/v1/predict", json={"inputs": [{"prompt": SECRET}] * 3})
        await client.post("/v1/predict", content=b"{")
        health, metrics = await client.get("/health"), await client.get("/metrics")
    assert health.json() == {"status": "ok", "model": SHIPPED.name}
    for line in (
        'antares_predictor_requests_total{status="200"} 1.0',
        'antares_predictor_requests_total{status="400"} 1.0',
        "antares_predictor_request_seconds_count 2.0",
        "antares_predictor_batch_size_sum 3.0",
        "antares_predictor_queue_depth 0.0",
    ):
        assert line in metrics.text
    assert SECRET not in metrics.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("GET", "/v1/predict", 405)])
async def test_other_routes_answer_in_openai_shape(method, path, status):
    life, client = predictor()
    async with life, client:
        answer = await client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
