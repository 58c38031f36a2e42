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

import contextlib
import copy
import ctypes
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from resilient.core.order import Batching, Line, Ticket, derive_seed, sample_indices, whole
from resilient.randomness import seed_host, single_threaded

_log = logging.getLogger("resilient")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

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
        **options: Any,
    ) -> None:
        batching = Batching(
            global_batch=whole("global_batch", global_batch), micro_batch=whole("micro_batch", micro_batch)
        )
        stream = _is_stream(dataset)
        length = None if stream else len(dataset)
        recipe = _Recipe(
            dataset=dataset,
            length=length,
            batching=batching,
            seed=whole("seed", seed, least=None),
            shuffle=shuffle is not False,
            collate=default_collate if collate_fn is None else collate_fn,
            pin=bool(pin_memory) and torch.accelerator.is_available(),
        )
        self.micro_batches: int = batching.micro_batches
        self.steps = batching.loop_steps(length, steps=steps, epochs=epochs)
        workers = whole("num_workers", num_workers, least=0)
        _check_options(options, workers)
        if stream:
            _check_stream(workers, shuffle)
        self._source = (
            _Stream(recipe, self.steps)
            if self.steps is None or stream
            else _Indexed(recipe, self.steps, workers, options)
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
        return self._source.state_dict(step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where `state_dict` was taken, on any rank. `seek` follows."""
        self._source.load_state_dict(state)

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


def _check_stream(workers: int, shuffle: bool | None) -> None:
    if workers:
        raise ValueError(
            f"num_workers={workers}: an iterable dataset is read by the training process itself for now; "
            f"pass num_workers=0, or give the dataset __getitem__ and __len__"
        )
    if shuffle:
        raise ValueError("shuffle=True: an iterable dataset comes in its own order; shuffle inside it")


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How micro-batches are made. Travels to the workers; as their dataset it is indexed by tickets."""

    dataset: Any
    length: int | None  # samples; None: a stream
    batching: Batching
    seed: int
    shuffle: bool
    collate: Callable[[list[Any]], Any]
    pin: bool

    def __getitem__(self, ticket: Ticket) -> tuple[int, int, Any]:
        return (*ticket, self.load(*ticket))

    def load(self, step: int, leaf: int) -> Any:
        assert self.length is not None
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
        one: DataLoader[Any] = DataLoader([batch], batch_size=None, collate_fn=_same, pin_memory=True)  # type: ignore[arg-type]
        return next(iter(one))


def _same(value: Any) -> Any:
    return value


def _loader(recipe: _Recipe, line: Line, workers: int, options: Mapping[str, Any]) -> DataLoader[Any]:
    """A DataLoader whose workers turn the line's tickets into micro-batches; starts none of them yet."""
    context = options.get("multiprocessing_context")
    if context is None or isinstance(context, str):
        context = multiprocessing.get_context(context)
    start = _WorkerStart(
        dataset=recipe.dataset,
        method=context.get_start_method(),
        parent=os.getpid(),
        then=options.get("worker_init_fn"),
    )
    return DataLoader(
        recipe,  # type: ignore[arg-type]  # all that it needs of a dataset is __getitem__
        batch_size=None,  # the recipe collates, so that here and in a worker the same lines do it
        sampler=line,
        collate_fn=_same,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=recipe.pin,
        # Only for the workers' own seeds; without it DataLoader draws from the caller's generator.
        generator=torch.Generator().manual_seed(derive_seed(recipe.seed, "workers")),
        **{**options, "worker_init_fn": start},
    )


@dataclass(frozen=True, kw_only=True)
class _WorkerStart:
    """What a worker process does first: it must neither outlive its rank nor seem to be it."""

    dataset: Any
    method: str
    parent: int
    then: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        if self.method == "forkserver":
            # A fork server and its children keep each other alive; only this pipe tells that the rank died.
            threading.Thread(target=_die_with_parent, daemon=True).start()
        elif sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.parent:
                os._exit(1)  # the rank died before that
            if self.method == "fork":
                _release_inherited_sockets()
        info = get_worker_info()
        assert info is not None
        object.__setattr__(info, "dataset", self.dataset)  # the user's, not the recipe, for worker_init_fn
        if self.then is not None:
            self.then(worker)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _release_inherited_sockets() -> None:
    """Let go of all TCP and UDP sockets: held by a worker, they keep a dead rank's connections open.

    Their numbers go on pointing somewhere (/dev/null): the objects that own them here would later close
    whatever had got the number since. Unix sockets, over which workers return tensors, stay.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # no socket, or the descriptor of the listing itself
            probe = socket.socket(fileno=descriptor)
            family = probe.family
            probe.detach()
            if family in (socket.AF_INET, socket.AF_INET6):
                os.dup2(null, descriptor, inheritable=False)
    os.close(null)


class _Indexed:
    """Micro-batches of a dataset that can be indexed, read ahead by worker processes if there are any."""

    def __init__(self, recipe: _Recipe, steps: int, workers: int, options: Mapping[str, Any]) -> None:
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


class _Stream:
    """Micro-batches of a dataset that can only be iterated over, from its beginning."""

    def __init__(self, recipe: _Recipe, steps: int | None) -> None:
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
