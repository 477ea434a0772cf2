"""The Helm chart: rendered by Helm, valid by the schemas of Kubernetes, and consistent with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config.file import load
from gateway.scheduling.shards import Shard
from gateway.serve import CLOSE_S
from tests.fixtures.helm_chart import (
    CHART,
    MONITORED,
    SCALED,
    VALUES_FILES,
    Manifest,
    configuration,
    container_of,
    helm,
    of_kind,
    one,
    pod_of,
    references,
    render,
    rendered,
    values,
)
from tests.fixtures.metric_names import METRIC_NAMES

kubernetes_validate = pytest.importorskip("kubernetes_validate")

KUBERNETES = ("1.27", "1.30", "1.33", "1.37")
"""Versions whose schemas the manifests satisfy: the chart's oldest, and the newest that the validator has."""

CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds that Kubernetes does not know. The models of their operators check them."""

ROOT = Path(__file__).parents[1]


def workloads(file: str) -> list[Manifest]:
    return of_kind(rendered(file), "Deployment")


def selects(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.mark.parametrize("file", VALUES_FILES)
def test_helm_finds_no_fault_in_the_chart(file: str) -> None:
    report = helm.lint(CHART, values(file), strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("file", VALUES_FILES)
def test_manifests_satisfy_the_schemas_of_kubernetes(file: str, version: str) -> None:
    checked = [m for m in rendered(file) if m["kind"] not in CUSTOM]
    for manifest in checked:
        kubernetes_validate.validate(manifest, version, strict=True)
    assert len(checked) >= 11


def test_schemas_of_kubernetes_reject_a_misspelt_field() -> None:
    deployment = render({})[1]
    deployment["spec"]["replcas"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


def parsed(manifest: Manifest) -> dict[str, Any]:
    """Return what the operator's own model keeps of ``manifest``. It drops unknown fields and rejects wrong ones."""
    prometheus_operator = pytest.importorskip("cloudcoil.models.prometheus_operator.v1")
    keda = pytest.importorskip("cloudcoil.models.keda.v1alpha1")
    model = getattr(keda if manifest["kind"] == "ScaledObject" else prometheus_operator, manifest["kind"])
    kept: dict[str, Any] = model.model_validate(manifest).model_dump(by_alias=True, exclude_unset=True, mode="json")
    return kept


@pytest.mark.parametrize("file", ["values-a100.yaml", "values-spot.yaml"])
def test_custom_resources_have_only_fields_that_their_operators_know(file: str) -> None:
    custom = of_kind(rendered(file), *CUSTOM)
    assert len(custom) >= 3
    for manifest in custom:
        assert parsed(manifest) == manifest


def test_custom_resource_with_a_misspelt_field_is_found() -> None:
    monitor = {**of_kind(rendered("values-a100.yaml"), "ServiceMonitor")[0]}
    misspelt = {**monitor, "spec": {**monitor["spec"], "endpoint": []}}
    assert parsed(misspelt) != misspelt


@pytest.mark.parametrize("file", VALUES_FILES)
def test_values_file_replaces_the_engines_of_the_defaults(file: str) -> None:
    names = {m["metadata"]["name"] for m in workloads(file)}
    expected = {engine["name"] for engine in values(file).get("engines", [{"name": "main"}])}
    assert names == {f"prod-{name}" for name in expected | {"gateway", "predictor"}}


BAD_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("gatway", {"gatway": {}}),
    ("replicas", {"gateway": {"replicas": 0}}),
    ("shards", {"gateway": {"shards": 0}}),
    (
        "gateway.shards is 3, but the pool a may have only 2 engines: each shard needs one; raise its replicas",
        {
            "gateway": {"shards": 3},
            "engines": [{"name": "a", "model": "m", "replicas": 2}],
        },
    ),
    (
        "the pool a may have only 1 engines: each shard needs one; raise its autoscaling.min",
        {**MONITORED, "gateway": {"shards": 3}, "engines": [SCALED]},
    ),
    (
        "autoscaling.min of the pool a is 5, above its max of 3",
        {**MONITORED, "engines": [{**SCALED, "autoscaling": {"enabled": True, "min": 5, "max": 3}}]},
    ),
    ("the pools a and b both serve m", {**MONITORED, "engines": [SCALED, {**SCALED, "name": "b"}]}),
    ("the pools a and b both serve m", {**MONITORED, "engines": [{"name": "b", "model": "m"}, SCALED]}),
    ("set monitoring.enabled to true, or autoscaling.kind to keda", {"engines": [SCALED]}),
    ("set keys.anonymous to false", {"gateway": {"service": {"type": "LoadBalancer"}}}),
    ("set keys.anonymous to false", {"gateway": {"service": {"type": "NodePort"}}}),
    ("set keys.anonymous to false", {"networkPolicy": {"enabled": False}}),
    ("set gateway.shards instead", {"gateway": {"config": {"server": {"processes": 2}}}}),
    ("engines", {"engines": []}),
    ("name", {"engines": [{"model": "m"}]}),
    ("name", {"engines": [{"name": "gateway", "model": "m"}]}),
    ("name", {"engines": [{"name": "Main_1", "model": "m"}]}),
    ("kind", {"engines": [{"name": "a", "model": "m", "kind": "sglang"}]}),
    ("kind", {"autoscaling": {"kind": "vpa"}}),
    ("signal", {"autoscaling": {"signal": "queue"}}),
    ("requestsPerSecond", {"engineDefaults": {"autoscaling": {"requestsPerSecond": 0}}}),
    ("max", {"engineDefaults": {"autoscaling": {"max": 1000}}}),
    ("drainSeconds", {"drainSeconds": "2m"}),
    ("config", {"gateway": {"config": {"engines": []}}}),
    *(
        (f"/gateway/config/{section}': got null, want object", {"gateway": {"config": {section: None}}})
        for section in ("predictor", "server", "wanted_replicas")
    ),
    ("every pool of engines needs a model", {"engines": [{"name": "a"}]}),
    ("set keys.secret, keys.file or keys.anonymous", {"keys": {"anonymous": False}}),
]


@pytest.mark.parametrize(("named", "bad"), BAD_VALUES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(BAD_VALUES)])
def test_bad_value_is_rejected_by_name(named: str, bad: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(named)):
        render(bad)


def test_keys_allow_a_service_that_others_reach() -> None:
    given = {"gateway": {"service": {"type": "LoadBalancer"}}, "networkPolicy": {"enabled": False}}
    made = render({**given, "keys": {"anonymous": False, "secret": "s"}})
    assert one(made, "Service", "gateway")["spec"]["type"] == "LoadBalancer"


def test_fixed_pools_may_serve_the_same_model() -> None:
    made = render({"engines": [{"name": "a", "model": "m"}, {"name": "b", "model": "m"}]})
    assert len(configuration(made)["engines"]) == 2


# --- the gateway's configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", VALUES_FILES)
def test_gateway_accepts_its_configuration(file: str, tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text(one(rendered(file), "ConfigMap", "gateway")["data"]["gateway.yaml"])
    key = {"sha256": "0" * 64, "tenant": "a", "operator": True}
    config = load(tmp_path / "gateway.yaml", env={}, keys=[key])
    assert config.cautions() == []
    assert config.operator_key_required == (file in {"values-a100.yaml", "values-spot.yaml"})
    headless = {m["metadata"]["name"] for m in of_kind(rendered(file), "Service") if "clusterIP" in m["spec"]}
    assert {f"http://{name}:8000" for name in headless} == {getattr(e, "base_url", "") for e in config.engines}
    services = {m["metadata"]["name"] for m in of_kind(rendered(file), "Service")}
    assert config.predictor.url == "http://prod-predictor:8101"
    assert "prod-predictor" in services


def test_simulated_engine_accepts_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "engine.yaml").write_text(
        one(rendered("values-dev.yaml"), "ConfigMap", "simulated")["data"]["engine.yaml"]
    )
    assert load(tmp_path / "engine.yaml", env={}).engines[0].kind == "simulated"


@pytest.mark.parametrize("file", VALUES_FILES)
def test_gateway_and_engines_have_the_same_limits(file: str) -> None:
    for engine in configuration(rendered(file))["engines"]:
        deployment = one(rendered(file), "Deployment", engine["name"])
        if "initContainers" in pod_of(deployment):
            given = [f"--{limit.replace('_', '-')}={engine[limit]}" for limit in ("max_num_seqs", "max_model_len")]
            assert {*given, f"--max-num-batched-tokens={engine['max_num_batched_tokens']}"} <= {
                *container_of(deployment)["args"]
            }
        scalers = of_kind(rendered(file), "HorizontalPodAutoscaler", "ScaledObject")
        specs = [m["spec"] for m in scalers if m["metadata"]["name"] == f"prod-{engine['name']}"]
        limits = [spec.get("maxReplicas") or spec["maxReplicaCount"] for spec in specs]
        most = deployment["spec"].get("replicas") or limits[0]
        assert engine["discover"]["max_engines"] >= most


# --- values that reach the workloads ----------------------------------------------------------------------------------


def test_values_reach_the_gateway_and_its_engines() -> None:
    flags = {"tensor-parallel-size": 2, "enable-prefix-caching": False, "speculative-config": {"method": "ngram"}}
    pool = {"name": "a", "model": "m", "flags": flags, "gateway": {"aliases": {"gpt": "m"}}, "apiKey": {"secret": "s"}}
    made = render({"engines": [pool], "gateway": {"config": {"classes": {"batch": None, "fast": {"ttft_ms": 1}}}}})
    args = container_of(one(made, "Deployment", "a"))["args"]
    assert {"--tensor-parallel-size=2", "--no-enable-prefix-caching", '--speculative-config={"method":"ngram"}'} <= {
        *args
    }
    config = configuration(made)
    assert (config["engines"][0]["aliases"], config["engines"][0]["api_key_env"]) == ({"gpt": "m"}, "ENGINE_KEY_A")
    assert [variable["name"] for variable in container_of(one(made, "Deployment", "gateway"))["env"]] == [
        "ENGINE_KEY_A"
    ]
    assert set(config["classes"]) == {"interactive", "chat", "fast"}


def test_changed_configuration_replaces_the_gateway() -> None:
    def checksum(given: dict[str, Any]) -> str:
        annotations = one(render(given), "Deployment", "gateway")["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/config"])

    assert checksum({}) == checksum(MONITORED) != checksum({"drainSeconds": 60})


def test_keys_in_the_values_become_a_secret() -> None:
    made = render({"keys": {"anonymous": False, "file": '{"keys": []}', "operatorKey": "k"}})
    assert one(made, "Secret", "keys")["stringData"] == {"keys.json": '{"keys": []}', "operator-key": "k"}
    assert "prod-keys" in references(one(made, "Deployment", "gateway"), "secretName")


# --- several gateways -------------------------------------------------------------------------------------------------


def sharded(shards: int) -> list[Manifest]:
    pool = {"name": "a", "model": "m", "replicas": 8, "report": {"secret": "r"}}
    return render({"gateway": {"shards": shards}, "engines": [pool]})


def test_each_shard_is_a_deployment_with_its_index(tmp_path: Path) -> None:
    made = sharded(3)
    (tmp_path / "gateway.yaml").write_text(one(made, "ConfigMap", "gateway")["data"]["gateway.yaml"])
    for index in range(3):
        container = container_of(one(made, "Deployment", f"gateway-{index}"))
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert env.keys() == {"REPORT_KEY_A", "ANTARES_SHARD_INDEX", "ANTARES_SHARD_COUNT"}
        variables = {name: value for name, value in env.items() if value is not None}
        assert load(tmp_path / "gateway.yaml", env=variables).shard.shard() == Shard(index, 3)
    with pytest.raises(ValueError, match="unpack"):
        one(made, "Deployment", "gateway")


def test_shards_share_one_service_and_their_pods_are_apart() -> None:
    made = sharded(3)
    pods = [m["spec"]["template"]["metadata"]["labels"] for m in of_kind(made, "Deployment")]
    service = one(made, "Service", "gateway")["spec"]["selector"]
    assert sum(selects(service, labels) for labels in pods) == 3
    for index in range(3):
        deployment = one(made, "Deployment", f"gateway-{index}")
        assert sum(selects(deployment["spec"]["selector"]["matchLabels"], labels) for labels in pods) == 1
        (spread,) = pod_of(deployment)["topologySpreadConstraints"]
        assert sum(selects(spread["labelSelector"]["matchLabels"], labels) for labels in pods) == 3
    (policy,) = [m for m in of_kind(made, "NetworkPolicy") if m["metadata"]["name"] == "prod-gateway"]
    assert sum(selects(policy["spec"]["podSelector"]["matchLabels"], labels) for labels in pods) == 3
    assert one(made, "PodDisruptionBudget", "gateway")["spec"]["maxUnavailable"] == 1


@pytest.mark.parametrize("version", KUBERNETES)
def test_shards_satisfy_the_schemas_of_kubernetes(version: str) -> None:
    for manifest in sharded(2):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_single_shard_is_rendered_as_without_shards() -> None:
    assert sharded(1) == render({"engines": [{"name": "a", "model": "m", "replicas": 8, "report": {"secret": "r"}}]})
    deployment = one(sharded(1), "Deployment", "gateway")
    assert "antares/shard" not in deployment["spec"]["selector"]["matchLabels"]


# --- drains, security, references -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", VALUES_FILES)
def test_pods_are_killed_later_than_their_drain_ends(file: str) -> None:
    for deployment in workloads(file):
        name = deployment["metadata"]["name"]
        if name == "prod-predictor":
            continue
        (command,) = references(container_of(deployment)["lifecycle"]["preStop"], "command")
        assert command[0] == "sleep"
        args = container_of(deployment)["args"]
        drain_s = configuration(rendered(file))["server"]["drain_s"]
        timeouts = [arg for arg in args if arg.startswith("--shutdown-timeout")]
        assert timeouts in ([], [f"--shutdown-timeout={drain_s}"])
        assert pod_of(deployment)["terminationGracePeriodSeconds"] >= int(command[1]) + drain_s + 2 * CLOSE_S


@pytest.mark.parametrize("file", VALUES_FILES)
def test_engines_serve_until_the_gateway_has_noted_that_they_stop(file: str) -> None:
    for engine in configuration(rendered(file))["engines"]:
        (command,) = references(container_of(one(rendered(file), "Deployment", engine["name"]))["lifecycle"], "command")
        assert int(command[1]) > engine["discover"]["every_s"]


@pytest.mark.parametrize("file", VALUES_FILES)
def test_pods_have_no_privileges_and_a_read_only_root(file: str) -> None:
    for deployment in workloads(file):
        pod = pod_of(deployment)
        assert pod["automountServiceAccountToken"] is False
        # A service called `antares` would set ANTARES_PORT in every pod.
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("file", VALUES_FILES)
def test_pods_are_probed_where_the_code_answers(file: str) -> None:
    for deployment in workloads(file):
        container = container_of(deployment)
        gateway = deployment["metadata"]["name"] == "prod-gateway"
        paths = {probe: container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
        assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready" if gateway else "/health"}


@pytest.mark.parametrize("file", VALUES_FILES)
def test_selectors_find_what_they_name(file: str) -> None:
    pods = [m["spec"]["template"] for m in workloads(file)]
    services = of_kind(rendered(file), "Service")

    def found(selector: dict[str, str]) -> list[Manifest]:
        return [pod for pod in pods if selects(selector, pod["metadata"]["labels"])]

    for service in services:
        (pod,) = found(service["spec"]["selector"])
        (port,) = service["spec"]["ports"]
        assert port["targetPort"] in references(pod["spec"]["containers"], "name")
    for budget in of_kind(rendered(file), "PodDisruptionBudget"):
        assert len(found(budget["spec"]["selector"]["matchLabels"])) == 1
    for policy in of_kind(rendered(file), "NetworkPolicy"):
        assert found(policy["spec"]["podSelector"]["matchLabels"])
    for monitor in of_kind(rendered(file), "ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        assert len([s for s in services if selects(labels, s["metadata"]["labels"])]) == 1
    deployments = {m["metadata"]["name"] for m in workloads(file)}
    for scaler in of_kind(rendered(file), "HorizontalPodAutoscaler", "ScaledObject"):
        assert scaler["spec"]["scaleTargetRef"]["name"] in deployments
        assert "replicas" not in one(rendered(file), "Deployment", scaler["metadata"]["name"][5:])["spec"]


@pytest.mark.parametrize("file", VALUES_FILES)
def test_mounts_have_volumes_and_config_maps_exist(file: str) -> None:
    maps = {m["metadata"]["name"] for m in of_kind(rendered(file), "ConfigMap")}
    for deployment in workloads(file):
        pod = pod_of(deployment)
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert {reference["name"] for reference in references(pod["volumes"], "configMap")} <= maps


def test_a100_engines_are_placed_on_a100_nodes() -> None:
    for name, gpus in (("llama-8b", 1), ("gemma-27b", 4)):
        deployment = one(rendered("values-a100.yaml"), "Deployment", name)
        assert "A100" in pod_of(deployment)["nodeSelector"]["nvidia.com/gpu.product"]
        assert pod_of(deployment)["tolerations"][0]["key"] == "nvidia.com/gpu"
        assert container_of(deployment)["resources"]["limits"]["nvidia.com/gpu"] == gpus


def test_engines_are_reached_by_the_gateway_only() -> None:
    policy = one(rendered("values.yaml"), "NetworkPolicy", "engines")
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"]]
    assert {peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in peers} == {"gateway"}


def test_engines_report_to_the_gateway_with_its_key() -> None:
    """Both ends have the port and the key of the pool, and the network policies let the connection through."""
    pools = [{"name": "a-b", "model": "m", "report": {"secret": "s", "key": "k"}}, {"name": "c", "model": "m"}]
    made = render({"engines": pools})
    reporting, silent = configuration(made)["engines"]
    port = reporting["report"]["port"]
    assert "report" not in silent
    engine, gateway = container_of(one(made, "Deployment", "a-b")), container_of(one(made, "Deployment", "gateway"))
    variables = {each["name"]: each for each in engine["env"]}
    assert variables["ANTARES_REPORT_ADDRESS"]["value"] == f"0.0.0.0:{port}"
    assert {"name": "reports", "containerPort": port} in engine["ports"]
    keys = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in gateway["env"]}
    assert keys == {reporting["report"]["key_env"]: {"name": "s", "key": "k"}}
    assert variables["ANTARES_REPORT_KEY"]["valueFrom"]["secretKeyRef"] == {"name": "s", "key": "k"}
    other = container_of(one(made, "Deployment", "c"))
    assert not any("REPORT" in each["name"] for each in other["env"])
    into = [r["port"] for rule in one(made, "NetworkPolicy", "engines")["spec"]["ingress"] for r in rule["ports"]]
    out = [r["port"] for rule in one(made, "NetworkPolicy", "gateway")["spec"]["egress"] for r in rule["ports"]]
    assert port in into
    assert port in out


def test_queries_use_metrics_of_the_gateway() -> None:
    recorded = {rule for file in VALUES_FILES for rule in references(rendered(file), "record")}
    queries = [q for file in VALUES_FILES for key in ("expr", "query") for q in references(rendered(file), key)]
    assert len(queries) >= 4
    used = {name for query in queries for name in re.findall(r"\bantares_\w+", query)}
    assert used <= METRIC_NAMES
    for scaler in of_kind(rendered("values-a100.yaml"), "HorizontalPodAutoscaler"):
        (metric,) = scaler["spec"]["metrics"]
        assert metric["external"]["metric"]["name"] in recorded


def test_chart_version_is_that_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{chart["appVersion"]}"' in project
