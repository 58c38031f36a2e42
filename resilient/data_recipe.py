"""How micro-batches are made: indices, then samples one by one, each with randomness of its own, then collated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch.utils.data import DataLoader

from .core.order import Batching, Ticket, derive_seed, sample_indices
from .packing import ForProcess
from .randomness import seed_host


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How micro-batches are made. Travels to the workers; as their dataset it is indexed by tickets."""

    dataset: Any
    length: int | None  # samples; None: a stream
    batching: Batching
    seed: int
    shuffle: bool
    collate: Callable[[list[Any]], Any]
    pin: bool
    updates: int = 1
    """So many steps in a row have the same samples."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _recipe, (ForProcess({field.name: getattr(self, field.name) for field in fields(self)}),)

    def __getitem__(self, ticket: Ticket) -> tuple[int, int, Any]:
        """In a worker."""
        return (*ticket, ForProcess(self.load(*ticket)))

    def load(self, step: int, leaf: int) -> Any:
        assert self.length is not None
        step //= self.updates
        epoch = self.batching.epoch(step, self.length)
        indices = sample_indices(
            self.batching, step=step, leaf=leaf, length=self.length, seed=self.seed, shuffle=self.shuffle
        )
        samples = []
        for index in indices.tolist():
            seed_host(derive_seed(self.seed, "sample", epoch, index))
            samples.append(self.dataset[index])
        return self.collated(step, leaf, samples)

    def collated(self, step: int, leaf: int, samples: list[Any]) -> Any:
        seed_host(derive_seed(self.seed, "collate", step, leaf))
        return self.collate(samples)

    def pinned(self, batch: Any) -> Any:
        """In pinned memory, if asked for: by a DataLoader, whose rules for nested batches are known."""
        if not self.pin:
            return batch
        one: DataLoader[Any] = DataLoader([batch], batch_size=None, collate_fn=same, pin_memory=True)  # type: ignore[arg-type]
        return next(iter(one))


def _recipe(given: dict[str, Any]) -> Recipe:
    return Recipe(**given)


def same(value: Any) -> Any:
    return value
