"""The same for the Prometheus operator and a Grafana in Kubernetes: PrometheusRule, PodMonitor, ConfigMap."""

from __future__ import annotations

from typing import Any

import yaml

PORT_NAME = "resilient"
"""Of the head pod's port that the controller serves metrics at."""
LABELS = {"app.kubernetes.io/name": "resilient", "app.kubernetes.io/component": "monitoring"}


class Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML ships no types
    """Writes texts of several lines as blocks, as people do."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _text)


def in_yaml(document: dict[str, Any]) -> str:
    """Keys stay in their order."""
    text: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, width=110, allow_unicode=True)
    return text


def prometheus_rule(rules: str) -> dict[str, Any]:
    """rules: a Prometheus' own rules file."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "resilient", "labels": LABELS},
        "spec": yaml.safe_load(rules),
    }


def dashboard_config_map(dashboard: str) -> dict[str, Any]:
    """For the sidecar of Grafana's chart, which looks for this label."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "resilient-dashboard", "labels": {**LABELS, "grafana_dashboard": "1"}},
        "data": {"resilient.json": dashboard},
    }


def pod_monitor() -> dict[str, Any]:
    """Head pods of all RayClusters in the namespace that have the port."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "resilient", "labels": LABELS},
        "spec": {
            "selector": {"matchLabels": {"ray.io/node-type": "head"}},
            "podMetricsEndpoints": [
                {
                    "port": PORT_NAME,
                    "path": "/metrics",
                    "interval": "5s",
                    "relabelings": [
                        {"action": "replace", "targetLabel": "job", "replacement": "resilient"},
                        {
                            "action": "replace",
                            "sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"],
                            "targetLabel": "ray_cluster",
                        },
                    ],
                }
            ],
        },
    }
