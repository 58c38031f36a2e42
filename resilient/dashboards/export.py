"""Writes all of it into a folder, laid out as Prometheus, Grafana, docker compose and kubectl want it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .grafana import dashboard
from .kubernetes import dashboard_config_map, in_yaml, pod_monitor, prometheus_rule

MADE = "# Made by `resilient dashboards export`.\n"


def own(name: str) -> str:
    """A file that stands beside this one."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def documents() -> dict[str, str]:
    """What is written, by path."""
    rules = own("rules.yaml")
    return {
        "compose.yaml": own("compose.yaml"),
        "prometheus/prometheus.yaml": own("prometheus.yaml"),
        "prometheus/rules.yaml": rules,
        "grafana/resilient.json": dashboard(),
        "grafana/datasource.yaml": own("datasource.yaml"),
        "grafana/provider.yaml": own("provider.yaml"),
        "kubernetes/prometheusrule.yaml": MADE + in_yaml(prometheus_rule(rules)),
        "kubernetes/podmonitor.yaml": MADE + in_yaml(pod_monitor()),
        "kubernetes/dashboard.yaml": MADE + in_yaml(dashboard_config_map(dashboard())),
    }


def export(folder: Path) -> list[Path]:
    """The paths that were written. What an earlier export has left there is replaced; other files stay."""
    written = []
    for name, text in sorted(documents().items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written
