"""What the watch over state costs a step: `python -m benchmarks.watch`. A GPT in one process, watched and not by turns.

The share is what the calls take by themselves, within the steps that are watched. Steps with and without it, in one
run and by turns, differ by the same and by noise; their ratio is told beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import resilient
from resilient.state_watch import StateWatch

from .gpt import CONTEXT, GPT, VOCABULARY
from .outcome import Target, write

LAYERS, WIDTHS = 12, (256, 768)
"""What the watch takes depends on the number of modules and parameters, not on their size; a step does."""
MICRO_BATCHES, SAMPLES = 4, 4
STEPS, WARM_UP = 20, 2
MOST_PERCENT = 0.5
CALLS = {name: getattr(StateWatch, name) for name in ("begin_step", "in_force", "commit", "digest")}


class Switched:
    """The watch's calls, timed in even steps, and left out in odd ones."""

    def __init__(self) -> None:
        self.watching, self.spent_s = True, 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            if not self.watching and call.__name__ != "begin_step":
                return None
            began = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.spent_s += time.perf_counter() - began if self.watching else 0.0

        return timed


def train(run: resilient.Run, width: int) -> dict[str, list[float]]:
    """Seconds of each step, by whether it was watched, and of what the watch took in those."""
    switched = Switched()
    for name, call in CALLS.items():
        setattr(StateWatch, name, switched.around(call))
    model = GPT(LAYERS, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run.protect(model=model, optimizer=optimizer)
    tokens = list(torch.randint(VOCABULARY, (64, CONTEXT + 1)))
    seconds: dict[str, list[float]] = {"watched": [], "not watched": [], "watch": []}
    sizes = {"global_batch": MICRO_BATCHES * SAMPLES, "micro_batch": SAMPLES}
    began = time.perf_counter()
    for step in run.steps(tokens, **sizes, steps=STEPS + WARM_UP):
        for batch in step:
            logits = model(batch[:, :-1])
            functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        if step.number >= WARM_UP:
            seconds["watched" if switched.watching else "not watched"].append(now - began)
            if switched.watching:
                seconds["watch"].append(switched.spent_s)
        began, switched.watching, switched.spent_s = now, step.number % 2 == 1, 0.0
    return seconds


def main() -> None:
    targets, samples = [], {}
    for width in WIDTHS:
        found = resilient.train(name="watch", resources={"CPU": 1})(train).local(width).value
        watch, watched, plain = (statistics.median(found[name]) for name in ("watch", "watched", "not watched"))
        name = f"share of a step that the watch takes, width {width}"
        targets.append(Target(name=name, value=100 * watch / watched, unit="%", goal=MOST_PERCENT))
        samples[f"width {width}"] = {**found, "micro_batches": MICRO_BATCHES, "layers": LAYERS}
        print(
            f"width {width}: a step takes {watched:.3f} s, the watch {1000 * watch:.2f} ms of it; "
            f"watched / not watched {watched / plain:.4f}"
        )
    write(Path("out/bench/watch.json"), targets, samples)


if __name__ == "__main__":
    main()
