"""A rank's work in a step of a pipeline: what is ready is done, what others need is sent to them.

What is sent at a stage's boundary is kept until the step is complete. It is a function of the state, the step and the
micro-batch alone: whoever computes it gets the same bytes. So when a rank dies, whoever takes over its micro-batches
is sent again what went to it, and computes only the part of its stage; what comes twice is dropped.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from actors.post import Key, Parcel, Post

from .buffers import Buffers
from .core.bubbles import Bubble, Bubbles, bubble_of
from .core.plan import Place, Plan, Stage
from .core.schedule import Action, Backward, Forward, choose, turns_of, under_way_limit
from .errors import LoopError
from .pipeline import Pipeline
from .segments import Gradients, Passage, Segments, Tensors, as_tensors, detached

FORWARD, BACKWARD = 0, 1
REMEMBERED, ENOUGH = 16, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """A micro-batch has gone all the way through this stage: its gradients lie in `.grad`."""

    leaf: int
    loss: Tensor | None
    changes: dict[str, Tensor]
    """Buffers that forward has changed."""


@dataclass(slots=True)
class Sent:
    parcel: Parcel
    stage: int
    to: int
    """The member that it was sent to last."""


@dataclass(slots=True, kw_only=True)
class Timing:
    """Of the newest micro-batches, and of the step so far, in seconds."""

    layers: dict[int, deque[float]] = field(default_factory=dict)
    busy_s: float = 0.0
    idle: float = 0.0
    """The share of the last undisturbed step's forward and backward, until all ranks were through, for which this one
    had nothing to do."""
    bubbles: Bubbles = field(default_factory=Bubbles)
    """The same of all of them."""

    def took(self, layer: int, time_s: float) -> None:
        self.layers.setdefault(layer, deque(maxlen=REMEMBERED)).append(time_s)

    def forget(self, but: range) -> None:
        """All layers but these: they are others' now."""
        self.layers = {layer: times for layer, times in self.layers.items() if layer in but}

    @property
    def layer_s(self) -> tuple[tuple[int, float], ...]:
        """The median of the last ones, of those layers of which enough are known."""
        found = sorted(self.layers.items())
        return tuple((layer, statistics.median(times)) for layer, times in found if len(times) >= ENOUGH)


class StageWork:
    """One rank's. By the training thread, but `seated`, which is called while that waits."""

    def __init__(
        self,
        name: str,
        pipe: Pipeline,
        buffers: Callable[[], Buffers],
        batch: Callable[[int], Any],
        seed: Callable[[int, int, int], None],
        post: Post | None,
    ) -> None:
        """name: by which the pipeline is protected. batch: a micro-batch of the current step, (inputs, target). seed:
        sets all generators, for (step, micro-batch, layer). post: to the other stages, if there are any."""
        self._prefix = f"{name}.layers"
        self._pipe, self._buffers, self._batch, self._seed, self._post = pipe, buffers, batch, seed, post
        self.timing = Timing()
        self._step = -1
        self._leaf = -1
        self._plan: Plan | None = None
        self._stage = Stage(first=0, stop=0, ranks=())
        self._under_way: dict[int, Passage] = {}
        self._sent: dict[Key, Sent] = {}
        self._sending = threading.Lock()
        """Over what is sent, and to whom."""

    @property
    def reads_data(self) -> bool:
        return self._is_first or self._is_last

    @property
    def post_port(self) -> int:
        return self._post.port if self._post is not None else 0

    # What is to be done

    def begin_step(self, step: int) -> None:
        """Of the steps before nothing is needed any more."""
        self._step = step
        self._forget()
        self._began = self._all_through_at = time.monotonic()
        self._disturbed = False
        self.timing.busy_s = 0.0
        if self._post is not None:
            self._post.drop(lambda key: key[1] < step)

    def drop(self) -> None:
        """The step is given up."""
        self._forget()

    def disturbed(self) -> None:
        """The step under way says nothing about how long one takes."""
        self._disturbed = True

    def _forget(self) -> None:
        self._under_way.clear()
        with self._sending:
            self._sent.clear()

    def seated(self, plan: Plan, rank: int) -> None:
        """This plan holds from now on. What was sent to others than those that own it now is sent again."""
        stage = plan.stage_of(rank)
        assert stage is not None
        number = plan.stages.index(stage)
        sizes = [each.size for each in plan.stages[number:]]
        self._limit = under_way_limit(self._pipe.schedule, sizes, plan.micro_batches)
        # Whoever leaves by a planned change may still wait for what it was sent under the former plan.
        leaving = self._plan.places if self._plan is not None and plan.kind == "planned" else ()
        places = (*leaving, *plan.places)
        with self._sending:  # in an unplanned generation the training thread goes on meanwhile, with the same layers
            former = self._stage
            self._plan, self._stage, self._number = plan, stage, number
            self._owners = [plan.owners(each.ranks) for each in plan.stages]
            self._turns = turns_of(plan.micro_batches)
            self._bubble = _bubble(plan, number)
            if plan.kind != "unplanned" or (former.first, former.stop) != (stage.first, stage.stop):
                self._segments = self._made_segments(stage)
                self.timing.forget(range(stage.first, stage.stop))
            self._send_again(places)

    def _send_again(self, places: Iterable[Place]) -> None:
        if self._post is not None and self._plan is not None:
            plan = self._plan
            self._post.begin_age(plan.since)
            self._post.keep_to({place.member: (place.address.host, place.address.post) for place in places})
        for key, sent in list(self._sent.items()):
            if self._owner(sent.stage, key[3]).member != sent.to:
                self._send(key, sent.parcel, sent.stage)

    def _made_segments(self, stage: Stage) -> Segments:
        pipe, buffers = self._pipe, self._buffers()
        layers = range(stage.first, stage.stop)
        used = {use.layer for use in pipe.uses_in(layers) if use.tensor.requires_grad}
        trained = [
            number in used or any(parameter.requires_grad for parameter in pipe.layers[number].parameters())
            for number in layers
        ]
        return Segments(
            [pipe.layers[number] for number in layers],
            stage.first,
            seed=lambda layer: self._seed(self._step, self._leaf, layer),
            lend=lambda layer: buffers.lend(f"{self._prefix}.{layer}."),
            take_lent=lambda layer: buffers.take_lent(f"{self._prefix}.{layer}."),
            trained=trained,
            checkpoint=pipe.checkpoint,
        )

    def choose(self, todo: frozenset[int]) -> Action | None:
        """todo: own micro-batches that are not folded yet. None while nothing is ready."""
        for leaf in [leaf for leaf in self._under_way if leaf not in todo]:
            del self._under_way[leaf]  # another rank's by now
        fresh = todo - self._under_way.keys()
        return choose(
            self._limit,
            fresh=fresh,
            under_way=self._under_way.keys(),
            inputs=fresh if self._is_first else self._arrived(fresh, self._stage.first, FORWARD),
            gradients=self._arrived(self._under_way.keys(), self._stage.stop, BACKWARD),
            turns=self._turns,
        )

    def _arrived(self, leaves: Any, layer: int, direction: int) -> set[int]:
        post = self._post
        return set() if post is None else {leaf for leaf in leaves if post.get(self._key(layer, leaf, direction))}

    @property
    def _is_first(self) -> bool:
        return self._stage.first == 0

    @property
    def _is_last(self) -> bool:
        return self._stage.stop == len(self._pipe.layers)

    # Doing it

    def do(self, action: Action) -> Folded | None:
        began = time.monotonic()
        self._leaf = action.leaf
        match action:
            case Forward(leaf=leaf):
                folded = self._forward(leaf)
            case Backward(leaf=leaf):
                arrived = self._get(self._stage.stop, leaf, BACKWARD)
                passage = self._under_way.pop(leaf)
                folded = self._backward(leaf, passage, self._gradients(arrived, passage))
        self.timing.busy_s += time.monotonic() - began
        return folded

    def all_through(self) -> None:
        """All ranks have done their forward and backward of this step. By the generation's thread."""
        self._all_through_at = time.monotonic()

    def end_step(self) -> None:
        """All micro-batches have been through, on all ranks: nobody needs anything again."""
        self._forget()
        if not self._disturbed:
            busy_s = self.timing.busy_s
            self.timing.idle = 1 - busy_s / max(self._all_through_at - self._began, busy_s, 1e-9)
            self.timing.bubbles.add(replace(self._bubble, rank_steps=1, idle=self.timing.idle))

    def _forward(self, leaf: int) -> Folded | None:
        passage = Passage()
        batch = self._pair(leaf) if self._is_first or self._is_last else None
        result = self._segments.forward(self._inputs(leaf, batch), passage)
        if self._is_last:
            assert batch is not None
            return self._backward(leaf, passage, self._through_loss(result, batch[1], passage))
        outputs = as_tensors(result, self._stage.stop - 1)
        self._leave(
            leaf, self._stage.stop, FORWARD, self._number + 1, outputs, [int(each.requires_grad) for each in outputs]
        )
        if not any(each.requires_grad for each in outputs):
            return self._backward(leaf, passage, tuple(None for _ in outputs))
        self._under_way[leaf] = passage
        return None

    def _inputs(self, leaf: int, batch: tuple[Any, Any] | None) -> Tensors:
        if self._is_first:
            assert batch is not None
            values = as_tensors(batch[0], -1)
            return tuple(each.to(self._pipe.device) for each in values)
        parcel = self._get(self._stage.first, leaf, FORWARD)
        pairs = zip(parcel.tensors, parcel.marks, strict=True)
        return tuple(each.to(self._pipe.device).detach().requires_grad_(bool(mark)) for each, mark in pairs)

    def _through_loss(self, result: Any, target: Any, passage: Passage) -> Gradients:
        inputs = detached(result)
        self._seed(self._step, self._leaf, len(self._pipe.layers))
        loss = self._pipe.loss(inputs if isinstance(result, tuple) else inputs[0], _moved(target, self._pipe.device))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise LoopError(f"the pipeline's loss gave {type(loss).__name__}; it must give a tensor with one element")
        passage.loss = loss.detach()
        torch.autograd.backward([loss], [torch.ones_like(loss)])
        return tuple(each.grad if each.requires_grad else None for each in inputs)

    def _backward(self, leaf: int, passage: Passage, gradients: Gradients) -> Folded:
        inputs = passage.segments[0].inputs
        below = self._segments.backward(passage, gradients)
        for place, (ahead_s, back_s) in enumerate(
            zip(self._segments.forward_s, self._segments.backward_s, strict=True)
        ):
            self.timing.took(self._stage.first + place, ahead_s + back_s)
        if not self._is_first and any(each.requires_grad for each in inputs):
            marks = [place for place, gradient in enumerate(below) if gradient is not None]
            found = tuple(gradient for gradient in below if gradient is not None)
            self._leave(leaf, self._stage.first, BACKWARD, self._number - 1, found, marks)
        return Folded(leaf=leaf, loss=passage.loss, changes=passage.changes)

    def _gradients(self, parcel: Parcel, passage: Passage) -> Gradients:
        """As they were sent: marks say of which outputs."""
        found = dict(zip(parcel.marks, parcel.tensors, strict=True))
        places = range(passage.outputs)
        return tuple(found[place].to(self._pipe.device) if place in found else None for place in places)

    def _pair(self, leaf: int) -> tuple[Any, Any]:
        batch = self._batch(leaf)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise LoopError(
                f"a micro-batch of a pipeline is a pair (inputs, target), the dataset gave a {type(batch).__name__}"
                f"{f' of {len(batch)}' if hasattr(batch, '__len__') else ''}; make pairs in dataset or collate_fn"
            )
        return batch[0], batch[1]

    # To and from other stages

    def _key(self, layer: int, leaf: int, direction: int) -> Key:
        assert self._plan is not None
        return (self._plan.since, self._step, layer, leaf, direction)

    def _owner(self, stage: int, leaf: int) -> Place:
        assert self._plan is not None
        return self._plan.places[self._owners[stage][leaf]]

    def _get(self, layer: int, leaf: int, direction: int) -> Parcel:
        assert self._post is not None
        parcel = self._post.get(self._key(layer, leaf, direction))
        assert parcel is not None, (layer, leaf, direction)
        return parcel

    def _leave(self, leaf: int, layer: int, direction: int, stage: int, tensors: Tensors, marks: list[int]) -> None:
        parcel = Parcel(tensors=tuple(each.detach() for each in tensors), marks=tuple(marks))
        with self._sending:
            self._send(self._key(layer, leaf, direction), parcel, stage)

    def _send(self, key: Key, parcel: Parcel, stage: int) -> None:
        assert self._post is not None
        to = self._owner(stage, key[3])
        self._sent[key] = Sent(parcel, stage, to.member)
        self._post.send(to.member, (to.address.host, to.address.post), key, parcel)


def _bubble(plan: Plan, stage: int) -> Bubble:
    """With nothing counted yet."""
    owned = {len(leaves) for leaves in plan.leaves}
    return Bubble(
        ranks=tuple(len(each.ranks) for each in plan.stages),
        stage=stage,
        by_schedule=bubble_of(len(plan.stages), owned.pop()) if len(owned) == 1 else None,
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device) for each in value)
    return value
