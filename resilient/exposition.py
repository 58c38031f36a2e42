"""A run's metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from .core.chronicle import RECOVERY_KINDS
from .core.figures import BUCKETS_S, PHASES
from .metrics import METRICS, Metric, Seen

Values = tuple[tuple[tuple[str, ...], Any], ...]
"""Of one metric: the values of its labels, and what it stands at; of a histogram counts by bucket, and the sum."""


class RunCollector(Collector):
    """seen: takes the run's figures, consistent with each other; it is asked at each scrape."""

    def __init__(self, seen: Callable[[], Seen]) -> None:
        self._seen = seen
        self._texts: dict[str, tuple[Values, bytes]] = {}
        """By metric, what it stood at when it was last spelled."""

    def describe(self) -> Iterable[Family]:
        return ()

    def collect(self) -> Iterator[Family]:
        seen = self._seen()
        for metric in METRICS:
            yield _family(metric, _values(metric, seen))

    def text(self) -> bytes:
        """What `generate_latest` makes of it. A metric that stands as it did is not spelled again: nearly all lines are
        of recoveries, which are rare. By one thread at a time."""
        seen = self._seen()
        return b"".join(self._text(metric, _values(metric, seen)) for metric in METRICS)

    def _text(self, metric: Metric, values: Values) -> bytes:
        former, text = self._texts.get(metric.name, (None, b""))
        if former != values:
            text = generate_latest(_Alone(_family(metric, values)))
            self._texts[metric.name] = values, text
        return text


class _Alone(Collector):
    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterator[Family]:
        yield self._family


def _values(metric: Metric, seen: Seen) -> Values:
    run = str(seen.look["run"])
    if metric.kind == "histogram":
        return tuple(((run, kind, phase), _counted(kind, phase, seen)) for kind in RECOVERY_KINDS for phase in PHASES)
    return tuple(((run, *labels), value) for labels, value in metric.samples(seen))


def _counted(kind: str, phase: str, seen: Seen) -> tuple[tuple[int, ...], float]:
    found = seen.figures.recoveries.get(kind, {}).get(phase)
    return ((0,) * (len(BUCKETS_S) + 1), 0.0) if found is None else (tuple(found.counts), found.sum_s)


def _family(metric: Metric, values: Values) -> Family:
    labels = ("run", *metric.labels)
    if metric.kind == "histogram":
        found = HistogramMetricFamily(metric.name, metric.about, labels=labels)
        for labelled, (counts, sum_s) in values:
            found.add_metric(labelled, _buckets(counts), sum_s)
        return found
    kinds: dict[str, type[CounterMetricFamily | GaugeMetricFamily]]
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    family: Any = kinds[metric.kind](metric.name, metric.about, labels=labels)
    for labelled, value in values:
        family.add_metric(labelled, value)
    found_family: Family = family
    return found_family


def _buckets(counts: tuple[int, ...]) -> list[tuple[str, float]]:
    """Each with all that took no longer."""
    ends, total, found = (*map(str, BUCKETS_S), "+Inf"), 0, []
    for end, count in zip(ends, counts, strict=True):
        total += count
        found.append((end, float(total)))
    return found
