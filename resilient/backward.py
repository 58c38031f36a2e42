"""Notices when the user's outermost `backward` begins and returns.

`Tensor.backward`, `GradScaler` and reentrant checkpointing all go through `torch.autograd.backward`,
so that one function is wrapped while the training loop runs. Calls that checkpointing makes from
inside a backward, on this or on an autograd thread, pass through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

Root: TypeAlias = tuple[Tensor, Tensor | None]
"""What a backward began from, and the gradient that it was given for it, if any."""


@contextmanager
def watched_backward(before: Callable[[], None], after: Callable[[Sequence[Root]], None]) -> Iterator[None]:
    """Within it, `before()` and `after(roots)` run around every outermost backward of this thread."""
    original = torch.autograd.backward
    thread = threading.get_ident()
    inside = False

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal inside
        if inside or threading.get_ident() != thread:
            return original(tensors, *args, **kwargs)
        before()
        inside = True
        try:
            original(tensors, *args, **kwargs)
        finally:
            inside = False
        after(_roots(tensors, args[0] if args else kwargs.get("grad_tensors")))
        return None

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


def _roots(tensors: Any, gradients: Any) -> list[Root]:
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    given = [gradients] if gradients is None or isinstance(gradients, Tensor) else list(gradients)
    return list(zip(found, given if len(given) == len(found) else [None] * len(found), strict=True))
