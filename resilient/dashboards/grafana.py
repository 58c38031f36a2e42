"""The dashboard as Grafana takes it, made of `panels.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from .panel import Panel, Query, Row
from .panels import ROWS

UID = "resilient"
SCHEMA_VERSION = 39
"""Of dashboards, of Grafana 11; later versions bring it up to date by themselves."""
ROW_WIDTH, PANEL_HEIGHT = 24, 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> str:
    """JSON, for a file that Grafana is provisioned with, or its import page."""
    document = {
        "uid": UID,
        "title": "resilient",
        "description": "Training runs: what their time is spent on, what failed, and what it cost.",
        "tags": ["resilient", "training"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "graphTooltip": 1,  # one cross-hair through all panels: what happened together is seen together
        "templating": {"list": _variables()},
        "annotations": {"list": [_annotation()]},
        "panels": list(_panels(ROWS)),
    }
    return json.dumps(document, indent=2) + "\n"


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": "label_values(resilient_run_info, run)", "refId": "run"},
            "refresh": 2,  # whenever the time range changes
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
        },
    ]


def _annotation() -> dict[str, Any]:
    return {
        "name": "New generation",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": 'changes(resilient_generation{run=~"$run"}[1m]) > 0',
        "step": "30s",
        "titleFormat": "{{run}}: the ranks have changed",
    }


def _panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """From left to right and downwards, each row under a heading of its own."""
    numbers, y = count(1), 0
    for row in rows:
        yield _heading(row, next(numbers), y)
        x, y = 0, y + 1
        for panel in row.panels:
            if x + panel.width > ROW_WIDTH:
                x, y = 0, y + PANEL_HEIGHT
            yield _panel(panel, next(numbers), x, y)
            x += panel.width
        y += PANEL_HEIGHT


def _heading(row: Row, number: int, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": ROW_WIDTH, "h": 1}
    return {"id": number, "type": "row", "title": row.title, "collapsed": False, "gridPos": place, "panels": []}


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": PANEL_HEIGHT},
        "targets": [_target(query, chr(ord("A") + place)) for place, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": {"unit": panel.unit, **_drawn(panel)}, "overrides": []},
        "options": _options(panel),
    }


def _target(query: Query, name: str) -> dict[str, Any]:
    return {"refId": name, "datasource": SOURCE, "expr": query.expression, "legendFormat": query.legend}


def _drawn(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"color": {"mode": "fixed", "fixedColor": "text"}}
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    return {
        "min": 0,
        "custom": {"stacking": stacking, "fillOpacity": 40 if panel.stacked else 0, "showPoints": "never"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}, "textMode": "value_and_name"}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
