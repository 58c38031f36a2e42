"""The run's metrics among Ray's: the same values, but what Ray can't show."""

from __future__ import annotations

from typing import Any

from resilient.core.figures import Figures
from resilient.metrics import Seen
from resilient.ray_metrics import RayMetrics
from tests.unit.test_metrics import BEFORE_ANYTHING


class Gauge:
    """Stands for Ray's."""

    all_of_them: dict[str, Gauge]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert name not in self.all_of_them and description
        self.tag_keys, self.values = tag_keys, dict[tuple[str, ...], float]()
        self.all_of_them[name] = self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.tag_keys
        self.values[tuple(tags.values())] = value


def test_all_but_ranks_and_buckets() -> None:
    Gauge.all_of_them = {}
    figures = Figures()
    ranks: list[dict[str, Any]] = [{"rank": 0, "node": "a" * 40, "speed": 1.0}]
    metrics = RayMetrics(lambda: Seen(figures=figures, look={**BEFORE_ANYTHING, "ranks": ranks}), Gauge)
    metrics.set_all()
    figures.failures["node"] = 2
    figures.recovered("node lost", dict.fromkeys(("detect", "decide", "form", "redo", "total"), 0.5))  # type: ignore[arg-type]
    metrics.set_all()
    found = Gauge.all_of_them
    assert found["resilient_failures_total"].values["gpt", "node"] == 2.0
    assert found["resilient_recovery_seconds_sum"].values["gpt", "node lost", "form"] == 0.5
    assert found["resilient_recovery_seconds_count"].values["gpt", "node lost", "form"] == 1.0
    assert not [name for name in found if name.endswith("_bucket") or name == "resilient_rank_speed_ratio"]
