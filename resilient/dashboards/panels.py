"""The dashboard in short: its rows, and what each panel asks."""

from __future__ import annotations

from collections.abc import Iterator

from .panel import RUN, UNPLANNED, Panel, Query, Row, counted, gauge, per_second


def _quantile(quantile: float) -> Query:
    chosen = f'{RUN},phase="total",{UNPLANNED}'
    return Query(
        expression=f"histogram_quantile({quantile}, "
        f"sum by (run, le) (increase(resilient_recovery_seconds_bucket{{{chosen}}}[1h])))",
        legend=f"{{{{run}}}}, quantile {quantile}",
        needs="failure",
    )


GOODPUT = Row(
    title="Goodput",
    panels=(
        Panel(
            title="ETTR",
            about="The share of time that was productive, of the last 5 minutes, hour and day.",
            kind="stat",
            unit="percentunit",
            queries=tuple(gauge(f"resilient:ettr:ratio{window}", window) for window in ("5m", "1h", "24h")),
        ),
        Panel(
            title="Step",
            about="The step that the run is at.",
            kind="stat",
            width=4,
            queries=(gauge("resilient_step"),),
        ),
        Panel(
            title="Attempt",
            about="One line per attempt and version.",
            kind="stat",
            width=4,
            queries=(
                Query(
                    expression=f"max by (run, attempt, version) (resilient_run_info{{{RUN}}})",
                    legend="{{run}}: attempt {{attempt}} with {{version}}",
                ),
            ),
        ),
        Panel(
            title="Loss",
            about="Of the newest step that is known of.",
            queries=(gauge("resilient_loss"),),
        ),
        Panel(
            title="What time is spent on",
            about="Seconds of each second. Time is accounted for when a step is committed, so a gap that is filled in "
            "later is a run that stood still.",
            unit="percentunit",
            stacked=True,
            width=12,
            queries=(
                per_second("resilient_time_seconds_total", "{{run}}: {{state}}", by="run, state"),
                Query(
                    expression=f"resilient:overdue_seconds{{{RUN}}} > bool 10",
                    legend="{{run}}: stands still for over 10 s, not accounted for yet",
                ),
            ),
        ),
        Panel(
            title="ETTR over time",
            about="With the goal that the alerts compare it with.",
            unit="percentunit",
            width=12,
            queries=(
                *(gauge(f"resilient:ettr:ratio{window}", f"{{{{run}}}}, {window}") for window in ("5m", "1h", "24h")),
                Query(expression="resilient:ettr:goal", legend="goal"),
            ),
        ),
        Panel(
            title="Steps per second",
            about="Committed ones, those that were computed again too.",
            queries=(per_second("resilient_steps_committed_total"),),
        ),
        Panel(
            title="Step time, and time since the last commit",
            about="A run whose last commit is older than ten steps and a minute makes no progress.",
            unit="s",
            queries=(
                gauge("resilient_step_seconds", "{{run}}: a step"),
                gauge("resilient_last_commit_age_seconds", "{{run}}: since the last commit"),
            ),
        ),
        Panel(
            title="Work done again, in 5 minutes",
            about="Steps that were gone back on, and micro-batches of lost ranks that others computed.",
            queries=(
                counted("resilient_steps_lost_total", "{{run}}: steps"),
                counted("resilient_micro_batches_recomputed_total", "{{run}}: micro-batches"),
            ),
        ),
    ),
)

RECOVERIES = Row(
    title="Recoveries",
    panels=(
        Panel(
            title="MTTR, MTBF",
            about="Mean time to recover from what was not planned, and between failures, over the last day.",
            kind="stat",
            unit="s",
            queries=(
                gauge("resilient:mttr_seconds:24h", "{{run}}: to recover", "failure"),
                gauge("resilient:mtbf_seconds:24h", "{{run}}: between failures", "failure"),
            ),
        ),
        Panel(
            title="MTTR, MTBF, last hour",
            about="The same over an hour.",
            unit="s",
            queries=(
                gauge("resilient:mttr_seconds:1h", "{{run}}: to recover", "failure"),
                gauge("resilient:mtbf_seconds:1h", "{{run}}: between failures", "failure"),
            ),
        ),
        Panel(
            title="Under way",
            about="For how long the present recovery has been going on, and for how long nodes have been waited for.",
            unit="s",
            queries=(
                gauge("resilient_recovering_seconds", "{{run}}: recovering"),
                gauge("resilient_waiting_for_nodes_seconds", "{{run}}: waiting for nodes"),
            ),
        ),
        Panel(
            title="Failures in 5 minutes",
            about="By what failed.",
            queries=(counted("resilient_failures_total", "{{run}}: {{kind}}", by="run, kind"),),
        ),
        Panel(
            title="Changes of generation in 5 minutes",
            about="By why; joined, drained and dealt anew are planned.",
            queries=(counted("resilient_recoveries_total", "{{run}}: {{kind}}", by="run, kind"),),
        ),
        Panel(
            title="What recoveries took",
            about="From the last sign of life to the next committed step, over the last hour; the unplanned ones.",
            unit="s",
            queries=(_quantile(0.5), _quantile(0.95)),
        ),
        Panel(
            title="Where that time goes",
            about="Mean of each phase over the last hour, of the unplanned ones.",
            unit="s",
            stacked=True,
            width=24,
            queries=(
                Query(
                    expression="sum by (run, phase) (increase(resilient_recovery_seconds_sum"
                    f'{{{RUN},phase!="total",{UNPLANNED}}}[1h])) / (sum by (run, phase) (increase('
                    f'resilient_recovery_seconds_count{{{RUN},phase!="total",{UNPLANNED}}}[1h])) > 0)',
                    legend="{{run}}: {{phase}}",
                    needs="failure",
                ),
            ),
        ),
    ),
)

SNAPSHOTS = Row(
    title="Snapshots",
    panels=(
        Panel(
            title="Newest snapshot",
            about="Step of the newest one, and of the newest that parity protects.",
            queries=(
                gauge("resilient_snapshot_captured_step", "{{run}}: captured"),
                gauge("resilient_snapshot_protected_step", "{{run}}: protected"),
            ),
        ),
        Panel(
            title="Age of the newest protected one",
            about="What would be computed again if all ranks were lost now.",
            unit="s",
            queries=(gauge("resilient_snapshot_age_seconds"),),
        ),
        Panel(
            title="Behind, and how often",
            about="By how many steps protection is behind, and every how many steps a snapshot is taken.",
            queries=(
                gauge("resilient_parity_lag_steps", "{{run}}: behind"),
                gauge("resilient_snapshot_interval_steps", "{{run}}: interval"),
            ),
        ),
        Panel(
            title="Snapshots per second",
            about="Skipped: no slot was free. Torn: the state was written while it was copied.",
            queries=(
                per_second("resilient_snapshots_captured_total", "{{run}}: captured"),
                per_second("resilient_snapshots_skipped_total", "{{run}}: skipped"),
                per_second("resilient_snapshots_torn_total", "{{run}}: torn"),
            ),
        ),
        Panel(
            title="Share of time that training waits for them",
            about="The budget of every='auto' is 2 percent.",
            unit="percentunit",
            queries=(per_second("resilient_snapshots_blocked_seconds_total"),),
        ),
        Panel(
            title="How long one takes",
            about="From the beginning of the step until the state might be written again, and until it was protected.",
            unit="s",
            width=4,
            queries=(
                gauge("resilient_snapshot_mutable_seconds", "{{run}}: mutable"),
                gauge("resilient_snapshot_protected_seconds", "{{run}}: protected"),
            ),
        ),
        Panel(
            title="Size",
            about="Of the whole state.",
            unit="bytes",
            width=4,
            kind="stat",
            queries=(gauge("resilient_snapshot_bytes"),),
        ),
    ),
)

DURABILITY = Row(
    title="Durability",
    panels=(
        Panel(
            title="Age of the newest checkpoint",
            about="What would be computed again if more nodes were lost than parity covers.",
            unit="s",
            queries=(gauge("resilient_checkpoint_age_seconds", needs="checkpoint"),),
        ),
        Panel(
            title="Checkpoints",
            about="Since this attempt began. Postponed: one was due while the one before was still being written.",
            queries=(
                gauge("resilient_checkpoints_committed_total", "{{run}}: durable"),
                gauge("resilient_checkpoint_failures_total", "{{run}}: failed"),
                gauge("resilient_checkpoints_postponed_total", "{{run}}: postponed"),
            ),
        ),
        Panel(
            title="Newest checkpoint",
            about="Its step.",
            kind="stat",
            width=4,
            queries=(gauge("resilient_checkpoint_step", needs="checkpoint"),),
        ),
        Panel(
            title="Size on storage",
            about="Of the newest one.",
            kind="stat",
            unit="bytes",
            width=4,
            queries=(gauge("resilient_checkpoint_bytes", needs="checkpoint"),),
        ),
    ),
)

RANKS = Row(
    title="Ranks",
    panels=(
        Panel(
            title="Ranks",
            about="Seated ones, and the bounds between which the run goes on.",
            queries=(
                gauge("resilient_ranks", "{{run}}: ranks"),
                gauge("resilient_ranks_wanted", "{{run}}: {{bound}}"),
            ),
        ),
        Panel(
            title="Spares and nodes",
            about="Processes that wait, how many were asked for, and the nodes that the run may use.",
            queries=(
                gauge("resilient_spares", "{{run}}: spares"),
                gauge("resilient_spares_wanted", "{{run}}: spares wanted"),
                gauge("resilient_nodes", "{{run}}: nodes {{state}}"),
            ),
        ),
        Panel(
            title="Generation",
            about="Each membership of ranks has a number.",
            queries=(gauge("resilient_generation"),),
        ),
        Panel(
            title="Speed of each rank",
            about="1 is the median one; slower ones get fewer micro-batches.",
            width=12,
            queries=(gauge("resilient_rank_speed_ratio", "{{run}}: rank {{rank}} on {{node}}"),),
        ),
        Panel(
            title="Idle share of each rank",
            about="In pipelines: the share of a step for which a rank has nothing to compute.",
            unit="percentunit",
            width=12,
            queries=(gauge("resilient_rank_idle_ratio", "{{run}}: rank {{rank}} on {{node}}", "pipeline"),),
        ),
    ),
)

ROWS = (GOODPUT, RECOVERIES, SNAPSHOTS, DURABILITY, RANKS)


def queries(run: str = ".*", rate_interval: str = "1m") -> Iterator[tuple[str, Query]]:
    """Title of the panel, and each of its queries as Grafana would ask it for runs of this name."""
    for row in ROWS:
        for panel in row.panels:
            for query in panel.queries:
                asked = query.expression.replace("$__rate_interval", rate_interval).replace("$run", run)
                yield panel.title, Query(expression=asked, legend=query.legend, needs=query.needs)
