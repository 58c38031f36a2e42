"""Datasets that can only be read from their beginning."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from .core.order import derive_seed
from .data_recipe import Recipe
from .randomness import seed_host, single_threaded

_log = logging.getLogger("resilient")


class Stream:
    """Micro-batches of a dataset that can only be iterated over, from its beginning."""

    def __init__(self, recipe: Recipe, steps: int | None) -> None:
        self._recipe = recipe
        self._wanted = self._steps = steps
        self._step = 0
        self._stateful = hasattr(recipe.dataset, "state_dict") and hasattr(recipe.dataset, "load_state_dict")
        # Where the stream can be started from: (step, its state there; None: its beginning).
        self._origin = (0, copy.deepcopy(recipe.dataset.state_dict()) if self._stateful else None)
        self._restart()

    def _restart(self) -> None:
        self._iterator: Iterator[Any] | None = None
        self._next = self._origin[0]  # the step that is read next
        self._ended = False
        self._samples: dict[int, list[Any]] = {}  # raw, of the current step and those read ahead
        self._states: dict[int, Any] = {}  # of the stream, at the start of these steps

    def has_step(self, step: int) -> bool:
        if step < 0 or (self._steps is not None and step >= self._steps):
            return False
        while self._next <= step and not self._ended:
            self._read()
        return step < self._next

    def leave_out(self, count: int) -> None:
        self._steps = None if self._wanted is None else self._wanted + count

    def seek(self, step: int, leaves: tuple[int, ...]) -> None:
        del leaves  # every rank reads all of them
        if step < self._next and step not in self._samples:
            self._rewind(step)
        self._step, start = step, self._next
        while self._next < step and not self._ended:
            self._read()
        if skipped := self._next - start:
            _log.info(
                "read and skipped %d steps (%d samples) of the iterable dataset to reach step %d",
                *(skipped, skipped * self._recipe.batching.global_batch, step),
            )
        self._forget_before(step)

    def _rewind(self, step: int) -> None:
        start, state = self._origin
        dataset = self._recipe.dataset
        if step < start or (state is None and iter(dataset) is dataset):
            raise ValueError(
                f"the iterable dataset is past step {step} and can't go back to it: give it state_dict and "
                f"load_state_dict, or an __iter__ that starts anew each time"
            )
        if state is not None:
            dataset.load_state_dict(copy.deepcopy(state))
        self._restart()

    def _read(self) -> None:
        """Read the next step's samples, or find that fewer than a global batch are left."""
        step, seed = self._next, self._recipe.seed
        if self._stateful:
            self._states[step] = copy.deepcopy(self._recipe.dataset.state_dict())
        samples: list[Any] = []
        with single_threaded(), contextlib.suppress(StopIteration):
            if self._iterator is None:
                seed_host(derive_seed(seed, "stream"))
                self._iterator = iter(self._recipe.dataset)
            for position in range(self._recipe.batching.global_batch):
                seed_host(derive_seed(seed, "stream", step, position))
                samples.append(next(self._iterator))
        if len(samples) < self._recipe.batching.global_batch:
            self._ended = True
            return
        self._samples[step] = samples
        self._next += 1
        self._forget_before(self._step)

    def _forget_before(self, step: int) -> None:
        for kept in (self._samples, self._states):
            for old in [key for key in kept if key < step]:
                del kept[old]

    def get(self, step: int, leaf: int) -> Any:
        if step != self._step or step not in self._samples:
            self.seek(step, ())
        if not self.has_step(step):
            raise ValueError(f"step {step} is past the end of the iterable dataset")
        size = self._recipe.batching.micro_batch
        samples = self._samples[step][leaf * size : (leaf + 1) * size]
        with single_threaded():
            return self._recipe.pinned(self._recipe.collated(step, leaf, samples))

    def state_dict(self, step: int | None) -> dict[str, Any]:
        step = self._step if step is None else step
        state: dict[str, Any] = {"step": step}
        if self._stateful:
            if step not in self._states and step != self._next:
                raise ValueError(f"the iterable dataset's position at the start of step {step} is not kept")
            known = self._states[step] if step in self._states else self._recipe.dataset.state_dict()
            state["stream"] = copy.deepcopy(known)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        if self._stateful and state.get("stream") is not None:
            self._origin = (state["step"], copy.deepcopy(state["stream"]))
            self._rewind(state["step"])

    def close(self) -> None:
        """Nothing runs beside the training process."""
