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
from predictor_service.serving.collecting import Collector, collected
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


def predictor(model=SHIPPED, limits=None, learning=None, known_models=frozenset()):
    app = create_app(model, limits, learning, known_models)
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
    found = [{p["length"], p["p50"], p["p90"]} for p in answer.json()["predictions"]]
    assert found == [{7.0}, {5000.0}, {3.0}]
    assert len({p["raw_p50"] for p in answer.json()["predictions"][1:]}) == 1, "the raw ones know no bounds"


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


async def test_a_prompt_of_a_megabyte_is_a_413_that_names_it():
    life, client = predictor()
    async with life, client:
        body = {"inputs": [{"prompt": "a"}, {"prompt": "é" * (1 << 20)}]}
        answer = await client.post("/v1/predict", json=body)
        assert answer.status_code == 413
        assert answer.json()["error"]["param"] == "inputs[1].prompt"
        body = {"inputs": [{"prompt": "é" * MAX_PROMPT_CHARS}]}
        assert (await client.post("/v1/predict", json=body)).status_code == 200


async def test_any_well_formed_model_is_predicted_for_unless_the_service_is_told_which():
    body = {"model": "never/heard-of", "inputs": [{"prompt": "hi"}]}
    life, client = predictor()
    async with life, client:
        assert (await client.post("/v1/predict", json=body)).status_code == 200
    life, client = predictor(known_models=frozenset({"mine"}))
    async with life, client:
        answer = await client.post("/v1/predict", json=body)
        assert answer.status_code == 404
        assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == ("model", "model_not_found")
        for named in ({"model": "mine"}, {}):
            answer = await client.post("/v1/predict", json={**named, "inputs": [{"prompt": "hi"}]})
            assert answer.status_code == 200
        answer = await client.post("/v1/observe", json={"observations": [observation(model="other")]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "observations[0].model")


def observation(**fields):
    return {"model": "m", "slo_class": "chat", "raw_p50": 100.0, "raw_p90": 250.0, "tokens": 30, **fields}


async def test_what_finished_corrects_what_is_predicted_next_for_its_model_and_class():
    learning = Learning()
    life, client = predictor(learning=learning)
    question = {"model": "m", "inputs": [{"prompt": "Explain photosynthesis", "slo_class": "chat"}]}
    async with life, client:
        (before,) = (await client.post("/v1/predict", json=question)).json()["predictions"]
        assert (before["p50"], before["p90"]) == (before["raw_p50"], before["raw_p90"])
        raw = {"raw_p50": before["raw_p50"], "raw_p90": before["raw_p90"]}
        finished = [observation(**raw, tokens=max(1, round(before["raw_p50"] / 4))) for _ in range(200)]
        answer = await client.post("/v1/observe", json={"observations": finished})
        assert (answer.status_code, answer.json()) == (202, {"observed": 200})
        learning.work()
        (after,) = (await client.post("/v1/predict", json=question)).json()["predictions"]
        metrics = (await client.get("/metrics")).text
    assert after["p50"] == pytest.approx(before["p50"] / 4, rel=0.1)
    assert after["length"] == after["p50"] <= after["p90"]
    assert after["raw_p50"] == before["raw_p50"], "what is observed next must not be corrected twice"
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
async def test_a_malformed_observation_is_a_400_that_names_the_field_and_nothing_of_it_counts(body, param):
    learning = Learning()
    life, client = predictor(learning=learning)
    async with life, client:
        answer = await client.post("/v1/observe", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert SECRET not in answer.text
    assert learning.calibration.observed == 0


async def test_an_id_joins_a_predictions_features_to_the_length_that_came_of_it(tmp_path):
    learning = Learning(collector=Collector(tmp_path, 1 << 20))
    life, client = predictor(learning=learning)
    async with life, client:
        inputs = [{"prompt": f"Tell me about {SECRET}", "id": "r1"}, {"prompt": "no id, not collected"}]
        await client.post("/v1/predict", json={"inputs": inputs})
        done = [observation(id="r1", tokens=42, censored=True), observation(id="unheard-of"), observation()]
        await client.post("/v1/observe", json={"observations": done})
    (entry,) = collected(tmp_path)
    assert (entry["length"], entry["censored"], entry["model"], entry["slo_class"]) == (42, True, "m", "chat")
    assert entry["features"]["indices"] == prompt_features(f"Tell me about {SECRET}").indices.tolist()


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
    return kind(**{name: getattr(SHIPPED, name) for name in (field.name for field in fields(SHIPPED))})


class ReadsText:
    """A length model that wants the prompts themselves."""

    name, card, reads_text = "reads-text", dict[str, object](), True

    def predict(self, rows):
        return [Prediction(len(row), len(row), 2 * len(row)) for row in rows]


async def test_a_length_model_that_reads_text_is_shown_the_prompt_and_takes_no_features(tmp_path):
    learning = Learning(collector=Collector(tmp_path, 1 << 20))
    life, client = predictor(ReadsText(), learning=learning)
    async with life, client:
        answer = await client.post("/v1/predict", json={"inputs": [{"prompt": "x" * 30, "id": "r1"}]})
        assert answer.json()["predictions"][0]["raw_p50"] == 30
        features = {"inputs": [{"prompt": "a"}, {"features": prompt_features("a").to_wire()}]}
        answer = await client.post("/v1/predict", json=features)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "inputs[1].features")
        await client.post("/v1/observe", json={"observations": [observation(id="r1")]})
    assert len(list(collected(tmp_path))) == 1


scalars = st.none() | st.text(max_size=5) | st.integers() | st.booleans() | st.floats()
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(), scalars, max_size=3)
of_a_body = st.sampled_from(["model", "slo_class"])
of_an_input = st.sampled_from(["prompt", "features", "prompt_tokens", "max_tokens", "min_tokens"])
of_an_observation = st.sampled_from(["raw_p50", "raw_p90", "tokens", "censored"])
of_an_entry = of_a_body | st.just("id") | of_an_input | of_an_observation


@given(st.dictionaries(of_a_body, values), st.dictionaries(of_an_entry, values))
def test_whatever_json_comes_the_answer_is_what_was_read_or_the_field_at_fault(body, entry):
    for parse, field in ((parse_request, "inputs"), (parse_observations, "observations")):
        try:
            read = parse(orjson.dumps({**body, field: [entry]}))
        except BadRequest as wrong:
            assert wrong.param is not None
            assert wrong.status in (400, 413)
        except orjson.JSONEncodeError:
            return  # no JSON: a lone surrogate, or a number too large
        else:
            assert len(read) == 1


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


async def test_a_disk_that_is_full_stops_no_prediction(tmp_path, monkeypatch, caplog):
    learning = Learning(collector=Collector(tmp_path, 1 << 20))

    def full() -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learning._collector, "write", full)
    life, client = predictor(learning=learning)
    async with life, client:
        learning.work()
        learning.work()
        assert (await client.post("/v1/predict", json={"inputs": [{"prompt": "a"}]})).status_code == 200
        assert "antares_predictor_write_failures_total 2.0" in (await client.get("/metrics")).text
    assert caplog.text.count("No space") == 1


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
