"""The metrics that a run shows: all of the table, with exact sums, also before anything has happened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from resilient import metrics
from resilient.core.chronicle import RECOVERY_KINDS
from resilient.core.figures import BUCKETS_S, FAILURE_KINDS, PHASES, Figures
from resilient.core.spent import STATES
from resilient.exposition import RunCollector
from resilient.metrics import METRICS, Seen

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"

BEFORE_ANYTHING: dict[str, Any] = {
    "run": "gpt",
    "attempt": 1,
    "step": 0,
    "steps": None,
    "loss": None,
    "step_s": 0.0,
    "committed_s_ago": 0.5,
    "recovering_s": 0.0,
    "waiting_s": 0.0,
    "protected_s_ago": None,
    "durable_s_ago": None,
    "wanted": {"min": 2, "max": 4, "spares": 1},
    "generation": 0,
    "ranks": [],
    "others": [],
    "nodes": {},
    "leaving": {},
    "snapshots": {},
    "checkpoints": {},
    "observe": {"url": None, "events": None, "events_left_out": 0},
    "not_on_record": 0,
    "outcome": None,
}


def told(figures: Figures, **look: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels, as a scraper reads it."""
    registry = CollectorRegistry()
    registry.register(RunCollector(lambda: Seen(figures=figures, look={**BEFORE_ANYTHING, **look})))
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labelled(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"run": "gpt", **labels}.items()))


def test_counters_are_there_before_the_first_event() -> None:
    found = told(Figures())
    for state in STATES:
        assert found["resilient_time_seconds_total", labelled(state=state)] == 0
    for kind in FAILURE_KINDS:
        assert found["resilient_failures_total", labelled(kind=kind)] == 0
    for recovery in RECOVERY_KINDS:
        assert found["resilient_recoveries_total", labelled(kind=recovery)] == 0
        for phase in PHASES:
            assert found["resilient_recovery_seconds_count", labelled(kind=recovery, phase=phase)] == 0
    assert found["resilient_ended", labelled()] == 0
    for name in ("snapshots_skipped_total", "checkpoint_failures_total", "steps_lost_total"):
        assert found[f"resilient_{name}", labelled()] == 0
    assert ("resilient_snapshot_protected_step", labelled()) not in found, "there is none yet"


def test_sums_are_exact() -> None:
    figures = Figures()
    phases = {"detect": 2.0, "decide": 0.001, "form": 0.03, "redo": 0.1, "total": 2.131}
    for _ in range(3):
        figures.recovered("rank lost", phases)  # type: ignore[arg-type]
    found = told(figures)
    for phase, seconds in phases.items():
        labels = labelled(kind="rank lost", phase=phase)
        assert found["resilient_recovery_seconds_sum", labels] == seconds + seconds + seconds
        assert found["resilient_recovery_seconds_count", labels] == 3
        for end in BUCKETS_S:
            expected = 3 if seconds <= end else 0
            assert found["resilient_recovery_seconds_bucket", tuple(sorted((*labels, ("le", str(end)))))] == expected


def test_what_is_served_is_what_stands_now() -> None:
    figures, look = Figures(), {**BEFORE_ANYTHING}
    collector = RunCollector(lambda: Seen(figures=figures, look=look))
    registry = CollectorRegistry()
    registry.register(collector)
    assert collector.text() == generate_latest(registry)
    figures.recovered("rank lost", {"detect": 2.0, "decide": 0.001, "form": 0.03, "redo": 0.1, "total": 2.131})
    look["snapshots"] = {"newest": 7, "protected": 5, "captured": 8}
    changed = collector.text()
    assert changed == generate_latest(registry)
    assert b'resilient_recovery_seconds_count{kind="rank lost",phase="total",run="gpt"} 1.0' in changed
    assert b'resilient_snapshot_protected_step{run="gpt"} 5.0' in changed


def test_how_things_stand() -> None:
    found = told(
        Figures(),
        ranks=[
            {"rank": 0, "node": "0123456789", "state": "computing", "speed": 1.0},
            {"rank": 1, "node": "ab", "state": "computing", "speed": 0.5},
        ],
        others=[{"state": "ready"}, {"state": "starting"}],
        nodes={"0123456789": 2, "ab": 1},
        leaving={"ab": {}},
        snapshots={"newest": 7, "protected": 5, "captured": 8},
        checkpoints={"durable": -1, "committed": 0, "failures": 2, "stored_bytes": 0},
        protected_s_ago=1.5,
    )
    assert found["resilient_ranks", labelled()] == 2
    assert found["resilient_ranks_wanted", labelled(bound="max")] == 4
    assert found["resilient_spares", labelled()] == 1
    assert found["resilient_nodes", labelled(state="in use")] == 1
    assert found["resilient_rank_speed_ratio", labelled(rank="1", node="ab")] == 0.5
    assert found["resilient_parity_lag_steps", labelled()] == 2
    assert found["resilient_snapshot_age_seconds", labelled()] == 1.5
    assert found["resilient_checkpoint_failures_total", labelled()] == 2
    assert ("resilient_checkpoint_step", labelled()) not in found


def test_names_follow_the_rules() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"resilient_[a-z_]+", metric.name), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.about.endswith("."), metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_the_page_about_them_is_made_from_the_table() -> None:
    assert DOCS.read_text() == metrics.as_markdown(), "python -m resilient.metrics > docs/metrics.md"
