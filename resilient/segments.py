"""A micro-batch's way through the layers of a stage, forward and backward, one layer at a time.

Autograd's graph is cut between all layers, in every layout: so where a layer lives changes nothing of what is computed,
nor in which order. What is drawn by chance in a layer is keyed by (step, micro-batch, layer).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoopError

Tensors = tuple[Tensor, ...]
Gradients = tuple[Tensor | None, ...]


@dataclass(slots=True)
class Segment:
    """One layer's part of the graph. outputs are None while it is to be computed again."""

    layer: int
    inputs: Tensors
    outputs: Tensors | None


@dataclass(slots=True)
class Passage:
    """A micro-batch under way: what forward has left for backward."""

    segments: list[Segment] = field(default_factory=list)
    changes: dict[str, Tensor] = field(default_factory=dict)
    """Buffers that forward has changed, as copies."""
    loss: Tensor | None = None
    outputs: int = 0
    """How many tensors come out at the end of the stage."""


class Segments:
    """The layers of a stage."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        first: int,
        *,
        seed: Callable[[int], None],
        lend: Callable[[int], None],
        take_lent: Callable[[int], dict[str, Tensor]],
        trained: Sequence[bool],
        checkpoint: bool,
    ) -> None:
        """first: number of the first of them. trained: whether each has anything that wants a gradient. seed: sets all
        generators for this layer. lend, take_lent: give a layer copies of its buffers, and take them from it again, as
        far as they have changed."""
        self._layers, self._first = layers, first
        self._seed, self._lend, self._take_lent = seed, lend, take_lent
        self._trained, self._checkpoint = trained, checkpoint
        self.forward_s = [0.0] * len(layers)
        self.backward_s = [0.0] * len(layers)
        """Of the newest micro-batch, by layer."""

    def forward(self, values: Tensors, passage: Passage) -> Any:
        """What the last layer returns. values: detached; those that want a gradient require it."""
        result: Any = values
        for place in range(len(self._layers)):
            began = time.monotonic()
            layer = self._first + place
            inputs = detached(result) if place else values
            with torch.set_grad_enabled(not self._checkpoint):
                result = self._call(place, inputs)
            passage.changes.update(self._take_lent(layer))
            outputs = as_tensors(result, layer)
            if self._checkpoint:
                result = _wanting(result, self._trained[place] or any(each.requires_grad for each in inputs))
            passage.segments.append(Segment(layer, inputs, None if self._checkpoint else outputs))
            self.forward_s[place] = time.monotonic() - began
            passage.outputs = len(outputs)
        return result

    def backward(self, passage: Passage, gradients: Gradients) -> Gradients:
        """From the gradients of what `forward` returned to those of its input; None where there is none."""
        while passage.segments:
            segment = passage.segments.pop()
            place = segment.layer - self._first
            began = time.monotonic()
            if segment.outputs is None:
                with torch.enable_grad():
                    segment.outputs = as_tensors(self._call(place, segment.inputs), segment.layer)
                self._take_lent(segment.layer)
            gradients = backward_through(segment.outputs, gradients, segment.inputs)
            self.backward_s[place] = time.monotonic() - began
        return gradients

    def _call(self, place: int, inputs: Tensors) -> Any:
        self._seed(self._first + place)
        self._lend(self._first + place)
        return self._layers[place](*inputs)


def backward_through(outputs: Tensors, gradients: Gradients, inputs: Tensors) -> Gradients:
    roots = [
        (output, gradient)
        for output, gradient in zip(outputs, gradients, strict=True)
        if output.requires_grad and gradient is not None
    ]
    if roots:
        torch.autograd.backward([output for output, _ in roots], [gradient for _, gradient in roots])
    found = tuple(each.grad if each.requires_grad else None for each in inputs)
    for each in inputs:
        each.grad = None
    return found


def as_tensors(value: Any, layer: int) -> Tensors:
    """A layer's result as a tuple. Raises LoopError."""
    tensors = value if isinstance(value, tuple) else (value,)
    if not tensors or not all(isinstance(each, Tensor) for each in tensors):
        raise LoopError(
            f"layer {layer} of the pipeline returned a {type(value).__name__}; it must be a tensor or a tuple of them"
        )
    return tensors


def detached(value: Any) -> Tensors:
    """Cut off from the graph; what requires a gradient still does, by itself."""
    tensors = value if isinstance(value, tuple) else (value,)
    return tuple(each.detach().requires_grad_(each.requires_grad) for each in tensors)


def _wanting(value: Any, wanted: bool) -> Any:
    """As it would be had it been computed with a graph."""
    tensors = value if isinstance(value, tuple) else (value,)
    made = tuple(each.requires_grad_(wanted and each.is_floating_point()) for each in tensors)
    return made if isinstance(value, tuple) else made[0]
