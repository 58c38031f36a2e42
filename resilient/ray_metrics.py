"""The run's metrics once more among Ray's own, as `ray_resilient_...`, for clusters where only those are scraped.

Off by default: they come seconds late, all as gauges, as Ray sets the kind by itself; histograms only as sum and count.
What has a label for ranks is left out, as Ray goes on showing what is no longer there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import Metric as Family

from .exposition import RunCollector
from .metrics import Seen

EVERY_S = 5.0

log = logging.getLogger("resilient.ray_metrics")


class RayMetrics:
    """Once begun it goes on as long as the process."""

    def __init__(self, seen: Callable[[], Seen], gauge: Callable[..., Any]) -> None:
        """gauge: ray.util.metrics.Gauge."""
        self._collector, self._gauge = RunCollector(seen), gauge
        self._gauges: dict[str, Any] = {}

    def begin(self) -> None:
        threading.Thread(target=self._loop, name="ray metrics", daemon=True).start()

    def set_all(self) -> None:
        for family in self._collector.collect():
            for name, labels, value in _samples(family):
                if name not in self._gauges:
                    self._gauges[name] = self._gauge(name, family.documentation, tuple(labels))
                self._gauges[name].set(value, labels)

    def _loop(self) -> None:
        pause = threading.Event()
        try:
            while not pause.wait(EVERY_S):
                self.set_all()
        except Exception:  # the thread's edge: the run goes on without it
            log.exception("Ray's metrics lack this run from now on")


def _samples(family: Family) -> Iterator[tuple[str, dict[str, str], float]]:
    for sample in family.samples:
        if "rank" not in sample.labels and not sample.name.endswith("_bucket"):
            yield sample.name, dict(sample.labels), float(sample.value)
