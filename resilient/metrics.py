"""A run's figures as Prometheus metrics: one table of names, and their values as they stand.

All come from the controller, which outlives ranks and nodes. docs/metrics.md is made from the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from .core.chronicle import RECOVERY_KINDS
from .core.figures import Figures
from .core.spent import STATES

Sample = tuple[tuple[str, ...], float]
"""The values of a metric's labels after `run`, and its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run at one moment. look: what `Told.look` says."""

    figures: Figures
    look: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram"]
    about: str
    labels: tuple[str, ...] = ()
    """Beside `run`, which all have."""
    samples: Callable[[Seen], Iterable[Sample]]
    """Of a histogram the phases' own are taken instead."""


def _one(value: Callable[[Seen], float | None]) -> Callable[[Seen], Iterable[Sample]]:
    """Without labels; none where the value is not known."""

    def samples(seen: Seen) -> Iterator[Sample]:
        if (found := value(seen)) is not None:
            yield (), float(found)

    return samples


def _snapshots(name: str, absent: float | None = 0.0) -> Callable[[Seen], Iterable[Sample]]:
    return _one(lambda seen: seen.look["snapshots"].get(name, absent))


def _checkpoints(name: str, absent: float | None = 0.0) -> Callable[[Seen], Iterable[Sample]]:
    return _one(lambda seen: seen.look["checkpoints"].get(name, absent))


def _step(told: str, name: str) -> Callable[[Seen], Iterable[Sample]]:
    """-1 stands for none, and is not shown."""
    return _one(lambda seen: found if (found := seen.look[told].get(name, -1)) >= 0 else None)


def _by_rank(name: str) -> Callable[[Seen], Iterable[Sample]]:
    return lambda seen: (
        ((str(each["rank"]), each["node"][:8]), each[name]) for each in seen.look["ranks"] if each.get(name) is not None
    )


@functools.cache
def _own_version() -> str:
    try:
        return version("resilient-runtime")
    except PackageNotFoundError:  # run from its sources
        return "unknown"


def _info(seen: Seen) -> Iterator[Sample]:
    yield (str(seen.look["attempt"]), _own_version()), 1.0


METRICS: tuple[Metric, ...] = (
    Metric(
        name="resilient_run_info",
        kind="gauge",
        about="Always 1. Which attempt of the run this is, and the version of this package.",
        labels=("attempt", "version"),
        samples=_info,
    ),
    Metric(
        name="resilient_ended",
        kind="gauge",
        about="1 once the run has ended, until everybody who scraped it has seen that; 0 before.",
        samples=_one(lambda seen: seen.look["outcome"] is not None),
    ),
    # Goodput
    Metric(
        name="resilient_time_seconds_total",
        kind="counter",
        about="What the run's time was spent on. All states together are the time since it began, but for what has "
        "passed since the last committed step; productive of all is the share of time that was worth it (ETTR).",
        labels=("state",),
        samples=lambda seen: (((state,), seen.figures.spent.seconds[state]) for state in STATES),
    ),
    Metric(
        name="resilient_steps_committed_total",
        kind="counter",
        about="Committed steps, those that were computed again too.",
        samples=_one(lambda seen: seen.figures.steps),
    ),
    Metric(
        name="resilient_steps_lost_total",
        kind="counter",
        about="Steps that had been committed and were gone back on.",
        samples=_one(lambda seen: seen.figures.lost_steps),
    ),
    Metric(
        name="resilient_micro_batches_recomputed_total",
        kind="counter",
        about="Micro-batches of a step under way that were dealt out again, because the ranks that had them were lost.",
        samples=_one(lambda seen: seen.figures.recomputed),
    ),
    Metric(
        name="resilient_step",
        kind="gauge",
        about="The step that the run is at: so many are committed on the line that it is on.",
        samples=_one(lambda seen: seen.look["step"]),
    ),
    Metric(
        name="resilient_step_seconds",
        kind="gauge",
        about="What a step takes, the median of the last ones.",
        samples=_one(lambda seen: seen.look["step_s"] or None),
    ),
    Metric(
        name="resilient_last_commit_age_seconds",
        kind="gauge",
        about="How long ago a step was committed last.",
        samples=_one(lambda seen: seen.look["committed_s_ago"]),
    ),
    Metric(
        name="resilient_loss",
        kind="gauge",
        about="The mean loss of the newest step that is known of.",
        samples=_one(lambda seen: seen.look["loss"]),
    ),
    # Failures and recoveries
    Metric(
        name="resilient_failures_total",
        kind="counter",
        about="Ranks lost alone, ranks lost with their nodes, links that broke, digests of the state that differed, "
        "losses that were gone back on.",
        labels=("kind",),
        samples=lambda seen: (((kind,), count) for kind, count in seen.figures.failures.items()),
    ),
    Metric(
        name="resilient_recoveries_total",
        kind="counter",
        about="Changes of generation that have ended with a committed step.",
        labels=("kind",),
        samples=lambda seen: (((kind,), seen.figures.count(kind)) for kind in RECOVERY_KINDS),
    ),
    Metric(
        name="resilient_recovery_seconds",
        kind="histogram",
        about="What they took, by phase: detect (since the last sign of life), decide (until the new generation was on "
        "record), form (until its ranks were level), redo (until the next committed step), and total.",
        labels=("kind", "phase"),
        samples=lambda seen: (),
    ),
    Metric(
        name="resilient_recovering_seconds",
        kind="gauge",
        about="For how long the recovery under way has been going on; 0 when there is none.",
        samples=_one(lambda seen: seen.look["recovering_s"]),
    ),
    Metric(
        name="resilient_waiting_for_nodes_seconds",
        kind="gauge",
        about="For how long the run has been standing still because there are too few nodes; 0 when it does not.",
        samples=_one(lambda seen: seen.look["waiting_s"]),
    ),
    # Membership
    Metric(
        name="resilient_generation",
        kind="gauge",
        about="The membership of ranks that is in force, numbered.",
        samples=_one(lambda seen: seen.look["generation"]),
    ),
    Metric(
        name="resilient_ranks",
        kind="gauge",
        about="Ranks that are seated and live.",
        samples=_one(lambda seen: len(seen.look["ranks"])),
    ),
    Metric(
        name="resilient_ranks_wanted",
        kind="gauge",
        about="The least with which the run goes on (min), and the most that it uses (max).",
        labels=("bound",),
        samples=lambda seen: (((bound,), seen.look["wanted"][bound]) for bound in ("min", "max")),
    ),
    Metric(
        name="resilient_spares",
        kind="gauge",
        about="Processes that wait, ready to take a seat.",
        samples=_one(lambda seen: sum(each["state"] == "ready" for each in seen.look["others"])),
    ),
    Metric(
        name="resilient_spares_wanted",
        kind="gauge",
        about="How many were asked for.",
        samples=_one(lambda seen: seen.look["wanted"]["spares"]),
    ),
    Metric(
        name="resilient_nodes",
        kind="gauge",
        about="Nodes that the run may use: in use, or leaving.",
        labels=("state",),
        samples=lambda seen: (
            (("in use",), len(set(seen.look["nodes"]) - set(seen.look["leaving"]))),
            (("leaving",), len(seen.look["leaving"])),
        ),
    ),
    Metric(
        name="resilient_rank_speed_ratio",
        kind="gauge",
        about="Speed of a rank, 1 for the median one.",
        labels=("rank", "node"),
        samples=_by_rank("speed"),
    ),
    Metric(
        name="resilient_rank_idle_ratio",
        kind="gauge",
        about="In a pipeline, the share of the last step for which the rank had nothing to compute.",
        labels=("rank", "node"),
        samples=_by_rank("idle"),
    ),
    Metric(
        name="resilient_events_left_out_total",
        kind="counter",
        about="Lines that events.jsonl lacks, because the disk was full or could not keep up.",
        samples=_one(lambda seen: seen.look["observe"]["events_left_out"]),
    ),
    Metric(
        name="resilient_records_failed_total",
        kind="counter",
        about="Notes for a restarted controller, such as counters, that the cluster would not take.",
        samples=_one(lambda seen: seen.look["not_on_record"]),
    ),
    # Snapshots
    Metric(
        name="resilient_snapshots_captured_total",
        kind="counter",
        about="Snapshots that were captured.",
        samples=_snapshots("captured"),
    ),
    Metric(
        name="resilient_snapshots_skipped_total",
        kind="counter",
        about="Snapshots that were due and not taken, because no slot was free on some rank.",
        samples=_snapshots("skipped"),
    ),
    Metric(
        name="resilient_snapshots_torn_total",
        kind="counter",
        about="Snapshots that were given up, because the state was written while it was copied.",
        samples=_snapshots("torn"),
    ),
    Metric(
        name="resilient_snapshots_blocked_seconds_total",
        kind="counter",
        about="Time for which training has waited for them.",
        samples=_snapshots("blocked_s"),
    ),
    Metric(
        name="resilient_snapshot_interval_steps",
        kind="gauge",
        about="A snapshot is taken every so many steps.",
        samples=_snapshots("interval", None),
    ),
    Metric(
        name="resilient_snapshot_captured_step",
        kind="gauge",
        about="Step of the newest snapshot.",
        samples=_step("snapshots", "newest"),
    ),
    Metric(
        name="resilient_snapshot_protected_step",
        kind="gauge",
        about="Step of the newest snapshot that is protected by parity everywhere.",
        samples=_step("snapshots", "protected"),
    ),
    Metric(
        name="resilient_snapshot_age_seconds",
        kind="gauge",
        about="How long ago the newest protected snapshot came to be known as such.",
        samples=_one(lambda seen: seen.look["protected_s_ago"]),
    ),
    Metric(
        name="resilient_parity_lag_steps",
        kind="gauge",
        about="By how many steps protection is behind capturing.",
        samples=_one(
            lambda seen: (
                None
                if (newest := seen.look["snapshots"].get("newest", -1)) < 0
                else max(0.0, newest - max(0.0, seen.look["snapshots"]["protected"]))
            )
        ),
    ),
    Metric(
        name="resilient_snapshot_bytes",
        kind="gauge",
        about="Size of the whole state, all ranks' shares together.",
        samples=_snapshots("state_bytes", None),
    ),
    Metric(
        name="resilient_snapshot_mutable_seconds",
        kind="gauge",
        about="From the beginning of the step until the state might be written again, the last time.",
        samples=_snapshots("mutable_s", None),
    ),
    Metric(
        name="resilient_snapshot_protected_seconds",
        kind="gauge",
        about="From the beginning of the step until all ranks knew the snapshot protected, the last time.",
        samples=_snapshots("protected_s", None),
    ),
    # Durability
    Metric(
        name="resilient_checkpoints_committed_total",
        kind="counter",
        about="Checkpoints that have become durable.",
        samples=_checkpoints("committed"),
    ),
    Metric(
        name="resilient_checkpoint_failures_total",
        kind="counter",
        about="Checkpoints that could not be written, by any node.",
        samples=_checkpoints("failures"),
    ),
    Metric(
        name="resilient_checkpoint_unverified_total",
        kind="counter",
        about="Shards that storage gave back other than they were written. No checkpoint is made of these.",
        samples=_checkpoints("unverified"),
    ),
    Metric(
        name="resilient_checkpoints_postponed_total",
        kind="counter",
        about="Steps at which a checkpoint was due while the one before was still being written.",
        samples=_snapshots("saves_postponed"),
    ),
    Metric(
        name="resilient_checkpoint_step",
        kind="gauge",
        about="Step of the newest durable checkpoint.",
        samples=_step("checkpoints", "durable"),
    ),
    Metric(
        name="resilient_checkpoint_age_seconds",
        kind="gauge",
        about="How long ago it became durable, or the run began without any.",
        samples=_one(lambda seen: seen.look["durable_s_ago"]),
    ),
    Metric(
        name="resilient_checkpoint_bytes",
        kind="gauge",
        about="What it takes on storage.",
        samples=_checkpoints("stored_bytes", None),
    ),
)


def as_markdown() -> str:
    """docs/metrics.md."""
    rows = "\n".join(
        f"| `{metric.name}` | {metric.kind} | {', '.join(('run', *metric.labels))} | {metric.about} |"
        for metric in METRICS
    )
    return f"""# Metrics

Served by the run's controller at `/metrics`, for Prometheus. They are of the run as a whole: a rank or node that dies
takes none with it, and counters are carried on when the controller itself is restarted. A new attempt of the run counts
from zero. Everything here is made from the table in `resilient/metrics.py` (`python -m resilient.metrics`).

| name | type | labels | what it says |
|---|---|---|---|
{rows}

States of `resilient_time_seconds_total`: {", ".join(f"`{state}`" for state in STATES)}. Kinds of recoveries:
{", ".join(f"`{kind}`" for kind in RECOVERY_KINDS)}.
"""


if __name__ == "__main__":
    print(as_markdown(), end="")
