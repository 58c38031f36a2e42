"""The data of a training loop: this rank's micro-batches, whoever else died or joined.

What a micro-batch contains, to the last bit, is a function of (seed, step, leaf). Who loads it, when, in
which process and in what order changes nothing: indices come from `core.order`, the generators are seeded
before every sample and before collating, and torch computes on one thread, as in DataLoader's workers.

A dataset with `__getitem__` and `__len__` is read ahead by a DataLoader's workers. They draw on a line of
tickets (step, leaf) which `seek` redirects at any time; what is already on its way is used if still wanted,
else dropped on arrival. A ticket that isn't in line is loaded directly, past the queue.

A dataset with only `__iter__` is a stream, which every rank reads in full. The samples of the current
step are kept, so that any leaf of it can be had.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from .core.order import Batching, whole
from .data_indexed import Indexed
from .data_recipe import Recipe
from .data_stream import Stream

# Options of DataLoader that would contradict what decides the order here, and what to do instead.
_REFUSED = {
    "batch_size": "use global_batch and micro_batch",
    "drop_last": "a remainder smaller than global_batch is always dropped",
    "sampler": "order the dataset itself, e.g. with torch.utils.data.Subset, and pass shuffle=False",
    "batch_sampler": "order the dataset itself, e.g. with torch.utils.data.Subset, and pass shuffle=False",
    "generator": "use seed",
    "in_order": "micro-batches always come in order, or runs could not be repeated",
    "persistent_workers": "workers always persist until the loop ends",
}
_ACCEPTED = ("prefetch_factor", "timeout", "worker_init_fn", "multiprocessing_context")


class Feed:
    """This rank's micro-batches of every step.

    Args:
        dataset: `__getitem__` with `__len__`, or `__iter__`. Samples are fetched one by one, each after
            seeding, even where the dataset offers `__getitems__`: in a batch they would share a seed.
        global_batch, micro_batch: samples per step and per leaf; the first is a multiple of the second.
        steps, epochs: the length of the loop: one of them. An epoch has len(dataset) // global_batch steps.
            A stream takes no `epochs`; without `steps` it is read to its end, and an earlier end wins.
        allow_other_data: whether a state that was trained with another length, batch size, seed or order is gone on
            from; its position counts steps.
        updates: so many steps in a row have the same micro-batches.
        seed: any integer. Decides order and all randomness in samples and in `collate_fn`.
        shuffle: a new order in every epoch (the default), or the dataset's own. Streams have only their own.
        num_workers, collate_fn, pin_memory, prefetch_factor, timeout, worker_init_fn,
        multiprocessing_context: as for DataLoader. Streams take no workers yet. Memory is pinned only where
            there is an accelerator.

    Raises TypeError or ValueError, naming the field, for what can't be used.

    The caller owes three things. It seeds the generators after every `get`: loading leaves them in the state
    of the last sample. It calls from one thread, which lives as long as the feed: workers die with the
    *thread* that started them. And it calls `close` at the end.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        global_batch: int,
        micro_batch: int,
        steps: int | None = None,
        epochs: int | None = None,
        seed: int,
        shuffle: bool | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        updates: int = 1,
        allow_other_data: bool = False,
        **options: Any,
    ) -> None:
        batching = Batching(
            global_batch=whole("global_batch", global_batch), micro_batch=whole("micro_batch", micro_batch)
        )
        stream = _is_stream(dataset)
        length = None if stream else len(dataset)
        recipe = Recipe(
            dataset=dataset,
            length=length,
            batching=batching,
            seed=whole("seed", seed, least=None),
            shuffle=shuffle is not False,
            collate=default_collate if collate_fn is None else collate_fn,
            pin=bool(pin_memory) and torch.accelerator.is_available(),
            updates=whole("updates", updates),
        )
        self.updates = updates
        self.micro_batches: int = batching.micro_batches
        self.steps = batching.loop_steps(length, steps=steps, epochs=epochs)
        if self.steps is not None and epochs is not None:
            self.steps *= updates
        self.steps_per_epoch = None if length is None else batching.steps_per_epoch(length) * updates
        """None for a stream."""
        workers = whole("num_workers", num_workers, least=0)
        _check_options(options, workers)
        if stream:
            _check_stream(workers, shuffle, updates)
        self._allow_other_data = allow_other_data
        self._settings = {
            "length": length,
            "global_batch": batching.global_batch,
            "micro_batch": batching.micro_batch,
            "shuffle": recipe.shuffle,
            "updates": updates,
            "seed": recipe.seed,
        }
        self._source = (
            Stream(recipe, self.steps)
            if self.steps is None or stream
            else Indexed(recipe, self.steps, workers, options)
        )

    def has_step(self, step: int) -> bool:
        """Whether the loop has this step. A stream without `steps` is read up to it to find out, so ask for
        the current step or the next."""
        return self._source.has_step(step)

    def leave_out(self, count: int) -> None:
        """So many steps' worth of data are left out in all: the loop goes on for as many further ones."""
        self._source.leave_out(count)

    def seek(self, step: int, leaves: Sequence[int]) -> None:
        """From `step` on this rank owns `leaves`, in every step, ascending; starts reading ahead.

        Without effect if that is what comes next anyway, so call it before every step. In the middle of one
        it would load again what was already had: seek the next step, and `get` what was added to this one.
        A stream goes forward by reading and skipping, which is logged, unless `load_state_dict` brought it
        near; it goes back by starting anew, and raises ValueError where it can't.
        """
        assert step >= 0 and list(leaves) == sorted(set(leaves)), (step, leaves)
        assert not leaves or 0 <= leaves[0] <= leaves[-1] < self.micro_batches, (leaves, self.micro_batches)
        self._source.seek(step, tuple(leaves))

    def get(self, step: int, leaf: int) -> Any:
        """The collated micro-batch, whatever was asked for before: from the queue where it is in line,
        loaded directly otherwise. Raises what the dataset or `collate_fn` raises."""
        assert 0 <= leaf < self.micro_batches, (leaf, self.micro_batches)
        return self._source.get(step, leaf)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The position at the start of `step`, as if nothing had been read ahead.

        `step` is the current one (the default: that of the last `seek` or `get`) or, for a stream, one that
        was read ahead or the very next. A stream's own `state_dict` is included, copied.
        """
        return {**self._source.state_dict(step), "settings": self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where `state_dict` was taken, on any rank. `seek` follows.

        Raises ValueError if that was with other data, whose steps had other samples.
        """
        self._check_same(state.get("settings", {}))
        self._source.load_state_dict(state)

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        """settings: as they were; those of an earlier version lack some."""
        others = {name: value for name, value in settings.items() if value != self._settings[name]}
        if others and not self._allow_other_data:
            words = [
                "the seed is another" if name == "seed" else f"{name} was {value} and is {self._settings[name]}"
                for name, value in others.items()
            ]
            raise ValueError(
                f"the state to go on from was trained on other data: {', '.join(words)}. A position in the data is a "
                "number of steps, so samples would be left out or seen twice without a word. Use the former values, "
                'begin anew with Checkpoint(..., resume="never") or another name and URL of the run, or pass '
                "allow_other_data=True to run.steps or run.batches to go on with the same number of steps"
            )

    def close(self) -> None:
        """End the worker processes. What is asked for afterwards is loaded directly."""
        self._source.close()


def _is_stream(dataset: Any) -> bool:
    if isinstance(dataset, DataLoader):
        raise TypeError("dataset is a DataLoader; pass the dataset in it, and its options one by one")
    # IterableDataset first: it inherits a __getitem__ that doesn't work.
    if isinstance(dataset, IterableDataset):
        return True
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return False
    if hasattr(dataset, "__iter__"):
        return True
    raise TypeError(f"dataset must have __getitem__ and __len__, or __iter__; {type(dataset)} has neither")


def _check_options(options: Mapping[str, Any], workers: int) -> None:
    for name, value in options.items():
        if name in _REFUSED:
            raise ValueError(f"{name}={value!r} can't be used here: {_REFUSED[name]}")
        if name not in _ACCEPTED:
            raise TypeError(f"{name} is no option of this loader; DataLoader's that are: {', '.join(_ACCEPTED)}")
        if workers == 0 and value is not None and name in ("prefetch_factor", "multiprocessing_context"):
            raise ValueError(f"{name}={value!r} needs num_workers of at least 1: nothing is loaded ahead by 0")


def _check_stream(workers: int, shuffle: bool | None, updates: int) -> None:
    if updates > 1:
        raise ValueError(f"updates={updates}: an iterable dataset is read once; give it __getitem__ and __len__")
    if workers:
        raise ValueError(
            f"num_workers={workers}: an iterable dataset is read by the training process itself for now; "
            f"pass num_workers=0, or give the dataset __getitem__ and __len__"
        )
    if shuffle:
        raise ValueError("shuffle=True: an iterable dataset comes in its own order; shuffle inside it")
