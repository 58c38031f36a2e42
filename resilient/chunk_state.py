"""What an optimizer keeps of a parameter, as far as a rank owns the parameter's chunks.

A tensor of the parameter's shape is here whole, or absent but for the parts that are owned. A tensor with one element
(a step counter) is here where any chunk is owned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snapshot.absent import Part, bring, hold_parts, is_absent, parts_of, release

from .core.shards import Run


def keep_runs(state: Mapping[str, Any], parameter: Tensor, runs: Sequence[Run]) -> None:
    """These runs of the parameter's elements are owned from now on. What was here stays what it is, what is added is
    uninitialised."""
    for value in state.values():
        if isinstance(value, Tensor):
            is_shaped = value.shape == parameter.shape
            _keep(value, tuple(runs) if is_shaped or not runs else ((0, value.numel()),))


def flat(tensor: Tensor) -> Tensor:
    """1-D, over the same memory. Raises RuntimeError if it is not contiguous."""
    return tensor.detach().view(-1)


def _keep(tensor: Tensor, runs: tuple[Run, ...]) -> None:
    parts = parts_of(tensor) if is_absent(tensor) else ((0, flat(tensor)),)
    if tuple((first, first + part.numel()) for first, part in parts) == runs:
        if runs == ((0, tensor.numel()),):
            _make_whole(tensor, parts)
        return
    if runs == ((0, tensor.numel()),):
        _make_whole(tensor, parts)
        return
    kept = [(start, _taken(parts, start, stop, tensor)) for start, stop in runs]
    release(tensor)
    hold_parts(tensor, kept)


def _make_whole(tensor: Tensor, parts: Sequence[Part]) -> None:
    if is_absent(tensor):
        bring(tensor)
        for first, part in parts:
            flat(tensor)[first : first + part.numel()].copy_(part)


def _taken(parts: Sequence[Part], start: int, stop: int, like: Tensor) -> Tensor:
    """The part itself if it is just these elements; else new memory, so that of the former nothing need stay."""
    for first, part in parts:
        if is_absent(like) and (first, first + part.numel()) == (start, stop):
            return part
    made = torch.empty(stop - start, dtype=like.dtype, device=like.device)
    for first, part in parts:
        low, high = max(first, start), min(first + part.numel(), stop)
        if low < high:
            made[low - start : high - start].copy_(part[low - first : high - first])
    return made
