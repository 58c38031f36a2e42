"""What a panel of the dashboard is, and the usual ways to ask for a metric.

`$run` stands for the names of the runs that are chosen, as a regular expression; `$__rate_interval` for a time that
covers a few scrapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RUN = 'run=~"$run"'
UNPLANNED = 'kind!~"joined|drained|dealt anew"'
"""As in rules.yaml."""

Need = Literal["", "pipeline", "checkpoint", "failure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    expression: str
    """PromQL."""
    legend: str = "{{run}}"
    needs: Need = ""
    """Without which of these in the run there is nothing to see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    about: str
    queries: tuple[Query, ...]
    unit: str = "short"
    """As Grafana calls it."""
    kind: Literal["timeseries", "stat"] = "timeseries"
    stacked: bool = False
    width: int = 8
    """Of the row's 24."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def gauge(name: str, legend: str = "{{run}}", needs: Need = "") -> Query:
    return Query(expression=f"{name}{{{RUN}}}", legend=legend, needs=needs)


def per_second(name: str, legend: str = "{{run}}", *, by: str = "run") -> Query:
    return Query(expression=f"sum by ({by}) (rate({name}{{{RUN}}}[$__rate_interval]))", legend=legend)


def counted(name: str, legend: str, *, by: str = "run") -> Query:
    """In the last five minutes."""
    return Query(expression=f"sum by ({by}) (increase({name}{{{RUN}}}[5m]))", legend=legend)
