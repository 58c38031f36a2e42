"""Notices when the user's outermost `backward` begins and returns.

`Tensor.backward`, `GradScaler` and reentrant checkpointing all go through `torch.autograd.backward`,
so that one function is wrapped while the training loop runs. Calls that checkpointing makes from
inside a backward, on this or on an autograd thread, pass through.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def watched_backward(before: Callable[[], None], after: Callable[[Tensor | None], None]) -> Iterator[None]:
    """Within it, `before()` and `after(root)` run around every outermost backward of this thread.

    `root` is the tensor that backward started from, or None if there were several or it is no scalar.
    """
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
        after(_root(tensors))
        return None

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


def _root(tensors: Any) -> Tensor | None:
    if isinstance(tensors, Tensor):
        tensors = (tensors,)
    found = list(tensors)
    return found[0] if len(found) == 1 and found[0].numel() == 1 else None
