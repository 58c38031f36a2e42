"""An optimizer's own step, over some chunks of its parameters.

For that time its groups name other parameters: 1-D views of the chunks, with views of the gradient, and the parts of
the state that belong to them. The optimizer is none the wiser, so any that works element by element will do
(`resilient.elementwise` finds out). Parameters that are owned whole stay themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snapshot.absent import hold_parts, is_absent, parts_of, release

from .chunk_state import flat
from .core.shards import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """first: the first of its elements in its parameter."""

    first: int
    parameter: nn.Parameter


@contextmanager
def in_chunks(optimizer: Optimizer, runs_of: Callable[[Tensor], Sequence[Run]]) -> Iterator[None]:
    """Within it the optimizer has only these runs of its parameters' elements, as far as they have a gradient."""
    kept = [group["params"] for group in optimizer.param_groups]
    pieces: list[tuple[Tensor, list[_Piece]]] = []
    for group, parameters in zip(optimizer.param_groups, kept, strict=True):
        group["params"] = here = []
        for parameter in parameters:
            runs = runs_of(parameter) if parameter.grad is not None else ()
            if tuple(runs) == ((0, parameter.numel()),):
                here.append(parameter)
            elif runs:
                pieces.append((parameter, _cut(parameter, runs)))
                here += [piece.parameter for piece in pieces[-1][1]]
    for parameter, cut in pieces:
        _hand_out(optimizer, parameter, cut)
    try:
        yield
    finally:
        for group, parameters in zip(optimizer.param_groups, kept, strict=True):
            group["params"] = parameters
        for parameter, cut in pieces:
            _take_back(optimizer, parameter, cut)


def _cut(parameter: Tensor, runs: Sequence[Run]) -> list[_Piece]:
    values, gradients = flat(parameter), _in_order(parameter)
    pieces = []
    for start, stop in runs:
        piece = nn.Parameter(values[start:stop], requires_grad=parameter.requires_grad)
        piece.grad = gradients[start:stop]
        pieces.append(_Piece(first=start, parameter=piece))
    return pieces


def _in_order(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return flat(parameter.grad.contiguous())


def _hand_out(optimizer: Optimizer, parameter: Tensor, pieces: Sequence[_Piece]) -> None:
    if parameter not in optimizer.state:
        return
    state = optimizer.state[parameter]
    parts = {key: dict(parts_of(value)) for key, value in state.items() if value.shape == parameter.shape}
    for number, piece in enumerate(pieces):
        # A counter is counted once by each piece, so each has its own.
        optimizer.state[piece.parameter] = {
            key: parts[key][piece.first] if key in parts else value.clone() if number else value
            for key, value in state.items()
        }


def _take_back(optimizer: Optimizer, parameter: Tensor, pieces: Sequence[_Piece]) -> None:
    found = [(piece.first, optimizer.state.pop(piece.parameter, None)) for piece in pieces]
    states = [(first, state) for first, state in found if state]
    if not states:
        return
    assert len(states) == len(pieces), "an optimizer keeps something of some pieces of a parameter, and not of others"
    state = optimizer.state[parameter]
    for key, value in states[0][1].items():
        if value.shape == pieces[0].parameter.shape:
            _hold(state, key, parameter, [(first, each[key].detach()) for first, each in states])
        else:
            state[key] = value


def _hold(state: dict[str, Any], key: str, parameter: Tensor, parts: list[tuple[int, Tensor]]) -> None:
    tensor = state.get(key)
    dtype, device = parts[0][1].dtype, parts[0][1].device
    if tensor is None or not is_absent(tensor) or (tensor.dtype, tensor.device) != (dtype, device):
        tensor = state[key] = torch.empty(parameter.shape, dtype=dtype, device=device)
        release(tensor)
    known = parts_of(tensor)
    same = len(known) == len(parts) and all(
        first == other and old.data_ptr() == new.data_ptr()
        for (first, old), (other, new) in zip(known, parts, strict=True)
    )
    if not same:
        hold_parts(tensor, parts)
