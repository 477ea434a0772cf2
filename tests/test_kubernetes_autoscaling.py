"""The Helm chart's autoscaling: its rules and queries, and what the gateway and Prometheus contribute."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from engine_adapter.step_time.profile import load_profile
from gateway.config.file import load
from tests.fixtures import helm_chart, prometheus
from tests.fixtures.helm_chart import (
    CHART,
    MONITORED,
    NAMESPACE,
    RELEASE,
    SCALED,
    configuration,
    of_kind,
    one,
    render,
    rendered,
    values,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_pools_scale_by_the_replicas_that_the_gateway_wants(kind: str, tmp_path: Path) -> None:
    made = render({"engines": [SCALED], "autoscaling": {"kind": kind, "signal": "wanted"}, **MONITORED})
    (rule,) = of_kind(made, "PrometheusRule")[0]["spec"]["groups"][0]["rules"]
    if kind == "keda":
        (trigger,) = one(made, "ScaledObject", "a")["spec"]["triggers"]
        assert trigger["metadata"]["query"] == rule["expr"]
        each = trigger["metadata"]["threshold"]
    else:
        (metric,) = one(made, "HorizontalPodAutoscaler", "a")["spec"]["metrics"]
        assert metric["external"]["metric"]["name"] == rule["record"] == "antares_pool_wanted_replicas"
        each = metric["external"]["target"]["averageValue"]
    assert str(each) == "1"
    assert f"- seriesQuery: '{rule['record']}{{namespace" in (ROOT / "docs" / "kubernetes.md").read_text()
    assert configuration(made)["wanted_replicas"] == {"enabled": True}
    (tmp_path / "gateway.yaml").write_text(one(made, "ConfigMap", "gateway")["data"]["gateway.yaml"])
    assert load(tmp_path / "gateway.yaml", env={}).wanted_replicas.enabled


def test_gateway_may_want_as_many_replicas_as_the_largest_pool_has(tmp_path: Path) -> None:
    pools = [{**SCALED, "name": n, "model": n, "servedModelName": n} for n in ("a", "b", "c")]
    for pool, most in zip(pools, (70, 128, 8), strict=True):
        pool["autoscaling"] = {"enabled": True, "max": most}
    given = {"engines": pools, "autoscaling": {"signal": "wanted"}, **MONITORED}
    made = render(given)
    assert configuration(made)["wanted_replicas"] == {"enabled": True, "max_replicas": 128}
    (tmp_path / "gateway.yaml").write_text(one(made, "ConfigMap", "gateway")["data"]["gateway.yaml"])
    assert load(tmp_path / "gateway.yaml", env={}).wanted_replicas.max_replicas == 128
    chosen = {"gateway": {"config": {"wanted_replicas": {"max_replicas": 90}}}}
    assert configuration(render(given | chosen))["wanted_replicas"]["max_replicas"] == 90


@pytest.mark.parametrize("signal", ["rate", "wanted"])
def test_keda_keeps_the_pool_while_prometheus_returns_nothing(signal: str) -> None:
    """KEDA reads an empty result as 0 by default. A failed query without ``fallback`` leaves the pool as it is."""
    made = render({"engines": [SCALED], "autoscaling": {"kind": "keda", "signal": signal}})
    spec = one(made, "ScaledObject", "a")["spec"]
    assert [trigger["metadata"]["ignoreNullValues"] for trigger in spec["triggers"]] == ["false"]
    assert "fallback" not in spec


SCRAPES = "1+0x40"
"""The value 1 in each scrape of promtool's test."""

SIGNALS: list[tuple[str, str, dict[str, str], float | None]] = [
    ("rate", "no gateway is known", {}, None),
    ("rate", "no gateway is scraped", {'up{GATEWAY,instance="x"}': "0x40"}, None),
    ("rate", "another release is scraped", {'up{namespace="llm",job="other-gateway"}': SCRAPES}, None),
    ("rate", "no traffic", {'up{GATEWAY,instance="x"}': SCRAPES}, 0),
    (
        "rate",
        "two gateways, one of which is down",
        {
            'up{GATEWAY,instance="x"}': SCRAPES,
            'up{GATEWAY,instance="y"}': "0x40",
            'antares_requests_total{GATEWAY,instance="x",model="m",outcome="finished"}': "0+30x40",
            'antares_requests_total{GATEWAY,instance="x",model="m",outcome="rejected"}': "0+15x40",
            'antares_requests_total{GATEWAY,instance="x",model="other"}': "0+900x40",
        },
        3,
    ),
    ("wanted", "no gateway is known", {}, None),
    ("wanted", "no gateway has a number", {'up{GATEWAY,instance="x"}': SCRAPES}, None),
    (
        "wanted",
        "one of two gateways has a number",
        {
            'up{GATEWAY,instance="x"}': SCRAPES,
            'up{GATEWAY,instance="y"}': SCRAPES,
            'antares_wanted_replicas{GATEWAY,instance="x",model="m"}': "3+0x40",
            'antares_wanted_replicas{GATEWAY,instance="y",model="other"}': "3+0x40",
        },
        None,
    ),
    (
        "wanted",
        "both gateways have a number",
        {
            'up{GATEWAY,instance="x"}': SCRAPES,
            'up{GATEWAY,instance="y"}': SCRAPES,
            'up{GATEWAY,instance="gone"}': "0x40",
            'antares_wanted_replicas{GATEWAY,instance="x",model="m"}': "3+0x40",
            'antares_wanted_replicas{GATEWAY,instance="y",model="m"}': "2+0x40",
        },
        5,
    ),
]
"""Signal, case, series that Prometheus has every 15 s, and the value that the autoscaler gets: None for no data."""


@pytest.mark.parametrize(("signal", "case", "series", "value"), SIGNALS, ids=[f"{s}-{c}" for s, c, _, _ in SIGNALS])
def test_signal_is_known_only_if_the_gateways_are_scraped(
    signal: str, case: str, series: dict[str, str], value: float | None, tmp_path: Path
) -> None:
    rule = of_kind(render({"engines": [SCALED], "autoscaling": {"signal": signal}, **MONITORED}), "PrometheusRule")[0]
    record = rule["spec"]["groups"][0]["rules"][0]["record"]
    labels = f'{{namespace="{NAMESPACE}",release="{RELEASE}",pool="a"}}'
    samples = [] if value is None else [{"labels": record + labels, "value": value}]
    gateway = f'namespace="{NAMESPACE}",job="{RELEASE}-gateway"'
    inputs = [{"series": name.replace("GATEWAY", gateway), "values": values} for name, values in series.items()]
    check = {"expr": record, "eval_time": "9m", "exp_samples": samples}
    test = {"interval": "15s", "input_series": inputs, "promql_expr_test": [check]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule["spec"]))
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "tests": [test]}))
    done = prometheus.promtool("test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_upgrade_keeps_the_engines_that_the_autoscaler_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Helm's library has no cluster, so the template gets the live Deployment in the place of `lookup`."""
    found = 'lookup "apps/v1" "Deployment" $.Release.Namespace $name'
    chart = tmp_path / "antares"
    shutil.copytree(CHART, chart)
    template = (chart / "templates" / "engines.yaml").read_text()
    assert template.count(found) == 1
    (chart / "templates" / "engines.yaml").write_text(template.replace(found, 'dict "spec" (dict "replicas" 6)'))
    given = {"engines": [SCALED, {"name": "fixed", "model": "other", "replicas": 2}], **MONITORED}
    assert "replicas" not in one(render(given), "Deployment", "a")["spec"]
    monkeypatch.setattr(helm_chart, "CHART", chart)
    made = render(given)
    assert one(made, "Deployment", "a")["spec"]["replicas"] == 6
    assert one(made, "Deployment", "fixed")["spec"]["replicas"] == 2


def test_gateway_may_take_as_long_to_start_as_the_slowest_engine() -> None:
    pools = [{"name": n, "model": n, "startupSeconds": s} for n, s in (("a", 60), ("b", 3000), ("c", 300))]
    made = render({"engines": pools})
    assert one(made, "Deployment", "gateway")["spec"]["progressDeadlineSeconds"] == 3600
    assert one(made, "Deployment", "b")["spec"]["progressDeadlineSeconds"] == 3600


def test_prometheus_scrapes_every_vllm_engine_that_it_may_reach() -> None:
    monitors = {m["metadata"]["name"] for m in of_kind(rendered("values-a100.yaml"), "ServiceMonitor")}
    assert monitors == {"prod-gateway", "prod-predictor", "prod-llama-8b", "prod-gemma-27b"}
    silent = of_kind(render({**values("values-dev.yaml"), **MONITORED}), "ServiceMonitor")
    assert {m["metadata"]["name"] for m in silent} == {"prod-gateway", "prod-predictor"}


@pytest.mark.parametrize(
    ("file", "model", "profile"),
    [
        ("deploy/kubernetes/antares/values-a100.yaml", "llama-3.1-8b", "a100-llama3.1-8b"),
        ("deploy/kubernetes/antares/values-a100.yaml", "gemma-2-27b", "a100x4-gemma2-27b"),
        ("configs/a100-llama31-8b.yaml", "llama-3.1-8b-instruct", "a100-llama3.1-8b"),
        ("configs/a100x4-gemma2-27b.yaml", "gemma-2-27b-it", "a100x4-gemma2-27b"),
    ],
)
def test_step_times_of_a_file_are_those_of_its_profile(file: str, model: str, profile: str) -> None:
    engines = yaml.safe_load((ROOT / file).read_text())["engines"]
    (engine,) = [e for e in engines if model in (e.get("servedModelName"), e.get("served_model_name"))]
    given = engine.get("step_times") or engine["gateway"]["step_times"]
    fitted = asdict(load_profile(profile).step_times())
    assert given == pytest.approx({name: fitted[name] for name in given}, rel=0.005)
    assert given.keys() == {name for name, value in fitted.items() if value}
