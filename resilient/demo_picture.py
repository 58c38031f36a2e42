"""The demo's picture: the loss of both runs, and what happened on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .demo_result import Outcome, answer

# Okabe and Ito's hues, darkened for contrast: colour-blind readers tell them apart, and by line style too.
STYLES = {
    "kill": ("#C04A00", "--"),
    "node loss": ("#A0397A", "-."),
    "join": ("#007A59", ":"),
}
LIGHT, DARK = "#56B4E9", "#1A1A1A"


def draw(outcome: Outcome, path: Path) -> None:
    """Write the picture. The two curves lie on each other, so one is thick and light, the other thin and dark."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.8), dpi=150, layout="constrained")
    axes.plot(*curve(outcome.metrics_undisturbed), color=LIGHT, linewidth=6, label="one process, undisturbed")
    axes.plot(*curve(outcome.metrics), color=DARK, linewidth=1.2, label="cluster of 4 nodes, with failures")
    for place, (step, kind, text) in enumerate(marks(outcome)):
        _mark(axes, step, kind, text, height=(0.98, 0.84, 0.7)[place % 3], near_the_end=step > 0.85 * outcome.steps)
    same = "the same bits at the end" if outcome.identical else "DIFFERENT bits at the end"
    axes.set_title(f"A small GPT, trained through failures: {same}", loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_xlim(0, outcome.steps)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center right", bbox_to_anchor=(1.0, 0.5), facecolor="white", framealpha=1.0, edgecolor="none")
    figure.savefig(path)
    pyplot.close(figure)


def _mark(axes: Any, step: int, kind: str, text: str, *, height: float, near_the_end: bool) -> None:
    """A line through the step, and beside it what happened; neighbours stand at different heights."""
    color, style = STYLES[kind]
    axes.axvline(step, color=color, linestyle=style, linewidth=1.6)
    axes.annotate(
        text,
        (step, height),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if near_the_end else 5, 0),
        textcoords="offset points",
        color=color,
        fontsize=9.5,
        fontweight="bold",
        horizontalalignment="right" if near_the_end else "left",
        verticalalignment="top",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def curve(metrics: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [row["step"] for row in metrics], [row["loss"] for row in metrics]


def marks(outcome: Outcome) -> list[tuple[int, str, str]]:
    """(step, kind, label) of every failure and every join, those of replacements included."""
    found = []
    explained: list[dict[str, Any]] = []
    for event in outcome.events:
        recovery = answer(event, outcome.recoveries)
        if recovery is not None:
            explained.append(dict(recovery))
            found.append((recovery["step"], event["kind"], label(event["kind"], recovery)))
    for recovery in outcome.recoveries:
        if recovery["kind"] == "joined" and recovery not in explained:
            found.append((recovery["step"], "join", label("replacement", recovery)))
    return sorted(found)


def label(kind: str, recovery: Mapping[str, Any]) -> str:
    what = {
        "kill": "rank killed",
        "node loss": "node lost",
        "join": "new node joins",
        "replacement": "replacement joins",
    }[kind]
    return f"{what}:\n{recovery['ranks']} ranks, {1000 * recovery['total_s']:.0f} ms"
