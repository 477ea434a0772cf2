"""The documentation agrees with the repository: links, commands, paths, configuration keys and metric names."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from gateway.api.body_fields import GUARDED_FIELDS
from gateway.config import engines, keys, observability, policies, server, shard
from gateway.observability.state_metrics import METRIC_ALIASES
from gateway.policies.registry import OPTION_ALIASES, POLICIES
from tests.fixtures.docs_checkers import (
    CHECKERS,
    ROOT,
    Checker,
    broken_commands,
    broken_links,
    missing_modules,
    missing_paths,
    unknown_metrics,
    wrong_configuration,
)

SKIPPED_FOLDERS = {"build", "dist", "node_modules"}
PAGES = sorted(
    page
    for page in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in SKIPPED_FOLDERS for part in page.relative_to(ROOT).parts)
)
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

SECTIONS: dict[str, type[BaseModel]] = {
    "server": server.ServerConfig,
    "limits": server.LimitsConfig,
    "cors": server.CorsConfig,
    "body_fields": server.BodyFieldsConfig,
    "kind: vllm": engines.VllmEngineConfig,
    "kind: http": engines.HttpEngineConfig,
    "report": engines.ReportConfig,
    "discover": engines.DiscoverConfig,
    "kind: simulated": engines.SimulatedEngineConfig,
    "step_times": engines.StepTimesConfig,
    "shard": shard.ShardConfig,
    "failover": engines.FailoverConfig,
    "predictor": engines.PredictorConfig,
    "SLO classes": policies.SloClassConfig,
    "API keys": keys.KeyConfig,
    "Policies": policies.PolicyConfig,
    "Routing": policies.RoutingConfig,
    "Shadow policies": policies.ShadowConfig,
    "logging": observability.LoggingConfig,
    "wanted_replicas": observability.WantedReplicasConfig,
    "decisions": observability.DecisionsConfig,
    "recording": observability.RecordingConfig,
    "tracing": observability.TracingConfig,
}
"""Heading in docs/configuration.md to the model whose keys its first table lists."""

BAD_SAMPLES: list[tuple[Checker, str, str]] = [
    (broken_links, "[a](docs/absent.md)", "no such file"),
    (broken_links, "[a](README.md#absent)", "no such heading"),
    (broken_links, "[a](../outside.md)", "no such file"),
    (broken_links, "[schema.py](gateway/cli.py)", "its text says schema.py"),
    (broken_commands, "```\nantares serve --config x --fast\n```", "no option --fast"),
    (broken_commands, "```\n$ antares simulate --hold 0.9 \\\n  --speed-of-light 1\n```", "no option --speed-of-light"),
    (broken_commands, "`antares predictor train --dataset x`", "no option --dataset"),
    (broken_commands, "`antares paint`", "no subcommand 'paint'"),
    (broken_commands, "`antares config verify x`", "no subcommand 'verify'"),
    (broken_commands, "    antares bench --fast", "no option --fast"),
    (broken_commands, "`python -m benchmarks.absent`", "no such module"),
    (broken_commands, "`python -m benchmarks.policies.table --fast`", "no option --fast"),
    (broken_commands, "`python -m engine_adapter.vllm.smollm2 --fast`", "no option --fast"),
    (broken_commands, "`python deploy/absent.py`", "does not exist"),
    (broken_commands, "`bash benchmarks/gpu.sh --fast`", "no option --fast"),
    (broken_commands, "`antares serve\n--fast`", "no option --fast"),
    (broken_commands, "```\nmake coffee\n```", "no such target"),
    (missing_paths, "`gateway/absent.py`", "does not exist"),
    (missing_paths, "`configs/{remote,absent}.yaml`", "configs/absent.yaml does not exist"),
    (missing_paths, "```\nantares serve --config configs/absent.yaml\n```", "does not exist"),
    (missing_modules, "`gateway.absent.thing`", "not in gateway/__init__.py"),
    (missing_modules, "`gateway.policies.base.Absent`", "not in gateway/policies/base.py"),
    (wrong_configuration, "```yaml\nsever: {port: 1}\n```", "Extra inputs"),
    (wrong_configuration, "```yaml\nserver: {prot: 1}\n```", "Extra inputs"),
    (wrong_configuration, "`policy: {name: best}`", "no policy is called"),
    (wrong_configuration, "```yaml\npolicy: {name: slack, options: {thrift: 1}}\n```", "is now 'cost_weight'"),
    (wrong_configuration, "`server.prot`", "not in the schema"),
    (unknown_metrics, "`antares_absent_total{class}`", "unknown"),
]


@pytest.mark.parametrize(
    ("checker", "text", "problem"), BAD_SAMPLES, ids=lambda value: getattr(value, "__name__", None)
)
def test_checker_reports_bad_sample(checker: Checker, text: str, problem: str) -> None:
    problems = checker(ROOT / "sample.md", text)
    assert len(problems) == 1
    assert problem in problems[0]


def test_checkers_accept_good_sample() -> None:
    text = """
    [heading](README.md#run-it) [file](docs/api.md) [web](https://example.org/x#y)

    `antares predictor train --output DIR [--data FILE]`, `make test PYTEST_ARGS="-k x"`, `gateway/policies/`,
    `configs/*.yaml`, `gateway.policies.base.Policy`, `server.drain_s`, `policy: {name: s3}`,
    `antares_ttft_seconds_bucket`, `antares_tpot_ms`, `python -m benchmarks.figures --only capacity`
    """
    text = "\n".join(line.strip() for line in text.splitlines())
    assert [problem for checker in CHECKERS for problem in checker(ROOT / "sample.md", text)] == []


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_agrees_with_repository(page: Path, checker: Checker) -> None:
    assert checker(page, page.read_text(encoding="utf-8")) == []


def table_below(heading: str, text: str, header: str = "key") -> list[list[str]]:
    """Cells of the first table below ``heading`` whose first column is called ``header``."""
    section = re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    table = section[section.index(f"| {header} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]


def as_documented(value: Any) -> str:
    """A default as the tables write it."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, BaseModel):
        return "`{}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


@pytest.mark.parametrize("heading", SECTIONS)
def test_configuration_page_lists_keys_and_defaults(heading: str) -> None:
    documented = {row[0].strip("`"): row[2] for row in table_below(heading, CONFIGURATION)}
    fields = SECTIONS[heading].model_fields
    defaults = {
        name: "-" if field.is_required() else as_documented(field.get_default(call_default_factory=True))
        for name, field in fields.items()
    }
    assert documented == defaults


def test_configuration_page_lists_guarded_fields() -> None:
    rows = table_below("body_fields", CONFIGURATION, "guarded fields")
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == GUARDED_FIELDS


def test_configuration_page_lists_policies_and_options() -> None:
    rows = table_below("Policies", CONFIGURATION, "option")
    documented = {(policy, row[0].strip("`"), row[2]) for row in rows for policy in re.findall(r"`(\w+)`", row[1])}
    expected = {
        (policy, field.name, as_documented(field.default))
        for policy, (kind, fixed) in POLICIES.items()
        for field in dataclasses.fields(kind)
        if field.init and field.name not in {"name", "gate", *fixed}
    }
    assert documented == expected
    names = {
        name for row in table_below("Policies", CONFIGURATION, "policy") for name in re.findall(r"`(\w+)`", row[0])
    }
    assert names == set(POLICIES)


def test_renamed_names_are_documented() -> None:
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for heading, page, aliases in (
        ("Renamed options", CONFIGURATION, OPTION_ALIASES),
        ("Renamed metrics", operations, METRIC_ALIASES),
    ):
        assert {row[0].strip("`"): row[1].strip("`") for row in table_below(heading, page, "old")} == aliases
