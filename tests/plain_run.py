"""The slow, obvious twin of a run: plain PyTorch, which accumulates the gradients of the micro-batches in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from resilient.core.order import Batching, derive_seed, sample_indices
from resilient.randomness import seed_everything, seed_host

SEED = 0


class PlainStep:
    def __init__(self, run: PlainRun, number: int, per_epoch: int, updates: int) -> None:
        self._run, self.number, self._per_epoch = run, number, per_epoch
        self.update, self.epoch = number % updates, number // per_epoch
        self.loss = float("nan")

    @property
    def ends_epoch(self) -> bool:
        return (self.number + 1) % self._per_epoch == 0

    def __iter__(self) -> Iterator[Any]:
        parameters = [parameter for module in self._run.modules for parameter in module.parameters()]
        for parameter in parameters:
            parameter.grad = None
        for leaf in range(self._run.batching.micro_batches):
            batch = self._run.load(self.number, leaf)
            seed_everything(derive_seed("micro-batch", SEED, self.number, leaf))
            yield batch
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= self._run.batching.micro_batches
        seed_everything(derive_seed("commit", SEED, self.number))

    def log(self, **_: Any) -> None:
        pass


class PlainRun:
    """As much of `resilient.Run` as loops in tests use."""

    rank, is_main = 0, True

    def __init__(self) -> None:
        seed_everything(derive_seed("function", SEED))
        self.state: dict[str, Any] = {}
        self.step = 0
        self.modules: list[nn.Module] = []
        self._epoch: range | None = None

    def protect(self, **objects: Any) -> None:
        self.modules = [thing for thing in objects.values() if isinstance(thing, nn.Module)]

    def load(self, step: int, leaf: int) -> Any:
        data, step = self._dataset, step // self._updates
        seed = derive_seed("data", SEED)
        indices = sample_indices(self.batching, step=step, leaf=leaf, length=len(data), seed=seed).tolist()
        seed_host(0)
        return default_collate([data[index] for index in indices])

    def epochs(self, count: int) -> Iterator[int]:
        for epoch in range(count):
            self._epoch = range(epoch, epoch + 1)
            yield epoch

    def steps(
        self, dataset: Any, *, global_batch: int, micro_batch: int, steps: int = 0, epochs: int = 0, updates: int = 1
    ) -> Iterator[PlainStep]:
        self._dataset, self._updates = dataset, updates
        self.batching = Batching(global_batch=global_batch, micro_batch=micro_batch)
        per_epoch = self.batching.steps_per_epoch(len(dataset)) * updates
        whole = range(steps or epochs * per_epoch)
        for number in (
            whole if self._epoch is None else range(self._epoch.start * per_epoch, self._epoch.stop * per_epoch)
        ):
            self.step = number
            seed_everything(derive_seed("step", SEED, number))
            yield PlainStep(self, number, per_epoch, updates)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        for module in self.modules:
            module.eval()
        with torch.no_grad():
            yield
        for module in self.modules:
            module.train()
