"""Datasets that can be indexed, read ahead by worker processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from .core.order import Line, derive_seed
from .data_recipe import Recipe, same
from .data_workers import WorkerStart
from .randomness import single_threaded


class Indexed:
    """Micro-batches of a dataset that can be indexed, read ahead by worker processes if there are any."""

    def __init__(self, recipe: Recipe, steps: int, workers: int, options: Mapping[str, Any]) -> None:
        self._recipe = recipe
        self._wanted = self._steps = steps
        self._step = 0
        self._line = Line(steps)
        self._loader = _loader(recipe, self._line, workers, options) if workers else None
        # How many tickets the workers are given at once. (A DataLoader has a length: never ask if it is true.)
        self._depth = 0 if self._loader is None else workers * (self._loader.prefetch_factor or 0)
        self._arrivals: Iterator[tuple[int, int, Any]] | None = None

    def has_step(self, step: int) -> bool:
        return 0 <= step < self._steps

    def leave_out(self, count: int) -> None:
        self._steps = self._line.steps = self._wanted + count

    def seek(self, step: int, leaves: tuple[int, ...]) -> None:
        self._step = step
        self._line.redirect(step, leaves)
        # Each arrival makes the DataLoader draw one ticket. If the line had come to its end (or not begun),
        # the workers have fewer than they have room for, and only a new iteration fills them up. It waits
        # for what is under way and forgets it.
        if self._loader is not None and len(self._line.under_way) < self._depth and self._line.has_more():
            self._line.under_way.clear()
            self._line.redirect(step, leaves)
            self._arrivals = iter(self._loader)

    def get(self, step: int, leaf: int) -> Any:
        if not self.has_step(step):
            raise ValueError(f"step {step} is not in this loop of {self._steps} steps")
        self._step = step
        ticket = (step, leaf)
        self._line.forget_before(step)
        # A ticket not drawn yet may be waiting behind ones that nobody wants any more: each that arrives
        # lets one be drawn.
        while self._line.under_way and self._line.reaches(ticket, self._depth):
            self._receive()
        if ticket in self._line.arrived:
            return self._line.arrived.pop(ticket)
        with single_threaded():
            return self._recipe.pinned(self._recipe.load(step, leaf))

    def _receive(self) -> None:
        assert self._arrivals is not None
        expected = self._line.under_way[0]
        try:
            *ticket, batch = next(self._arrivals)
        finally:  # an error in a worker takes its ticket's place
            self._line.under_way.popleft()
        assert tuple(ticket) == expected, (ticket, expected)
        self._line.arrived[expected] = batch

    def state_dict(self, step: int | None) -> dict[str, Any]:
        return {"step": self._step if step is None else step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]

    def close(self) -> None:
        # A DataLoader has no public close: it ends its workers when the last reference to its iterator goes.
        # But an exception that came out of it holds one, in its traceback, for as long as anybody looks.
        if self._arrivals is not None:
            self._arrivals._shutdown_workers()  # type: ignore[attr-defined]
        self._arrivals = self._loader = None
        self._line = Line(self._steps)


def _loader(recipe: Recipe, line: Line, workers: int, options: Mapping[str, Any]) -> DataLoader[Any]:
    """A DataLoader whose workers turn the line's tickets into micro-batches; starts none of them yet."""
    context = options.get("multiprocessing_context")
    if context is None or isinstance(context, str):
        context = multiprocessing.get_context(context)
    start = WorkerStart(
        method=context.get_start_method(),
        parent=os.getpid(),
        then=options.get("worker_init_fn"),
    )
    return DataLoader(
        recipe,  # type: ignore[arg-type]  # all that it needs of a dataset is __getitem__
        batch_size=None,  # the recipe collates, so that here and in a worker the same lines do it
        sampler=line,
        collate_fn=same,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=recipe.pin,
        # Only for the workers' own seeds; without it DataLoader draws from the caller's generator.
        generator=torch.Generator().manual_seed(derive_seed(recipe.seed, "workers")),
        **{**options, "worker_init_fn": start},
    )
