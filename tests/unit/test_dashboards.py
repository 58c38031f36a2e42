"""Rules and dashboard name what there is, are complete, and lie in deploy/ as they are written out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from resilient.cli import main
from resilient.core.chronicle import PLANNED_KINDS, RECOVERY_KINDS
from resilient.core.figures import FAILURE_KINDS, PHASES
from resilient.core.spent import STATES
from resilient.dashboards.export import documents, own
from resilient.dashboards.grafana import dashboard
from resilient.dashboards.panels import ROWS, queries
from resilient.metrics import METRICS

ROOT = Path(__file__).parents[2]
GROUPS = yaml.safe_load(own("rules.yaml"))["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
ALERTS = sorted({rule["alert"] for rule in RULES if "alert" in rule})

SERIES = {
    name
    for metric in METRICS
    for name in (
        [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
        if metric.kind == "histogram"
        else [metric.name]
    )
}
VALUES = {
    "state": {*STATES, "in use", "leaving"},
    "kind": {*RECOVERY_KINDS, *FAILURE_KINDS},
    "phase": set(PHASES),
    "bound": {"min", "max"},
}


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression."""
    yield from ((rule.get("record") or rule["alert"], rule["expr"]) for rule in RULES)
    yield from ((title, query.expression) for title, query in queries())
    yield "annotation", json.loads(dashboard())["annotations"]["list"][0]["expr"]
    yield "variable", json.loads(dashboard())["templating"]["list"][1]["query"]["query"]


@pytest.mark.parametrize(("where", "expression"), [*expressions()])
def test_expressions_name_what_there_is(where: str, expression: str) -> None:
    assert set(re.findall(r"\bresilient_\w+", expression)) <= SERIES
    assert set(re.findall(r"\bresilient:[\w:]+", expression)) <= RECORDED
    for label, values in re.findall(r'(\w+)(?:=|!=|=~|!~)"([^"]*)"', expression):
        if label != "run":
            assert set(values.split("|")) <= VALUES[label], f"{label} in {where}"


def test_recoveries_that_were_planned_are_left_out_everywhere() -> None:
    left_out = {found for _, text in expressions() for found in re.findall(r'kind!~"([^"]*)"', text)}
    assert left_out == {"|".join(PLANNED_KINDS)}


def test_every_metric_is_described() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert [metric.name for metric in METRICS if f"| `{metric.name}` |" not in page] == []


# Alerts


@pytest.mark.parametrize("rule", [rule for rule in RULES if "alert" in rule], ids=lambda rule: rule["alert"])
def test_an_alert_says_for_which_run_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert "{{ $labels.run }}" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > len(rule["annotations"]["summary"])


def test_every_alert_has_a_section_about_what_to_do() -> None:
    page = (ROOT / "docs" / "alerts.md").read_text()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == [
        *dict.fromkeys(rule["alert"] for rule in RULES if "alert" in rule)
    ]


def test_every_rule_has_its_tests() -> None:
    """Alerts fire in some, and do not in others; `make test-long` runs them."""
    files = sorted((ROOT / "tests" / "rules").glob("*.yaml"))
    tests = [
        test
        for path in files
        for each in yaml.safe_load(path.read_text())["tests"]
        for test in each["promql_expr_test"]
    ]
    for name in RECORDED:
        assert any(name in test["expr"] and test["exp_samples"] for test in tests), name
    for name in ALERTS:
        fires = {bool(test["exp_samples"]) for test in tests if f'"{name}"' in test["expr"]}
        assert fires == {True, False}, name


# The dashboard


def test_the_dashboard_has_its_rows() -> None:
    assert [row.title for row in ROWS] == ["Goodput", "Recoveries", "Snapshots", "Durability", "Ranks"]
    panels = json.loads(dashboard())["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [row.title for row in ROWS]


def test_panels_have_numbers_and_places_of_their_own() -> None:
    panels = json.loads(dashboard())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def test_panels_show_the_runs_that_are_chosen() -> None:
    for panel in json.loads(dashboard())["panels"]:
        for target in panel.get("targets", []):
            assert 'run=~"$run"' in target["expr"] or target["expr"] == "resilient:ettr:goal", panel["title"]
            assert target["datasource"]["uid"] == "${datasource}"


def test_queries_are_as_grafana_asks_them() -> None:
    asked = [query.expression for _, query in queries("gpt", "2m")]
    assert not any("$" in expression for expression in asked)
    assert any('run=~"gpt"' in expression and "[2m]" in expression for expression in asked)


# What is written out


def test_deploy_is_what_the_command_writes(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["dashboards", "export", str(tmp_path / "new"), "--json"])
    assert done.exit_code == 0, done.output
    files = {Path(path).relative_to(tmp_path / "new") for path in json.loads(done.output)["files"]}
    assert files == set(map(Path, documents()))
    for name in sorted(files):
        written = (tmp_path / "new" / name).read_text()
        assert (ROOT / "deploy" / name).read_text() == written, f"resilient dashboards export deploy ({name})"


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "kubernetes").mkdir()
    (tmp_path / "kubernetes" / "mine.yaml").write_text("a: 1\n")
    for _ in range(2):
        assert CliRunner().invoke(main, ["dashboards", "export", str(tmp_path)]).exit_code == 0
    assert (tmp_path / "kubernetes" / "mine.yaml").read_text() == "a: 1\n"


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "prometheus").write_text("")
    done = CliRunner().invoke(main, ["dashboards", "export", str(tmp_path)])
    assert done.exit_code == 1 and "prometheus" in done.output
