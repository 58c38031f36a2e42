"""Whether an optimizer may update its parameters in chunks: found out by what it does, not by its name.

A fresh one of the same class and hyperparameters takes a few steps on small tensors. Afterwards these must be the same
bits whether it had them whole, or two of its kind had some of their chunks each, as ranks do. Nor may one element's
gradient change another element.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

STEPS = 4
CHUNK = 1024
SHAPES = ((2, CHUNK + 37), (3, 5, 7))
PARALLEL_ELEMENTS = 1 << 15
"""From so many on torch shares an operation out to its threads, at places that depend on the tensor's length. The last
elements of each thread's part are computed one by one, which in 16 bits may round otherwise than many at a time."""


class _NotElementWise(Exception):
    """What it does instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """What came of some steps: by tensor its values, then by key its state."""

    values: list[Tensor]
    states: list[dict[str, Any]]
    groups: dict[str, str]
    """Hyperparameters afterwards, spelled."""


def check_elementwise(name: str, optimizer: Optimizer) -> None:
    """Raises ValueError, naming the optimizer, what it does, and the remedy. Its own state is not touched."""
    with torch.random.fork_rng(devices=[]):
        for group in optimizer.param_groups:
            trained = [each for each in group["params"] if each.requires_grad]
            for dtype, device in dict.fromkeys((each.dtype, each.device) for each in trained):
                try:
                    _check(optimizer, group, dtype, device)
                except _NotElementWise as found:
                    raise ValueError(
                        f"pipeline(shard_optimizer=True): {name}, {_spelled(optimizer, group)}, {found} (of {dtype}, "
                        f"with {torch.get_num_threads()} threads); optimizer state can be in shards only where each "
                        "element is updated by itself: take SGD, Adam, AdamW, Adagrad or RMSprop, not fused, with "
                        "parameters of 16 bits only one CPU per rank, or leave shard_optimizer out"
                    ) from None


def _check(optimizer: Optimizer, group: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    shapes = [*SHAPES, (3 * PARALLEL_ELEMENTS + 41,)] if torch.get_num_threads() > 1 else list(SHAPES)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes] for _ in range(STEPS)]
    cuts = [[*range(CHUNK, each.numel(), CHUNK)] for each in start]
    whole = _tried(optimizer, group, start, gradients)
    _check_states(whole, start)
    pieces = _pieces(start, cuts)
    in_steps = [_pieces(each, cuts) for each in gradients]
    for half in (0, 1):
        part = _tried(optimizer, group, pieces[half::2], [each[half::2] for each in in_steps])
        _compare(part, _cut_up(whole, cuts, half))
    _check_alone(optimizer, group, start, gradients, whole)


def _check_states(whole: _Trial, start: Sequence[Tensor]) -> None:
    for state, tensor in zip(whole.states, start, strict=True):
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise _NotElementWise(f"keeps {key}={value!r:.40} of a parameter, which is no tensor")
            if value.dim() and value.shape != tensor.shape:
                raise _NotElementWise(
                    f"keeps {key} of shape {tuple(value.shape)} of a parameter of shape {tuple(tensor.shape)}"
                )


def _compare(part: _Trial, expected: _Trial) -> None:
    same = _same_all(part.values, expected.values) and part.groups == expected.groups
    for own, other in zip(part.states, expected.states, strict=True):
        same = same and list(own) == list(other) and _same_all(own.values(), other.values())
    if not same:
        raise _NotElementWise("comes to other bits when it has only some chunks of its parameters")


def _check_alone(
    optimizer: Optimizer, group: dict[str, Any], start: list[Tensor], gradients: list[list[Tensor]], whole: _Trial
) -> None:
    """One element has another gradient in the first step."""
    changed = [[each.clone() for each in step] for step in gradients]
    changed[0][0].view(-1)[CHUNK // 2] += 1.0
    other = _tried(optimizer, group, start, changed)
    for place in range(len(start)):
        one, two = whole.states[place], other.states[place]
        shaped = [(one[key], two[key]) for key in one if one[key].dim()]
        for before, after in [(whole.values[place], other.values[place]), *shaped]:
            differs = (_bits(before) != _bits(after)).view(-1, before.element_size()).any(1)
            if place == 0:
                differs[CHUNK // 2] = False
            if bool(differs.any()):
                raise _NotElementWise("lets the gradient of one element change others")


def _tried(
    optimizer: Optimizer, group: dict[str, Any], start: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]
) -> _Trial:
    parameters = [nn.Parameter(each.clone()) for each in start]
    values = {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
    accepted = inspect.signature(type(optimizer)).parameters
    arguments = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    # Whatever it raises on tensors like these is the answer: some take only matrices, some ask for arguments.
    try:
        fresh = type(optimizer)([{"params": parameters, **values}], **arguments)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            fresh.step()
    except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
        raise _NotElementWise(f"can't be tried on chunks ({type(error).__name__}: {error})") from error
    return _Trial(
        values=[each.detach() for each in parameters],
        states=[dict(fresh.state[each]) if each in fresh.state else {} for each in parameters],
        groups={key: repr(value) for key, value in fresh.param_groups[0].items() if key != "params"},
    )


def _pieces(tensors: Sequence[Tensor], cuts: Sequence[Sequence[int]]) -> list[Tensor]:
    return [
        piece
        for tensor, ends in zip(tensors, cuts, strict=True)
        for piece in tensor.reshape(-1).tensor_split(list(ends))
    ]


def _cut_up(whole: _Trial, cuts: Sequence[Sequence[int]], half: int) -> _Trial:
    """As it should be where every second chunk is."""
    states: list[dict[str, Any]] = []
    for state, ends in zip(whole.states, cuts, strict=True):
        for number in range(len(ends) + 1):
            states.append(
                {
                    key: value.reshape(-1).tensor_split(list(ends))[number] if value.dim() else value
                    for key, value in state.items()
                }
            )
    return _Trial(values=_pieces(whole.values, cuts)[half::2], states=states[half::2], groups=whole.groups)


def _same_all(some: Any, others: Any) -> bool:
    return all(
        one.shape == two.shape and one.dtype == two.dtype and torch.equal(_bits(one), _bits(two))
        for one, two in zip(some, others, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _spelled(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """Its class, and what it has been told to do otherwise than usual by a word of True."""
    told = ", ".join(f"{key}=True" for key, value in group.items() if value is True)
    return f"{type(optimizer).__qualname__}({told})"
