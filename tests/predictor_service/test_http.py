import logging
import time
from dataclasses import fields

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from predictor_service.model.features import prompt_features
from predictor_service.model.length_model import LengthModel, Prediction, load_model
from predictor_service.serving.app import create_app
from predictor_service.serving.batching import BatchLimits
from predictor_service.serving.collecting import Collector, read_entries
from predictor_service.serving.learning import Learning
from predictor_service.serving.wire import (
    MAX_BODY_BYTES,
    MAX_INPUTS,
    MAX_NAME_CHARS,
    MAX_OBSERVATIONS,
    MAX_PROMPT_CHARS,
    BadRequest,
    parse_observations,
    parse_request,
)

SECRET = "xyzzy-private-prompt"
SHIPPED = load_model()


def make_predictor(model=SHIPPED, limits=None, learning=None, known_models=frozenset()):
    app = create_app(model, limits, learning, known_models)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://predictor"
    )
    return app.router.lifespan_context(app), client


async def test_predict_gives_same_result_for_prompt_and_features():
    lifespan, client = make_predictor()
    prompt = f"Summarise {SECRET} in one sentence"
    async with lifespan, client:
        inputs = [{"prompt": prompt, "prompt_tokens": 7}, {"features": prompt_features(prompt).to_wire()}]
        response = await client.post("/v1/predict", json={"model": "any/model", "inputs": inputs})
    assert response.status_code == 200
    body = response.json()
    assert body["model"] == SHIPPED.name
    first, second = body["predictions"]
    assert first == pytest.approx(second, rel=1e-3)
    assert first["p50"] <= first["p90"]


async def test_predict_clamps_to_min_and_max_tokens():
    lifespan, client = make_predictor()
    async with lifespan, client:
        inputs = [
            {"prompt": "Write a novel", "max_tokens": 7},
            {"prompt": "hi", "min_tokens": 5000},
            {"prompt": "hi", "min_tokens": 3, "max_tokens": 3},
        ]
        response = await client.post("/v1/predict", json={"model": None, "inputs": inputs})
    clamped = [{p["length"], p["p50"], p["p90"]} for p in response.json()["predictions"]]
    assert clamped == [{7.0}, {5000.0}, {3.0}]
    assert len({p["raw_p50"] for p in response.json()["predictions"][1:]}) == 1, "raw quantiles are not clamped"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (f'{{"inputs": [{SECRET}', None),
        (b"\xff\xfe", None),
        ([SECRET], None),
        ({"model": 3, "inputs": [{"prompt": SECRET}]}, "model"),
        ({"model": "", "inputs": [{"prompt": SECRET}]}, "model"),
        ({"model": "x" * (MAX_NAME_CHARS + 1), "inputs": [{"prompt": SECRET}]}, "model"),
        ({"model": "two\nlines", "inputs": [{"prompt": SECRET}]}, "model"),
        ({"slo_class": [SECRET], "inputs": [{"prompt": SECRET}]}, "slo_class"),
        ({"inputs": [{"prompt": "a"}, {"prompt": SECRET, "model": 5}]}, "inputs[1].model"),
        ({"inputs": [{"prompt": SECRET, "slo_class": "\x00"}]}, "inputs[0].slo_class"),
        ({"inputs": [{"prompt": SECRET, "id": "no spaces"}]}, "inputs[0].id"),
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
async def test_predict_400_names_field_without_quoting_it(body, param, caplog):
    caplog.set_level(logging.DEBUG)
    lifespan, client = make_predictor()
    async with lifespan, client:
        sent = {"content": body} if isinstance(body, str | bytes) else {"json": body}
        response = await client.post("/v1/predict", **sent)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert SECRET not in response.text + caplog.text


async def test_predict_413_for_large_body_with_or_without_length():
    async def unsized():
        for _ in range(5):
            yield b"x" * (MAX_BODY_BYTES // 4)

    lifespan, client = make_predictor()
    async with lifespan, client:
        for content in (b"x" * (MAX_BODY_BYTES + 1), unsized()):
            response = await client.post("/v1/predict", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"


async def test_predict_413_for_large_prompt_names_field():
    lifespan, client = make_predictor()
    async with lifespan, client:
        body = {"inputs": [{"prompt": "a"}, {"prompt": "é" * (1 << 20)}]}
        response = await client.post("/v1/predict", json=body)
        assert response.status_code == 413
        assert response.json()["error"]["param"] == "inputs[1].prompt"
        body = {"inputs": [{"prompt": "é" * MAX_PROMPT_CHARS}]}
        assert (await client.post("/v1/predict", json=body)).status_code == 200


async def test_predict_accepts_any_model_unless_restricted():
    body = {"model": "unknown/model", "inputs": [{"prompt": "hi"}]}
    lifespan, client = make_predictor()
    async with lifespan, client:
        assert (await client.post("/v1/predict", json=body)).status_code == 200
    lifespan, client = make_predictor(known_models=frozenset({"mine"}))
    async with lifespan, client:
        response = await client.post("/v1/predict", json=body)
        assert response.status_code == 404
        assert (response.json()["error"]["param"], response.json()["error"]["code"]) == ("model", "model_not_found")
        for named in ({"model": "mine"}, {}):
            response = await client.post("/v1/predict", json={**named, "inputs": [{"prompt": "hi"}]})
            assert response.status_code == 200
        response = await client.post("/v1/observe", json={"observations": [observation(model="other")]})
        assert (response.status_code, response.json()["error"]["param"]) == (404, "observations[0].model")


def observation(**fields):
    return {"model": "m", "slo_class": "chat", "raw_p50": 100.0, "raw_p90": 250.0, "tokens": 30, **fields}


async def test_observations_correct_later_predictions():
    learning = Learning()
    lifespan, client = make_predictor(learning=learning)
    question = {"model": "m", "inputs": [{"prompt": "Explain photosynthesis", "slo_class": "chat"}]}
    async with lifespan, client:
        (before,) = (await client.post("/v1/predict", json=question)).json()["predictions"]
        assert (before["p50"], before["p90"]) == (before["raw_p50"], before["raw_p90"])
        raw = {"raw_p50": before["raw_p50"], "raw_p90": before["raw_p90"]}
        finished = [observation(**raw, tokens=max(1, round(before["raw_p50"] / 4))) for _ in range(200)]
        response = await client.post("/v1/observe", json={"observations": finished})
        assert (response.status_code, response.json()) == (202, {"observed": 200})
        learning.work()
        (after,) = (await client.post("/v1/predict", json=question)).json()["predictions"]
        metrics = (await client.get("/metrics")).text
    assert after["p50"] == pytest.approx(before["p50"] / 4, rel=0.1)
    assert after["length"] == after["p50"] <= after["p90"]
    assert after["raw_p50"] == before["raw_p50"], "raw quantiles must not include the correction"
    assert 'antares_predictor_calibration_error{model="m",slo_class="chat"} 0.09999' in metrics
    assert 'antares_predictor_calibration_answers{model="m",slo_class="chat"} 200.0' in metrics
    assert "antares_predictor_observations_total 200.0" in metrics


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "observations"),
        ({"observations": []}, "observations"),
        ({"observations": [observation()] * (MAX_OBSERVATIONS + 1)}, "observations"),
        ({"observations": [SECRET]}, "observations[0]"),
        ({"observations": [observation(model=3)]}, "observations[0].model"),
        ({"observations": [observation(slo_class="\t")]}, "observations[0].slo_class"),
        ({"observations": [observation(raw_p50=None)]}, "observations[0].raw_p50"),
        ({"observations": [observation(raw_p50=-1)]}, "observations[0].raw_p50"),
        ({"observations": [observation(raw_p90=True)]}, "observations[0].raw_p90"),
        ({"observations": [observation(raw_p90=1e300)]}, "observations[0].raw_p90"),
        ({"observations": [observation(raw_p50=300)]}, "observations[0].raw_p50"),
        ({"observations": [observation(tokens=1.5)]}, "observations[0].tokens"),
        ({"observations": [observation(tokens=None)]}, "observations[0].tokens"),
        ({"observations": [observation(), observation(censored="no")]}, "observations[1].censored"),
        ({"observations": [observation(id=SECRET * 20)]}, "observations[0].id"),
    ],
)
async def test_observe_400_names_field_and_records_nothing(body, param):
    learning = Learning()
    lifespan, client = make_predictor(learning=learning)
    async with lifespan, client:
        response = await client.post("/v1/observe", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert SECRET not in response.text
    assert learning.calibration.observed == 0


async def test_id_joins_features_with_observed_length(tmp_path):
    learning = Learning(collector=Collector(tmp_path, 1 << 20))
    lifespan, client = make_predictor(learning=learning)
    async with lifespan, client:
        inputs = [{"prompt": f"Tell me about {SECRET}", "id": "r1"}, {"prompt": "no id, not read_entries"}]
        await client.post("/v1/predict", json={"inputs": inputs})
        done = [observation(id="r1", tokens=42, censored=True), observation(id="unknown-id"), observation()]
        await client.post("/v1/observe", json={"observations": done})
    (entry,) = read_entries(tmp_path)
    assert (entry["length"], entry["censored"], entry["model"], entry["slo_class"]) == (42, True, "m", "chat")
    assert entry["features"]["indices"] == prompt_features(f"Tell me about {SECRET}").indices.tolist()


@pytest.mark.parametrize(("header", "status"), [("0", 504), ("-5", 504), ("1e5", 200), ("soon", 400), ("nan", 400)])
async def test_predict_deadline_header(header, status):
    lifespan, client = make_predictor()
    async with lifespan, client:
        response = await client.post(
            "/v1/predict", json={"inputs": [{"prompt": "a"}]}, headers={"x-deadline-ms": header}
        )
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"]["param"] == "x-deadline-ms"


class Slow(LengthModel):
    """Takes 2 s for a prediction."""

    def predict(self, rows):
        time.sleep(2)
        return super().predict(rows)


class Broken(LengthModel):
    """Fails, with a prompt in its error message."""

    def predict(self, rows):
        raise ValueError(SECRET)


def shipped_as(kind: type[LengthModel]) -> LengthModel:
    return kind(**{name: getattr(SHIPPED, name) for name in (field.name for field in fields(SHIPPED))})


class ReadsText:
    """A length model that reads prompts."""

    name, card, reads_text = "reads-text", dict[str, object](), True

    def predict(self, rows):
        return [Prediction(len(row), len(row), 2 * len(row)) for row in rows]


async def test_predict_passes_prompts_to_model_that_reads_text(tmp_path):
    learning = Learning(collector=Collector(tmp_path, 1 << 20))
    lifespan, client = make_predictor(ReadsText(), learning=learning)
    async with lifespan, client:
        response = await client.post("/v1/predict", json={"inputs": [{"prompt": "x" * 30, "id": "r1"}]})
        assert response.json()["predictions"][0]["raw_p50"] == 30
        features = {"inputs": [{"prompt": "a"}, {"features": prompt_features("a").to_wire()}]}
        response = await client.post("/v1/predict", json=features)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "inputs[1].features")
        await client.post("/v1/observe", json={"observations": [observation(id="r1")]})
    assert len(list(read_entries(tmp_path))) == 1


json_scalars = st.none() | st.text(max_size=5) | st.integers() | st.booleans() | st.floats()
json_values = json_scalars | st.lists(json_scalars, max_size=3) | st.dictionaries(st.text(), json_scalars, max_size=3)
body_fields = st.sampled_from(["model", "slo_class"])
input_fields = st.sampled_from(["prompt", "features", "prompt_tokens", "max_tokens", "min_tokens"])
observation_fields = st.sampled_from(["raw_p50", "raw_p90", "tokens", "censored"])
entry_fields = body_fields | st.just("id") | input_fields | observation_fields


@given(st.dictionaries(body_fields, json_values), st.dictionaries(entry_fields, json_values))
def test_parsers_accept_json_or_name_wrong_field(body, entry):
    for parse, field in ((parse_request, "inputs"), (parse_observations, "observations")):
        try:
            parsed = parse(orjson.dumps({**body, field: [entry]}))
        except BadRequest as error:
            assert error.param is not None
            assert error.status in (400, 413)
        except orjson.JSONEncodeError:
            return  # not valid JSON: a lone surrogate, or a number too large
        else:
            assert len(parsed) == 1


async def test_predict_504_when_deadline_passes():
    lifespan, client = make_predictor(shipped_as(Slow))
    async with lifespan, client:
        started = time.monotonic()
        response = await client.post("/v1/predict", json={"inputs": [{"prompt": "a"}]}, headers={"x-deadline-ms": "30"})
        assert response.status_code == 504
        assert time.monotonic() - started < 1.8


async def test_predict_503_with_retry_after_when_queue_is_full():
    lifespan, client = make_predictor(limits=BatchLimits(max_waiting=2))
    async with lifespan, client:
        response = await client.post("/v1/predict", json={"inputs": [{"prompt": "a"}] * 3})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "queue_full"
    assert "--max-waiting" in response.json()["error"]["message"]


async def test_full_disk_does_not_stop_predictions(tmp_path, monkeypatch, caplog):
    collector = Collector(tmp_path, 1 << 20)
    learning = Learning(collector=collector)

    def full() -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collector, "write", full)
    lifespan, client = make_predictor(learning=learning)
    async with lifespan, client:
        learning.work()
        learning.work()
        assert (await client.post("/v1/predict", json={"inputs": [{"prompt": "a"}]})).status_code == 200
        assert "antares_predictor_write_failures_total 2.0" in (await client.get("/metrics")).text
    assert caplog.text.count("No space") == 1


async def test_predict_500_logs_no_prompt(caplog):
    lifespan, client = make_predictor(shipped_as(Broken))
    async with lifespan, client:
        response = await client.post("/v1/predict", json={"inputs": [{"prompt": SECRET}]})
    assert response.status_code == 500
    assert "ValueError" in caplog.text
    assert SECRET not in response.text + caplog.text


async def test_health_and_metrics():
    lifespan, client = make_predictor()
    async with lifespan, client:
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
async def test_unknown_route_error_has_openai_shape(method, path, status):
    lifespan, client = make_predictor()
    async with lifespan, client:
        response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
