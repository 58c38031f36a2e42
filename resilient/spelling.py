"""What an optimizer keeps for parameters of other ranks, as far as its structure goes.

A state's skeleton names every tensor of the whole state, on every rank alike. Of the parameters that are absent here an
optimizer has nothing, so ranks tell each other how what they have is built, whenever that has changed (usually once,
after the first step), and put absent tensors in the places of what others hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from snapshot.absent import absent
from snapshot.memory import dtype_named

Spelled = dict[str, dict[str, tuple[str, list[int]]] | None]
"""By the place of a parameter, by key: dtype and shape; None where the optimizer keeps nothing of a parameter."""


NOTHING = b"{}"
"""What somebody says who holds no state."""


def spelled(optimizers: Iterable[tuple[str, Optimizer]], knows: Callable[[Tensor], bool]) -> bytes:
    """Of the parameters whose state is here. Raises ValueError for what can't be on one rank alone."""
    found: Spelled = {}
    for place, parameter, state in _states(optimizers):
        if knows(parameter):
            found[place] = None if state is None else {key: _kind(place, key, value) for key, value in state.items()}
    return json.dumps(found).encode()  # in the order of the keys, which is that of the tensors


def take(optimizers: Iterable[tuple[str, Optimizer]], told: Iterable[bytes], knows: Callable[[Tensor], bool]) -> None:
    """Absent tensors for what others hold, of parameters whose state is not here."""
    known: dict[str, Any] = {}
    for text in told:
        known.update(json.loads(text))
    for name, optimizer in optimizers:
        for place, parameter, state in _states([(name, optimizer)]):
            kinds = known.get(place)
            if knows(parameter) or place not in known:
                continue
            if kinds is None:
                optimizer.state.pop(parameter, None)
            elif state is None or list(_spelled_state(place, state).items()) != list(kinds.items()):
                optimizer.state[parameter] = {
                    key: absent(shape, dtype_named(dtype), parameter.device if shape else "cpu")
                    for key, (dtype, shape) in kinds.items()
                }


def tensors_of(optimizers: Iterable[tuple[str, Optimizer]], parameters: Iterable[Tensor]) -> list[Tensor]:
    """What the optimizers keep of these."""
    wanted = set(map(id, parameters))
    return [
        value
        for _, parameter, state in _states(optimizers)
        if id(parameter) in wanted and state is not None
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def _states(optimizers: Iterable[tuple[str, Optimizer]]) -> Iterable[tuple[str, Tensor, Mapping[str, Any] | None]]:
    for name, optimizer in optimizers:
        for number, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                yield f"{name} group {number} parameter {position}", parameter, optimizer.state.get(parameter)


def _spelled_state(place: str, state: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {key: list(_kind(place, key, value)) for key, value in state.items()}


def _kind(place: str, key: str, value: object) -> tuple[str, list[int]]:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{place}: the optimizer keeps {key}={value!r} of it, which is no tensor; in a pipeline of several stages "
            "each rank has only the state of its own layers, so what is kept of a parameter must be tensors"
        )
    return str(value.dtype).removeprefix("torch."), list(value.shape)
